"""How good a model's answers are: ROUGE-L, exact match and perplexity, each with its interval."""

from kdkit.evaluation.generation import (
    Answer,
    GenerationSettings,
    end_of_text_ids,
    evaluating,
    generate_answers,
    texts_digest,
)
from kdkit.evaluation.measuring import (
    Evaluation,
    LabelLosses,
    evaluate_model,
    evaluate_predictions,
    label_losses,
)
from kdkit.evaluation.scoring import (
    Interval,
    Scores,
    bootstrap_mean,
    bootstrap_ratio,
    exact_match,
    mean_over_seeds,
    paired_difference,
    read_predictions,
    rouge_l,
    score_predictions,
)

__all__ = [
    "Answer",
    "Evaluation",
    "GenerationSettings",
    "Interval",
    "LabelLosses",
    "Scores",
    "bootstrap_mean",
    "bootstrap_ratio",
    "end_of_text_ids",
    "evaluate_model",
    "evaluate_predictions",
    "evaluating",
    "exact_match",
    "generate_answers",
    "label_losses",
    "mean_over_seeds",
    "paired_difference",
    "read_predictions",
    "rouge_l",
    "score_predictions",
    "texts_digest",
]

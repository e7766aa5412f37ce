"""How good a model's answers are: ROUGE-L, exact match and perplexity, each with its interval."""

from kdkit.evaluation.generation import (
    Answer,
    GenerationSettings,
    end_of_text_ids,
    evaluating,
    generate_answers,
)
from kdkit.evaluation.scoring import (
    Interval,
    Scores,
    bootstrap_mean,
    bootstrap_ratio,
    exact_match,
    paired_difference,
    read_predictions,
    rouge_l,
    score_predictions,
)

__all__ = [
    "Answer",
    "GenerationSettings",
    "Interval",
    "Scores",
    "bootstrap_mean",
    "bootstrap_ratio",
    "end_of_text_ids",
    "evaluating",
    "exact_match",
    "generate_answers",
    "paired_difference",
    "read_predictions",
    "rouge_l",
    "score_predictions",
]

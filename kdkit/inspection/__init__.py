"""Models looked at closely: a finished run's on one prompt, and a teacher before any run.

Of a run: what its models find likely, how soft-DTW aligns them, whose gradient moves them, what memory it takes. Of a
teacher: its weights, experts and tokenizer.
"""

from kdkit.inspection.alignment import Alignment, AnswerUnits, alignment_of, read_units
from kdkit.inspection.curriculum import ablation_rows, planned_rows
from kdkit.inspection.distributions import AnswerPositions, read_positions
from kdkit.inspection.experts import WordExperts, expert_shares, gated_sum_errors, word_experts
from kdkit.inspection.gradients import BatchGradients, TermGradient, gradient_rows, term_gradients
from kdkit.inspection.memory import measured_peaks
from kdkit.inspection.runs import RunModels, compare_answers, load_run_models
from kdkit.inspection.sample import sample_batch, sample_rows
from kdkit.inspection.spans import TokenizerPair, compare_tokenizers, pair_tokenizers, read_spans
from kdkit.inspection.texts import choose_example, replayed_texts
from kdkit.inspection.thresholds import load_traces, save_traces, threshold_traces
from kdkit.inspection.weights import nf4_obstacle, precision_rows, read_config, weight_rows

__all__ = [
    "Alignment",
    "AnswerPositions",
    "AnswerUnits",
    "BatchGradients",
    "RunModels",
    "TermGradient",
    "TokenizerPair",
    "WordExperts",
    "ablation_rows",
    "alignment_of",
    "choose_example",
    "compare_answers",
    "compare_tokenizers",
    "expert_shares",
    "gated_sum_errors",
    "gradient_rows",
    "load_run_models",
    "load_traces",
    "measured_peaks",
    "nf4_obstacle",
    "pair_tokenizers",
    "planned_rows",
    "precision_rows",
    "read_config",
    "read_positions",
    "read_spans",
    "read_units",
    "replayed_texts",
    "sample_batch",
    "sample_rows",
    "save_traces",
    "term_gradients",
    "threshold_traces",
    "weight_rows",
    "word_experts",
]

"""A finished run looked at closely: its models on one prompt, what they find likely, how soft-DTW aligns them."""

from kdkit.inspection.alignment import Alignment, AnswerUnits, alignment_of, read_units
from kdkit.inspection.distributions import AnswerPositions, read_positions
from kdkit.inspection.runs import RunModels, compare_answers, load_run_models
from kdkit.inspection.texts import choose_example, replayed_texts
from kdkit.inspection.thresholds import load_traces, save_traces, threshold_traces

__all__ = [
    "Alignment",
    "AnswerPositions",
    "AnswerUnits",
    "RunModels",
    "alignment_of",
    "choose_example",
    "compare_answers",
    "load_run_models",
    "load_traces",
    "read_positions",
    "read_units",
    "replayed_texts",
    "save_traces",
    "threshold_traces",
]

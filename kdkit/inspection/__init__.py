"""Runs looked at closely: models on one prompt, what they find likely, what aligns, whose gradient moves them."""

from kdkit.inspection.alignment import Alignment, AnswerUnits, alignment_of, read_units
from kdkit.inspection.curriculum import ablation_rows, planned_rows
from kdkit.inspection.distributions import AnswerPositions, read_positions
from kdkit.inspection.gradients import BatchGradients, TermGradient, gradient_rows, term_gradients
from kdkit.inspection.runs import RunModels, compare_answers, load_run_models
from kdkit.inspection.texts import choose_example, replayed_texts
from kdkit.inspection.thresholds import load_traces, save_traces, threshold_traces

__all__ = [
    "Alignment",
    "AnswerPositions",
    "AnswerUnits",
    "BatchGradients",
    "RunModels",
    "TermGradient",
    "ablation_rows",
    "alignment_of",
    "choose_example",
    "compare_answers",
    "gradient_rows",
    "load_run_models",
    "load_traces",
    "planned_rows",
    "read_positions",
    "read_units",
    "replayed_texts",
    "save_traces",
    "term_gradients",
    "threshold_traces",
]

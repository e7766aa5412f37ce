"""What can be wrong with a run, seen from its log alone: one module per theme, each check beside its function."""

from kdkit.doctor.run.evaluation import FROZEN_EVALUATION, PERPLEXITY, PERPLEXITY_CAP, SAME_OBJECTIVE
from kdkit.doctor.run.generation import ENDED, EXACT_MATCH, LENGTH, OWN_TEXT, REPETITION, ROUGE
from kdkit.doctor.run.loss import DIVERGENCE, GRADIENT, LEARNING, NOT_FINITE, OSCILLATION, SPIKES
from kdkit.doctor.run.machine import DTYPES, EARLY_STOP, LOG_VOLUME, MEMORY, OUT_OF_MEMORY, TIME_LEFT
from kdkit.doctor.run.schedule import LEARNING_RATE_ZERO, SCHEDULE_LENGTH, SCHEDULER
from kdkit.doctor.run.terms import DOMINANCE, LOAD_BALANCE, PARTS_SUM, SCALE, VANISHED

__all__ = ["RUN_CHECKS"]

RUN_CHECKS = (
    LEARNING_RATE_ZERO,
    SCHEDULE_LENGTH,
    FROZEN_EVALUATION,
    PERPLEXITY_CAP,
    PERPLEXITY,
    NOT_FINITE,
    SCALE,
    DIVERGENCE,
    LEARNING,
    SAME_OBJECTIVE,
    MEMORY,
    DTYPES,
    OUT_OF_MEMORY,
    ROUGE,
    EXACT_MATCH,
    LOG_VOLUME,
    EARLY_STOP,
    SCHEDULER,
    DOMINANCE,
    PARTS_SUM,
    OSCILLATION,
    SPIKES,
    GRADIENT,
    VANISHED,
    LOAD_BALANCE,
    TIME_LEFT,
    OWN_TEXT,
    LENGTH,
    ENDED,
    REPETITION,
)
"""Every check of a log, in the order of codes."""

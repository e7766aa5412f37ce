"""Checks of training on the student's own text."""

from collections.abc import Iterator

from kdkit.config.rollout import RolloutConfig
from kdkit.doctor.config.subject import Stage
from kdkit.doctor.findings import Check, NotApplicable, Observation, warn
from kdkit.doctor.sources import DISTILLM, POST_MORTEMS

MOST_EARLY_SHARE = 0.5
"""Of the student's own text at the first step (adaptive)."""
LEAST_EPSILON = 0.05
"""In nats: the noise of a validation loss over some hundred rows."""


def _rollout_of(stage: Stage) -> RolloutConfig:
    stage.needs("rollout.mode")
    if not stage.config.rollout.is_on:
        raise NotApplicable("rollout.mode other than off")
    return stage.config.rollout


def check_guard(stage: Stage) -> Iterator[Observation]:
    """Text that nothing looks at before it is trained on."""
    rollout = _rollout_of(stage)
    missing = [name for name in ("guard", "collapse") if getattr(rollout, name) is None]
    if missing:
        yield warn(
            f"rollout.mode {rollout.mode} without {' and '.join(missing)}",
            **({} if stage.is_foreign else {f"rollout.{name}": {} for name in missing}),
        )


def check_early_generation(stage: Stage) -> Iterator[Observation]:
    """A share that is high from the start, or rises by itself."""
    rollout = _rollout_of(stage)
    if rollout.mode == "adaptive" and stage.knows("rollout.threshold") and rollout.start_threshold >= MOST_EARLY_SHARE:
        yield warn(
            f"rollout.threshold {rollout.start_threshold:g}: {rollout.start_threshold:.0%} of the batches are the "
            "student's own text from the first step",
            **{"rollout.threshold": 0.0},
        )
    if rollout.mode == "adaptive" and stage.knows("rollout.loss_epsilon") and rollout.loss_epsilon < LEAST_EPSILON:
        yield warn(
            f"rollout.loss_epsilon {rollout.loss_epsilon:g}: a rise of the validation loss that small raises the share",
            **{"rollout.loss_epsilon": 0.1},
        )


CHECKS = (
    Check(
        "KD118",
        "unguarded text of the student",
        "the student's own text is trained on without a guard, or nothing takes its share back",
        "Empty, cut and repeating texts become the next target, and what is generated gets worse with each round.",
        "Set rollout.guard={} and rollout.collapse={}, which take the defaults.",
        POST_MORTEMS,
        check_guard,
    ),
    Check(
        "KD119",
        "share of the student's text",
        "an adaptive threshold that starts high, or a small epsilon",
        "The threshold is the share of the student's own text, no filter of it: 0.7 is 70 %. Epsilon is the rise of "
        "the validation loss that raises it: a smaller one fires sooner.",
        "Start at 0 with an epsilon of 0.1, as DistiLLM does.",
        DISTILLM,
        check_early_generation,
    ),
)

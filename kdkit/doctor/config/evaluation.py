"""Checks of when a run is looked at, when it stops, and what is kept of it."""

import math
from collections.abc import Iterator

from kdkit.doctor.config.subject import Stage
from kdkit.doctor.findings import Check, NotApplicable, Observation, warn
from kdkit.doctor.run.machine import SESSION_HOURS
from kdkit.doctor.sources import POST_MORTEMS
from kdkit.memory.planning import count_rows

USUAL_EVALUATIONS = 10
"""Of a stage."""
LEAST_EVALUATIONS = 2
MOST_GENERATED = 0.5
"""Tokens that evaluations write to those that training reads; writing one takes longer than reading one."""
LEAST_ANSWERS = 30
"""Below which a ROUGE-L moves by several points from one draw of rows to another."""
PATIENT_FRACTION = 0.1
"""Of the steps, in which a stage may stand still."""
LONG_HOURS = 0.5
"""After which a lost run is a loss."""
CHECKPOINT_MINUTES = 10.0
MOST_CHECKPOINTS = 200
"""Of a stage; each writes the weights and the optimizer's state."""


def check_interval(stage: Stage) -> Iterator[Observation]:
    """Evaluations while training: none, few, or of too few answers."""
    stage.needs("evaluation.every_steps")
    every, answers = stage.config.evaluation.every_steps, stage.config.evaluation.generate_rows
    if every == 0:
        steps = stage.num_steps_if_known
        patch = {"evaluation.every_steps": _tenth(steps)} if steps is not None else {"evaluation.every_steps": 100}
        yield warn("evaluation.every_steps=0: nothing is measured before the end", **patch)
        return
    if answers is not None and 0 < answers < LEAST_ANSWERS and stage.knows("evaluation.generate_rows"):
        yield warn(
            f"evaluation.generate_rows={answers}: a ROUGE-L of so few answers moves by several points by chance",
            **{"evaluation.generate_rows": 100},
        )
    steps = stage.num_steps
    if every * LEAST_EVALUATIONS > steps:
        yield warn(
            f"evaluation.every_steps={every:,} of {steps:,}: {steps // every} of them before the end",
            **{"evaluation.every_steps": _tenth(steps)},
        )


def _tenth(steps: int) -> int:
    return max(steps // USUAL_EVALUATIONS, 1)


def check_cost(stage: Stage) -> Iterator[Observation]:
    """Evaluations that take more than training."""
    stage.needs("evaluation.every_steps", "optim.batch_size", "optim.accumulation")
    evaluation, optim, data = stage.config.evaluation, stage.config.optim, stage.config.data
    if evaluation.every_steps == 0:
        raise NotApplicable("evaluations while training")
    steps = stage.num_steps
    times = steps // evaluation.every_steps
    if stage.is_foreign and times > 100 * USUAL_EVALUATIONS:
        yield warn(f"{times:,} evaluations in {steps:,} steps", **{"evaluation.every_steps": _tenth(steps)})
        return
    stage.needs("evaluation.generate_rows", "evaluation.max_new_tokens", "data.max_length")
    answers = evaluation.generate_rows
    if answers is None:
        answers = count_rows(data.validation, data.validation_rows)
    if answers is None:
        raise NotApplicable("the number of validation rows")
    written = times * answers * evaluation.max_new_tokens
    read = steps * optim.batch_size * optim.accumulation * data.max_length
    if written > MOST_GENERATED * read:
        yield warn(
            f"{times:,} evaluations write up to {written:,} tokens, training reads up to {read:,}",
            **_cheaper(stage, affordable_rows=int(MOST_GENERATED * read / evaluation.max_new_tokens)),
        )


def _cheaper(stage: Stage, *, affordable_rows: int) -> dict[str, int]:
    """Rarer evaluations, or else of fewer answers, but no fewer than say something."""
    evaluation, rarest = stage.config.evaluation, _tenth(stage.num_steps)
    if evaluation.every_steps < rarest:
        return {"evaluation.every_steps": rarest}
    rows = affordable_rows // (stage.num_steps // evaluation.every_steps)
    return {"evaluation.generate_rows": rows} if rows >= LEAST_ANSWERS else {}


def check_patience(stage: Stage) -> Iterator[Observation]:
    """Early stopping that ends a stage before it could have got better."""
    early, every = stage.config.evaluation.early_stopping, stage.config.evaluation.every_steps
    stage.needs("evaluation.early_stopping.patience", "evaluation.every_steps")
    if early is None or every == 0:
        raise NotApplicable("evaluation.early_stopping")
    steps, waits = stage.num_steps, early.patience * every
    if waits < PATIENT_FRACTION * steps:
        patience = math.ceil(2 * PATIENT_FRACTION * steps / every)
        yield warn(
            f"{early.patience} evaluations of {every:,} steps each are {waits / steps:.1%} of {steps:,} steps",
            **{"evaluation.early_stopping.patience": patience},
        )
    last = _last_change(stage)
    if stage.is_foreign and last > 0:
        yield warn(f"the weights of the objective change until {last:.0%} of the steps, and its total is watched")


def _last_change(stage: Stage) -> float:
    """Fraction of the stage at which the last weight stands still."""
    return max(
        (weight.finish for weight in stage.config.objective.weights.values() if not weight.is_constant), default=0
    )


def check_saving(stage: Stage) -> Iterator[Observation]:
    """A run that leaves nothing when its session ends."""
    stage.needs("checkpoint.every_steps")
    checkpoint = stage.config.checkpoint
    hours = _hours(stage)
    if hours is not None and hours > SESSION_HOURS:
        yield warn(
            f"about {hours:.0f} hours of training on a {stage.around.card.name}, a session has {SESSION_HOURS:g}: it "
            "takes several, each continued with --resume"
        )
    if checkpoint.every_steps == 0 and checkpoint.every_minutes == 0 and (hours is None or hours > LONG_HOURS):
        length = "of unknown length" if hours is None else f"of about {hours:.1f} hours"
        yield warn(
            f"a run {length} without a checkpoint before its end",
            **{"checkpoint.every_minutes": CHECKPOINT_MINUTES},
        )
    steps, every = stage.num_steps_if_known, checkpoint.every_steps
    if steps is None or every == 0:
        return
    if steps // every > MOST_CHECKPOINTS:
        yield warn(
            f"checkpoint.every_steps={every:,} of {steps:,} steps: {steps // every:,} checkpoints are written",
            **{"checkpoint.every_steps": _tenth(steps)},
        )
    elif checkpoint.every_minutes == 0 and every > steps:
        yield warn(
            f"checkpoint.every_steps={every:,} of {steps:,} steps: there is none before the end",
            **{"checkpoint.every_steps": _tenth(steps)},
        )


def _hours(stage: Stage) -> float | None:
    """Of the whole run on the card; None where steps or models are not known."""
    if stage.is_foreign:
        return None
    try:
        seconds = stage.around.plan.seconds
    except NotApplicable:
        return None
    return None if seconds is None else seconds / 3600


def check_seed(stage: Stage) -> Iterator[Observation]:
    """A run that cannot be repeated."""
    if not stage.knows("seed"):
        yield warn("the file sets no seed")


CHECKS = (
    Check(
        "KD120",
        "evaluation too rare",
        "none before the end, fewer than two in a stage, or of under 30 answers",
        "What goes wrong early is seen when all the time is spent, and neither early stopping nor an adaptive share "
        "has anything to go by.",
        "Evaluate about ten times in a stage, on some 100 answers.",
        POST_MORTEMS,
        check_interval,
    ),
    Check(
        "KD121",
        "evaluation too dear",
        "evaluations write more than half as many tokens as training reads",
        "Writing an answer takes one pass a token, reading one takes one in all.",
        "Evaluate more rarely, or generate fewer rows while training; the final figures use all of them anyway.",
        "kdkit's own timings",
        check_cost,
    ),
    Check(
        "KD122",
        "patience of early stopping",
        "patience times interval is under 10 % of the steps, or the total loss of a curriculum is watched",
        "A stage ends in its first flat stretch. A total whose weights change rises because of them.",
        "Wait for 20 % of the steps, and watch ROUGE-L or cross-entropy.",
        POST_MORTEMS,
        check_patience,
    ),
    Check(
        "KD124",
        "session and checkpoints",
        "hours of training without a checkpoint, more of them than a session has, or a checkpoint every few steps",
        "A session ends after 12 hours, or when the machine is taken away, and what was not saved is gone.",
        "Set checkpoint.every_minutes=10; continue with --resume.",
        POST_MORTEMS,
        check_saving,
    ),
    Check(
        "KD125",
        "seed",
        "no seed is set",
        "Nobody can repeat the run, nor tell a change from chance.",
        "Set one, and compare settings over several.",
        "common practice",
        check_seed,
    ),
)

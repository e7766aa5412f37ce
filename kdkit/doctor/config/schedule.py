"""Checks of learning rate, its schedule and the number of steps."""

from collections.abc import Iterator

from kdkit.doctor.config.subject import Stage
from kdkit.doctor.findings import Check, NotApplicable, Observation, fail, warn
from kdkit.doctor.sources import POST_MORTEMS

WARMUP_FRACTION = 0.1
"""What a fix sets. 0.1 to 0.15 is usual."""
MOST_WARMUP_FRACTION = 0.2
HIGHEST_RATE = 0.02
"""Of AdamW, which moves each weight by about so much a step; small students from random weights bear 0.01."""
RUINOUS_RATE = 0.1
USUAL_RATE = 5e-4
"""Of DistiLLM for GPT-2 0.1B."""
LONGER_SCHEDULE = 1.05
"""Schedule to optimizer steps; a rest of the rows may make a step more or less."""


def check_warmup(stage: Stage) -> Iterator[Observation]:
    """Warm-up in optimizer steps, as a share of them."""
    optim = stage.config.optim
    if not (stage.knows("optim.warmup_steps") or stage.knows("optim.warmup_fraction")):
        raise NotApplicable("optim.warmup_steps or optim.warmup_fraction in the file")
    if optim.scheduler == "constant":
        yield warn("scheduler constant has no warm-up", **{"optim.scheduler": "constant_with_warmup"})
        return
    field = "optim.warmup_fraction" if optim.warmup_steps is None else "optim.warmup_steps"
    if (optim.warmup_steps if optim.warmup_steps is not None else optim.warmup_fraction) == 0:
        yield warn(f"{field}=0: the first steps have the full learning rate", **_usual_warmup(stage, field))
        return
    steps, warmup = stage.num_steps, stage.warmup_steps
    evidence = f"{warmup:,} of {steps:,} optimizer steps are warm-up, {warmup / steps:.1%}"
    if warmup >= steps:
        yield fail(f"{evidence}: the learning rate never reaches its peak", **_usual_warmup(stage, field))
    elif warmup > MOST_WARMUP_FRACTION * steps:
        yield warn(evidence, **_usual_warmup(stage, field))


def _usual_warmup(stage: Stage, field: str) -> dict[str, int | float]:
    """What to set; nothing where another trainer wants steps, and nobody knows of how many."""
    if field == "optim.warmup_fraction":
        return {field: WARMUP_FRACTION}
    steps = stage.num_steps_if_known
    return {} if steps is None else {field: max(round(WARMUP_FRACTION * steps), 1)}


def check_schedule_length(stage: Stage) -> Iterator[Observation]:
    """A schedule that counts what the optimizer does not."""
    stage.needs("optim.max_steps", "optim.epochs", "optim.batch_size", "optim.accumulation")
    optim, due = stage.config.optim, stage.steps_of_epochs
    if not stage.is_foreign or optim.max_steps is None:
        return  # kdkit's schedule has as many steps as its optimizer
    if due is None:
        raise NotApplicable("the number of training rows: give --rows")
    if optim.max_steps > LONGER_SCHEDULE * due:
        shared = f" on each of {stage.processes} cards" if stage.processes != 1 else ""
        yield fail(
            f"the schedule has {optim.max_steps:,} steps, the optimizer {due:,}: {optim.epochs:g} epochs in batches of "
            f"{optim.batch_size}{shared}, {optim.accumulation} to a step",
            **{"optim.max_steps": due},
        )


def check_learning_rate(stage: Stage) -> Iterator[Observation]:
    """A peak that no AdamW survives."""
    stage.needs("optim.learning_rate")
    rate = stage.config.optim.learning_rate
    if rate >= HIGHEST_RATE:
        say = fail if rate >= RUINOUS_RATE else warn
        yield say(f"optim.learning_rate={rate:g}", **{"optim.learning_rate": USUAL_RATE})


CHECKS = (
    Check(
        "KD102",
        "warm-up",
        "more than 20 % of the optimizer steps are warm-up, or none are",
        "Counted in forward passes, a warm-up is longer by the accumulation than it was meant to be. Without one, the "
        "first steps of AdamW are its largest. Between 0 and 20 % the share is a taste; 10 to 15 % is usual.",
        "Warm up for about 10 % of the optimizer steps.",
        POST_MORTEMS,
        check_warmup,
    ),
    Check(
        "KD103",
        "schedule longer than the run",
        "the schedule's steps exceed those of the optimizer",
        "The schedule was made for forward passes, and only every accumulated one is an optimizer step: the learning "
        "rate is still rising, or near its peak, when the run ends.",
        "Give the schedule rows x epochs / (batch x accumulation) steps.",
        POST_MORTEMS,
        check_schedule_length,
    ),
    Check(
        "KD126",
        "learning rate",
        "a peak of 0.02 and more",
        "AdamW moves each weight by about the learning rate at every step, whatever the size of its gradient: weights "
        "are some hundredths large, and gone after a few steps.",
        "Take 1e-4 to 1e-3 for a pretrained student, up to 1e-2 for a small one from random weights.",
        "Kingma and Ba 2015, arXiv:1412.6980, section 2.1",
        check_learning_rate,
    ),
)

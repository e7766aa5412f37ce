"""Checks of what is minimised: weights, temperature, K, and what a divergence presupposes."""

import re
from collections.abc import Iterator

from kdkit.config.objective import TERM_NAMES
from kdkit.doctor.config.subject import Stage
from kdkit.doctor.findings import Check, NotApplicable, Observation, Value, fail, warn
from kdkit.doctor.sources import DISTILLM, HINTON, POST_MORTEMS
from kdkit.schedules import Schedule

SUM_RANGE = (0.5, 4.0)
"""Of the largest weights of all terms. AdamW divides by a common factor; only clipping gradients meets it."""
LEAST_SHARE = 0.005
"""Of a term's weight in the sum, below which it cannot be told from none."""
HIGHEST_TEMPERATURE = 2.5
USUAL_TEMPERATURE = 2.0
LEAST_TOP_K = 16
USUAL_TOP_K = 256
MODE_SEEKING = ("reverse_kl", "skew_reverse_kl")
_TUNED = re.compile(r"sft|init(?!ial)|instruct|chat|fine-?tun|warm", re.IGNORECASE)
"""Names of students that were tuned before: DistiLLM's own scripts begin with results/.../init or sft."""
WARM_START: dict[str, Value] = {
    "objective": {"kd": {"weight": 0.0}, "lm": {"weight": 1.0}, "dtw": {"weight": 0.0}},
    "rollout": {"mode": "off"},
}
"""A stage of labels alone, as the presets have it."""


def check_weights(stage: Stage) -> Iterator[Observation]:
    """The sum of all weights, and terms that weigh next to nothing."""
    known = [name for name in TERM_NAMES if stage.knows(f"objective.{name}.weight")]
    if not known:
        raise NotApplicable("weights of the objective in the file")
    weights = {name: stage.config.objective.weights[name] for name in known}
    weights = {name: weight for name, weight in weights.items() if weight.largest > 0}
    total = sum(weight.largest for weight in weights.values())
    shares = ", ".join(f"{name} {weight.largest:g}" for name, weight in weights.items())
    if weights and not SUM_RANGE[0] <= total <= SUM_RANGE[1]:
        scaled = {f"objective.{name}.weight": _scaled(weight, 1 / total) for name, weight in weights.items()}
        yield warn(f"weights add up to {total:g}: {shares}", **scaled)
        return
    for name, weight in weights.items():
        if weight.largest < LEAST_SHARE * total:
            yield warn(
                f"{name} has {weight.largest:g} of {total:g}, {weight.largest / total:.2%} of all weights: {shares}"
            )


def _scaled(schedule: Schedule, factor: float) -> Value:
    """The schedule times a factor, in four digits."""
    if schedule.is_constant:
        return _rounded(schedule.start * factor)
    tree: dict[str, Value] = schedule.model_dump(mode="json")
    return tree | {"start": _rounded(schedule.start * factor), "end": _rounded(schedule.end * factor)}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def check_temperature(stage: Stage) -> Iterator[Observation]:
    """High temperatures, and what the factor of their square does to the loss."""
    stage.needs_kd()
    stage.needs("objective.kd.temperature")
    kd = stage.config.objective.kd
    hottest = kd.temperature.largest
    if hottest > HIGHEST_TEMPERATURE:
        factor = f", and its square multiplies the loss by {hottest**2:g}" if kd.temperature_scaling == "square" else ""
        yield warn(f"temperature {hottest:g}{factor}", **{"objective.kd.temperature": _cooled(kd.temperature)})
    elif kd.temperature_scaling == "none" and hottest >= USUAL_TEMPERATURE:
        yield warn(
            f"temperature {hottest:g} without its square: the term's gradients are {hottest**2:g} times smaller",
            **{"objective.kd.temperature_scaling": "square"},
        )


def _cooled(temperature: Schedule) -> Value:
    if temperature.is_constant:
        return USUAL_TEMPERATURE
    tree: dict[str, Value] = temperature.model_dump(mode="json")
    start, end = (min(value, USUAL_TEMPERATURE) for value in (temperature.start, temperature.end))
    return tree | {"start": start, "end": 1.5 if start == end == USUAL_TEMPERATURE else end}


def check_temperature_schedule(stage: Stage) -> Iterator[Observation]:
    """A temperature that rises, or goes below 1."""
    stage.needs_kd()
    stage.needs("objective.kd.temperature")
    temperature = stage.config.objective.kd.temperature
    if temperature.smallest < 1:
        low = {name: max(value, 1.0) for name, value in (("start", temperature.start), ("end", temperature.end))}
        tree: dict[str, Value] = {"start": 1.0} if temperature.is_constant else temperature.model_dump(mode="json")
        fixed: Value = 1.0 if temperature.is_constant or low["start"] == low["end"] == 1.0 else tree | low
        yield warn(f"temperature {temperature.smallest:g} is below 1", **{"objective.kd.temperature": fixed})
    elif not temperature.is_constant and temperature.end > temperature.start:
        turned: dict[str, Value] = temperature.model_dump(mode="json")
        turned |= {"start": temperature.end, "end": temperature.start}
        yield warn(
            f"temperature rises from {temperature.start:g} to {temperature.end:g}",
            **{"objective.kd.temperature": turned},
        )


def check_warm_start(stage: Stage) -> Iterator[Observation]:
    """A mode-seeking divergence, or the student's own text, with nothing learnt before."""
    stage.needs("objective.kd.loss")
    config = stage.config
    kd, is_on = config.objective.kd, config.rollout.is_on and stage.knows("rollout.mode")
    if stage.earlier or not (is_on or (kd.loss in MODE_SEEKING and kd.weight.largest > 0)):
        return
    if not config.student.from_scratch:
        is_on = is_on and config.rollout.gate is None  # else nothing is generated before the student can answer
        if _TUNED.search(config.student.path) or not (is_on or kd.loss in MODE_SEEKING):
            return
    start = "random weights" if config.student.from_scratch else "a student that no earlier stage has tuned"
    what = f"rollout.mode {config.rollout.mode}" if is_on else f"objective.kd.loss {kd.loss}"
    evidence = f"{what} from the first step, on {start}"
    if is_on or config.student.from_scratch:
        yield fail(evidence, **_warmed_up(stage))
    else:
        yield warn(evidence, **({} if stage.is_foreign else _warmed_up(stage)))


def _warmed_up(stage: Stage) -> dict[str, Value]:
    """A stage of labels ahead of all stages of the run, under a name that none of them has."""
    if stage.is_foreign:
        return {"rollout.mode": "off"}
    stages = stage.around.config.stages
    name = "warm_start"
    while name in stages:
        name += "_first"
    return {"stages": {name: WARM_START} | dict(stages)}


def check_top_k(stage: Stage) -> Iterator[Observation]:
    """K against the vocabulary."""
    stage.needs_kd()
    stage.needs("objective.kd.top_k")
    top_k = stage.config.objective.kd.top_k
    if top_k is None:
        return
    if top_k < LEAST_TOP_K:
        yield warn(f"top_k {top_k}", **{"objective.kd.top_k": USUAL_TOP_K})
        return
    stage.needs_models()
    vocabulary = min(stage.around.teacher_sizes.vocab_size, stage.around.student_sizes.vocab_size)
    if top_k * 2 > vocabulary:
        yield warn(f"top_k {top_k:,} of a vocabulary of {vocabulary:,}", **{"objective.kd.top_k": None})


CHECKS = (
    Check(
        "KD104",
        "weights of the terms",
        "weights that add up to far from 1, or a term with under 0.5 % of them",
        "AdamW divides a common factor out, so that a sum is no fault by itself; but gradients are clipped after it, "
        "and losses of two runs can no longer be compared. A term of next to no weight costs its time for nothing.",
        "Scale the weights to a sum near 1; give a term some percent, or 0.",
        POST_MORTEMS,
        check_weights,
    ),
    Check(
        "KD105",
        "temperature and its square",
        "a temperature above 2.5, or one of 2 and more without the factor temperature squared",
        "Far above 2 both distributions are nearly even, and what the teacher prefers is lost. The square belongs "
        "there, since gradients shrink by it: at temperature 3 the loss one reads is 9 times the divergence, which is "
        "no fault, and it must not be compared with that of another temperature.",
        "Take 2.0, or 2.0 falling to 1.5, with temperature_scaling square.",
        f"{HINTON}; {POST_MORTEMS}",
        check_temperature,
    ),
    Check(
        "KD106",
        "temperature over the run",
        "a temperature that rises, or one below 1",
        "Soft targets help first, sharp ones last. Below 1 the teacher is made surer than it is.",
        "Let it fall, 2.0 to 1.5 for instance, and not below 1.",
        POST_MORTEMS,
        check_temperature_schedule,
    ),
    Check(
        "KD107",
        "no warm start",
        "a reverse divergence, or the student's own text, from the first step of a student that was not tuned before",
        "Reverse divergences learn from where the student has probability already, and its text is what the teacher "
        "then judges: of an untuned student that is noise. DistiLLM begins after three epochs on the labels.",
        "Put a stage on the labels before it. Where the student was tuned on such rows before, set rollout.gate={}: "
        "its text is used once its ROUGE-L is 20.",
        f"{DISTILLM}; {POST_MORTEMS}",
        check_warm_start,
    ),
    Check(
        "KD109",
        "K against the vocabulary",
        "top_k below 16, or above half of the vocabulary",
        "So few tokens say little of the rest; so many cost a sort and save nothing.",
        "Take 64 to 256, or leave top_k out.",
        f"{POST_MORTEMS}: 256 of 151,936",
        check_top_k,
    ),
)

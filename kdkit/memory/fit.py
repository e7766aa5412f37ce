"""The fastest settings that fit on a card, and what has to be given up for them.

First only what leaves the result as it is: how a step's rows are split, how much is computed again, how many logits
exist at a time. If that is not enough, one thing after another that does change it a
little; shorter rows come last.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from pydantic import JsonValue

from kdkit.config import DistillConfig
from kdkit.config.fields import cache_problems
from kdkit.config.reading import load_config
from kdkit.errors import UserError
from kdkit.memory.cards import Card
from kdkit.memory.estimate import OFFLOAD
from kdkit.memory.planning import Pair, RunPlan, are_other_tokenizers, plan_stages, stages_of
from kdkit.runtime import FULL_FRACTION

Changes = Mapping[str, JsonValue]
"""Field as `--set` names it -> value."""

CHUNKS = (1024, 512, 256, 128, 64)
ANSWERED_IN = {"evaluation.batch_size": {"evaluation", "teacher's answers"}, "rollout.batch_size": {"rollout"}}
"""Field -> the phases whose rows it says."""
SHORTER = (1.0, 0.75, 0.5, 0.375, 0.25)


@dataclass(frozen=True)
class Fit:
    """Settings that fit."""

    changes: dict[str, JsonValue]
    """What to set; empty where the config fits as it is and nothing is faster."""
    plan: RunPlan
    given_up: tuple[str, ...]
    """What may change the result, in words."""

    def patch(self) -> dict[str, JsonValue]:
        """The changes as a tree, for a YAML file."""
        return _tree(self.changes)


def fit_run(config: DistillConfig, card: Card, *, pair: Pair | None = None) -> Fit:
    """The fastest settings that fit, of those that give up least.

    Args:
        config: the run.
        card: on which it is to fit.
        pair: the two models' sizes; None reads them.
    Returns:
        `Fit`; `optim.batch_size` times `optim.accumulation` stays as it is.
    Raises:
        UserError: nothing fits; says the smallest budget that something would.
    """
    pair, stages = pair or Pair.of(config), stages_of(config)
    tightest: tuple[float, Changes] | None = None
    for given_up, sacrifice in _sacrifices(config, pair):
        fitting = []
        for neutral in _neutral(config):
            changes, plan = _with_room_to_answer(stages, {**neutral, **sacrifice}, card=card, pair=pair)
            changes = _different(config, changes)
            if plan.worst.used_fraction <= FULL_FRACTION:
                fitting.append((_step_seconds(plan), len(changes), changes, plan))
            elif tightest is None or plan.worst.used_fraction < tightest[0]:
                tightest = plan.worst.used_fraction, changes
        if fitting:
            _, _, changes, plan = min(fitting, key=lambda found: found[:2])
            changes = {**changes, **_overruled(config, changes)}
            _check(config, changes)
            return Fit(changes, plan, given_up)
    assert tightest is not None
    fraction, changes = tightest
    least = math.ceil(10 * fraction / FULL_FRACTION * card.memory_gib) / 10
    raise UserError(
        f"nothing fits {card.memory_gib:g} GiB ({card.name}): the smallest budget that something would fit is "
        f"{least:.1f} GiB, with {as_settings(changes)}; take a smaller teacher or student, or a larger card"
    )


def as_settings(changes: Changes, *, option: str = "") -> str:
    """Changes as `--set` takes them, side by side, an option before each."""
    spelled = {name: json.dumps(v) if isinstance(v, bool | None) else v for name, v in changes.items()}
    return " ".join(f"{option}{name}={value}" for name, value in spelled.items())


def _sacrifices(config: DistillConfig, pair: Pair) -> Iterator[tuple[tuple[str, ...], Changes]]:
    """What to give up, least first: nothing, one thing, two; then shorter rows on top of these."""
    ways = list(itertools.product(_teacher_ways(config, pair), _student_ways(config)))
    ways.sort(key=lambda both: sum(word is not None for word, _ in both))
    for share in SHORTER:
        shorter = _shorter(config, share)
        words = () if share == 1.0 else (f"rows of at most {shorter['data.max_length']} tokens",)
        for (of_teacher, changes), (of_student, own) in ways:
            given_up = tuple(word for word in (of_teacher, of_student) if word is not None)
            yield (*given_up, *words), {**changes, **own, **shorter}


def _student_ways(config: DistillConfig) -> Iterator[tuple[str | None, Changes]]:
    """The student as it is, or with less around it."""
    yield None, {}
    if config.optim.optimizer == "adamw_torch" and config.student.lora is None:
        yield "the optimizer's states in 8 bits", {"optim.optimizer": "adamw_8bit"}


def _teacher_ways(config: DistillConfig, pair: Pair) -> Iterator[tuple[str | None, Changes]]:
    """The teacher as it is, or smaller, or elsewhere; what changes what it says least comes first."""
    yield None, {}
    teacher = config.teacher
    if not config.objective.needs_teacher or teacher.cache is not None:
        return
    if teacher.dtype == "float32":
        yield "the teacher's weights in half precision", {"teacher.dtype": "auto"}
    if _is_cacheable(config, pair):
        word = "the teacher asked once beforehand (kdkit cache CONFIG --output cache), for its likeliest ids"
        yield word, {"teacher.cache": "cache"}
    packed = pair.teacher.product_params - pair.teacher.stacked_params
    if teacher.quantization is None and teacher.device != OFFLOAD and packed > pair.teacher.num_params / 4:
        changes: Changes = {"teacher.quantization": "nf4", "teacher.dtype": "auto"}
        yield "the teacher's weights in 4 bits", changes
    if teacher.device == "auto" and teacher.quantization is None:
        changes = {"teacher.device": OFFLOAD, "teacher.dtype": "auto"}
        yield "the teacher in the host's memory, a layer at a time on the card, which is slow", changes


def _is_cacheable(config: DistillConfig, pair: Pair) -> bool:
    """Whether a cached teacher can serve every stage; vocabularies of other sizes are taken for other tokenizers."""
    is_one_tokenizer = not are_other_tokenizers(pair.teacher.vocab_size, pair.student.vocab_size)
    problems = itertools.chain.from_iterable(map(cache_problems, stages_of(config).values()))
    return config.objective.needs_teacher and config.teacher.cache is None and is_one_tokenizer and not any(problems)


def _shorter(config: DistillConfig, share: float) -> Changes:
    data = config.data
    if share == 1.0:
        return {}
    length, prompt = (max(int(share * value) // 8 * 8, 16) for value in (data.max_length, data.max_prompt_length))
    return {"data.max_length": length, "data.max_prompt_length": min(prompt, length - 8)}


def _neutral(config: DistillConfig) -> Iterator[Changes]:
    """Settings under which a step trains on the same rows to the same end."""
    chunks = sorted({config.objective.chunk_tokens, *CHUNKS})
    recomputes = sorted({config.student.gradient_checkpointing, True})
    for batch, chunk, recompute in itertools.product(_batches(config), chunks, recomputes):
        yield batch | {"objective.chunk_tokens": chunk, "student.gradient_checkpointing": recompute}


def _batches(config: DistillConfig) -> list[dict[str, JsonValue]]:
    """The ways to split a step's rows; none where stages say themselves how theirs are split."""
    fields = ("optim.batch_size", "optim.accumulation")
    if any(_stages_that_set(config, field) for field in fields):
        return [{}]
    rows = config.optim.batch_size * config.optim.accumulation
    return [dict(zip(fields, (size, rows // size), strict=True)) for size in range(1, rows + 1) if rows % size == 0]


def _with_room_to_answer(
    stages: Mapping[str, DistillConfig], changes: Changes, *, card: Card, pair: Pair
) -> tuple[Changes, RunPlan]:
    """The plan with as many rows answered together, up to those of the config, as fit."""
    rows = {"evaluation.batch_size": max(stage.evaluation.batch_size for stage in stages.values())}
    if any(stage.rollout.is_on for stage in stages.values()):
        rows["rollout.batch_size"] = max(stage.rows_written_together for stage in stages.values())
    while True:
        tried = {**changes, **rows}
        plan = plan_stages({name: _changed(stage, tried) for name, stage in stages.items()}, card, pair=pair)
        if plan.worst.used_fraction <= FULL_FRACTION:
            return tried, plan
        too_many = [field for field, phases in ANSWERED_IN.items() if phases & {*plan.worst.fullest}]
        smaller = {field: (rows[field] + 1) // 2 for field in too_many if rows.get(field, 1) > 1}
        if not smaller:
            return tried, plan
        rows |= smaller


def _changed(config: DistillConfig, changes: Changes) -> DistillConfig:
    """A stage's config with fields set, not validated: it is tried a thousand times."""
    parts: dict[str, dict[str, JsonValue]] = {}
    for field, value in changes.items():
        part, _, name = field.partition(".")
        parts.setdefault(part, {})[name] = value
    return config.model_copy(update={part: getattr(config, part).model_copy(update=own) for part, own in parts.items()})


def _different(config: DistillConfig, changes: Changes) -> Changes:
    """Those that some stage does not say already."""

    def given(field: str) -> object:
        part, _, name = field.partition(".")
        return getattr(getattr(config, part), name)

    own = {"rollout.batch_size": config.rows_written_together}  # what None stands for
    return {
        name: value
        for name, value in changes.items()
        if value not in (given(name), own.get(name)) or _stages_that_set(config, name)
    }


def _overruled(config: DistillConfig, changes: Changes) -> Changes:
    """The same for stages that set a field themselves, which would stand above the change."""
    return {
        f"stages.{stage}.{field}": value
        for field, value in changes.items()
        for stage in _stages_that_set(config, field)
    }


def _stages_that_set(config: DistillConfig, field: str) -> list[str]:
    part, _, name = field.partition(".")
    found = []
    for stage, overrides in config.stages.items():
        own = overrides.get(part)
        if isinstance(own, dict) and name in own:
            found.append(stage)
    return found


def _step_seconds(plan: RunPlan) -> float:
    """Of all stages, each weighed by its steps where they are known."""
    return sum(speed.step_seconds * (plan.steps[name] or 1) for name, speed in plan.speeds.items())


def _check(config: DistillConfig, changes: Changes) -> None:
    """Prove that the config takes the changes.

    Raises:
        UserError: as `load_config`.
    """
    load_config(config.model_dump(mode="json"), [f"{field}={json.dumps(value)}" for field, value in changes.items()])


def _tree(changes: Changes) -> dict[str, JsonValue]:
    """Dotted fields as the mappings of a YAML file."""
    tree: dict[str, JsonValue] = {}
    for field, value in changes.items():
        *path, last = field.split(".")
        below = tree
        for name in path:
            below = cast("dict[str, JsonValue]", below.setdefault(name, {}))
        below[last] = value
    return tree

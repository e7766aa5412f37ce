"""A run's plan: every stage on a card, its peak, its hours; and the fastest settings that fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kdkit.config import DistillConfig
from kdkit.config.reading import stage_config
from kdkit.memory.cards import Card
from kdkit.memory.estimate import MemoryPlan, estimate_memory
from kdkit.memory.hours import Speed, looked_up_speed, measured_speed
from kdkit.memory.sizes import ModelSizes, read_sizes

PADDING_FRACTION = 0.01
"""By how much two heads over one vocabulary differ at most: families round it up differently."""


@dataclass(frozen=True)
class RunPlan:
    """What a run needs of a card, and how long."""

    stages: dict[str, MemoryPlan]
    speeds: dict[str, Speed]
    steps: dict[str, int | None]
    """Optimizer steps of each stage; None where the number of rows is not known from here."""

    @property
    def stage(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda name: self.stages[name].used_fraction)

    @property
    def worst(self) -> MemoryPlan:
        """Its plan."""
        return self.stages[self.stage]

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return self.worst.fits

    @property
    def seconds(self) -> float | None:
        """Of training, evaluations not counted; None where a stage's steps are not known."""
        known = [(self.speeds[name].step_seconds, steps) for name, steps in self.steps.items() if steps is not None]
        return sum(step * count for step, count in known) if len(known) == len(self.steps) else None


@dataclass(frozen=True)
class Pair:
    """The sizes of a run's two models."""

    teacher: ModelSizes
    student: ModelSizes

    @classmethod
    def of(cls, config: DistillConfig) -> "Pair":
        """As their config.json say.

        Raises:
            UserError: as `read_sizes`.
        """
        return cls(
            *(
                read_sizes(side.path, revision=side.revision, trust_remote_code=side.trust_remote_code)
                for side in (config.teacher, config.student)
            )
        )


def plan_run(config: DistillConfig, card: Card, *, pair: Pair | None = None, measured: Path | None = None) -> RunPlan:
    """Memory and time of every stage of a run on a card.

    Args:
        config: the run.
        card: on which it is to run.
        pair: the two models' sizes; None reads them.
        measured: folder of a run whose speed is taken instead of a looked-up one.
    Returns:
        `RunPlan`.
    Raises:
        UserError: a model's config cannot be read; the measured run has no speed.
    """
    speed = None if measured is None else measured_speed(measured)
    return plan_stages(stages_of(config), card, pair=pair or Pair.of(config), speed=speed)


def stages_of(config: DistillConfig) -> dict[str, DistillConfig]:
    """The config of each stage, by name."""
    return {name: stage_config(config, name) for name in config.stages}


def plan_stages(stages: Mapping[str, DistillConfig], card: Card, *, pair: Pair, speed: Speed | None = None) -> RunPlan:
    """The same for stages whose configs are there already.

    Args:
        stages: name -> its config.
        card: on which they are to run.
        pair: the two models' sizes.
        speed: of all of them; None looks it up.
    """
    teacher, student = pair.teacher, pair.student
    return RunPlan(
        {name: estimate_memory(stage, teacher=teacher, student=student, card=card) for name, stage in stages.items()},
        {
            name: speed or looked_up_speed(stage, teacher=teacher, student=student, card=card)
            for name, stage in stages.items()
        },
        {name: count_steps(stage) for name, stage in stages.items()},
    )


def are_other_tokenizers(*widths: int) -> bool:
    """Whether two vocabularies are taken for those of two tokenizers, by their sizes alone."""
    smaller, larger = sorted(widths)
    return larger - smaller >= PADDING_FRACTION * larger


def count_steps(config: DistillConfig) -> int | None:
    """Optimizer steps of a stage on one card; None where they hang on rows that are not here."""
    rows = count_rows(config.data.train, config.data.train_rows)
    if rows is None:
        return config.optim.max_steps
    return config.optim.num_steps(rows)


def count_rows(source: str, limit: int | None) -> int | None:
    """Rows of a JSONL file, as many as are used at most; None for what would have to be opened."""
    file = Path(source)
    if file.suffix != ".jsonl" or not file.is_file():
        return limit
    found = _count_lines(file, file.stat().st_mtime_ns)
    return found if limit is None else min(found, limit)


@lru_cache(maxsize=16)
def _count_lines(file: Path, changed: int) -> int:
    """Lines that hold something; counted once for all that --fit tries, and again when the file has changed."""
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())

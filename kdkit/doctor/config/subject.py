"""What the checks of a config look at: one stage of a run, its models, rows and card, each read when asked for."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from kdkit.config import DataConfig, DistillConfig
from kdkit.doctor.config.foreign import Translation
from kdkit.doctor.findings import NotApplicable, Value
from kdkit.errors import UserError
from kdkit.memory.cards import Card
from kdkit.memory.fit import Fit, fit_run
from kdkit.memory.planning import Pair, RunPlan, count_steps, plan_stages, stages_of
from kdkit.memory.sizes import ModelSizes, read_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdkit.data.encoding import EncodeReport
    from kdkit.data.rows import Rows
    from kdkit.data.spans import TokenizerRelation

SAMPLED_ROWS = 2000
"""Rows that are read at most to see how long they are, the first ones."""


Read = TypeVar("Read")


class Readings:
    """What was read, and what could not be: each is tried once, for all checks and all rounds of a fix."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, object] = {}

    def once(self, key: Hashable, what: str, read: Callable[[], Read]) -> Read:
        """The value of a key.

        Args:
            key: names the value.
            what: is said where it cannot be read.
            read: gives the value when it is asked for first.
        Raises:
            NotApplicable: it cannot be read, which is no fault of the config.
        """
        if key not in self._kept:
            try:
                self._kept[key] = read()
            except NotApplicable as reason:
                self._kept[key] = reason
            except ImportError as error:
                self._kept[key] = NotApplicable(f"{error.name}, for {what}")
            except UserError as error:
                self._kept[key] = NotApplicable(f"{what} ({str(error).splitlines()[0].partition(': ')[0]})")
        kept = self._kept[key]
        if isinstance(kept, NotApplicable):
            raise kept
        return cast("Read", kept)


@dataclass(frozen=True)
class Surroundings:
    """What a config names. What cannot be read makes the checks that need it not applicable."""

    config: DistillConfig
    card: Card
    is_card_assumed: bool = False
    """Whether nobody named it."""
    num_rows: int | None = None
    """Training rows, where they are not to be counted here."""
    readings: Readings = field(default_factory=Readings)

    @property
    def pair(self) -> Pair:
        """The sizes of both models, from their config.json."""
        return Pair(self.teacher_sizes, self.student_sizes)

    @property
    def teacher_sizes(self) -> ModelSizes:
        """Of the teacher."""
        return self._sizes("teacher", self.config.teacher.path, self.config.teacher.revision)

    @property
    def student_sizes(self) -> ModelSizes:
        """Of the student."""
        return self._sizes("student", self.config.student.path, self.config.student.revision)

    def _sizes(self, side: str, path: str, revision: str | None) -> ModelSizes:
        key = "sizes", path, revision
        return self.readings.once(key, f"the {side}'s config.json", lambda: read_sizes(path, revision=revision))

    @property
    def plan(self) -> RunPlan:
        """Memory and time of the whole run on the card."""
        pair = self.pair
        key = "plan", self._key
        return self.readings.once(key, "a plan", lambda: plan_stages(stages_of(self.config), self.card, pair=pair))

    @property
    def fit(self) -> Fit:
        """Settings that fit the card.

        Raises:
            NotApplicable: none do.
        """
        pair = self.pair
        return self.readings.once(("fit", self._key), "settings", lambda: fit_run(self.config, self.card, pair=pair))

    @property
    def _key(self) -> str:
        return self.config.model_dump_json()

    @property
    def teacher_tokenizer(self) -> "PreTrainedTokenizerBase":
        """As training loads it."""
        return self._tokenizer(self.config.teacher.path, self.config.teacher.revision)

    @property
    def student_tokenizer(self) -> "PreTrainedTokenizerBase":
        """As training loads it."""
        student = self.config.student
        if student.tokenizer is None and student.from_scratch:
            return self.teacher_tokenizer
        return self._tokenizer(student.tokenizer or student.path, student.revision)

    def _tokenizer(self, path: str, revision: str | None) -> "PreTrainedTokenizerBase":
        def read() -> "PreTrainedTokenizerBase":
            from kdkit.loading import load_tokenizer

            return load_tokenizer(path, revision=revision)

        return self.readings.once(("tokenizer", path, revision), f"the tokenizer of {path}", read)

    @property
    def relation(self) -> "TokenizerRelation":
        """Of the two tokenizers."""
        from kdkit.data.spans import tokenizer_relation

        student, teacher = self.student_tokenizer, self.teacher_tokenizer
        key = "relation", student.name_or_path, teacher.name_or_path
        return self.readings.once(key, "the tokenizers", lambda: tokenizer_relation(student, teacher))

    def rows(self, source: str, data: DataConfig) -> "Rows":
        """The first rows of a source as the student reads them; only of files and folders that are here."""
        if not Path(source.partition("#")[0]).expanduser().exists():
            raise NotApplicable(f"the rows of {source}, which are not here")
        tokenizer = self.student_tokenizer if data.template == "chat" else None

        def read() -> "Rows":
            from kdkit.data.rows import load_rows

            return load_rows(
                source,
                columns=data.columns,
                template=data.template,
                limit=SAMPLED_ROWS,
                require_references=False,
                tokenizer=tokenizer,
            )

        key = "rows", source, data.template, tuple(sorted(data.columns.items()))
        return self.readings.once(key, f"the rows of {source}", read)

    def lengths(self, data: DataConfig) -> "EncodeReport":
        """What becomes of the first training rows under the limits of a stage."""
        rows, tokenizer = self.rows(data.train, data), self.student_tokenizer

        def read() -> "EncodeReport":
            from kdkit.data.encoding import encode_rows

            encoded = encode_rows(
                rows,
                tokenizer,
                max_length=data.max_length,
                max_prompt_length=data.max_prompt_length,
                unit="token",
                keep_prompt_only=True,
            )
            return encoded.report

        key = "lengths", rows.sha256, tokenizer.name_or_path, data.max_length, data.max_prompt_length
        return self.readings.once(key, "the rows' tokens", read)


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    config: DistillConfig
    """With nothing left to override."""
    earlier: tuple[DistillConfig, ...]
    """Of the stages before it."""
    around: Surroundings
    stated: Mapping[str, Value] | None = None
    """Field -> value, of what another trainer's file speaks of; None: the config is kdkit's, and all of it counts."""
    refused: Sequence[str] = ()
    """Values of that file that nobody can mean, in words."""

    @property
    def is_foreign(self) -> bool:
        """Whether another trainer is to run it."""
        return self.stated is not None

    def knows(self, *fields: str) -> bool:
        """Whether the file speaks of all of these fields."""
        return self.stated is None or self.stated.keys() >= set(fields)

    def needs(self, *fields: str) -> None:
        """Ends a check whose fields the file is silent about.

        Raises:
            NotApplicable: one of them is not known.
        """
        missing = [name for name in fields if not self.knows(name)]
        if missing:
            raise NotApplicable(f"{', '.join(missing)} in the file")

    def needs_kd(self) -> None:
        """Ends a check of a stage that compares no distributions."""
        if self.config.objective.kd.weight.largest == 0:
            raise NotApplicable("a stage with objective.kd")

    def needs_models(self) -> None:
        """Ends a check of the two models, where the file names none."""
        self.needs("teacher.path", "student.path")

    @property
    def num_steps(self) -> int:
        """Optimizer steps.

        Raises:
            NotApplicable: they hang on rows that are not here.
        """
        steps = self.num_steps_if_known
        if steps is None:
            self.needs("optim.epochs", "optim.batch_size", "optim.accumulation")
            raise NotApplicable("the number of training rows: give --rows")
        return steps

    @property
    def num_steps_if_known(self) -> int | None:
        """The same, or None. What another trainer calls its number of steps may be that of its forward passes."""
        given = self.config.optim.max_steps
        if given is not None and not self.is_foreign:
            return given
        counted = self.steps_of_epochs
        return given if counted is None else counted

    @property
    def steps_of_epochs(self) -> int | None:
        """Optimizer steps of all epochs, whatever max_steps says; None where rows, epochs or batches are not known."""
        if not self.knows("optim.epochs", "optim.batch_size", "optim.accumulation"):
            return None
        processes = self.processes
        if processes is None:
            return None
        batch_size = self.config.optim.batch_size * processes
        optim = self.config.optim.model_copy(update={"max_steps": None, "batch_size": batch_size})
        limit, rows = self.config.data.train_rows, self.around.num_rows
        if rows is None:
            return count_steps(self.config.model_copy(update={"optim": optim}))
        return optim.num_steps(rows if limit is None else min(rows, limit))

    @property
    def processes(self) -> int | None:
        """That share the rows, as another trainer's launcher says; None where it says no number."""
        given = [(self.stated or {}).get(field, 1) for field in ("processes", "nodes")]
        counts = [count for count in given if isinstance(count, int) and count > 0]
        return math.prod(counts) if len(counts) == len(given) else None

    @property
    def warmup_steps(self) -> int:
        """Of the optimizer's steps."""
        optim = self.config.optim
        return optim.warmup_steps if optim.warmup_steps is not None else round(optim.warmup_fraction * self.num_steps)


def stages_in(around: Surroundings, translation: Translation | None = None) -> dict[str | None, Stage]:
    """What the checks are asked about, by stage; None is the one stage of a config that names no others."""
    if translation is not None:
        return {None: Stage(around.config, (), around, translation.stated, translation.refused)}
    configs = stages_of(around.config)
    names = list(configs)
    return {
        name if len(names) > 1 else None: Stage(
            configs[name], tuple(configs[earlier] for earlier in names[:index]), around
        )
        for index, name in enumerate(names)
    }

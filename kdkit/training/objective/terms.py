"""What a term of the objective is, what it may know, and what it is a mean over."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from kdkit.data.batch import Batch, teacher_view
from kdkit.loading import ModelShape
from kdkit.losses.alignment import pool_units
from kdkit.losses.terms import Term as HeadTerm
from kdkit.schedules import Schedule
from kdkit.teacher.cross import CrossSignal
from kdkit.teacher.signal import NO_VIEWS, Head, TeacherSignal, Views

Item = Literal["tokens", "labels", "spans", "units", "sequences"]
"""Counted tokens; those of gold rows, which alone are labels to learn; spans of bytes where tokenizers differ; units of
text; rows with a unit."""


ITEMS: tuple[Item, ...] = get_args(Item)
"""Every kind of item."""
PROJECTOR = "projector"
"""The adapter that brings the student's last hidden states into the teacher's space; all terms share it."""


def count_items(batch: Batch) -> dict[Item, int]:
    """How many items of each kind a batch has; no term divides by anything else."""
    return {
        "tokens": batch["positions"].numel(),
        "labels": batch["num_labels"],
        "spans": len(batch["span_starts"]) if "span_starts" in batch else 0,
        "units": batch["num_units"],
        "sequences": batch["num_sequences"],
    }


@dataclass(frozen=True)
class Moment:
    """What a term may know of the moment: how far the stage is, and how many items are counted."""

    step: int
    """Completed optimizer steps of the stage."""
    num_steps: int
    """Optimizer steps of the whole stage."""
    counts: dict[Item, float] = field(default_factory=lambda: dict.fromkeys(ITEMS, 1.0))
    """Items over the accumulation window and all processes; by these the sums are divided."""

    @property
    def fraction(self) -> float:
        """Share of the stage that is done."""
        return self.step / self.num_steps


@dataclass(frozen=True)
class StudentPass:
    """What the student's pass over a batch gave: either its head, or logits where the head cannot be had apart."""

    hidden: Tensor  # (B, T, H) last hidden states
    head: Head | None = None
    logits: Tensor | None = None  # (N, V) at the counted positions
    layers: tuple[Tensor, ...] | None = None  # (B, T, H) each, the embeddings first
    attentions: tuple[Tensor, ...] | None = None  # (B, heads, T, T) each


@dataclass
class TermValue:
    """A term over one batch: its sum with gradient, and what else is worth logging as (sum, weight)."""

    total: Tensor
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scene:
    """One forward pass as the terms over units see it; autocast is off, states are pooled in float32."""

    batch: Batch
    student: StudentPass
    signal: TeacherSignal | CrossSignal
    extras: dict[str, Tensor]  # per counted token, (N,)
    adapters: nn.ModuleDict

    @property
    def teacher_units(self) -> Tensor:
        """(B, S) unit of each of the teacher's tokens, on the student's device."""
        return teacher_view(self.batch)["unit_ids"]

    def pool_student(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, U, H) mean of the student's states over each unit, and (B,) units of each row."""
        return pool_units(states.float(), self.batch["unit_ids"], self.batch["max_units"], lengths=self.lengths)

    def pool_teacher(self, states: Tensor) -> Tensor:
        """(B, U, H) mean of the teacher's states over each unit, on the student's device."""
        states = states.to(self.batch["unit_ids"].device).float()
        return pool_units(states, self.teacher_units, self.batch["max_units"], lengths=self.lengths)[0]

    @cached_property
    def counted_units(self) -> Tensor:
        """(n,) flat indices b * U + u of the units there are, on the student's device."""
        is_unit = np.arange(self.batch["max_units"]) < self.batch["unit_counts"][:, None]  # (B, U)
        return self._on_device(np.flatnonzero(is_unit))

    @cached_property
    def counted_rows(self) -> Tensor:
        """(b,) the rows with a unit, on the student's device."""
        return self._on_device(np.flatnonzero(self.batch["unit_counts"]))

    def _on_device(self, made_on_host: np.ndarray) -> Tensor:
        """Nobody waits for the copy."""
        return torch.from_numpy(made_on_host).to(self.batch["unit_ids"].device, non_blocking=True)

    @cached_property
    def student_units(self) -> tuple[Tensor, Tensor]:
        """Last hidden states of the student by unit, (B, U, H), and the units of each row, (B,)."""
        return self.pool_student(self.student.hidden)

    @property
    def host_lengths(self) -> Tensor:
        """(B,) units of each row, on the host."""
        return torch.from_numpy(self.batch["unit_counts"])

    @cached_property
    def lengths(self) -> Tensor:
        """(B,) units of each row, on the student's device."""
        return self._on_device(self.batch["unit_counts"])

    @cached_property
    def projected(self) -> Tensor:
        """(B, U, H_teacher) the student's last hidden states in the teacher's space."""
        return self.adapters[PROJECTOR](self.student_units[0])

    @cached_property
    def target(self) -> Tensor:
        """(B, U, H_teacher) the teacher's last hidden states, without gradient."""
        assert self.signal.hidden_states is not None
        return self.pool_teacher(self.signal.hidden_states)


class Term(ABC):
    """A named part of the objective.

    Args:
        schedule: share of the total over the stage.
    """

    name: ClassVar[str]
    counts: Item
    """What the term is a mean over."""
    needs_teacher: ClassVar[bool]
    decomposable: ClassVar[bool] = True
    """Whether the term is a sum over items, so that splitting a batch changes nothing."""
    views: Views = NO_VIEWS
    """What it looks at of both models' inside."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @property
    def extras(self) -> tuple[str, ...]:
        """What it asks of the head pass, per token."""
        return ()

    def build_adapters(self, student: ModelShape, teacher: ModelShape) -> dict[str, nn.Module]:
        """What it brings along to be learnt, by name; terms that name the same share it."""
        return {}

    def weight(self, moment: Moment) -> float:
        """Share of the total at a moment."""
        return self.schedule.at(moment.step, moment.num_steps)

    def scale(self, moment: Moment) -> float:
        """Constant factor of the term's own definition, such as temperature squared."""
        return 1.0


class VocabularyTerm(Term):
    """A term over next-token distributions, computed in the head pass."""

    @abstractmethod
    def head_term(
        self, batch: Batch, signal: TeacherSignal | CrossSignal | None, moment: Moment, coefficient: float
    ) -> HeadTerm:
        """The term as the head pass takes it."""


class HiddenTerm(Term):
    """A term over units of text."""

    @abstractmethod
    def __call__(self, scene: Scene, moment: Moment) -> TermValue:
        """The term's sum over one batch."""


def build_projector(student_size: int, teacher_size: int) -> nn.Linear:
    """A projection into the teacher's space: the identity where sizes agree, else orthogonal, to keep angles."""
    projector = nn.Linear(student_size, teacher_size, bias=False)
    if student_size == teacher_size:
        nn.init.eye_(projector.weight)
    else:
        nn.init.orthogonal_(projector.weight)
    return projector


def label_targets(batch: Batch) -> Tensor:
    """(N,) the label that each counted position predicts: the one right after it."""
    return batch["labels"].flatten().index_select(0, batch["positions"] + 1)

"""The loss of a step: named terms, their weights at this step, and their sum.

Two kinds of terms. Those over the vocabulary (`kd`, `lm`) are handed to one chunked head pass; those over hidden
states (`dtw`) are called one by one afterwards and may use what the head pass found out per token. Each gives a sum
over the items it counts; sums are divided by the number of items in the whole accumulation window of all processes, so
that neither the size of a micro-batch nor the number of processes changes the gradient.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from kdkit.config import AdaptiveBandConfig, DtwConfig, KdConfig, LmConfig, ObjectiveConfig
from kdkit.data.batch import Batch
from kdkit.losses import LOSSES, DivergenceTerm, HeadPassResult, LabelTerm, head_pass, logits_pass
from kdkit.losses.alignment import AdaptiveBand, alignment_loss, pool_units
from kdkit.schedules import Schedule
from kdkit.teacher.signal import DenseSignal, Head, LiveSignal, SparseSignal, TeacherSignal

Item = Literal["tokens", "labels", "sequences"]
"""Counted tokens; those of gold rows, which alone are labels to learn; rows with a unit to align."""


ITEMS: tuple[Item, ...] = get_args(Item)


def count_items(batch: Batch) -> dict[Item, int]:
    """How many items of each kind a batch has; no term divides by anything else."""
    return {
        "tokens": batch["positions"].numel(),
        "labels": batch["num_labels"],
        "sequences": batch["num_sequences"],
    }


@dataclass(frozen=True)
class Moment:
    """What a term may know of the moment: how far the stage is, and how many items are counted."""

    step: int
    """Completed optimizer steps of the stage."""
    num_steps: int
    """Optimizer steps of the whole stage."""
    counts: dict[Item, float] = field(default_factory=lambda: {"tokens": 1.0, "labels": 1.0, "sequences": 1.0})
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


@dataclass
class TermValue:
    """A term over one batch: its sum with gradient, and what else is worth logging as (sum, weight)."""

    total: Tensor
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scene:
    """One forward pass as a hidden-state term sees it."""

    batch: Batch
    student_hidden: Tensor  # (B, T, H)
    signal: TeacherSignal
    extras: dict[str, Tensor]  # per counted token, (N,)
    adapters: nn.ModuleDict


class Term(ABC):
    """A named part of the objective.

    Args:
        schedule: share of the total over the stage.
    """

    name: ClassVar[str]
    counts: ClassVar[Item]
    """What the term is a mean over."""
    needs_teacher: ClassVar[bool]
    decomposable: ClassVar[bool] = True
    """Whether the term is a sum over items, so that splitting a batch changes nothing."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @property
    def extras(self) -> tuple[str, ...]:
        """What it asks of the head pass, per token."""
        return ()

    def weight(self, moment: Moment) -> float:
        """Share of the total at a moment."""
        return self.schedule.at(moment.step, moment.num_steps)

    def scale(self, moment: Moment) -> float:
        """Constant factor of the term's own definition, such as temperature squared."""
        return 1.0


class VocabularyTerm(Term):
    """A term over next-token distributions, computed in the head pass."""

    @abstractmethod
    def head_term(self, batch: Batch, moment: Moment, coefficient: float) -> DivergenceTerm | LabelTerm:
        """The term as the head pass takes it."""


class HiddenTerm(Term):
    """A term over hidden states."""

    @abstractmethod
    def __call__(self, scene: Scene, moment: Moment) -> TermValue:
        """The term's sum over one batch."""


class KdTerm(VocabularyTerm):
    """Divergence between teacher and student over the vocabulary, summed over counted tokens."""

    name, counts, needs_teacher = "kd", "tokens", True

    def __init__(self, config: KdConfig) -> None:
        super().__init__(config.weight)
        self.config = config
        self.softening: Schedule = config.temperature
        self.loss = partial(LOSSES[config.loss], **config.loss_arguments)

    def temperature(self, moment: Moment) -> float:
        """Softening of both distributions at a moment."""
        return self.softening.at(moment.step, moment.num_steps)

    def scale(self, moment: Moment) -> float:
        """Temperature squared where the config asks for it."""
        return self.temperature(moment) ** 2 if self.config.temperature_scaling == "square" else 1.0

    def head_term(self, batch: Batch, moment: Moment, coefficient: float) -> DivergenceTerm:
        """The term as the head pass takes it."""
        return DivergenceTerm(self.name, self.loss, weight=coefficient, temperature=self.temperature(moment))


class LmTerm(VocabularyTerm):
    """Cross-entropy of the labels, summed over the counted tokens of gold rows: what the student wrote is no label."""

    name, counts, needs_teacher = "lm", "labels", False

    def __init__(self, config: LmConfig) -> None:
        super().__init__(config.weight)

    def head_term(self, batch: Batch, moment: Moment, coefficient: float) -> LabelTerm:
        """The term as the head pass takes it."""
        return LabelTerm(self.name, label_targets(batch), weight=coefficient, token_weights=batch["is_gold"])


class DtwTerm(HiddenTerm):
    """Soft-DTW between the last hidden states of the answer's units, summed over sequences."""

    name, counts, needs_teacher = "dtw", "sequences", True

    def __init__(self, config: DtwConfig) -> None:
        super().__init__(config.weight)
        self.config = config

    @property
    def extras(self) -> tuple[str, ...]:
        """The teacher's entropy where importance is taken from it."""
        return ("teacher_entropy",) if self.config.importance == "inverse_entropy" else ()

    def __call__(self, scene: Scene, moment: Moment) -> TermValue:
        """Align the projected student with the teacher, in float32 whatever the precision of the pass."""
        units, max_units = scene.batch["unit_ids"], scene.batch["max_units"]
        assert scene.signal.hidden_states is not None
        with torch.autocast(scene.student_hidden.device.type, enabled=False):
            student, lengths = pool_units(scene.student_hidden.float(), units, max_units)  # (B, U, H)
            student = scene.adapters[PROJECTOR](student)  # (B, U, H_teacher)
            teacher_hidden = scene.signal.hidden_states.to(student.device).float()
            teacher, teacher_lengths = pool_units(teacher_hidden, units, max_units)
            importance = self._importance(scene, units, max_units)
            result = alignment_loss(
                student,
                teacher,
                lengths,
                teacher_lengths,
                gamma=self.config.gamma.at(moment.step, moment.num_steps),
                band=self.config.band,
                metric=self.config.metric,
                divergence=self.config.divergence,
                normalize=self.config.normalize,
                student_weights=importance,
                teacher_weights=importance,
                adaptive_band=self._adaptive_band(self.config.adaptive_band, moment),
            )
        return TermValue(
            result.per_sample.sum(),
            {
                "dtw/off_diagonal_fraction": (result.off_diagonal_fraction.sum(), result.counted.sum()),
                "dtw/to_diagonal_ratio": (result.expected.sum(), result.diagonal.sum()),
            },
        )

    def _importance(self, scene: Scene, units: Tensor, max_units: int) -> Tensor | None:
        """(B, U) certainty of the teacher about each unit; with one tokenizer both sides have the same."""
        if self.config.importance == "none":
            return None
        entropy = torch.zeros(units.numel(), device=units.device)
        entropy[scene.batch["positions"] + 1] = scene.extras["teacher_entropy"].float()
        pooled, _ = pool_units(entropy.view(*units.shape, 1), units, max_units)  # (B, U, 1)
        return 1.0 / (1.0 + pooled.squeeze(-1))

    def _adaptive_band(self, config: AdaptiveBandConfig | None, moment: Moment) -> AdaptiveBand | None:
        """The soft band once its warm-up is over."""
        if config is None or moment.fraction < config.begin:
            return None
        return AdaptiveBand(
            mix=config.mix,
            half_width=config.half_width,
            entropy_scale=config.entropy_scale,
            penalty=config.penalty,
        )


PROJECTOR = "dtw_projector"
LABELS_ONLY = "labels_only"


def label_targets(batch: Batch) -> Tensor:
    """(N,) the label that each counted position predicts: the one right after it."""
    return batch["labels"].flatten().index_select(0, batch["positions"] + 1)


class Objective:
    """The weighted sum of the terms of a config."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.kd = KdTerm(config.kd)
        self.vocabulary_terms: tuple[VocabularyTerm, ...] = (self.kd, LmTerm(config.lm))
        self.hidden_terms: tuple[HiddenTerm, ...] = (DtwTerm(config.dtw),)
        every: tuple[Term, ...] = (*self.vocabulary_terms, *self.hidden_terms)
        self.terms = tuple(term for term in every if term.schedule.largest > 0)
        """The terms that the config gives a weight at any time of the stage."""

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the stage looks at a teacher."""
        return any(term.needs_teacher for term in self.terms)

    def build_adapters(self, student_size: int, teacher_size: int | None) -> nn.ModuleDict:
        """The learnt parts that the terms bring: they are trained and saved with the student.

        Args:
            student_size: hidden size of the student.
            teacher_size: hidden size of the teacher, None without one.
        Returns:
            By name; the projector starts as the identity where sizes agree, else orthogonal, so that it keeps angles.
        """
        adapters = nn.ModuleDict()
        if teacher_size is not None and any(term.name == "dtw" for term in self.terms):
            projector = nn.Linear(student_size, teacher_size, bias=False)
            if student_size == teacher_size:
                nn.init.eye_(projector.weight)
            else:
                nn.init.orthogonal_(projector.weight)
            adapters[PROJECTOR] = projector
        return adapters

    def coefficient(self, term: Term, moment: Moment) -> float:
        """Factor between a term's sum and its share of the total."""
        return term.weight(moment) * term.scale(moment) / max(moment.counts[term.counts], 1.0)

    def __call__(
        self,
        student: StudentPass,
        batch: Batch,
        *,
        signal: TeacherSignal | None,
        moment: Moment,
        adapters: nn.ModuleDict,
        extras: tuple[str, ...] = (),
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """The total of one batch and its parts.

        Args:
            student: the student's pass.
            batch: what the collator made.
            signal: what is known of the teacher at the N counted positions; None where no term needs it.
            moment: step and counts.
            adapters: the learnt parts.
            extras: per-token figures wanted of the head pass besides what the terms ask for.
        Returns:
            `loss` (scalar with gradient), `sums` (detached sum of each active term, before weight and scale),
            `statistics` (name -> (2,) sum and weight) and `extras` (name -> (N,)).
        """
        active = [term for term in self.terms if term.weight(moment) > 0]
        wanted = tuple(dict.fromkeys([*extras, *(name for term in active for name in term.extras)]))
        if self.config.kd.top_k is not None and isinstance(signal, DenseSignal | LiveSignal):
            signal = SparseSignal(signal, self.config.kd.top_k)
        passed = self._vocabulary_pass(active, student, batch, signal=signal, moment=moment, extras=wanted)
        loss, sums = passed.total, dict(passed.parts)
        statistics: dict[str, Tensor] = {}
        for term in self.hidden_terms:
            if term not in active:
                continue
            assert signal is not None
            value = term(Scene(batch, student.hidden, signal, passed.extras, adapters), moment)
            loss = loss + self.coefficient(term, moment) * value.total
            sums[term.name] = value.total.detach()
            statistics |= {name: torch.stack(pair) for name, pair in value.statistics.items()}
        return {"loss": loss, "sums": sums, "statistics": statistics, "extras": passed.extras}

    def _vocabulary_pass(
        self,
        active: list[Term],
        student: StudentPass,
        batch: Batch,
        *,
        signal: TeacherSignal | None,
        moment: Moment,
        extras: tuple[str, ...],
    ) -> HeadPassResult:
        """One pass over the counted positions for every term over the vocabulary."""
        terms: list[DivergenceTerm | LabelTerm] = [
            term.head_term(batch, moment, self.coefficient(term, moment))
            for term in self.vocabulary_terms
            if term in active
        ]
        if "label_logprobs" in extras and not any(isinstance(term, LabelTerm) for term in terms):
            terms.append(LabelTerm(LABELS_ONLY, label_targets(batch), weight=0.0))
        chunk_tokens = self.config.chunk_tokens
        if student.logits is not None:
            result = logits_pass(student.logits, signal, terms, chunk_tokens=chunk_tokens, extras=extras)
        else:
            assert student.head is not None
            rows = student.hidden.flatten(0, 1).index_select(0, batch["positions"])  # (N, H)
            result = head_pass(rows, student.head, signal, terms, chunk_tokens=chunk_tokens, extras=extras)
        result.parts.pop(LABELS_ONLY, None)
        return result

"""The loss of a step: the weighted sum of the terms, each a mean over what it counts.

Two kinds of terms. Those over the vocabulary (`kd`, `lm`, `span`) are handed to one chunked head pass; those over units
of text are called one by one afterwards and may use what the head pass found out per token. Each gives a sum over the
items it counts; sums are divided by the number of items in the whole accumulation window of all processes, so that
neither the size of a micro-batch nor the number of processes changes the gradient.
"""

from copy import copy
from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn

from kdkit.config import ObjectiveConfig
from kdkit.data.batch import Batch
from kdkit.errors import UserError
from kdkit.loading import ModelShape
from kdkit.losses import CrossTerm, HeadPassResult, LabelTerm, Spans, head_pass, logits_pass
from kdkit.losses.terms import Term as HeadTerm
from kdkit.teacher.cross import CrossSignal
from kdkit.teacher.signal import NO_VIEWS, DenseSignal, LiveSignal, SparseSignal, TeacherSignal, Views
from kdkit.training.objective.across import Across
from kdkit.training.objective.alignment import DtwTerm
from kdkit.training.objective.features import (
    AttentionTerm,
    ContrastiveTerm,
    HiddenDistanceTerm,
    LayerwiseTerm,
    RoutingTerm,
)
from kdkit.training.objective.terms import (
    HiddenTerm,
    Moment,
    Scene,
    StudentPass,
    Term,
    VocabularyTerm,
    label_targets,
)
from kdkit.training.objective.vocabulary import CrossKdTerm, KdTerm, LmTerm, SpanLikelihoodTerm

LABELS_ONLY = "labels_only"


class Objective:
    """The weighted sum of the terms of a config.

    Args:
        config: the terms and their schedules.
        across: how the ids of two vocabularies relate; None where both models have one tokenizer.
    Raises:
        UserError: a term compares spans, and there is one tokenizer.
    """

    def __init__(self, config: ObjectiveConfig, *, across: Across | None = None) -> None:
        if across is None and config.weights["span"].largest > 0:
            raise UserError(
                "objective.span compares the spans of two tokenizers, and teacher and student have one, so that kd "
                "compares every token: set objective.span.weight=0 and give objective.kd a weight"
            )
        self.config = config
        self.kd = KdTerm(config.kd) if across is None else CrossKdTerm(config.kd, across)
        self.vocabulary_terms: tuple[VocabularyTerm, ...] = (
            self.kd,
            LmTerm(config.lm),
            SpanLikelihoodTerm(config.span, follows=config.kd.weight if across is not None else None),
        )
        self.hidden_terms: tuple[HiddenTerm, ...] = (
            DtwTerm(config.dtw),
            HiddenDistanceTerm(config.hidden),
            AttentionTerm(config.attention),
            LayerwiseTerm(config.layerwise),
            ContrastiveTerm(config.contrastive),
            RoutingTerm(config.routing),
        )
        every: tuple[Term, ...] = (*self.vocabulary_terms, *self.hidden_terms)
        self.terms = tuple(term for term in every if term.schedule.largest > 0)
        """The terms that the config gives a weight at any time of the stage."""

    def only(self, name: str) -> "Objective":
        """The same objective without any other term; its schedules stay those of this one.

        Args:
            name: one of `terms`.
        """
        alone = copy(self)
        alone.terms = tuple(term for term in self.terms if term.name == name)
        assert alone.terms
        return alone

    @property
    def views(self) -> Views:
        """What the terms look at of the models' inside at any time of the stage."""
        return reduce(or_, (term.views for term in self.terms), NO_VIEWS)

    def views_at(self, moment: Moment) -> Views:
        """What the terms look at of the models' inside at a moment."""
        return reduce(or_, (term.views for term in self.terms if term.weight(moment) > 0), NO_VIEWS)

    def build_adapters(self, student: ModelShape, teacher: ModelShape | None) -> nn.ModuleDict:
        """The learnt parts that the terms bring: they are trained and saved with the student.

        Args:
            student: sizes of the student.
            teacher: sizes of the teacher, None without one.
        Returns:
            By name; terms that name the same one share it.
        Raises:
            UserError: a term asks for more than the models have.
        """
        adapters: dict[str, nn.Module] = {}
        for term in self.terms if teacher is not None else ():
            assert teacher is not None
            built = term.build_adapters(student, teacher)
            adapters |= {name: module for name, module in built.items() if name not in adapters}
        return nn.ModuleDict(adapters)

    def coefficient(self, term: Term, moment: Moment) -> float:
        """Factor between a term's sum and its share of the total."""
        return term.weight(moment) * term.scale(moment) / max(moment.counts[term.counts], 1.0)

    def __call__(
        self,
        student: StudentPass,
        batch: Batch,
        *,
        signal: TeacherSignal | CrossSignal | None,
        moment: Moment,
        adapters: nn.ModuleDict,
        extras: tuple[str, ...] = (),
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """The total of one batch and its parts.

        Args:
            student: the student's pass.
            batch: what the collator made.
            signal: what is known of the teacher at the N counted positions, or at the spans where it has another
                tokenizer; None where no term needs it.
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
            signal = SparseSignal(signal, min(self.config.kd.top_k, signal.num_ids))
        passed = self._vocabulary_pass(active, student, batch, signal=signal, moment=moment, extras=wanted)
        loss, sums = passed.total, dict(passed.parts)
        statistics: dict[str, Tensor] = {}
        scene = None if signal is None else Scene(batch, student, signal, passed.extras, adapters)
        with torch.autocast(student.hidden.device.type, enabled=False):
            for term in (term for term in self.hidden_terms if term in active):
                assert scene is not None
                value = term(scene, moment)
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
        signal: TeacherSignal | CrossSignal | None,
        moment: Moment,
        extras: tuple[str, ...],
    ) -> HeadPassResult:
        """One pass over the counted positions for every term over the vocabulary."""
        terms: list[HeadTerm] = [
            term.head_term(batch, signal, moment, self.coefficient(term, moment))
            for term in self.vocabulary_terms
            if term in active
        ]
        spans = None
        if isinstance(signal, CrossSignal):
            compares = any(isinstance(term, CrossTerm) for term in terms)
            signal = signal.starts if compares else None
            spans = Spans(batch["span_starts"], batch["positions"].numel())
            extras = tuple(name for name in extras if name != "teacher_entropy")  # the signal itself knows it
        if "label_logprobs" in extras and not any(isinstance(term, LabelTerm) for term in terms):
            terms.append(LabelTerm(LABELS_ONLY, label_targets(batch), weight=0.0))
        chunk_tokens = self.config.chunk_tokens
        if student.logits is not None:
            result = logits_pass(student.logits, signal, terms, chunk_tokens=chunk_tokens, extras=extras, spans=spans)
        else:
            assert student.head is not None
            rows = student.hidden.flatten(0, 1).index_select(0, batch["positions"])  # (N, H)
            result = head_pass(rows, student.head, signal, terms, chunk_tokens=chunk_tokens, extras=extras, spans=spans)
        result.parts.pop(LABELS_ONLY, None)
        return result

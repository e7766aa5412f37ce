"""The terms over the vocabulary: what they are, and their sum over a few positions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkit.losses.cross_tokenizer import span_likelihood
from kdkit.losses.divergences import Loss
from kdkit.losses.spans import Spans
from kdkit.teacher.signal import (
    Head,
    LiveSignal,
    Room,
    TeacherSignal,
    at_least_float32,
    bucket_logprobs,
    tempered_logprobs,
)

TEACHER_ENTROPY, LABEL_LOGPROBS = "teacher_entropy", "label_logprobs"


@dataclass(frozen=True, eq=False)
class DivergenceTerm:
    """A divergence between teacher and student."""

    per: ClassVar[str] = "position"
    """What each value of the loss speaks of."""
    name: str
    loss: Loss
    """(student_logprobs (n, C), teacher_logprobs (n, C)) -> (n,); differentiated by autograd, block by block."""
    weight: float = 1.0
    """Factor on the sum; at 0 the value is still computed, the gradient is not."""
    temperature: float = 1.0
    """Divides both sides' logits."""
    token_weights: Tensor | None = None
    """(N,) factor per position, no gradient; None is 1 everywhere."""


@dataclass(frozen=True, eq=False)
class LabelTerm:
    """Cross-entropy of the labels at temperature 1; needs no teacher."""

    per: ClassVar[str] = "position"
    """What each value of the loss speaks of."""
    name: str
    targets: Tensor
    """(N,) ids below the head's V'; every position counts."""
    weight: float = 1.0
    """Factor on the sum; at 0 the value is still computed, the gradient is not."""
    token_weights: Tensor | None = None
    """(N,) factor per position, no gradient; None is 1 everywhere."""

    @property
    def temperature(self) -> float:
        """1: labels are not softened."""
        return 1.0


@dataclass(frozen=True, eq=False)
class CrossTerm:
    """A comparison with a teacher of another vocabulary, at the first position of each span."""

    per: ClassVar[str] = "span"
    """What each value of the loss speaks of."""
    name: str
    loss: Loss
    """(student_logprobs (s, V'), teacher_logprobs (s, W)) -> (s,); differentiated by autograd, block by block."""
    weight: float = 1.0
    """Factor on the sum; at 0 the value is still computed, the gradient is not."""
    temperature: float = 1.0
    """Divides both sides' logits."""
    span_weights: Tensor | None = None
    """(S,) factor per span, no gradient; None is 1 everywhere."""


@dataclass(frozen=True, eq=False)
class SpanTerm:
    """A comparison of what both sides give the text of each span; needs no signal."""

    per: ClassVar[str] = "span"
    """What each value of the loss speaks of."""
    name: str
    targets: Tensor
    """(N,) ids below the head's V', the student's tokens of the text."""
    teacher_logprobs: Tensor
    """(S,) the teacher's log-probability of each span at temperature 1, no gradient."""
    weight: float = 1.0
    """Factor on the sum; at 0 the value is still computed, the gradient is not."""
    temperature: float = 1.0
    """The loss's own, of the spans' probabilities; logits are not softened."""
    loss: Callable[..., Tensor] = span_likelihood
    """(student_logprobs (s,), teacher_logprobs (s,), temperature=...) -> (s,)"""
    span_weights: Tensor | None = None
    """(S,) factor per span, no gradient; None is 1 everywhere."""


Term = DivergenceTerm | LabelTerm | CrossTerm | SpanTerm


@dataclass(frozen=True, eq=False)
class Task:
    """All of a pass that is not differentiated."""

    head: Head
    signal: TeacherSignal | None
    terms: tuple[Term, ...]
    chunk_tokens: int
    extra_names: tuple[str, ...]
    spans: Spans | None

    @property
    def temperatures(self) -> list[float]:
        """Each temperature once; the extras are taken at 1."""
        asked = [_softening(term) for term in self.terms] + [1.0] * bool(self.extra_names)
        return list(dict.fromkeys(asked))

    @property
    def compares_span_starts(self) -> bool:
        """Whether the signal speaks of the first positions of spans, not of all positions."""
        return any(isinstance(term, CrossTerm) for term in self.terms)

    @property
    def has_weight(self) -> bool:
        """Whether any gradient can come of it."""
        return any(term.weight != 0 for term in self.terms)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be found out."""
        return not self.terms and not self.extra_names

    @property
    def needs_teacher(self) -> bool:
        """Whether anything looks at the teacher."""
        return any(self.asks_teacher(temperature) for temperature in self.temperatures)

    def asks_teacher(self, temperature: float) -> bool:
        """Whether anything looks at the teacher at this temperature."""
        if temperature == 1.0 and TEACHER_ENTROPY in self.extra_names:
            return True
        return any(isinstance(t, DivergenceTerm | CrossTerm) and t.temperature == temperature for t in self.terms)

    def spans_within(self, rows: slice) -> slice:
        """The spans that positions `rows` are made of."""
        assert self.spans is not None
        return self.spans.within(rows)

    def signal_rows(self, rows: slice) -> slice:
        """What the signal calls positions `rows`."""
        return self.spans_within(rows) if self.compares_span_starts else rows

    def teacher_rows(self, rows: slice, device: torch.device) -> TeacherSignal | None:
        """The teacher's part of a chunk, on the student's device; None where nothing looks at it."""
        if self.signal is None or not self.needs_teacher:
            return None
        known = self.signal_rows(rows)
        if isinstance(self.signal, LiveSignal):  # what is kept of a chunk is made of its logits anew, by `logprobs_at`
            return self.signal.rows(known.start, known.stop, device, self._room)
        return self.signal.rows(known.start, known.stop, device)

    def starts_within(self, rows: slice) -> Tensor:
        """(s,) the first position of each span, counted from the first of `rows`."""
        return self._span_starts[self.spans_within(rows)] - rows.start

    @cached_property
    def _room(self) -> Room:
        """Memory for the teacher's logits of a chunk."""
        return Room()

    @cached_property
    def _span_starts(self) -> Tensor:
        """(S,) on the student's device: they move there once."""
        assert self.spans is not None
        return self.spans.starts_on(self.head.weight.device)


@dataclass(frozen=True, eq=False)
class Tally:
    """What the blocks find out, detached."""

    values: Tensor
    """(number of terms, N) weighted loss of each position, or of each of S spans; added up at the end, as a running
    float32 sum would lose digits."""
    extras: dict[str, Tensor]
    """(N,) by name, (S,) for what the signal says of spans"""

    @classmethod
    def zeros(cls, task: Task, num_positions: int, *, like: Tensor) -> "Tally":
        values = at_least_float32(like.new_zeros(len(task.terms), num_positions))
        num_known = task.signal_rows(slice(0, num_positions)).stop
        sizes = {TEACHER_ENTROPY: num_known, LABEL_LOGPROBS: num_positions}
        return cls(values, {name: values.new_zeros(sizes[name]) for name in task.extra_names})

    def parts(self) -> Tensor:
        """(number of terms,) each term's sum."""
        return self.values.sum(-1)


@dataclass(frozen=True, eq=False)
class ScaledGradient:
    """A gradient of which each row is as large as half precision likes it: small entries survive."""

    units: Tensor
    """(r, V')"""
    row_scale: Tensor
    """(r, 1) float32 factors on the rows."""


def block_objective(logits: Tensor, teacher: TeacherSignal | None, task: Task, *, rows: slice, tally: Tally) -> Tensor:
    """Weighted sum of the terms over a block, the r positions `rows`; fills their place in the tally."""
    objective = logits.new_zeros(())
    for temperature in task.temperatures:
        student_logprobs = tempered_logprobs(logits, temperature)  # (r, V')
        pair = None
        if teacher is not None and task.asks_teacher(temperature):
            pair = _columns(student_logprobs, teacher, task, temperature=temperature, rows=rows)  # (r, C), (r, C)
        for index, term in enumerate(task.terms):
            if _softening(term) != temperature:
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight != 0):
                values = _term_values(term, student_logprobs, pair, task, rows=rows)  # (r,) or (s,)
            tally.values[index, _counted(term, task, rows)] = values.detach()
            if term.weight != 0:
                objective = objective + term.weight * values.sum()
        if temperature == 1.0:
            _fill_extras(tally.extras, task, student_logprobs.detach(), pair=pair, rows=rows)
    return objective


def _softening(term: Term) -> float:
    """Temperature of the logits that a term looks at."""
    return 1.0 if isinstance(term, SpanTerm) else term.temperature


def _counted(term: Term, task: Task, rows: slice) -> slice:
    """What a term sums over: of all N positions those of the block, of all S spans those."""
    return task.spans_within(rows) if term.per == "span" else rows


def _columns(
    student_logprobs: Tensor, teacher: TeacherSignal, task: Task, *, temperature: float, rows: slice
) -> tuple[Tensor, Tensor]:
    """Both sides' log-probabilities over the columns of the signal, or each over its own ids at the spans' starts."""
    expected = teacher.logprobs_at(temperature)  # (r, C) or (s, W)
    if task.compares_span_starts:
        student = student_logprobs.index_select(0, task.starts_within(rows))  # (s, V')
    else:
        student = bucket_logprobs(student_logprobs, teacher.support)  # (r, C)
        assert student.shape[1:] == expected.shape[1:]
    assert len(student) == len(expected)
    return student, expected


def _term_values(
    term: Term, student_logprobs: Tensor, pair: tuple[Tensor, Tensor] | None, task: Task, *, rows: slice
) -> Tensor:
    """Weighted loss of a term over a block, one for each position (r,) or span (s,)."""
    counted = _counted(term, task, rows)
    if isinstance(term, LabelTerm):
        loss = -_label_logprobs(student_logprobs, term.targets[rows])  # (r,)
    elif isinstance(term, SpanTerm):
        given = _label_logprobs(student_logprobs, term.targets[rows])  # (r,)
        sums = _sum_spans(given, task.starts_within(rows))  # (s,)
        loss = term.loss(sums, term.teacher_logprobs[counted].detach().to(sums), temperature=term.temperature)
    else:
        assert pair is not None
        loss = term.loss(*pair)  # (r,) or (s,)
    num_counted = counted.stop - counted.start
    if loss.shape != (num_counted,):
        raise ValueError(
            f"loss of term {term.name!r} returned shape {tuple(loss.shape)} for {num_counted} {term.per}s: return one "
            f"value per {term.per}, not reduced"
        )
    weights = term.span_weights if isinstance(term, CrossTerm | SpanTerm) else term.token_weights
    return loss if weights is None else loss * weights[counted].detach().to(loss)


def _sum_spans(values: Tensor, starts: Tensor) -> Tensor:
    """(s,) sums of (r,) values from each start to the next, in order, so that a run gives the same digits again."""
    edges = F.pad(starts, (0, 1), value=len(values))  # (s + 1,)
    return torch.segment_reduce(values, "sum", offsets=edges, axis=0, unsafe=True)  # a look at edges would wait


def _label_logprobs(student_logprobs: Tensor, targets: Tensor) -> Tensor:
    return student_logprobs.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)  # (r,)


def _fill_extras(
    extras: dict[str, Tensor],
    task: Task,
    student_logprobs: Tensor,
    *,
    pair: tuple[Tensor, Tensor] | None,
    rows: slice,
) -> None:
    """Write a block's per-position figures; all are at temperature 1."""
    if TEACHER_ENTROPY in extras:
        assert pair is not None
        surprisal = pair[1].neg().clamp_max(torch.finfo(pair[1].dtype).max)  # 0 · inf, where p = 0, is to be 0
        extras[TEACHER_ENTROPY][task.signal_rows(rows)] = (pair[1].exp() * surprisal).sum(-1)
    if LABEL_LOGPROBS in extras:
        targets = next(term.targets for term in task.terms if isinstance(term, LabelTerm))
        extras[LABEL_LOGPROBS][rows] = _label_logprobs(student_logprobs, targets[rows])

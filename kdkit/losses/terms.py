"""The terms over the vocabulary: what they are, whether they go together, and their sum over a few positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdkit.losses.divergences import Loss
from kdkit.teacher.signal import Head, TeacherSignal, at_least_float32, bucket_logprobs, tempered_logprobs

TEACHER_ENTROPY, LABEL_LOGPROBS = "teacher_entropy", "label_logprobs"


@dataclass(frozen=True, eq=False)
class DivergenceTerm:
    """A divergence between teacher and student."""

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
class Task:
    """All of a pass that is not differentiated."""

    head: Head
    signal: TeacherSignal | None
    terms: tuple[DivergenceTerm | LabelTerm, ...]
    chunk_tokens: int
    extra_names: tuple[str, ...]

    @property
    def temperatures(self) -> list[float]:
        """Each temperature once; the extras are taken at 1."""
        asked = [term.temperature for term in self.terms] + [1.0] * bool(self.extra_names)
        return list(dict.fromkeys(asked))

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
        return TEACHER_ENTROPY in self.extra_names or any(isinstance(term, DivergenceTerm) for term in self.terms)

    def asks_teacher(self, temperature: float) -> bool:
        """Whether anything looks at the teacher at this temperature."""
        if temperature == 1.0 and TEACHER_ENTROPY in self.extra_names:
            return True
        return any(isinstance(t, DivergenceTerm) and t.temperature == temperature for t in self.terms)

    def teacher_rows(self, rows: slice, device: torch.device) -> TeacherSignal | None:
        """The teacher's part of a chunk, on the student's device; None where nothing looks at it."""
        if self.signal is None or not self.needs_teacher:
            return None
        return self.signal.rows(rows.start, rows.stop, device)


@dataclass(frozen=True, eq=False)
class Tally:
    """What the blocks find out, detached."""

    values: Tensor
    """(number of terms, N) token_weights · loss; added up at the end, as a running float32 sum would lose digits."""
    extras: dict[str, Tensor]
    """(N,) by name"""

    @classmethod
    def zeros(cls, task: Task, num_positions: int, *, like: Tensor) -> "Tally":
        values = at_least_float32(like.new_zeros(len(task.terms), num_positions))
        return cls(values, {name: values.new_zeros(num_positions) for name in task.extra_names})

    def parts(self) -> Tensor:
        """(number of terms,) each term's sum."""
        return self.values.sum(-1)


def block_objective(logits: Tensor, teacher: TeacherSignal | None, task: Task, *, rows: slice, tally: Tally) -> Tensor:
    """Weighted sum of the terms over a block, the r positions `rows`; fills their place in the tally."""
    objective = logits.new_zeros(())
    for temperature in task.temperatures:
        student_logprobs = tempered_logprobs(logits, temperature)  # (r, V')
        pair = None
        if teacher is not None and task.asks_teacher(temperature):
            pair = _columns(student_logprobs, teacher, temperature)  # (r, C), (r, C)
        for index, term in enumerate(task.terms):
            if term.temperature != temperature:
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight != 0):
                values = _term_values(term, student_logprobs, pair, rows=rows)  # (r,)
            tally.values[index, rows] = values.detach()
            if term.weight != 0:
                objective = objective + term.weight * values.sum()
        if temperature == 1.0:
            _fill_extras(tally.extras, task, student_logprobs.detach(), pair=pair, rows=rows)
    return objective


def _columns(student_logprobs: Tensor, teacher: TeacherSignal, temperature: float) -> tuple[Tensor, Tensor]:
    """Both sides' log-probabilities over the columns of the signal."""
    student = bucket_logprobs(student_logprobs, teacher.support)  # (r, C)
    expected = teacher.logprobs_at(temperature)  # (r, C)
    assert student.shape == expected.shape
    return student, expected


def _term_values(
    term: DivergenceTerm | LabelTerm,
    student_logprobs: Tensor,
    pair: tuple[Tensor, Tensor] | None,
    *,
    rows: slice,
) -> Tensor:
    """token_weights · loss of a term over a block, (r,)."""
    if isinstance(term, LabelTerm):
        loss = -_label_logprobs(student_logprobs, term.targets[rows])  # (r,)
    else:
        assert pair is not None
        loss = term.loss(*pair)  # (r,)
        if loss.shape != student_logprobs.shape[:1]:
            raise ValueError(
                f"loss of term {term.name!r} returned shape {tuple(loss.shape)} for {len(student_logprobs)} "
                "positions: return one value per position, not reduced"
            )
    if term.token_weights is not None:
        loss = loss * term.token_weights[rows].detach().to(loss)
    return loss


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
        extras[TEACHER_ENTROPY][rows] = (pair[1].exp() * surprisal).sum(-1)
    if LABEL_LOGPROBS in extras:
        targets = next(term.targets for term in task.terms if isinstance(term, LabelTerm))
        extras[LABEL_LOGPROBS][rows] = _label_logprobs(student_logprobs, targets[rows])


def check_task(task: Task, num_positions: int, *, cut: str) -> None:
    """Refuse what does not go together, by shapes and names only: nothing here waits for the device.

    `cut` says how the student is brought to its first V' ids.
    """
    if task.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={task.chunk_tokens}: give 1 or more")
    names = [term.name for term in task.terms]
    if len(set(names)) < len(names):
        raise ValueError(f"terms named {names}: names must differ")
    if task.signal is not None and task.signal.num_positions != num_positions:
        raise ValueError(
            f"{num_positions} positions of the student, {task.signal.num_positions} of the teacher's signal: "
            "both must speak of the same positions"
        )
    for term in task.terms:
        _check_term(term, task.signal, num_positions)
    for name in task.extra_names:
        _check_extra(name, task)
    if task.signal is not None and task.needs_teacher and task.signal.num_ids != task.head.num_ids:
        raise ValueError(
            f"the student gives {task.head.num_ids} ids, the teacher's signal {task.signal.num_ids}: where the "
            f"tokenizers agree on the first V' ids, make the signal of these alone and give {cut}"
        )


def _check_term(term: DivergenceTerm | LabelTerm, signal: TeacherSignal | None, num_positions: int) -> None:
    if isinstance(term, DivergenceTerm) and signal is None:
        raise ValueError(f"term {term.name!r} compares with a teacher, but signal is None")
    columns = {"token_weights": term.token_weights}
    if isinstance(term, LabelTerm):
        columns["targets"] = term.targets
    for field, values in columns.items():
        if values is not None and values.shape != (num_positions,):
            raise ValueError(
                f"{field} of term {term.name!r} have shape {tuple(values.shape)}: must be ({num_positions},), "
                "one for each position"
            )


def _check_extra(name: str, task: Task) -> None:
    if name not in (TEACHER_ENTROPY, LABEL_LOGPROBS):
        raise ValueError(f"unknown extra {name!r}: known are {TEACHER_ENTROPY} and {LABEL_LOGPROBS}")
    if name == TEACHER_ENTROPY and task.signal is None:
        raise ValueError(f"extra {name!r} needs a teacher, but signal is None")
    if name == LABEL_LOGPROBS and not any(isinstance(term, LabelTerm) for term in task.terms):
        raise ValueError(f"extra {name!r} needs a LabelTerm that brings the labels; its weight may be 0")

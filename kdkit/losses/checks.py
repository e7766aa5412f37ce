"""Whether the parts of a pass go together: seen by shapes and names only, so that nothing waits for the device."""

from torch import Tensor

from kdkit.losses.terms import (
    LABEL_LOGPROBS,
    TEACHER_ENTROPY,
    CrossTerm,
    DivergenceTerm,
    LabelTerm,
    SpanTerm,
    Task,
    Term,
)
from kdkit.teacher.signal import SparseSignal, TeacherSignal


def check_task(task: Task, num_positions: int, *, cut: str) -> None:
    """Refuse what does not go together.

    Args:
        task: the pass.
        num_positions: N of the student.
        cut: how the student is brought to its first V' ids, for the message.
    Raises:
        ValueError: as `head_pass` says.
    """
    if task.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={task.chunk_tokens}: give 1 or more")
    names = [term.name for term in task.terms]
    if len(set(names)) < len(names):
        raise ValueError(f"terms named {names}: names must differ")
    if task.spans is not None and task.spans.num_positions != num_positions:
        raise ValueError(
            f"{num_positions} positions of the student, spans over {task.spans.num_positions}: both must speak of the "
            "same positions"
        )
    for term in task.terms:
        _check_term(term, task, num_positions)
    for name in task.extra_names:
        _check_extra(name, task)
    if task.signal is not None and task.needs_teacher:
        _check_signal(task.signal, task, num_positions, cut=cut)


def _check_term(term: Term, task: Task, num_positions: int) -> None:
    if isinstance(term, DivergenceTerm | CrossTerm) and task.signal is None:
        raise ValueError(f"term {term.name!r} compares with a teacher, but signal is None")
    if isinstance(term, DivergenceTerm) and task.compares_span_starts:
        raise ValueError(
            f"term {term.name!r} compares the same ids at every position, a CrossTerm beside it the distributions at "
            "span starts; one signal cannot serve both: use one kind for a teacher"
        )
    if term.per == "span" and task.spans is None:
        raise ValueError(f"term {term.name!r} counts spans, but spans is None: give those of the positions")
    num_items = num_positions if task.spans is None or term.per == "position" else task.spans.num_spans
    for field, values in _columns_per_item(term).items():
        _check_shape(term, field, values, num=num_items, item=term.per)
    if isinstance(term, LabelTerm | SpanTerm):
        _check_shape(term, "targets", term.targets, num=num_positions, item="position")


def _columns_per_item(term: Term) -> dict[str, Tensor | None]:
    """Tensors with an entry for each position or span that a term counts."""
    if isinstance(term, SpanTerm):
        return {"span_weights": term.span_weights, "teacher_logprobs": term.teacher_logprobs}
    if isinstance(term, CrossTerm):
        return {"span_weights": term.span_weights}
    return {"token_weights": term.token_weights}


def _check_shape(term: Term, field: str, values: Tensor | None, *, num: int, item: str) -> None:
    if values is not None and values.shape != (num,):
        raise ValueError(
            f"{field} of term {term.name!r} have shape {tuple(values.shape)}: must be ({num},), one for each {item}"
        )


def _check_extra(name: str, task: Task) -> None:
    if name not in (TEACHER_ENTROPY, LABEL_LOGPROBS):
        raise ValueError(f"unknown extra {name!r}: known are {TEACHER_ENTROPY} and {LABEL_LOGPROBS}")
    if name == TEACHER_ENTROPY and task.signal is None:
        raise ValueError(f"extra {name!r} needs a teacher, but signal is None")
    if name == LABEL_LOGPROBS and not any(isinstance(term, LabelTerm) for term in task.terms):
        raise ValueError(f"extra {name!r} needs a LabelTerm that brings the labels; its weight may be 0")


def _check_signal(signal: TeacherSignal, task: Task, num_positions: int, *, cut: str) -> None:
    if task.compares_span_starts:
        _check_signal_of_spans(signal, task)
        return
    if signal.num_positions != num_positions:
        raise ValueError(
            f"{num_positions} positions of the student, {signal.num_positions} of the teacher's signal: both must "
            "speak of the same positions"
        )
    if signal.num_ids != task.head.num_ids:
        raise ValueError(
            f"the student gives {task.head.num_ids} ids, the teacher's signal {signal.num_ids}: where the tokenizers "
            f"agree on the first V' ids, make the signal of these alone and give {cut}"
        )


def _check_signal_of_spans(signal: TeacherSignal, task: Task) -> None:
    assert task.spans is not None
    if isinstance(signal, SparseSignal) or signal.support is not None:  # the ids of a sparse signal are not known yet
        raise ValueError(
            f"a CrossTerm looks at all ids of the teacher, {type(signal).__name__} keeps a few: give a LiveSignal or a "
            "DenseSignal, and top_k to the loss"
        )
    if signal.num_positions != task.spans.num_spans:
        raise ValueError(
            f"{task.spans.num_spans} spans, {signal.num_positions} positions of the teacher's signal: with a CrossTerm "
            "it must speak of the first position of each span"
        )

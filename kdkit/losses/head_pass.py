"""One chunked pass from hidden states through the heads to every loss over the vocabulary.

The logits of N positions, (N, V), would be the largest tensors of a training step, for student and teacher alike. Here
they exist for a few positions at a time, and their gradient goes straight through the head into (N, H) and (V, H):

    for each chunk of positions            matrix products, in the compute dtype
        logits of student and teacher
        for each block of the chunk        losses, in float32
            terms -> values, gradient by the logits, which takes the logits' place
        gradient by hidden states, weight and bias, summed in float32

The gradients are thus known when the forward pass ends; the backward pass multiplies them by what comes from above.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdkit.losses.divergences import Loss, resolve_loss
from kdkit.teacher.signal import (
    Head,
    TeacherSignal,
    at_least_float32,
    bucket_logprobs,
    compute_dtype,
    tempered_logprobs,
)

# A chunk is long for the sake of the matrix products: the weight's gradient, (V, H), is read and written once per
# chunk. The losses gain nothing from that, and need about ten times the memory of the logits.
_BLOCKS_PER_CHUNK = 8

TEACHER_ENTROPY, LABEL_LOGPROBS = "teacher_entropy", "label_logprobs"


class Term(Protocol):
    """A loss over the vocabulary with its place in the sum."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def token_weights(self) -> Tensor | None: ...


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
class HeadPassResult:
    """What a head pass found."""

    total: Tensor
    """Scalar with gradient: Σ over terms of weight · part."""
    parts: dict[str, Tensor]
    """Detached scalars by term: Σ over positions of token_weights · loss, without the term's weight."""
    extras: dict[str, Tensor]
    """Detached (N,) by name, those that were asked for."""


def head_pass(
    student_hidden: Tensor,
    student_head: Head,
    signal: TeacherSignal | None,
    terms: Sequence[DivergenceTerm | LabelTerm],
    *,
    chunk_tokens: int = 256,
    extras: Sequence[str] = (),
) -> HeadPassResult:
    """Sum of all terms over the vocabulary, without logits of all positions at once.

    Σ over terms of weight · Σ_n token_weights_n · loss_n. Equal to the dense path within float32 rounding for any
    chunk size. The matrix products run in `compute_dtype(student_hidden, weight)`, everything else in float32.
    Normalising by counts is the caller's business, through `weight` or by scaling the total.

    Args:
        student_hidden: (N, H) final hidden states at the counted positions; N may be 0; gradient flows.
        student_head: the student's head; gradient flows to weight and bias where they require it.
        signal: the teacher at the same N positions, on any device; None where no term and no extra needs one.
        terms: what to sum; names differ.
        chunk_tokens: positions whose logits exist at a time. More is faster, up to a few hundred.
        extras: per-position figures to return besides: "teacher_entropy" (nats, at temperature 1; of a top-k signal
            with its tail as one outcome) and "label_logprobs" (student's log-probability of the first label term's
            targets).
    Returns:
        Total, parts and extras, float32 (float64 for float64). The total depends on the inputs even where N = 0 or all
        weights are 0: its gradient is then zero, which keeps distributed training in step.
    Raises:
        ValueError: shapes, names or vocabulary widths that do not go together; a term or extra that needs what is not
            there; a temperature that the signal does not hold.
        RuntimeError: on differentiating the gradient.
    """
    task = _Task(student_head, signal, tuple(terms), chunk_tokens, tuple(extras))
    _check_task(task, student_hidden.shape[0], student_hidden.device)
    leaves = (student_hidden, student_head.weight, student_head.bias)
    if not torch.is_grad_enabled():  # a custom function is not told of no_grad
        leaves = tuple(None if leaf is None else leaf.detach() for leaf in leaves)
    total, parts, *found = _HeadPass.apply(*leaves, task)
    return _result(task, total, parts, found)


def logits_pass(
    student_logits: Tensor,
    signal: TeacherSignal | None,
    terms: Sequence[DivergenceTerm | LabelTerm],
    *,
    chunk_tokens: int = 256,
    extras: Sequence[str] = (),
) -> HeadPassResult:
    """The same sum from logits that exist already: for a head that cannot be had apart from its model.

    Args:
        student_logits: (N, V); gradient flows.
        signal: as in `head_pass`.
        terms: as in `head_pass`.
        chunk_tokens: positions whose log-probabilities exist at a time under no_grad; with gradient all are kept.
        extras: as in `head_pass`.
    Returns:
        As `head_pass`.
    Raises:
        ValueError: as `head_pass`.
    """
    as_is = Head(student_logits.new_empty(student_logits.shape[-1], 0))
    task = _Task(as_is, signal, tuple(terms), chunk_tokens, tuple(extras))
    num_positions, device = student_logits.shape[0], student_logits.device
    _check_task(task, num_positions, device)
    tally = _Tally.zeros(task, num_positions, like=student_logits)
    total = at_least_float32(student_logits[:0]).sum()
    start = 0
    for logits in student_logits.split(chunk_tokens) if num_positions else ():
        rows = slice(start, start + len(logits))
        teacher = None if signal is None else signal.rows(rows.start, rows.stop, device)
        total = total + _objective(at_least_float32(logits), teacher, task, rows=rows, tally=tally)
        start = rows.stop
    return _result(task, total, tally.parts, tally.extras)


def linear_divergence(
    loss: str | Loss,
    student_hidden: Tensor,
    student_head: Head,
    signal: TeacherSignal,
    *,
    chunk_tokens: int = 256,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    **own: float,
) -> Tensor:
    """One divergence summed over positions, the one-term form of `head_pass`.

    Args:
        loss: a name in `LOSSES`, or a callable on log-probabilities.
        student_hidden: (N, H) final hidden states; gradient flows.
        student_head: the student's head; gradient flows.
        signal: the teacher at the same positions.
        chunk_tokens: positions whose logits exist at a time.
        temperature: divides both sides' logits.
        token_weights: (N,) factor per position; None is 1 everywhere.
        **own: the loss's own arguments, such as alpha.
    Returns:
        Scalar, the sum (not the mean) over positions, with gradient; not multiplied by temperature².
    Raises:
        ValueError: as `head_pass`; unknown loss.
    """
    term = DivergenceTerm(
        "divergence", resolve_loss(loss, **own), temperature=temperature, token_weights=token_weights
    )
    return head_pass(student_hidden, student_head, signal, [term], chunk_tokens=chunk_tokens).total


@dataclass(frozen=True, eq=False)
class _Task:
    """All of a pass that is not differentiated."""

    head: Head
    signal: TeacherSignal | None
    terms: tuple[DivergenceTerm | LabelTerm, ...]
    chunk_tokens: int
    extra_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Tally:
    """What the blocks add up, detached."""

    parts: Tensor
    """(number of terms,)"""
    extras: list[Tensor]
    """(N,) for each name"""

    @classmethod
    def zeros(cls, task: _Task, num_positions: int, *, like: Tensor) -> "_Tally":
        dtype = at_least_float32(like[:0]).dtype
        parts = torch.zeros(len(task.terms), dtype=dtype, device=like.device)
        return cls(parts, [parts.new_zeros(num_positions) for _ in task.extra_names])


class _HeadPass(torch.autograd.Function):
    """The walk over chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task
    ) -> tuple[Tensor, ...]:
        dtype = compute_dtype(hidden, weight)
        num_positions, num_ids = hidden.shape[0], task.head.num_ids
        head_weight = weight[:num_ids].to(dtype)  # (V', H), cast once
        head_bias = None if bias is None else bias[:num_ids].to(dtype)
        tally = _Tally.zeros(task, num_positions, like=head_weight)
        gradients = _Gradients.zeros(hidden, weight, bias, ctx.needs_input_grad, tally.parts.dtype)
        for start in range(0, num_positions, task.chunk_tokens):
            rows = slice(start, min(start + task.chunk_tokens, num_positions))
            chunk_hidden = hidden[rows].to(dtype)  # (n, H)
            logits = F.linear(chunk_hidden, head_weight, head_bias)  # (n, V')
            teacher = None
            if task.signal is not None:
                teacher = task.signal.rows(rows.start, rows.stop, hidden.device)
            row_scale = _walk_blocks(logits, teacher, task, rows=rows, tally=tally, gradients=gradients)
            gradients.add_products(rows, logits, row_scale, chunk_hidden, head_weight)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(tally.parts, *tally.extras)
        weights = [term.weight for term in task.terms]
        total = sum(
            (w * part for w, part in zip(weights, tally.parts.unbind(), strict=True) if w != 0),
            start=tally.parts.new_zeros(()),
        )
        return total, tally.parts, *tally.extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if x is None else (x * grad).to(dtype) for x, dtype in saved), None


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Gradients by the inputs, in float32 or better; None for an input that requires none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

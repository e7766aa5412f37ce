"""One chunked pass from hidden states through the heads to every loss over the vocabulary.

The logits of N positions, (N, V), would be the largest tensors of a training step, for student and teacher
alike. Here they exist for a few positions at a time, and their gradient goes straight through the head into
(N, H) and (V, H):

    for each chunk of positions            matrix products, in the compute dtype
        logits of student and teacher
        for each block of the chunk        losses, in float32
            terms -> values, and the gradient by the logits, which takes the logits' place
        gradients by hidden states, weight and bias, summed in float32

The gradients are thus known when the forward pass ends; the backward pass multiplies them by what comes from
above and hands them over. Asked for again, they are computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdkit.losses.blocks import Solver, solver_for
from kdkit.losses.checks import check_task
from kdkit.losses.divergences import Loss, resolve_loss
from kdkit.losses.spans import Spans, pieces
from kdkit.losses.terms import DivergenceTerm, ScaledGradient, Tally, Task, Term, block_objective
from kdkit.teacher.signal import Head, Room, TeacherSignal, at_least_float32, compute_dtype

# The pieces that chunks and blocks are; a count of memory, to which one is as good as another, takes a few of them.
walk = pieces


@dataclass(frozen=True, eq=False)
class HeadPassResult:
    """What a head pass found."""

    total: Tensor
    """Scalar with gradient: Σ over terms of weight · part."""
    parts: dict[str, Tensor]
    """Detached scalars by term: Σ over positions of token_weights · loss, or over spans of span_weights · loss, without
    the term's weight."""
    extras: dict[str, Tensor]
    """Detached (N,) by name, those that were asked for; (S,) where the signal speaks of spans."""


def head_pass(
    student_hidden: Tensor,
    student_head: Head,
    signal: TeacherSignal | None,
    terms: Sequence[Term],
    *,
    chunk_tokens: int = 256,
    extras: Sequence[str] = (),
    spans: Spans | None = None,
    backend: str | None = None,
) -> HeadPassResult:
    """Sum of all terms over the vocabulary, without the logits of all positions at once.

    Σ over terms of weight · Σ_n token_weights_n · loss_n; of a CrossTerm and a SpanTerm Σ_s span_weights_s · loss_s.
    Equal to the dense path within float32 rounding for any chunk size. Matrix products run in
    `compute_dtype(student_hidden, weight)`, all else in float32. Normalising by counts is the caller's business,
    through `weight` or by scaling the total.

    Args:
        student_hidden: (N, H) final hidden states at the counted positions; N may be 0; gradient flows.
        student_head: the student's head; gradient flows to weight and bias where they require it.
        signal: the teacher at the same N positions, on any device; with a CrossTerm at the first positions of the S
            spans, over its own ids. None where no term or extra needs one.
        terms: what to sum; their names differ.
        chunk_tokens: positions whose logits exist at a time. More is faster, up to a few hundred.
        extras: per-position figures to return besides: "teacher_entropy" (nats, at temperature 1; of a top-k
            signal with its tail as one outcome; of a signal at the spans' first positions (S,)) and
            "label_logprobs" (the student's log-probability of the first label term's targets).
        spans: the spans that the N positions are made of, where a CrossTerm or SpanTerm counts them. Chunks then end
            where a span ends; one longer than chunk_tokens makes its chunk longer.
        backend: what the losses run on between the matrix products, a name of `kdkit.losses.blocks.BACKENDS`; None =
            "native" on a CPU and "cuda" on a CUDA card where they can do the pass, else "torch"; the log says once
            which and why.
    Returns:
        Total, parts and extras, float32 (float64 for float64). The total depends on the inputs even where N = 0
        or all weights are 0: its gradient is then zero, which keeps distributed training in step.
    Raises:
        ValueError: shapes, names or vocabulary widths that do not go together; a term or extra that needs what
            is not there; a temperature that the signal does not hold; a backend that cannot do the pass.
        RuntimeError: on differentiating the gradient, or a weighted term whose loss has none.
    """
    if student_hidden.dim() != 2 or student_hidden.shape[1] != student_head.weight.shape[1]:
        raise ValueError(
            f"student_hidden of shape {tuple(student_hidden.shape)}: must be (N, {student_head.weight.shape[1]}), the "
            "counted positions laid end to end and as wide as the head"
        )
    task = Task(student_head, signal, tuple(terms), chunk_tokens, tuple(extras), spans)
    check_task(task, len(student_hidden), cut="Head(..., vocab_size=V')")
    inputs: tuple[Tensor | None, ...] = (student_hidden, student_head.weight, student_head.bias)
    if not torch.is_grad_enabled():  # a custom function is not told of no_grad
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    if task.is_empty:
        return HeadPassResult(_zero_of(*inputs), {}, {})
    total, parts, *found = _HeadPass.apply(*inputs, task, backend)
    return _result(task, total, parts=parts, extras=dict(zip(task.extra_names, found, strict=True)))


def logits_pass(
    student_logits: Tensor,
    signal: TeacherSignal | None,
    terms: Sequence[Term],
    *,
    chunk_tokens: int = 256,
    extras: Sequence[str] = (),
    spans: Spans | None = None,
) -> HeadPassResult:
    """The same sum from logits that exist already: for a head that cannot be had apart from its model.

    Args:
        student_logits: (N, V); gradient flows.
        signal: as in `head_pass`.
        terms: as in `head_pass`.
        chunk_tokens: positions that are worked on at a time; autograd keeps what it needs of all of them.
        extras: as in `head_pass`.
        spans: as in `head_pass`.
    Returns:
        As `head_pass`.
    Raises:
        ValueError: as `head_pass`.
    """
    ids_only = Head(student_logits.new_empty(student_logits.shape[-1], 0))
    task = Task(ids_only, signal, tuple(terms), chunk_tokens, tuple(extras), spans)
    check_task(task, len(student_logits), cut="student_logits[:, :V']")
    if task.is_empty:
        return HeadPassResult(_zero_of(student_logits), {}, {})
    tally = Tally.zeros(task, len(student_logits), like=student_logits)
    total = _zero_of(student_logits)
    chunks = list(pieces(slice(0, len(student_logits)), chunk_tokens, spans))
    parts = student_logits.split([rows.stop - rows.start for rows in chunks]) if chunks else ()
    for rows, logits in zip(chunks, parts, strict=True):
        teacher = task.teacher_rows(rows, logits.device)
        total = total + block_objective(at_least_float32(logits), teacher, task, rows=rows, tally=tally)
    return _result(task, total, parts=tally.parts(), extras=tally.extras)


def linear_divergence(
    loss: str | Loss,
    student_hidden: Tensor,
    student_head: Head,
    signal: TeacherSignal,
    *,
    chunk_tokens: int = 256,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    backend: str | None = None,
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
        backend: as in `head_pass`.
        **own: the loss's own arguments, such as alpha.
    Returns:
        Scalar, the sum (not the mean) over positions, with gradient; not multiplied by temperature².
    Raises:
        ValueError: as `head_pass`; unknown loss.
    """
    term = DivergenceTerm("divergence", resolve_loss(loss, **own), temperature=temperature, token_weights=token_weights)
    return head_pass(student_hidden, student_head, signal, [term], chunk_tokens=chunk_tokens, backend=backend).total


class _HeadPass(torch.autograd.Function):
    """The walk over chunks, which finds the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: Task, backend: str | None
    ) -> tuple[Tensor, ...]:
        dtype, needed = compute_dtype(hidden, weight), ctx.needs_input_grad[:3]
        tally, gradients = _walk_chunks((hidden, weight, bias), needed, task, backend, dtype=dtype)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.given, ctx.found = (task, backend, dtype), gradients
        parts = tally.parts()  # (number of terms,)
        ctx.mark_non_differentiable(parts, *tally.extras.values())
        return _total(task, parts), parts, *tally.extras.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gradients = ctx.saved_tensors, ctx.found
        if gradients is None:  # asked for again: the pass is done again
            task, backend, dtype = ctx.given
            gradients = _walk_chunks(inputs, ctx.needs_input_grad[:3], task, backend, dtype=dtype)[1]
        ctx.found = None
        # In place, and without a reference left: a copy of the weight's, (V, H), would be the peak of a training step.
        pairs = zip((gradients.hidden, gradients.weight, gradients.bias), inputs, strict=True)
        return *(None if x is None else x.mul_(grad).to(like.dtype) for x, like in pairs), None, None


def _walk_chunks(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    needed: Sequence[bool],
    task: Task,
    backend: str | None,
    *,
    dtype: torch.dtype,
) -> tuple[Tally, "_Gradients"]:
    """What the terms find, and the gradients of their weighted sum by the inputs, products being in a dtype."""
    hidden, weight, bias = inputs
    num_positions, num_ids = len(hidden), task.head.num_ids
    head_weight = weight[:num_ids].to(dtype)  # (V', H), cast once
    head_bias = None if bias is None else bias[:num_ids].to(dtype)  # (V',)
    tally = Tally.zeros(task, num_positions, like=head_weight)
    gradients = _Gradients.for_inputs(inputs, needed, dtype=tally.values.dtype)
    solver, room = solver_for(backend, task, like=head_weight), Room()
    for rows in walk(slice(0, num_positions), task.chunk_tokens, task.spans):
        chunk = hidden[rows].to(dtype)  # (n, H)
        logits = room.product(chunk, head_weight, head_bias)  # (n, V')
        row_scale = _walk_blocks(logits, solver, task, rows, tally=tally, gradients=gradients)
        if row_scale is not None:
            gradients.add_products(rows, logits, row_scale=row_scale, hidden=chunk, weight=head_weight)
    gradients.finish()
    return tally, gradients


def _walk_blocks(
    logits: Tensor, solver: Solver, task: Task, rows: slice, *, tally: Tally, gradients: "_Gradients"
) -> Tensor | None:
    """Put the gradient by a chunk's logits in their place; the (n, 1) factor taken out, None if none is formed."""
    teacher = task.teacher_rows(rows, logits.device)
    form = gradients.wanted and task.has_weight
    row_scale = at_least_float32(logits.new_ones(len(logits), 1))  # (n, 1)
    num_ids = logits.shape[-1] if teacher is None else max(logits.shape[-1], teacher.num_ids)
    size = max(1, solver.block_entries // num_ids)  # rows of a block
    for piece in walk(rows, size, task.spans):
        block = _within(piece, rows)
        known = _within(task.signal_rows(piece), task.signal_rows(rows))
        product = logits[block]  # (r, V')
        gradient = solver.gradient(
            product,
            None if teacher is None else teacher.rows(known.start, known.stop, logits.device),
            task,
            rows=piece,
            tally=tally,
            form=form,
        )  # (r, V')
        if gradient is None:
            continue
        if gradients.bias is not None:
            gradients.bias[: logits.shape[-1]] += _sum_of_rows(gradient)
        if isinstance(gradient, Tensor) and _is_half(logits.dtype):
            gradient = _scaled(gradient)
        if isinstance(gradient, ScaledGradient):
            row_scale[block] = gradient.row_scale
            gradient = gradient.units
        if gradient is not product:
            product.copy_(gradient)
    return row_scale if form else None


def _sum_of_rows(gradient: Tensor | ScaledGradient) -> Tensor:
    if isinstance(gradient, Tensor):
        return gradient.sum(0)
    return (gradient.units * gradient.row_scale).sum(0)


def _scaled(gradient: Tensor) -> ScaledGradient:
    """The same in units of each row's own, ready for half precision; overwrites it."""
    row_scale = _power_of_two(torch.linalg.vector_norm(gradient, torch.inf, -1, keepdim=True))
    return ScaledGradient(gradient.div_(row_scale), row_scale)


@dataclass(eq=False)
class _Gradients:
    """Gradients by the inputs, in float32 or better; None for an input that requires none."""

    hidden: Tensor | None
    """(N, H)"""
    weight: Tensor | None
    """(V, H), nothing to go by before `finish`."""
    bias: Tensor | None
    """(V,)"""
    num_ids: int = 0
    """Rows of the weight's gradient that hold a number already: the first product is written there, not added."""

    @classmethod
    def for_inputs(cls, inputs: Sequence[Tensor | None], needed: Sequence[bool], *, dtype: torch.dtype) -> "_Gradients":
        def empty_for(tensor: Tensor | None, need: bool) -> Tensor | None:
            if tensor is None or not need:
                return None
            return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)

        hidden, weight, bias = map(empty_for, inputs, needed)
        return cls(hidden if hidden is None else hidden.zero_(), weight, bias if bias is None else bias.zero_())

    @property
    def wanted(self) -> bool:
        """Whether any input requires a gradient."""
        return any(gradient is not None for gradient in (self.hidden, self.weight, self.bias))

    def add_products(self, rows: slice, units: Tensor, *, row_scale: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add a chunk's share, given the gradient by its logits as units (n, V') · row_scale (n, 1)."""
        if self.hidden is not None:
            self.hidden[rows] = (units @ weight) * row_scale  # (n, H)
        if self.weight is None:
            return
        is_first, self.num_ids = self.num_ids == 0, units.shape[-1]
        share = self.weight[: self.num_ids]  # (V', H)
        if not _is_half(units.dtype):
            share.addmm_(units.T, hidden, beta=0 if is_first else 1)  # 0 does not look at what is there
            return
        # The rows' scale, 1/N and all, joins the hidden states; these are in turn brought to the dtype's range, and
        # their own scale is multiplied back in float32: fp16 neither underflows nor overflows.
        left = hidden * row_scale  # (n, H) float32
        scale = _power_of_two(left.abs().amax())
        product = units.T @ (left / scale).to(units.dtype)
        if is_first:
            share.copy_(product).mul_(scale)
        else:
            share.addcmul_(product, scale)

    def finish(self) -> None:
        """Rows of the weight that nothing was added to get 0."""
        if self.weight is not None:
            self.weight[self.num_ids :].zero_()


def _within(rows: slice, whole: slice) -> slice:
    """The same rows, counted from the first of the whole."""
    return slice(rows.start - whole.start, rows.stop - whole.start)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _power_of_two(size: Tensor) -> Tensor:
    """The power of two at or below `size`, so that dividing by it costs no digits; NaN and inf stay."""
    return size.clamp_min(torch.finfo(size.dtype).tiny).log2().floor().exp2()


def _zero_of(*inputs: Tensor | None) -> Tensor:
    """A zero that depends on the inputs, whatever they hold."""
    return torch.stack([at_least_float32(x[:0]).sum() for x in inputs if x is not None]).sum()


def _total(task: Task, parts: Tensor) -> Tensor:
    """Weighted sum of the parts; one of weight 0 does not count, even where it is not finite."""
    weights = [term.weight for term in task.terms]
    shares = [weight * part for weight, part in zip(weights, parts.unbind(), strict=True) if weight != 0]
    return torch.stack(shares).sum() if shares else parts.new_zeros(())


def _result(task: Task, total: Tensor, *, parts: Tensor, extras: dict[str, Tensor]) -> HeadPassResult:
    by_name = {term.name: part for term, part in zip(task.terms, parts.unbind(), strict=True)}
    return HeadPassResult(total, by_name, extras)

"""The comparison of two vocabularies' distributions by loops that numba compiles: float32 on the CPU.

A position is taken at a time, on as many threads as torch has; the result does not depend on how many. Beyond its
result a thread takes a few copies of one position's probabilities, whatever the number of positions.
"""

import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdkit import compiled

logger = logging.getLogger(__name__)

Ids = tuple[Tensor, Tensor]
"""Of one side: the matched ids (C,), and the rest."""


def takes(*logprobs: Tensor) -> bool:
    """Whether the loops can take these: numba is there, and all are float32 on the CPU.

    Args:
        *logprobs: any tensors.
    Returns:
        False too for a subclass, such as a tensor without values, which may have no memory to read.
    """
    fits = all(type(x) is Tensor and x.dtype == torch.float32 and x.device.type == "cpu" for x in logprobs)
    return fits and compiled.is_installed()


def compare(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    student_ids: Ids,
    teacher_ids: Ids,
    with_bucket: bool,
    with_distance: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What two vocabularies have in common side by side, and the distance of the rest by rank.

    Args:
        student_logprobs: (N, V) float32 normalised log-probabilities; gradient flows.
        teacher_logprobs: (N, W) float32 normalised log-probabilities; no gradient.
        student_ids: (C,) and (V − C,) int64: the matched ids, and the rest.
        teacher_ids: (C,) and (W − C,) int64.
        with_bucket: add the log mass of the rest as a last column.
        with_distance: compare the rest by rank.
    Returns:
        The student's and the teacher's columns, (N, C + 1) or (N, C), and Σ_r |p_(r) − q_(r)| over the rest, (N,) or
        (0,); a row with anything above 1, or with NaN, is NaN.
    """
    given = student_logprobs if torch.is_grad_enabled() else student_logprobs.detach()
    return _Compared.apply(given, teacher_logprobs.detach(), student_ids, teacher_ids, with_bucket, with_distance)


def ranked_distance(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Distance of all sorted probabilities, Σ_r |p_(r) − q_(r)|.

    Args:
        student_logprobs: as in `compare`.
        teacher_logprobs: as in `compare`.
    Returns:
        (N,) float32.
    """
    none = torch.empty(0, dtype=torch.int64)
    every = [torch.arange(x.shape[-1]) for x in (student_logprobs, teacher_logprobs)]
    return compare(
        student_logprobs,
        teacher_logprobs,
        student_ids=(none, every[0]),
        teacher_ids=(none, every[1]),
        with_bucket=False,
        with_distance=True,
    )[2]


def group_logprobs(logprobs: Tensor, *, members: Tensor, starts: Tensor, free: Tensor) -> Tensor:
    """Log of each group's mass, then the ids in no group one by one.

    Args:
        logprobs: (N, V) float32 log-probabilities; gradient flows.
        members: (M,) int64 ids in the order of their groups.
        starts: (G + 1,) int64: where each group begins among them, and M.
        free: (V − M,) int64 ids in no group.
    Returns:
        (N, G + V − M) float32; a group of one is that id.
    """
    given = logprobs if torch.is_grad_enabled() else logprobs.detach()
    return _Grouped.apply(given, members, starts, free)


class _Compared(torch.autograd.Function):
    """The loops, with the derivative that they leave as a sign."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        student_ids: Ids,
        teacher_ids: Ids,
        with_bucket: bool,
        with_distance: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels, num_rows = _kernels(), len(student)
        student, teacher = student.contiguous(), teacher.contiguous()
        num_student, num_all = len(student_ids[1]), len(student_ids[1]) + len(teacher_ids[1])
        columns = student.new_empty(2, num_rows, len(student_ids[0]) + with_bucket)
        distances = student.new_empty(num_rows if with_distance else 0)
        has_signs = with_distance and ctx.needs_input_grad[0]
        signs = student.new_empty(num_rows, num_student if has_signs else 0, dtype=torch.int8)
        scratch = (
            _of_threads(num_rows, num_all),
            _of_threads(num_rows, 4, kernels.NUM_BINS, dtype=torch.int32),
            _of_threads(num_rows, num_all, dtype=torch.int64),
        )
        sides = _arrays(student, *student_ids), _arrays(teacher, *teacher_ids)
        written = tuple(columns.numpy()), *_arrays(signs, distances)

        def work(begin: int, end: int, thread: int) -> None:
            own = (of_threads[thread] for of_threads in scratch)
            kernels.compare((begin, end), *sides, *own, *written)

        _share_out(work, num_rows)
        ctx.save_for_backward(student, signs, *student_ids)
        student_columns, teacher_columns = columns.unbind()
        ctx.mark_non_differentiable(teacher_columns)
        return student_columns, teacher_columns, distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_columns: Tensor, _: Tensor, by_distances: Tensor) -> tuple[Tensor | None, ...]:
        student, signs, *ids = ctx.saved_tensors
        kernels, gradient = _kernels(), torch.empty_like(student)  # (N, V)
        scratch = _of_threads(len(student), 2, len(ids[1]))
        side = _arrays(student, *ids)
        given = _arrays(signs, by_columns.contiguous(), by_distances.contiguous())
        (out,) = _arrays(gradient)

        def work(begin: int, end: int, thread: int) -> None:
            kernels.spread((begin, end), side, *given, scratch[thread], out)

        _share_out(work, len(student))
        return gradient, None, None, None, None, None


class _Grouped(torch.autograd.Function):
    """The loops of groups."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, members: Tensor, starts: Tensor, free: Tensor) -> Tensor:
        kernels, logprobs = _group_kernels(), logprobs.contiguous()
        out = logprobs.new_empty(len(logprobs), len(starts) - 1 + len(free))  # (N, G + R)
        scratch = _of_threads(len(logprobs), 2, len(members))
        ids, (given, written) = _arrays(members, starts, free), _arrays(logprobs, out)

        def work(begin: int, end: int, thread: int) -> None:
            kernels.group((begin, end), given, ids, scratch[thread], written)

        _share_out(work, len(logprobs))
        ctx.save_for_backward(logprobs, members, starts, free)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, members, starts, free = ctx.saved_tensors
        kernels, gradient = _group_kernels(), torch.empty_like(logprobs)  # (N, V)
        scratch = _of_threads(len(logprobs), 2, len(members))
        ids, given = _arrays(members, starts, free), _arrays(logprobs, above.contiguous())
        (out,) = _arrays(gradient)

        def work(begin: int, end: int, thread: int) -> None:
            kernels.ungroup((begin, end), *given, ids, scratch[thread], out)

        _share_out(work, len(logprobs))
        return gradient, None, None, None


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """The tensors' own memory, as the loops take it."""
    return tuple(tensor.detach().numpy() for tensor in tensors)


def _num_threads(num_rows: int) -> int:
    return max(1, min(torch.get_num_threads(), num_rows))


def _of_threads(num_rows: int, *shape: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Scratch for each thread that works on some rows."""
    return torch.empty(_num_threads(num_rows), *shape, dtype=dtype).numpy()


def _share_out(work: Callable[[int, int, int], None], num_rows: int) -> None:
    """work(begin, end, thread) for every row."""
    compiled.share_out(work, ((row, row + 1) for row in range(num_rows)), _num_threads(num_rows))


@cache
def _kernels() -> ModuleType:
    """The compiled loops, from disk after the first time on a machine."""
    logger.info("vocabularies are compared by compiled loops; the first call on a machine compiles for up to a minute")
    from kdkit.losses import _cross_kernels

    return _cross_kernels


@cache
def _group_kernels() -> ModuleType:
    """Those of groups."""
    from kdkit.losses import _group_kernels

    return _group_kernels

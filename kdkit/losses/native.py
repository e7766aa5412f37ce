"""The losses over a chunk's logits by loops that numba compiles: backend "native" of the head pass, for the CPU.

`kdkit.losses.terms.block_objective` and autograd make a dozen passes over a block, each writing a copy of it. Here a
position is taken at a time, on as many threads as torch has: what the losses and their gradient need of it stays in
the cache. Beyond the chunk a thread takes five rows. Results do not depend on the number of threads.
"""

from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kdkit.compiled import share_out
from kdkit.losses.compiled_forms import Plan
from kdkit.losses.terms import LABEL_LOGPROBS, TEACHER_ENTROPY, DivergenceTerm, LabelTerm, Tally, Task
from kdkit.teacher.signal import DenseSignal, TeacherSignal

ROWS_AT_A_TIME = 4
"""What a thread takes of a chunk."""


def block_gradient(
    product: Tensor,
    teacher: TeacherSignal | None,
    task: Task,
    *,
    plan: Plan,
    rows: slice,
    tally: Tally,
    form: bool,
) -> Tensor | None:
    """As `kdkit.losses.blocks.BlockGradient`; a float32 product is overwritten by its gradient and returned."""
    logits = product.detach().to(torch.float32)
    logits = product if logits.data_ptr() == product.data_ptr() else logits.contiguous()
    kernels, num_rows = _kernels(), len(logits)
    temperatures = (
        np.array([task.head.scale / temperature for temperature in plan.temperatures], np.float32),
        np.array([teacher is not None and task.asks_teacher(temperature) for temperature in plan.temperatures]),
    )
    tables = _term_tables(plan, task, rows, form=form)
    known, targets = _teacher_tables(teacher, plan, task, num_rows), _targets(task, rows)
    values, entropies = np.empty((len(task.terms), num_rows), np.float32), np.empty(num_rows, np.float32)
    chunks = [(begin, min(begin + ROWS_AT_A_TIME, num_rows)) for begin in range(0, num_rows, ROWS_AT_A_TIME)]
    num_threads = min(torch.get_num_threads(), len(chunks))
    scratch, student = torch.empty(num_threads, 5, logits.shape[1], dtype=torch.float32).numpy(), logits.numpy()

    def solve(begin: int, end: int, thread: int) -> None:
        own = (begin, end), known, temperatures, tables, targets, scratch[thread]
        kernels.solve(student, *own, values, entropies)

    share_out(solve, chunks, num_threads)
    tally.values[:, rows] = torch.from_numpy(values * tables[-1])
    if TEACHER_ENTROPY in tally.extras:
        tally.extras[TEACHER_ENTROPY][rows] = torch.from_numpy(entropies)
    if LABEL_LOGPROBS in tally.extras:
        first = next(index for index, term in enumerate(task.terms) if isinstance(term, LabelTerm))
        tally.extras[LABEL_LOGPROBS][rows] = torch.from_numpy(-values[first])
    return logits if form else None


@cache
def _kernels() -> ModuleType:
    """The compiled loops, from disk after the first time on a machine."""
    from kdkit.losses import _kernels

    return _kernels


def _term_tables(plan: Plan, task: Task, rows: slice, *, form: bool) -> tuple[np.ndarray, ...]:
    """The terms as `Terms` of the loops; without a gradient none has a weight."""
    num_rows = rows.stop - rows.start
    by_position = np.ones((len(task.terms), num_rows), np.float32)
    for own, term in zip(by_position, task.terms, strict=True):
        assert isinstance(term, DivergenceTerm | LabelTerm)
        if term.token_weights is not None:
            own[:] = term.token_weights[rows].detach().to("cpu", torch.float32).numpy()
    own = np.array([form.own for form in plan.forms], np.float32).reshape(-1, 2)
    return (
        np.array([form.kind for form in plan.forms], np.int64),
        np.array([plan.temperatures.index(form.temperature) for form in plan.forms], np.int64),
        np.ascontiguousarray(own[:, 0]),
        np.ascontiguousarray(own[:, 1]),
        np.array([term.weight if form else 0.0 for term in task.terms], np.float32),
        by_position,
    )


def _targets(task: Task, rows: slice) -> np.ndarray:
    """(t, n) ids of each term of labels."""
    targets = np.zeros((len(task.terms), rows.stop - rows.start), np.int64)
    for own, term in zip(targets, task.terms, strict=True):
        if isinstance(term, LabelTerm):
            own[:] = term.targets[rows].cpu().numpy()
            _check_ids(own, task.head.num_ids, f"targets of term {term.name!r}")
    return targets


def _check_ids(ids: np.ndarray, num_ids: int, name: str) -> None:
    """The loops look at no bounds: an id beyond the row would be read, and written, in other memory."""
    if ids.size and not 0 <= ids.min() <= ids.max() < num_ids:
        raise ValueError(f"{name} run from {ids.min()} to {ids.max()}; allowed: 0 to {num_ids - 1}, the head's ids")


def _teacher_tables(
    teacher: TeacherSignal | None, plan: Plan, task: Task, num_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits or log-probabilities of the teacher, the factors on them, and the kept ids, as the loops take them."""
    factors = np.array([1.0 / temperature for temperature in plan.temperatures], np.float32)
    kept = torch.zeros(num_rows, 0, dtype=torch.int64)
    if teacher is None:
        logits = torch.zeros(1, num_rows, 0, dtype=torch.float32)
    elif isinstance(teacher, DenseSignal):
        logits = teacher.logits.detach().to(torch.float32).contiguous().unsqueeze(0)
    else:
        assert teacher.support is not None
        kept = teacher.support.contiguous()
        unasked = torch.zeros(num_rows, kept.shape[1] + 1, dtype=torch.float32)
        asked = [teacher.logprobs_at(t) if task.asks_teacher(t) else unasked for t in plan.temperatures]
        logits = torch.stack(asked)
    _check_ids(kept.numpy(), task.head.num_ids, "the teacher's kept ids")
    return logits.numpy(), factors, kept.numpy()

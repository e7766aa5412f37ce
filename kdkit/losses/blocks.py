"""What the losses make of the logits of a few positions: their values, and their gradient by the logits.

Three backends do the same. "torch" runs any loss, by autograd, on any device. The losses of `LOSSES`, and the labels,
have compiled forms: "native" runs them on the CPU, "cuda" on a CUDA card; both compute in float32.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from kdkit import compiled
from kdkit.losses import autograd, cuda, native
from kdkit.losses.compiled_forms import plan_of
from kdkit.losses.terms import ScaledGradient, Tally, Task
from kdkit.teacher.signal import Head, TeacherSignal

logger = logging.getLogger(__name__)

# Entries of the logits that are taken at a time where copies of them are made, as backend "torch" does. A chunk is long
# for the sake of the matrix products, as the weight's gradient, (V, H), is read and written once per chunk; the losses
# hold several copies of what they work on. On a CPU these should fit its cache, elsewhere they should only be large
# against the cost of starting a kernel.
BLOCK_ENTRIES = {"cpu": 2**20}
BLOCK_ENTRIES_ELSEWHERE = 2**22
ALL_ENTRIES = 2**62


class BlockGradient(Protocol):
    """What a backend does with a block of r positions."""

    def __call__(
        self, product: Tensor, teacher: TeacherSignal | None, task: Task, *, rows: slice, tally: Tally, form: bool
    ) -> Tensor | ScaledGradient | None:
        """Fill the tally, and form the gradient of the weighted sum by the head's product.

        Args:
            product: (r, V') `W h + b`; may be written to and returned.
            teacher: the signal at these positions; None where nothing looks at it.
            task: the pass.
            rows: the positions among all N.
            tally: filled at these positions.
            form: whether the gradient is wanted.
        Returns:
            (r, V') float32, float64 for float64; or in the product's half precision, with a factor for each row; None
            unless `form`.
        """


@dataclass(frozen=True)
class Solver:
    """The backend of a pass."""

    gradient: BlockGradient
    block_entries: int
    """Entries of the logits that it takes at a time."""


def solver_for(backend: str | None, task: Task, *, like: Tensor) -> Solver:
    """The backend that was named, or else the fastest that can do a task.

    Args:
        backend: a name of `BACKENDS`, or None.
        task: the pass.
        like: of the device and dtype of the matrix products.
    Raises:
        ValueError: an unknown name, or a backend that cannot do the task.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}, or None")
    if backend == "torch":
        return _by_torch(like)
    name = backend or ("cuda" if like.device.type == "cuda" else "native")
    solver = COMPILED[name](task, like)
    if isinstance(solver, Solver):
        if backend is None:
            _say_once(name, WHY[name])
        return solver
    if backend is not None:
        raise ValueError(f'backend {name!r} cannot do this pass: {solver}; give backend="torch", or None')
    _say_once("torch", solver)
    return _by_torch(like)


def fastest_backend(device: torch.device) -> tuple[str, str]:
    """Which backend `backend=None` takes on a device for losses that have a compiled form, and why.

    Args:
        device: of the student's head. On CUDA this compiles and loads the kernels, which the first pass would do.
    Returns:
        A name of `BACKENDS` and the reason.
    """
    name = "cuda" if device.type == "cuda" else "native"
    nothing = Task(Head(torch.empty(1, 0, device=device)), None, (), 1, (), None)
    solver = COMPILED[name](nothing, nothing.head.weight)
    return (name, WHY[name]) if isinstance(solver, Solver) else ("torch", solver)


def _by_torch(like: Tensor) -> Solver:
    return Solver(autograd.block_gradient, _entries_of_copies(like.device))


def _native(task: Task, like: Tensor) -> Solver | str:
    # A subclass, such as a tensor without values, may have no memory for compiled loops to read.
    if like.device.type != "cpu" or like.dtype == torch.float64 or type(like.detach()) is not Tensor:
        return f"the compiled one is for float32 or less on the CPU, not {like.dtype} on {like.device.type}"
    if not compiled.is_installed():
        return 'numba is missing, which makes the faster "native": pip install "kdkit[fast]"'
    plan = plan_of(task)
    if isinstance(plan, str):
        return plan
    # Half precision is copied to float32 and back, a few rows at a time.
    entries = ALL_ENTRIES if like.dtype == torch.float32 else _entries_of_copies(like.device)
    return Solver(partial(native.block_gradient, plan=plan), entries)


def _cuda(task: Task, like: Tensor) -> Solver | str:
    if like.device.type != "cuda" or like.dtype == torch.float64 or type(like.detach()) is not Tensor:
        return f"its kernels are for float32 or less on CUDA, not {like.dtype} on {like.device.type}"
    plan = plan_of(task)
    reason = plan if isinstance(plan, str) else cuda.limit(plan, task) or _problem(like.device)
    if isinstance(plan, str) or reason is not None:
        return str(reason)
    return Solver(partial(cuda.block_gradient, plan=plan, launcher=cuda.launcher(like.device)), ALL_ENTRIES)


def _entries_of_copies(device: torch.device) -> int:
    return BLOCK_ENTRIES.get(device.type, BLOCK_ENTRIES_ELSEWHERE)


@cache
def _problem(device: torch.device) -> str | None:
    return cuda.problem(device)


@cache
def _say_once(name: str, reason: str) -> None:
    logger.info("the losses run on backend %r: %s", name, reason)


COMPILED: dict[str, Callable[[Task, Tensor], Solver | str]] = {"native": _native, "cuda": _cuda}
"""By name; each says why it cannot do a task on a tensor's device."""
WHY = {
    "native": "numba is installed; the first call on a machine compiles for some seconds",
    "cuda": "its kernels are compiled for this card",
}
"""What the log says of them."""
BACKENDS = ("torch", *COMPILED)
"""By name; "native" needs numba, "cuda" a card."""

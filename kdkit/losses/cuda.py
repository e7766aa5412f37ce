"""The losses over a chunk's logits by a kernel that NVRTC compiles for the card: backend "cuda" of the head pass.

`cuda.cu` has the kernel: a block of threads takes a position, walks over its logits three times and puts their gradient
in their place, in float32 inside whatever the logits are. It takes no memory beyond them. The host never waits for the
device.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdkit.cuda import SHARED_BYTES, Module, load_kernels, stream_of, why_not
from kdkit.losses import autograd
from kdkit.losses.compiled_forms import Plan, plan_of
from kdkit.losses.divergences import LOSSES
from kdkit.losses.terms import (
    LABEL_LOGPROBS,
    TEACHER_ENTROPY,
    DivergenceTerm,
    LabelTerm,
    ScaledGradient,
    Tally,
    Task,
    Term,
)
from kdkit.teacher.kept import TopKSignal
from kdkit.teacher.signal import DenseSignal, Head, LiveSignal, TeacherSignal, moved

SOURCE = Path(__file__).with_name("cuda.cu")
KERNELS = {torch.float32: "solve_float32", torch.float16: "solve_float16", torch.bfloat16: "solve_bfloat16"}
"""By dtype of the logits."""
MOST_GROUPS, MOST_TERMS = 4, 8
"""Temperatures and terms of a pass, as in the source."""
MOST_THREADS = 512
"""Of a block."""
DESK_BYTES, THREAD_BYTES = 272, 8
"""Of a block's notes, and of each thread's place in a sum, as in the source."""


class _Group(ctypes.Structure):
    """`Group` of the source."""

    _fields_ = (("factors", ctypes.c_float * 2), ("asks_teacher", ctypes.c_int))


class _Term(ctypes.Structure):
    """`Term` of the source."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("group", ctypes.c_int),
        ("first", ctypes.c_float),
        ("second", ctypes.c_float),
        ("weight", ctypes.c_float),
        ("token_weights", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
    )


class _Pass(ctypes.Structure):
    """`Pass` of the source."""

    _fields_ = (
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("known", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("entropies", ctypes.c_void_p),
        ("label_logprobs", ctypes.c_void_p),
        ("value_stride", ctypes.c_longlong),
        ("num_ids", ctypes.c_int),
        ("num_kept", ctypes.c_int),
        ("num_groups", ctypes.c_int),
        ("num_terms", ctypes.c_int),
        ("groups", _Group * MOST_GROUPS),
        ("terms", _Term * MOST_TERMS),
    )


@dataclass(frozen=True)
class Launcher:
    """How the kernel is launched."""

    module: Module
    most_threads: int = MOST_THREADS

    def solve(self, pass_: _Pass, logits: Tensor) -> None:
        """A block for each row of the logits."""
        threads = min(self.most_threads, -(-logits.shape[1] // 32) * 32)
        shared_bytes = DESK_BYTES + THREAD_BYTES * threads + (_mark_bytes(logits.shape[1]) if pass_.num_kept else 0)
        grid, stream = (len(logits), 1, 1), stream_of(logits.device)
        self.module.launch(
            KERNELS[logits.dtype], pass_, grid=grid, threads=threads, shared_bytes=shared_bytes, stream=stream
        )


def limit(plan: Plan, task: Task) -> str | None:
    """Why a plan is too large for the kernel, None if it is not."""
    if len(plan.forms) > MOST_TERMS or len(plan.temperatures) > MOST_GROUPS:
        return (
            f"{len(plan.forms)} terms at {len(plan.temperatures)} temperatures; its kernel takes up to {MOST_TERMS} "
            f"at {MOST_GROUPS}"
        )
    room = SHARED_BYTES - DESK_BYTES - THREAD_BYTES * MOST_THREADS
    if task.needs_teacher and not _is_dense(task.signal) and _mark_bytes(task.head.num_ids) > room:
        return f"a bit for each of {task.head.num_ids} ids does not fit the card's shared memory"
    return None


def _is_dense(signal: TeacherSignal | None) -> bool:
    return isinstance(signal, DenseSignal | LiveSignal)


def _mark_bytes(num_ids: int) -> int:
    return -(-num_ids // 32) * 4


def problem(device: torch.device) -> str | None:
    """Why the kernel is not for a CUDA device, None if it is; compiles and loads it, and tries it once."""
    return why_not(launcher, agrees_with_torch, device)


def launcher(device: torch.device) -> Launcher:
    """The kernel on a CUDA device.

    Raises:
        CudaUnavailable: it cannot be compiled or loaded.
    """
    return Launcher(load_kernels(SOURCE, device))


@torch.no_grad()
def agrees_with_torch(launcher: Launcher, device: torch.device) -> bool:
    """Whether the kernel finds on a device what backend "torch" finds: all kinds of terms, dense and kept ids."""
    logits = torch.linspace(0, 97, 2 * 3 * 700).remainder(11.0).view(2, 3, 700).to(device)
    kept = TopKSignal.from_logits(logits[1], 9, [2.0])
    return all(
        _agree(launcher, logits[0].to(dtype), signal)
        for dtype in KERNELS
        for signal in (DenseSignal(logits[1].to(dtype)), kept)
    )


def _agree(launcher: Launcher, logits: Tensor, signal: TeacherSignal) -> bool:
    """Whether values and gradient of all kinds of terms do."""
    terms = [DivergenceTerm(name, loss, temperature=2.0) for name, loss in LOSSES.items()]
    labels = LabelTerm("labels", torch.arange(len(logits), device=logits.device))
    task = Task(Head(logits.new_empty(logits.shape[1], 0)), signal, (*terms, labels), len(logits), (), None)
    plan, rows = plan_of(task), slice(0, len(logits))
    assert isinstance(plan, Plan)
    tallies = [Tally.zeros(task, len(logits), like=logits) for _ in range(2)]
    expected = autograd.block_gradient(logits, signal, task, rows=rows, tally=tallies[0], form=True)
    found = block_gradient(
        logits.clone(), signal, task, plan=plan, launcher=launcher, rows=rows, tally=tallies[1], form=True
    )
    assert expected is not None
    if isinstance(found, ScaledGradient):
        found = found.units * found.row_scale
    assert found is not None
    pairs = (tallies[1].values, tallies[0].values), (found, expected)
    rtol = max(1e-4, 2 * torch.finfo(logits.dtype).eps)
    return all(torch.allclose(ours, theirs, rtol=rtol, atol=1e-6) for ours, theirs in pairs)


@torch.no_grad()
def block_gradient(
    product: Tensor,
    teacher: TeacherSignal | None,
    task: Task,
    *,
    plan: Plan,
    launcher: Launcher,
    rows: slice,
    tally: Tally,
    form: bool,
) -> Tensor | ScaledGradient | None:
    """As `kdkit.losses.blocks.BlockGradient`; the product is overwritten by its gradient and returned.

    Both sides are read in the student's dtype; where the teacher has another, in float32, by way of copies.
    """
    known = _known(teacher, plan, task)
    dtype = product.dtype if known.logits is None or known.logits.dtype == product.dtype else torch.float32
    logits = product.detach().to(dtype).contiguous()  # (r, V')
    theirs = None if known.logits is None else known.logits.to(dtype).contiguous()  # (r, V')
    row_scale = logits.new_ones(len(logits), 1, dtype=torch.float32)  # (r, 1)
    by_term = [_of_positions(term, rows, logits.device) for term in task.terms]
    extras = {name: found[rows] for name, found in tally.extras.items()}
    values = tally.values[:, rows]  # (t, r)
    pass_ = _Pass(
        student=_place(logits),
        teacher=_place(theirs),
        kept=_place(known.ids),
        known=_place(known.logprobs),
        gradient=_place(logits if form else None),
        row_scales=_place(row_scale),
        values=_place(values),
        entropies=_place(extras.get(TEACHER_ENTROPY)),
        label_logprobs=_place(extras.get(LABEL_LOGPROBS)),
        value_stride=values.stride(0),
        num_ids=logits.shape[1],
        num_kept=0 if known.ids is None else known.ids.shape[1],
        num_groups=len(plan.temperatures),
        num_terms=len(plan.forms),
        groups=(_Group * MOST_GROUPS)(*_groups(plan, task)),
        terms=(_Term * MOST_TERMS)(*_terms(plan, task, by_term)),
    )
    launcher.solve(pass_, logits)
    if not form:
        return None
    found = product if logits.data_ptr() == product.data_ptr() else logits
    return found if dtype == torch.float32 else ScaledGradient(found, row_scale)


@dataclass(frozen=True, eq=False)
class _Known:
    """The teacher at the r positions of a block: nothing, logits, or kept ids."""

    logits: Tensor | None = None
    """(r, V')"""
    ids: Tensor | None = None
    """(r, K) int64"""
    logprobs: Tensor | None = None
    """(G, r, K + 1) float32 for each temperature, 0 where nothing looks at it."""


def _known(teacher: TeacherSignal | None, plan: Plan, task: Task) -> _Known:
    if teacher is None:
        return _Known()
    if isinstance(teacher, DenseSignal):
        return _Known(logits=teacher.logits.detach())
    assert teacher.support is not None
    ids = teacher.support.contiguous()
    unasked = torch.zeros(len(ids), ids.shape[1] + 1, device=ids.device)
    asked = [teacher.logprobs_at(t).to(unasked) if task.asks_teacher(t) else unasked for t in plan.temperatures]
    return _Known(ids=ids, logprobs=torch.stack(asked))


def _groups(plan: Plan, task: Task) -> list[_Group]:
    return [
        _Group((ctypes.c_float * 2)(task.head.scale / temperature, 1.0 / temperature), task.asks_teacher(temperature))
        for temperature in plan.temperatures
    ]


def _terms(plan: Plan, task: Task, by_term: list[tuple[Tensor | None, Tensor | None]]) -> list[_Term]:
    return [
        _Term(form.kind, plan.temperatures.index(form.temperature), *form.own, term.weight, *map(_place, places))
        for form, term, places in zip(plan.forms, task.terms, by_term, strict=True)
    ]


def _of_positions(term: Term, rows: slice, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """What a term has for each of r positions: weights (r,) float32, or None; targets (r,) int64, or None."""
    assert isinstance(term, DivergenceTerm | LabelTerm)
    weights, targets = term.token_weights, term.targets if isinstance(term, LabelTerm) else None
    return (
        None if weights is None else moved(weights[rows].detach(), device).to(torch.float32).contiguous(),
        None if targets is None else moved(targets[rows], device).to(torch.int64).contiguous(),
    )


def _place(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; whoever asks keeps it until the kernel is launched."""
    return None if tensor is None else tensor.data_ptr()

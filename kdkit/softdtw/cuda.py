"""Soft-DTW by kernels that NVRTC compiles for the card at hand: backend "cuda", for float32 on CUDA.

`cuda.cu` has the kernels and their layout. The host never waits for the device: the lengths are on the CPU already, an
upper limit of each sample's cells stands in for their count, and the samples that do not fit the kernels' number format
are found and computed again, in float64, on the device itself.

Memory beyond the result, in float32 for each admissible cell: two, of which one is kept for the backward pass.
"""

import ctypes
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kdkit.cuda import SHARED_BYTES, Argument, Module, load_kernels, stream_of, why_not
from kdkit.softdtw import anti_diagonal
from kdkit.softdtw.band import band_limits
from kdkit.softdtw.packed import PackedAlignment

SOURCE = Path(__file__).with_name("cuda.cu")
TILE = 32
"""Rows and columns of a tile, as in the source."""
TILE_THREADS = 256
MOST_THREADS = 1024
"""Threads of a block; longer anti-diagonals take several rounds."""
STATE_BYTES = 3 * 12
"""Of three anti-diagonals, for each position: three float32 a cell on the way back, less on the way there."""


class _Batch(ctypes.Structure):
    """`Batch` of the source."""

    _fields_ = (
        ("diagonals", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("num_samples", ctypes.c_longlong),
        ("num_diagonals", ctypes.c_longlong),
        ("rows", ctypes.c_longlong),
        ("columns", ctypes.c_longlong),
        ("size", ctypes.c_longlong),
    )


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the admissible cells of a batch lie, in packed order."""

    shape: torch.Size
    """(B, N, M) of the padded costs."""
    lengths: Tensor
    """(2, B) int64 on the device: rows, then columns; 0 and 0 for a sample with an empty side."""
    diagonals: Tensor
    """(B, A, 3) int64 on the device: first and last admissible row of each anti-diagonal, packed slot of the first."""
    num_slots: int
    """Room for the packed cells of all samples; a band leaves some of it unused."""
    widest: int
    """No anti-diagonal has more admissible cells."""

    @property
    def batch(self) -> _Batch:
        """The plan as the kernels take it."""
        num_samples, num_diagonals, _ = self.diagonals.shape
        places = self.diagonals.data_ptr(), self.lengths.data_ptr()
        return _Batch(*places, num_samples, num_diagonals, *self.shape[1:], self.widest + 2)


@dataclass(frozen=True)
class Launcher:
    """How the kernels of a plan are launched."""

    module: Module
    most_threads: int = MOST_THREADS
    tile_threads: int = TILE_THREADS
    shared_bytes: int = SHARED_BYTES

    def on_tiles(self, kernel: str, plan: Plan, *arguments: Argument) -> None:
        """A block for each tile of each sample's matrix."""
        batch, rows, columns = plan.shape
        grid = batch, -(-rows // TILE), -(-columns // TILE)
        shared_bytes = 4 * TILE * TILE
        self._launch(kernel, plan, *arguments, grid=grid, threads=self.tile_threads, shared_bytes=shared_bytes)

    def on_samples(self, kernel: str, plan: Plan, *arguments: Argument) -> None:
        """A block for each sample, and after the arguments the memory for what shared memory does not hold, or None."""
        size = plan.widest + 2
        threads = min(self.most_threads, -(-size // 32) * 32)
        needed = -(-STATE_BYTES * size // 8) * 8
        grid = len(plan.diagonals), 1, 1
        if needed <= self.shared_bytes:
            self._launch(kernel, plan, *arguments, None, grid=grid, threads=threads, shared_bytes=needed)
        else:
            wide = torch.empty(len(plan.diagonals), needed, dtype=torch.uint8, device=plan.diagonals.device)
            self._launch(kernel, plan, *arguments, wide, grid=grid, threads=threads, shared_bytes=0)

    def _launch(
        self, kernel: str, plan: Plan, *arguments: Argument, grid: tuple[int, int, int], threads: int, shared_bytes: int
    ) -> None:
        options = {"threads": threads, "shared_bytes": shared_bytes, "stream": stream_of(plan.diagonals.device)}
        self.module.launch(kernel, plan.batch, *arguments, grid=grid, **options)


def align(
    cost: Tensor,
    lengths_n: Tensor,
    lengths_m: Tensor,
    *,
    gamma: float,
    band: int | None,
    with_alignment: bool,
) -> tuple[Tensor, Tensor | PackedAlignment | None]:
    """Values and expected alignments of a ragged batch, a block of threads for each sample.

    Float64 and other devices are left to backend "torch".

    Args and Returns: as `kdkit.softdtw.api.Backend`.
    Raises:
        ValueError: the kernels cannot be compiled or loaded here.
    Source: Cuturi & Blondel 2017, arXiv:1703.01541, algorithms 1 and 2. Differs: the recursion runs on
    exp(-R / gamma), with an exponent of its own; the backward pass uses stored weights.
    """
    if cost.dtype != torch.float32 or cost.device.type != "cuda":
        return anti_diagonal.align(cost, lengths_n, lengths_m, gamma=gamma, band=band, with_alignment=with_alignment)
    solver = partial(solve, launcher=launcher(cost.device))
    return solver(cost, lengths_n, lengths_m, gamma=gamma, band=band, with_alignment=with_alignment)


def problem(device: torch.device) -> str | None:
    """Why the kernels are not for a CUDA device, None if they are; compiles and loads them, and tries them once."""
    return why_not(launcher, agrees_with_torch, device)


@torch.no_grad()
def agrees_with_torch(launcher: Launcher, device: torch.device) -> bool:
    """Whether the kernels find on a device what backend "torch" finds: a few samples, ragged, banded, one a misfit."""
    cost = torch.linspace(0, 97, 4 * 40 * 33).remainder(2.0).view(4, 40, 33)
    cost[3] *= 1e7
    lengths = torch.tensor([40, 7, 0, 9]), torch.tensor([33, 21, 5, 3])
    here = cost.to(device)
    values, packed = solve(here, *lengths, gamma=0.1, band=6, with_alignment=True, launcher=launcher)
    expected, alignment = anti_diagonal.align(here, *lengths, gamma=0.1, band=6, with_alignment=True)
    assert packed is not None
    assert alignment is not None
    pairs = (values, expected), (packed.laid_out(len(cost)), alignment)
    return all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3) for ours, theirs in pairs)


def launcher(device: torch.device) -> Launcher:
    """The kernels on a CUDA device.

    Raises:
        CudaUnavailable: they cannot be compiled or loaded.
    """
    return Launcher(load_kernels(SOURCE, device))


def solve(
    cost: Tensor,
    lengths_n: Tensor,
    lengths_m: Tensor,
    *,
    gamma: float,
    band: int | None,
    with_alignment: bool,
    launcher: Launcher,
) -> tuple[Tensor, PackedAlignment | None]:
    """`align` by the kernels of a launcher, whose device has the cost."""
    cost = cost.contiguous()
    values = cost.new_zeros(len(cost))
    plan = make_plan(cost, lengths_n, lengths_m, band=band)
    if plan.num_slots == 0:
        return values, PackedAlignment(values, partial(_zeros, shape=cost.shape)) if with_alignment else None
    share_up = cost.new_empty(plan.num_slots)
    share_left = cost.new_empty(plan.num_slots) if with_alignment else None
    misfits = torch.empty(len(cost), dtype=torch.int32, device=cost.device)
    launcher.on_tiles("pack", plan, cost, share_up)
    launcher.on_samples("forward", plan, gamma, share_up, share_left, values, misfits)
    launcher.on_samples("forward_misfits", plan, gamma, cost, share_up, share_left, values, misfits)
    if share_left is None:
        return values, None
    launcher.on_samples("backward", plan, values, share_up, share_left)
    return values, PackedAlignment(share_left, partial(_spread, plan=plan, launcher=launcher))


def make_plan(cost: Tensor, lengths_n: Tensor, lengths_m: Tensor, *, band: int | None) -> Plan:
    """The plan of a batch on the cost's device, made without waiting for it.

    Args:
        cost: (B, N, M).
        lengths_n, lengths_m: (B,) int64 on the CPU.
        band: >= 1, or None.
    """
    empty = torch.minimum(lengths_n, lengths_m) == 0
    n, m = lengths_n.where(~empty, 0), lengths_m.where(~empty, 0)
    steps = (n + m - 1).clamp(min=0)  # (B,)
    widths = torch.minimum(n, m)
    if band is not None:
        longest_side = torch.maximum(n, m) - 1
        widths = torch.minimum(widths, 2 * band * longest_side // (n + m - 2).clamp(min=1) + 1).clamp(min=0)
    room = torch.minimum(n * m, steps * widths)
    starts = room.cumsum(0) - room
    num_diagonals = int(steps.max()) if len(steps) else 0
    host = torch.stack((n, m, starts))  # (3, B)
    there = host.pin_memory().to(cost.device, non_blocking=True) if cost.device.type == "cuda" else host
    first, last = band_limits(there[0], there[1], band=band, num_diagonals=num_diagonals)  # (A, B)
    counts = (last - first + 1).clamp(min=0)
    slots = counts.cumsum(0) - counts + there[2]
    return Plan(
        shape=cost.shape,
        lengths=there[:2],
        diagonals=torch.stack((first, last, slots), -1).transpose(0, 1).contiguous(),
        num_slots=int(room.sum()),
        widest=int(widths.max()) if len(widths) else 0,
    )


def _spread(cells: Tensor, factors: Tensor, *, plan: Plan, launcher: Launcher) -> Tensor:
    """The packed cells times the factors, (B, N, M)."""
    out = cells.new_empty(plan.shape)
    launcher.on_tiles("spread", plan, cells, factors.to(torch.float32).contiguous(), out)
    return out


def _zeros(cells: Tensor, _factors: Tensor, *, shape: torch.Size) -> Tensor:
    """The alignment of a batch without cells."""
    return cells.new_zeros(shape)

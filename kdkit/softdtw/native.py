"""Soft-DTW by loops that numba compiles for this CPU: backend "native", for float32 on the CPU.

Samples are shared out among as many threads as torch uses; the result does not depend on how many. Memory
beyond the result: one float32 for each admissible cell, kept for the backward pass, and for each thread two
for each admissible cell of the largest sample.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kdkit.softdtw import anti_diagonal
from kdkit.softdtw.packed import PackedAlignment

PARALLEL_CELLS = 20_000
"""With fewer admissible cells in a batch, a second thread costs more than it brings."""


Sizes = tuple[np.ndarray, np.ndarray, int]
"""Both lengths, (B,) each, and the band, 0 for none."""


def is_installed() -> bool:
    """Whether numba can be found; it is not imported."""
    return find_spec("numba") is not None


def align(
    cost: Tensor,
    lengths_n: Tensor,
    lengths_m: Tensor,
    *,
    gamma: float,
    band: int | None,
    with_alignment: bool,
) -> tuple[Tensor, Tensor | PackedAlignment | None]:
    """Values and expected alignments of a ragged batch, a sample at a time on each thread.

    Float64 and other devices are left to backend "torch". So is a sample with a NaN, with a cost above
    2.9e6 gamma, or with costs that might sum to more than 1.8e8 gamma along a path.

    Args and Returns: as `kdkit.softdtw.api.Backend`.
    Raises:
        ValueError: numba is not installed.
    Source: Cuturi & Blondel 2017, arXiv:1703.01541, algorithms 1 and 2. Differs: the recursion runs on
    exp(-R / gamma), with an exponent of its own; the backward pass uses stored weights.
    """
    if cost.dtype != torch.float32 or cost.device.type != "cpu":
        return anti_diagonal.align(cost, lengths_n, lengths_m, gamma=gamma, band=band, with_alignment=with_alignment)
    kernels = _kernels()
    sizes = lengths_n.numpy(), lengths_m.numpy(), band or 0
    starts = np.empty(len(cost) + 1, np.int64)
    kernels.count_cells(*sizes, starts)
    cells = torch.empty(int(starts[-1]) if with_alignment else 0)
    values, is_misfit = _solve(cost.contiguous().numpy(), sizes, starts, gamma, cells.numpy())
    for sample in is_misfit.nonzero()[0]:
        one = slice(sample, sample + 1)
        value, alignment = anti_diagonal.align(
            cost[one], lengths_n[one], lengths_m[one], gamma=gamma, band=band, with_alignment=with_alignment
        )
        values[sample] = value.item()
        if alignment is not None:
            size = int(lengths_n[sample]), int(lengths_m[sample]), band or 0
            kernels.pack_sample(alignment[0].numpy(), *size, cells[starts[sample] : starts[sample + 1]].numpy())
    found = torch.from_numpy(values).to(torch.float32)
    if not with_alignment:
        return found, None
    return found, PackedAlignment(cells, partial(_spread, sizes=sizes, starts=starts, shape=cost.shape))


@cache
def _kernels() -> ModuleType:
    """The compiled loops, from disk after the first time on a machine."""
    if not is_installed():
        raise ValueError('backend "native" needs numba, which is missing: pip install "kdkit[fast]", or name another.')
    from kdkit.softdtw import _kernels

    return _kernels


def _solve(
    cost: np.ndarray, sizes: Sizes, starts: np.ndarray, gamma: float, cells: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values (B,) float64 and which samples did not fit the number format; writes the packed cells, if there are any."""
    kernels = _kernels()
    lengths_n, lengths_m, band = sizes
    counts = np.diff(starts)
    values, is_misfit = np.zeros(len(counts)), np.zeros(len(counts), dtype=bool)
    num_threads = _num_threads(counts)
    slots = kernels.num_slots(lengths_n, lengths_m, counts, len(cells) > 0)
    shares = torch.empty(num_threads, 2 * slots).numpy()

    def solve(sample: int, thread: int) -> None:
        own = cells[starts[sample] : starts[sample + 1]]
        values[sample], is_misfit[sample] = kernels.solve_sample(
            cost[sample], lengths_n[sample], lengths_m[sample], band, gamma, shares[thread], own
        )

    _share_out(solve, counts, num_threads)
    return values, is_misfit


def _spread(cells: Tensor, factors: Tensor, *, sizes: Sizes, starts: np.ndarray, shape: torch.Size) -> Tensor:
    """The packed cells times the factors, (B, N, M)."""
    kernels = _kernels()
    lengths_n, lengths_m, band = sizes
    counts = np.diff(starts)
    out = torch.empty(shape)
    packed, laid_out, factor = cells.numpy(), out.numpy(), factors.to(torch.float32).contiguous().numpy()

    def spread(sample: int, thread: int) -> None:
        own = packed[starts[sample] : starts[sample + 1]]
        kernels.spread_sample(own, lengths_n[sample], lengths_m[sample], band, factor[sample], laid_out[sample])

    out[torch.from_numpy(counts == 0)] = 0.0
    _share_out(spread, counts, _num_threads(counts))
    return out


def _num_threads(counts: np.ndarray) -> int:
    """As many as torch has, no more than samples with cells."""
    if counts.sum() < PARALLEL_CELLS:
        return 1
    return min(torch.get_num_threads(), np.count_nonzero(counts))


def _share_out(task: Callable[[int, int], None], counts: np.ndarray, num_threads: int) -> None:
    """task(sample, thread) for every sample with cells, the largest first; the compiled loops leave the GIL."""
    waiting = iter(np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist())

    def work(thread: int) -> None:
        for sample in waiting:  # one iterator for all threads: each takes what is next
            task(sample, thread)

    helpers = [_pool(num_threads, os.getpid()).submit(work, thread) for thread in range(1, num_threads)]
    work(0)
    for helper in helpers:
        if not helper.cancel():  # one that has not begun finds nothing left to do
            helper.result()


@cache
def _pool(num_threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads beside the calling one; a forked process has to have its own."""
    return ThreadPoolExecutor(num_threads - 1, thread_name_prefix="kdkit-softdtw")

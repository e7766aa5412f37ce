"""Soft-DTW by loops that numba compiles for this CPU: backend "native", for float32 on the CPU.

Samples are shared out among as many threads as torch uses; the result does not depend on how many. Memory
beyond the result: one float32 for each admissible cell, kept for the backward pass, and for each thread two
for each admissible cell of the largest sample; of one that would need more than 16 MiB, two for each of 128 rows' cells
and a fortieth of the cost.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kdkit import compiled
from kdkit.softdtw import anti_diagonal
from kdkit.softdtw.packed import PackedAlignment

CELLS_A_THREAD = 80_000
"""A thread more is woken for as many admissible cells, 0.15 ms of work: to wake it and to share caches costs that."""
ENTRIES_A_THREAD = 2**19
"""The same where entries are only written: 0.15 ms."""
LARGE = 2**20
"""Entries from which on numpy asks Linux for pages of 2 MiB, which torch does not: to get a banded gradient's memory in
those of 4 KiB takes as long as to compute it."""
KEPT_SLOTS = 2**21
"""A sample of more cells, some 1,400 x 1,400, is computed strip by strip and twice forward, in little memory."""

Sizes = tuple[np.ndarray, np.ndarray, int]
"""Both lengths, (B,) each, and the band, 0 for none."""


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
    kernels, num_samples = _kernels(), cost.shape[0]
    # Copies: the backward pass reads them again, and the caller may have changed his by then.
    sizes = lengths_n.numpy().copy(), lengths_m.numpy().copy(), band or 0
    starts = np.empty(num_samples + 1, np.int64)
    num_slots = kernels.plan_batch(*sizes, KEPT_SLOTS, starts)
    num_cells = int(starts[-1])
    cells, found = _floats(num_cells if with_alignment else 0), _floats(num_samples)
    num_threads = _num_threads(num_samples, num_cells // CELLS_A_THREAD)
    shares = _floats(num_threads, 2 * num_slots).numpy()
    values, misfits, given, packed = (
        found.numpy(),
        np.empty(num_samples, bool),
        cost.contiguous().numpy(),
        cells.numpy(),
    )

    def solve(turns: np.ndarray, thread: int) -> None:
        kernels.solve(given, *sizes, KEPT_SLOTS, gamma, starts, turns, shares[thread], values, misfits, packed)

    _take_turns(solve, num_samples, num_threads)
    for sample in misfits.nonzero()[0]:
        one = slice(sample, sample + 1)
        value, alignment = anti_diagonal.align(
            cost[one], lengths_n[one], lengths_m[one], gamma=gamma, band=band, with_alignment=with_alignment
        )
        values[sample] = value.item()
        if alignment is not None:
            size = int(lengths_n[sample]), int(lengths_m[sample]), band or 0
            kernels.pack_sample(alignment[0].numpy(), *size, cells[starts[sample] : starts[sample + 1]].numpy())
    if not with_alignment:
        return found, None
    return found, PackedAlignment(cells, partial(_spread, sizes=sizes, starts=starts, shape=cost.shape))


@cache
def _kernels() -> ModuleType:
    """The compiled loops, from disk after the first time on a machine."""
    if not compiled.is_installed():
        raise ValueError('backend "native" needs numba, which is missing: pip install "kdkit[fast]", or name another.')
    from kdkit.softdtw import _kernels

    return _kernels


def _spread(cells: Tensor, factors: Tensor, *, sizes: Sizes, starts: np.ndarray, shape: torch.Size) -> Tensor:
    """The packed cells times the factors, (B, N, M)."""
    kernels = _kernels()
    out = _floats(*shape)
    packed, laid_out, factor = cells.numpy(), out.numpy(), factors.to(torch.float32).contiguous().numpy()

    def spread(turns: np.ndarray, _thread: int) -> None:
        kernels.spread(packed, *sizes, factor, starts, turns, laid_out)

    _take_turns(spread, out.shape[0], _num_threads(out.shape[0], out.numel() // ENTRIES_A_THREAD))
    return out


def _take_turns(task: Callable[[np.ndarray, int], None], num_samples: int, num_threads: int) -> None:
    """`kdkit._turns.take_turns`, which comes with numba."""
    from kdkit._turns import take_turns

    take_turns(task, num_samples, num_threads)


def _num_threads(num_samples: int, num_shares: int) -> int:
    """As many as torch has, at most one for a sample or for a share that is worth waking it."""
    return max(1, min(torch.get_num_threads(), num_samples, num_shares))


def _floats(*shape: int) -> Tensor:
    """Memory for the loops, float32 whatever torch's default dtype is."""
    if math.prod(shape) >= LARGE:
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(*shape, dtype=torch.float32, device="cpu")

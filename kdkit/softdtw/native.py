"""Soft-DTW by loops that numba compiles for this CPU: backend "native", for float32 on the CPU.

Samples are shared out among as many threads as torch uses; the result does not depend on how many. Memory
beyond the result: one float32 for each admissible cell, kept for the backward pass, and for each thread two
for each admissible cell of the largest sample.
"""

import itertools
from functools import cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kdkit import compiled
from kdkit.softdtw import anti_diagonal
from kdkit.softdtw.packed import PackedAlignment

CHUNK_CELLS = 16_384
"""What a thread takes at a time has at least about as many admissible cells: 0.1 ms of work."""

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
    kernels = _kernels()
    # Copies: the backward pass reads them again, and the caller may have changed his by then.
    sizes = lengths_n.numpy().copy(), lengths_m.numpy().copy(), band or 0
    starts = np.empty(len(cost) + 1, np.int64)
    kernels.count_cells(*sizes, starts)
    cells = torch.empty(int(starts[-1]) if with_alignment else 0)
    values, misfits = _solve(cost.contiguous().numpy(), sizes, starts, gamma, cells.numpy())
    for sample in misfits.nonzero()[0]:
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
    if not compiled.is_installed():
        raise ValueError('backend "native" needs numba, which is missing: pip install "kdkit[fast]", or name another.')
    from kdkit.softdtw import _kernels

    return _kernels


def _solve(
    cost: np.ndarray, sizes: Sizes, starts: np.ndarray, gamma: float, cells: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values (B,) float64, and which samples did not fit the number format; writes the packed cells, if any."""
    kernels = _kernels()
    chunks = _chunks(starts)
    num_threads = min(torch.get_num_threads(), len(chunks))
    slots = kernels.num_slots(*sizes[:2], np.diff(starts), len(cells) > 0)
    shares = torch.empty(num_threads, 2 * slots).numpy()
    values, misfits = np.empty(len(cost)), np.empty(len(cost), dtype=bool)

    def solve(begin: int, end: int, thread: int) -> None:
        kernels.solve(cost, *sizes, gamma, starts, begin, end, shares[thread], values, misfits, cells)

    compiled.share_out(solve, chunks, num_threads)
    return values, misfits


def _spread(cells: Tensor, factors: Tensor, *, sizes: Sizes, starts: np.ndarray, shape: torch.Size) -> Tensor:
    """The packed cells times the factors, (B, N, M)."""
    kernels = _kernels()
    out = torch.empty(shape)
    packed, laid_out, factor = cells.numpy(), out.numpy(), factors.to(torch.float32).contiguous().numpy()

    def spread(begin: int, end: int, _thread: int) -> None:
        kernels.spread(packed, *sizes, factor, starts, begin, end, laid_out)

    chunks = _chunks(starts)
    compiled.share_out(spread, chunks, min(torch.get_num_threads(), len(chunks)))
    return out


def _chunks(starts: np.ndarray) -> list[tuple[int, int]]:
    """The batch cut into ranges of samples, some for each thread, each worth a call; `starts` counts cells."""
    num_cells = max(CHUNK_CELLS, int(starts[-1]) // (4 * torch.get_num_threads()))
    cuts = np.searchsorted(starts[:-1], np.arange(num_cells, starts[-1], num_cells)).tolist()
    return list(itertools.pairwise(sorted({0, *cuts, len(starts) - 1})))

"""Soft-DTW in plain torch: one Python step per anti-diagonal, all samples of the batch at once.

With r = -R / gamma the recursion is r = log(e^r_up + e^r_left + e^r_diag) - C / gamma. The forward
pass also keeps the soft-min weights of every cell,

    p_up = e^(r_up - log sum),  p_left likewise,  p_diag = 1 - p_up - p_left,

and the expected alignment is then pushed from the last cell to the first by three multiply-adds per
cell. The weights of a cell sum to 1, so mass is conserved and E stays in [0, 1]; rebuilding them
from float32 R instead would lose up to 4e-2 at gamma 1e-3.

Layout: the cells of an anti-diagonal lie side by side, (cells, B), one anti-diagonal after the
other. Where neighbours are read, each anti-diagonal has one border slot on either side
("bordered"), so that a missing neighbour is a slot that holds log 0. Only cells that some sample of
the batch may use have a slot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkit.softdtw.band import band_limits


@dataclass(frozen=True, eq=False)
class Wavefront:
    """Where the cells of each anti-diagonal and their three predecessors lie; C cells in all."""

    widths: list[int]
    """Cells of each anti-diagonal."""
    own: list[int]
    """First bordered slot of each anti-diagonal's cells."""
    up: list[int]
    """First bordered slot of the predecessors (i - 1, j)."""
    left: list[int]
    """First bordered slot of the predecessors (i, j - 1)."""
    diagonal: list[int]
    """First bordered slot of the predecessors (i - 1, j - 1)."""
    num_slots: int
    """Length of a bordered buffer."""
    cells: Tensor
    """(C,) index of each cell in the flattened (N, M) grid."""
    slots: Tensor
    """(C,) bordered slot of each cell."""
    up_slots: Tensor
    """(C,) bordered slot of each cell's predecessor (i - 1, j); (i, j - 1) is the next slot."""
    last_slots: Tensor
    """(B,) bordered slot of each sample's last cell; slot 0, always log 0, for an empty sample."""
    outside: Tensor | None
    """(C, B) bool, True where a cell is not this sample's; None where every sample has them all."""


def align(
    cost: Tensor,
    lengths_n: Tensor,
    lengths_m: Tensor,
    *,
    gamma: float,
    band: int | None,
    with_alignment: bool,
) -> tuple[Tensor, Tensor | None]:
    """Values and expected alignments of a ragged batch, on the CPU or CUDA.

    Sums run in float64 whatever the cost's dtype: at gamma 1e-3 a float32 r of -1e5 could not tell
    its neighbours apart. MPS has no float64. The weights, the bulk of the memory, have the cost's dtype.

    Args and Returns: as `kdkit.softdtw.api.Backend`.
    Source: Cuturi & Blondel 2017, arXiv:1703.01541, algorithms 1 and 2. Differs: the backward
    pass uses stored weights.
    """
    batch, rows, columns = cost.shape
    empty = torch.minimum(lengths_n, lengths_m) == 0
    if bool(empty.all()):
        return cost.new_zeros(batch), torch.zeros_like(cost) if with_alignment else None
    front = _plan(lengths_n.where(~empty, 0), lengths_m.where(~empty, 0), cost=cost, band=band)
    ends, weights = _forward(_pack(cost, front, gamma=gamma), front, cost.dtype if with_alignment else None)
    values = (-gamma * ends).masked_fill(empty.to(cost.device), 0.0).to(cost.dtype)
    if weights is None:
        return values, None
    # One unit of mass enters at the end; none where no path is allowed; NaN where the value is.
    seeds = (ends > -math.inf).to(cost.dtype).masked_fill(ends.isnan(), math.nan)
    flat = cost.new_zeros(rows * columns, batch)
    flat.index_copy_(0, front.cells, _backward(seeds, weights, front))
    return values, flat.t().reshape(cost.shape)


def _plan(lengths_n: Tensor, lengths_m: Tensor, *, cost: Tensor, band: int | None) -> Wavefront:
    """The wavefront over the cells that any sample may use; lengths on the host, 0 = empty."""
    ends = lengths_n + lengths_m - 2
    num_diagonals = int(ends.max()) + 1
    first, last = band_limits(lengths_n, lengths_m, band=band, num_diagonals=num_diagonals)  # (A, B)
    has_cells = first <= last
    low = first.where(has_cells, cost.shape[1]).amin(1)  # (A,)
    high = last.where(has_cells, -1).amax(1)
    widths = high - low + 1
    # Two anti-diagonals before the first hold the virtual origin (-1, -1), whose r is 0.
    low_all = torch.cat((torch.tensor([-1, 0]), low))
    slots_all = torch.cat((torch.tensor([1, 0]), widths)) + 2
    start_all = slots_all.cumsum(0) - slots_all
    own = start_all[2:] + 1
    up = start_all[1:-1] + low - low_all[1:-1]

    diagonal_index = torch.arange(len(widths)).repeat_interleave(widths)  # (C,)
    rank = torch.arange(len(diagonal_index)) - (widths.cumsum(0) - widths)[diagonal_index]
    rows = low[diagonal_index] + rank
    outside = None
    if bool((first != low[:, None]).any() or (last != high[:, None]).any()):
        outside = (rows[:, None] < first[diagonal_index]) | (rows[:, None] > last[diagonal_index])
    end = ends.clamp(min=0)
    last_slots = torch.where(ends >= 0, own[end] + lengths_n - 1 - low[end], 0)
    return Wavefront(
        widths=widths.tolist(),
        own=own.tolist(),
        up=up.tolist(),
        left=(up + 1).tolist(),
        diagonal=(start_all[:-2] + low - low_all[:-2]).tolist(),
        num_slots=int(slots_all.sum()),
        cells=(rows * (cost.shape[2] - 1) + diagonal_index).to(cost.device),
        slots=(own[diagonal_index] + rank).to(cost.device),
        up_slots=(up[diagonal_index] + rank).to(cost.device),
        last_slots=last_slots.to(cost.device),
        outside=None if outside is None else outside.to(cost.device),
    )


def _pack(cost: Tensor, front: Wavefront, *, gamma: float) -> Tensor:
    """(C, B) float64: cost / gamma, anti-diagonal after anti-diagonal, inf outside a sample."""
    picked = cost.reshape(cost.shape[0], -1).index_select(1, front.cells)  # (B, C)
    scaled = picked.t().to(torch.float64, memory_format=torch.contiguous_format).div_(gamma)
    return scaled if front.outside is None else scaled.masked_fill_(front.outside, math.inf)


def _windows(buffer: Tensor, starts: Sequence[int], widths: Sequence[int]) -> Sequence[Tensor]:
    """Views buffer[start : start + width]; starts ascend and no two windows overlap."""
    sizes = []
    position = 0
    for start, width in zip(starts, widths, strict=True):
        sizes += [start - position, width]
        position = start + width
    # One split is half the price of slicing window by window.
    return buffer.split_with_sizes([*sizes, buffer.shape[0] - position])[1::2]


def _forward(
    scaled: Tensor, front: Wavefront, weight_dtype: torch.dtype | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """r of the last cells, (B,) float64, and p_up, p_left of all, (C, B), if a dtype is given."""
    log_sums = scaled.new_full((front.num_slots, scaled.shape[1]), -math.inf)
    log_sums[1] = 0.0  # the virtual origin
    starts = (front.own, front.up, front.left, front.diagonal)
    windows = (_windows(log_sums, start, front.widths) for start in starts)
    costs = scaled.split_with_sizes(front.widths)
    for own, up, left, diagonal, cost in zip(*windows, costs, strict=True):
        torch.logaddexp(up, left, out=own)
        torch.logaddexp(own, diagonal, out=own).sub_(cost)
    ends = log_sums[front.last_slots, torch.arange(scaled.shape[1], device=scaled.device)]
    if weight_dtype is None:
        return ends, None
    totals = scaled.add_(log_sums.index_select(0, front.slots))  # log sum of the predecessors

    def weight(slots: Tensor) -> Tensor:
        log_weight = log_sums.index_select(0, slots).sub_(totals).to(weight_dtype)
        return log_weight.exp_().nan_to_num_(nan=0.0)  # NaN: a cell that nothing can reach

    return ends, (weight(front.up_slots), weight(front.up_slots + 1))


def _backward(seeds: Tensor, weights: tuple[Tensor, Tensor], front: Wavefront) -> Tensor:
    """E of every cell, (C, B): the seed mass (B,) of the last cells handed to predecessors."""
    p_up, p_left = weights
    p_diagonal = torch.sub(1.0, p_up).sub_(p_left).clamp_(min=0.0)
    mass = p_up.new_zeros(front.num_slots, p_up.shape[1])
    mass[front.last_slots, torch.arange(len(seeds), device=seeds.device)] = seeds
    starts = (front.own, front.up, front.left, front.diagonal)
    owns, ups, lefts, diagonals = (_windows(mass, start, front.widths) for start in starts)
    shares = (weight.split_with_sizes(front.widths) for weight in (p_up, p_left, p_diagonal))
    steps = list(zip(owns, ups, lefts, diagonals, *shares, strict=True))
    for own, up, left, diagonal, to_up, to_left, to_diagonal in reversed(steps):
        up.addcmul_(own, to_up)
        left.addcmul_(own, to_left)
        diagonal.addcmul_(own, to_diagonal)
    expected = mass.index_select(0, front.slots)
    return expected if front.outside is None else expected.masked_fill_(front.outside, 0.0)

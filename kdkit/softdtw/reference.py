"""Soft-DTW as its definition reads: Python loops over cells, in float64. For tests, never for work.

With costs C of n rows and m columns:

    R[i, j] = C[i, j] + softmin(R[i-1, j-1], R[i-1, j], R[i, j-1]),  R[0, 0] = C[0, 0]
    softmin(a) = -gamma log sum exp(-a / gamma);   the value is R[n-1, m-1]
    E[i, j] = d value / d C[i, j] = sum over successors s of E[s] exp((R[s] - C[s] - R[i, j]) / gamma)
"""

import math

import torch
from torch import Tensor

STEPS = ((1, 1), (1, 0), (0, 1))
Grid = dict[tuple[int, int], float]


def align(
    cost: Tensor,
    lengths_n: Tensor,
    lengths_m: Tensor,
    *,
    gamma: float,
    band: int | None,
    with_alignment: bool,
) -> tuple[Tensor, Tensor | None]:
    """Values and expected alignments, one sample and one cell at a time.

    Args and Returns: as `kdkit.softdtw.api.Backend`.
    Source: Cuturi & Blondel 2017, arXiv:1703.01541, algorithms 1 and 2. Differs: none.
    """
    values = torch.zeros(cost.shape[0], dtype=torch.float64)
    alignment = torch.zeros(cost.shape, dtype=torch.float64)
    for sample, (n, m) in enumerate(zip(lengths_n.tolist(), lengths_m.tolist(), strict=True)):
        if n == 0 or m == 0:
            continue
        grid = _admissible_costs(cost[sample, :n, :m].tolist(), band)
        totals = _accumulate(grid, gamma)
        values[sample] = totals[n - 1, m - 1]
        if with_alignment:
            for cell, mass in _expected(grid, totals, gamma).items():
                alignment[(sample, *cell)] = mass
    return values.to(cost), alignment.to(cost) if with_alignment else None


def _admissible_costs(cost: list[list[float]], band: int | None) -> Grid:
    """The cells inside the band, with their costs, in row order."""
    n, m = len(cost), len(cost[0])
    return {
        (i, j): cost[i][j]
        for i in range(n)
        for j in range(m)
        if band is None or abs(i * (m - 1) - j * (n - 1)) <= band * (max(n, m) - 1)
    }


def _accumulate(grid: Grid, gamma: float) -> Grid:
    """R for every cell of the grid."""
    totals: Grid = {}
    for (i, j), cost in grid.items():
        if i == j == 0:
            totals[i, j] = cost
        else:
            before = [totals[i - di, j - dj] for di, dj in STEPS if (i - di, j - dj) in totals]
            totals[i, j] = cost + _soft_min(before, gamma)
    return totals


def _soft_min(values: list[float], gamma: float) -> float:
    """-gamma log sum exp(-values / gamma); inf of nothing, NaN where a value is NaN."""
    if any(math.isnan(value) for value in values):
        return math.nan
    lowest = min(values, default=math.inf)
    if lowest == math.inf:
        return math.inf
    return lowest - gamma * math.log(sum(math.exp((lowest - value) / gamma) for value in values))


def _expected(grid: Grid, totals: Grid, gamma: float) -> Grid:
    """E for every cell of the grid; all 0 where no path is allowed, all NaN where the value is."""
    end = max(grid)
    mass: Grid = {}
    for i, j in reversed(grid):
        after = [(i + di, j + dj) for di, dj in STEPS if mass.get((i + di, j + dj), 0.0) != 0.0]
        mass[i, j] = sum(mass[s] * math.exp((totals[s] - grid[s] - totals[i, j]) / gamma) for s in after)
        if (i, j) == end:
            mass[i, j] = math.nan if math.isnan(totals[end]) else float(totals[end] < math.inf)
    if math.isnan(totals[end]):
        return dict.fromkeys(grid, math.nan)
    return mass

"""What callers use: checks, dtypes, gradient and dispatch, the same for every backend."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kdkit.softdtw import anti_diagonal, reference
from kdkit.softdtw.cost import pairwise_cost

Lengths = Tensor | None


class Backend(Protocol):
    """One implementation of the recursion. It sees checked input and no autograd."""

    def __call__(
        self,
        cost: Tensor,
        lengths_n: Tensor,
        lengths_m: Tensor,
        *,
        gamma: float,
        band: int | None,
        with_alignment: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Soft-DTW values and, if asked for, their gradient with respect to the cost.

        Args:
            cost: (B, N, M) float32 or float64, any device; never written to, and never read
                beyond a sample's lengths or outside its band.
            lengths_n: (B,) int64 on the CPU, 0..N.
            lengths_m: (B,) int64 on the CPU, 0..M.
            gamma: > 0.
            band: >= 1, or None.
            with_alignment: whether to compute the second result.
        Returns:
            values (B,) in the cost's dtype: 0 for an empty sample, inf for one with no allowed
            path, NaN for one with a NaN cost; and E (B, N, M) or None: 0 for the first two,
            0 outside lengths and band, NaN inside where the value is.
        """


def soft_dtw(
    cost: Tensor,
    lengths_n: Lengths = None,
    lengths_m: Lengths = None,
    *,
    gamma: float,
    band: int | None = None,
    backend: str | Backend | None = None,
) -> Tensor:
    """Soft minimum, over all monotone alignments, of the summed cost; in units of the cost.

    value = -gamma log sum over paths exp(-(cost of the path) / gamma). It lies in
    [hard DTW - gamma log #paths, hard DTW] and so may be negative; as a loss for two sequences
    that can become equal, prefer `soft_dtw_divergence`, which is least where they are.

    Args:
        cost: (B, N, M) float; gradient flows, and is exactly 0 outside lengths and band. Cells
            beyond the lengths are never read. +inf forbids a cell. Never written to.
        lengths_n: (B,) integer, rows of each sample, 0..N; None = all N.
        lengths_m: (B,) integer, columns of each sample, 0..M; None = all M.
        gamma: smoothing, in units of the cost, > 0; -> 0 is hard DTW.
        band: half-width >= 1 of the slope-corrected band of `kdkit.softdtw.band`, in rows or
            columns; None = every cell.
        backend: a name of `BACKENDS` or a callable like one; None = the fastest that works here.
    Returns:
        (B,) float32 (float64 for a float64 cost), not normalised by length. 0 with gradient 0
        for a sample with an empty side; inf with gradient 0 where +inf costs leave no path; NaN
        with gradient NaN where a cost is NaN. Differentiable once.
    Raises:
        ValueError: gamma <= 0, band < 1, lengths that do not fit, an unknown backend.
    Source: Cuturi & Blondel 2017, arXiv:1703.01541, equation 1. Differs: none.
    """
    options = _Options(gamma, band=band, backend=backend)
    return _value_and_alignment(cost, (lengths_n, lengths_m), options, with_alignment=False)[0]


def expected_alignment(
    cost: Tensor,
    lengths_n: Lengths = None,
    lengths_m: Lengths = None,
    *,
    gamma: float,
    band: int | None = None,
    backend: str | Backend | None = None,
) -> Tensor:
    """How often each cell is visited by a path drawn with probability ~ exp(-cost / gamma).

    It is the gradient of `soft_dtw` with respect to the cost.

    Args:
        cost, lengths_n, lengths_m, gamma, band, backend: as for `soft_dtw`.
    Returns:
        (B, N, M) in the value's dtype, detached, in [0, 1]: both corners 1, every row and column
        of a sample sums to >= 1, the total lies in [max(n, m), n + m - 1]. All 0 for a sample
        with an empty side or no allowed path.
    Raises:
        ValueError: as `soft_dtw`.
    Source: Cuturi & Blondel 2017, arXiv:1703.01541, section 2. Differs: none.
    """
    options = _Options(gamma, band=band, backend=backend)
    lengths = (lengths_n, lengths_m)
    return _value_and_alignment(cost.detach(), lengths, options, with_alignment=True)[1]


def soft_dtw_and_alignment(
    cost: Tensor,
    lengths_n: Lengths = None,
    lengths_m: Lengths = None,
    *,
    gamma: float,
    band: int | None = None,
    backend: str | Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`soft_dtw` and `expected_alignment` for the price of one.

    Args:
        cost, lengths_n, lengths_m, gamma, band, backend: as for `soft_dtw`.
    Returns:
        The (B,) value of `soft_dtw`, with gradient, and the (B, N, M) of `expected_alignment`.
    Raises:
        ValueError: as `soft_dtw`.
    """
    options = _Options(gamma, band=band, backend=backend)
    return _value_and_alignment(cost, (lengths_n, lengths_m), options, with_alignment=True)

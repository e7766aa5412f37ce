"""The soft-DTW divergence: soft-DTW without its bias, least where the two sequences are equal."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkit.softdtw.api import Backend, checked_lengths, soft_dtw
from kdkit.softdtw.cost import divergence_costs


def soft_dtw_divergence(
    x: Tensor,
    y: Tensor,
    lengths_n: Tensor | None = None,
    lengths_m: Tensor | None = None,
    *,
    gamma: float,
    band: int | None = None,
    metric: str = "cosine",
    backend: str | Backend | None = None,
) -> Tensor:
    """soft_dtw(x, y) - (soft_dtw(x, x) + soft_dtw(y, y)) / 2; in units of the cost.

    Plain soft-DTW is biased: at x = y its gradient is not zero and pulls x towards a smoothed
    copy of y. The divergence has value and gradient 0 there.

    Args:
        x: (B, N, D) float; gradient flows, and is exactly 0 beyond the lengths. What stands
            beyond the lengths is never read.
        y: (B, M, D) float; likewise. No gradient is formed for the y-y term if y needs none.
        lengths_n: (B,) integer, 0..N; None = all N.
        lengths_m: (B,) integer, 0..M; None = all M.
        gamma, band, backend: as for `soft_dtw`; all three terms use the same.
        metric: a name of `kdkit.softdtw.cost.METRICS`.
    Returns:
        (B,) float32 (float64 if x or y is), not normalised by length; 0 within rounding at x = y;
        >= 0 for costs that satisfy the source's condition, and on all tried pairs for "cosine".
        0 with gradient 0 for a sample with an empty side.
    Raises:
        ValueError: as `soft_dtw` and `pairwise_cost`.
    Source: Blondel, Mensch & Vert 2021, arXiv:2010.08354, equation 7. Differs: none.
    """
    lengths_n = checked_lengths(lengths_n, "lengths_n", (x.shape[0], x.shape[1]))
    lengths_m = checked_lengths(lengths_m, "lengths_m", (y.shape[0], y.shape[1]))
    x, y = zero_padding(x, lengths_n), zero_padding(y, lengths_m)
    cost, rows, columns = stack_problems(divergence_costs(x, y, metric), lengths_n, lengths_m)
    values = soft_dtw(cost, rows, columns, gamma=gamma, band=band, backend=backend)
    return combine_terms(values)


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """x with 0 in place of whatever stands beyond the lengths, and no gradient there.

    A NaN in the padding would otherwise reach the valid positions' gradient as 0 * NaN.

    Args:
        x: (B, N, D) float.
        lengths: (B,) integer, any device.
    Returns:
        (B, N, D), a new tensor.
    """
    position = torch.arange(x.shape[1], device=x.device)
    is_padding = position[None, :] >= lengths.to(x.device)[:, None]  # (B, N)
    return x.masked_fill(is_padding[:, :, None], 0.0)


def stack_problems(costs: Sequence[Tensor], lengths_n: Tensor, lengths_m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three problems of a divergence as one ragged batch, for one pass over the grid.

    Args:
        costs: x-y (B, N, M), x-x (B, N, N) and y-y (B, M, M).
        lengths_n: (B,) integer lengths of x.
        lengths_m: (B,) integer lengths of y.
    Returns:
        (3B, L, L) with L = max(N, M), and its row and column lengths (3B,); all three lengths are
        0 for a sample with an empty side.
    """
    side = max(costs[0].shape[1:])
    padded = [c if c.shape[1:] == (side, side) else _padded(c, side) for c in costs]
    is_empty = torch.minimum(lengths_n, lengths_m) == 0
    n, m = lengths_n.masked_fill(is_empty, 0), lengths_m.masked_fill(is_empty, 0)
    return torch.cat(padded), torch.cat((n, n, m)), torch.cat((m, n, m))


def _padded(cost: Tensor, side: int) -> Tensor:
    """(B, side, side), 0 where there was nothing."""
    return F.pad(cost, (0, side - cost.shape[2], 0, side - cost.shape[1]))


def combine_terms(values: Tensor) -> Tensor:
    """x-y minus the mean of x-x and y-y, (B,), from the (3B,) values of `stack_problems`."""
    cross, self_x, self_y = values.chunk(3)
    return cross - 0.5 * (self_x + self_y)

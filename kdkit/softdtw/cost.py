"""Local costs between two sequences of vectors, for every pair of positions."""

from collections.abc import Callable

import torch
from torch import Tensor

ZERO_NORM = 1e-8
"""Vectors shorter than this have no direction: their cosine with anything is taken as 0."""


def pairwise_cost(x: Tensor, y: Tensor, metric: str = "cosine") -> Tensor:
    """Cost of matching every position of x with every position of y.

    "cosine": 1 - cos(x_i, y_j), in [0, 2]; ignores the vectors' lengths, and is 1 with gradient 0
    where one of them is the zero vector. "sqeuclidean": ||x_i - y_j||^2, divided by nothing.

    Args:
        x: (B, N, D) float; gradient flows.
        y: (B, M, D) float; gradient flows.
        metric: a name of `METRICS`.
    Returns:
        (B, N, M) float32 (float64 if x or y is), >= 0, also under autocast.
    Raises:
        ValueError: unknown metric, or shapes that do not fit.
    Source: none; "cosine" is the cost of WARD and DWA-KD (arXiv:2602.21669).
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; allowed: {', '.join(METRICS)}.")
    if x.dim() != 3 or y.dim() != 3 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(
            f"x is {tuple(x.shape)} and y is {tuple(y.shape)}; they must be (B, N, D) and "
            "(B, M, D) with the same B and D. Project one side into the other's space first."
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(device_type=x.device.type, enabled=False):
        # Rounding can bring the cost of equal vectors just below 0.
        return METRICS[metric](x.to(dtype), y.to(dtype)).clamp(min=0.0)


def _cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos, (B, N, M)."""
    return 1.0 - directions(x) @ directions(y).mT


def directions(x: Tensor) -> Tensor:
    """x / ||x|| along the last dimension; 0, and gradient 0, for a zero vector."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_zero = norms <= ZERO_NORM
    return (x / norms.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||^2, (B, N, M), without the (B, N, M, D) differences."""
    return x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :] - 2.0 * (x @ y.mT)  # (B, N, M)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine_cost,
    "sqeuclidean": _squared_distance,
}
"""Every metric of `pairwise_cost` by name."""

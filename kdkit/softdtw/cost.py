"""Local costs between two sequences of vectors, for every pair of positions."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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
    (cost,) = _costs(x, y, metric, with_own=False)
    return cost


def divergence_costs(x: Tensor, y: Tensor, metric: str = "cosine") -> tuple[Tensor, Tensor, Tensor]:
    """The costs of a divergence's three problems; what they need of a vector is computed once.

    Args:
        x: (B, N, D) float; gradient flows.
        y: (B, M, D) float; gradient flows.
        metric: a name of `METRICS`.
    Returns:
        x-y (B, N, M), x-x (B, N, N) and y-y (B, M, M), each as `pairwise_cost` gives it.
    Raises:
        ValueError: as `pairwise_cost`.
    """
    cross, own_x, own_y = _costs(x, y, metric, with_own=True)
    return cross, own_x, own_y


def _costs(x: Tensor, y: Tensor, metric: str, *, with_own: bool) -> list[Tensor]:
    """Of x and y, and of each with itself if that is wanted."""
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; allowed: {', '.join(METRICS)}.")
    if x.dim() != 3 or y.dim() != 3 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(
            f"x is {tuple(x.shape)} and y is {tuple(y.shape)}; they must be (B, N, D) and "
            "(B, M, D) with the same B and D. Project one side into the other's space first."
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(device_type=x.device.type, enabled=False):
        prepare, cost = METRICS[metric]
        a, b = prepare(x.to(dtype)), prepare(y.to(dtype))
        pairs = ((a, b), (a, a), (b, b)) if with_own else ((a, b),)
        # Rounding can bring the cost of equal vectors just below 0.
        return [cost(*pair).clamp(min=0.0) for pair in pairs]


def directions(x: Tensor) -> Tensor:
    """x / ||x|| along the last dimension; 0, and gradient 0, for a zero vector."""
    return _Directions.apply(x)


class _Directions(Function):
    """In two passes over the vectors and three back, for which autograd takes ten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        norms = norms.masked_fill_(norms <= ZERO_NORM, math.inf)
        units = x / norms
        ctx.save_for_backward(units, norms)
        return units

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        units, norms = ctx.saved_tensors
        along = torch.linalg.vecdot(units, grad).unsqueeze(-1)
        return torch.addcmul(grad, units, along, value=-1).div_(norms)


def _angle(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos between vectors of length 1, (B, N, M)."""
    return 1.0 - x @ y.mT


def _unchanged(x: Tensor) -> Tensor:
    return x


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||^2, (B, N, M), without the (B, N, M, D) differences."""
    return x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :] - 2.0 * (x @ y.mT)  # (B, N, M)


METRICS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "cosine": (directions, _angle),
    "sqeuclidean": (_unchanged, _squared_distance),
}
"""Every metric of `pairwise_cost` by name: what it takes of vectors (B, N, D), and the costs between what was taken."""

"""Local costs between two sequences of vectors, for every pair of positions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

P = TypeVar("P")

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
    """The costs of a divergence's three problems; the metric prepares each side once.

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
        return [cost.clamp(min=0.0) for cost in METRICS[metric].costs(x.to(dtype), y.to(dtype), with_own=with_own)]


def directions(x: Tensor) -> Tensor:
    """x / ||x|| along the last dimension; 0 for a zero vector, and gradient 0 where the gradient above is finite."""
    return _Directions.apply(x)


class _Directions(Function):
    """In two passes over the vectors and four back, half of those that autograd would take."""

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
        along = (units * grad).sum(-1, keepdim=True)  # no dot product: autocast would take it in half precision
        return torch.addcmul(grad, units, along, value=-1).div_(norms)


def _cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos from directions, (B, N, M)."""
    return 1.0 - x @ y.mT


def _with_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (B, N, D) and their squared lengths (B, N)."""
    return x, x.square().sum(-1)


def _squared_distance(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
    """||x - y||^2, (B, N, M), without the (B, N, M, D) differences."""
    return x[1][:, :, None] + y[1][:, None, :] - 2.0 * (x[0] @ y[0].mT)


@dataclass(frozen=True)
class Metric(Generic[P]):
    """A cost between vectors, in two steps."""

    prepared: Callable[[Tensor], P]
    """What it needs of vectors (B, N, D)."""
    cost: Callable[[P, P], Tensor]
    """(B, N, M) between what it needs of two of them."""

    def costs(self, x: Tensor, y: Tensor, *, with_own: bool) -> list[Tensor]:
        """Of x and y, and of each with itself if that is wanted; rounding can bring them just below 0."""
        a, b = self.prepared(x), self.prepared(y)
        pairs = ((a, b), (a, a), (b, b)) if with_own else ((a, b),)
        return [self.cost(*pair) for pair in pairs]


METRICS: dict[str, Metric[Tensor] | Metric[tuple[Tensor, Tensor]]] = {
    "cosine": Metric(directions, _cosine_cost),
    "sqeuclidean": Metric(_with_squares, _squared_distance),
}
"""Every metric of `pairwise_cost` by name."""

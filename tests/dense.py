"""The dense path as the papers write it, on whole (N, V) probabilities, and a small student and teacher for it.

Also what tests of the losses look with: at every device, and at every operation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkit.teacher.signal import Head, LiveSignal

N, V, H, TEACHER_H = 21, 53, 11, 7

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    "tvd": lambda p, q: 0.5 * (p - q).abs().sum(-1),
    "skew_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    "alpha_beta": lambda p, q: -(p**0.2 * q**0.7 - 2 / 9 * p**0.9 - 7 / 9 * q**0.9).sum(-1) / 0.14,
}
"""On probabilities, as the papers write them."""


@dataclass
class Scene:
    """A student and a teacher at N positions."""

    hidden: Tensor
    head: Head
    signal: LiveSignal
    targets: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None]

    def gradients(self, total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, self.inputs))

    def student_logits(self) -> Tensor:
        """(N, V), the dense path."""
        logits = self.hidden @ self.head.weight.T
        if self.head.bias is not None:
            logits = logits + self.head.bias
        logits = logits * self.head.scale
        if self.head.softcap is not None:
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        return logits[:, : self.head.num_ids]

    def teacher_logits(self) -> Tensor:
        return (self.signal.hidden @ self.signal.head.weight.T)[:, : self.signal.head.num_ids]

    def dense(self, name: str, *, temperature: float = 1.0) -> Tensor:
        """(N,) a divergence on the dense path."""
        p = (self.teacher_logits() / temperature).softmax(-1)
        return DENSE[name](p, (self.student_logits() / temperature).softmax(-1))


def make_scene(
    dtype: torch.dtype = torch.float64, num_positions: int = N, *, seed: int = 0, num_ids: int = V, **head: Any
) -> Scene:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Scene(
        draw(num_positions, H).requires_grad_(),
        Head(nn.Parameter(draw(num_ids, H) / 2), nn.Parameter(draw(num_ids)), **head),
        LiveSignal(draw(num_positions, TEACHER_H), Head(draw(num_ids, TEACHER_H) / 2)),
        torch.randint(num_ids, (num_positions,), generator=generator),
    )


def assert_same_gradients(found: list[Tensor], expected: list[Tensor], *, rtol: float) -> None:
    """Equal up to `rtol` of the expected gradient's norm."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() <= rtol * theirs.double().norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes, and how often each one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_entries = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_entries = max(self.num_entries, *sizes, 0)
        self.calls[str(func.overloadpacket).removeprefix("aten.")] = (
            self.calls.get(str(func.overloadpacket).removeprefix("aten."), 0) + 1
        )
        return result

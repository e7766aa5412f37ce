"""Soft-DTW forward and backward from a given cost: `pytest tests/benchmarks --benchmark-only`.

The baseline is the recursion left to autograd, anti-diagonal by anti-diagonal on whole rows: what one would
write without a gradient of one's own.
"""

import math
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from kdkit import compiled
from kdkit.softdtw import BACKENDS, soft_dtw

BATCH, SIDE, GAMMA = 8, 128, 0.1


def autograd_soft_dtw(cost: Tensor) -> Tensor:
    """The same value for full lengths and no band, differentiated by autograd."""
    batch, n, m = cost.shape
    rows = torch.arange(n)
    outside = torch.full((batch, 1), math.inf)
    before, last = torch.full((batch, n), math.inf), cost.new_full((batch, n), math.inf)
    for a in range(n + m - 1):
        columns = a - rows
        inside = (columns >= 0) & (columns < m)
        here = cost[:, rows, columns.clamp(0, m - 1)].masked_fill(~inside, math.inf)
        if a == 0:
            total = here
        else:
            shifted = [torch.cat((outside, side[:, :-1]), 1) for side in (last, before)]
            steps = torch.stack((shifted[0], last, shifted[1])).masked_fill(~inside, 1e8)
            total = here - GAMMA * torch.logsumexp(-steps.clamp(max=1e8) / GAMMA, 0)
        before, last = last, total
    return last[:, -1]


@pytest.fixture
def cost() -> Tensor:
    return (2 * torch.rand(BATCH, SIDE, SIDE, generator=torch.Generator().manual_seed(0))).requires_grad_()


def synchronised(function: Callable[[], object]) -> None:
    function()
    torch.cuda.synchronize()


@pytest.mark.benchmark(group="softdtw-8x128x128")
class TestSoftDtw:
    @pytest.mark.parametrize("band", [None, 32])
    @pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "cuda")])
    def test_forward_and_backward(
        self, benchmark: BenchmarkFixture, cost: Tensor, backend: str, band: int | None
    ) -> None:
        if backend == "native" and not compiled.is_installed():
            pytest.skip("needs numba")
        (grad,) = benchmark(
            lambda: torch.autograd.grad(soft_dtw(cost, gamma=GAMMA, band=band, backend=backend).sum(), cost)
        )
        assert grad[:, 0, 0].tolist() == pytest.approx([1.0] * BATCH, abs=1e-5)

    def test_baseline_of_plain_autograd(self, benchmark: BenchmarkFixture, cost: Tensor) -> None:
        value = benchmark(lambda: self.differentiated(cost))
        torch.testing.assert_close(value, soft_dtw(cost.detach(), gamma=GAMMA), rtol=1e-4, atol=1e-3)

    def differentiated(self, cost: Tensor) -> Tensor:
        value = autograd_soft_dtw(cost)
        torch.autograd.grad(value.sum(), cost)
        return value.detach()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("batch", "side"), [(8, 128), (8, 512), (32, 512), (32, 1024)])
class TestOnCuda:
    @pytest.mark.parametrize("band", [None, 32])
    @pytest.mark.parametrize("backend", ["torch", "cuda"])
    def test_forward_and_backward(
        self, benchmark: BenchmarkFixture, batch: int, side: int, backend: str, band: int | None
    ) -> None:
        cost = (2 * torch.rand(batch, side, side, device="cuda")).requires_grad_()

        def step() -> Tensor:
            return torch.autograd.grad(soft_dtw(cost, gamma=GAMMA, band=band, backend=backend).sum(), cost)[0]

        benchmark.group = f"softdtw-cuda-{batch}x{side}x{side}-band-{band}"
        benchmark(synchronised, step)

    def test_one_pass_over_the_cost(self, benchmark: BenchmarkFixture, batch: int, side: int) -> None:
        cost = torch.rand(batch, side, side, device="cuda")
        benchmark.group = f"softdtw-cuda-{batch}x{side}x{side}-copy"
        benchmark(synchronised, cost.clone)

"""Soft-DTW against its definition: sums over all paths, naive float64 loops, closed forms."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from dense import on_each_device
from scipy.spatial.distance import cdist
from torch import Tensor

from kdkit import compiled
from kdkit.softdtw import (
    BACKENDS,
    diagonal_path,
    expected_alignment,
    pairwise_cost,
    soft_dtw,
    soft_dtw_and_alignment,
    soft_dtw_divergence,
)
from kdkit.softdtw.band import band_limits
from kdkit.softdtw.cost import ZERO_NORM, directions, divergence_costs

NEEDS = {"native": pytest.mark.skipif(not compiled.is_installed(), reason="needs numba")}
# "cuda" leaves all but float32 on CUDA to "torch": test_softdtw_cuda.py has what is its own.
EVERY = [pytest.param(name, marks=NEEDS.get(name, ())) for name in BACKENDS if name != "cuda"]
backends = pytest.mark.parametrize("backend", EVERY)
WORKING = [param for param in EVERY if param.values != ("reference",)]
working_backends = pytest.mark.parametrize("backend", WORKING)
DELANNOY = [[1, 1, 1, 1], [1, 3, 5, 7], [1, 5, 13, 25], [1, 7, 25, 63]]  # paths of an n x m grid


def costs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random costs like a cosine's, in [0, 2]."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values)


def is_admissible(i: int, j: int, *, n: int, m: int, band: int | None) -> bool:
    return band is None or abs(i * (m - 1) - j * (n - 1)) <= band * (max(n, m) - 1)


def all_paths(n: int, m: int, cell: tuple[int, int] = (0, 0)) -> Iterator[list[tuple[int, int]]]:
    """Every monotone path from cell to (n - 1, m - 1)."""
    if cell == (n - 1, m - 1):
        yield [cell]
    for di, dj in ((1, 0), (0, 1), (1, 1)):
        if cell[0] + di < n and cell[1] + dj < m:
            for rest in all_paths(n, m, (cell[0] + di, cell[1] + dj)):
                yield [cell, *rest]


def by_paths(cost: list[list[float]], *, gamma: float, band: int | None = None) -> tuple[float, list[list[float]]]:
    """Value and expected alignment of one sample, path by path."""
    n, m = len(cost), len(cost[0])
    paths = [p for p in all_paths(n, m) if all(is_admissible(*c, n=n, m=m, band=band) for c in p)]
    totals = [sum(cost[i][j] for i, j in path) for path in paths]
    weights = [math.exp(-total / gamma) for total in totals]
    visits = [[0.0] * m for _ in range(n)]
    for path, weight in zip(paths, weights, strict=True):
        for i, j in path:
            visits[i][j] += weight / sum(weights)
    return -gamma * math.log(sum(weights)), visits


def hard_dtw(cost: list[list[float]], band: int | None = None) -> float:
    """Least cost of a path, by the textbook recursion."""
    n, m = len(cost), len(cost[0])
    best: dict[tuple[int, int], float] = {(-1, -1): 0.0}
    for i in range(n):
        for j in range(m):
            if is_admissible(i, j, n=n, m=m, band=band):
                before = [best.get(c, math.inf) for c in ((i - 1, j - 1), (i - 1, j), (i, j - 1))]
                best[i, j] = cost[i][j] + min(before)
    return best[n - 1, m - 1]


class TestSoftDtw:
    @backends
    @pytest.mark.parametrize("band", [None, 1, 2])
    @pytest.mark.parametrize("gamma", [0.1, 1.0])
    def test_equals_the_sum_over_all_paths(self, backend: str, band: int | None, gamma: float) -> None:
        for n in range(1, 5):
            for m in range(1, 5):
                cost = costs(1, n, m, seed=10 * n + m)
                value, alignment = soft_dtw_and_alignment(cost, gamma=gamma, band=band, backend=backend)
                expected_value, expected_visits = by_paths(cost[0].tolist(), gamma=gamma, band=band)
                torch.testing.assert_close(value.item(), expected_value, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(alignment[0].tolist(), expected_visits, rtol=1e-10, atol=1e-12)

    @backends
    def test_equal_costs_count_the_paths(self, backend: str) -> None:
        for n in range(1, 5):
            for m in range(1, 5):
                zeros = torch.zeros(1, n, m, dtype=torch.float64)
                value = soft_dtw(zeros, gamma=0.5, backend=backend).item()
                torch.testing.assert_close(value, -0.5 * math.log(DELANNOY[n - 1][m - 1]), rtol=1e-12, atol=1e-12)

    @backends
    @pytest.mark.parametrize("band", [None, 1, 3])
    def test_small_gamma_is_hard_dtw(self, backend: str, band: int | None) -> None:
        cost = costs(1, 9, 12)
        value = soft_dtw(cost, gamma=1e-5, band=band, backend=backend).item()
        assert value == pytest.approx(hard_dtw(cost[0].tolist(), band), abs=1e-8)

    @backends
    @pytest.mark.parametrize("gamma", [1e-3, 0.1, 1.0, 30.0])
    def test_lies_between_hard_dtw_less_the_paths_entropy_and_hard_dtw(self, backend: str, gamma: float) -> None:
        cost = costs(1, 4, 4, seed=3)
        hard = hard_dtw(cost[0].tolist())
        value = soft_dtw(cost, gamma=gamma, backend=backend).item()
        assert hard - gamma * math.log(63) - 1e-12 <= value <= hard + 1e-12

    @on_each_device
    @working_backends
    @pytest.mark.parametrize("band", [None, 1, 3, 1000])
    def test_float64_equals_the_naive_loop(self, backend: str, band: int | None, device: str) -> None:
        cost, n, m = costs(6, 14, 23), lengths(14, 3, 1, 9, 14, 0), lengths(23, 20, 5, 9, 2, 7)
        naive = soft_dtw_and_alignment(cost, n, m, gamma=0.07, band=band, backend="reference")
        there = (tensor.to(device) for tensor in (cost, n, m))
        found = soft_dtw_and_alignment(*there, gamma=0.07, band=band, backend=backend)
        for mine, theirs in zip(found, naive, strict=True):
            assert mine.device.type == device
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-10, atol=1e-10)

    @working_backends
    @pytest.mark.parametrize("band", [None, 8])
    @pytest.mark.parametrize("gamma", [1e-3, 1e-2, 0.1, 1.0])
    def test_float32_is_accurate_down_to_gamma_1e_3(self, backend: str, gamma: float, band: int | None) -> None:
        # R / gamma reaches 1e5 here: float32 sums would be off by 1e-2 and the alignment with them.
        cost = costs(2, 72, 90, dtype=torch.float32)
        options = {"gamma": gamma, "band": band}
        value, alignment = soft_dtw_and_alignment(cost, **options, backend=backend)
        exact_value, exact = soft_dtw_and_alignment(cost.double(), **options, backend="reference")
        assert value.dtype == alignment.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact_value, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(alignment.double(), exact, rtol=0, atol=1e-5)

    @working_backends
    def test_float32_tells_cells_apart_that_look_hopeless_on_the_way(self, backend: str) -> None:
        # The left column is free until the last row, where only the far corner is: every cell that
        # matters late has a huge R when its anti-diagonal is computed.
        cost = costs(1, 60, 60, dtype=torch.float32)
        cost[:, :, 0] = 0.0
        cost[:, -1, :30] = 50.0
        value, alignment = soft_dtw_and_alignment(cost, gamma=1e-3, backend=backend)
        exact_value, exact = soft_dtw_and_alignment(cost.double(), gamma=1e-3, backend="reference")
        torch.testing.assert_close(value.double(), exact_value, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(alignment.double(), exact, rtol=0, atol=1e-5)

    @backends
    @pytest.mark.parametrize("band", [None, 1])
    def test_gradcheck(self, backend: str, band: int | None) -> None:
        cost = costs(3, 4, 6).requires_grad_()
        n, m = lengths(4, 2, 0), lengths(6, 5, 3)
        assert torch.autograd.gradcheck(lambda c: soft_dtw(c, n, m, gamma=0.3, band=band, backend=backend), (cost,))

    @on_each_device
    @backends
    def test_gradient_is_the_expected_alignment_times_what_comes_from_above(self, backend: str, device: str) -> None:
        cost = costs(2, 5, 6).to(device).requires_grad_()
        weights = torch.tensor([2.0, -3.0], dtype=torch.float64, device=device)
        (soft_dtw(cost, gamma=0.2, backend=backend) * weights).sum().backward()
        alignment = expected_alignment(costs(2, 5, 6), gamma=0.2, backend="reference")
        torch.testing.assert_close(cost.grad.cpu(), alignment * weights.cpu()[:, None, None])

    @working_backends
    def test_refuses_a_second_derivative(self, backend: str) -> None:
        cost = costs(1, 3, 3).requires_grad_()
        value = soft_dtw(cost, gamma=0.2, backend=backend).square().sum()
        (grad,) = torch.autograd.grad(value, cost, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    @working_backends
    def test_backward_twice_gives_the_same_gradient(self, backend: str) -> None:
        # A published kernel scales its stored alignment in place and so squares the scale here.
        cost = costs(1, 4, 5).requires_grad_()
        value = 3.0 * soft_dtw(cost, gamma=0.2, backend=backend).sum()
        (first,) = torch.autograd.grad(value, cost, retain_graph=True)
        (second,) = torch.autograd.grad(value, cost)
        assert torch.equal(first, second)

    @working_backends
    @pytest.mark.parametrize("band", [None, 1, 3])
    def test_padding_and_batching_change_nothing(self, backend: str, band: int | None) -> None:
        sizes = [(7, 7), (2, 9), (9, 2), (1, 4), (5, 1), (1, 1), (8, 6)]
        batch = torch.full((len(sizes), 11, 10), math.nan, dtype=torch.float64)
        for k, (n, m) in enumerate(sizes):
            batch[k, :n, :m] = costs(n, m, seed=k)
        n, m = (torch.tensor(side) for side in zip(*sizes, strict=True))
        value, alignment = soft_dtw_and_alignment(batch, n, m, gamma=0.1, band=band, backend=backend)
        for k, (rows, columns) in enumerate(sizes):
            alone = soft_dtw_and_alignment(costs(1, rows, columns, seed=k), gamma=0.1, band=band, backend=backend)
            torch.testing.assert_close(value[k : k + 1], alone[0])
            torch.testing.assert_close(alignment[k, :rows, :columns], alone[1][0])
            assert (alignment[k, rows:] == 0).all()
            assert (alignment[k, :, columns:] == 0).all()

    @backends
    def test_never_reads_beyond_the_lengths(self, backend: str) -> None:
        cost = costs(2, 5, 5)
        cost[0, 3:] = math.nan
        cost[0, :, 4:] = math.nan
        cost[1, :, 2:] = -math.inf
        cost.requires_grad_()
        value = soft_dtw(cost, lengths(3, 5), lengths(4, 2), gamma=0.1, backend=backend)
        value.sum().backward()
        assert value.isfinite().all()
        assert cost.grad.isfinite().all()
        assert (cost.grad[0, 3:] == 0).all()
        assert (cost.grad[0, :, 4:] == 0).all()
        assert (cost.grad[1, :, 2:] == 0).all()

    @backends
    @pytest.mark.parametrize("band", [None, 2])
    def test_one_row_or_column_is_its_sum(self, backend: str, band: int | None) -> None:
        for cost in (costs(2, 1, 7), costs(2, 7, 1), costs(2, 1, 1)):
            value, alignment = soft_dtw_and_alignment(cost, gamma=0.4, band=band, backend=backend)
            torch.testing.assert_close(value, cost.sum((1, 2)))
            torch.testing.assert_close(alignment, torch.ones_like(cost))

    @backends
    def test_an_empty_side_gives_zero_and_no_gradient(self, backend: str) -> None:
        cost = costs(4, 3, 4).requires_grad_()
        n, m = lengths(0, 3, 0, 3), lengths(4, 0, 0, 4)
        value = soft_dtw(cost, n, m, gamma=0.1, backend=backend)
        # The mean over a length of 0 sends an infinite gradient back.
        (value / n).nan_to_num().sum().backward()
        assert value[:3].tolist() == [0.0, 0.0, 0.0]
        assert value[3] != 0
        assert (cost.grad[:3] == 0).all()
        assert cost.grad[3].sum() > 0

    @backends
    def test_a_batch_of_empty_samples_or_none_at_all_is_zero(self, backend: str) -> None:
        cost = costs(2, 3, 4).requires_grad_()
        value = soft_dtw(cost, lengths(0, 0), lengths(0, 0), gamma=0.1, backend=backend)
        value.sum().backward()
        assert value.tolist() == [0.0, 0.0]
        assert (cost.grad == 0).all()
        assert soft_dtw(torch.zeros(0, 3, 4), gamma=0.1, backend=backend).shape == (0,)
        assert soft_dtw(torch.zeros(2, 0, 4), gamma=0.1, backend=backend).tolist() == [0.0, 0.0]

    @backends
    @pytest.mark.parametrize("band", [1, 2, 7])
    def test_a_band_is_never_infeasible(self, backend: str, band: int) -> None:
        # |i - j| <= w puts the last cell out of reach when the lengths differ by more than w.
        sizes = [(1, 12), (12, 1), (2, 12), (12, 3), (5, 12), (12, 11), (12, 12), (7, 3)]
        n, m = (torch.tensor(side) for side in zip(*sizes, strict=True))
        value, alignment = soft_dtw_and_alignment(costs(8, 12, 12), n, m, gamma=0.1, band=band, backend=backend)
        assert value.isfinite().all()
        for sample, rows, columns in zip(alignment, n.tolist(), m.tolist(), strict=True):
            for i in range(12):
                for j in range(12):
                    if i >= rows or j >= columns or not is_admissible(i, j, n=rows, m=columns, band=band):
                        assert sample[i, j] == 0
        torch.testing.assert_close(alignment[:, 0, 0], torch.ones(8, dtype=torch.float64))

    @working_backends
    def test_a_band_as_wide_as_the_grid_is_no_band(self, backend: str) -> None:
        cost, n, m = costs(3, 9, 14), lengths(9, 4, 2), lengths(6, 14, 14)
        wide = soft_dtw(cost, n, m, gamma=0.1, band=14, backend=backend)
        torch.testing.assert_close(wide, soft_dtw(cost, n, m, gamma=0.1, backend=backend))

    @backends
    def test_infinite_costs_forbid_cells(self, backend: str) -> None:
        cost = costs(3, 4, 4)
        cost[0, 1, 0] = cost[0, 1, 1] = cost[0, 2, 3] = math.inf  # some paths remain
        cost[1, 2, :] = math.inf  # a wall
        cost[2, 0, 0] = math.inf
        cost.requires_grad_()
        value = soft_dtw(cost, gamma=0.3, backend=backend)
        value.sum().backward()
        expected_value, visits = by_paths(cost[0].tolist(), gamma=0.3)
        assert value[0].item() == pytest.approx(expected_value)
        torch.testing.assert_close(cost.grad[0].tolist(), visits, rtol=1e-10, atol=1e-12)
        assert value[1:].tolist() == [math.inf, math.inf]
        assert (cost.grad[1:] == 0).all()

    @backends
    def test_nan_in_is_nan_out_for_that_sample_only(self, backend: str) -> None:
        cost = costs(2, 4, 4)
        cost[0, 0, 3] = math.nan
        cost.requires_grad_()
        value = soft_dtw(cost, gamma=0.1, backend=backend)
        value.sum().backward()
        assert value.isnan().tolist() == [True, False]
        assert cost.grad[0].isnan().all()
        assert cost.grad[1].isfinite().all()

    @working_backends
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_costs_give_a_float32_value_and_a_half_gradient(
        self, backend: str, dtype: torch.dtype
    ) -> None:
        cost = costs(2, 40, 50, dtype=dtype).requires_grad_()
        value = soft_dtw(cost, gamma=0.01, backend=backend)
        value.sum().backward()
        exact, alignment = soft_dtw_and_alignment(cost.detach().double(), gamma=0.01, backend="reference")
        assert value.dtype == torch.float32
        assert cost.grad.dtype == dtype
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(cost.grad, alignment.to(dtype))

    @working_backends
    def test_autocast_changes_nothing(self, backend: str) -> None:
        cost = costs(2, 20, 20, dtype=torch.float32)
        plain = soft_dtw_and_alignment(cost, gamma=0.01, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = soft_dtw_and_alignment(cost, gamma=0.01, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))

    @backends
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_never_writes_to_the_callers_tensors(self, backend: str, dtype: torch.dtype) -> None:
        # One published kernel writes inf into the cost outside its band.
        cost, n, m = costs(1, 6, 5, dtype=dtype).requires_grad_(), lengths(5), lengths(4)
        before = cost.detach().clone()
        soft_dtw(cost, n, m, gamma=0.1, band=1, backend=backend).sum().backward()
        assert torch.equal(cost.detach(), before)
        assert (n.item(), m.item()) == (5, 4)

    @working_backends
    def test_any_strides_are_read(self, backend: str) -> None:
        cost = costs(6, 5, 3).permute(2, 0, 1)
        found = soft_dtw(cost, gamma=0.1, backend=backend)
        torch.testing.assert_close(found, soft_dtw(cost.contiguous(), gamma=0.1, backend="reference"))

    @working_backends
    def test_lengths_beyond_1024_are_computed_not_dropped(self, backend: str) -> None:
        # One published kernel falls back in silence above 1024 rows. A constant cost is closed form.
        value = soft_dtw(torch.ones(1, 1100, 1100), gamma=1e-3, band=1, backend=backend)
        assert value.item() == pytest.approx(1100, abs=1e-3)

    def test_without_gradient_gives_the_same_value(self) -> None:
        cost = costs(2, 9, 9)
        with torch.no_grad():
            frozen = soft_dtw(cost.clone().requires_grad_(), gamma=0.1)
        trained = soft_dtw(cost.clone().requires_grad_(), gamma=0.1)
        assert not frozen.requires_grad
        assert trained.requires_grad
        assert torch.equal(frozen, trained.detach())

    def test_takes_a_callable_backend(self) -> None:
        calls: list[tuple[Tensor, ...]] = []
        asked: list[dict[str, object]] = []

        def recorded(*problem: Tensor, **options: object) -> tuple[Tensor, None]:
            calls.append(problem)
            asked.append(options)
            return torch.tensor([7.0, 8.0]), None

        cost = costs(2, 4, 5)
        assert soft_dtw(cost, lengths(4, 2), gamma=0.1, band=3, backend=recorded).tolist() == [7.0, 8.0]
        assert asked == [{"gamma": 0.1, "band": 3, "with_alignment": False}]
        assert [tensor.tolist() for tensor in calls[0]] == [cost.tolist(), [4, 2], [5, 5]]

    @pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
    def test_refuses_a_gamma_that_is_not_positive(self, gamma: float) -> None:
        with pytest.raises(ValueError, match="gamma"):
            soft_dtw(costs(1, 2, 2), gamma=gamma)

    @pytest.mark.parametrize("band", [0, -1, 0.5, 1.5, math.nan, math.inf])
    def test_refuses_a_band_that_is_not_a_whole_number_from_1(self, band: float) -> None:
        with pytest.raises(ValueError, match="band"):
            soft_dtw(costs(1, 2, 2), gamma=0.1, band=band)

    def test_refuses_an_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match=r"'fpga'.*reference, torch, native, cuda"):
            soft_dtw(costs(1, 2, 2), gamma=0.1, backend="fpga")

    @pytest.mark.parametrize("wrong", [lengths(3, 6), lengths(-1, 2), lengths(2), torch.tensor([1.0, 2.0])])
    def test_refuses_lengths_that_do_not_fit(self, wrong: Tensor) -> None:
        with pytest.raises(ValueError, match="lengths_m"):
            soft_dtw(costs(2, 5, 5), lengths(5, 5), wrong, gamma=0.1)

    def test_refuses_costs_that_are_not_a_batch_of_float_matrices(self) -> None:
        with pytest.raises(ValueError, match="cost"):
            soft_dtw(costs(5, 5), gamma=0.1)
        with pytest.raises(ValueError, match="cost"):
            soft_dtw(torch.ones(1, 2, 2, dtype=torch.int64), gamma=0.1)


class TestExpectedAlignment:
    @backends
    @pytest.mark.parametrize("band", [None, 2])
    @pytest.mark.parametrize("gamma", [1e-3, 0.1, 10.0])
    def test_corners_are_one_and_mass_is_bounded(self, backend: str, gamma: float, band: int | None) -> None:
        sizes = [(13, 17), (8, 8), (3, 17), (13, 2)]
        n, m = (torch.tensor(side) for side in zip(*sizes, strict=True))
        cost = costs(4, 13, 17, dtype=torch.float32)
        for sample, rows, columns in zip(
            expected_alignment(cost, n, m, gamma=gamma, band=band, backend=backend), *(n, m), strict=True
        ):
            inside = sample[:rows, :columns]
            assert inside[0, 0].item() == pytest.approx(1, abs=1e-5)
            assert inside[-1, -1].item() == 1
            assert inside.min() >= 0
            assert inside.max() <= 1 + 1e-5
            assert inside.sum(0).min() >= 1 - 1e-5
            assert inside.sum(1).min() >= 1 - 1e-5
            assert max(rows, columns) - 1e-4 <= inside.sum() <= rows + columns - 1 + 1e-4

    @working_backends
    def test_is_never_negative_where_rounded_weights_sum_to_more_than_one(self, backend: str) -> None:
        cost = costs(200, 3, 3, dtype=torch.float32)
        cost[:, 1, 1] = 1e6
        assert expected_alignment(cost, gamma=1.0, backend=backend).min() >= 0

    def test_is_symmetric_for_a_symmetric_cost(self) -> None:
        cost = costs(1, 7, 7)
        alignment = expected_alignment(cost + cost.mT, gamma=0.3, band=3)
        torch.testing.assert_close(alignment, alignment.mT)

    def test_carries_no_gradient(self) -> None:
        assert not expected_alignment(costs(1, 3, 3).requires_grad_(), gamma=0.3).requires_grad

    def test_small_gamma_is_the_cheapest_path(self) -> None:
        cost = torch.ones(1, 3, 3)
        cost[0, 0, 0] = cost[0, 1, 0] = cost[0, 2, 1] = cost[0, 2, 2] = 0.0
        path = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
        assert expected_alignment(cost, gamma=1e-3)[0].tolist() == path


class TestPairwiseCost:
    @pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
    def test_equals_scipy(self, metric: str) -> None:
        x, y = costs(2, 4, 6, seed=1) - 1, costs(2, 5, 6, seed=2) - 1
        found = pairwise_cost(x, y, metric)
        for k in range(2):
            expected = torch.from_numpy(cdist(x[k].numpy(), y[k].numpy(), metric))
            torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
    def test_gradcheck(self, metric: str) -> None:
        x, y = ((costs(1, 3, 4, seed=s) - 1).requires_grad_() for s in (1, 2))
        assert torch.autograd.gradcheck(lambda a, b: pairwise_cost(a, b, metric), (x, y))

    @pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
    def test_is_never_negative_at_equality(self, metric: str) -> None:
        x = 100 * costs(1, 50, 64, dtype=torch.float32)
        cost = pairwise_cost(x, x, metric)
        assert cost.min() >= 0
        assert cost.diagonal(dim1=1, dim2=2).max() <= 1e-6 * x.square().sum(2).max()

    def test_cosine_of_a_zero_vector_costs_one_and_has_no_gradient(self) -> None:
        # Division by max(norm, eps) sends gradients of 1 / eps into zero vectors.
        x = torch.zeros(1, 2, 3)
        x[0, 1] = torch.tensor([1.0, 2.0, 3.0])
        x.requires_grad_()
        y = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]], requires_grad=True)
        cost = pairwise_cost(x, y)
        cost.sum().backward()
        assert cost[0, 0].tolist() == [1.0, 1.0]
        assert cost[0, 1, 0].item() == 1.0
        assert x.grad[0, 0].tolist() == [0.0, 0.0, 0.0]
        assert x.grad.isfinite().all()
        assert y.grad[0, 0].tolist() == [0.0, 0.0, 0.0]

    def test_a_vector_too_short_for_a_direction_counts_as_zero(self) -> None:
        x = torch.tensor([[[0.5 * ZERO_NORM, 0.0], [2.0 * ZERO_NORM, 0.0]]], requires_grad=True)
        cost = pairwise_cost(x, torch.tensor([[[1.0, 1.0]]]))
        cost.sum().backward()
        assert cost[0, 0].item() == 1.0
        assert cost[0, 1].item() == pytest.approx(1 - math.sqrt(0.5), abs=1e-6)
        assert x.grad[0, 0].tolist() == [0.0, 0.0]

    def test_a_backward_pass_under_autocast_is_computed_in_float32(self) -> None:
        x, y = (costs(1, 3, 64, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
        (expected,) = torch.autograd.grad(directions(x).mul(y).sum(), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (found,) = torch.autograd.grad(directions(x).mul(y).sum(), x)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
    def test_those_of_a_divergence_are_the_same(self, metric: str) -> None:
        x, y = costs(2, 3, 4, seed=1) - 1, costs(2, 5, 4, seed=2) - 1
        expected = [pairwise_cost(*pair, metric) for pair in ((x, y), (x, x), (y, y))]
        for found, own in zip(divergence_costs(x, y, metric), expected, strict=True):
            assert torch.equal(found, own)

    def test_cosine_ignores_the_scale_of_the_vectors(self) -> None:
        x, y = costs(1, 3, 4, seed=1), costs(1, 2, 4, seed=2)
        torch.testing.assert_close(pairwise_cost(1e4 * x, 1e-4 * y), pairwise_cost(x, y))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_and_autocast_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        x, y = (costs(1, 3, 64, seed=s, dtype=dtype) for s in (1, 2))
        expected = pairwise_cost(x.double(), y.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = pairwise_cost(x, y)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)

    def test_refuses_an_unknown_metric_and_vectors_of_two_sizes(self) -> None:
        with pytest.raises(ValueError, match=r"'l1'.*cosine, sqeuclidean"):
            pairwise_cost(costs(1, 2, 3), costs(1, 2, 3), "l1")
        with pytest.raises(ValueError, match="Project one side"):
            pairwise_cost(costs(1, 2, 3), costs(1, 2, 4))


class TestSoftDtwDivergence:
    @backends
    @pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
    def test_equals_its_definition_sample_by_sample(self, backend: str, metric: str) -> None:
        x, y = costs(2, 4, 3, seed=1) - 1, costs(2, 4, 3, seed=2) - 1
        n, m = [4, 2], [3, 4]
        found = soft_dtw_divergence(x, y, lengths(*n), lengths(*m), gamma=0.5, metric=metric, backend=backend)
        for k in range(2):
            a, b = x[k, : n[k]].numpy(), y[k, : m[k]].numpy()
            cross, self_a, self_b = (
                by_paths(cdist(u, v, metric).tolist(), gamma=0.5)[0] for u, v in ((a, b), (a, a), (b, b))
            )
            assert found[k].item() == pytest.approx(cross - (self_a + self_b) / 2, abs=1e-10)

    @backends
    @pytest.mark.parametrize("band", [None, 2])
    @pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
    def test_value_and_gradient_are_zero_at_equality(self, backend: str, metric: str, band: int | None) -> None:
        x = (costs(2, 9, 5) - 1).requires_grad_()
        y = x.detach().clone()
        value = soft_dtw_divergence(
            x, y, lengths(9, 6), lengths(9, 6), gamma=0.2, metric=metric, band=band, backend=backend
        )
        value.sum().backward()
        plain = soft_dtw(pairwise_cost(x, y, metric), gamma=0.2, backend=backend)
        (biased,) = torch.autograd.grad(plain.sum(), x)
        assert value.abs().max() < 1e-12
        assert x.grad.abs().max() < 1e-12
        assert biased.abs().max() > 1e-3  # what the divergence is there to remove

    def test_is_positive_away_from_equality(self) -> None:
        x, y = costs(40, 6, 5, seed=1) - 1, costs(40, 9, 5, seed=2) - 1
        assert soft_dtw_divergence(x, y, gamma=0.1).min() > 0

    def test_gradcheck_on_both_sides(self) -> None:
        x, y = ((costs(2, 3, 4, seed=s) - 1).requires_grad_() for s in (1, 2))
        n, m = lengths(3, 2), lengths(2, 3)
        assert torch.autograd.gradcheck(lambda a, b: soft_dtw_divergence(a, b, n, m, gamma=0.3), (x, y))

    def test_a_constant_teacher_gets_no_gradient(self) -> None:
        x, y = costs(1, 3, 4, seed=1).requires_grad_(), costs(1, 3, 4, seed=2)
        soft_dtw_divergence(x, y, gamma=0.3).sum().backward()
        assert y.grad is None
        assert x.grad.abs().max() > 0

    def test_padding_is_never_read(self) -> None:
        x, y = costs(2, 5, 4, seed=1), costs(2, 7, 4, seed=2)
        alone = soft_dtw_divergence(x[:1, :3], y[:1, :4], gamma=0.3)
        x[0, 3:], y[0, 4:] = math.nan, math.nan
        x.requires_grad_()
        value = soft_dtw_divergence(x, y, lengths(3, 5), lengths(4, 7), gamma=0.3)
        value.sum().backward()
        torch.testing.assert_close(value[:1], alone)
        assert x.grad.isfinite().all()
        assert (x.grad[0, 3:] == 0).all()

    def test_an_empty_side_gives_zero_though_the_other_has_its_own_term(self) -> None:
        x, y = costs(2, 5, 4, seed=1).requires_grad_(), costs(2, 7, 4, seed=2).requires_grad_()
        value = soft_dtw_divergence(x, y, lengths(0, 5), lengths(7, 0), gamma=0.3)
        value.sum().backward()
        assert value.tolist() == [0.0, 0.0]
        assert (x.grad == 0).all()
        assert (y.grad == 0).all()

    def test_descending_it_recovers_the_target(self) -> None:
        y = costs(1, 6, 3, seed=1) - 1
        x = (y + 0.3 * (costs(1, 6, 3, seed=2) - 1)).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            soft_dtw_divergence(x, y, gamma=0.5, metric="sqeuclidean").sum().backward()
            optimizer.step()
        assert (x - y).abs().max() < 0.02


class TestBandLimits:
    @pytest.mark.parametrize("band", [None, 1, 2, 5])
    def test_equals_the_formula_cell_by_cell(self, band: int | None) -> None:
        n, m = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
        n, m = n.flatten(), m.flatten()
        first, last = band_limits(n, m, band=band, num_diagonals=17)
        for k, (rows, columns) in enumerate(zip(n.tolist(), m.tolist(), strict=True)):
            for a in range(17):
                inside = [
                    i
                    for i in range(rows)
                    if 0 <= a - i < columns and is_admissible(i, a - i, n=rows, m=columns, band=band)
                ]
                assert list(range(int(first[a, k]), int(last[a, k]) + 1)) == inside

    def test_a_large_band_on_long_sequences_does_not_overflow(self) -> None:
        first, last = band_limits(lengths(100_000), lengths(90_000), band=100_000, num_diagonals=3)
        assert first.flatten().tolist() == [0, 0, 0]
        assert last.flatten().tolist() == [0, 1, 2]


class TestDiagonalPath:
    def test_is_a_path_of_the_longer_sides_length_inside_the_narrowest_band(self) -> None:
        sizes = [(n, m) for n in range(1, 10) for m in range(1, 10)]
        n, m = (torch.tensor(side) for side in zip(*sizes, strict=True))
        rows, columns, on_path = diagonal_path(n, m)
        for k, (height, width) in enumerate(sizes):
            cells = list(zip(rows[k][on_path[k]].tolist(), columns[k][on_path[k]].tolist(), strict=True))
            assert len(cells) == max(height, width)
            assert cells[0] == (0, 0)
            assert cells[-1] == (height - 1, width - 1)
            for (i, j), (u, v) in pairwise(cells):
                assert (u - i, v - j) in {(1, 1), (1, 0), (0, 1)}
            assert all(is_admissible(i, j, n=height, m=width, band=1) for i, j in cells)

    def test_is_i_equals_j_for_equal_lengths(self) -> None:
        rows, columns, on_path = diagonal_path(lengths(4, 2), lengths(4, 2))
        assert torch.equal(rows, columns)
        assert rows.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
        assert on_path.sum(1).tolist() == [4, 2]

    def test_an_empty_side_has_no_path(self) -> None:
        assert diagonal_path(lengths(0, 3), lengths(5, 0))[2].numel() == 0
        assert diagonal_path(lengths(0, 3), lengths(5, 2))[2].sum(1).tolist() == [0, 3]

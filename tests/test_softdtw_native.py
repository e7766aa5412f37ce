"""What only the compiled backend of soft-DTW can get wrong; what holds for all backends is in test_softdtw.py."""

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdkit import compiled
from kdkit.softdtw import api, expected_alignment, native, soft_dtw, soft_dtw_and_alignment
from kdkit.softdtw.band import band_limits

needs_numba = pytest.mark.skipif(not compiled.is_installed(), reason="needs numba")
RAGGED = [(40, 70), (1, 70), (40, 1), (33, 34), (0, 12), (7, 64), (40, 3), (2, 2), (39, 70)]


def costs(*shape: int, seed: int = 0) -> Tensor:
    """Random costs like a cosine's, float32 in [0, 2]."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def is_inside(i: int, j: int, *, n: int, m: int, band: int | None) -> bool:
    return i < n and j < m and (band is None or abs(i * (m - 1) - j * (n - 1)) <= band * (max(n, m) - 1))


def admissible(n: Tensor, m: Tensor, *, side: int, band: int | None) -> Tensor:
    """(B, side, side) `is_inside` of every cell."""
    n, m = n[:, None, None], m[:, None, None]
    i, j = torch.arange(side)[:, None], torch.arange(side)
    distance = (i * (m - 1) - j * (n - 1)).abs()
    near = torch.ones_like(distance, dtype=torch.bool) if band is None else distance <= band * (n.maximum(m) - 1)
    return (i < n) & (j < m) & near


def ragged_batch(band: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Costs with NaN wherever nobody may look, and the lengths."""
    cost = costs(len(RAGGED), 40, 70)
    for k, (n, m) in enumerate(RAGGED):
        inside = [[is_inside(i, j, n=n, m=m, band=band) for j in range(70)] for i in range(40)]
        cost[k].masked_fill_(~torch.tensor(inside), math.nan)
    n, m = (torch.tensor(side) for side in zip(*RAGGED, strict=True))
    return cost, n, m


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Nothing is known yet about this machine; nor is what the test made up, afterwards."""
    forget_choice()
    yield
    forget_choice()


def forget_choice() -> None:
    api._fastest_name.cache_clear()
    native._kernels.cache_clear()


@needs_numba
class TestNative:
    @pytest.mark.parametrize("band", [None, 1, 3, 20, 1000])
    @pytest.mark.parametrize("gamma", [1e-3, 0.1, 5.0])
    def test_a_ragged_batch_equals_the_naive_loop(self, gamma: float, band: int | None) -> None:
        cost, n, m = ragged_batch(band)
        value, alignment = soft_dtw_and_alignment(cost, n, m, gamma=gamma, band=band, backend="native")
        exact = soft_dtw_and_alignment(cost.double(), n, m, gamma=gamma, band=band, backend="reference")
        assert value.dtype == alignment.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[0], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(alignment.double(), exact[1], rtol=0, atol=1e-5)
        assert (alignment[exact[1] == 0] <= 1e-12).all()

    @pytest.mark.parametrize("band", [None, 32])
    @pytest.mark.parametrize("gamma", [1e-3, 0.1])
    def test_is_accurate_on_long_sequences(self, gamma: float, band: int | None) -> None:
        cost = costs(2, 500, 420)
        value, alignment = soft_dtw_and_alignment(cost, gamma=gamma, band=band, backend="native")
        exact = soft_dtw_and_alignment(cost.double(), gamma=gamma, band=band, backend="torch")
        torch.testing.assert_close(value.double(), exact[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(alignment.double(), exact[1], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("band", [None, 1, 40, 300])
    @pytest.mark.parametrize("kept", [2**10, native.KEPT_SLOTS])
    def test_strips_of_rows_make_no_difference(
        self, kept: int, band: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kdkit.softdtw._kernels import HEIGHT

        monkeypatch.setattr(native, "KEPT_SLOTS", kept)
        longest = 3 * HEIGHT + 6
        sides = [1, HEIGHT - 1, HEIGHT, HEIGHT + 1, 2 * HEIGHT, 2 * HEIGHT + 1, longest]
        n, m = torch.tensor([*sides, longest, 0]), torch.tensor([*sides[::-1], longest, longest])
        n, m = torch.cat([n, torch.tensor([130, 390, HEIGHT])]), torch.cat([m, torch.tensor([390, 130, 6])])
        cost = costs(len(n), longest, longest).masked_fill_(~admissible(n, m, side=longest, band=band), math.nan)
        cost[7, HEIGHT - 1, : longest - 1] *= math.inf  # all paths pass from one strip to the next in a single cell
        value, alignment = soft_dtw_and_alignment(cost, n, m, gamma=0.1, band=band, backend="native")
        exact = soft_dtw_and_alignment(cost.double(), n, m, gamma=0.1, band=band, backend="torch")
        torch.testing.assert_close(value.double(), exact[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(alignment.double(), exact[1], rtol=0, atol=1e-5)
        assert torch.equal(soft_dtw(cost, n, m, gamma=0.1, band=band, backend="native"), value)

    def test_a_nan_in_one_strip_stays_in_its_sample(self) -> None:
        cost = costs(3, 300, 200)
        exact = soft_dtw_and_alignment(cost[1:], gamma=0.1, backend="native")
        cost[0, 140, 100] = math.nan
        value, alignment = soft_dtw_and_alignment(cost, gamma=0.1, backend="native")
        assert value[0].isnan()
        assert alignment[0].isnan().all()
        assert torch.equal(value[1:], exact[0])
        assert torch.equal(alignment[1:], exact[1])

    def test_a_batch_may_be_empty(self) -> None:
        value, alignment = soft_dtw_and_alignment(costs(0, 5, 6), gamma=0.1, backend="native")
        assert value.shape == (0,)
        assert alignment.shape == (0, 5, 6)

    def test_torchs_default_dtype_does_not_matter(self) -> None:
        cost = costs(3, 30, 40)
        expected = soft_dtw_and_alignment(cost, gamma=0.1, backend="native")
        torch.set_default_dtype(torch.float64)
        try:
            found = soft_dtw_and_alignment(cost, gamma=0.1, backend="native")
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("band", [None, 3])
    def test_the_gradient_is_the_alignment_times_what_comes_from_above(self, band: int | None) -> None:
        cost, n, m = ragged_batch(band)
        cost.requires_grad_()
        factors = torch.linspace(-2, 2, len(RAGGED))  # one of them 0
        value = soft_dtw(cost, n, m, gamma=0.1, band=band, backend="native")
        (first,) = torch.autograd.grad(value, cost, factors, retain_graph=True)
        (second,) = torch.autograd.grad(value, cost, factors)
        exact = expected_alignment(cost.double(), n, m, gamma=0.1, band=band, backend="reference")
        torch.testing.assert_close(first.double(), exact * factors[:, None, None], rtol=0, atol=2e-5)
        assert torch.equal(first, second)

    def test_no_mass_stays_no_gradient_whatever_comes_from_above(self) -> None:
        cost = costs(3, 6, 6)
        cost[1, 2] = math.inf  # a wall
        cost.requires_grad_()
        value = soft_dtw(cost, torch.tensor([0, 6, 6]), gamma=0.1, backend="native")
        (grad,) = torch.autograd.grad(value, cost, torch.tensor([math.inf, math.nan, 1.0]))
        assert value[1] == math.inf
        assert (grad[:2] == 0).all()
        assert grad[2].sum() >= 6

    def test_infinite_costs_forbid_cells(self) -> None:
        cost = costs(2, 30, 30)
        cost[0][torch.rand(30, 30, generator=torch.Generator().manual_seed(3)) < 0.15] = math.inf
        cost[:, 0, 0] = cost[:, -1, -1] = 0.0
        found = soft_dtw_and_alignment(cost, gamma=0.05, backend="native")
        exact = soft_dtw_and_alignment(cost.double(), gamma=0.05, backend="reference")
        assert found[0].isfinite().all()
        torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=1e-5)
        assert (found[1][cost == math.inf] == 0).all()

    @pytest.mark.parametrize("scale", [-3.0, 1e5, 1e9, 1e30])
    def test_negative_and_huge_costs_equal_the_naive_loop(self, scale: float) -> None:
        # From 1e5 on, costs / gamma do not fit the exponents of the compiled loops.
        cost = scale * costs(3, 12, 15)
        cost[1] /= scale
        found = soft_dtw_and_alignment(cost, gamma=1e-2, band=4, backend="native")
        exact = soft_dtw_and_alignment(cost.double(), gamma=1e-2, band=4, backend="reference")
        torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=1e-5)

    def test_nan_and_minus_inf_stay_in_their_sample(self) -> None:
        cost = costs(4, 9, 9)
        clean = soft_dtw(cost, gamma=0.1, backend="native")
        cost[1, 4, 4] = math.nan
        cost[3, 8, 8] = -math.inf
        cost.requires_grad_()
        value = soft_dtw(cost, gamma=0.1, backend="native")
        value.sum().backward()
        assert value[[0, 2]].tolist() == clean[[0, 2]].tolist()
        assert value[1].isnan()
        assert value[3] == -math.inf
        assert cost.grad[1].isnan().all()
        assert cost.grad[[0, 2]].isfinite().all()

    def test_the_number_of_threads_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "CELLS_A_THREAD", 1)
        monkeypatch.setattr(native, "ENTRIES_A_THREAD", 1)
        cost = costs(24, 60, 50)
        n, m = torch.arange(37, 61), torch.arange(50, 26, -1)
        before, found = torch.get_num_threads(), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(soft_dtw_and_alignment(cost, n, m, gamma=0.1, band=9, backend="native"))
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

    def test_a_forked_process_has_threads_of_its_own(self) -> None:
        code = (
            "import os, torch\n"
            "from kdkit.softdtw import native, soft_dtw\n"
            "torch.set_num_threads(2)\n"
            "native.CELLS_A_THREAD = 1\n"
            "cost = torch.ones(8, 80, 80)\n"
            "value = soft_dtw(cost, gamma=0.1, backend='native')\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    os._exit(0 if torch.equal(value, soft_dtw(cost, gamma=0.1, backend='native')) else 3)\n"
            "os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        )
        root = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False).returncode == 0

    @pytest.mark.parametrize(("band", "num_cells"), [(None, 2 * 64 * 64), (4, 2 * (64 * 9 - 4 * 5))])
    def test_one_number_for_each_admissible_cell_waits_for_the_backward_pass(
        self, band: int | None, num_cells: int
    ) -> None:
        value = soft_dtw(costs(2, 64, 64).requires_grad_(), gamma=0.1, band=band, backend="native")
        assert [saved.numel() for saved in value.grad_fn.saved_tensors] == [num_cells]
        value, alignment = soft_dtw_and_alignment(
            costs(2, 64, 64).requires_grad_(), gamma=0.1, band=band, backend="native"
        )
        (kept,) = value.grad_fn.saved_tensors
        assert kept.numel() == num_cells
        assert (kept.data_ptr() == alignment.data_ptr()) == (band is None)

    def test_lengths_that_change_before_the_backward_pass_change_nothing(self) -> None:
        cost, n, m = costs(2, 20, 30).requires_grad_(), torch.tensor([15, 20]), torch.tensor([30, 9])
        exact = expected_alignment(cost, n, m, gamma=0.1, band=4, backend="native")
        value = soft_dtw(cost, n, m, gamma=0.1, band=4, backend="native")
        n.fill_(20)
        m.fill_(30)
        (grad,) = torch.autograd.grad(value.sum(), cost)
        assert torch.equal(grad, exact)

    def test_the_value_alone_is_the_same(self) -> None:
        cost, n, m = ragged_batch(5)
        kept = soft_dtw_and_alignment(cost, n, m, gamma=0.1, band=5, backend="native")[0]
        assert torch.equal(soft_dtw(cost, n, m, gamma=0.1, band=5, backend="native"), kept)


@needs_numba
class TestPlans:
    @pytest.mark.parametrize("band", [None, 1, 2, 5])
    def test_rows_and_diagonals_equal_the_formula(self, band: int | None) -> None:
        from kdkit.softdtw import _kernels

        for n in range(1, 14):
            for m in range(1, 14):
                rows = first, last, slot = _kernels._plan_rows(n, m, band or 0)
                inside = [(i, j) for i in range(n) for j in range(m) if is_inside(i, j, n=n, m=m, band=band)]
                found = [(i, j) for i in range(n) for j in range(first[i], last[i] + 1)]
                assert found == inside
                assert [slot[i] + j for i, j in inside] == list(range(len(inside)))
                limits = band_limits(torch.tensor([n]), torch.tensor([m]), band=band, num_diagonals=n + m - 1)
                diagonals = _kernels._plan_diagonals(m, rows)
                assert [side.tolist() for side in diagonals] == [side.flatten().tolist() for side in limits]


@needs_numba
class TestLanes:
    def test_operators_work_on_each_lane(self) -> None:
        from kdkit.softdtw import _lanes as it

        @compiled.part()
        def written(x: np.ndarray, i: np.ndarray, out: np.ndarray, whole: np.ndarray) -> bool:
            zero, eight = np.uint64(0), np.uint64(8)
            a, b, e, f = it.load(x, zero), it.load(x, eight), it.load(i, zero), it.load(i, eight)
            shift, two = it.every(np.int32(3)), it.constant(np.float32(2))
            it.store(out, zero, (a + b) * two - a / b)
            it.store(out, eight, it.where(a > b, a, it.floats_of(it.bits_of(b))))
            it.store(whole, zero, (e + f) - ((e & f) | (e << shift)))
            it.store(whole, eight, it.where(e > f, e >> shift, f))
            return it.any_of((a > b) | (b != b))

        x = np.arange(-7, 9, dtype=np.float32) / 3
        i = np.arange(-80, 80, 10, dtype=np.int32)[::-1].copy()
        out, whole = np.empty_like(x), np.empty_like(i)
        assert not written(x, i, out, whole)
        a, b, e, f = x[:8], x[8:], i[:8], i[8:]
        np.testing.assert_allclose(out[:8], (a + b) * 2 - a / b, rtol=1e-6)
        np.testing.assert_array_equal(out[8:], b)
        np.testing.assert_array_equal(whole[:8], (e + f) - ((e & f) | (e << 3)))
        np.testing.assert_array_equal(whole[8:], e >> 3)
        x[12] = np.nan
        assert written(x, i, out, whole)
        assert np.isnan(out[12])  # nothing is larger than NaN

    def test_arrays_of_another_kind_are_refused(self) -> None:
        from numba.core.errors import TypingError

        from kdkit.softdtw import _lanes as it

        @compiled.part()
        def copied(source: np.ndarray, target: np.ndarray) -> None:
            it.store(target, np.uint64(0), it.load(source, np.uint64(0)))

        for source, target in (("float64", "float64"), ("bool", "bool"), ("float32", "int32")):
            with pytest.raises(TypingError, match=r"allowed: float32|cannot be stored"):
                copied(np.zeros(8, source), np.zeros(8, target))


@pytest.mark.usefixtures("fresh_choice")
class TestChoice:
    @pytest.mark.parametrize(("numba", "name"), [(False, "torch"), pytest.param(True, "native", marks=needs_numba)])
    def test_the_log_says_once_which_backend_runs_and_why(
        self, numba: bool, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(compiled, "is_installed", lambda: numba)
        with caplog.at_level(logging.INFO, logger="kdkit.softdtw"):
            for seed in range(3):
                cost = costs(2, 5, 6, seed=seed)
                assert torch.equal(soft_dtw(cost, gamma=0.1), soft_dtw(cost, gamma=0.1, backend=name))
        (message,) = caplog.messages
        assert name in message
        assert "numba" in message

    def test_float64_runs_on_torch(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="kdkit.softdtw"):
            soft_dtw(costs(2, 5, 6).double(), gamma=0.1)
        assert "'torch'" in caplog.text
        assert "torch.float64" in caplog.text

    def test_a_subclass_of_tensor_runs_on_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Marked(Tensor):
            pass

        monkeypatch.setitem(api.BACKENDS, "native", None)  # would be called in vain
        cost = costs(2, 5, 6)
        found = soft_dtw(cost.as_subclass(Marked), gamma=0.1)
        assert found.tolist() == soft_dtw(cost, gamma=0.1, backend="torch").tolist()

    def test_asking_for_it_without_numba_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiled, "is_installed", lambda: False)
        with pytest.raises(ValueError, match=r"kdkit\[fast\]"):
            soft_dtw(costs(1, 3, 3), gamma=0.1, backend="native")

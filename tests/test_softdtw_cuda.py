"""Backend "cuda" of soft-DTW: its kernels run on the CPU.

Only tests marked `gpu` run the kernels on a card.
"""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from dense import CUDA
from test_softdtw_native import costs, is_inside, ragged_batch
from torch import Tensor

from kdkit.cuda import SHARED_BYTES, Argument, Module
from kdkit.softdtw import api, cuda, expected_alignment, fastest_backend, soft_dtw, soft_dtw_and_alignment

KERNELS = ("pack", "spread", "forward", "forward_misfits", "backward")
Emulated = Callable[..., api.Backend]


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a CUDA driver whose device is the CPU."""
    return str(emulated.build_driver(tmp_path_factory.mktemp("driver"), cuda.SOURCE, KERNELS))


@pytest.fixture(scope="session")
def backend(driver: str) -> Emulated:
    """(threads, shared_bytes) -> backend "cuda" on that driver."""
    module = Module(emulated.CUBIN, device=0, driver=driver)

    def with_blocks_of(threads: int = 5, shared_bytes: int = SHARED_BYTES) -> api.Backend:
        launcher = cuda.Launcher(module, most_threads=threads, tile_threads=threads, shared_bytes=shared_bytes)
        return partial(cuda.solve, launcher=launcher)

    return with_blocks_of


def check_against_reference(
    found: tuple[Tensor, Tensor], cost: Tensor, *lengths: Tensor, gamma: float, band: int | None = None
) -> None:
    """To the accuracy that every compiled backend has to have."""
    exact = soft_dtw_and_alignment(cost.double(), *lengths, gamma=gamma, band=band, backend="reference")
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=2e-6 * min(gamma, 1.0), equal_nan=True)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=1e-5, equal_nan=True)
    assert (found[1][exact[1] == 0] <= 1e-12).all()


class TestKernels:
    @pytest.mark.parametrize("band", [None, 1, 3, 20, 1000])
    @pytest.mark.parametrize("gamma", [1e-3, 0.1, 5.0])
    def test_a_ragged_batch_equals_the_naive_loop(self, backend: Emulated, gamma: float, band: int | None) -> None:
        cost, n, m = ragged_batch(band)
        found = soft_dtw_and_alignment(cost, n, m, gamma=gamma, band=band, backend=backend())
        assert found[0].dtype == found[1].dtype == torch.float32
        check_against_reference(found, cost, n, m, gamma=gamma, band=band)

    @pytest.mark.parametrize("seed", range(12))
    def test_any_shape_band_and_walls_equal_the_naive_loop(self, backend: Emulated, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, size: tuple[int, ...] = (1,)) -> Tensor:
            return torch.randint(low, high, size, generator=generator)

        rows, columns, threads = (int(draw(1, high)) for high in (45, 45, 9))
        n, m = draw(0, rows + 1, (5,)), draw(0, columns + 1, (5,))
        gamma, band = (1e-3, 0.03, 1.0, 20.0)[seed % 4], (None, 1, 2, int(draw(3, 50)))[seed // 3]
        cost = costs(5, rows, columns, seed=seed)
        cost[torch.rand(cost.shape, generator=generator) < 0.1] = math.inf
        found = soft_dtw_and_alignment(cost, n, m, gamma=gamma, band=band, backend=backend(threads))
        check_against_reference(found, cost, n, m, gamma=gamma, band=band)

    @pytest.mark.parametrize("band", [None, 7])
    def test_threads_and_memory_change_nothing(self, backend: Emulated, band: int | None) -> None:
        cost, n, m = ragged_batch(band)
        cost[0, 0, 0] = math.nan  # one that is computed twice
        kept = [
            soft_dtw_and_alignment(cost, n, m, gamma=0.1, band=band, backend=backend(threads, shared_bytes))
            for threads, shared_bytes in ((1, 48 * 1024), (4, 48 * 1024), (64, 48 * 1024), (3, 0))
        ]
        for value, alignment in kept[1:]:
            torch.testing.assert_close(value, kept[0][0], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(alignment, kept[0][1], rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize(("gamma", "band"), [(1e-3, None), (0.1, 12)])
    def test_is_accurate_on_long_sequences(self, backend: Emulated, gamma: float, band: int | None) -> None:
        cost = costs(1, 300, 420)
        found = soft_dtw_and_alignment(cost, gamma=gamma, band=band, backend=backend(1))
        exact = soft_dtw_and_alignment(cost.double(), gamma=gamma, band=band, backend="torch")
        torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("scale", [-3.0, 1e5, 1e9, 1e30])
    def test_negative_and_huge_costs_equal_the_naive_loop(self, backend: Emulated, scale: float) -> None:
        # From 1e5 on, costs / gamma do not fit the exponents of the float32 kernel.
        cost = scale * costs(3, 12, 15)
        cost[1] /= scale
        found = soft_dtw_and_alignment(cost, gamma=1e-2, band=4, backend=backend())
        check_against_reference(found, cost, gamma=1e-2, band=4)

    def test_nan_and_minus_inf_stay_in_their_sample(self, backend: Emulated) -> None:
        cost = costs(5, 9, 9)
        clean = soft_dtw_and_alignment(cost, gamma=0.1, backend=backend())
        cost[1, 4, 4] = math.nan
        cost[2, 0, 8] = math.nan  # beyond that sample's lengths
        cost[3, 8, 8] = -math.inf
        n = torch.tensor([9, 7, 9, 9, 9])
        m = torch.tensor([9, 8, 5, 9, 9])
        value, alignment = soft_dtw_and_alignment(cost, n, m, gamma=0.1, backend=backend())
        assert torch.equal(value[[0, 4]], clean[0][[0, 4]])
        assert torch.equal(alignment[[0, 4]], clean[1][[0, 4]])
        assert value.isnan().tolist() == [False, True, False, False, False]
        assert value[3] == -math.inf
        assert alignment[1, :7, :8].isnan().all()
        assert alignment[1].isnan().sum() == 7 * 8
        assert alignment[2].isfinite().all()

    def test_walls_forbid_cells_and_samples(self, backend: Emulated) -> None:
        cost = costs(3, 8, 9)
        cost[0, 4] = cost[1, 0, 0] = math.inf
        value, alignment = soft_dtw_and_alignment(cost, gamma=0.1, backend=backend())
        assert value[:2].tolist() == [math.inf, math.inf]
        assert (alignment[:2] == 0).all()
        assert value[2].isfinite()

    def test_no_mass_stays_no_gradient_whatever_comes_from_above(self, backend: Emulated) -> None:
        cost = costs(3, 6, 6)
        cost[1, 2] = math.inf
        cost.requires_grad_()
        value = soft_dtw(cost, torch.tensor([0, 6, 6]), gamma=0.1, backend=backend())
        (grad,) = torch.autograd.grad(value, cost, torch.tensor([math.inf, math.nan, -2.0]), retain_graph=True)
        (again,) = torch.autograd.grad(value, cost, torch.tensor([math.inf, math.nan, -2.0]))
        exact = expected_alignment(cost.detach()[2:].double(), gamma=0.1, backend="reference")
        assert (grad[:2] == 0).all()
        torch.testing.assert_close(grad[2:].double(), -2 * exact, rtol=0, atol=2e-5)
        assert torch.equal(grad, again)

    def test_a_batch_without_cells_launches_nothing(self, backend: Emulated) -> None:
        cost = costs(2, 3, 4).requires_grad_()
        value = soft_dtw(cost, torch.tensor([0, 3]), torch.tensor([4, 0]), gamma=0.1, backend=backend())
        value.sum().backward()
        assert value.tolist() == [0.0, 0.0]
        assert (cost.grad == 0).all()
        assert soft_dtw(torch.zeros(0, 3, 4), gamma=0.1, backend=backend()).shape == (0,)

    def test_the_value_alone_is_the_same(self, backend: Emulated) -> None:
        cost, n, m = ragged_batch(5)
        cost[3, 0, 0] = 1e30
        kept = soft_dtw_and_alignment(cost, n, m, gamma=0.1, band=5, backend=backend())[0]
        assert torch.equal(soft_dtw(cost, n, m, gamma=0.1, band=5, backend=backend()), kept)

    def test_any_strides_are_read_and_nothing_is_written(self, backend: Emulated) -> None:
        cost = costs(6, 5, 3).permute(2, 0, 1)
        before = cost.clone()
        check_against_reference(soft_dtw_and_alignment(cost, gamma=0.1, backend=backend()), cost, gamma=0.1)
        assert torch.equal(cost, before)

    def test_lengths_that_change_before_the_backward_pass_change_nothing(self, backend: Emulated) -> None:
        cost, n, m = costs(2, 20, 30).requires_grad_(), torch.tensor([15, 20]), torch.tensor([30, 9])
        exact = expected_alignment(cost, n, m, gamma=0.1, band=4, backend=backend())
        value = soft_dtw(cost, n, m, gamma=0.1, band=4, backend=backend())
        n.fill_(20)
        m.fill_(30)
        assert torch.equal(torch.autograd.grad(value.sum(), cost)[0], exact)


class TestMakePlan:
    @pytest.mark.parametrize("band", [None, 1, 2, 5])
    def test_every_admissible_cell_has_a_slot_of_its_own(self, band: int | None) -> None:
        sizes = [(n, m) for n in range(9) for m in range(9)]
        n, m = (torch.tensor(side) for side in zip(*sizes, strict=True))
        plan = cuda.make_plan(torch.empty(len(sizes), 8, 8), n, m, band=band)
        used = []
        for (rows, columns), diagonals in zip(sizes, plan.diagonals.tolist(), strict=True):
            cells = [(i, a - i) for a, (first, last, _) in enumerate(diagonals) for i in range(first, last + 1)]
            used += [slot + k for first, last, slot in diagonals for k in range(last - first + 1)]
            inside = {
                (i, j) for i in range(rows) for j in range(columns) if is_inside(i, j, n=rows, m=columns, band=band)
            }
            assert set(cells) == inside
            assert all(last - first < plan.widest for first, last, _ in diagonals)
        assert len(set(used)) == len(used)
        assert max(used) < plan.num_slots

    @pytest.mark.parametrize(("side", "band"), [(64, None), (64, 8), (512, 32)])
    def test_slots_are_hardly_more_than_the_cells(self, side: int, band: int | None) -> None:
        plan = cuda.make_plan(torch.empty(1, side, side), *2 * [torch.tensor([side])], band=band)
        num_cells = sum(is_inside(i, j, n=side, m=side, band=band) for i in range(side) for j in range(side))
        assert num_cells <= plan.num_slots <= 1.15 * num_cells

    def test_indices_beyond_32_bits_are_kept(self) -> None:
        many = torch.full((3,), 60_000)
        plan = cuda.make_plan(torch.empty(3, 0, 0), many, many, band=10)
        unbanded = cuda.make_plan(torch.empty(3, 0, 0), many, torch.full((3,), 50_000), band=None)
        assert plan.widest == 11
        assert unbanded.num_slots == 3 * 60_000 * 50_000
        assert int(unbanded.diagonals[2, -1, 2]) > 2**32


class TestCompiled:
    @pytest.mark.parametrize("capability", emulated.CAPABILITIES)
    def test_the_kernels_compile_for_every_card_from_a_p100_on(
        self, capability: tuple[int, int], tmp_path: Path
    ) -> None:
        emulated.check_compiles(cuda.SOURCE, KERNELS, capability=capability, folder=tmp_path)


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    api._fastest_name.cache_clear()
    yield
    api._fastest_name.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
class TestChoice:
    @pytest.mark.parametrize(("problem", "name"), [(None, "cuda"), ("no NVRTC was found", "torch")])
    def test_takes_the_kernels_where_they_run_and_else_says_why_not(
        self, problem: str | None, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(cuda, "problem", lambda device: problem)
        with caplog.at_level(logging.INFO, logger="kdkit.softdtw"):
            for _ in range(3):
                assert api._fastest_name(torch.device("cuda", 0), torch.float32) == name
        (message,) = caplog.messages
        assert repr(name) in message
        assert (problem or "compiled for this card") in message

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_costs_on_the_cpu_are_left_to_torch(self, dtype: torch.dtype) -> None:
        cost = costs(2, 9, 8).to(dtype)
        found = soft_dtw_and_alignment(cost, gamma=0.1, band=3, backend="cuda")
        exact = soft_dtw_and_alignment(cost, gamma=0.1, band=3, backend="torch")
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))

    def test_float64_on_cuda_runs_on_torch(self) -> None:
        assert fastest_backend(torch.device("cuda", 0), torch.float64)[0] == "torch"

    def test_a_torch_without_cuda_is_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)  # as in builds for the CPU or for AMD's cards
        name, reason = fastest_backend(torch.device("cuda", 0))
        assert name == "torch"
        assert "not built for CUDA" in reason

    @pytest.mark.parametrize("skipped", [None, *KERNELS])
    def test_kernels_that_do_not_find_what_torch_finds_are_not_used(
        self, skipped: str | None, driver: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Lossy(Module):
            def launch(self, kernel: str, *arguments: Argument, **options: Any) -> None:
                if kernel != skipped:
                    super().launch(kernel, *arguments, **options)
                    return
                written = [argument for argument in arguments if isinstance(argument, Tensor)][-1]
                written.zero_()  # what lay there before might be right by chance

        launcher = cuda.Launcher(Lossy(emulated.CUBIN, device=0, driver=driver), most_threads=5, tile_threads=5)
        cpu = torch.device("cpu")
        assert cuda.agrees_with_torch(launcher, cpu) == (skipped is None)
        monkeypatch.setattr(cuda, "launcher", lambda device: launcher)
        assert ("do not find" in (cuda.problem(cpu) or "")) == (skipped is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCard:
    @pytest.mark.parametrize("band", [None, 1, 3, 20, 1000])
    @pytest.mark.parametrize("gamma", [1e-3, 0.1, 5.0])
    def test_a_ragged_batch_equals_the_naive_loop(self, gamma: float, band: int | None) -> None:
        cost, n, m = ragged_batch(band)
        cost[7, 1, 1] = math.nan
        value, alignment = soft_dtw_and_alignment(cost.cuda(), n, m, gamma=gamma, band=band, backend="cuda")
        check_against_reference((value.cpu(), alignment.cpu()), cost, n, m, gamma=gamma, band=band)

    @pytest.mark.parametrize("side", [700, 1024, 1500, 2500])
    @pytest.mark.parametrize("band", [None, 32])
    def test_long_sequences_equal_float64(self, side: int, band: int | None) -> None:
        cost = costs(2, side, side - 37).cuda()
        found = soft_dtw_and_alignment(cost, gamma=0.1, band=band, backend="cuda")
        exact = soft_dtw_and_alignment(cost.double(), gamma=0.1, band=band, backend="torch")
        torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=1e-5)

    def test_the_host_never_waits(self) -> None:
        cost = costs(4, 50, 60).cuda().requires_grad_()
        soft_dtw(cost, gamma=0.1, backend="cuda").sum().backward()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            soft_dtw(cost, torch.tensor([50, 3, 0, 9]), gamma=0.1, band=4, backend="cuda").sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def test_runs_on_the_current_stream_and_in_autograds_threads(self) -> None:
        cost = costs(4, 50, 60).cuda().requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            (grad,) = torch.autograd.grad(soft_dtw(cost, gamma=0.1, backend="cuda").sum(), cost)
        stream.synchronize()
        exact = expected_alignment(cost.double(), gamma=0.1, backend="torch")
        torch.testing.assert_close(grad.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_it_is_what_a_card_gets(device: str) -> None:
    assert fastest_backend(torch.device(device)) == ("cuda", "its kernels are compiled for this card")

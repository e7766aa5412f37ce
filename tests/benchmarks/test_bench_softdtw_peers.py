"""Backend "native" of soft-DTW against other people's: `pytest tests/benchmarks --benchmark-only`, extra `bench`.

Forward and backward from a given cost, float32, gamma 0.1, against the fastest peer at each shape. Two clocks: the wall
with two threads, which is what a user waits, and the processor with one, which other work on the machine disturbs less.
Two orders: all solvers by turns, where each finds the caches and the allocator as the others left them and ratios are
taken round by round; and each solver's rounds in a row, of which the medians count. pysdtw's recursion is in float64.

What training calls is the whole divergence from states (`alignment_loss`, cosine costs): against the same of the faster
peer, with its three soft-DTWs and the costs as one would write them.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from readme_table import Row, show
from torch import Tensor

from kdkit.losses.alignment import alignment_loss
from kdkit.softdtw import soft_dtw

pytest.importorskip("numba")

GAMMA, BAND = 0.1, 32
SHAPES = ((8, 128), (8, 256), (8, 512), (4, 1024))
CASES = [(batch, side, band) for band in (None, BAND) for batch, side in SHAPES]
ROUNDS = 15
STATES = ((32, 48, 512), (8, 192, 512), (2, 768, 512))
"""Rows, words of each and width of what the divergence compares."""
Solver = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """How it is measured, and what is claimed of it: the least ratio, and the geometric mean of all."""

    clock: Callable[[], float]
    num_threads: int
    in_a_row: bool
    least: float
    mean: float


WAYS = {
    "wall, 2 threads": Way(time.perf_counter, 2, in_a_row=False, least=4.0, mean=7.0),
    "wall, 2 threads, each in a row": Way(time.perf_counter, 2, in_a_row=True, least=4.0, mean=8.0),
    "processor, 1 thread": Way(time.process_time, 1, in_a_row=False, least=4.0, mean=8.0),
}


def native(cost: Tensor, band: int | None) -> Tensor:
    return soft_dtw(cost, gamma=GAMMA, band=band, backend="native")


def pysdtw(cost: Tensor, band: int | None) -> Tensor:
    """The CPU path of the CUDA implementation that most people use, as a package; 0 is no band."""
    from pysdtw.sdtw_cpu import SoftDTWcpu

    sizes = torch.tensor([cost.shape[1:]] * len(cost))
    return SoftDTWcpu.apply(cost, sizes, GAMMA, float(band or 0))


def tslearn(cost: Tensor, band: int | None) -> Tensor:
    """It writes inf into the cost outside its band, so that it has to be given a copy of its own."""
    from tslearn.metrics.soft_dtw_loss_pytorch import _SoftDTWLossPyTorch

    return _SoftDTWLossPyTorch.apply(cost, GAMMA, 0 if band is None else 2, band)


PEERS = {"pysdtw": pysdtw, "tslearn": tslearn}


def costs(batch: int, side: int) -> Tensor:
    """Random costs, made in place: memory that is free again would hide what a solver takes."""
    return torch.empty(batch, side, side).uniform_(0, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of `WAYS`, with torch's and numba's threads set as it asks."""
    import numba

    threads = WAYS[request.param].num_threads
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    yield request.param
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


def ratio(batch: int, side: int, band: int | None, way: Way) -> float:
    """The fastest peer's time over ours."""
    inputs = {name: costs(batch, side) for name in ("native", *PEERS)}
    solvers = {"native": native, **PEERS}

    def seconds(name: str) -> float:
        begin = way.clock()
        torch.autograd.grad(solvers[name](inputs[name], band).sum(), inputs[name])
        return way.clock() - begin

    if way.in_a_row:
        medians = {
            name: statistics.median([seconds(name) for _ in range(ROUNDS + 2)][2:]) for name in (*PEERS, "native")
        }
        return min(medians[name] for name in PEERS) / medians["native"]
    rounds = [{name: seconds(name) for name in solvers} for _ in range(ROUNDS + 2)][2:]
    return statistics.median(min(times[name] for name in PEERS) / times["native"] for times in rounds)


def divergence(solver: Solver, student: Tensor, teacher: Tensor) -> Tensor:
    """Of a peer's soft-DTW, from states."""
    x, y = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    cross, own_x, own_y = (solver(1 - a @ b.mT, BAND) for a, b in ((x, y), (x, x), (y, y)))
    return (cross - (own_x + own_y) / 2).sum()


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    """The same, and what a run logs of the alignment besides."""
    return alignment_loss(student, teacher, None, None, gamma=GAMMA, band=BAND, normalize="none").per_sample.sum()


@pytest.mark.benchmark(group="softdtw-peers")
class TestAgainstPeers:
    def test_is_several_times_as_fast_at_every_shape(self, benchmark: BenchmarkFixture, way: str) -> None:
        for package in PEERS:
            pytest.importorskip(package)

        def measure() -> dict[str, float]:
            return {
                f"{batch}x{side}x{side}" + (f", band {band}" if band else ""): round(
                    ratio(batch, side, band, WAYS[way]), 1
                )
                for batch, side, band in CASES
            }

        found = benchmark.pedantic(measure, rounds=1)
        mean = statistics.geometric_mean(found.values())
        benchmark.extra_info["fastest_peer_over_native"] = found
        benchmark.extra_info["geometric_mean"] = round(mean, 1)
        at = f"8x128² to 4x1024², full and band {BAND}; {way}"
        spread = f"{min(found.values()):.1f} to {max(found.values()):.1f}"
        measured = f"{mean:.1f} x as fast (geometric mean; {spread})"
        show(benchmark, Row("soft-DTW from costs", at, "the faster of pysdtw and tslearn", measured))
        assert min(found.values()) >= WAYS[way].least
        assert mean >= WAYS[way].mean

    @pytest.mark.parametrize("way", ["wall, 2 threads"], indirect=True)
    def test_the_divergence_from_states(self, benchmark: BenchmarkFixture, way: str) -> None:
        for package in PEERS:
            pytest.importorskip(package)
        clock = WAYS[way].clock

        def seconds(name: str, student: Tensor, teacher: Tensor) -> float:
            begin = clock()
            value = ours(student, teacher) if name == "kdkit" else divergence(PEERS[name], student, teacher)
            torch.autograd.grad(value, student)
            return clock() - begin

        def measure() -> dict[str, float]:
            found = {}
            for shape in STATES:
                draws = torch.Generator().manual_seed(0)
                student, teacher = (torch.randn(shape, generator=draws) for _ in range(2))
                student.requires_grad_()
                for solver in PEERS.values():
                    torch.testing.assert_close(
                        divergence(solver, student, teacher), ours(student, teacher), rtol=1e-3, atol=1e-2
                    )
                rounds = [
                    {name: seconds(name, student, teacher) for name in ("kdkit", *PEERS)} for _ in range(ROUNDS + 2)
                ][2:]
                ratios = [min(times[name] for name in PEERS) / times["kdkit"] for times in rounds]
                found["x".join(map(str, shape))] = round(statistics.median(ratios), 1)
            return found

        found = benchmark.pedantic(measure, rounds=1)
        benchmark.extra_info["fastest_peer_over_kdkit"] = found
        mean = statistics.geometric_mean(found.values())
        measured = f"{mean:.1f} x as fast (geometric mean; {min(found.values()):.1f} to {max(found.values()):.1f})"
        at = f"32x48 to 2x768 words, width 512, band {BAND}; {way}"
        show(benchmark, Row("soft-DTW divergence from states", at, "with the faster of pysdtw and tslearn", measured))
        assert min(found.values()) >= 1.5

    @pytest.mark.parametrize(("batch", "side"), SHAPES[2:])
    def test_a_band_needs_at_most_1_3_cost_matrices_of_extra_memory(
        self, benchmark: BenchmarkFixture, batch: int, side: int
    ) -> None:
        extra = benchmark.pedantic(extra_peak_bytes, args=(batch, side), rounds=1)
        matrices = extra / (4 * batch * side * side)
        benchmark.extra_info["extra_cost_matrices"] = round(matrices, 2)
        measured = f"{matrices:.2f} cost matrices, the gradient included"
        show(benchmark, Row("soft-DTW's extra memory", f"{batch}x{side}², band {BAND}", "one cost matrix", measured))
        assert matrices <= 1.3


def peak_rss_bytes() -> int:
    """Largest resident set of this program so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def extra_peak_bytes(batch: int, side: int) -> int:
    """What forward and backward add to the peak of a process that has the cost and has solved a small one."""
    root = Path(__file__).parents[2]
    command = [sys.executable, __file__, str(batch), str(side)]
    environment = {"PYTHONPATH": ":".join([str(root), *sys.path])}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


if __name__ == "__main__":
    torch.set_num_threads(2)
    for shape in ((2, 64), tuple(map(int, sys.argv[1:]))):
        cost = costs(*shape)
        before = peak_rss_bytes()
        torch.autograd.grad(native(cost, BAND).sum(), cost)
    print(peak_rss_bytes() - before)

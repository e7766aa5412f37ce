"""Backend "native" of soft-DTW against other people's: `pytest tests/benchmarks --benchmark-only`, extra `bench`.

Forward and backward from a given cost, float32, gamma 0.1. All solvers take turns in one run; the ratio is that of a
round, to the fastest peer of that round, and its median over the rounds counts. Two clocks: the wall with two threads,
which is what a user waits, and the processor with one, which other work on the machine does not disturb.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from readme_table import Row, show
from torch import Tensor

from kdkit.softdtw import soft_dtw

pytest.importorskip("numba")

GAMMA, BAND = 0.1, 32
SHAPES = ((8, 128), (8, 256), (8, 512), (4, 1024))
CASES = [(batch, side, band) for band in (None, BAND) for batch, side in SHAPES]
CLOCKS = {"wall, 2 threads": (time.perf_counter, 2), "processor, 1 thread": (time.process_time, 1)}
ROUNDS = 9
LEAST_EACH, LEAST_MEAN = 4.0, 8.0
Solver = Callable[[Tensor], Tensor]


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


@pytest.fixture(params=CLOCKS)
def clock(request: pytest.FixtureRequest) -> Iterator[Callable[[], float]]:
    """The clock, with torch's and numba's threads set as it asks."""
    import numba

    clock, threads = CLOCKS[request.param]
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    yield clock
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


def ratios(batch: int, side: int, band: int | None, clock: Callable[[], float]) -> list[float]:
    """The fastest peer's time over ours, round by round."""
    inputs = {name: costs(batch, side) for name in ("native", *PEERS)}
    solvers = {"native": native, **PEERS}

    def seconds(name: str) -> float:
        begin = clock()
        torch.autograd.grad(solvers[name](inputs[name], band).sum(), inputs[name])
        return clock() - begin

    rounds = [{name: seconds(name) for name in solvers} for _ in range(ROUNDS + 2)][2:]
    return [min(times[name] for name in PEERS) / times["native"] for times in rounds]


@pytest.mark.benchmark(group="softdtw-peers")
class TestAgainstPeers:
    def test_is_four_times_as_fast_everywhere_and_eight_on_the_mean(
        self, benchmark: BenchmarkFixture, clock: Callable[[], float], request: pytest.FixtureRequest
    ) -> None:
        for package in PEERS:
            pytest.importorskip(package)

        def measure() -> dict[str, float]:
            return {
                f"{batch}x{side}x{side}" + (f", band {band}" if band else ""): round(
                    statistics.median(ratios(batch, side, band, clock)), 1
                )
                for batch, side, band in CASES
            }

        found = benchmark.pedantic(measure, rounds=1)
        mean = statistics.geometric_mean(found.values())
        benchmark.extra_info["fastest_peer_over_native"] = found
        benchmark.extra_info["geometric_mean"] = round(mean, 1)
        at = f"8x128² to 4x1024², full and band {BAND}; {request.node.callspec.params['clock']}"
        spread = f"{min(found.values()):.1f} to {max(found.values()):.1f}"
        measured = f"{mean:.1f} x as fast (geometric mean; {spread})"
        show(benchmark, Row("soft-DTW from costs", at, "the faster of pysdtw and tslearn", measured))
        assert min(found.values()) >= LEAST_EACH
        assert mean >= LEAST_MEAN

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

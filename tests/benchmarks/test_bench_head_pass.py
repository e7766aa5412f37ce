"""Head pass against the dense path at the size of a small student: `pytest tests/benchmarks --benchmark-only`.

1,024 positions, 49,152 ids, hidden size 576 for the student and 1,024 for the teacher, float32, forward and backward.
The dense path is what one would write: both logits whole, a mixture by logaddexp, the rest left to autograd. Memory is
the growth of the resident set of a fresh process over what inputs and weights take, the weights' gradient included.
"""

import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from kdkit.losses import linear_divergence
from kdkit.teacher.signal import Head, LiveSignal

NUM_POSITIONS, NUM_IDS, STUDENT_SIZE, TEACHER_SIZE = 1024, 49_152, 576, 1024
ALPHA = 0.1
PATHS = ("dense", "chunked")
EVERY = pytest.mark.parametrize("path", PATHS)


class Scene:
    """Inputs of both paths."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student = torch.empty(NUM_POSITIONS, STUDENT_SIZE).normal_(generator=generator).requires_grad_()
        self.weight = nn.Parameter(torch.empty(NUM_IDS, STUDENT_SIZE).normal_(0, 0.02, generator=generator))
        self.teacher = torch.empty(NUM_POSITIONS, TEACHER_SIZE).normal_(generator=generator)
        self.teacher_weight = torch.empty(NUM_IDS, TEACHER_SIZE).normal_(0, 0.02, generator=generator)

    def dense(self) -> Tensor:
        log_q = (self.student @ self.weight.T).log_softmax(-1)  # (N, V)
        log_p = (self.teacher @ self.teacher_weight.T).log_softmax(-1)  # (N, V)
        log_m = torch.logaddexp(log_p + math.log(1 - ALPHA), log_q + math.log(ALPHA))  # (N, V)
        return (log_q.exp() * (log_q - log_m)).sum()

    def chunked(self) -> Tensor:
        signal = LiveSignal(self.teacher, Head(self.teacher_weight))
        return linear_divergence("skew_reverse_kl", self.student, Head(self.weight), signal, alpha=ALPHA)

    def step(self, path: str) -> tuple[float, float]:
        """Value and norm of the weight's gradient."""
        self.student.grad = self.weight.grad = None
        total = {"dense": self.dense, "chunked": self.chunked}[path]()
        total.backward()
        return total.item(), self.weight.grad.norm().item()


def peak_rss_bytes() -> int:
    """Largest resident set of this program so far; getrusage would count what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def extra_peak_bytes(path: str) -> int:
    """What a step adds to the peak, in a process of its own."""
    root = Path(__file__).parents[2]
    command = [sys.executable, __file__, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env={"PYTHONPATH": str(root)})
    return int(done.stdout)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


@pytest.mark.benchmark(group="head-pass-1024x49152")
class TestHeadPass:
    @EVERY
    def test_forward_and_backward(self, benchmark: BenchmarkFixture, scene: Scene, path: str) -> None:
        value, norm = benchmark.pedantic(scene.step, args=(path,), rounds=3, warmup_rounds=1)
        assert (value, norm) == pytest.approx((250.6, 2.730), rel=1e-3)

    def test_is_no_slower_than_the_dense_path(self, benchmark: BenchmarkFixture, scene: Scene) -> None:
        def processor_seconds(path: str) -> float:
            begin = time.process_time()  # other processes on the machine do not count
            scene.step(path)
            return time.process_time() - begin

        def measure() -> float:
            rounds = [[processor_seconds(path) for path in PATHS] for _ in range(3)]
            return statistics.median(chunked / dense for dense, chunked in rounds)

        ratio = benchmark.pedantic(measure, rounds=1)
        benchmark.extra_info["chunked_over_dense_processor_seconds"] = round(ratio, 3)
        assert ratio < 1.1

    def test_takes_a_fifth_of_the_extra_memory(self, benchmark: BenchmarkFixture) -> None:
        measured = benchmark.pedantic(lambda: {path: extra_peak_bytes(path) for path in PATHS}, rounds=1)
        benchmark.extra_info["extra_peak_bytes"] = measured
        assert measured["chunked"] <= measured["dense"] / 5


if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs = Scene()
    before = peak_rss_bytes()
    inputs.step(sys.argv[1])
    print(peak_rss_bytes() - before)

"""What the student's own text costs: a distillation run with it against the same run without.

The embedded pair, 32 rows a step, skew reverse KL; half of the batches are the student's text, a quarter freshly
generated with 32 tokens each, judged by the whole guard, a quarter replayed. The start is random and the student never
ends a text: every one has its full length. Processor seconds of one thread, so that a busy machine does not count.
"""

import statistics
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from kdkit.config import load_config
from kdkit.training.metrics import MetricsFile
from kdkit.training.run import run_distillation

NUM_STEPS = 48
HALF = "{mode: mixed, threshold: 0.5, replay_ratio: constant, capacity: 32, max_new_tokens: 32, collapse: null}"
ANYTHING = "{require_end: false, max_repeat_fraction: 1, min_teacher_logprob: -1000}"


def run(folder: Path, *overrides: str) -> float:
    """Processor seconds of the training steps."""
    tree = {
        "preset": "demo",
        "objective": {"kd": {"loss": "skew_reverse_kl"}},
        "optim": {"max_steps": NUM_STEPS},
        "data": {"test_rows": 1, "validation_rows": 1},
        "evaluation": {"every_steps": 1000, "generate_rows": 0, "max_new_tokens": 1},
        "logging": {"every_steps": NUM_STEPS},
        "threads": 1,
    }
    begin = time.process_time()
    run_distillation(load_config(tree, overrides), folder)
    return time.process_time() - begin


@pytest.mark.benchmark(group="rollout")
def test_costs_at_most_six_tenths_of_the_run_without(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    torch.set_num_threads(1)

    def measure() -> float:
        ratios = []
        for number in range(3):
            without = run(tmp_path / f"without-{number}")
            with_text = run(tmp_path / f"with-{number}", f"rollout={HALF}", f"rollout.guard={ANYTHING}")
            ratios.append(with_text / without)
        return statistics.median(ratios)

    ratio = benchmark.pedantic(measure, rounds=1)
    rows = [row for row in MetricsFile(tmp_path / "with-0" / "metrics.jsonl").rows() if row["kind"] == "train"]
    benchmark.extra_info["with_over_without_processor_seconds"] = round(ratio, 3)
    benchmark.extra_info["fresh_fraction"] = rows[-1]["rollout/fresh_fraction"]
    benchmark.extra_info["mean_tokens"] = rows[-1]["rollout/mean_tokens"]
    assert rows[-1]["rollout/fresh_fraction"] >= 0.25
    assert ratio <= 1.6

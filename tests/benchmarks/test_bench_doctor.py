"""`kdkit doctor` on long logs, as a command: `pytest tests/benchmarks --benchmark-only -k doctor`.

900,000 lines of text, 36 a step, every one of them with numbers; and 25,000 rows of metrics.jsonl with 20 figures each.
Processor seconds of the whole command count, imports included: other processes on the machine do not.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

NUM_STEPS = 25_000
PARTS = ("kd", "lm", "dtw")


def text_lines() -> Iterator[str]:
    """As a trainer writes that prints every tensor at every step."""
    for step, (kd, lm, noise) in enumerate(np.random.default_rng(0).random((NUM_STEPS, 3))):
        done = step / NUM_STEPS
        yield f"[CURRICULUM] Step {step} ({done:.1%}): kd=0.700, feat={done:.3f}, attn=0.000, layer=0.000, contr=0.000"
        yield f"Step {step}: KD Raw: {30 + 8 * kd:.4f}, Temperature²: {9 - 3 * done:.1f}"
        yield f"[TOTAL] Loss: {21 + 5 * kd + lm:.4f}, Components: 6"
        for name, value in (("kd_loss", 30 + kd), ("routing_feature_loss", 150 + lm), ("lm_loss", 1 + lm)):
            yield f"  {name}: {value:.4f}"
        for layer in range(14):
            yield f"[DEBUG] layer {layer} hidden mean={kd:.6f} std={noise:.6f} shape=torch.Size([4, 256, 576])"
            yield f"[DEBUG] attention {layer}: entropy {5 * lm:.4f} max {noise:.4f} dtype=torch.float16"
        yield f"Epoch 1:  50%|###   | {step}/{NUM_STEPS} [02:05<3:12:05, {1 + kd:.2f}it/s, loss={kd:.4f}, lr=0.00e+00]"
        yield f"grad_norm: {3 * noise:.4f}, clip=1.0, lr={1e-5 * done:.3e}"


def metrics_lines() -> Iterator[str]:
    """As kdkit writes."""
    for step, (loss, noise) in enumerate(np.random.default_rng(0).random((NUM_STEPS, 2)).tolist(), 1):
        row: dict[str, object] = {"kind": "train", "stage": "distill", "step": step, "loss": 4 - loss, "epoch": 1.5}
        row |= {"tokens": 1800 + noise, "seconds": 0.3 + noise, "tokens_per_second": 5000 + noise, "grad_norm": noise}
        row |= {f"{kind}/{name}": loss + noise for kind in ("part", "weighted", "weight") for name in PARTS}
        row |= {"kd_temperature": 2.0, "learning_rate": 1e-3, "update_norm": 0.01 + noise, "memory/peak_gib": 9.123456}
        yield json.dumps(row)


def processor_seconds(log: Path) -> float:
    """Of the command on a log."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "kdkit", "doctor", str(log)], capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.benchmark(group="doctor")
@pytest.mark.parametrize(
    ("name", "lines", "most_seconds"), [("log.txt", text_lines, 5.0), ("metrics.jsonl", metrics_lines, 1.0)]
)
def test_a_long_log(benchmark: BenchmarkFixture, tmp_path: Path, name: str, lines, most_seconds: float) -> None:
    log = tmp_path / name
    with log.open("w", encoding="utf-8") as file:
        num_lines = sum(1 for line in lines() if file.write(f"{line}\n"))
    seconds = benchmark.pedantic(lambda: min(processor_seconds(log) for _ in range(3)), rounds=1)
    benchmark.extra_info |= {"lines": num_lines, "processor_seconds": round(seconds, 2)}
    assert num_lines == {"log.txt": 900_000, "metrics.jsonl": NUM_STEPS}[name]
    assert seconds <= most_seconds

"""A training pass without padding against the same one with it: `pytest tests/benchmarks --benchmark-only`.

Rows of 64 to 256 tokens, evenly spread, through a body in SmolLM-135M's shape, forward and backward. Both take turns.
"""

import statistics
import time

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from readme_table import Row, show
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kdkit.data import DistillCollator
from kdkit.data.batch import Batch
from kdkit.loading.backbone import backbone_states
from kdkit.loading.heads import allow_packing
from kdkit.memory.shapes import shape_folder

ROWS, SHORTEST, LONGEST, ROUNDS = 8, 64, 256, 5
LEAST = 1.3


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(shape_folder("smollm-135m")))
    assert allow_packing(model)
    return model


@pytest.fixture
def batch() -> Batch:
    draws = np.random.default_rng(0)
    lengths = np.linspace(SHORTEST, LONGEST, ROWS).astype(int)
    draws.shuffle(lengths)
    ids = [draws.integers(2, 1000, length).tolist() for length in lengths]
    rows = [{"input_ids": row, "prompt_length": 16, "unit_ids": [-1] * len(row), "row_id": 0} for row in ids]
    return DistillCollator(0)(rows)


def seconds(model: PreTrainedModel, batch: Batch, tokens: torch.Tensor | None) -> float:
    """Of the wall, for forward and backward."""
    model.zero_grad()
    began = time.perf_counter()
    states = backbone_states(model, batch["input_ids"], None, tokens=tokens).last
    states.flatten(0, 1)[batch["positions"]].square().sum().backward()
    return time.perf_counter() - began


@pytest.mark.benchmark(group="packing")
def test_leaving_padding_out_saves_about_its_share(
    benchmark: BenchmarkFixture, model: PreTrainedModel, batch: Batch
) -> None:
    def measure() -> float:
        turns = [(seconds(model, batch, None), seconds(model, batch, batch["tokens"])) for _ in range(ROUNDS + 1)]
        return statistics.median(padded / packed for padded, packed in turns[1:])

    ratio = benchmark.pedantic(measure, rounds=1)
    padding = 1 - len(batch["tokens"]) / batch["input_ids"].numel()
    at = f"135M body, {ROWS} rows of {SHORTEST} to {LONGEST} tokens, {padding:.0%} padding; wall, 2 threads"
    show(benchmark, Row("a training pass without padding", at, "with padding", f"{ratio:.1f} x as fast"))
    assert ratio >= LEAST

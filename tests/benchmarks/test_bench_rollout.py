"""What the student's own text costs: a distillation run with it against the same run without, and written otherwise.

The embedded pair, 32 rows a step, skew reverse KL; half of the batches are the student's text, a quarter freshly
generated with 32 tokens each, judged by the whole guard, a quarter replayed. The start is random and the student never
ends a text: every one has its full length. Processor seconds of one thread, so that a busy machine does not count.

kdkit's own loop against transformers' `generate`: random weights in the shape of SmolLM-135M answer 32 prompts of 20 to
60 tokens; one id in twenty ends an answer, so that answers have 20 tokens on average and 64 at most. Both write the
same. Seconds of the wall, two threads, by turns.
"""

import statistics
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from readme_table import Row, show
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kdkit.config import demo_folder, load_config
from kdkit.evaluation import Answer, GenerationSettings, generate_answers, generation
from kdkit.loading.heads import allow_packing
from kdkit.memory.shapes import shape_folder
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


@pytest.mark.benchmark(group="rollout")
def test_answers_of_uneven_lengths(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(shape_folder("smollm-135m"))).eval()
    assert allow_packing(model)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder() / "teacher")
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 60, (32,), generator=draws).tolist()
    prompts = [torch.randint(2, 1000, (length,), generator=draws).tolist() for length in lengths]
    settings = GenerationSettings(max_new_tokens=64, sampling_temperature=1.0)
    monkeypatch.setattr(generation, "end_of_text_ids", lambda *_: list(range(1, model.config.vocab_size, 20)))
    own = generation.can_write

    def seconds(*, by_generate: bool) -> tuple[float, list[Answer]]:
        monkeypatch.setattr(generation, "can_write", (lambda *_: False) if by_generate else own)
        begin = time.perf_counter()
        answers = generate_answers(model, tokenizer, prompts, settings)
        return time.perf_counter() - begin, answers

    def measure() -> float:
        ratios = []
        for _ in range(8):
            (theirs, expected), (ours, found) = seconds(by_generate=True), seconds(by_generate=False)
            assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
            ratios.append(theirs / ours)
        return statistics.median(ratios[1:])

    ratio = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["generate_over_kdkit"] = round(ratio, 2)
    at = "135M, 32 prompts, answers of 21 tokens on average and 64 at most; wall, 2 threads"
    show(benchmark, Row("sampled answers", at, "transformers' generate", f"{ratio:.1f} x as fast"))
    assert ratio >= 1.2

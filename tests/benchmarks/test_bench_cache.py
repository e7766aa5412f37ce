"""A training step from a cached teacher against a live one: `pytest tests/benchmarks --benchmark-only -k cache`.

Llamas on the demo's rows and 1,024 ids, float32, one thread; the teacher has 5 times the student's parameters. A step
is the teacher's signal, the student's forward and backward pass and AdamW, at forward KL with or without DTW.
"""

import os
import statistics
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tiny import save_llama, tiny_config
from transformers import AutoTokenizer

from kdkit.data import DistillCollator, encode_rows, load_rows
from kdkit.loading import load_model
from kdkit.teacher.cache import CachedTeacher, open_cache
from kdkit.teacher.cache.shards import check_files
from kdkit.teacher.sources import LiveTeacher, TeacherSource
from kdkit.training.caching import write_teacher_cache
from kdkit.training.model import DistillModel
from kdkit.training.objective import Moment, Objective

OBJECTIVES = {"fkl": {"kd": {"weight": 1.0}}, "fkl-dtw": {"kd": {"weight": 1.0}, "dtw": {"weight": 1.0}}}
NUM_STEPS = 8


class Scene:
    """One student, its batches, and both teachers."""

    def __init__(self, folder, objective: str) -> None:
        torch.set_num_threads(1)
        pair = {
            "teacher": str(save_llama(folder / "teacher", hidden_size=256, num_layers=3, seed=1)),
            "student": str(save_llama(folder / "student", hidden_size=128, num_layers=2, seed=2)),
        }
        config = tiny_config(pair, "data.train_rows=64", objective=OBJECTIVES[objective])
        self.written = write_teacher_cache(config, folder / "cache")
        loaded = load_rows(config.data.train, template="plain", limit=64)
        tokenizer = AutoTokenizer.from_pretrained(pair["student"])
        rows = encode_rows(loaded, tokenizer, max_length=160, max_prompt_length=128).dataset
        collator = DistillCollator(tokenizer.pad_token_id)
        self.batches = [collator([rows[i] for i in range(start, start + 8)]) for start in range(0, 64, 8)]
        live = LiveTeacher(load_model(pair["teacher"], dtype=torch.float32, device="cpu"))
        self.teachers = {"live": live, "cached": CachedTeacher(open_cache(folder / "cache"))}
        student = load_model(pair["student"], dtype=torch.float32, device="cpu", trainable=True)
        self.size_ratio = live.model.num_parameters() / student.num_parameters()
        self.model = DistillModel(student, Objective(config.objective), teacher=live.shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def processor_seconds(self, teacher: TeacherSource) -> float:
        """Of one pass over the batches; other processes on the machine do not count."""
        begin = time.process_time()
        for batch in self.batches:
            self.model(batch, signal=teacher(batch), moment=Moment(0, NUM_STEPS))["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - begin


@pytest.mark.benchmark(group="cached-teacher")
class TestCachedTeacher:
    @pytest.mark.parametrize("objective", list(OBJECTIVES))
    def test_a_step_takes_at_most_a_share_of_a_live_one(self, benchmark: BenchmarkFixture, tmp_path, objective) -> None:
        scene = Scene(tmp_path, objective)

        def measure() -> float:
            rounds = [{name: scene.processor_seconds(t) for name, t in scene.teachers.items()} for _ in range(7)]
            return statistics.median(seconds["live"] / seconds["cached"] for seconds in rounds[1:])

        speedup = benchmark.pedantic(measure, rounds=1)
        benchmark.extra_info |= {
            "live_over_cached_processor_seconds": round(speedup, 2),
            "teacher_over_student_parameters": round(scene.size_ratio, 1),
            "bytes_per_token": round(scene.written.bytes_per_token),
        }
        assert scene.size_ratio >= 4
        assert speedup >= {"fkl": 1.8, "fkl-dtw": 1.4}[objective]

    def test_checksums_are_read_at_the_speed_of_a_disk(self, benchmark: BenchmarkFixture, tmp_path) -> None:
        from kdkit.teacher.cache.manifest import write_whole

        facts = {"file": write_whole(tmp_path / "file", os.urandom(2**27))}
        num_bytes = benchmark(check_files, tmp_path, facts)
        speed = num_bytes / benchmark.stats.stats.median / 1e6
        benchmark.extra_info["megabytes_per_second"] = round(speed)
        assert speed > 200

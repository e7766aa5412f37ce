"""The demo's plan: three students of one start and length, for one tokenizer and for two."""

import pytest

from kdkit.config import load_config
from kdkit.demo import NAMES, ONE_TOKENIZER, TWO_TOKENIZERS, _plan


@pytest.mark.parametrize(
    ("pair", "teacher", "student"),
    [(ONE_TOKENIZER, "teacher", "student"), (TWO_TOKENIZERS, "moe_teacher", "deep_student")],
    ids=["one tokenizer", "two tokenizers"],
)
class TestPlan:
    def test_students_differ_in_what_they_learn_from_alone(self, pair, teacher, student):
        configs = {name: load_config(tree) for name, tree in _plan(pair).items()}
        assert list(configs) == list(NAMES)
        for config in configs.values():
            assert config.teacher.path.endswith(f"/{teacher}")
            assert config.student.path.endswith(f"/{student}")
            assert config.student.from_scratch
            assert config.optim == configs["sft"].optim
            assert config.optim.max_steps == pair.num_steps
        assert configs["sft"].data.train_rows == 500
        assert configs["kd"].data.train.endswith("teacher_answers.jsonl")
        assert configs["kd"].data == configs["kd_dtw"].data

    def test_only_distillation_asks_the_teacher(self, pair, teacher, student):
        objectives = {name: load_config(tree).objective for name, tree in _plan(pair).items()}
        assert {name: objective.needs_teacher for name, objective in objectives.items()} == {
            "sft": False,
            "kd": True,
            "kd_dtw": True,
        }
        assert objectives["kd"].weights["dtw"].largest == 0 < objectives["kd_dtw"].weights["dtw"].largest

    def test_the_student_across_tokenizers_reads_by_its_own(self, pair, teacher, student):
        config = load_config(_plan(pair)["kd"])
        assert (config.student.tokenizer is not None) == (pair is TWO_TOKENIZERS)

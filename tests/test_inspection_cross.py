"""A finished run across tokenizers looked at: each model reads and writes by its own."""

import pytest

from kdkit.config import load_config
from kdkit.errors import UserError
from kdkit.inspection import alignment_of, compare_answers, load_run_models, read_positions
from kdkit.training.run import run_distillation


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cross")
    rows = {"train_rows": 8, "validation_rows": 4, "test_rows": 4}
    tree = {"preset": ["demo-moe", "fkl-dtw"], "data": rows, "optim": {"max_steps": 1, "batch_size": 4}, "threads": 1}
    run_distillation(load_config(tree, ["evaluation.generate_rows=0"]), folder / "run")
    return load_run_models(folder / "run")


PROMPT = "Put these in order, quickest first.\nItems: train 22 minutes, boat 35 minutes, taxi 49 minutes\nAnswer:\n"
ANSWER = "First comes the train at 22 minutes, second the boat at 35, and last the taxi at 49."


def test_the_teacher_answers_by_its_own_tokenizer(models):
    said = compare_answers(models, PROMPT.removesuffix("Answer:\n").strip())
    assert said["teacher"].startswith("The quickest is the")
    assert "minutes" in said["teacher"]


def test_words_are_aligned_across_tokenizers(models):
    found = alignment_of(models, PROMPT, ANSWER)
    assert found.matrix.shape == (len(ANSWER.split()),) * 2
    assert found.student_units == found.teacher_units == ANSWER.split()


def test_next_tokens_of_two_vocabularies_are_not_laid_side_by_side(models):
    with pytest.raises(UserError, match="have different tokenizers, so that their next tokens cannot be laid"):
        read_positions(models, PROMPT, ANSWER)

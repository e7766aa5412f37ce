"""A finished run looked at closely: what is shown is what training saw."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.errors import UserError
from kdkit.evaluation import GenerationSettings, generate_answers
from kdkit.inspection import (
    alignment_of,
    choose_example,
    compare_answers,
    load_run_models,
    read_units,
    replayed_texts,
)
from kdkit.training.run import run_distillation

OBJECTIVE = {"kd": {"weight": 1.0}, "dtw": {"weight": 0.5, "band": 4}}


def word_means(model, tokenizer, prompt, answer):
    """Mean last hidden state of each word between spaces, and the words, by a loop over tokens."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    hidden = model.model(torch.tensor([start + encoded["input_ids"]])).last_hidden_state[0, len(start) :]
    words = answer.split()
    members = [[] for _ in words]
    for state, (_, end) in zip(hidden, encoded["offset_mapping"], strict=True):
        members[len(answer[:end].split()) - 1].append(state)
    return torch.stack([torch.stack(states).mean(0) for states in members]), words


class TestLoadRunModels:
    def test_before_is_where_the_run_began_and_student_where_it_ended(self, aligned_models, aligned_run, tiny_pair):
        for name, folder in (("before", tiny_pair["student"]), ("student", aligned_run.model)):
            saved = load_file(f"{folder}/model.safetensors")
            held = aligned_models.students[name].state_dict()
            assert all(torch.equal(held[key], value) for key, value in saved.items()), name
        assert aligned_models.teacher.config.hidden_size == 24
        assert not any(
            p.requires_grad for m in (aligned_models.teacher, *aligned_models.students.values()) for p in m.parameters()
        )

    def test_a_start_from_random_weights_is_made_again(self, tiny_pair, tmp_path):
        config = tiny_config(tiny_pair, "student.from_scratch=true", max_steps=1, learning_rate=1e-9)
        found = load_run_models(run_distillation(config, tmp_path / "run").folder)
        before, after = (found.students[name].state_dict() for name in ("before", "student"))
        assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)

    def test_no_random_draw_outside_is_disturbed(self, aligned_run):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        load_run_models(aligned_run.folder)
        assert torch.equal(torch.rand(3), expected)

    def test_a_folder_without_a_finished_run_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="holds no finished run"):
            load_run_models(tmp_path)


class TestCompareAnswers:
    def test_each_model_answers_the_prompt_in_the_runs_template(self, aligned_models):
        row = compare_answers(aligned_models, "  Say hello.\n")
        assert list(row) == ["prompt", "before", "student", "teacher"]
        assert row["prompt"] == "Say hello."
        settings = GenerationSettings(max_new_tokens=4)
        for name, model in {**aligned_models.students, "teacher": aligned_models.teacher}.items():
            (answer,) = generate_answers(model, aligned_models.tokenizer, ["Say hello.\nAnswer:\n"], settings)
            assert row[name] == answer.text
        assert row["teacher"] != row["before"]

    @pytest.mark.parametrize("prompt", ["", " \n"])
    def test_an_empty_prompt_is_refused(self, aligned_models, prompt):
        with pytest.raises(UserError, match="prompt is empty"):
            compare_answers(aligned_models, prompt)

    def test_a_prompt_that_leaves_no_room_is_refused(self, aligned_models):
        with pytest.raises(UserError, match="positions"):
            compare_answers(aligned_models, "word " * 600)


class TestChooseExample:
    def test_prefers_words_then_few_of_them_then_the_same_words_at_other_places(self):
        def row(teacher, reference="on Monday Ada sails a boat"):
            return {"teacher": teacher, "references": [reference]}

        shifted = row("in the morning Ada sails a boat")
        partly, same, other = row("now on Monday we ate"), row("on Monday Ada sails a boat"), row("not one word of it")
        long, blank, left_out = row("on Monday Ada sails a boat " * 6), row(" \n"), row(None)
        assert choose_example([left_out, blank, long, other, same, partly, shifted]) is shifted
        assert choose_example([left_out, blank, long, other, same, partly]) is partly
        assert choose_example([left_out, blank, long, other, same]) is other  # as good as `same`, and before it
        assert choose_example([left_out, blank, long]) is long
        assert choose_example([blank, left_out]) is blank


class TestAlignmentOf:
    def test_before_is_what_the_first_step_logged(self, aligned_models, aligned_run, trained_row):
        first = json.loads((aligned_run.folder / "metrics.jsonl").read_text().splitlines()[0])
        assert (first["kind"], first["step"]) == ("train", 1)
        found = alignment_of(aligned_models, *trained_row, student="before")
        assert found.cost / found.diagonal_cost == pytest.approx(first["dtw/to_diagonal_ratio"], rel=1e-5)
        assert found.off_diagonal_fraction == pytest.approx(first["dtw/off_diagonal_fraction"], rel=1e-4)

    def test_the_diagonal_costs_the_mean_cosine_distance_of_equal_words(
        self, aligned_models, aligned_run, tiny_pair, trained_row
    ):
        tokenizer = AutoTokenizer.from_pretrained(tiny_pair["teacher"])
        student, teacher = (AutoModelForCausalLM.from_pretrained(p) for p in (aligned_run.model, tiny_pair["teacher"]))
        with torch.no_grad():
            s, words = word_means(student, tokenizer, *trained_row)
            t, _ = word_means(teacher, tokenizer, *trained_row)
        projected = s @ load_file(aligned_run.model / "adapters.safetensors")["projector.weight"].T
        expected = (1 - torch.cosine_similarity(projected, t)).mean().item()
        found = alignment_of(aligned_models, *trained_row)
        assert found.diagonal_cost == pytest.approx(expected, rel=1e-4)
        assert found.student_units == found.teacher_units == words

    def test_every_unit_of_both_sides_is_passed(self, aligned_models, trained_row):
        prompt, answer = trained_row
        found = alignment_of(aligned_models, prompt, answer, teacher_answer="A shorter answer.")
        assert found.teacher_units == ["A", "shorter", "answer."]
        assert found.matrix.shape == (len(answer.split()), 3)
        assert (found.matrix.sum(0) >= 1 - 1e-4).all()
        assert (found.matrix.sum(1) >= 1 - 1e-4).all()
        assert found.matrix[0, 0] == pytest.approx(1, abs=1e-4)
        assert found.matrix[-1, -1] == pytest.approx(1, abs=1e-4)

    def test_the_finding_names_both_costs(self, aligned_models, trained_row):
        found = alignment_of(aligned_models, *trained_row)
        assert f"soft-DTW costs {found.cost:.2f} a unit, the diagonal {found.diagonal_cost:.2f}" in found.finding
        assert np.isfinite([found.cost, found.diagonal_cost]).all()

    @pytest.mark.parametrize("answer", [" ", "\n"])
    def test_an_answer_without_words_is_refused(self, aligned_models, trained_row, answer):
        with pytest.raises(UserError, match=r"no words to align|no row"):
            alignment_of(aligned_models, trained_row[0], answer)

    def test_a_run_without_a_dtw_term_is_refused(self, tiny_pair, tmp_path):
        config = tiny_config(tiny_pair, objective={"lm": {"weight": 1.0}}, max_steps=1)
        found = load_run_models(run_distillation(config, tmp_path / "run").folder)
        with pytest.raises(UserError, match="aligned nothing"):
            alignment_of(found, "Q\nAnswer:\n", "An answer.")


class TestReplayedTexts:
    def test_newest_first_with_their_age(self, tiny_pair, tmp_path):
        free = ("rollout.mode=mixed", "rollout.threshold=1", "rollout.guard=null", "rollout.collapse=null")
        config = tiny_config(tiny_pair, *free, "rollout.max_new_tokens=4", objective=OBJECTIVE, max_steps=2)
        texts = replayed_texts(run_distillation(config, tmp_path / "run").folder)
        assert [text["age_steps"] for text in texts] == [1] * 8 + [2] * 8
        assert all(text["prompt"].endswith("Answer:\n") for text in texts)

    def test_a_run_without_student_text_has_none(self, aligned_run, tmp_path):
        with pytest.raises(UserError, match="has no replay buffer"):
            replayed_texts(aligned_run.folder)
        with pytest.raises(UserError, match="holds no run"):
            replayed_texts(tmp_path)


class TestReadUnits:
    def test_gamma_and_band_are_the_runs_unless_told(self, aligned_models, trained_row):
        units = read_units(aligned_models, *trained_row)
        assert (units.gamma, units.band) == (0.1, 4)
        own = alignment_of(aligned_models, *trained_row)
        assert np.array_equal(own.matrix, units.align(gamma=0.1, band=4).matrix)
        free = alignment_of(aligned_models, *trained_row, gamma=5.0, band=None)
        assert np.array_equal(free.matrix, units.align(gamma=5.0, band=None).matrix)
        assert free.off_diagonal_fraction > own.off_diagonal_fraction

    def test_no_mass_lies_outside_the_band(self, aligned_models, trained_row):
        found = read_units(aligned_models, *trained_row).align(gamma=10.0, band=1)
        i, j = np.indices(found.matrix.shape)
        assert found.matrix[abs(i - j) > 1].max() == 0
        assert found.matrix[abs(i - j) == 1].min() > 0

    def test_a_vanishing_gamma_leaves_one_path(self, aligned_models, trained_row):
        found = read_units(aligned_models, *trained_row).align(gamma=1e-5, band=None)
        assert np.isclose(found.matrix, found.matrix.round(), atol=1e-3).all()

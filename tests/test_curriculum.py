"""A curriculum before it is trained, the runs of an ablation, and what their differences say."""

import math

import pytest
from tiny import tiny_config

from kdkit.config import load_config
from kdkit.errors import UserError
from kdkit.inspection import ablation_rows, planned_rows
from kdkit.runtime import preflight
from kdkit.session import Session
from kdkit.session.arms import LOG_FILE, run_arms


class TestPlannedRows:
    def test_the_seeds_schedule_at_its_corners(self):
        rows = planned_rows(load_config({"preset": ["demo-moe", "student-aware"]}), num_steps=100)
        assert [row["step"] for row in rows] == list(range(101))
        names = ("kd", "lm", "hidden", "attention", "layerwise", "contrastive")
        found = {
            step: tuple(rows[step][f"weight/{name}"] for name in names) for step in (0, 10, 25, 40, 55, 70, 85, 100)
        }
        expected = {
            0: (0.7, 0.3, 0, 0, 0, 0),
            10: (0.7, 0.3, 0, 0, 0, 0),
            25: (0.7, 0.3, 0.05, 0.05, 0, 0),
            40: (0.7, 0.3, 0.1, 0.1, 0, 0),
            55: (0.7, 0.3, 0.1, 0.1, 0.025, 0),
            70: (0.7, 0.3, 0.1, 0.1, 0.05, 0),
            85: (0.7, 0.3, 0.1, 0.1, 0.05, 0.025),
            100: (0.7, 0.3, 0.1, 0.1, 0.05, 0.05),
        }
        for step, weights in expected.items():
            assert found[step] == pytest.approx(weights, abs=1e-12)
        assert "weight/dtw" not in rows[0]

    def test_kds_factor_is_the_temperature_squared_or_one(self):
        tree = {"preset": ["demo-moe", "student-aware"]}
        scaled = planned_rows(load_config(tree), num_steps=4)
        assert [(row["kd_temperature"], row["kd_scale"]) for row in scaled[::2]] == [
            (2, 4),
            (1.75, 3.0625),
            (1.5, 2.25),
        ]
        plain = planned_rows(load_config(tree, ["objective.kd.temperature_scaling=none"]), num_steps=4)
        assert {row["kd_scale"] for row in plain} == {1.0}


class TestAblationRows:
    def test_differences_are_paired_by_seed_whatever_the_order(self):
        """Unpaired, seeds of 1, 5 and 9 would hide a constant difference of 2."""
        full = {10: {"rouge_l": 1.0}, 20: {"rouge_l": 5.0}, 30: {"rouge_l": 9.0}}
        without = {30: {"rouge_l": 7.5}, 10: {"rouge_l": -1.0}, 20: {"rouge_l": 2.5}}
        (row,) = ablation_rows({"full": full, "kd": without})
        assert (row["without"], row["num_seeds"], row["rouge_l"]) == ("kd", 3, pytest.approx(-2.0))
        half = 4.302653 * 0.5 / math.sqrt(3)  # Student's t, two degrees of freedom; differences -2, -2.5, -1.5
        assert row["rouge_l_low"] == pytest.approx(-2 - half, abs=1e-4)
        assert row["rouge_l_high"] == pytest.approx(-2 + half, abs=1e-4)
        assert "cross_entropy" not in row

    def test_one_seed_has_no_interval(self):
        (row,) = ablation_rows({"full": {10: {"cross_entropy": 2.0}}, "lm": {10: {"cross_entropy": 2.5}}})
        assert row["cross_entropy"] == 0.5
        assert math.isnan(row["cross_entropy_low"])

    def test_without_full_runs_or_a_common_seed_it_says_so(self):
        with pytest.raises(UserError, match="no runs named 'full' to compare with; it has kd"):
            ablation_rows({"kd": {10: {}}})
        with pytest.raises(UserError, match="without kd share no seed"):
            ablation_rows({"full": {10: {}}, "kd": {20: {}}})


class TestRunArms:
    @pytest.fixture
    def session(self):
        return Session(preflight(), is_kaggle=False, is_batch=True, has_internet=False, hours=10_000)

    @pytest.fixture
    def arms(self, tiny_pair):
        return {
            "full": tiny_config(tiny_pair, max_steps=1),
            "lm": tiny_config(tiny_pair, "objective.lm.weight=0", max_steps=1),
        }

    def test_each_arm_has_each_seed_and_a_second_time_nothing_is_trained(self, arms, session, tmp_path, capsys):
        results = run_arms(arms, tmp_path / "arms", session=session, num_seeds=2)
        assert {name: list(runs) for name, runs in results.items()} == {"full": [10, 20], "lm": [10, 20]}
        assert results["lm"][20].folder == tmp_path / "arms" / "lm" / "seed-20"
        said = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in said] == [
            "1/4 full, seed 10",
            "2/4 lm, seed 10",
            "3/4 full, seed 20",
            "4/4 lm, seed 20",
        ]
        log = tmp_path / "arms" / LOG_FILE
        assert log.read_text().count("optimizer steps, warm-up") == 4
        again = run_arms(arms, tmp_path / "arms", session=session, num_seeds=2)
        assert again["full"][10].evaluations == results["full"][10].evaluations
        assert log.read_text().count("optimizer steps, warm-up") == 4

    def test_when_the_time_of_a_batch_is_over_it_gives_what_is_done_and_says_how_to_go_on(self, arms, tmp_path, capsys):
        late = Session(preflight(), is_kaggle=False, is_batch=True, has_internet=False, hours=1e-9)
        assert run_arms(arms, tmp_path / "arms", session=late) == {"full": {}, "lm": {}}
        assert "over after 0 of 2 runs. Run the notebook again" in capsys.readouterr().out

    def test_nothing_to_run_is_refused(self, session, tmp_path):
        with pytest.raises(UserError, match="0 kinds of runs with 1 seeds"):
            run_arms({}, tmp_path, session=session)

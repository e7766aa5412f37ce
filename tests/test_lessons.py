"""What the post-mortems said: every lesson is of a run, whole, and names checks that exist."""

import re

import pytest

from kdkit.doctor import RUN_CHECKS
from kdkit.doctor.config import CONFIG_CHECKS
from kdkit.doctor.lessons import LESSONS, RUNS, Lesson


class TestLessons:
    @pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: f"{lesson.run}: {lesson.said[:30]}")
    def test_is_whole_and_its_checks_exist(self, lesson: Lesson) -> None:
        assert lesson.run in RUNS
        assert lesson.said.endswith(".")
        assert lesson.true.endswith(".")
        assert set(lesson.codes) <= {check.code for check in (*CONFIG_CHECKS, *RUN_CHECKS)}

    def test_are_in_the_order_of_the_runs_and_each_run_has_some(self) -> None:
        runs = [lesson.run for lesson in LESSONS]
        assert runs == sorted(runs)
        assert set(runs) == set(RUNS)

    def test_what_is_healthy_or_a_taste_has_no_check(self) -> None:
        spared = [lesson for lesson in LESSONS if re.match("Healthy|A taste", lesson.true)]
        assert len(spared) >= 5
        assert not any(lesson.codes for lesson in spared)

import math

import pytest
from pydantic import BaseModel, ValidationError

from kdkit.schedules import SCHEDULES, Positive, Schedule, Weight


def schedule(**fields):
    return Schedule.model_validate(fields)


class TestSchedule:
    def test_a_plain_number_is_constant(self):
        constant = Schedule.model_validate(0.7)
        assert [constant.at(step, 10) for step in (0, 5, 10, 99)] == [0.7] * 4
        assert constant.model_dump() == 0.7

    @pytest.mark.parametrize(
        ("step", "expected"), [(0, 2.0), (250, 1.875), (500, 1.75), (750, 1.625), (1000, 1.5), (1200, 1.5)]
    )
    def test_temperature_runs_straight_from_2_to_1_5(self, step, expected):
        assert schedule(start=2.0, end=1.5).at(step, 1000) == expected

    @pytest.mark.parametrize(
        ("percent", "expected"),
        [(0, 0.0), (5, 0.0), (10, 0.0), (25, 0.05), (40, 0.1), (55, 0.1), (70, 0.1), (100, 0.1)],
    )
    def test_ramp_from_a_tenth_to_four_tenths(self, percent, expected):
        ramp = schedule(start=0, end=0.1, begin=0.1, finish=0.4)
        assert ramp.at(percent, 100) == pytest.approx(expected, abs=1e-15)

    def test_half_way_is_half_the_weight_not_a_quadratic_ramp(self):
        """Seed 003: a quadratic ramp gave 6.7 % of the weight at 50 % of the run."""
        assert schedule(start=0, end=1).at(50, 100) == 0.5

    def test_cosine_is_flat_at_both_ends_and_half_in_the_middle(self):
        cosine = schedule(start=0, end=1, shape="cosine")
        assert cosine.at(1, 4) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
        assert cosine.at(2, 4) == pytest.approx(0.5)
        assert (cosine.at(0, 4), cosine.at(4, 4)) == (0, 1)

    def test_largest_and_smallest_look_at_both_ends(self):
        ramp = schedule(start=3, end=1)
        assert (ramp.largest, ramp.smallest, ramp.is_constant) == (3, 1, False)

    @pytest.mark.parametrize("shape", SCHEDULES)
    def test_every_shape_survives_writing_and_reading(self, shape):
        given = schedule(start=2, end=2 if shape == "constant" else 1, shape=shape)
        assert Schedule.model_validate(given.model_dump()) == given

    @pytest.mark.parametrize(
        "given", [{"start": 1}, {"start": 1, "end": 2, "begin": 0.5, "finish": 0.5}, [1, 2], True, "fast"]
    )
    def test_refuses_what_is_no_schedule(self, given):
        with pytest.raises(ValidationError):
            Schedule.model_validate(given)


class TestWeightAndPositive:
    class Part(BaseModel):
        weight: Weight = Schedule.model_validate(1.0)
        gamma: Positive = Schedule.model_validate(1.0)

    def test_a_weight_may_be_zero_but_not_negative(self):
        assert self.Part(weight=0).weight.largest == 0
        with pytest.raises(ValidationError, match="must not be negative, got -1"):
            self.Part(weight={"start": 0, "end": -1})

    def test_a_positive_schedule_never_touches_zero(self):
        with pytest.raises(ValidationError, match="must be above 0, got 0"):
            self.Part(gamma={"start": 1, "end": 0})

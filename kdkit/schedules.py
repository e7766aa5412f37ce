"""Values that change over a stage, as a function of the number of completed optimizer steps."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

ScheduleName = Literal["constant", "linear", "cosine"]


def linear(x: float) -> float:
    """A straight line from 0 to 1."""
    return x


def cosine(x: float) -> float:
    """Half a cosine from 0 to 1, flat at both ends."""
    return (1.0 - math.cos(math.pi * x)) / 2.0


def constant(x: float) -> float:
    """Never leaves the start."""
    return 0.0


class Schedule(BaseModel):
    """A value that goes from `start` to `end` between two fractions of a stage.

    In a config file a plain number is a constant; `{start: 2.0, end: 1.5}` is a straight line over the whole stage;
    `{start: 0, end: 0.1, begin: 0.1, finish: 0.4}` is a ramp: 0 for the first tenth, then up to 0.1 at four tenths,
    0.1 from there on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    start: float = Field(allow_inf_nan=False)
    """The value until `begin`."""
    end: float = Field(allow_inf_nan=False)
    """The value from `finish` on."""
    begin: float = Field(default=0.0, ge=0.0, le=1.0)
    """Fraction of the stage's optimizer steps at which the change begins."""
    finish: float = Field(default=1.0, ge=0.0, le=1.0)
    """Fraction of the stage's optimizer steps at which the change is complete."""
    shape: ScheduleName = "linear"
    """How the change runs between the two."""

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, given: object) -> object:
        if isinstance(given, (int, float, str)) and not isinstance(given, bool):
            return {"start": given, "end": given, "shape": "constant"}
        if not isinstance(given, (Mapping, Schedule)):
            raise ValueError("expected a number, or a mapping with start and end")
        return given

    @model_validator(mode="after")
    def _ordered(self) -> "Schedule":
        if self.begin >= self.finish:
            raise ValueError(f"begin ({self.begin}) must be below finish ({self.finish})")
        return self

    @model_serializer(mode="wrap")
    def _constant_as_number(self, as_mapping: SerializerFunctionWrapHandler) -> float | dict[str, object]:
        return self.start if self.shape == "constant" else as_mapping(self)

    def at(self, step: int, num_steps: int) -> float:
        """The value after `step` completed optimizer steps of a stage of `num_steps`.

        Args:
            step: completed optimizer steps; beyond `num_steps` counts as the end.
            num_steps: optimizer steps of the stage; at least 1.
        Returns:
            The value; exactly `start` up to `begin` and exactly `end` from `finish` on.
        """
        fraction = min(step / num_steps, 1.0)
        if fraction <= self.begin or self.shape == "constant":
            return self.start
        if fraction >= self.finish:
            return self.end
        x = (fraction - self.begin) / (self.finish - self.begin)
        return self.start + (self.end - self.start) * SCHEDULES[self.shape](x)

    @property
    def largest(self) -> float:
        """The largest value that the schedule takes."""
        return self.start if self.shape == "constant" else max(self.start, self.end)

    @property
    def smallest(self) -> float:
        """The smallest value that the schedule takes."""
        return self.start if self.shape == "constant" else min(self.start, self.end)

    @property
    def is_constant(self) -> bool:
        """Whether the value never changes."""
        return self.shape == "constant" or self.start == self.end


def _not_negative(schedule: Schedule) -> Schedule:
    if schedule.smallest < 0:
        raise ValueError(f"must not be negative, got {schedule.smallest}")
    return schedule


def _positive(schedule: Schedule) -> Schedule:
    if schedule.smallest <= 0:
        raise ValueError(f"must be above 0, got {schedule.smallest}")
    return schedule


Weight = Annotated[Schedule, AfterValidator(_not_negative)]
"""A schedule that is never negative."""

Positive = Annotated[Schedule, AfterValidator(_positive)]
"""A schedule that is always above 0."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}

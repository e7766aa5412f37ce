"""The check of single values that no trainer can mean."""

from collections.abc import Iterator

from kdkit.doctor.config.subject import Stage
from kdkit.doctor.findings import Check, Observation, fail


def check_values(stage: Stage) -> Iterator[Observation]:
    """A value out of its range."""
    yield from (fail(problem) for problem in stage.refused)


CHECKS = (
    Check(
        "KD101",
        "a value out of its range",
        "a negative length, a share above 1, text where a number belongs",
        "Trainers often take what they are given, and do something else than was meant. kdkit refuses such a config.",
        "Give a value that is allowed.",
        "the ranges of kdkit's own fields",
        check_values,
    ),
)

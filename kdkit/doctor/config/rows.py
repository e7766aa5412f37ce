"""Checks of the rows: what is cut of them, and what training and evaluation share."""

import re
from collections.abc import Iterator

from kdkit.doctor.config.subject import Stage
from kdkit.doctor.findings import Check, Observation, fail, warn
from kdkit.doctor.sources import POST_MORTEMS

MOST_TRUNCATED = 0.05
"""Share of the rows whose answer is cut, or which are left out for their prompt."""
SPOILED_TRUNCATED = 0.5
MOST_OVERLAP = 0.01
"""Share of the evaluation's prompts that training has too."""
_SLICE = re.compile(r"(.*?)#(\w+)\[(\d*):(\d*)\]$")


def check_lengths(stage: Stage) -> Iterator[Observation]:
    """Rows that the limits cut or leave out."""
    stage.needs("data.train", "data.max_length", "data.max_prompt_length")
    data = stage.config.data
    report = stage.around.lengths(data)
    for counts, what, field, limit in (
        (report.truncated, "answers are cut", "data.max_length", data.max_length),
        (report.dropped, "rows are left out", "data.max_prompt_length", data.max_prompt_length),
    ):
        share = sum(counts.values()) / report.num_read
        if share > MOST_TRUNCATED:
            reasons = ", ".join(f"{why}: {count:,}" for why, count in counts.items())
            say = fail if share > SPOILED_TRUNCATED else warn
            yield say(f"{share:.0%} of {report.num_read:,} {what} ({reasons}); {field} is {limit}")


def check_overlap(stage: Stage) -> Iterator[Observation]:
    """Rows to evaluate on that training has seen."""
    stage.needs("data.train", "data.validation")
    data = stage.config.data
    others = {"validation": data.validation} | ({"test": data.test} if data.test is not None else {})
    for kind, source in others.items():
        shared = _shared_slice(data.train, source)
        if shared is not None:
            yield fail(f"data.{kind} and data.train share {shared} of {source.partition('#')[0]}")
    if any(_shared_slice(data.train, source) for source in others.values()):
        return
    trained = set(stage.around.rows(data.train, data).dataset["prompt"])
    for kind, source in others.items():
        prompts = stage.around.rows(source, data).dataset["prompt"]
        share = sum(prompt in trained for prompt in prompts) / len(prompts)
        if share > MOST_OVERLAP:
            yield warn(f"{share:.1%} of the first {len(prompts):,} rows of data.{kind} have a prompt of data.train")


def _shared_slice(a: str, b: str) -> str | None:
    """What two sources have in common by their names alone: all rows, or those of a range."""
    if a == b:
        return "all rows"
    first, second = _SLICE.match(a), _SLICE.match(b)
    if first is None or second is None or first.group(1, 2) != second.group(1, 2):
        return None
    low = max(int(part[3] or 0) for part in (first, second))
    high = min(int(part[4]) if part[4] else 2**62 for part in (first, second))
    return f"rows {low:,} to {high:,}" if high < 2**62 and low < high else ("all rows" if low < high else None)


CHECKS = (
    Check(
        "KD108",
        "limits against the rows",
        "more than 5 % of the answers are cut, or of the rows left out",
        "A cut answer has no end of text: with many of them, the student does not learn to stop. Rows that are left "
        "out are all of one kind, those with long prompts.",
        "Raise data.max_length or data.max_prompt_length and see `kdkit plan` for what that costs.",
        POST_MORTEMS,
        check_lengths,
    ),
    Check(
        "KD123",
        "training sees the evaluation's rows",
        "rows of validation or test among those of training",
        "The figures then tell what was learnt by heart.",
        "Split the rows once, and leave duplicates out.",
        "common practice",
        check_overlap,
    ),
)

"""One text under two tokenizers: a row for the student, and beside it the row that its teacher reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdkit.data.batch import NO_SPAN, NO_UNIT, EncodedRow
from kdkit.data.spans import Offsets, SharedSpans, shared_spans, shared_word_units


@dataclass(frozen=True)
class Side:
    """What one of the two makes of a row."""

    prompt: Sequence[int]
    response: Sequence[int]
    """Without an end-of-text."""
    offsets: Offsets
    """(start, end) of the response's tokens in characters of the text."""
    end: int
    """Id of its end-of-text token."""


def pair_row(
    text: str,
    student: Side,
    teacher: Side,
    *,
    row_id: int,
    unit: Literal["word", "token"] | None,
    room: tuple[int, int] | None = None,
    ended: bool = True,
) -> EncodedRow | None:
    """The row of both sides; the two end-of-text tokens are a span of their own, and in no unit.

    Args:
        text: the response, which both sides encode.
        student: its prompt and response.
        teacher: likewise.
        row_id: index of the row.
        unit: what unit_ids number: words, or spans where it is "token"; None: nothing looks at them.
        room: most tokens of response and end-of-text on each side; a longer response is cut after its last whole span
            that fits on both, and gets no end. None: nothing is cut.
        ended: whether the response has an end-of-text.
    Returns:
        A row with `span_ids` and `teacher`; None where nothing of the text is a span on both sides.
    """
    spans = shared_spans(text, student.offsets, teacher.offsets)
    sides = (student, teacher)
    kept = len(spans)
    if room is not None and not all(len(side.response) < most for side, most in zip(sides, room, strict=True)):
        kept, ended = _num_fitting(spans, room), False
    sizes = [int(np.searchsorted(ids, kept)) for ids in spans.ids]
    if kept == 0 and text:
        if not ended or text.strip():
            return None
        sizes = [len(side.response) for side in sides]  # spaces that one side has no token for go with the end
    offsets = [side.offsets[:size] for side, size in zip(sides, sizes, strict=True)]
    units = _units(text[: spans.ends[kept - 1]] if kept else "", offsets, spans, kept=kept, unit=unit)
    rows = []
    for side, size, own_spans, own_units in zip(sides, sizes, spans.ids, units, strict=True):
        own = (own_spans[:size] or [0] * size) + [kept] * ended
        ids = [*side.prompt, *side.response[:size], *[side.end] * ended]
        no_prompt = len(side.prompt)
        rows.append(
            EncodedRow(
                input_ids=ids,
                prompt_length=no_prompt,
                unit_ids=[NO_UNIT] * no_prompt + own_units + [NO_UNIT] * ended,
                row_id=row_id,
                span_ids=[NO_SPAN] * no_prompt + own,
            )
        )
    return EncodedRow(**rows[0], teacher=rows[1])


def _num_fitting(spans: SharedSpans, room: tuple[int, int]) -> int:
    """Whole spans within the room of each side."""
    return min(ids[most] if len(ids) > most else len(spans) for ids, most in zip(spans.ids, room, strict=True))


def _units(
    text: str,
    offsets: Sequence[Offsets],
    spans: SharedSpans,
    *,
    kept: int,
    unit: Literal["word", "token"] | None,
) -> list[list[int]]:
    """Unit ids of either side's tokens."""
    if unit == "word" and kept:
        return shared_word_units(text, *offsets)
    if unit == "token" and kept:
        return [ids[: len(own)] for ids, own in zip(spans.ids, offsets, strict=True)]
    return [[NO_UNIT] * len(own) for own in offsets]

"""From plain text logs of any trainer to traces."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdkit.doctor.figures import Column, Figures
from kdkit.doctor.line_shape import NUMBER, NUMBER_OF_CELL, Shape, Slot, shape_of
from kdkit.doctor.tables import Table, table_of
from kdkit.doctor.trace import Event, Planned, Trace

LONGEST = 10_000
"""Characters of a line that are read."""
MOST_SHAPES = 20_000
"""That are remembered."""
MOST_EVENTS = 10_000
"""Of a kind that are kept."""
MOST_CHARACTERS = 1_000
"""Of an event that are kept."""
_COLOUR = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]")
_ZEROS = bytes.maketrans(b"123456789", b"000000000")


def read_text(text: str, *, source: str) -> Trace:
    """As `read_log`, of a text."""
    return read_log([text.encode("utf-8", errors="replace")], source=source)


def read_log(blocks: Iterable[bytes], *, source: str) -> Trace:
    """A plain text log: `key=value`, `key: value`, dicts and tables, progress bars, warnings and errors.

    A figure counts at the last step that was named before it; where none ever is, at that of its epoch, or else rows
    with a loss are counted. A
    step out of a smaller total than one before (`3/16` after `50/5000`) is that of an evaluation, and passed over.

    Args:
        blocks: UTF-8, cut at ends of lines.
        source: what the trace is called.
    Returns:
        The trace of all blocks.
    """
    log = _Log()
    for block in blocks:
        log.read(block)
    log.count_by_epochs()
    planned = replace(log.planned, num_steps=log.planned.num_steps or log.total_steps or None)
    return log.figures.trace(source, planned, num_lines=log.num_lines + 1)


@dataclass(frozen=True)
class _Reading:
    """What is to be done with lines of a shape."""

    shape: Shape
    columns: tuple[tuple[Column, Slot], ...] = ()
    table: Table | None = None
    """Whose header they are."""

    @property
    def is_row(self) -> bool:
        """Whether they report a training loss."""
        return any(slot.name == "loss" and not slot.is_eval for _, slot in self.columns)


class _Log:
    """A log as far as it is read."""

    def __init__(self) -> None:
        self.figures, self.planned, self.num_lines, self.total_steps = Figures(), Planned(), 0, 0
        self._step, self._names_steps, self._first_epoch = 0, False, 0
        self._table: Table | None = None
        self._readings: dict[str, _Reading | None] = {}
        """Of the shapes seen since the last header of a table; None where there is nothing to be done."""
        self._num_events: Counter[str] = Counter()

    def read(self, block: bytes) -> None:
        """The next lines."""
        block = _COLOUR.sub(b"", block) if b"\x1b" in block else block
        lines = block.decode("utf-8", errors="replace").split("\n")
        shapes = _without_digits(block).decode("utf-8", errors="replace").split("\n")
        for number, (line, shape) in enumerate(zip(lines, shapes, strict=True), self.num_lines + 1):
            if "\r" not in line:
                self._read_line(line, shape[:LONGEST], number)
                continue
            for part, part_shape in zip(line.split("\r"), shape.split("\r"), strict=True):
                self._read_line(part, part_shape[:LONGEST], number)
        self.num_lines += len(lines) - 1

    def count_by_epochs(self) -> None:
        """Put rows at the steps of their epochs, where no step was named but the steps of all epochs were."""
        num_epochs, num_steps = self.planned.num_epochs, self.planned.num_steps
        if not self._names_steps and num_epochs and num_steps:
            self.figures.place_by_epoch(num_steps / num_epochs)

    def _read_line(self, line: str, shape: str, number: int) -> None:
        try:
            reading = self._readings[shape]
        except KeyError:
            reading = self._remember(shape)
        if reading is None:
            return
        if reading.table is not None and reading.table != self._table:
            self._table, self._readings = reading.table, {}
        numbers = (NUMBER if reading.shape.has_commas else NUMBER_OF_CELL).findall(line)
        if not self._takes_step(reading, numbers):
            return
        for column, slot in reading.columns:
            column.add(self._step, _value(slot, numbers))
        if reading.shape.speaks:
            self._take_words(reading.shape, numbers, line, number)

    def _remember(self, text: str) -> _Reading | None:
        """What is to be done with lines of a shape that was not seen before."""
        table = table_of(text)
        shape = (self._table and self._table.shape_of(text)) or shape_of(text)
        columns = tuple((self.figures.column(slot.name, is_eval=slot.is_eval), slot) for slot in shape.slots)
        reading = None if table is None and shape.is_empty else _Reading(shape, columns, table)
        if len(self._readings) >= MOST_SHAPES:
            self._readings.clear()
        return self._readings.setdefault(text, reading)

    def _takes_step(self, reading: _Reading, numbers: Sequence[str]) -> bool:
        """Go on to the step that a line names, or else say that it counts the batches of an evaluation."""
        shape = reading.shape
        if shape.step is None:
            self._step += reading.is_row and not self._names_steps
            return True
        step, total, epoch = (
            None if at is None else _whole(numbers[at]) for at in (shape.step, shape.total, shape.epoch)
        )
        if total is not None and total < self.total_steps and not reading.is_row:
            return False
        if step is None:
            return True
        if not self._names_steps:
            self.figures.forget_steps()
            self._first_epoch = epoch or 0
        self._step, self._names_steps = step, True
        if epoch is None:
            self.total_steps = total or self.total_steps
        else:
            self._step += max(epoch - self._first_epoch, 0) * (total or 0)
        return True

    def _take_words(self, shape: Shape, numbers: Sequence[str], line: str, number: int) -> None:
        """What a line says of what the run was to be, and in words."""
        given: dict[str, Any] = {field: _whole(numbers[index]) or None for field, index in shape.plans}
        given |= {"scheduler": shape.scheduler} if shape.scheduler else {}
        self.planned = replace(self.planned, **given)
        for kind in shape.events:
            self._num_events[kind] += 1
            if self._num_events[kind] <= MOST_EVENTS:
                step = self._step if self._names_steps else None
                self.figures.events.append(Event(kind, line[:MOST_CHARACTERS], step, number))


def _without_digits(block: bytes) -> bytes:
    """A 0 in place of every run of digits."""
    block = block.translate(_ZEROS)
    while b"00" in block:
        block = block.replace(b"00", b"0")
    return block


def _value(slot: Slot, numbers: Sequence[str]) -> float:
    if slot.index is None:
        return math.nan if slot.constant is None else slot.constant
    value = _number(numbers[slot.index])
    return value if slot.convert is None else slot.convert(value)


def _whole(text: str) -> int | None:
    value = _number(text)
    return int(value) if 0 <= value < 2**53 else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # 75,000 or the end of a sentence
        return float(text.replace(",", "").rstrip("."))

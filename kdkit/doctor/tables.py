"""Tables in logs: a header that names steps and figures, and rows below it, in CSV, Markdown, tabs or columns."""

import operator
import re
from dataclasses import dataclass

from kdkit.doctor.figures import figure_of
from kdkit.doctor.line_shape import NUMBER, NUMBER_OF_CELL, READABLE, SPECIAL, Shape, Slot

_STEPS = ("step", "steps", "global_step", "iteration", "iter", "_step")
_OF_EVALUATIONS = ("rouge_l", "exact_match", "perplexity", "cross_entropy")
_WORDS = re.compile(r"((?:train|training|validation|val|eval|total|learning|grad)) (?=loss|rate|norm)", re.IGNORECASE)
_CELL = re.compile(rf"\s*[~\"]?([-+]?)({NUMBER.pattern}|nan|inf)?\s*%?\"?\s*", re.IGNORECASE)
_TIME = re.compile(r"\s*0(?::0){1,2}(?:\.0)?\s*")
_BLANK = re.compile(r"\s*(?:no log|-+|n/?a|none|null)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """The header of a table."""

    delimiter: str | None
    """None: white space."""
    steps: int | None
    """Which column counts them."""
    figures: tuple[tuple[str, bool] | None, ...]
    """Name and whether it is of evaluations, column by column; None where it is not known."""

    def shape_of(self, shape: str) -> Shape | None:
        """What rows of a shape hold, None where a line is no row."""
        cells = _cells(shape, self.delimiter)
        if len(cells) != len(self.figures):
            return None
        step, slots, count = None, [], 0
        numbers = NUMBER_OF_CELL if self.delimiter == "," else NUMBER
        for column, cell in enumerate(cells):
            held = _CELL.fullmatch(cell)
            if held is None and _BLANK.fullmatch(cell) is None and _TIME.fullmatch(cell) is None:
                return None
            if held is not None and held[2]:
                step = count if column == self.steps else step
                slots += self._slot(column, held[1], held[2], count)
            count += len(numbers.findall(cell))
        return Shape(step=step, slots=tuple(slots), has_commas=self.delimiter != ",")

    def _slot(self, column: int, sign: str, value: str, index: int) -> list[Slot]:
        figure, special = self.figures[column], SPECIAL.get(value.lower())
        if figure is None or (special is None and not READABLE.fullmatch(value)):
            return []
        if special is not None:
            return [Slot(*figure, None, constant=-special if sign == "-" else special)]
        return [Slot(*figure, index, operator.neg if sign == "-" else None)]


def table_of(line: str) -> Table | None:
    """The table that a line is the header of, None for any other line."""
    if len(line) > 1000 or not re.search("step|iter|epoch", line, re.IGNORECASE):
        return None
    delimiter = next((delimiter for delimiter in ("|", "\t", ",") if delimiter in line), None)
    cells = [cell.strip().strip('"') for cell in _cells(line if delimiter else _WORDS.sub(r"\1_", line), delimiter)]
    plain = [cell.rpartition(" - ")[2].lower().replace(" ", "_") for cell in cells]
    steps = next((column for column, cell in enumerate(plain) if cell in _STEPS), None)
    figures = tuple(None if column == steps else _figure(cell) for column, cell in enumerate(plain))
    if (steps is None and "epoch" not in plain) or not any(name and name[0] != "epoch" for name in figures):
        return None
    return Table(delimiter, steps, figures)


def _figure(cell: str) -> tuple[str, bool] | None:
    name, says_eval = figure_of(cell)
    return None if name is None else (name, name in _OF_EVALUATIONS if says_eval is None else says_eval)


def _cells(line: str, delimiter: str | None) -> list[str]:
    if delimiter == "|":
        return line.strip().strip("|").split("|")
    return line.split() if delimiter is None else line.strip("\r\n").split(delimiter)

"""Models and sweeps as tables: of a page, of a terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkit.evaluation import mean_over_seeds, paired_difference
from kdkit.plots import METRICS, Row, figure_bytes, intervals_over, plot_sweep

if TYPE_CHECKING:
    from rich.table import Table

_NOT_MEASURED = "–"


def comparison_table(rows: Sequence[Row]) -> "Table":
    """The comparison for a terminal, readable at 80 columns: model, steps, and each metric with its 95 % interval.

    Args:
        rows: as in `write_report`.
    Returns:
        A table for `rich.console.Console().print`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    note = f"second line: 95 % interval over {intervals_over(rows)}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=note, caption_justify="left")
    columns = _columns(rows, _TERMINAL_COLUMNS)
    for name in columns:
        table.add_column(_COLUMNS[name], justify="left" if name == "model" else "right", overflow="fold")
    for row in rows:
        cells = [_cell(row, name) for name in columns]
        # Text, because a name in square brackets would be taken for markup.
        table.add_row(*(Text.assemble(cell.value, "\n", (cell.interval, "dim")) for cell in cells))
    return table


def sweep_table(cells: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> "Table":
    """A sweep for a terminal: one line a combination, means over seeds, and the difference to the first one.

    Args:
        cells: one a combination: the swept fields' values, `seeds`, and each metric as one figure a seed.
        fields: names of the swept fields.
    Returns:
        A table for `rich.console.Console().print`; ± is half of the 95 % t interval over seeds. The last column is the
        mean difference in ROUGE-L to the first line, paired by seed.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    note = "± half of the 95 % t interval over seeds; the difference in ROUGE-L to the first line is paired by seed"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=note, caption_justify="left")
    short = [name.rsplit(".", 1)[-1] for name in fields]
    for name in (*(short if len(set(short)) == len(short) else fields), "seeds"):
        table.add_column(name, overflow="fold")
    for name in (*METRICS, "difference"):
        table.add_column(_COLUMNS.get(name, name), justify="right")
    for cell in cells:
        values = [*(_plain(cell[name]) for name in fields), str(len(cell["seeds"]))]
        figures = [_over_seeds(cell[name], name) for name in METRICS]
        table.add_row(*map(Text, [*values, *figures, _difference(cell, cells[0])]))
    return table


def write_sweep_figure(cells: Sequence[Mapping[str, Any]], fields: Sequence[str], path: str | Path) -> Path:
    """ROUGE-L over the first field, a line for each value of the others, as a PNG.

    Args:
        cells: as in `sweep_table`.
        fields: names of the swept fields.
        path: file to write or replace.
    Returns:
        The path.
    """
    others = list(fields[1:])
    if len(others) > 1:  # one legend for all of them
        cells = [{**cell, ", ".join(others): ", ".join(_plain(cell[name]) for name in others)} for cell in cells]
    figure = plot_sweep(cells, x=fields[0], lines=", ".join(others) or None)
    Path(path).write_bytes(figure_bytes(figure, "png"))
    return Path(path)


def _plain(value: object) -> str:
    return "null" if value is None else str(value)


def _over_seeds(values: Sequence[float], name: str) -> str:
    """Mean and half interval over seeds."""
    if not values:
        return _NOT_MEASURED
    mean = mean_over_seeds(values)
    half = "" if math.isnan(mean.low) else f" ±{_written((mean.high - mean.low) / 2, name)}"
    return _written(mean.value, name) + half


def _difference(cell: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """ROUGE-L less that of the first combination, over the seeds that both have."""
    ours, theirs = (dict(zip(c["seeds"], c["rouge_l"], strict=True)) for c in (cell, first))
    both = [seed for seed in ours if seed in theirs]
    if cell is first or not both:
        return ""
    if len(both) == 1:
        return f"{ours[both[0]] - theirs[both[0]]:+.1f}"
    difference = paired_difference([ours[seed] for seed in both], [theirs[seed] for seed in both])
    return f"{difference.value:+.1f} ±{(difference.high - difference.low) / 2:.1f}"


# --- cells -----------------------------------------------------------------------------------------------------------

_COLUMNS = {
    "model": "model",
    "steps": "steps",
    "num_rows": "rows",
    "rouge_l": "ROUGE-L (%)",
    "exact_match": "exact match (%)",
    "perplexity": "perplexity",
    "mean_tokens": "tokens per answer",
    "ended_fraction": "ended by itself",
}
_TERMINAL_COLUMNS = ("model", "steps", "num_rows", "rouge_l", "exact_match", "perplexity")


@dataclass(frozen=True)
class _Cell:
    value: str
    interval: str = ""


def _columns(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """The model, and of the others those that some row has; the number of rows where models differ in it."""
    found = [name for name in names if name == "model" or any(_value(row, name) is not None for row in rows)]
    differ = len({row.get("num_rows") for row in rows}) > 1
    return [name for name in found if name != "num_rows" or differ]


def html_table(rows: Sequence[Row]) -> dict[str, list]:
    """The comparison for a page: what stands above the columns, and the cells row by row."""
    columns = _columns(rows, list(_COLUMNS))
    return {
        "columns": [_COLUMNS[name] for name in columns],
        "rows": [[_cell(row, name) for name in columns] for row in rows],
    }


def _cell(row: Row, name: str) -> _Cell:
    value, low, high = (_value(row, name, end) for end in ("", "_low", "_high"))
    if isinstance(value, str):
        return _Cell(value)
    if not isinstance(value, int | float):
        return _Cell(_NOT_MEASURED)
    if not isinstance(low, int | float) or not isinstance(high, int | float) or low == high:
        return _Cell(_written(value, name))
    return _Cell(_written(value, name), f"({_written(low, name)}–{_written(high, name)})")


def _value(row: Row, name: str, end: str = "") -> object:
    """As the row has it; JSON has no infinity, so that a perplexity beyond all numbers is missing there."""
    value = row.get(name + end)
    if value is None and name == "perplexity" and row.get("cross_entropy" + end) is not None:
        return math.inf
    return value


def _written(value: float, name: str) -> str:
    if name in ("steps", "num_rows"):
        return f"{value:.0f}"
    if name == "ended_fraction":
        return f"{100 * value:.0f} %"
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if name == "perplexity":
        return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"
    return f"{value:.1f}"

"""Runs of many terms: a strip for each, because nine lines in one panel cannot be told apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdkit.config.objective import TERM_NAMES
from kdkit.plots.axes import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    Row,
    column,
    draw_stages,
    mark_stages,
    number,
    rows_of_kind,
    run_steps,
    stage_begins,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 3
"""Terms that share a panel; more of them get a strip each."""
_COLOURS = {"kd": BLUE, "lm": ORANGE, "dtw": GREEN}
_STRIP_INCHES, _SUMMARY_INCHES, _HEADING_INCHES = 0.62, 0.85, 1.1
_SPOKEN_TERMS = 3  # by a title


Bounds = tuple[float, float | None] | None
"""Of the vertical axis: None leaves it to the values; (0, None) begins at 0 and marks the largest value."""
FROM_ZERO: Bounds = (0.0, None)


@dataclass(frozen=True)
class Strip:
    """One small panel: which figure of the rows it shows, and how."""

    name: str
    colour: str
    label: str = ""
    """What it shows, where no heading over the column says it."""
    held: bool = False
    """A value that holds until the next row, such as a weight."""
    bounds: Bounds = None


@dataclass(frozen=True)
class Column:
    """What is shown of every term."""

    prefix: str
    """Before the term's name in a row, such as "part/"."""
    heading: str
    colour: str
    held: bool = False
    bounds: Bounds = None


WEIGHTS = Column("weight/", "weight", ORANGE, held=True, bounds=FROM_ZERO)
PARTS = Column("part/", "before its weight", BLUE)
SHARES = Column("share/", "share of the total (%)", GREEN, bounds=FROM_ZERO)


def plot_terms(metrics_rows: Sequence[Row]) -> "Figure":
    """What does each term contribute, and when? Before its weight, its weight, and its share of the total.

    Args:
        metrics_rows: rows of metrics.jsonl in order; those of kind "train" are drawn. Stages follow each other.
    Returns:
        Figure with a row of strips for each term; total, temperature and learning rate below them.
    Raises:
        UserError: there is no row of kind "train".
    """
    rows = rows_of_kind(metrics_rows, "train")
    begins = stage_begins(metrics_rows)
    shown = [{**row, **_shares(row)} for row in rows]
    below = (
        Strip("loss", INK, "total loss"),
        Strip("kd_temperature", PURPLE, "kd temperature", held=True, bounds=FROM_ZERO),
        Strip("learning_rate", INK, "learning rate"),
    )
    figure, panels = term_grid(shown, begins, columns=(PARTS, WEIGHTS, SHARES), below=[below])
    mark_stages(panels[:1], begins)
    figure.suptitle(wrapped(not_finite(rows, begins) or _shares_finding(shown, begins)))
    return figure


def term_grid(
    rows: Sequence[Row],
    begins: Mapping[str, float],
    *,
    columns: Sequence[Column],
    below: Sequence[Sequence[Strip | None]] = (),
) -> tuple["Figure", list["Axes"]]:
    """Strips over one step axis: a row for each term that any column has, then the rows of `below`.

    Args:
        rows: log rows.
        begins: as `stage_begins` gives it.
        columns: what is shown of each term.
        below: further rows, as many strips each as there are columns; None leaves a place empty.
    Returns:
        The figure without a title, and its panels row by row.
    """
    from matplotlib.figure import Figure

    terms = term_names(rows, *(column.prefix for column in columns))
    inches = [_STRIP_INCHES] * len(terms) + [_SUMMARY_INCHES] * len(below)
    figure = Figure(figsize=(7.2, sum(inches) + _HEADING_INCHES), layout="constrained")
    grid = figure.subplots(len(inches), len(columns), sharex=True, squeeze=False, gridspec_kw={"height_ratios": inches})
    strips = [[Strip(c.prefix + term, c.colour, held=c.held, bounds=c.bounds) for c in columns] for term in terms]
    for panels, wanted in zip(grid, [*strips, *below], strict=True):
        for axes, strip in zip(panels, wanted, strict=True):
            _draw_strip(axes, rows, begins, strip)
    for axes, shown in zip(grid[0], columns, strict=True):
        axes.set_title(shown.heading, fontsize="medium")
    for panels, term in zip(grid, terms, strict=False):
        panels[0].set_ylabel(term, rotation=0, ha="right", va="center")
    figure.supxlabel("optimizer steps", fontsize="medium")
    return figure, [axes for panels in grid for axes in panels]


def term_names(rows: Sequence[Row], *prefixes: str) -> list[str]:
    """What follows one of the prefixes in some row: terms of the objective in its order, then others."""
    keys = (key for row in rows for key in row)
    found = dict.fromkeys(key.removeprefix(p) for key in keys for p in prefixes if key.startswith(p))
    return [name for name in TERM_NAMES if name in found] + [name for name in found if name not in TERM_NAMES]


def term_colours(terms: Sequence[str]) -> dict[str, str]:
    """A colour for each of a few terms: the best-known keep theirs, others take what is free."""
    free = [colour for colour in (SKY, GREEN, ORANGE, BLUE) if colour not in [_COLOURS.get(term) for term in terms]]
    others = [term for term in terms if term not in _COLOURS]
    return {term: _COLOURS[term] for term in terms if term in _COLOURS} | {
        term: free[index % len(free)] for index, term in enumerate(others)
    }


def not_finite(rows: Sequence[Row], begins: Mapping[str, float]) -> str | None:
    """The finding that outweighs all others, where there is reason for it."""
    broken = np.flatnonzero(~np.isfinite(column(rows, "loss")))
    return f"The loss is not finite at step {run_steps(rows, begins)[broken[0]]:.0f}" if len(broken) else None


def _draw_strip(axes: "Axes", rows: Sequence[Row], begins: Mapping[str, float], strip: Strip | None) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    measured = [] if strip is None else [row for row in rows if number(row, strip.name) is not None]
    if strip is None or not measured:
        axes.set_axis_off()
        return
    draw_stages(
        axes, measured, strip.name, begins, color=strip.colour, drawstyle="steps-post" if strip.held else "default"
    )
    axes.grid(color=FAINT, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(labelsize="small")
    if strip.bounds is None:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=2, min_n_ticks=2))
    else:
        _bound(axes, strip.bounds, largest=max(column(measured, strip.name).max(), 1e-9))
    if strip.label:
        axes.set_title(strip.label, fontsize="medium")


def _bound(axes: "Axes", bounds: tuple[float, float | None], *, largest: float) -> None:
    low, high = bounds
    if high is None:
        axes.set_ylim(low, low + 1.15 * (largest - low))
        axes.set_yticks([low, largest], [f"{low:g}", f"{largest:.3g}"])
    else:
        margin = 0.08 * (high - low)  # or a line at the bound would be cut
        axes.set_ylim(low - margin, high + margin)
        axes.set_yticks([low, (low + high) / 2, high])


def _shares(row: Row) -> dict[str, float]:
    """Each weighted part in percent of their sum."""
    weighted = {key.removeprefix("weighted/"): number(row, key) or 0.0 for key in row if key.startswith("weighted/")}
    total = sum(weighted.values())
    return {f"share/{name}": 100 * value / total for name, value in weighted.items()} if total > 0 else {}


def _shares_finding(rows: Sequence[Row], begins: Mapping[str, float]) -> str:
    shares = {name: share for name in term_names(rows[-1:], "share/") if (share := number(rows[-1], f"share/{name}"))}
    if not shares:
        return f"Step {run_steps(rows[-1:], begins)[0]:.0f}: loss {column(rows[-1:], 'loss')[0]:.3g}"
    return f"Step {run_steps(rows[-1:], begins)[0]:.0f}: {most_of(shares)} of the loss"


def most_of(shares: Mapping[str, float]) -> str:
    """Percentages in words: the largest by name, the others together."""
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    named, others = ordered[:_SPOKEN_TERMS], ordered[_SPOKEN_TERMS:]
    said = ", ".join(f"{name} {share:.0f} %" for name, share in named)
    rest = sum(share for _, share in others)
    return said + (f", the other {len(others)} terms together {rest:.0f} %" if others else "")

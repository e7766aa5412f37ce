"""What every figure shares: rows to numbers, panels over one step axis, stages, scales, colours."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdkit.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, object]
"""One row of metrics.jsonl, or one model of a comparison."""

# Okabe and Ito's palette, told apart by readers with any colour vision; yellow is left out, too pale for lines.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, FAINT = "#222222", "#999999"
_LOG_SCALE_RATIO = 30.0
"""Largest over smallest value from which a loss axis is logarithmic."""
_WIDE_SCALE_RATIO = 1000.0
"""... and from which only powers of ten are marked on it."""

METRICS = {
    "rouge_l": ("ROUGE-L (%)", True),
    "exact_match": ("exact match (%)", True),
    "perplexity": ("perplexity", False),
}
"""Name -> (axis label, whether more is better), in the order in which they are shown."""


def figure_bytes(figure: "Figure", kind: str = "svg") -> bytes:
    """A figure as the content of a file, the same for the same figure.

    Args:
        figure: any of the above.
        kind: "svg" or "png".
    Returns:
        The file's bytes; for a notebook, `IPython.display.Image(figure_bytes(figure, "png"))` shows it.
    """
    import io
    import warnings

    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "kdkit"}), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box; a warning for each would only redden a notebook.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def stacked_panels(
    count: int, *, height: float, ratios: Sequence[float] | None = None
) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, height), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axes in panels:
        axes.grid(color=FAINT, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, list(panels)


def draw_stages(axes: "Axes", rows: Sequence[Row], name: str, begins: Mapping[str, float], **style: Any) -> None:
    """A line with a gap between stages, which join nothing; a dot where a line would not show."""
    steps, values = run_steps(rows, begins), column(rows, name)
    changes = [i for i in range(1, len(rows)) if rows[i].get("stage") != rows[i - 1].get("stage")]
    marker = "o" if np.isfinite(values).sum() == 1 else ""
    axes.plot(np.insert(steps, changes, math.nan), np.insert(values, changes, math.nan), marker=marker, **style)


def mark_stages(panels: Sequence["Axes"], begins: Mapping[str, float]) -> None:
    """Where stages begin, if there are several."""
    if len(begins) < 2:
        return
    for stage, begin in begins.items():
        for axes in panels:
            axes.axvline(begin, color=FAINT, linewidth=1, linestyle=":")
        label = panels[0].annotate(
            stage, (begin, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 2), textcoords="offset points"
        )
        label.set(fontsize="small", color="#555555", parse_math=False)


def choose_scale(axes: "Axes", columns: Sequence[np.ndarray]) -> None:
    """Logarithmic where values lie far apart, with the ticks written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = np.concatenate([*columns, [math.nan]])
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0 or values.max() / values.min() <= _LOG_SCALE_RATIO:
        return
    axes.set_yscale("log")
    is_wide = values.max() / values.min() > _WIDE_SCALE_RATIO
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def rows_of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows of a kind, at least one."""
    chosen = [row for row in rows if row.get("kind") == kind]
    if not chosen:
        raise UserError(f'{len(rows)} metrics rows, none of kind "{kind}": there is nothing to draw')
    return chosen


def stage_begins(rows: Sequence[Row]) -> dict[str, float]:
    """Stage -> the run's step at which it begins: a stage counts its steps from 0, the figure goes through."""
    last_step: dict[str, float] = {}
    for row in rows:
        stage = str(row.get("stage", ""))
        last_step[stage] = max(last_step.get(stage, 0.0), number(row, "step") or 0.0)
    begins = np.cumsum([0.0, *last_step.values()]).tolist()
    return dict(zip(last_step, begins, strict=False))


def run_steps(rows: Sequence[Row], begins: Mapping[str, float]) -> np.ndarray:
    """Steps of the whole run at which the rows were written."""
    return np.array([begins[str(row.get("stage", ""))] + (number(row, "step") or 0.0) for row in rows])


def number(row: Row, name: str) -> float | None:
    """A row's figure, None where it has none."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """(rows,) a figure of each row, NaN where it has none."""
    return np.array([math.nan if (value := number(row, name)) is None else value for row in rows])


def wrapped(title: str, width: int = 78) -> str:
    """A title in lines that fit the figure."""
    return textwrap.fill(title, width)

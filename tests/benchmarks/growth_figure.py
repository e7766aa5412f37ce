"""The page of figures of growth.py: seconds and memory over each size, with the exponent of each line."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from kdkit.plots.axes import BLUE, FAINT, GREEN, ORANGE, PURPLE, RED, figure_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Axis = Literal["length", "vocabulary", "batch", "rows"]
AXES: tuple[Axis, ...] = ("length", "vocabulary", "batch", "rows")


class Point(NamedTuple):
    """What a size costs."""

    size: float
    seconds: float
    """Of the processor, one thread."""
    num_bytes: float
    """The most memory at a time, beyond the inputs."""


Points = dict[Axis, dict[str, list[Point]]]
"""By axis and line, in the order of the sizes."""

_LABELS = {
    "length": ("tokens of a row (T)", "T"),
    "vocabulary": ("ids of the vocabulary (V)", "V"),
    "batch": ("rows of a batch (B)", "B"),
    "rows": ("rows of a file (R)", "R"),
}
_TITLE = "Head pass and rows take time in proportion,\nDTW with the square of the length, with or without a band"
_COLORS = (BLUE, RED, GREEN, ORANGE, PURPLE)
_MARKERS = "osD^v"
_SMALLEST_MIB = 1.0
"""Less than this is what the allocator has at hand, and is drawn at the lower edge."""


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size on the upper half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(np.maximum(costs[half:], 1e-9)), 1)[0])


def exponents(points: Points) -> dict[str, tuple[float, float]]:
    """Line -> the exponents of its seconds and of its bytes."""
    return {
        f"{axis}, {name}": (
            exponent([p.size for p in line], [p.seconds for p in line]),
            exponent([p.size for p in line], [p.num_bytes for p in line]),
        )
        for axis, lines in points.items()
        for name, line in lines.items()
        if len(line) > 2
    }


def draw(points: Points) -> bytes:
    """The page as a PNG: a line of panels for each axis, seconds on the left and memory on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.1 * len(points)), layout="constrained")
    grid = figure.subplots(len(points), 2, squeeze=False)
    for panels, (axis, lines) in zip(grid, points.items(), strict=True):
        for axes, name, values in zip(panels, ("seconds", "MiB"), _columns(lines), strict=True):
            _draw_panel(axes, axis, lines, values=values)
            axes.set_ylabel(name)
    figure.suptitle(_TITLE, x=0.01, ha="left")
    grid[0][0].set_title("processor seconds, one thread", loc="left", fontsize="medium")
    grid[0][1].set_title("memory beyond the inputs", loc="left", fontsize="medium")
    return figure_bytes(figure, "png")


def _columns(lines: dict[str, list[Point]]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, and MiB, of each line."""
    seconds = {name: [p.seconds for p in line] for name, line in lines.items()}
    mib = {name: [max(p.num_bytes / 2**20, _SMALLEST_MIB) for p in line] for name, line in lines.items()}
    return seconds, mib


def _draw_panel(axes: "Axes", axis: Axis, lines: dict[str, list[Point]], *, values: dict[str, list[float]]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    label, letter = _LABELS[axis]
    for (name, line), color, marker in zip(lines.items(), _COLORS, _MARKERS, strict=False):
        sizes = [p.size for p in line]
        text = f"{name}: {letter}^{exponent(sizes, values[name]):.2f}" if len(line) > 2 else name
        axes.plot(sizes, values[name], color=color, marker=marker, markersize=4, label=text)
    axes.set(xscale="log", yscale="log", xlabel=label)
    _leave_room(axes, num_lines=len(lines))
    for ticks, form in ((axes.xaxis, EngFormatter(sep="")), (axes.yaxis, StrMethodFormatter("{x:,g}"))):
        ticks.set_major_locator(LogLocator())
        ticks.set_major_formatter(form)
        ticks.set_minor_formatter(NullFormatter())
    axes.grid(color=FAINT, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, loc="upper left", borderaxespad=0.1)


def _leave_room(axes: "Axes", *, num_lines: int) -> None:
    """Two powers of ten at least, and room for the legend above the lines."""
    low, high = np.log10(axes.get_ylim())
    missing = max(2 - (high - low), 0) / 2
    low, high = low - missing, high + missing
    axes.set_ylim(10**low, 10 ** (high + (high - low) * 0.11 * num_lines))

"""What a setting does: a metric over the values of a sweep, with its spread over seeds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdkit.errors import UserError
from kdkit.plots.axes import BLUE, FAINT, GREEN, METRICS, ORANGE, PURPLE, RED, SKY, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)


def plot_sweep(
    cells: Sequence[Mapping[str, object]], *, x: str, lines: str | None = None, metric: str = "rouge_l"
) -> "Figure":
    """Which value is best, and how sure is that? One point a value, its 95 % interval over seeds, each seed as a dot.

    Args:
        cells: one a combination of values: the swept fields' names and values, and `metric` as one figure a seed.
        x: field along the horizontal axis; numbers in their places, anything else side by side.
        lines: field with a line for each value; None: one line.
        metric: a name in METRICS.
    Returns:
        The figure.
    Raises:
        UserError: there is no cell with the metric.
    """
    from scipy import stats

    measured = [cell for cell in cells if cell.get(metric)]
    if not measured:
        raise UserError(f"no run of the sweep has {metric}: there is nothing to draw")
    from matplotlib.figure import Figure

    label, more_is_better = METRICS[metric]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    values = list(dict.fromkeys(_text(cell[x]) for cell in measured))
    is_numeric = all(_is_number(cell[x]) for cell in measured)
    groups = list(dict.fromkeys(_text(cell[lines]) for cell in measured)) if lines else [""]
    for number, group in enumerate(groups):
        own = [cell for cell in measured if not lines or _text(cell[lines]) == group]
        if is_numeric:
            own.sort(key=lambda cell: float(str(cell[x])))
        shift = 0.0 if is_numeric else 0.12 * (number - (len(groups) - 1) / 2)
        places = np.array([float(str(c[x])) if is_numeric else values.index(_text(c[x])) + shift for c in own])
        seeds = [np.asarray(cell[metric], dtype=np.float64) for cell in own]
        means = np.array([seed.mean() for seed in seeds])
        halves = [stats.sem(s) * stats.t.ppf(0.975, len(s) - 1) if len(s) > 1 else 0.0 for s in seeds]
        colour = _COLOURS[number % len(_COLOURS)]
        shape = "o-" if is_numeric else "o"
        axes.errorbar(places, means, yerr=halves, fmt=shape, color=colour, capsize=3, label=group or None)
        for place, seed in zip(places, seeds, strict=True):
            axes.plot(np.full(len(seed), place), seed, ".", color=colour, alpha=0.4, markersize=4)
    if not is_numeric:
        axes.set_xticks(range(len(values)), values, parse_math=False)
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel(f"{label}, {'more' if more_is_better else 'less'} is better")
    axes.grid(color=FAINT, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        axes.legend(title=lines, frameon=False)
    num_seeds = max(len(_figures(cell, metric)) for cell in measured)
    seeds_said = f"{num_seeds} seeds; bars: 95 % t interval" if num_seeds > 1 else "1 seed: no interval"
    figure.supxlabel(seeds_said, fontsize="small")
    figure.suptitle(wrapped(_finding(measured, x=x, lines=lines, metric=metric)))
    return figure


def _finding(cells: Sequence[Mapping[str, object]], *, x: str, lines: str | None, metric: str) -> str:
    """The best and the worst of it."""
    label, more_is_better = METRICS[metric]
    ordered = sorted(cells, key=lambda cell: float(np.mean(_figures(cell, metric))), reverse=more_is_better)

    def said(cell: Mapping[str, object]) -> str:
        names = [name for name in (x, lines) if name]
        setting = ", ".join(f"{name.rsplit('.', 1)[-1]} {_text(cell[name])}" for name in names)
        return f"{np.mean(_figures(cell, metric)):.1f} at {setting}"

    best = f"{label.removesuffix(' (%)')}: best {said(ordered[0])}"
    return best if len(ordered) == 1 else f"{best}, worst {said(ordered[-1])}"


def _figures(cell: Mapping[str, object], metric: str) -> Sequence[float]:
    figures = cell[metric]
    assert isinstance(figures, Sequence)
    return figures


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)

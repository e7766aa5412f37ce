"""How a run went: loss and parts, weights, learning rate, and the evaluations while it trained."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdkit.errors import UserError
from kdkit.plots.axes import (
    BLUE,
    INK,
    METRICS,
    RED,
    Row,
    choose_scale,
    column,
    draw_stages,
    mark_stages,
    number,
    rows_of_kind,
    run_steps,
    stacked_panels,
    stage_begins,
    wrapped,
)
from kdkit.plots.terms import MOST_LINES, not_finite, plot_terms, term_colours, term_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_training(metrics_rows: Sequence[Row]) -> "Figure":
    """Is it learning, and from what? Loss and its parts, the terms' weights and the learning rate over optimizer steps.

    Args:
        metrics_rows: rows of metrics.jsonl in order; those of kind "train" are drawn. Stages follow each other.
    Returns:
        Figure of three panels with one step axis; of more than three terms, as `plot_terms`.
    Raises:
        UserError: there is no row of kind "train".
    """
    rows = rows_of_kind(metrics_rows, "train")
    terms = term_names(rows, "part/", "weight/")
    if len(terms) > MOST_LINES:
        return plot_terms(metrics_rows)
    begins, colours = stage_begins(metrics_rows), term_colours(terms)
    figure, (loss_axes, weight_axes, rate_axes) = stacked_panels(3, height=6.2, ratios=(3, 1.3, 1))
    parts = term_names(rows, "part/")
    draw_stages(loss_axes, rows, "loss", begins, color=INK, linewidth=2, label="total")
    for name in parts:
        draw_stages(loss_axes, rows, f"part/{name}", begins, color=colours[name], label=name)
    choose_scale(loss_axes, [column(rows, "loss"), *(column(rows, f"part/{name}") for name in parts)])
    loss_axes.set_ylabel("loss per token\n(dtw: per sequence)" if "dtw" in parts else "loss per token")
    for name in term_names(rows, "weight/"):
        draw_stages(weight_axes, rows, f"weight/{name}", begins, color=colours[name], drawstyle="steps-post")
    weight_axes.set_ylabel("weight")
    weight_axes.set_ylim(bottom=0)
    draw_stages(rate_axes, rows, "learning_rate", begins, color=INK)
    rate_axes.set_ylabel("learning\nrate")
    rate_axes.ticklabel_format(axis="y", scilimits=(0, 0))
    rate_axes.set_xlabel("optimizer steps")
    loss_axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="parts before\ntheir weights")
    mark_stages((loss_axes, weight_axes, rate_axes), begins)
    figure.suptitle(wrapped(_training_finding(rows, parts, begins)))
    return figure


def plot_evaluations(metrics_rows: Sequence[Row]) -> "Figure":
    """Do the answers get better while it trains? ROUGE-L and perplexity on validation rows over optimizer steps.

    Args:
        metrics_rows: rows of metrics.jsonl in order; those of kind "eval" are drawn. Stages follow each other.
    Returns:
        Figure with a panel for each of ROUGE-L and perplexity that was measured.
    Raises:
        UserError: there is no row of kind "eval", or none with a figure.
    """
    rows = rows_of_kind(metrics_rows, "eval")
    begins = stage_begins(metrics_rows)
    measured = [name for name in ("rouge_l", "perplexity") if np.isfinite(column(rows, name)).any()]
    if not measured:
        raise UserError("the evaluation rows hold neither rouge_l nor perplexity: there is nothing to draw")
    figure, panels = stacked_panels(len(measured), height=2.3 * len(measured) + 0.6)
    steps = run_steps(rows, begins)
    for name, axes in zip(measured, panels, strict=True):
        label, more_is_better = METRICS[name]
        values = column(rows, name)
        shown = np.isfinite(values)
        axes.plot(steps[shown], values[shown], color=BLUE, marker="o", markersize=4)
        best = _best(values, more_is_better)
        axes.plot(steps[best], values[best], marker="o", markersize=9, markerfacecolor="none", color=RED)
        axes.set_ylabel(label)
        choose_scale(axes, [values] if name == "perplexity" else [])
        if axes.get_yscale() == "linear":
            axes.set_ylim(0, 1.1 * max(values[shown].max(), 1e-9))
    panels[-1].set_xlabel("optimizer steps (ring: best)")
    mark_stages(panels, begins)
    figure.suptitle(wrapped(_evaluation_finding(steps, rows, measured[0])))
    return figure


def _training_finding(rows: Sequence[Row], parts: Sequence[str], begins: Mapping[str, float]) -> str:
    """Of the last stage: weights change between stages, and with them what the total means."""
    if broken := not_finite(rows, begins):
        return broken
    stage = str(rows[-1].get("stage", ""))
    rows = [row for row in rows if str(row.get("stage", "")) == stage]
    active = [name for name in parts if number(rows[-1], f"weight/{name}")]
    place = f"{stage}, {number(rows[-1], 'step') or 0:.0f} steps: " if stage else ""
    if len(active) < 2:
        return place + _change("loss", column(rows, "loss"))
    return place + ", ".join(_change(name, column(rows, f"part/{name}")) for name in active)


def _change(name: str, values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return f"{name} was not measured"
    first, last = (f"{value:.3g}" for value in (finite[0], finite[-1]))
    return f"{name} stayed at {last}" if first == last else f"{name} {first} → {last}"


def _evaluation_finding(steps: np.ndarray, rows: Sequence[Row], name: str) -> str:
    label, more_is_better = METRICS[name]
    values = column(rows, name)
    finite = np.flatnonzero(np.isfinite(values))
    first, last, best = values[finite[0]], values[finite[-1]], _best(values, more_is_better)
    label = label[0].upper() + label[1:].removesuffix(" (%)")
    if len(finite) == 1:
        return f"{label} is {last:.4g} after {steps[finite[0]]:.0f} steps"
    verb = "rose" if last > first else "fell" if last < first else "stayed"
    where = "" if best == finite[-1] else f"; best: {values[best]:.4g} at step {steps[best]:.0f}"
    return f"{label} {verb} from {first:.4g} to {last:.4g}{where}"


def _best(values: np.ndarray, more_is_better: bool) -> int:
    return int(np.nanargmax(values) if more_is_better else np.nanargmin(values))

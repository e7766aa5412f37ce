"""A run that is being steered: what it loses, which knobs stand where, and when someone turned them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdkit.plots.axes import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KNOBS = {
    "weight/kd": ("kd weight", BLUE),
    "weight/lm": ("lm weight", ORANGE),
    "weight/dtw": ("dtw weight", GREEN),
    "kd_temperature": ("temperature", PURPLE),
    "rollout/threshold": ("threshold φ", RED),
}
"""Figure of a log row -> what a reader calls it, and its colour."""
_FIELDS = (
    *(f"objective.{name}.weight" for name in ("kd", "lm", "dtw")),
    "objective.kd.temperature",
    "rollout.threshold",
)
FIELD_NAMES = {field: label for field, (label, _) in zip(_FIELDS, KNOBS.values(), strict=True)}
"""Field that can be changed -> what a reader calls it."""
_MOST_CHANGES_IN_TITLE = 2


def plot_live(metrics_rows: Sequence[Row]) -> "Figure":
    """What did turning the knobs do? Loss and parts above, the knobs below, with a line where one was turned.

    Args:
        metrics_rows: rows of metrics.jsonl in order; those of kind "train" are drawn, those of kind "change" are lines.
            Where evaluations measured ROUGE-L, it has a panel of its own.
    Returns:
        Figure of two or three panels with one step axis.
    Raises:
        UserError: there is no row of kind "train".
    """
    rows, begins = rows_of_kind(metrics_rows, "train"), stage_begins(metrics_rows)
    evaluations = [row for row in metrics_rows if row.get("kind") == "eval" and number(row, "rouge_l") is not None]
    changes = [row for row in metrics_rows if row.get("kind") == "change"]
    ratios = (3, 2, 1.5) if evaluations else (3, 2)
    figure, panels = stacked_panels(len(ratios), height=2.1 * len(ratios) + 0.4, ratios=ratios)
    _draw_losses(panels[0], rows, begins)
    _draw_knobs(panels[1], rows, begins)
    if evaluations:
        panels[2].plot(run_steps(evaluations, begins), column(evaluations, "rouge_l"), color=BLUE, marker="o")
        panels[2].set_ylabel("validation\nROUGE-L (%)")
        panels[2].set_ylim(0, 1.15 * max(column(evaluations, "rouge_l").max(), 1.0))
    for step in run_steps(changes, begins):
        for axes in panels:
            axes.axvline(step, color=INK, linewidth=1, linestyle="--")
    panels[-1].set_xlabel("optimizer steps (dashed: a knob was turned)" if changes else "optimizer steps")
    mark_stages(panels, begins)
    figure.suptitle(wrapped(_finding(rows, changes, begins)))
    return figure


def _draw_losses(axes: "Axes", rows: Sequence[Row], begins: Mapping[str, float]) -> None:
    parts = {f"part/{name}": KNOBS[f"weight/{name}"][1] for name in ("kd", "lm", "dtw")}
    shown = {name: colour for name, colour in parts.items() if np.isfinite(column(rows, name)).any()}
    draw_stages(axes, rows, "loss", begins, color=INK, linewidth=2, label="total")
    for name, colour in shown.items():
        draw_stages(axes, rows, name, begins, color=colour, label=name.removeprefix("part/"))
    choose_scale(axes, [column(rows, name) for name in ("loss", *shown)])
    axes.set_ylabel("loss")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="parts before\ntheir weights")


def _draw_knobs(axes: "Axes", rows: Sequence[Row], begins: Mapping[str, float]) -> None:
    shown = {name: knob for name, knob in KNOBS.items() if np.isfinite(column(rows, name)).any()}
    for index, (name, (label, colour)) in enumerate(shown.items()):
        width = 1.2 + 0.8 * (len(shown) - 1 - index)  # knobs that stand at the same value lie over each other
        draw_stages(axes, rows, name, begins, color=colour, label=label, drawstyle="steps-pre", linewidth=width)
    axes.set_ylabel("knobs")
    axes.set_ylim(bottom=0)
    if shown:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.axhline(0, color=FAINT, linewidth=0.5)


def _finding(rows: Sequence[Row], changes: Sequence[Row], begins: Mapping[str, float]) -> str:
    """Where it is and what was changed last, in steps of the whole run."""
    said = f"step {run_steps(rows[-1:], begins)[0]:.0f}: loss {column(rows[-1:], 'loss')[0]:.3g}"
    turned = [
        f"{FIELD_NAMES[field]} {value:.3g} from step {step + 1:.0f} on"
        for row, step in zip(changes, run_steps(changes, begins), strict=True)
        for field, value in row.items()
        if field in FIELD_NAMES and isinstance(value, int | float)
    ]
    return "; ".join([said[0].upper() + said[1:], *turned[-_MOST_CHANGES_IN_TITLE:]])

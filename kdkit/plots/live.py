"""A run that is being steered: what it loses, which knobs stand where, and when someone turned them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdkit.config.objective import TERM_NAMES
from kdkit.plots.axes import (
    BLUE,
    FAINT,
    INK,
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
from kdkit.plots.terms import FROM_ZERO, MOST_LINES, PARTS, WEIGHTS, Strip, term_colours, term_grid, term_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KNOBS = {"kd_temperature": ("temperature", PURPLE), "rollout/threshold": ("threshold φ", RED)}
"""Figure of a log row, beside the weights -> what a reader calls it, and its colour."""
FIELD_NAMES = {
    **{f"objective.{name}.weight": f"{name} weight" for name in TERM_NAMES},
    "objective.kd.temperature": "temperature",
    "rollout.threshold": "threshold φ",
}
"""Field that can be changed -> what a reader calls it."""
_MOST_CHANGES_IN_TITLE = 2


def plot_live(metrics_rows: Sequence[Row]) -> "Figure":
    """What did turning the knobs do? Loss and parts above, the knobs below, with a line where one was turned.

    Args:
        metrics_rows: rows of metrics.jsonl in order; those of kind "train" are drawn, those of kind "change" are lines.
            Where evaluations measured ROUGE-L, it has a panel of its own.
    Returns:
        Figure of two or three panels with one step axis; of more than three terms, with strips for each.
    Raises:
        UserError: there is no row of kind "train".
    """
    rows, begins = rows_of_kind(metrics_rows, "train"), stage_begins(metrics_rows)
    evaluations = [row for row in metrics_rows if row.get("kind") == "eval" and number(row, "rouge_l") is not None]
    changes = [row for row in metrics_rows if row.get("kind") == "change"]
    terms = term_names(rows, "part/", "weight/")
    draw = _draw_strips if len(terms) > MOST_LINES else _draw_panels
    figure, panels = draw(rows, evaluations, begins, terms)
    for step in run_steps(changes, begins):
        for axes in panels:
            axes.axvline(step, color=INK, linewidth=1, linestyle="--")
    figure.supxlabel("optimizer steps (dashed: a knob was turned)" if changes else "optimizer steps", fontsize="medium")
    mark_stages(panels, begins)
    figure.suptitle(wrapped(_finding(rows, changes, begins)))
    return figure


def _draw_panels(
    rows: Sequence[Row], evaluations: Sequence[Row], begins: Mapping[str, float], terms: Sequence[str]
) -> tuple["Figure", list["Axes"]]:
    """Few terms: their lines in one panel, the knobs in another."""
    ratios = (3, 2, 1.5) if evaluations else (3, 2)
    figure, panels = stacked_panels(len(ratios), height=2.1 * len(ratios) + 0.4, ratios=ratios)
    colours = term_colours(terms)
    _draw_losses(panels[0], rows, begins, colours)
    _draw_knobs(panels[1], rows, begins, colours)
    if evaluations:
        panels[2].plot(run_steps(evaluations, begins), column(evaluations, "rouge_l"), color=BLUE, marker="o")
        panels[2].set_ylabel("validation\nROUGE-L (%)")
        panels[2].set_ylim(0, 1.15 * max(column(evaluations, "rouge_l").max(), 1.0))
    return figure, panels


def _draw_strips(
    rows: Sequence[Row], evaluations: Sequence[Row], begins: Mapping[str, float], terms: Sequence[str]
) -> tuple["Figure", list["Axes"]]:
    """Many terms: a strip for each and its weight, the other knobs and ROUGE-L below."""
    loss = (
        Strip("loss", INK, "total loss"),
        Strip("kd_temperature", PURPLE, "temperature", held=True, bounds=FROM_ZERO),
    )
    score = (
        Strip("rouge_l", BLUE, "validation ROUGE-L (%)"),
        Strip("rollout/threshold", RED, "threshold φ", held=True, bounds=FROM_ZERO),
    )
    has_score = evaluations or np.isfinite(column(rows, "rollout/threshold")).any()
    scores = [{name: row.get(name) for name in ("stage", "step", "rouge_l")} for row in evaluations]
    together = sorted([*rows, *scores], key=lambda row: run_steps([row], begins)[0])
    below = [score, loss] if has_score else [loss]
    figure, panels = term_grid(together, begins, columns=(PARTS, WEIGHTS), below=below)
    return figure, [axes for axes in panels if axes.axison]


def _draw_losses(axes: "Axes", rows: Sequence[Row], begins: Mapping[str, float], colours: Mapping[str, str]) -> None:
    shown = {
        f"part/{name}": colour for name, colour in colours.items() if np.isfinite(column(rows, f"part/{name}")).any()
    }
    draw_stages(axes, rows, "loss", begins, color=INK, linewidth=2, label="total")
    for name, colour in shown.items():
        draw_stages(axes, rows, name, begins, color=colour, label=name.removeprefix("part/"))
    choose_scale(axes, [column(rows, name) for name in ("loss", *shown)])
    axes.set_ylabel("loss")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="parts before\ntheir weights")


def _draw_knobs(axes: "Axes", rows: Sequence[Row], begins: Mapping[str, float], colours: Mapping[str, str]) -> None:
    knobs = {f"weight/{name}": (f"{name} weight", colour) for name, colour in colours.items()} | _KNOBS
    shown = {name: knob for name, knob in knobs.items() if np.isfinite(column(rows, name)).any()}
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

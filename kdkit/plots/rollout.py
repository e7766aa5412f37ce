"""What the student's own text does to a run: how much of it there is, what the guard refuses, and what it leads to."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdkit.errors import UserError
from kdkit.plots.axes import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Row,
    column,
    mark_stages,
    rows_of_kind,
    run_steps,
    stacked_panels,
    stage_begins,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOURCES = {"gold": ORANGE, "fresh": BLUE, "replayed": SKY, "empty": FAINT}
_REASON_COLOURS = (RED, PURPLE, ORANGE, SKY, GREEN, FAINT)
PREFIX = "rollout/"


def plot_rollout(metrics_rows: Sequence[Row]) -> "Figure":
    """What does the student's own text do? Sources of the rows, threshold and ROUGE-L, and what the guard refuses.

    Args:
        metrics_rows: rows of metrics.jsonl in order, some of which speak of a rollout. Stages follow each other.
    Returns:
        Figure of two panels with one step axis, and a third where texts were refused or a guard was there to do so; a
        dotted line marks where the threshold was taken back.
    Raises:
        UserError: no row speaks of a rollout.
    """
    begins = stage_begins(metrics_rows)
    rows = [row for row in rows_of_kind(metrics_rows, "train") if f"{PREFIX}threshold" in row]
    if not rows:
        raise UserError("no row of the metrics speaks of a rollout: the run trained on no text of the student")
    evaluations = [row for row in metrics_rows if row.get("kind") == "eval"]
    is_judged = bool(refusals(rows)) or any(f"{PREFIX}pass_fraction" in row for row in rows)
    ratios = (1.2, 1.5, 1.2) if is_judged else (1.2, 1.5)
    figure, panels = stacked_panels(len(ratios), height=1.8 * sum(ratios), ratios=ratios)
    mix_axes, threshold_axes = panels[:2]
    steps = run_steps(rows, begins)
    draw_sources(mix_axes, steps, {name: np.nan_to_num(column(rows, f"{PREFIX}{name}_fraction")) for name in SOURCES})
    _draw_threshold(threshold_axes, steps, rows)
    _draw_rouge_l(threshold_axes, run_steps(evaluations, begins), evaluations)
    for step in run_steps([row for row in evaluations if _is_taken_back(row)], begins):
        threshold_axes.axvline(step, color=RED, linewidth=1.2, linestyle=":")
    if is_judged:
        _draw_refusals(panels[2], steps, rows)
    panels[-1].set_xlabel("optimizer steps")
    mark_stages(panels, begins)
    figure.suptitle(wrapped(_finding(rows, evaluations)))
    return figure


def _is_taken_back(row: Row) -> bool:
    return bool(row.get(f"{PREFIX}taken_back"))


def draw_sources(axes: "Axes", steps: np.ndarray, every: Mapping[str, np.ndarray], *, legend_at: float = 1.1) -> None:
    """The shares of the training rows by source, up to each step; empty prompts only where there are some."""
    shares = {name: share for name, share in every.items() if name != "empty" or share.any()}
    axes.stackplot(
        edges(steps),
        *(np.append(share, share[-1:]) for share in shares.values()),
        labels=list(shares),
        colors=[SOURCES[name] for name in shares],
        step="post",
        alpha=0.85,
    )
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of\ntraining rows")
    axes.legend(loc="center left", bbox_to_anchor=(legend_at, 0.5), frameon=False)


def _draw_threshold(axes: "Axes", steps: np.ndarray, rows: Sequence[Row]) -> None:
    values = column(rows, f"{PREFIX}threshold")
    axes.plot(edges(steps), np.append(values, values[-1:]), color=INK, drawstyle="steps-post")
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("threshold φ")


def _draw_rouge_l(axes: "Axes", steps: np.ndarray, evaluations: Sequence[Row]) -> None:
    """On an axis of its own at the right."""
    values = column(evaluations, "rouge_l")
    shown = np.isfinite(values)
    if not shown.any():
        return
    right = axes.twinx()
    right.plot(steps[shown], values[shown], color=BLUE, marker="o", markersize=4)
    right.set_ylim(0, 1.1 * max(values[shown].max(), 1e-9))
    right.set_ylabel("validation\nROUGE-L (%)", color=BLUE)
    right.tick_params(axis="y", colors=BLUE)
    right.spines["top"].set_visible(False)


def _draw_refusals(axes: "Axes", steps: np.ndarray, rows: Sequence[Row]) -> None:
    """Shares of the generated texts by reason; what is left up to 1 passed."""
    shares = refusals(rows)
    if shares:
        axes.stackplot(
            edges(steps),
            *(np.append(share, share[-1:]) for share in shares.values()),
            labels=[name.replace("_", " ") for name in shares],
            colors=_REASON_COLOURS[: len(shares)],
            step="post",
            alpha=0.85,
        )
        axes.legend(loc="center left", bbox_to_anchor=(1.1, 0.5), frameon=False, title="refused as")
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of\ngenerated texts")


def refusals(rows: Sequence[Row]) -> Mapping[str, np.ndarray]:
    """Reason -> share of the generated texts that were refused for it, one a row; reasons that never held left out."""
    prefix = f"{PREFIX}refused/"
    names = dict.fromkeys(key.removeprefix(prefix) for row in rows for key in row if key.startswith(prefix))
    shares = {name: np.nan_to_num(column(rows, prefix + name)) for name in names}
    return {name: share for name, share in shares.items() if share.any()}


def edges(steps: np.ndarray) -> np.ndarray:
    """Where a row's steps begin, and where the last one's end: a log row speaks of the steps up to it."""
    return np.concatenate([[max(steps[0] - 1, 0)], steps]) if len(steps) else steps


def _finding(rows: Sequence[Row], evaluations: Sequence[Row]) -> str:
    """How much of the student's text was trained on, what became of the rest, and what the threshold did."""
    weights = np.diff(edges(run_steps(rows, dict.fromkeys([str(row.get("stage", "")) for row in rows], 0.0))))
    weights = np.maximum(weights, 1.0)
    own = sum(np.nan_to_num(column(rows, f"{PREFIX}{name}_fraction")) for name in ("fresh", "replayed"))
    sentence = f"{np.average(own, weights=weights):.0%} of the training rows were the student's own text"
    passed = column(rows, f"{PREFIX}pass_fraction")
    asked = np.isfinite(passed)
    if asked.any():
        sentence += f"; the guard let {passed[asked].mean():.0%} pass"
    taken_back = sum(map(_is_taken_back, evaluations))
    if taken_back:
        sentence += f"; the threshold was taken back {'once' if taken_back == 1 else f'{taken_back} times'}"
    last = [value for value in column(evaluations, "rouge_l") if math.isfinite(value)]
    return sentence + (f"; ROUGE-L ended at {last[-1]:.1f}" if last else "")

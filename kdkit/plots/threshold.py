"""What a threshold leads to: the mix of rows, the threshold itself and ROUGE-L over steps, from a sweep's traces."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdkit.errors import UserError
from kdkit.plots.axes import BLUE, FAINT, GREEN, INK, RED, stacked_panels, wrapped
from kdkit.plots.rollout import SOURCES, draw_sources, edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trace = Mapping[str, Any]
"""One run of a sweep: `label`, `threshold`, `seed`; over `train_steps` the shares `gold`, `fresh`, `replayed`, `empty`
and the threshold `phi`; over `eval_steps` the validation `rouge_l` and whether the threshold was `taken_back`."""

_OTHER_COLOURS = (GREEN, RED, INK)


def plot_threshold(traces: Sequence[Trace], *, threshold: float, label: str) -> "Figure":
    """What does this threshold lead to? Sources of the rows, φ and ROUGE-L over steps, beside every other threshold's.

    Args:
        traces: of a sweep, each run once.
        threshold: the one to look at.
        label: whose traces: others' of the same threshold are dashed.
    Returns:
        Figure of three panels with one step axis: means over seeds, bands from the lowest to the highest seed.
    Raises:
        UserError: no trace has that label and threshold.
    """
    chosen = _of(traces, label, threshold)
    if not chosen:
        known = sorted({trace["threshold"] for trace in traces if trace["label"] == label})
        raise UserError(f"no run of {label!r} has threshold {threshold:g}; it has {known or 'none'}")
    figure, (mix_axes, phi_axes, rouge_axes) = stacked_panels(3, height=7.4, ratios=(1.1, 0.9, 1.6))
    _draw_mix(mix_axes, chosen)
    _draw_phi(phi_axes, chosen)
    _draw_rouge_l(rouge_axes, traces, threshold=threshold, label=label)
    figure.suptitle(_finding(traces, threshold=threshold, label=label), parse_math=False)
    return figure


def values_of_seeds(traces: Sequence[Trace], name: str, steps_name: str) -> tuple[np.ndarray, np.ndarray]:
    """A figure of several seeds at the steps that all of them have.

    Args:
        traces: at least one.
        name: of the figure.
        steps_name: `train_steps` or `eval_steps`.
    Returns:
        (S,) steps; (seeds, S) values, NaN where one was not measured.
    """
    steps = sorted(set.intersection(*(set(trace[steps_name]) for trace in traces)))
    held = [dict(zip(trace[steps_name], trace[name], strict=True)) for trace in traces]
    values = np.array([[np.nan if own[step] is None else own[step] for step in steps] for own in held])
    return np.array(steps), values.reshape(len(traces), len(steps))


def _of(traces: Sequence[Trace], label: str, threshold: float) -> list[Trace]:
    return [t for t in traces if t["label"] == label and np.isclose(t["threshold"], threshold)]


def _draw_mix(axes: "Axes", chosen: Sequence[Trace]) -> None:
    steps, _ = values_of_seeds(chosen, "gold", "train_steps")
    shares = {name: values_of_seeds(chosen, name, "train_steps")[1].mean(0) for name in SOURCES}
    draw_sources(axes, steps, shares, legend_at=1.0)


def _draw_phi(axes: "Axes", chosen: Sequence[Trace]) -> None:
    steps, values = values_of_seeds(chosen, "phi", "train_steps")
    ends = edges(steps)
    low, mean, high = (np.append(line, line[-1:]) for line in (values.min(0), values.mean(0), values.max(0)))
    axes.fill_between(ends, low, high, step="post", color=INK, alpha=0.15, linewidth=0)
    axes.plot(ends, mean, color=INK, drawstyle="steps-post")
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("threshold φ")
    taken_back = sum(any(trace["taken_back"]) for trace in chosen)
    if taken_back:
        said = f"taken back in\n{taken_back} of {len(chosen)} runs"
        axes.annotate(said, (1.04, 0.5), xycoords="axes fraction", verticalalignment="center")


def _draw_rouge_l(axes: "Axes", traces: Sequence[Trace], *, threshold: float, label: str) -> None:
    """Every threshold of the label faint, the chosen one bold with its seeds' band, that of other labels dashed."""
    steps, values = _rouge_l(_of(traces, label, threshold))
    axes.fill_between(steps, values.min(0), values.max(0), color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(steps, values.mean(0), color=BLUE, linewidth=2.6, marker="o", markersize=4, label=_lines(label), zorder=3)
    for other in sorted({trace["threshold"] for trace in traces if trace["label"] == label} - {threshold}):
        steps, values = _rouge_l(_of(traces, label, other))
        axes.plot(steps, values.mean(0), color=FAINT, linewidth=0.9, alpha=0.7)
    for name, colour in zip(_other_labels(traces, label), _OTHER_COLOURS, strict=False):
        own = _of(traces, name, threshold)
        if own:
            steps, values = _rouge_l(own)
            axes.plot(steps, values.mean(0), color=colour, linestyle="--", linewidth=1.8, label=_lines(name))
    axes.plot([], [], color=FAINT, linewidth=0.9, label="its other\nthresholds")
    highest = max((x for t in traces for x in t["rouge_l"] if x is not None), default=0.0)
    axes.set_ylim(0, 1.08 * max(highest, 1e-9))  # the same for every choice
    axes.set_ylabel("validation ROUGE-L (%)")
    axes.set_xlabel("optimizer steps")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _rouge_l(traces: Sequence[Trace]) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which every seed has one, and the values."""
    steps, values = values_of_seeds(traces, "rouge_l", "eval_steps")
    measured = np.isfinite(values).all(0)
    return steps[measured], values[:, measured]


def _other_labels(traces: Sequence[Trace], label: str) -> list[str]:
    return [name for name in dict.fromkeys(trace["label"] for trace in traces) if name != label]


def _lines(label: str) -> str:
    """A label in lines that fit beside the panel."""
    return wrapped(label, 16)


def _mean_share(chosen: Sequence[Trace], name: str) -> float:
    """Over all steps and seeds: a log row weighs as much as the steps it speaks of."""
    steps, shares = values_of_seeds(chosen, name, "train_steps")
    return float(np.average(shares.mean(0), weights=np.maximum(np.diff(edges(steps)), 1.0))) if len(steps) else 0.0


def _finding(traces: Sequence[Trace], *, threshold: float, label: str) -> str:
    """How much of the student's text was used; below it, what ROUGE-L came to beside that without it."""
    chosen = _of(traces, label, threshold)
    own = sum(_mean_share(chosen, name) for name in ("fresh", "replayed"))
    used = f"φ = {threshold:g}, {label}: {own:.0%} of the rows were the student's own text"
    _, values = _rouge_l(chosen)
    if not values.size:
        return used
    seeds = f" ({len(chosen)} seeds)" if len(chosen) > 1 else ""
    ended = f"validation ROUGE-L ended at {values[:, -1].mean():.1f}{seeds}"
    without = _rouge_l(_of(traces, label, 0.0))[1] if threshold and _of(traces, label, 0.0) else np.empty((0, 0))
    beside = f", without own text at {without[:, -1].mean():.1f}" if without.size else ""
    return f"{wrapped(used)};\n{ended}{beside}"

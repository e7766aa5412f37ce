"""What a curriculum plans, whose gradient moves the student, and what a term was worth."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdkit.errors import UserError
from kdkit.plots.axes import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, Row, column, number, rows_of_kind, wrapped
from kdkit.plots.terms import FROM_ZERO, Column, Strip, most_of, term_grid, term_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIFFERENCES = {
    "cross_entropy": ("cross-entropy (nats a token)", -1),
    "rouge_l": ("ROUGE-L (points)", 1),
}
"""Figure of a comparison -> what its difference is called, and the sign of a gain."""
_AGAINST = -0.1  # cosine


def plot_schedule(planned: Sequence[Row]) -> "Figure":
    """Which term weighs how much, and when? Weights and temperature over the steps of a run that has not begun.

    Args:
        planned: one row a step, as `planned_rows` makes them: `step` (completed), `weight/<term>`, `kd_temperature` and
            `kd_scale`.
    Returns:
        Figure with a strip for each term, and two for the temperature and for what it makes of kd's loss.
    Raises:
        UserError: there is no row.
    """
    if not planned:
        raise UserError("a schedule of no steps: there is nothing to draw")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    terms = term_names(planned, "weight/")
    strips = {f"weight/{term}": (term, ORANGE) for term in terms}
    strips |= {"kd_temperature": ("temperature T", PURPLE), "kd_scale": ("kd's factor T²", BLUE)}
    figure = Figure(figsize=(7.2, 1.2 + 0.46 * len(strips)), layout="constrained")
    panels = figure.subplots(len(strips), 1, sharex=True, squeeze=False)[:, 0]
    steps = column(planned, "step")
    for axes, (name, (label, colour)) in zip(panels, strips.items(), strict=True):
        values = column(planned, name)
        axes.fill_between(steps, values, color=colour, alpha=0.35, linewidth=0)
        axes.plot(steps, values, color=colour)
        axes.set_ylim(0, 1.15 * max(values.max(), 1e-9))
        axes.set_yticks([0, values.max()], ["0", f"{values.max():.3g}"])
        axes.tick_params(labelsize="small")
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color=FAINT, alpha=0.3)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panels[-1].set_xlabel("completed optimizer steps")
    figure.suptitle(wrapped(_schedule_finding(planned, terms)))
    return figure


def plot_gradients(rows: Sequence[Row]) -> "Figure":
    """Whose gradient moves the student? Each term's share of the gradients' norms, and whether it pulls along.

    Args:
        rows: those of kind "gradient", as `gradient_rows` makes them, are drawn.
    Returns:
        Figure with two strips a term, and the norm of the whole gradient.
    Raises:
        UserError: there is no row of kind "gradient".
    """
    rows = rows_of_kind(rows, "gradient")
    columns = (
        Column("gradient_share/", "share of the gradients' norms (%)", BLUE, bounds=FROM_ZERO),
        Column("gradient_cosine/", "cosine with the whole gradient", GREEN, bounds=(-1.0, 1.0)),
    )
    below = (Strip("gradient_norm", INK, "norm of the whole gradient"), Strip("loss", INK, "total loss"))
    figure, _ = term_grid(rows, {str(rows[0].get("stage", "")): 0.0}, columns=columns, below=[below])
    figure.suptitle(wrapped(_gradient_finding(rows)))
    return figure


def plot_ablation(rows: Sequence[Row]) -> "Figure":
    """What was a term worth? The figures of runs without it less those of whole runs, paired by seed.

    Args:
        rows: one a kind of run: `without` (what it lacks), `num_seeds`, and the difference in each of DIFFERENCES with
            `_low` and `_high` where there are several seeds, as `ablation_rows` makes them.
    Returns:
        Figure with a panel for each figure that was measured.
    Raises:
        UserError: there is no row with a difference.
    """
    measured = [name for name in DIFFERENCES if any(number(row, name) is not None for row in rows)]
    if not measured:
        raise UserError(f"no run of the ablation has {' or '.join(DIFFERENCES)}: there is nothing to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.7 + 0.4 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, measured, strict=True):
        label, sign = DIFFERENCES[name]
        _draw_differences(axes, rows, name)
        axes.set_xlabel(f"difference in {label}\n{'below' if sign > 0 else 'above'} 0: the run is worse without it")
    panels[0].set_yticks(range(len(rows)), [f"without {row['without']}" for row in rows], parse_math=False)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    num_seeds = max(int(number(row, "num_seeds") or 1) for row in rows)
    note = (
        f"{num_seeds} seeds; bars: 95 % t interval of the paired differences"
        if num_seeds > 1
        else "1 seed: no interval"
    )
    figure.supxlabel(note, fontsize="small", color="#555555")
    figure.suptitle(wrapped(ablation_finding(rows, measured[0])))
    return figure


def ablation_finding(rows: Sequence[Row], metric: str = "cross_entropy") -> str:
    """What an ablation shows, in one sentence; a difference counts where its interval leaves out 0.

    Args:
        rows: as in `plot_ablation`.
        metric: one of DIFFERENCES.
    Returns:
        For instance "Cross-entropy is worse without kd; no difference is shown for lm".
    """
    label, sign = DIFFERENCES[metric][0].partition(" (")[0], DIFFERENCES[metric][1]
    shown: dict[str, list[str]] = {"worse": [], "better": [], "open": []}
    for row in rows:
        low, high = (number(row, f"{metric}_{end}") for end in ("low", "high"))
        if low is None or high is None or not (np.isfinite(low) and np.isfinite(high)):
            return f"{label[0].upper() + label[1:]}: one seed each, so that no difference can be told from chance"
        verdict = "open" if low <= 0 <= high else "better" if sign * (low + high) > 0 else "worse"
        shown[verdict].append(str(row["without"]))
    said = [f"{label} is {how} without {', '.join(shown[how])}" for how in ("worse", "better") if shown[how]]
    if shown["open"]:
        said.append(f"no difference in {label} is shown for {', '.join(shown['open'])}")
    sentence = "; ".join(said)
    return sentence[0].upper() + sentence[1:]


def _draw_differences(axes: "Axes", rows: Sequence[Row], name: str) -> None:
    axes.axvline(0, color=INK, linewidth=1)
    axes.grid(axis="x", color=FAINT, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    for place, row in enumerate(rows):
        value, low, high = (number(row, f"{name}{end}") for end in ("", "_low", "_high"))
        if value is None:
            continue
        if low is not None and high is not None and np.isfinite(high):
            axes.plot([low, high], [place, place], color=BLUE, linewidth=2, solid_capstyle="butt", alpha=0.6)
        axes.plot(value, place, marker="o", markersize=7, color=BLUE)
        text = f"{value:+.3f}" if name == "cross_entropy" else f"{value:+.1f}"
        axes.annotate(text, (value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize="small")


def _schedule_finding(planned: Sequence[Row], terms: Sequence[str]) -> str:
    """Which terms begin when, and what the temperature does to kd."""
    steps, begins = column(planned, "step"), dict[float, list[str]]()
    for term in terms:
        first = int(np.argmax(column(planned, f"weight/{term}") > 0))
        begins.setdefault(steps[max(first - 1, 0)] / steps[-1] if steps[-1] else 0.0, []).append(term)
    said = [
        f"{f'after {100 * share:.0f} % of the steps' if share else 'from the start'} {', '.join(names)}"
        for share, names in sorted(begins.items())
    ]
    scale = column(planned, "kd_scale")
    if scale[0] != scale[-1]:
        said.append(f"T² takes kd's factor from {scale[0]:.3g} to {scale[-1]:.3g}")
    sentence = "; ".join(said)
    return sentence[0].upper() + sentence[1:]


def _gradient_finding(rows: Sequence[Row]) -> str:
    last: Mapping[str, object] = rows[-1]
    shares = {name: number(last, f"gradient_share/{name}") or 0.0 for name in term_names([last], "gradient_share/")}
    against = [name for name in shares if (number(last, f"gradient_cosine/{name}") or 0.0) < _AGAINST]
    pulls = f"; against the whole: {', '.join(against)}" if against else ""
    return f"Step {number(last, 'step') or 0:.0f}: {most_of(shares)} of the gradients' norms{pulls}"

"""Figures from plain rows: each answers one question, and its title says the answer.

Rows are those of metrics.jsonl or of a comparison; no model and no trainer is needed. Figures are made without pyplot,
so that none stays open.
"""

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
_TERM_COLOURS = {"kd": BLUE, "lm": ORANGE, "dtw": GREEN}
_OTHER_COLOURS = (RED, PURPLE, SKY)
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

_SPOKEN = {"student": "the student", "after": "the student", "before": "its start"}
"""How a sentence calls the models of a run."""

_MAX_LABELLED_UNITS = 32
_NUM_CHARACTERS_SHOWN = 14


def plot_training(metrics_rows: Sequence[Row]) -> "Figure":
    """Is it learning, and from what? Loss and its parts, the terms' weights and the learning rate over optimizer steps.

    Args:
        metrics_rows: rows of metrics.jsonl in order; those of kind "train" are drawn. Stages follow each other.
    Returns:
        Figure of three panels with one step axis.
    Raises:
        UserError: there is no row of kind "train".
    """
    rows = _of_kind(metrics_rows, "train")
    begins = _stage_begins(metrics_rows)
    figure, (loss_axes, weight_axes, rate_axes) = _panels(3, height=6.2, ratios=(3, 1.3, 1))
    parts = _names(rows, "part/")
    _draw_stages(loss_axes, rows, "loss", begins, color=INK, linewidth=2, label="total")
    for name in parts:
        _draw_stages(loss_axes, rows, f"part/{name}", begins, color=_term_colour(name, parts), label=name)
    _choose_scale(loss_axes, [_column(rows, "loss"), *(_column(rows, f"part/{name}") for name in parts)])
    loss_axes.set_ylabel("loss per token\n(dtw: per sequence)" if "dtw" in parts else "loss per token")
    for name in _names(rows, "weight/"):
        colour = _term_colour(name, parts)
        _draw_stages(weight_axes, rows, f"weight/{name}", begins, color=colour, drawstyle="steps-post")
    weight_axes.set_ylabel("weight")
    weight_axes.set_ylim(bottom=0)
    _draw_stages(rate_axes, rows, "learning_rate", begins, color=INK)
    rate_axes.set_ylabel("learning\nrate")
    rate_axes.ticklabel_format(axis="y", scilimits=(0, 0))
    rate_axes.set_xlabel("optimizer steps")
    loss_axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="parts before\ntheir weights")
    _mark_stages((loss_axes, weight_axes, rate_axes), begins)
    figure.suptitle(_wrapped(_training_finding(rows, parts, begins)))
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
    rows = _of_kind(metrics_rows, "eval")
    begins = _stage_begins(metrics_rows)
    measured = [name for name in ("rouge_l", "perplexity") if np.isfinite(_column(rows, name)).any()]
    if not measured:
        raise UserError("the evaluation rows hold neither rouge_l nor perplexity: there is nothing to draw")
    figure, panels = _panels(len(measured), height=2.3 * len(measured) + 0.6)
    steps = _run_steps(rows, begins)
    for name, axes in zip(measured, panels, strict=True):
        label, more_is_better = METRICS[name]
        values = _column(rows, name)
        shown = np.isfinite(values)
        axes.plot(steps[shown], values[shown], color=BLUE, marker="o", markersize=4)
        best = _best(values, more_is_better)
        axes.plot(steps[best], values[best], marker="o", markersize=9, markerfacecolor="none", color=RED)
        axes.set_ylabel(label)
        _choose_scale(axes, [values] if name == "perplexity" else [])
        if axes.get_yscale() == "linear":
            axes.set_ylim(0, 1.1 * max(values[shown].max(), 1e-9))
    panels[-1].set_xlabel("optimizer steps (ring: best)")
    _mark_stages(panels, begins)
    figure.suptitle(_wrapped(_evaluation_finding(steps, rows, measured[0])))
    return figure


def plot_comparison(
    rows: Sequence[Row],
    *,
    student: str | None = None,
    baseline: str | None = None,
    teacher: str = "teacher",
) -> "Figure":
    """Which model answers best, and how sure is that? Each metric with its 95 % interval.

    Args:
        rows: one a model: `model` (its name) and any of rouge_l, exact_match (percent) and perplexity, each with
            `_low` and `_high` where there is an interval.
        student: the model that the title speaks of; None takes "student", else the last beside the teacher.
        baseline: what it is compared with; None takes "before", else the first beside the teacher.
        teacher: name of the teacher's row; there may be none.
    Returns:
        Figure with one panel a metric and one line a model.
    Raises:
        UserError: no rows, or none with a metric.
    """
    measured = [name for name in METRICS if any(_number(row, name) is not None for row in rows)]
    if not measured:
        raise UserError("the comparison has no row with rouge_l, exact_match or perplexity: there is nothing to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.5 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    places = range(len(rows))
    for name, axes in zip(measured, panels, strict=True):
        label, more_is_better = METRICS[name]
        for place, row in zip(places, rows, strict=True):
            _draw_interval(axes, row, name, place=place, colour=INK if row["model"] == teacher else BLUE)
        axes.set_xlabel(f"{label}\n{'more' if more_is_better else 'less'} is better")
        axes.grid(axis="x", color=FAINT, alpha=0.3)
        _start_at_zero_or_log(axes, rows, name)
    panels[0].set_yticks(places, [str(row["model"]) for row in rows], parse_math=False)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(_wrapped(comparison_finding(rows, student=student, baseline=baseline, teacher=teacher)))
    bars = f"dots: values; bars: 95 % intervals over {intervals_over(rows)}"
    figure.supxlabel(bars, fontsize="small", color="#555555")
    return figure


def comparison_finding(
    rows: Sequence[Row],
    *,
    student: str | None = None,
    baseline: str | None = None,
    teacher: str = "teacher",
) -> str:
    """What a comparison shows, in one sentence; says where intervals overlap or are missing.

    Args:
        rows: as in `plot_comparison`.
        student: as in `plot_comparison`.
        baseline: as in `plot_comparison`.
        teacher: as in `plot_comparison`.
    Returns:
        For instance "KD closes 62 % of the ROUGE-L gap between SFT and the teacher".
    """
    scored = {str(row["model"]): row for row in rows if _number(row, "rouge_l") is not None}
    others = [name for name in scored if name != teacher]
    if not others:
        return "No student was measured by ROUGE-L"
    student = student or ("student" if "student" in others else others[-1])
    if student not in scored:
        return f"{student} was not measured by ROUGE-L"
    if baseline is None:
        baseline = "before" if "before" in others else others[0]
    if baseline not in scored or baseline == student:
        sentence = _alone_finding(student, scored[student], scored.get(teacher))
    else:
        sentence = _pair_finding(student, baseline, scored, scored.get(teacher))
    return sentence.replace("the", "The", 1) if sentence.startswith("the ") else sentence


def intervals_over(rows: Sequence[Row]) -> str:
    """What the intervals of a comparison are taken over: sampling seeds where a model has several, else rows."""
    return "sampling seeds" if any((_number(row, "seeds") or 1) > 1 for row in rows) else "rows"


def plot_alignment(
    expected_alignment: np.ndarray,
    student_units: Sequence[str],
    teacher_units: Sequence[str],
    *,
    title: str | None = None,
) -> "Figure":
    """Does soft-DTW warp? The expected alignment of two sequences of units, with the path that does not warp.

    Args:
        expected_alignment: (n, m) from `kdkit.softdtw.expected_alignment`, one sample without padding; each cell is the
            probability that the alignment passes through it.
        student_units: n words; shown as labels when there are few.
        teacher_units: m words.
        title: None states how much of the alignment lies more than one unit off the diagonal.
    Returns:
        Figure with the student's units downwards and the teacher's to the right.
    Raises:
        UserError: the matrix is empty or does not fit the units.
    """
    alignment = np.asarray(expected_alignment, dtype=np.float64)
    n, m = len(student_units), len(teacher_units)
    if alignment.shape != (n, m) or alignment.size == 0:
        raise UserError(
            f"the alignment is {alignment.shape} for {n} student and {m} teacher units: "
            "give one sample cut to its own lengths, at least (1, 1)"
        )
    from matplotlib.figure import Figure

    cell = 6.0 / max(n, m)
    figure = Figure(figsize=(max(4.0, cell * m) + 2.0, max(2.6, cell * n) + 1.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(alignment, cmap="Blues", vmin=0.0, vmax=max(1.0, alignment.max()), aspect="equal")
    figure.colorbar(image, ax=axes, label="probability of passing here")
    axes.plot([0, m - 1], [0, n - 1], color=RED, linewidth=1.2, linestyle="--", label="no warping")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.01), frameon=False)
    axes.set_ylabel("student units")
    axes.set_xlabel("teacher units")
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    if max(n, m) <= _MAX_LABELLED_UNITS:
        axes.set_yticks(np.arange(n), [_shown(unit) for unit in student_units], parse_math=False)
        axes.set_xticks(
            np.arange(m), [_shown(unit) for unit in teacher_units], rotation=60, ha="left", parse_math=False
        )
    figure.suptitle(_wrapped(title or _alignment_finding(alignment), int(9 * figure.get_figwidth())))
    return figure


def figure_bytes(figure: "Figure", kind: str = "svg") -> bytes:
    """A figure as the content of a file, the same for the same figure.

    Args:
        figure: any of the above.
        kind: "svg" or "png".
    Returns:
        The file's bytes; for a notebook, `IPython.display.Image(figure_bytes(figure, "png"))` shows it.
    """
    import io

    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "kdkit"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


# --- rows to numbers -------------------------------------------------------------------------------------------------


def _of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    chosen = [row for row in rows if row.get("kind") == kind]
    if not chosen:
        raise UserError(f'{len(rows)} metrics rows, none of kind "{kind}": there is nothing to draw')
    return chosen


def _stage_begins(rows: Sequence[Row]) -> dict[str, float]:
    """Stage -> the run's step at which it begins: a stage counts its steps from 0, the figure goes through."""
    last_step: dict[str, float] = {}
    for row in rows:
        stage = str(row.get("stage", ""))
        last_step[stage] = max(last_step.get(stage, 0.0), _number(row, "step") or 0.0)
    begins = np.cumsum([0.0, *last_step.values()]).tolist()
    return dict(zip(last_step, begins, strict=False))


def _run_steps(rows: Sequence[Row], begins: Mapping[str, float]) -> np.ndarray:
    return np.array([begins[str(row.get("stage", ""))] + (_number(row, "step") or 0.0) for row in rows])


def _names(rows: Sequence[Row], prefix: str) -> list[str]:
    """What follows the prefix in some row: the best-known terms first, then as they appear."""
    found = dict.fromkeys(key.removeprefix(prefix) for row in rows for key in row if key.startswith(prefix))
    return [name for name in _TERM_COLOURS if name in found] + [name for name in found if name not in _TERM_COLOURS]


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([math.nan if (value := _number(row, name)) is None else value for row in rows])


def _best(values: np.ndarray, more_is_better: bool) -> int:
    return int(np.nanargmax(values) if more_is_better else np.nanargmin(values))


def _rouge_l(row: Row) -> float:
    return _number(row, "rouge_l") or 0.0


def _doubt(a: Row, b: Row, other: str) -> str:
    """What the ROUGE-L intervals of two models leave open, as the end of a sentence; `other` is b's name."""
    bounds = [_number(row, f"rouge_l_{end}") for row in (a, b) for end in ("low", "high")]
    if any(bound is None for bound in bounds):
        return ", with no interval to judge it by"
    a_low, a_high, b_low, b_high = (bound or 0.0 for bound in bounds)
    return f", but its 95 % interval overlaps that of {other}" if a_low <= b_high and b_low <= a_high else ""


# --- findings --------------------------------------------------------------------------------------------------------


def _training_finding(rows: Sequence[Row], parts: Sequence[str], begins: Mapping[str, float]) -> str:
    """Of the last stage: weights change between stages, and with them what the total means."""
    broken = np.flatnonzero(~np.isfinite(_column(rows, "loss")))
    if len(broken):
        return f"The loss is not finite at step {_run_steps(rows, begins)[broken[0]]:.0f}"
    stage = str(rows[-1].get("stage", ""))
    rows = [row for row in rows if str(row.get("stage", "")) == stage]
    active = [name for name in parts if _number(rows[-1], f"weight/{name}")]
    place = f"{stage}, {_number(rows[-1], 'step') or 0:.0f} steps: " if stage else ""
    if len(active) < 2:
        return place + _change("loss", _column(rows, "loss"))
    return place + ", ".join(_change(name, _column(rows, f"part/{name}")) for name in active)


def _change(name: str, values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return f"{name} was not measured"
    first, last = (f"{value:.3g}" for value in (finite[0], finite[-1]))
    return f"{name} stayed at {last}" if first == last else f"{name} {first} → {last}"


def _evaluation_finding(steps: np.ndarray, rows: Sequence[Row], name: str) -> str:
    label, more_is_better = METRICS[name]
    values = _column(rows, name)
    finite = np.flatnonzero(np.isfinite(values))
    first, last, best = values[finite[0]], values[finite[-1]], _best(values, more_is_better)
    label = label[0].upper() + label[1:].removesuffix(" (%)")
    if len(finite) == 1:
        return f"{label} is {last:.4g} after {steps[finite[0]]:.0f} steps"
    verb = "rose" if last > first else "fell" if last < first else "stayed"
    where = "" if best == finite[-1] else f"; best: {values[best]:.4g} at step {steps[best]:.0f}"
    return f"{label} {verb} from {first:.4g} to {last:.4g}{where}"


def _alone_finding(student: str, row: Row, teacher: Row | None) -> str:
    name, reached = _SPOKEN.get(student, student), _rouge_l(row)
    if teacher is None or _rouge_l(teacher) <= 0:
        return f"{name} reaches {reached:.1f} ROUGE-L"
    return f"{name} reaches {100 * reached / _rouge_l(teacher):.0f} % of the teacher's ROUGE-L"


def _pair_finding(student: str, baseline: str, scored: Mapping[str, Row], teacher: Row | None) -> str:
    reached, start = _rouge_l(scored[student]), _rouge_l(scored[baseline])
    name, other = _SPOKEN.get(student, student), _SPOKEN.get(baseline, baseline)
    doubt = _doubt(scored[student], scored[baseline], other)
    if reached == start:
        return f"{name} equals {other} in ROUGE-L"
    if reached < start:
        return f"{name} is {start - reached:.1f} ROUGE-L points below {other}{doubt}"
    if teacher is None or not start < reached <= _rouge_l(teacher):
        beyond = "" if teacher is None else f" (the teacher: {_rouge_l(teacher):.1f})"
        return f"{name} is {reached - start:.1f} ROUGE-L points above {other}{beyond}{doubt}"
    share = (reached - start) / (_rouge_l(teacher) - start)
    return f"{name} closes {100 * share:.0f} % of the ROUGE-L gap between {other} and the teacher{doubt}"


def _alignment_finding(alignment: np.ndarray) -> str:
    n, m = alignment.shape
    line = np.linspace(0, m - 1, n)  # (n,)
    slope = max(1.0, (m - 1) / max(n - 1, 1))
    away = np.abs(np.arange(m)[None, :] - line[:, None]) > slope  # (n, m)
    share = alignment[away].sum() / max(alignment.sum(), 1e-12)
    return f"{100 * share:.0f} % of the alignment lies more than one unit off the diagonal"


# --- drawing ---------------------------------------------------------------------------------------------------------


def _panels(count: int, *, height: float, ratios: Sequence[float] | None = None) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, height), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axes in panels:
        axes.grid(color=FAINT, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, list(panels)


def _term_colour(name: str, names: Sequence[str]) -> str:
    others = [other for other in names if other not in _TERM_COLOURS]
    if name in _TERM_COLOURS:
        return _TERM_COLOURS[name]
    return _OTHER_COLOURS[others.index(name) % len(_OTHER_COLOURS)] if name in others else FAINT


def _draw_stages(axes: "Axes", rows: Sequence[Row], name: str, begins: Mapping[str, float], **style: Any) -> None:
    """A line with a gap between stages, which join nothing; a dot where a line would not show."""
    steps, values = _run_steps(rows, begins), _column(rows, name)
    changes = [i for i in range(1, len(rows)) if rows[i].get("stage") != rows[i - 1].get("stage")]
    marker = "o" if np.isfinite(values).sum() == 1 else ""
    axes.plot(np.insert(steps, changes, math.nan), np.insert(values, changes, math.nan), marker=marker, **style)


def _choose_scale(axes: "Axes", columns: Sequence[np.ndarray]) -> None:
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


def _mark_stages(panels: Sequence["Axes"], begins: Mapping[str, float]) -> None:
    if len(begins) < 2:
        return
    for stage, begin in begins.items():
        for axes in panels:
            axes.axvline(begin, color=FAINT, linewidth=1, linestyle=":")
        label = panels[0].annotate(
            stage, (begin, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 2), textcoords="offset points"
        )
        label.set(fontsize="small", color="#555555", parse_math=False)


def _draw_interval(axes: "Axes", row: Row, name: str, *, place: float, colour: str) -> None:
    value = _number(row, name)
    if value is None or not math.isfinite(value):
        return
    low, high = _number(row, f"{name}_low"), _number(row, f"{name}_high")
    if low is not None and high is not None and math.isfinite(high):
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.6)
    axes.plot(value, place, marker="o", markersize=7, color=colour)
    axes.annotate(
        _written(value, name), (value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize="small"
    )


def _start_at_zero_or_log(axes: "Axes", rows: Sequence[Row], name: str) -> None:
    values = [value for row in rows if (value := _number(row, name)) is not None and math.isfinite(value)]
    if name == "perplexity" and values and min(values) > 0 and max(values) / min(values) > 10:
        axes.set_xscale("log")
        axes.margins(x=0.25)
    else:
        right = max(axes.get_xlim()[1], 1e-9)
        axes.set_xlim(-0.04 * right, 1.12 * right)


def _written(value: float, name: str) -> str:
    return f"{value:.4g}" if name == "perplexity" else f"{value:.1f}"


def _wrapped(title: str, width: int = 78) -> str:
    return textwrap.fill(title, width)


def _shown(unit: str) -> str:
    text = unit.replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= _NUM_CHARACTERS_SHOWN else text[: _NUM_CHARACTERS_SHOWN - 1] + "…"

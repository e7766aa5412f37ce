"""Several models on the same rows: each metric with its interval, and the sentence that says what it shows."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kdkit.errors import UserError
from kdkit.plots.axes import BLUE, FAINT, INK, METRICS, Row, number, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPOKEN = {"student": "the student", "after": "the student", "before": "its start"}
"""How a sentence calls the models of a run."""


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
    measured = [name for name in METRICS if any(number(row, name) is not None for row in rows)]
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
    figure.suptitle(wrapped(comparison_finding(rows, student=student, baseline=baseline, teacher=teacher)))
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
    scored = {str(row["model"]): row for row in rows if number(row, "rouge_l") is not None}
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
    return "sampling seeds" if any((number(row, "seeds") or 1) > 1 for row in rows) else "rows"


def _rouge_l(row: Row) -> float:
    return number(row, "rouge_l") or 0.0


def _doubt(a: Row, b: Row, other: str) -> str:
    """What the ROUGE-L intervals of two models leave open, as the end of a sentence; `other` is b's name."""
    bounds = [number(row, f"rouge_l_{end}") for row in (a, b) for end in ("low", "high")]
    if any(bound is None for bound in bounds):
        return ", with no interval to judge it by"
    a_low, a_high, b_low, b_high = (bound or 0.0 for bound in bounds)
    return f", but its 95 % interval overlaps that of {other}" if a_low <= b_high and b_low <= a_high else ""


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


def _draw_interval(axes: "Axes", row: Row, name: str, *, place: float, colour: str) -> None:
    value = number(row, name)
    if value is None or not math.isfinite(value):
        return
    low, high = number(row, f"{name}_low"), number(row, f"{name}_high")
    if low is not None and high is not None and math.isfinite(high):
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.6)
    axes.plot(value, place, marker="o", markersize=7, color=colour)
    axes.annotate(
        _written(value, name), (value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize="small"
    )


def _start_at_zero_or_log(axes: "Axes", rows: Sequence[Row], name: str) -> None:
    values = [value for row in rows if (value := number(row, name)) is not None and math.isfinite(value)]
    if name == "perplexity" and values and min(values) > 0 and max(values) / min(values) > 10:
        axes.set_xscale("log")
        axes.margins(x=0.25)
    else:
        right = max(axes.get_xlim()[1], 1e-9)
        axes.set_xlim(-0.04 * right, 1.12 * right)


def _written(value: float, name: str) -> str:
    return f"{value:.4g}" if name == "perplexity" else f"{value:.1f}"

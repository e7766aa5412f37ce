"""How large a model's weights are in each dtype, beside the memory that there is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kdkit.errors import UserError
from kdkit.plots.axes import BLUE, FAINT, INK, ORANGE, SKY, Row, number, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = {"embeddings": SKY, "experts": ORANGE, "other": BLUE}
_MIB, _GIB = 2**20, 2**30


def plot_weights(models: Mapping[str, Sequence[Row]]) -> "Figure":
    """What does a dtype save? The bytes of each model's weights in each dtype, by part.

    Args:
        models: name -> rows of `kdkit.inspection.weights.weight_rows`.
    Returns:
        Figure with a panel for each model.
    Raises:
        UserError: there is no model, or one without rows.
    """
    if not models or not all(models.values()):
        raise UserError("there are no weights to draw: give at least one model with a row for each dtype")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.0 + 1.75 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(panels, models.items(), strict=True):
        _draw(axes, name, rows)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(wrapped(_finding(models)))
    return figure


def _draw(axes: "Axes", name: str, rows: Sequence[Row]) -> None:
    """Bars of one model, a dtype below the other."""
    sizes = [_total(row) for row in rows]
    unit, unit_name = (_GIB, "GiB") if max(sizes) >= _GIB else (_MIB, "MiB")
    left = [0.0] * len(rows)
    for part, colour in _PARTS.items():
        widths = [(number(row, part) or 0.0) / unit for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=colour, label=part, height=0.7)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for y, end in enumerate(left):
        axes.annotate(f"{end:.3g}", (end, y), xytext=(3, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(rows)), [str(row["dtype"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel(f"{unit_name} of weights")
    axes.set_title(name, loc="left", fontsize="medium", parse_math=False)
    axes.grid(axis="x", color=FAINT, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finding(models: Mapping[str, Sequence[Row]]) -> str:
    """What 4 bits leave of half precision, and how much of that is not packed."""
    by_dtype = [{row["dtype"]: row for row in rows} for rows in models.values()]
    if not all({"float16", "nf4"} <= rows.keys() for rows in by_dtype):
        return "; ".join(f"{name} has {_total(rows[0]) / _GIB:.2g} GiB" for name, rows in models.items())
    left = [_total(rows["nf4"]) / _total(rows["float16"]) for rows in by_dtype]
    experts = [(number(rows["nf4"], "experts") or 0.0) / _total(rows["nf4"]) for rows in by_dtype]
    title = f"nf4 takes {' and '.join(f'{share:.0%}' for share in left)} of float16"
    if not any(experts):
        return title
    return f"{title}; {' and '.join(f'{share:.0%}' for share in experts)} of that are experts, which it does not pack"


def _total(row: Row) -> float:
    return sum(number(row, part) or 0.0 for part in _PARTS)

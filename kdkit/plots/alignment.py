"""Where soft-DTW aligns two sequences of units, beside the path that does not warp."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdkit.errors import UserError
from kdkit.plots.axes import RED, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_LABELLED_UNITS = 32
_NUM_CHARACTERS_SHOWN = 14


def plot_alignment(
    expected_alignment: np.ndarray,
    student_units: Sequence[str],
    teacher_units: Sequence[str],
    *,
    band: int | None = None,
    title: str | None = None,
) -> "Figure":
    """Does soft-DTW warp? The expected alignment of two sequences of units, with the path that does not warp.

    Args:
        expected_alignment: (n, m) from `kdkit.softdtw.expected_alignment`, one sample without padding; each cell is the
            probability that the alignment passes through it.
        student_units: n words; shown as labels when there are few.
        teacher_units: m words.
        band: half-width in units around the diagonal, as of `kdkit.softdtw.soft_dtw`; cells outside it are greyed.
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
    if band is not None:
        grey = np.where(_is_outside(n, m, band), 1.0, np.nan)
        axes.imshow(grey, cmap="Greys", vmin=0.0, vmax=4.0, aspect="equal", interpolation="nearest")
        axes.plot([], [], "s", color="#d9d9d9", label="outside the band")
    axes.plot([0, m - 1], [0, n - 1], color=RED, linewidth=1.2, linestyle="--", label="no warping")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.01), frameon=False, ncols=2)
    axes.set_ylabel("student units")
    axes.set_xlabel("teacher units")
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    if max(n, m) <= _MAX_LABELLED_UNITS:
        axes.set_yticks(np.arange(n), [_shown(unit) for unit in student_units], parse_math=False)
        axes.set_xticks(
            np.arange(m), [_shown(unit) for unit in teacher_units], rotation=60, ha="left", parse_math=False
        )
    figure.suptitle(wrapped(title or _alignment_finding(alignment), int(9 * figure.get_figwidth())))
    return figure


def _is_outside(n: int, m: int, band: int) -> np.ndarray:
    """(n, m) bool: cells that the slope-corrected band of `kdkit.softdtw.band` leaves out."""
    i, j = np.arange(n)[:, None], np.arange(m)[None, :]
    return np.abs(i * (m - 1) - j * (n - 1)) > band * (max(n, m) - 1)


def _alignment_finding(alignment: np.ndarray) -> str:
    n, m = alignment.shape
    line = np.linspace(0, m - 1, n)  # (n,)
    slope = max(1.0, (m - 1) / max(n - 1, 1))
    away = np.abs(np.arange(m)[None, :] - line[:, None]) > slope  # (n, m)
    share = alignment[away].sum() / max(alignment.sum(), 1e-12)
    return f"{100 * share:.0f} % of the alignment lies more than one unit off the diagonal"


def _shown(unit: str) -> str:
    text = unit.replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= _NUM_CHARACTERS_SHOWN else text[: _NUM_CHARACTERS_SHOWN - 1] + "…"

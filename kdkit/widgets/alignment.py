"""γ and band against the alignment that soft-DTW expects."""

from typing import TYPE_CHECKING, Literal

from kdkit.inspection import RunModels, read_units
from kdkit.plots import plot_alignment
from kdkit.widgets.explorer import Control, Explorer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAMMAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""From hard DTW to a blur, in units of the cost."""
BANDS = tuple(range(1, 33))
NO_BAND = "none"
"""Its value on the slider, which cannot hold None."""
WIDTH_PIXELS = 560


def alignment_explorer(models: RunModels, prompt: str, answer: str, *, teacher_answer: str | None = None) -> Explorer:
    """Sliders for γ and band; the figure is the expected alignment of one answer at the end of training.

    The answer is read once, so that a slider costs an alignment and a drawing.

    Args:
        models: of a run with a dtw term; γ and band start at the run's.
        prompt: as the models read it, template included.
        answer: the text whose hidden states are aligned.
        teacher_answer: what the teacher reads instead; training always gives both the same.
    Returns:
        The explorer; its controls are `gamma` and `band`.
    Raises:
        UserError: as `kdkit.inspection.read_units`.
    """
    units = read_units(models, prompt, answer, teacher_answer=teacher_answer)

    def draw(gamma: float, band: int | Literal["none"]) -> "Figure":
        half_width = None if band == "none" else band
        found = units.align(gamma=gamma, band=half_width)
        band_said = "no band" if half_width is None else f"band {half_width}"
        title = (
            f"γ = {gamma:g}, {band_said}: soft-DTW / diagonal = {found.cost / found.diagonal_cost:.2f}, "
            f"{found.off_diagonal_fraction:.0%} of the alignment off the diagonal"
        )
        return plot_alignment(found.matrix, found.student_units, found.teacher_units, band=half_width, title=title)

    gammas = sorted({*GAMMAS, units.gamma})
    bands = sorted({*BANDS, units.band or BANDS[-1]})
    controls = (
        Control("gamma", "smoothing γ", [(f"{gamma:g}", gamma) for gamma in gammas], units.gamma),
        Control("band", "band (units)", [(str(band), band) for band in (*bands, NO_BAND)], units.band or NO_BAND),
    )
    return Explorer(draw, controls, width_pixels=WIDTH_PIXELS)

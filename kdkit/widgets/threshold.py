"""DistiLLM's threshold φ against the mix of rows and ROUGE-L, from the results of a sweep."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kdkit.inspection import load_traces, threshold_traces
from kdkit.plots import plot_threshold
from kdkit.widgets.explorer import Control, Explorer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def threshold_explorer(sweeps: Mapping[str, str | Path] | str | Path | None = None) -> Explorer:
    """A slider for the threshold and buttons for the sweep; nothing is trained when one moves.

    Args:
        sweeps: what a reader calls a sweep -> folder of `kdkit sweep CONFIG --over rollout.threshold=0,0.1,...,0.8`; or
            a file of `kdkit.inspection.save_traces`; None: the sweep that comes with kdkit.
    Returns:
        The explorer, at the highest threshold; its controls are `threshold` and `label`.
    Raises:
        UserError: as `kdkit.inspection.threshold_traces` and `load_traces`.
    """
    traces = threshold_traces(sweeps) if isinstance(sweeps, Mapping) else load_traces(sweeps)

    def draw(threshold: float, label: str) -> "Figure":
        return plot_threshold(traces, threshold=threshold, label=label)

    labels = list(dict.fromkeys(trace["label"] for trace in traces))
    thresholds = sorted({trace["threshold"] for trace in traces})
    highest = max(trace["threshold"] for trace in traces if trace["label"] == labels[0])
    controls = (
        Control("threshold", "threshold φ", [(f"{threshold:g}", threshold) for threshold in thresholds], highest),
        Control("label", "sweep", [(label, label) for label in labels], labels[0], kind="buttons"),
    )
    return Explorer(draw, controls)

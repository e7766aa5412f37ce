"""Sliders and boxes of the notebooks: each shows something static where nobody can move one."""

from kdkit.widgets.alignment import alignment_explorer
from kdkit.widgets.diagnosis import DiagnosisBox
from kdkit.widgets.explorer import Control, Explorer, has_front_end
from kdkit.widgets.live import LiveControls
from kdkit.widgets.memory import memory_explorer
from kdkit.widgets.temperature import temperature_explorer
from kdkit.widgets.threshold import threshold_explorer

__all__ = [
    "Control",
    "DiagnosisBox",
    "Explorer",
    "LiveControls",
    "alignment_explorer",
    "has_front_end",
    "memory_explorer",
    "temperature_explorer",
    "threshold_explorer",
]

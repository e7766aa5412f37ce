"""What a run found, for people: one HTML page that needs no other file, and the same table for the terminal."""

from kdkit.report.page import Example, Illustration, RowsUsed, write_report
from kdkit.report.runs import NUM_EXAMPLES, write_comparison_report, write_run_report
from kdkit.report.tables import comparison_table, sweep_table, write_sweep_figure

__all__ = [
    "NUM_EXAMPLES",
    "Example",
    "Illustration",
    "RowsUsed",
    "comparison_table",
    "sweep_table",
    "write_comparison_report",
    "write_report",
    "write_run_report",
    "write_sweep_figure",
]

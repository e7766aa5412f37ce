"""Names what is wrong with a run from what it wrote: `diagnose_run`, and `RUN_CHECKS`, which say what each code means.

It needs neither torch nor transformers, and reads logs of other trainers too.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from kdkit.doctor.findings import Check, Diagnosis, Finding, Observation, Severity, examine
from kdkit.doctor.readers import read_traces
from kdkit.doctor.run import RUN_CHECKS
from kdkit.doctor.trace import Planned, Series, Trace

__all__ = [
    "RUN_CHECKS",
    "Check",
    "Diagnosis",
    "Finding",
    "Observation",
    "Planned",
    "Series",
    "Severity",
    "Trace",
    "diagnose_run",
    "read_traces",
]


def diagnose_run(path: Path) -> Diagnosis:
    """What a run's log shows to be wrong.

    Args:
        path: a run folder, its metrics.jsonl, a trainer_state.json or a text log.
    Returns:
        `Diagnosis`, failures first.
    Raises:
        UserError: as `read_traces`.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a log may hold any number
        traces = read_traces(path)
        read = ". ".join(f"stage {stage}: {trace}" if stage else str(trace) for stage, trace in traces.items())
        return replace(examine(str(path), traces, RUN_CHECKS), read=read)

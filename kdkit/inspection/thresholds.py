"""The traces of a sweep over rollout.threshold: gathered from its runs, kept in one file."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdkit.config.reading import demo_folder
from kdkit.errors import UserError
from kdkit.plots.axes import Row, column, rows_of_kind, run_steps, stage_begins
from kdkit.plots.rollout import PREFIX, SOURCES
from kdkit.training.checkpoint import write_text
from kdkit.training.folder import RunFolder
from kdkit.training.sweep import written

FIELD = "rollout.threshold"
TRACES_FILE = "threshold_sweep.json"
_MAKE_ONE = f"make one with `kdkit sweep CONFIG --over {FIELD}=0,0.1,...,0.8`"
_DECIMALS = 4
_KEYS = {"label", "threshold", "seed", "train_steps", "phi", "eval_steps", "rouge_l", "taken_back", *SOURCES}

Trace = dict[str, Any]


def threshold_traces(sweeps: Mapping[str, str | Path]) -> list[Trace]:
    """What every finished run of some sweeps over the threshold did while it trained.

    Args:
        sweeps: what a reader calls a sweep -> its folder, as `kdkit sweep` left it. Another field that it swept too
            becomes part of the label.
    Returns:
        One row a run, as `kdkit.plots.plot_threshold` takes them, in the order of the sweeps.
    Raises:
        UserError: a folder holds no sweep over rollout.threshold, or no finished run of one.
    """
    return [trace for label, folder in sweeps.items() for trace in _traces_of(label, Path(folder))]


def save_traces(traces: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write traces to a JSON file, a line each.

    Args:
        traces: from `threshold_traces`.
        path: of the file.
    """
    lines = ",\n".join(json.dumps(trace, ensure_ascii=False, separators=(",", ":")) for trace in traces)
    write_text(Path(path), f"[\n{lines}\n]\n")


def load_traces(path: str | Path | None = None) -> list[Trace]:
    """Read traces back.

    Args:
        path: of the file; None: the sweep that comes with kdkit.
    Returns:
        As given to `save_traces`.
    Raises:
        UserError: there is no such file, or it holds no traces.
    """
    file = demo_folder() / TRACES_FILE if path is None else Path(path)
    if not file.is_file():
        raise UserError(f"there is no {file}: {_MAKE_ONE}")
    try:
        traces = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(traces, list) or not traces or not all(_is_trace(trace) for trace in traces):
        raise UserError(f"{file} holds no traces of a sweep over {FIELD}: {_MAKE_ONE}")
    return traces


def _traces_of(label: str, folder: Path) -> list[Trace]:
    """Of one sweep, by threshold and seed."""
    file = folder / "sweep.json"
    document = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"over": {}}
    if FIELD not in document["over"]:
        raise UserError(f"{folder} holds no sweep over {FIELD}: {_MAKE_ONE}")
    finished = [run for run in document["runs"] if run["figures"] is not None]
    if not finished:
        raise UserError(f"no run of the sweep in {folder} is finished: run the same `kdkit sweep` again, it goes on")
    traces = [_trace(label, run, RunFolder(folder / run["folder"])) for run in finished]
    return sorted(traces, key=lambda trace: (trace["label"], trace["threshold"], trace["seed"]))


def _trace(label: str, run: Mapping[str, Any], folder: RunFolder) -> Trace:
    """One run's log rows as columns."""
    others = [f"{name.rsplit('.', 1)[-1]}={written(value)}" for name, value in run["values"].items() if name != FIELD]
    metrics = folder.metrics.rows()
    begins = stage_begins(metrics)
    trained = [row for row in rows_of_kind(metrics, "train") if f"{PREFIX}threshold" in row]
    evaluated = [row for row in metrics if row["kind"] == "eval"]
    columns = {name: f"{PREFIX}{name}_fraction" for name in SOURCES} | {"phi": f"{PREFIX}threshold"}
    return {
        "label": ", ".join([label, *others]),
        "threshold": float(run["values"][FIELD]),
        "seed": run["seed"],
        "train_steps": run_steps(trained, begins).tolist(),
        **{name: _rounded(trained, key, missing=0.0) for name, key in columns.items()},
        "eval_steps": run_steps(evaluated, begins).tolist(),
        "rouge_l": _rounded(evaluated, "rouge_l"),
        "taken_back": [bool(row.get(f"{PREFIX}taken_back")) for row in evaluated],
    }


def _rounded(rows: Sequence[Row], name: str, missing: float | None = None) -> list[float | None]:
    return [round(x, _DECIMALS) if math.isfinite(x) else missing for x in column(rows, name).tolist()]


def _is_trace(value: object) -> bool:
    return isinstance(value, dict) and value.keys() >= _KEYS

"""From the files that trainers leave to traces: kdkit's metrics.jsonl, HF's trainer_state.json, or else a text log."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import yaml

from kdkit.doctor.figures import Figures
from kdkit.doctor.text_log import read_text
from kdkit.doctor.trace import Planned, Trace
from kdkit.errors import UserError

Traces = dict[str | None, Trace]


def read_traces(path: Path) -> Traces:
    """What a run left, stage by stage.

    Args:
        path: a run folder of kdkit, its metrics.jsonl, a trainer_state.json or a folder that holds one, or a text log.
    Returns:
        Stage, or None where the file knows no stages -> its trace, in order.
    Raises:
        UserError: there is nothing at the path, or nothing in it that a trainer writes.
    """
    file = _log_in(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no file {path}. Give a run folder, metrics.jsonl, trainer_state.json or a text log")
    text = file.read_bytes().decode("utf-8", errors="replace")
    traces = _read(file, text)
    if not any(trace.train or trace.evals or trace.events for trace in traces.values()):
        raise UserError(
            f"{file} names no figure that a trainer logs, such as loss, lr, eval_loss or rougeL beside a step; "
            "give a log, a trainer_state.json, or the folder of a run"
        )
    return traces


def _log_in(folder: Path) -> Path:
    for name in ("metrics.jsonl", "trainer_state.json"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no run: neither metrics.jsonl nor trainer_state.json is in it")


def _read(file: Path, text: str) -> Traces:
    if file.suffix == ".json":
        return {None: _trainer_state(file, text)}
    if file.suffix == ".jsonl":
        return _metrics(file, text)
    return {None: read_text(text, source=str(file))}


# --- kdkit -----------------------------------------------------------------------------------------------------------


def _metrics(file: Path, text: str) -> Traces:
    """metrics.jsonl by stage; lines that are cut or no rows are passed over, as a run that goes on leaves one."""
    parts: dict[str, Figures] = {}
    for line in text.split("\n"):
        row = _json(line) if line.startswith("{") else None
        if isinstance(row, dict) and isinstance(row.get("stage"), str) and _is_step(row.get("step")):
            parts.setdefault(row["stage"], Figures()).add_row(row, row["step"], is_eval=row.get("kind") == "eval")
    config = _settings(file.with_name("config.yaml"))
    return {stage: figures.trace(str(file), _planned(config, stage)) for stage, figures in parts.items()}


def _settings(file: Path) -> Mapping[str, object]:
    """The resolved config beside a log; empty where there is none, or it is not readable."""
    if not file.is_file():
        return {}
    try:
        tree = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _planned(config: Mapping[str, object], stage: str) -> Planned:
    """What the config asked of a stage's learning rate."""
    optim = dict(_part(config, "optim")) | dict(_part(_part(_part(config, "stages"), stage), "optim"))
    scheduler, steps, warmup = (optim.get(name) for name in ("scheduler", "max_steps", "warmup_steps"))
    return Planned(
        num_steps=steps if _is_step(steps) else None,
        num_epochs=_positive(optim.get("epochs")),
        max_grad_norm=_positive(optim.get("max_grad_norm")),
        warmup_steps=warmup if _is_step(warmup) else None,
        scheduler=scheduler if isinstance(scheduler, str) else None,
    )


def _part(tree: object, name: str) -> Mapping[str, object]:
    part = tree.get(name) if isinstance(tree, Mapping) else None
    return part if isinstance(part, Mapping) else {}


# --- transformers ----------------------------------------------------------------------------------------------------


def _trainer_state(file: Path, text: str) -> Trace:
    state = _json(text)
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(history, list):
        raise UserError(f"{file} is no trainer_state.json: it has to be JSON with a list log_history")
    figures = Figures()
    for row in history:
        if isinstance(row, dict) and _is_step(row.get("step")):
            of_eval = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
            of_train = {name: value for name, value in row.items() if not name.startswith("eval_")}
            figures.add_row(of_train, row["step"], is_eval=False)
            figures.add_row(of_eval, row["step"], is_eval=True)
    steps = state.get("max_steps")
    planned = Planned(
        num_steps=steps if _is_step(steps) and steps else None, num_epochs=_positive(state.get("num_train_epochs"))
    )
    return figures.trace(str(file), planned)


# --- both ------------------------------------------------------------------------------------------------------------


def _json(text: str) -> object:
    """Parsed, or None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _positive(value: object) -> float | None:
    """A finite number above 0, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        return None
    return float(value)


def _is_step(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53

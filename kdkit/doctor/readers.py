"""From the files that trainers leave to traces: kdkit's metrics.jsonl, HF's trainer_state.json, or else a text log."""

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TypeGuard, cast

from kdkit.doctor.figures import Figures
from kdkit.doctor.files import read_blocks
from kdkit.doctor.text_log import read_log, read_text
from kdkit.doctor.trace import Planned, Trace
from kdkit.errors import UserError

__all__ = ["Traces", "read_text", "read_traces"]

Traces = dict[str | None, Trace]
"""Stage, or None where there are none -> what it left."""
Row = Mapping[str, object]
_STEPS = ("step", "global_step", "iteration", "iter", "_step", "current_steps")


def read_traces(path: Path) -> Traces:
    """What a run left, stage by stage.

    Args:
        path: a run folder of kdkit, its metrics.jsonl, a trainer_state.json or a folder that holds one or checkpoints
            with one, or a text log or CSV file. Files may be gzipped.
    Returns:
        Stage, or None where the file knows no stages -> its trace, in order.
    Raises:
        UserError: there is nothing at the path, or nothing in it that a trainer writes.
    """
    try:
        file = _log_in(path) if path.is_dir() else path
        is_there = file.is_file()
    except OSError as error:
        raise UserError(f"{path} cannot be looked at: {error}. Give a run folder or a file that can be read") from error
    if not is_there:
        raise UserError(f"there is no file {path}. Give a run folder, metrics.jsonl, trainer_state.json or a text log")
    traces = _read(file)
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
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=_checkpoint_step)
    if states:
        return states[-1]
    raise UserError(f"{folder} holds no run: neither metrics.jsonl nor trainer_state.json is in it. Name a log in it")


def _checkpoint_step(state: Path) -> int:
    number = state.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _read(file: Path) -> Traces:
    ending = Path(file.name.removesuffix(".gz")).suffix
    if ending == ".json":
        return {None: _trainer_state(file)}
    if ending == ".jsonl":
        return _metrics(file)
    return {None: read_log(read_blocks(file), source=str(file))}


# --- kdkit -----------------------------------------------------------------------------------------------------------


def _metrics(file: Path) -> Traces:
    """metrics.jsonl by stage; lines that are cut or no rows are passed over, as a run that goes on leaves one.

    Rows of other trainers, which name no stage and no kind, are told apart by the names of their figures.
    """
    parts: dict[str | None, Figures] = {}
    for block in read_blocks(file):
        for (stage, kind, _), alike in groupby(_rows(block), key=_layout):
            if isinstance(stage, str | None) and kind in ("train", "eval"):
                steps, rows = zip(*alike, strict=True)
                parts.setdefault(stage, Figures()).add_rows(rows, steps, is_eval=kind == "eval")
    config = _settings(file.with_name("config.yaml"))
    return {stage: figures.trace(str(file), _planned(config, stage)) for stage, figures in parts.items()}


def _rows(block: bytes) -> Iterator[tuple[int, Row]]:
    """With the step of each."""
    lines = [line for line in block.decode("utf-8", errors="replace").split("\n") if line.startswith("{")]
    together = _json(f"[{','.join(lines)}]")  # in one go, which is twice as fast
    is_whole = isinstance(together, list) and len(together) == len(lines)
    for row in cast("list[object]", together) if is_whole else map(_json, lines):
        step = _step_of(row) if isinstance(row, dict) else None
        if isinstance(row, dict) and step is not None:
            yield step, row


def _layout(row: tuple[int, Row]) -> tuple[object, object, tuple[str, ...]]:
    """Rows of the same layout can be read at once."""
    return row[1].get("stage"), row[1].get("kind", "train"), tuple(row[1])


def _settings(file: Path) -> Mapping[str, object]:
    """The resolved config beside a log; empty where there is none, or it is not readable."""
    if not file.is_file():
        return {}
    import yaml

    try:
        tree = yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (
        yaml.YAMLError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ):
        return {}  # the constructors of PyYAML raise whatever comes of a value that is none
    return tree if isinstance(tree, dict) else {}


def _planned(config: Mapping[str, object], stage: str | None) -> Planned:
    """What the config asked of a stage's learning rate."""
    optim = dict(_part(config, "optim")) | dict(_part(_part(_part(config, "stages"), stage), "optim"))
    whole = {name: value if _is_step(value) else None for name, value in optim.items()}
    scheduler = optim.get("scheduler")
    return Planned(
        num_steps=whole.get("max_steps"),
        num_epochs=_positive(optim.get("epochs")),
        accumulation=whole.get("accumulation"),
        max_grad_norm=_positive(optim.get("max_grad_norm")),
        warmup_steps=whole.get("warmup_steps"),
        scheduler=scheduler if isinstance(scheduler, str) else None,
    )


def _part(tree: object, name: object) -> Mapping[str, object]:
    part = tree.get(name) if isinstance(tree, Mapping) else None
    return part if isinstance(part, Mapping) else {}


# --- transformers ----------------------------------------------------------------------------------------------------


def _trainer_state(file: Path) -> Trace:
    state = _json(b"".join(read_blocks(file)).decode("utf-8", errors="replace"))
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(history, list):
        raise UserError(f"{file} is no trainer_state.json: it has to be JSON with a list log_history")
    figures, step = Figures(), 0
    for row in history:
        if isinstance(row, dict):
            step = _step_of(row) or step  # a row without a step is of the one before
            figures.add_row(row, step)
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


def _step_of(row: Row) -> int | None:
    if type(step := row.get("step")) is int:
        return step if _is_step(step) else None
    step = next((row[name] for name in _STEPS if name in row), None)
    if isinstance(step, float) and step.is_integer():
        step = int(step)
    return step if _is_step(step) else None


def _is_step(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53

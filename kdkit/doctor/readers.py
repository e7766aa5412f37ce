"""From the files that trainers leave to traces: kdkit's metrics.jsonl, HF's trainer_state.json, logs of plain text."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from kdkit.doctor.trace import Event, Planned, Series, Trace
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
    parts: dict[str, _Figures] = {}
    for line in text.split("\n"):
        row = _json(line) if line.startswith("{") else None
        if isinstance(row, dict) and isinstance(row.get("stage"), str) and _is_step(row.get("step")):
            parts.setdefault(row["stage"], _Figures()).add_row(row, row["step"], is_eval=row.get("kind") == "eval")
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
    figures = _Figures()
    for row in history:
        if isinstance(row, dict) and _is_step(row.get("step")):
            of_eval = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
            of_train = {name: value for name, value in row.items() if not name.startswith("eval_")}
            figures.add_row(of_train, row["step"], is_eval=False)
            figures.add_row(of_eval, row["step"], is_eval=True)
    steps = state.get("max_steps")
    return figures.trace(str(file), Planned(num_steps=steps if _is_step(steps) and steps else None))


# --- text ------------------------------------------------------------------------------------------------------------

_NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?|nan|inf)\b"
_PAIR = re.compile(rf"([A-Za-z][A-Za-z_]*(?: [A-Za-z]+)?)['\"]?(?:²)?\s*[=:]\s*({_NUMBER})", re.IGNORECASE)
_STEP = re.compile(r"(?:step|iter)['\"]?\s*[=:]?\s*(\d[\d,]*)(?:\s*/\s*(\d+))?", re.IGNORECASE)
_BARE_LOSS = re.compile(rf"^\s*Step\s+\d+\s*:\s*({_NUMBER})(?:\s|$)", re.IGNORECASE)
_EVALUATION = re.compile(r"^\s*\[?(?:dev|eval|test|evaluation)\b|\bppl\b|\beval_loss\b|rouge", re.IGNORECASE)
_EVENTS = {
    "nonfinite": re.compile(r"non-?finite|loss(?: is|[=:])\s*(?:nan|inf)\b", re.IGNORECASE),
    "memory": re.compile(r"high gpu memory", re.IGNORECASE),
    "dtype": re.compile(r"must have the same dtype|expected scalar type|expected m1 and m2 to have", re.IGNORECASE),
    "out_of_memory": re.compile(r"out of memory", re.IGNORECASE),
    "early_stop": re.compile(r"early[ _-]?stop(?:ping|ped)", re.IGNORECASE),
}
_SPEAKS = re.compile(r"finite|nan|memory|dtype|scalar type|m1 and m2|early", re.IGNORECASE)
_SHARE = re.compile(r"\((0?\.\d+|1\.0+)\)")

NAMES = {
    "lr": "learning_rate",
    "learning rate": "learning_rate",
    "grad norm": "grad_norm",
    "total loss": "loss",
    "avg": "loss",
    "avg_loss": "loss",
    "eval_loss": "loss",
    "ppl": "perplexity",
    "rougel": "rouge_l",
    "kd raw": "part/kd",
    "kd_loss": "part/kd",
    "ds_loss": "part/kd",
    "kd": "part/kd",
    "lm_loss": "part/lm",
    "lm": "part/lm",
    "dtw_loss": "part/dtw",
    "feature": "part/hidden",
    "feature_loss": "part/hidden",
    "routing_feature_loss": "part/hidden",
    "attention": "part/attention",
    "attention_loss": "part/attention",
    "adaptive_threshold": "rollout/threshold",
    "threshold": "rollout/threshold",
    "temperature": "kd_temperature",
}
"""What other trainers call a figure, in lower case -> its name in metrics.jsonl."""
_KNOWN = {"loss", "learning_rate", "grad_norm", "perplexity", "cross_entropy", "rouge_l", "exact_match"}
_WEIGHTS = {"kd": "kd", "feat": "hidden", "attn": "attention", "layer": "layerwise", "contr": "contrastive"}
_PLANS = {
    "total batches": "num_batches",
    "gradient accumulation": "accumulation",
    "gradient_accumulation_steps": "accumulation",
    "optimizer steps": "num_steps",
    "warmup steps": "warmup_steps",
    "warmup_steps": "warmup_steps",
}


def read_text(text: str, *, source: str) -> Trace:
    """A plain text log: `key=value` and `key: value` beside a step, DistiLLM's lines, warnings and errors.

    A figure counts at the last step that was named before it. Lines that start as an evaluation or hold a perplexity
    or a ROUGE are evaluations.
    """
    figures, step, planned = _Figures(), 0, Planned()
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        for found in _STEP.finditer(line):
            step = _whole(found[1], otherwise=step)
        planned = _with_plans(planned, line) if "[" in line or "steps" in line else planned
        if _SPEAKS.search(line):
            figures.add_events(line, step, number)
        figures.add_line(line, step)
    return replace(figures.trace(source, planned), num_lines=len(lines))


def _with_plans(planned: Planned, line: str) -> Planned:
    for found in _PAIR.finditer(line):
        name = _PLANS.get(found[1].lower())
        value = _number(found[2])
        if name is not None and 0 < value < 2**53:
            given: dict[str, Any] = {name: int(value)}
            planned = replace(planned, **given)
    scheduler = re.search(r"scheduler(?:_type)?['\"]?\s*[=:]\s*['\"]?([a-z_]+)", line, re.IGNORECASE)
    return replace(planned, scheduler=scheduler[1].lower()) if scheduler else planned


# --- what all of them fill -------------------------------------------------------------------------------------------


@dataclass
class _Figures:
    """(step, value) of each figure, as it is read."""

    train: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    evals: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def add_row(self, row: Mapping[str, object], step: int, *, is_eval: bool) -> None:
        """A row of named figures; null is a figure that was not finite, text and lists are none."""
        for name, value in row.items():
            known = NAMES.get(name.lower(), name)
            if value is None:
                self._add(known, step, math.nan, is_eval=is_eval)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                self._add(known, step, _float(value), is_eval=is_eval)

    def add_line(self, line: str, step: int) -> None:
        """The figures in a line of text."""
        is_eval, is_weights = _EVALUATION.search(line) is not None, "CURRICULUM" in line
        bare = None if is_eval else _BARE_LOSS.match(line)
        if bare is not None:
            self._add("loss", step, _number(bare[1]), is_eval=False)
        for found in _PAIR.finditer(line):
            name = found[1].lower()
            if is_weights and name in _WEIGHTS:
                self._add(f"weight/{_WEIGHTS[name]}", step, _number(found[2]), is_eval=False)
                continue
            known = NAMES.get(name, name)
            if known in _KNOWN or "/" in known:
                self._add(known, step, _number(found[2]), is_eval=is_eval)

    def add_events(self, line: str, step: int, number: int) -> None:
        """What a line says in words."""
        for kind, pattern in _EVENTS.items():
            if pattern.search(line):
                self.events.append(Event(kind, line, step, number))
        share = _SHARE.search(line) if _EVENTS["memory"].search(line) else None
        if share is not None:
            self._add("memory/used_fraction", step, float(share[1]), is_eval=False)

    def trace(self, source: str, planned: Planned) -> Trace:
        """All of it."""
        return Trace(source, _series(self.train), _series(self.evals), self.events, planned)

    def _add(self, name: str, step: int, value: float, *, is_eval: bool) -> None:
        (self.evals if is_eval else self.train).setdefault(name, []).append((step, value))


def _series(figures: Mapping[str, Iterable[tuple[int, float]]]) -> dict[str, Series]:
    """In the order of their steps: a log that was appended to starts over."""
    return {name: Series.of(name, sorted(points, key=lambda point: point[0])) for name, points in figures.items()}


def _json(text: str) -> object:
    """Parsed, or None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_step(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _whole(text: str, *, otherwise: int) -> int:
    value = _number(text)
    return int(value) if 0 <= value < 2**53 else otherwise


def _number(text: str) -> float:
    return float(text.replace(",", "").rstrip("."))


def _float(value: float) -> float:
    """A Python integer may be too large for a float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf

"""From plain text logs of any trainer to traces."""

import re
from dataclasses import replace
from typing import Any

from kdkit.doctor.figures import NAMES, Figures
from kdkit.doctor.trace import Event, Planned, Trace

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
    figures, step, planned = Figures(), 0, Planned()
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        for found in _STEP.finditer(line):
            step = _whole(found[1], otherwise=step)
        planned = _with_plans(planned, line) if "[" in line or "steps" in line else planned
        if _SPEAKS.search(line):
            _add_events(figures, line, step, number)
        _add_line(figures, line, step)
    return figures.trace(source, planned, num_lines=len(lines))


def _with_plans(planned: Planned, line: str) -> Planned:
    for found in _PAIR.finditer(line):
        name = _PLANS.get(found[1].lower())
        value = _number(found[2])
        if name is not None and 0 < value < 2**53:
            given: dict[str, Any] = {name: int(value)}
            planned = replace(planned, **given)
    scheduler = re.search(r"scheduler(?:_type)?['\"]?\s*[=:]\s*['\"]?([a-z_]+)", line, re.IGNORECASE)
    return replace(planned, scheduler=scheduler[1].lower()) if scheduler else planned


def _add_line(figures: Figures, line: str, step: int) -> None:
    """The figures in a line of text."""
    is_eval, is_weights = _EVALUATION.search(line) is not None, "CURRICULUM" in line
    bare = None if is_eval else _BARE_LOSS.match(line)
    if bare is not None:
        figures.add("loss", step, _number(bare[1]), is_eval=False)
    for found in _PAIR.finditer(line):
        name = found[1].lower()
        if is_weights and name in _WEIGHTS:
            figures.add(f"weight/{_WEIGHTS[name]}", step, _number(found[2]), is_eval=False)
            continue
        known = NAMES.get(name, name)
        if known in _KNOWN or "/" in known:
            figures.add(known, step, _number(found[2]), is_eval=is_eval)


def _add_events(figures: Figures, line: str, step: int, number: int) -> None:
    """What a line says in words."""
    for kind, pattern in _EVENTS.items():
        if pattern.search(line):
            figures.events.append(Event(kind, line, step, number))
    share = _SHARE.search(line) if _EVENTS["memory"].search(line) else None
    if share is not None:
        figures.add("memory/used_fraction", step, float(share[1]), is_eval=False)


def _whole(text: str, *, otherwise: int) -> int:
    value = _number(text)
    return int(value) if 0 <= value < 2**53 else otherwise


def _number(text: str) -> float:
    return float(text.replace(",", "").rstrip("."))

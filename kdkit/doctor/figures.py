"""Figures of a run as they are read, whoever wrote them, and the names that other trainers give them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kdkit.doctor.trace import Event, Planned, Series, Trace

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
    "load_balance": "part/load_balance",
    "alpha_kd": "weight/kd",
    "alpha_lm": "weight/lm",
    "alpha_feature": "weight/hidden",
    "alpha_attention": "weight/attention",
    "adaptive_threshold": "rollout/threshold",
    "threshold": "rollout/threshold",
    "temperature": "kd_temperature",
}
"""What other trainers call a figure, in lower case -> its name in metrics.jsonl."""
DIGESTS = ("rows_digest", "texts_digest")
"""Of an evaluation: which rows were read, and what the student answered."""


@dataclass
class Figures:
    """(step, value) of each figure so far; a trace once all are there."""

    train: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    evals: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    digests: dict[str, dict[int, str]] = field(default_factory=dict)

    def add(self, name: str, step: int, value: float, *, is_eval: bool) -> None:
        """One value."""
        (self.evals if is_eval else self.train).setdefault(name, []).append((step, value))

    def add_row(self, row: Mapping[str, object], step: int, *, is_eval: bool) -> None:
        """A row of named figures; null is a figure that was not finite; text is none, but for digests."""
        for name, value in row.items():
            known = NAMES.get(name.lower(), name)
            if value is None:
                self.add(known, step, math.nan, is_eval=is_eval)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                self.add(known, step, _float(value), is_eval=is_eval)
            elif is_eval and isinstance(value, str) and name in DIGESTS:
                self.digests.setdefault(name, {})[step] = value

    def trace(self, source: str, planned: Planned, *, num_lines: int | None = None) -> Trace:
        """All of it."""
        return Trace(source, _series(self.train), _series(self.evals), self.events, planned, num_lines, self.digests)


def _series(figures: Mapping[str, Iterable[tuple[int, float]]]) -> dict[str, Series]:
    """In the order of their steps: a log that was appended to starts over."""
    return {name: Series.of(name, sorted(points, key=lambda point: point[0])) for name, points in figures.items()}


def _float(value: float) -> float:
    """A Python integer may be too large for a float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf

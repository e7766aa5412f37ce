"""Figures of a run as they are read, whoever wrote them, and the names that other trainers give them."""

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeGuard

import numpy as np

from kdkit.doctor.trace import Event, Planned, Series, Trace

NAMES = {
    "loss": "loss",
    "total_loss": "loss",
    "loss_step": "loss",
    "avg": "loss",
    "learning_rate": "learning_rate",
    "lr": "learning_rate",
    "grad_norm": "grad_norm",
    "gradient_norm": "grad_norm",
    "gnorm": "grad_norm",
    "update_norm": "update_norm",
    "loss_scale": "loss_scale",
    "scale": "loss_scale",
    "epoch": "epoch",
    "perplexity": "perplexity",
    "ppl": "perplexity",
    "cross_entropy": "cross_entropy",
    "ce_loss": "cross_entropy",
    "nll": "cross_entropy",
    "lm_loss_value": "cross_entropy",
    "lm_loss_ppl": "perplexity",
    "rouge_l": "rouge_l",
    "rougel": "rouge_l",
    "exact_match": "exact_match",
    "mean_tokens": "mean_tokens",
    "gen_len": "mean_tokens",
    "mean_length": "mean_tokens",
    "completion_length": "mean_tokens",
    "completions/mean_length": "mean_tokens",
    "ended_fraction": "ended_fraction",
    "eos_rate": "ended_fraction",
    "repeat_fraction": "rollout/repeat_fraction",
    "repetition": "rollout/repeat_fraction",
    "repetition_rate": "rollout/repeat_fraction",
    "tokens_per_second": "tokens_per_second",
    "tokens_per_sec": "tokens_per_second",
    "tokens/s": "tokens_per_second",
    "tok/s": "tokens_per_second",
    "step_seconds": "step_seconds",
    "step_time": "step_seconds",
    "steps_per_second": "steps_per_second",
    "kd": "part/kd",
    "kd_loss": "part/kd",
    "kd_raw": "part/kd",
    "ds_loss": "part/kd",
    "distil_loss": "part/kd",
    "lm": "part/lm",
    "lm_loss": "part/lm",
    "dtw_loss": "part/dtw",
    "feature": "part/hidden",
    "feature_loss": "part/hidden",
    "hidden_loss": "part/hidden",
    "routing_feature_loss": "part/hidden",
    "attention": "part/attention",
    "attention_loss": "part/attention",
    "alpha_kd": "weight/kd",
    "alpha_lm": "weight/lm",
    "alpha_feature": "weight/hidden",
    "alpha_attention": "weight/attention",
    "layerwise_loss": "part/layerwise",
    "contrastive_loss": "part/contrastive",
    "load_balance": "part/load_balance",
    "load_balance_loss": "part/load_balance",
    "routing_load_balance_loss": "part/load_balance",
    "kd_weight": "weight/kd",
    "lm_weight": "weight/lm",
    "adaptive_threshold": "rollout/threshold",
    "threshold": "rollout/threshold",
    "kd_temperature": "kd_temperature",
    "temperature": "kd_temperature",
}
"""What trainers call a figure, in lower case with underscores -> its name in metrics.jsonl.

metrics.jsonl has no `step_seconds`, `steps_per_second` and `loss_scale`: only other trainers log these.
"""
DIGESTS = ("rows_digest", "texts_digest")
"""Of an evaluation: which rows were read, and what the student answered."""
_EVALUATION = re.compile(r"^(?:eval(?:uation)?|val(?:idation)?|valid|dev|test)[_/]")
_RATE_OF = re.compile(r"^lr_\w*(?:adafactor|adagrad|adam|lion|rmsprop|sgd)\w*(?:/pg1)?$")
"""Lightning names it by its optimizer: `lr-AdamW`."""
_TRAINING = re.compile(r"^(?:train|training)[_/]")


@lru_cache(maxsize=4096)
def figure_of(name: str) -> tuple[str | None, bool | None]:
    """What a trainer's name for a figure means.

    Args:
        name: as it stands in a log: `eval_rougeL`, `Training Loss`, `lr`.
    Returns:
        Its name in metrics.jsonl, or None where it is not known; whether an evaluation measured it, or None where
        the name leaves that open.
    """
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    if plain in NAMES:
        return NAMES[plain], None
    if _RATE_OF.match(plain):
        return "learning_rate", False
    for prefix, is_eval in ((_EVALUATION, True), (_TRAINING, False)):
        if prefix.match(plain):
            return NAMES.get(_without_mean(prefix.sub("", plain))), is_eval
    return NAMES.get(_without_mean(plain)), None


def _without_mean(plain: str) -> str:
    return re.sub(r"^(?:avg|average|mean|batch)_(?=\w*loss)", "", plain)


class Column:
    """(step, value) of one figure in the order in which they were written: 16 bytes each."""

    __slots__ = ("steps", "values")

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        """One value."""
        self.steps.append(step)
        self.values.append(value)

    def extend(self, steps: Sequence[int], values: Sequence[float]) -> None:
        """As many values as steps."""
        self.steps.extend(steps)
        self.values.extend(values)

    def series(self, name: str) -> Series:
        """In the order of the steps: a log that was appended to starts over."""
        steps, values = np.array(self.steps, dtype=np.int64), np.array(self.values, dtype=np.float64)
        if (np.diff(steps) < 0).any():
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
        return Series(name, steps, values)


@dataclass
class Figures:
    """Each figure so far; a trace once all are there."""

    train: dict[str, Column] = field(default_factory=dict)
    evals: dict[str, Column] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    digests: dict[str, dict[int, str]] = field(default_factory=dict)

    def column(self, name: str, *, is_eval: bool) -> Column:
        """Of a name of metrics.jsonl; made where it is missing."""
        return (self.evals if is_eval else self.train).setdefault(name, Column())

    def add(self, name: str, step: int, value: float, *, is_eval: bool) -> None:
        """One value."""
        self.column(name, is_eval=is_eval).add(step, value)

    def add_row(self, row: Mapping[str, object], step: int, *, is_eval: bool = False) -> None:
        """A row of named figures; as `add_rows`."""
        self.add_rows([row], [step], is_eval=is_eval)

    def add_rows(self, rows: Sequence[Mapping[str, object]], steps: Sequence[int], *, is_eval: bool = False) -> None:
        """Rows that name the same figures, each as its name says (`eval_loss`), else of what the rows are of.

        Null is a figure that was not finite; text is none but for digests.
        """
        if "train_runtime" in rows[0]:  # means over the whole run, which the Trainer logs at its end
            return
        for name, values in zip(rows[0], zip(*(row.values() for row in rows), strict=True), strict=True):
            if set(map(type, values)) == {float}:
                self._column_of(name, is_eval).extend(steps, values)
                continue
            if name in DIGESTS:
                self.digests.setdefault(name, {}).update(zip(steps, map(str, values), strict=True))
                continue
            numbers = [(step, _float(value)) for step, value in zip(steps, values, strict=True) if _is_figure(value)]
            if numbers and name != "step":
                self._column_of(name, is_eval).extend(*zip(*numbers, strict=True))

    def _column_of(self, name: str, is_eval: bool) -> Column:
        known, says_eval = figure_of(name)
        return self.column(known or name.removeprefix("eval_"), is_eval=is_eval or bool(says_eval))

    def forget_steps(self) -> None:
        """Put all values so far at step 0."""
        for column in (*self.train.values(), *self.evals.values()):
            column.steps = array("q", bytes(8 * len(column.steps)))

    def place_by_epoch(self, steps_per_epoch: float) -> None:
        """Put all values at the step of the epoch that was logged beside them, should epochs only go up."""
        epoch = self.train.get("epoch")
        if epoch is None or not np.isfinite(epoch.values).all() or (np.diff(epoch.values) < 0).any():
            return
        rows, epochs = np.array(epoch.steps), np.minimum(np.array(epoch.values), 2.0**53 / steps_per_epoch)
        for column in (*self.train.values(), *self.evals.values()):
            steps = np.rint(np.interp(column.steps, rows, epochs) * steps_per_epoch)
            column.steps = array("q", steps.astype(np.int64).tobytes())

    def trace(self, source: str, planned: Planned, *, num_lines: int | None = None) -> Trace:
        """All of it."""
        return Trace(source, _series(self.train), _series(self.evals), self.events, planned, num_lines, self.digests)


def _series(columns: Mapping[str, Column]) -> dict[str, Series]:
    return {name: column.series(name) for name, column in columns.items() if column.steps}


def _is_figure(value: object) -> TypeGuard[float | None]:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _float(value: float | None) -> float:
    """A Python integer may be too large for a float."""
    try:
        return math.nan if value is None else float(value)
    except OverflowError:
        return math.inf

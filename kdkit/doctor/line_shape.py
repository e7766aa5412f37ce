"""What a line of a log holds, seen from its shape: the line with a 0 in place of every run of digits.

A log has many lines of few shapes, so that a shape may be looked at slowly, and its lines are read fast: a shape says
which of a line's numbers is which figure.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kdkit.doctor.figures import figure_of

NUMBER = re.compile(r"[.0-9][0-9,.]*(?:[eE][-+]?[0-9]+)?")
"""Every number of a line, in order; a shape has as many as its lines."""
NUMBER_OF_CELL = re.compile(r"[.0-9][0-9.]*(?:[eE][-+]?[0-9]+)?")
"""The same where a comma stands between two cells."""
READABLE = re.compile(r"(?:0(?:,0)*\.?0?|\.0)(?:[eE][-+]?0)?[.,]*")
SPECIAL = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}

_NAME = r"(?<![\w/])([A-Za-z][\w/²-]{0,50}(?: [A-Za-z][\w/-]{0,30}){0,2})"
_SIGN = r"([-+]?)(?:(nan|inf(?:inity)?)\b|(?=[.0]))"
_PAIR = re.compile(rf"{_NAME}(?:['\"]?\s*[=:]\s*['\"]?(?:[a-z_.0]+\(|\[)?~?|(\s+)){_SIGN}", re.IGNORECASE)
_STEP = re.compile(
    r"(?<![A-Za-z])(?:step|iter(?:ation)?|num_updates)['\"]?\s*[=:]?\s*\[?(0[0,]*)(?:\s*/\s*(0))?", re.IGNORECASE
)
_BARE_LOSS = re.compile(rf"^\s*Step\s+0\s*:\s*{_SIGN}[0.,eE+-]*(?:\s|$)", re.IGNORECASE)
_BAR = re.compile(r"^\s*(?:([^|%:]{0,40}):\s*)?0%\|[^|]{0,300}\|\s*(0)/(0)\s*\[", re.IGNORECASE)
_BAR_OF_STEPS = re.compile(r"^$|train|step|iter|distil|epoch\s*\[?(0)?", re.IGNORECASE)
_BAR_SPEED = re.compile(r"([.0]+)(it/s|s/it)")
_SCHEDULER = re.compile(
    r"(?:scheduler(?:_type)?|decay_style)['\"]?\s*(?:[=:]|\.\.+)\s*['\"]?(?:SchedulerType\.)?([a-z_]+)", re.IGNORECASE
)
_PLANS = {
    "total_batches": "num_batches",
    "gradient_accumulation": "accumulation",
    "gradient_accumulation_steps": "accumulation",
    "optimizer_steps": "num_steps",
    "total_optimization_steps": "num_steps",
    "max_steps": "num_steps",
    "total_iters": "num_steps",
    "num_epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "warmup_steps": "warmup_steps",
    "warmup_iters": "warmup_steps",
    "vocab_size": "vocabulary",
}
_EVALUATES = re.compile(r"^\W*(?:dev|eval|valid|test)|\bppl\b|perplexity|\beval_|rouge", re.IGNORECASE)
_TRAINS = re.compile(r"^\W*train|\blr\b|learning.rate|\bgrad|\bgnorm", re.IGNORECASE)
_BESIDE = {
    "average",
    "avg",
    "current",
    "debug",
    "info",
    "mean",
    "running",
    "smoothed",
    "the",
    "total",
    "train",
    "training",
}
_WEIGHTS = {"kd": "kd", "feat": "hidden", "attn": "attention", "layer": "layerwise", "contr": "contrastive"}
_IS_SETTING = r"(?!\w|['\"]?\s*[=:]\s*(?:0|none|null|true|false|stop|skip|\{))"
_IS_NO_STOP = r"(?!\s+(?:callback|counter|disabled|enabled|fails|metric|monitor|patience|threshold|too|with)\b)"
_EVENTS = {
    "nonfinite": re.compile(rf"(?<!\w)non-?finite{_IS_SETTING}|loss(?: is|[=:])\s*(?:nan|inf)\b", re.IGNORECASE),
    "memory": re.compile(r"high gpu memory", re.IGNORECASE),
    "dtype": re.compile(r"must have the same dtype|expected scalar type|expected m0 and m0 to have", re.IGNORECASE),
    "out_of_memory": re.compile(r"out of memory", re.IGNORECASE),
    "early_stop": re.compile(rf"early[ _-]?stop(?:ping|ped){_IS_SETTING}{_IS_NO_STOP}", re.IGNORECASE),
    "failure": re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): "),
}
_SPEAKS = re.compile(
    r"finite|\b(?:nan|inf(?:inity)?)\b|memory|dtype|scalar type|m0 and m0|early|error|exception", re.IGNORECASE
)
_SPACES = re.compile(r" {2,}")
_SHARE = re.compile(r"\((?=[.0]+\))")

Starts = Mapping[int, int]
"""Where a number begins in a shape -> which one it is."""
Pairs = Sequence[re.Match[str]]
"""A name and the place of its number."""


@dataclass(frozen=True)
class Slot:
    """A figure in a line."""

    name: str
    is_eval: bool
    index: int | None
    """Which of the line's numbers; None for a constant."""
    convert: Callable[[float], float] | None = None
    constant: float | None = None
    """NaN or an infinity, which is part of the shape."""


@dataclass(frozen=True)
class Shape:
    """What lines of a shape hold; indices count the numbers of a line."""

    step: int | None = None
    total: int | None = None
    """Of a step that is written as `50/ 5000`."""
    epoch: int | None = None
    """In which the step is counted from 0."""
    slots: tuple[Slot, ...] = ()
    plans: tuple[tuple[str, int], ...] = ()
    """Fields of Planned."""
    scheduler: str | None = None
    events: tuple[str, ...] = ()
    has_commas: bool = True
    """Whether commas belong to numbers."""

    @property
    def speaks(self) -> bool:
        """There is more than figures."""
        return bool(self.plans or self.scheduler or self.events)

    @property
    def is_empty(self) -> bool:
        """Nothing is to be read."""
        return self.step is None and not (self.slots or self.speaks)


def shape_of(shape: str) -> Shape:
    """What lines of a shape hold, none of which is a row of a table."""
    shape = _SPACES.sub(" ", shape)
    speaks, scheduler = _SPEAKS.search(shape), _SCHEDULER.search(shape)
    if "0" not in shape and not speaks and not scheduler:
        return Shape()
    numbers = enumerate(NUMBER.finditer(shape))
    starts = {number.start(): index for index, number in numbers if READABLE.fullmatch(number[0])}
    bar = _BAR.match(shape)
    if bar is not None:
        return _of_bar(shape, bar, starts)
    steps = list(_STEP.finditer(shape))
    step = steps[-1] if steps else None  # the last one counts optimizer steps, where both are named
    pairs = list(_PAIR.finditer(shape))
    events = tuple(kind for kind, pattern in _EVENTS.items() if pattern.search(shape)) if speaks else ()
    return Shape(
        step=None if step is None else starts.get(step.start(1)),
        total=None if step is None else starts.get(step.start(2)),
        slots=tuple(_slots(shape, pairs, starts, has_step=step is not None)) + _memory(shape, starts, events),
        plans=tuple(_plans(pairs, starts)),
        scheduler=scheduler[1].lower() if scheduler else None,
        events=events,
    )


def _of_bar(shape: str, bar: re.Match[str], starts: Starts) -> Shape:
    """A progress bar: `12%|##   | 60/500 [00:12<01:28, 5.01it/s, loss=2.3]`."""
    steps = _BAR_OF_STEPS.search((bar[1] or "").strip())
    speed = _BAR_SPEED.search(shape)
    slots = list(_slots(shape, list(_PAIR.finditer(shape)), starts, has_step=False))
    if steps is None:
        return Shape(slots=tuple(slots))
    if speed and speed.start(1) in starts:
        name = "steps_per_second" if speed[2] == "it/s" else "step_seconds"
        slots.append(Slot(name, is_eval=False, index=starts[speed.start(1)]))
    epoch = starts.get(shape.index("0")) if steps[1] else None
    return Shape(starts.get(bar.start(2)), total=starts.get(bar.start(3)), epoch=epoch, slots=tuple(slots))


def _slots(shape: str, pairs: Pairs, starts: Starts, *, has_step: bool) -> Iterator[Slot]:
    """The figures that a shape names, each once."""
    if "train_runtime" in shape:  # means over the whole run, which the Trainer prints at its end
        return
    is_eval = _EVALUATES.search(shape) is not None and _TRAINS.search(shape) is None
    bare = None if is_eval else _BARE_LOSS.match(shape)
    found = [_slot("loss", bare[1], bare[2], starts.get(bare.end(2 if bare[2] else 1)), is_eval=False)] if bare else []
    named = [(pair, *_known_name(pair[1], is_weight="CURRICULUM" in shape)) for pair in pairs]
    has_own_loss = any(name == "loss" and says_eval for _, name, says_eval in named)
    for pair, name, says_eval in named:
        if name is None or (pair[2] and not (has_step and name in ("loss", "learning_rate", "grad_norm"))):
            continue
        measured = (is_eval and not (name == "loss" and has_own_loss)) if says_eval is None else says_eval
        slot = _slot(name, pair[3], pair[4], starts.get(pair.end()), is_eval=measured)
        found.append(replace(slot, convert=_root) if pair[1].endswith("²") else slot)
    first: dict[tuple[str, bool], Slot] = {}
    for slot in found:
        if slot.index is not None or slot.constant is not None:
            first.setdefault((slot.name, slot.is_eval), slot)
    yield from _without_total(first) if has_step else first.values()


def _without_total(slots: Mapping[tuple[str, bool], Slot]) -> Iterator[Slot]:
    """`lm loss` beside a learning rate is all there is to minimise, where neither a total nor another term is named."""
    parts = [name for name, _ in slots if name.startswith("part/")]
    names = {name for name, _ in slots}
    is_total = parts == ["part/lm"] and "learning_rate" in names and "loss" not in names
    yield from (replace(slot, name="loss") if is_total and slot.name == "part/lm" else slot for slot in slots.values())


def _slot(name: str, sign: str, special: str | None, index: int | None, *, is_eval: bool) -> Slot:
    if special:
        return Slot(name, is_eval, None, constant=SPECIAL[special.lower()] * (-1 if sign == "-" else 1))
    return Slot(name, is_eval, index, operator.neg if sign == "-" else None)


def _known_name(text: str, *, is_weight: bool) -> tuple[str | None, bool | None]:
    """As `figure_of`, for the longest end of a few words that is known: `INFO total training loss`."""
    words = text.removesuffix("²").split()
    if is_weight and words[-1] in _WEIGHTS:
        return f"weight/{_WEIGHTS[words[-1]]}", False
    while words:
        name, says_eval = figure_of(" ".join(words))
        if name is not None or words[0].lower() not in _BESIDE:
            return name, says_eval
        words = words[1:]
    return None, None


def _plans(pairs: Pairs, starts: Starts) -> Iterator[tuple[str, int]]:
    for pair in pairs:
        field = _PLANS.get(pair[1].lower().replace(" ", "_"))
        if field is not None and not pair[2] and pair.end() in starts:
            yield field, starts[pair.end()]


def _memory(shape: str, starts: Starts, events: Sequence[str]) -> tuple[Slot, ...]:
    """`High GPU memory usage detected (0.96)`."""
    share = _SHARE.search(shape) if "memory" in events else None
    index = starts.get(share.end()) if share else None
    return () if index is None else (Slot("memory/used_fraction", is_eval=False, index=index, convert=_share),)


def _share(value: float) -> float:
    return value if value <= 1 else math.nan


def _root(value: float) -> float:
    return math.sqrt(abs(value))

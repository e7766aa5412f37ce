"""What a run left of itself, whoever trained it: named figures over steps, and events."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kdkit.doctor.findings import NotApplicable


@dataclass(frozen=True)
class Series:
    """One figure over a run. steps: (n,) int64, never falling; values: (n,) float64, NaN where it was no number."""

    name: str
    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, name: str, points: Sequence[tuple[int, float]]) -> "Series":
        """From (step, value) in the order in which they were written."""
        steps = np.array([step for step, _ in points], dtype=np.int64)
        return cls(name, steps, np.array([value for _, value in points], dtype=np.float64))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> "Series":
        """Without what was no number."""
        kept = np.isfinite(self.values)
        if kept.all():
            return self
        return Series(self.name, self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class Event:
    """Something a run said in words. kind: nonfinite, memory, dtype, out_of_memory, failure, early_stop."""

    kind: str
    text: str
    step: int | None = None
    """The last one named before it."""
    line: int | None = None
    """Of its file, from 1."""

    def __str__(self) -> str:
        place = f"step {self.step}" if self.step is not None else f"line {self.line}"
        return f"{place}: {self.text.strip()[:160]}"


@dataclass(frozen=True)
class Planned:
    """What a run was to be, as far as its config or its log says."""

    num_steps: int | None = None
    """Optimizer steps."""
    num_batches: int | None = None
    """Forward passes, where the log counts in them."""
    num_epochs: float | None = None
    accumulation: int | None = None
    warmup_steps: int | None = None
    scheduler: str | None = None
    max_grad_norm: float | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class Trace:
    """A run, or one stage of it. Figures have the names of metrics.jsonl, whatever their log called them."""

    source: str
    train: Mapping[str, Series] = field(default_factory=dict)
    evals: Mapping[str, Series] = field(default_factory=dict)
    events: Sequence[Event] = ()
    planned: Planned = Planned()
    num_lines: int | None = None
    """Of a text log."""
    digests: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """What of an evaluation was hashed, `rows_digest` and `texts_digest` -> step -> digest."""

    def series(self, name: str, *, at_least: int = 1) -> Series:
        """A figure of training.

        Raises:
            NotApplicable: there are fewer values of it.
        """
        return _taken(self.train, name, at_least, "while training")

    def evaluated(self, name: str, *, at_least: int = 1) -> Series:
        """A figure of the evaluations; raises as `series`."""
        return _taken(self.evals, name, at_least, "at evaluations")

    def events_of(self, kind: str) -> list[Event]:
        """The events of a kind, in order."""
        return [event for event in self.events if event.kind == kind]

    def followed_by(self, later: "Trace") -> "Trace":
        """With what was logged after it, which names no earlier step."""
        return replace(
            self,
            train=_joined(self.train, later.train),
            evals=_joined(self.evals, later.evals),
            events=[*self.events, *later.events],
            digests={
                name: {**self.digests.get(name, {}), **later.digests.get(name, {})}
                for name in self.digests.keys() | later.digests.keys()
            },
        )

    @property
    def planned_end(self) -> int | None:
        """The step at which it was to end, in what the log counts; from the epochs where only they are planned."""
        named = self.planned.num_batches or self.planned.num_steps
        if named or self.planned.num_epochs is None or "epoch" not in self.train:
            return named
        epochs = self.train["epoch"].finite
        if not len(epochs):
            return None
        steps_per_epoch = float(epochs.steps[-1]) / max(float(epochs.values[-1]), 1e-6)
        return max(round(min(steps_per_epoch * self.planned.num_epochs, 2.0**53)), 1)

    def __str__(self) -> str:
        """Steps, and how often there is which figure: `steps 10 to 500; loss 50, lr 50; at evaluations rouge_l 5`."""
        parts = [f"steps {self.first_step:,} to {self.last_step:,}"] if self.train or self.evals else []
        for figures, when in ((self.train, "while training"), (self.evals, "at evaluations")):
            counts = ", ".join(f"{name} {len(figures[name]):,}" for name in sorted(figures, key=_rank)[:_MOST_NAMED])
            more = f" and {len(figures) - _MOST_NAMED} more figures" * (len(figures) > _MOST_NAMED)
            parts += [f"{when} {counts}{more}"] if figures else []
        parts += [f"{len(self.events)} messages"] if self.events else []
        return "; ".join(parts)

    @property
    def first_step(self) -> int:
        """The lowest that is named; 0 where none is."""
        starts = [int(series.steps[0]) for figures in (self.train, self.evals) for series in figures.values()]
        return min(starts, default=0)

    @property
    def last_step(self) -> int:
        """The highest that is named; 0 where none is."""
        ends = [int(series.steps[-1]) for figures in (self.train, self.evals) for series in figures.values()]
        return max(ends, default=0)


def _joined(before: Mapping[str, Series], after: Mapping[str, Series]) -> dict[str, Series]:
    joined = dict(before)
    for name, series in after.items():
        held = before.get(name)
        if held is not None:
            steps = np.concatenate([held.steps, series.steps])
            series = Series(name, steps, np.concatenate([held.values, series.values]))
        joined[name] = series
    return joined


_FIRST_NAMED = ("loss", "learning_rate", "rouge_l", "cross_entropy", "perplexity", "grad_norm")
_MOST_NAMED = 6


def _rank(name: str) -> tuple[int, str]:
    """Figures that say most come first."""
    return (_FIRST_NAMED.index(name) if name in _FIRST_NAMED else len(_FIRST_NAMED), name)


def _taken(figures: Mapping[str, Series], name: str, at_least: int, when: str) -> Series:
    series = figures.get(name)
    found = 0 if series is None else len(series)
    if series is None or found < at_least:
        raise NotApplicable(f"{at_least} values of {name} {when}, {found} found" if found else f"{name} {when}")
    return series

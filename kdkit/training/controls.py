"""What a person changes while a run trains: asked for from any thread, taken up between steps, logged with its step.

The log is all there is to it: a resume takes the changes up again from its rows, and so does another run that is to
repeat them (`read_changes`).
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from kdkit.config import DistillConfig
from kdkit.errors import UserError
from kdkit.schedules import Schedule
from kdkit.training.metrics import MetricsFile
from kdkit.training.objective import Moment, Objective
from kdkit.training.rollout import Rollout
from kdkit.training.stopping import StopRequest

WEIGHTS = ("objective.kd.weight", "objective.lm.weight", "objective.dtw.weight")
TEMPERATURE = "objective.kd.temperature"
THRESHOLD = "rollout.threshold"
CHANGEABLE_MODES = ("adaptive", "mixed")
"""Of a rollout: where the threshold is more than on or off."""
KIND = "change"
"""Of the log rows; each has the stage, the completed steps and the fields that changed."""
_PLACE = ("kind", "stage", "step")
_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Change:
    """A field that was changed while a stage ran."""

    stage: str
    step: int
    """Completed optimizer steps; the next one is the first under the new value."""
    field: str
    value: float


def read_changes(metrics: str | Path) -> list[Change]:
    """The changes that a run's log tells of.

    Args:
        metrics: a run's metrics.jsonl.
    Returns:
        In the order in which they were made.
    Raises:
        UserError: there is no such file.
    """
    if not Path(metrics).is_file():
        raise UserError(f"{metrics} is not there: give the metrics.jsonl of a run")
    return list(_changes_in(MetricsFile(Path(metrics))))


def _changes_in(metrics: MetricsFile) -> Iterator[Change]:
    for row in metrics.rows():
        if row["kind"] == KIND:
            changed = {field: value for field, value in row.items() if field not in _PLACE}
            yield from (Change(row["stage"], row["step"], field, value) for field, value in changed.items())


class Controls:
    """The knobs of a running stage, for a person or a log that turns them; safe to use from any thread.

    Args:
        replay: changes of an earlier run, taken up at the same steps of the same stages.
        on_pause: told the completed steps when the run begins to stand still.
    """

    def __init__(self, replay: Iterable[Change] = (), *, on_pause: Callable[[int], None] | None = None) -> None:
        self.values: Mapping[str, float] = {}
        """What can be changed now, and what it is; empty until a stage has begun."""
        self._at_end: Mapping[str, float] = {}
        self._replay = tuple(replay)
        self._on_pause = on_pause
        self._wanted: dict[str, float] = {}
        self._lock = threading.Lock()
        self._going = threading.Event()
        self._going.set()

    def ask(self, field: str, value: float) -> None:
        """Change a field before the next step.

        Args:
            field: one of `values`.
            value: weights at least 0 and not all of them 0, the temperature above 0, the threshold 0..1.
        Raises:
            UserError: the field cannot be changed now, or not to this value.
        """
        with self._lock:
            _check_change(field, value, self.values)
            asked = {**self._wanted, field: value}
            moments = [{**values, **asked} for values in (self.values, self._at_end)]
            if not all(any(values.get(weight, 0.0) for weight in WEIGHTS) for values in moments):
                raise UserError(f"{field}={value:g} leaves every term without a weight: give another one first")
            self._wanted[field] = float(value)

    def is_wanted(self, field: str) -> bool:
        """Whether a field was asked to change, and has not been changed yet."""
        with self._lock:
            return field in self._wanted

    def follow(self, values: Mapping[str, float]) -> None:
        """Take up where schedules and rules have moved what can be changed."""
        with self._lock:
            self.values = values

    def pause(self) -> None:
        """Stand still before the next step."""
        self._going.clear()

    def go_on(self) -> None:
        """End a pause."""
        self._going.set()

    @property
    def is_paused(self) -> bool:
        """Whether the run stands still, or will before its next step."""
        return not self._going.is_set()

    def wait_while_paused(self, step: int, stop: StopRequest) -> float:
        """Return when there is no pause, or someone asked to stop; gives the seconds of the pause."""
        began = time.monotonic()
        if self.is_paused and self._on_pause is not None:
            self._on_pause(step)
        while self.is_paused and not stop.reason:
            self._going.wait(_SECONDS_BETWEEN_LOOKS)
        return time.monotonic() - began

    def begin(self, stage: str, values: Mapping[str, float], *, at_end: Mapping[str, float]) -> None:
        """Take up a stage: what was asked of the one before is void.

        Args:
            stage: that is about to begin.
            values: what can be changed in it.
            at_end: the same as their schedules leave it.
        Raises:
            UserError: the log to be repeated changes what the stage does not have.
        """
        with self._lock:
            self.values, self._at_end, self._wanted = values, at_end, {}
        for change in self._replay:
            if change.stage == stage:
                _check_change(change.field, change.value, values)

    def take(self, stage: str, step: int) -> dict[str, float]:
        """What was asked for since the last time, and what the log changes after so many completed steps."""
        replayed = {c.field: c.value for c in self._replay if (c.stage, c.step) == (stage, step)}
        with self._lock:
            changes = replayed | self._wanted
            self.values, self._at_end = {**self.values, **changes}, {**self._at_end, **changes}
            self._wanted = {}
        return changes


def initial_values(config: DistillConfig) -> dict[str, float]:
    """What can be changed in a stage of this config, and what it is when the stage begins."""
    threshold = config.rollout.start_threshold if config.rollout.mode in CHANGEABLE_MODES else None
    every = Objective(config.objective, crosses=True)  # which has all terms, whatever the tokenizers turn out to be
    return _values(every, threshold, Moment(0, 1))


def _values(objective: Objective, threshold: float | None, moment: Moment) -> dict[str, float]:
    found = {f"objective.{term.name}.weight": term.weight(moment) for term in objective.terms}
    if objective.kd in objective.terms:
        found[TEMPERATURE] = objective.kd.temperature(moment)
    return found if threshold is None else {**found, THRESHOLD: threshold}


def needs_controls(stage: str, metrics: MetricsFile) -> bool:
    """Whether a stage was changed while it ran, so that a resume has to change it again."""
    return any(change.stage == stage for change in _changes_in(metrics))


class ChangeableStage:
    """A running stage as its controls see it: what can be changed, and how a change comes about.

    Args:
        controls: asked between steps.
        stage: its name.
        objective: has weights and temperature; only terms that have a weight at some time of the stage can be changed.
        rollout: has the threshold where its mode leaves one to set.
        num_steps: optimizer steps of the stage.
        metrics: where changes are logged.
        stop: ends a pause too.
    """

    def __init__(
        self,
        controls: Controls,
        *,
        stage: str,
        objective: Objective,
        rollout: Rollout | None,
        num_steps: int,
        metrics: MetricsFile,
        stop: StopRequest,
    ) -> None:
        self.controls = controls
        self.stage = stage
        self.objective = objective
        self.rollout = rollout
        self.num_steps = num_steps
        self.metrics = metrics
        self.stop = stop
        self._logged: dict[str, float] = {}  # in the log already, and yet to be done
        controls.begin(stage, self.values(0), at_end=self.values(num_steps))

    @property
    def is_paused(self) -> bool:
        """Whether the next step waits."""
        return self.controls.is_paused

    def values(self, step: int) -> dict[str, float]:
        """What can be changed, and what it is after so many completed steps."""
        threshold = None
        if self.rollout is not None and self.rollout.config.mode in CHANGEABLE_MODES:
            threshold = self.rollout.threshold.value
        return _values(self.objective, threshold, Moment(step, self.num_steps))

    def take_up(self, step: int, *, accelerator: Accelerator) -> float:
        """Wait while there is a pause, then change what was asked for, in every process.

        Args:
            step: completed optimizer steps.
            accelerator: knows the processes; the main one is asked.
        Returns:
            Seconds of the pause.
        """
        paused, changes = 0.0, dict[str, float]()
        if accelerator.is_main_process:
            self.controls.follow(self.values(step))
            paused = self.controls.wait_while_paused(step, self.stop)
            changes = self.controls.take(self.stage, step)
        if accelerator.num_processes > 1:
            (changes,) = broadcast_object_list([changes])
        for field, value in (self._logged | changes).items():
            self._change(field, value)
        self._logged = {}
        if changes and accelerator.is_main_process:
            self.metrics.append({"kind": KIND, "stage": self.stage, "step": step, **changes})
        return paused

    def restore(self, step: int) -> None:
        """Go on from a checkpoint: what the log says was changed before it holds, right after it comes before a step.

        Args:
            step: of the checkpoint, which holds the threshold of that time itself.
        """
        own = [change for change in _changes_in(self.metrics) if change.stage == self.stage]
        for change in own:
            if change.step < step and change.field != THRESHOLD:
                self._change(change.field, change.value)
        self._logged = {change.field: change.value for change in own if change.step == step}

    def _change(self, field: str, value: float) -> None:
        if field == THRESHOLD:
            assert self.rollout is not None
            self.rollout.threshold.value = value
        elif field == TEMPERATURE:
            self.objective.kd.softening = Schedule.model_validate(value)
        else:
            (term,) = (term for term in self.objective.terms if f"objective.{term.name}.weight" == field)
            term.schedule = Schedule.model_validate(value)


def _check_change(field: str, value: float, values: Mapping[str, float]) -> None:
    """Refuse a field that is not there, and a value out of its range."""
    if field not in values:
        there = ", ".join(values) or "nothing yet: the stage has not begun"
        raise UserError(f"{field} cannot be changed in this stage; what can be: {there}")
    allowed = "0..1" if field == THRESHOLD else "above 0" if field == TEMPERATURE else "at least 0"
    is_in_range = 0 <= value <= 1 if field == THRESHOLD else value > 0 if field == TEMPERATURE else value >= 0
    if not is_in_range or not math.isfinite(value):
        raise UserError(f"{field} is to be {value:g}; allowed is {allowed}")

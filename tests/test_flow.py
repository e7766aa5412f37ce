"""What a stage shows while it trains: few lines, however long it is."""

import itertools

import pytest
from transformers import TrainerControl, TrainerState

from kdkit.config import LoggingConfig
from kdkit.training import flow
from kdkit.training.flow import ConsoleProgress
from kdkit.training.progress import heard_by

LOGS = {"loss": 2.0, "part/kd": 1.0, "part/lm": 1.0, "learning_rate": 1e-4}


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(flow, "time", clock)
    monkeypatch.setattr(flow.sys.stderr, "isatty", lambda: False, raising=False)
    return clock


def lines_of(clock, *, num_steps, seconds_per_step, begun_at=0):
    """(step, line) of everything that a stage shows, logging as `StageFlow` does."""
    said, every = [], LoggingConfig().every_steps
    state = TrainerState(global_step=begun_at, max_steps=num_steps, is_world_process_zero=True)
    progress, control = ConsoleProgress("distill"), TrainerControl()
    with heard_by(lambda text: said.append((state.global_step, text))):
        progress.on_train_begin(None, state, control)
        for step in range(begun_at + 1, num_steps + 1):
            state.global_step = step
            clock.now += seconds_per_step
            progress.on_step_end(None, state, control)
            if step % every == 0 or step in (1, num_steps):
                progress.on_log(None, state, control, logs=LOGS)
        progress.on_train_end(None, state, control)
    return said


class TestConsoleProgress:
    @pytest.mark.parametrize("seconds_per_step", [0.05, 1.0, 30.0])
    def test_25000_steps_are_fewer_than_1000_lines_and_one_per_log_interval(self, clock, seconds_per_step):
        """At one second a step a line every ten seconds was 2,500 lines."""
        said = lines_of(clock, num_steps=25_000, seconds_per_step=seconds_per_step)
        assert sum(len(text.splitlines()) for _, text in said) < 1000
        intervals = [(step - 1) // 10 for step, _ in said]
        assert len(intervals) == len(set(intervals))
        gaps = [after - before for (before, _), (after, _) in itertools.pairwise(said)]
        assert max(gaps) <= max(50, 10 / seconds_per_step) + 10
        assert said[-1][0] == 25_000

    def test_a_short_stage_has_a_line_every_ten_seconds(self, clock):
        said = lines_of(clock, num_steps=250, seconds_per_step=1.0)
        assert [step for step, _ in said] == list(range(10, 251, 10))

    def test_a_resumed_stage_has_lines_as_far_apart(self, clock):
        said = lines_of(clock, num_steps=25_000, seconds_per_step=1.0, begun_at=24_000)
        assert [step for step, _ in said] == list(range(24_050, 25_001, 50))

    def test_time_left_is_of_the_steps_since_the_start(self, clock):
        said = lines_of(clock, num_steps=1000, seconds_per_step=2.0, begun_at=500)
        assert said[0][1].endswith("lr 1.00e-04  980 s left")

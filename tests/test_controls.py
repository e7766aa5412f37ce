"""Changes made while a run trains: when they take effect, what is logged, and that the log repeats them exactly."""

import threading
import time

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import OF_THE_MACHINE, make_pair, tiny_config
from transformers import TrainerCallback

from kdkit.errors import UserError
from kdkit.training.controls import Change, Controls, planned_values, read_changes
from kdkit.training.metrics import MetricsFile
from kdkit.training.run import run_distillation
from kdkit.training.stopping import Interrupted, StopRequest

KD, LM, DTW = (f"objective.{name}.weight" for name in ("kd", "lm", "dtw"))
TEMPERATURE, THRESHOLD = "objective.kd.temperature", "rollout.threshold"
ROLLOUT = ("rollout={mode: mixed, threshold: 0.5, max_new_tokens: 6, guard: null, capacity: 16}",)


class Turn(TrainerCallback):
    """A person who turns knobs after given steps."""

    def __init__(self, controls, turns):
        self.controls, self.turns = controls, turns

    def on_step_end(self, args, state, control, **kwargs):
        for field, value in self.turns.get(state.global_step, {}).items():
            self.controls.ask(field, value)


class StopAfter(TrainerCallback):
    def __init__(self, stop, step):
        self.stop, self.step = stop, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.stop.ask("a person")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), dropout=0.2)


@pytest.fixture(scope="module")
def config(pair):
    return tiny_config(pair, *ROLLOUT, "evaluation.every_steps=2", max_steps=6, batch_size=4)


TURNS = {2: {TEMPERATURE: 4.0, THRESHOLD: 1.0}, 3: {KD: 0.1, LM: 0.0}, 5: {LM: 2.0}}


@pytest.fixture(scope="module")
def turned(config, tmp_path_factory):
    """A run in which knobs were turned after steps 2, 3 and 5."""
    controls = Controls()
    return run_distillation(
        config,
        tmp_path_factory.mktemp("turned") / "run",
        controls=controls,
        callbacks=[Turn(controls, TURNS)],
    )


def trace(result):
    rows = MetricsFile(result.folder / "metrics.jsonl").rows()
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows]


def weights(result):
    return load_file(result.model / "model.safetensors")


def assert_same_weights(ours, theirs):
    mine, other = weights(ours), weights(theirs)
    assert all(np.array_equal(mine[name], other[name]) for name in mine | other)


class TestTakingEffect:
    def test_a_change_after_a_step_holds_from_the_next_one_on(self, turned):
        steps = [row for row in trace(turned) if row["kind"] == "train"]
        assert [row["kd_temperature"] for row in steps] == [2.0, 2.0, 4.0, 4.0, 4.0, 4.0]
        assert [row["weight/kd"] for row in steps] == [0.7, 0.7, 0.7, 0.1, 0.1, 0.1]
        assert [row["weight/lm"] for row in steps] == [0.3, 0.3, 0.3, 0.0, 0.0, 2.0]
        assert [row["rollout/threshold"] for row in steps] == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]

    def test_the_loss_is_that_of_the_changed_weights(self, turned):
        for row in (row for row in trace(turned) if row["kind"] == "train"):
            parts = sum(value for name, value in row.items() if name.startswith("weighted/"))
            assert row["loss"] == pytest.approx(parts)
            assert row["weighted/kd"] == pytest.approx(row["weight/kd"] * row["kd_temperature"] ** 2 * row["part/kd"])

    def test_each_change_is_logged_with_the_steps_completed_before_it(self, turned):
        changes = [row for row in trace(turned) if row["kind"] == "change"]
        assert [(row["stage"], row["step"]) for row in changes] == [("distill", 2), ("distill", 3), ("distill", 5)]
        assert [Change("distill", 3, KD, 0.1), Change("distill", 3, LM, 0.0)] == read_changes(
            turned.folder / "metrics.jsonl"
        )[2:4]

    def test_controls_that_nobody_touches_change_nothing(self, config, tmp_path):
        alone = run_distillation(config, tmp_path / "alone")
        watched = run_distillation(config, tmp_path / "watched", controls=Controls())
        assert_same_weights(alone, watched)
        assert trace(alone) == trace(watched)


class TestEveryTerm:
    def test_a_term_that_a_ramp_has_not_begun_can_be_turned_on_and_the_log_repeats_it(self, pair, tmp_path):
        """The knobs knew kd, lm and dtw alone."""
        ramp = {"start": 0.0, "end": 0.1, "begin": 0.7}
        config = tiny_config(pair, objective={"kd": {"weight": 1.0}, "hidden": {"weight": ramp}}, max_steps=4)
        controls, hidden = Controls(), "objective.hidden.weight"
        turned = run_distillation(
            config, tmp_path / "run", controls=controls, callbacks=[Turn(controls, {1: {hidden: 0.5, KD: 0.0}})]
        )
        steps = [row for row in trace(turned) if row["kind"] == "train"]
        assert [row["weight/hidden"] for row in steps] == [0.0, 0.5, 0.5, 0.5]
        assert [row["weight/kd"] for row in steps] == [1.0, 0.0, 0.0, 0.0]
        again = run_distillation(
            config, tmp_path / "again", controls=Controls(read_changes(turned.folder / "metrics.jsonl"))
        )
        assert_same_weights(again, turned)

    def test_what_is_planned_is_what_the_config_names(self, pair):
        """A run across tokenizers with the term span had no sliders: an objective without a match refused it."""
        tree = {"kd": {"weight": 0.0}, "lm": {"weight": 1.0}, "span": {"weight": {"start": 0.0, "end": 0.2}}}
        planned = planned_values(tiny_config(pair, *ROLLOUT, "evaluation.every_steps=2", objective=tree))
        assert {field: (schedule.start, schedule.end) for field, schedule in planned.items()} == {
            LM: (1.0, 1.0),
            "objective.span.weight": (0.0, 0.2),
            THRESHOLD: (0.5, 0.5),
        }


class TestRepeating:
    def test_a_run_on_the_log_of_another_gives_its_weights_and_its_log(self, config, turned, tmp_path):
        changes = read_changes(turned.folder / "metrics.jsonl")
        again = run_distillation(config, tmp_path / "again", controls=Controls(changes))
        assert_same_weights(again, turned)
        assert trace(again) == trace(turned)

    def test_without_the_log_the_weights_are_others(self, config, turned, tmp_path):
        plain = run_distillation(config, tmp_path / "plain")
        assert any(
            not np.array_equal(a, b) for a, b in zip(weights(plain).values(), weights(turned).values(), strict=True)
        )

    @pytest.mark.parametrize("step", [2, 3, 4])
    def test_a_stopped_run_goes_on_with_what_was_changed_and_without_the_person(self, config, turned, tmp_path, step):
        """Changes lived in the objects of the process: a resumed run would have trained under the config's values."""
        controls, stop = Controls(), StopRequest()
        before = {at: turn for at, turn in TURNS.items() if at < step}
        with pytest.raises(Interrupted, match="stopped by a person"):
            run_distillation(
                config,
                tmp_path / "run",
                stop=stop,
                controls=controls,
                callbacks=[Turn(controls, before), StopAfter(stop, step)],
            )
        rest = Controls([c for c in read_changes(turned.folder / "metrics.jsonl") if c.step >= step])
        resumed = run_distillation(config, tmp_path / "run", resume=True, controls=rest)
        assert_same_weights(resumed, turned)
        assert trace(resumed) == trace(turned)

    def test_what_was_changed_right_after_the_checkpoint_is_changed_again(self, config, turned, tmp_path):
        """The log had the change, the checkpoint before it had not: the run went on under the old value."""
        controls, stop = Controls(), StopRequest()

        class Crash(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    raise RuntimeError("the machine went away")

        with pytest.raises(RuntimeError, match="went away"):
            run_distillation(
                config,
                tmp_path / "run",
                stop=stop,
                controls=controls,
                callbacks=[Turn(controls, {2: TURNS[2], 3: TURNS[3]}), Crash()],
            )
        rest = Controls([c for c in read_changes(turned.folder / "metrics.jsonl") if c.step == 5])
        resumed = run_distillation(config, tmp_path / "run", resume=True, controls=rest)
        assert trace(resumed) == trace(turned)
        assert_same_weights(resumed, turned)

    def test_what_was_changed_before_step_1_is_changed_again_where_nothing_was_saved(self, config, tmp_path):
        """The log had the change and the steps had not."""

        class Crash(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                raise RuntimeError("the machine went away")

        early = Controls([Change("distill", 0, TEMPERATURE, 4.0)])
        with pytest.raises(RuntimeError, match="went away"):
            run_distillation(config, tmp_path / "run", controls=early, callbacks=[Crash()])
        resumed = run_distillation(config, tmp_path / "run", resume=True)
        steps = [row["kd_temperature"] for row in trace(resumed) if row["kind"] == "train"]
        assert steps == [4.0] * 6

    def test_a_log_that_changes_what_the_run_has_not_is_refused_before_step_1(self, pair, tmp_path):
        config = tiny_config(pair, objective={"lm": {"weight": 1.0}, "kd": {"weight": 0}})
        replay = Controls([Change("distill", 2, TEMPERATURE, 4.0)])
        with pytest.raises(UserError, match=r"temperature cannot be changed in this stage; what can be: objective\.lm"):
            run_distillation(config, tmp_path / "run", controls=replay)

    def test_a_log_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"none\.jsonl is not there"):
            read_changes(tmp_path / "none.jsonl")


class TestAsking:
    @pytest.fixture
    def controls(self):
        controls = Controls()
        values = {KD: 1.0, LM: 0.0, TEMPERATURE: 1.0, THRESHOLD: 0.5}
        controls.begin("distill", values, at_end=values)
        return controls

    @pytest.mark.parametrize(
        ("field", "value", "allowed"),
        [
            (KD, -0.1, "at least 0"),
            (KD, float("nan"), "at least 0"),
            (TEMPERATURE, 0.0, "above 0"),
            (TEMPERATURE, float("inf"), "above 0"),
            (THRESHOLD, 1.1, r"0\.\.1"),
        ],
    )
    def test_a_value_out_of_range_says_what_is_allowed(self, controls, field, value, allowed):
        with pytest.raises(UserError, match=f"allowed is {allowed}"):
            controls.ask(field, value)

    def test_what_the_stage_has_not_is_refused_with_what_it_has(self, controls):
        with pytest.raises(UserError, match="cannot be changed in this stage; what can be: "):
            controls.ask(DTW, 1.0)

    def test_before_a_stage_nothing_can_be_changed(self):
        with pytest.raises(UserError, match="nothing yet"):
            Controls().ask(KD, 1.0)

    def test_the_last_weight_cannot_be_taken_away(self, controls):
        with pytest.raises(UserError, match="without a weight"):
            controls.ask(KD, 0.0)
        controls.ask(LM, 0.5)
        controls.ask(KD, 0.0)
        assert controls.take("distill", 0) == {LM: 0.5, KD: 0.0}

    def test_nor_the_last_one_that_a_schedule_leaves(self):
        """kd falls to 0 by its schedule: without lm the rest of the run trained on nothing."""
        controls = Controls()
        controls.begin("distill", {KD: 0.9, LM: 0.3}, at_end={KD: 0.0, LM: 0.3})
        with pytest.raises(UserError, match="without a weight"):
            controls.ask(LM, 0.0)
        controls.ask(KD, 0.5)
        controls.ask(LM, 0.0)

    def test_a_new_stage_owes_nothing_to_the_one_before(self, controls):
        controls.ask(KD, 0.5)
        controls.begin("next", {LM: 1.0}, at_end={LM: 1.0})
        assert controls.take("next", 0) == {}
        with pytest.raises(UserError, match="cannot be changed in this stage"):
            controls.ask(KD, 0.5)

    def test_of_several_changes_of_one_field_the_last_counts(self, controls):
        for value in (2.0, 3.0):
            controls.ask(TEMPERATURE, value)
        assert controls.take("distill", 4) == {TEMPERATURE: 3.0}
        assert controls.take("distill", 5) == {}


class TestPause:
    def test_a_paused_run_stands_still_saves_and_goes_on_to_the_same_weights(self, config, tmp_path):
        controls, seen = Controls(), []

        class Pause(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    controls.pause()  # in the middle of step 2

        thread = threading.Thread(
            target=lambda: seen.append(
                run_distillation(config, tmp_path / "run", controls=controls, callbacks=[Pause()])
            )
        )
        thread.start()
        checkpoint = tmp_path / "run" / "stages" / "distill" / "checkpoint-2"
        deadline = time.monotonic() + 60
        while not checkpoint.is_dir() and time.monotonic() < deadline:
            time.sleep(0.02)
        steps = {row["step"] for row in MetricsFile(tmp_path / "run" / "metrics.jsonl").rows()}
        time.sleep(3)
        assert {row["step"] for row in MetricsFile(tmp_path / "run" / "metrics.jsonl").rows()} == steps
        assert max(steps) == 2
        controls.go_on()
        thread.join(60)
        (result,) = seen
        rows = [row for row in MetricsFile(result.folder / "metrics.jsonl").rows() if row["kind"] == "train"]
        assert rows[2]["seconds"] < 3  # the pause is no training time
        assert_same_weights(result, run_distillation(config, tmp_path / "plain"))

    def test_a_stop_ends_it(self, config, tmp_path):
        controls, stop = Controls(), StopRequest(deadline=time.monotonic() + 1)
        controls.pause()
        with pytest.raises(Interrupted, match="stopped by the end of its time"):
            run_distillation(config, tmp_path / "run", controls=controls, stop=stop)


class TestClock:
    def test_a_run_stops_at_the_end_of_its_time_and_goes_on_to_the_same_weights(self, config, tmp_path):
        stop = StopRequest(deadline=float("inf"))

        class Strike(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                stop.deadline = time.monotonic()

        with pytest.raises(Interrupted, match="end of its time"):
            run_distillation(config, tmp_path / "run", stop=stop, callbacks=[Strike()])
        saved = (tmp_path / "run" / "stages" / "distill").glob("checkpoint-*")
        assert [path.name for path in saved] == ["checkpoint-1"]
        resumed = run_distillation(config, tmp_path / "run", resume=True)
        assert_same_weights(resumed, run_distillation(config, tmp_path / "plain"))

    def test_a_checkpoint_is_due_after_so_many_minutes(self, pair, tmp_path):
        config = tiny_config(pair, "checkpoint.every_minutes=0.00001", "checkpoint.keep=9", max_steps=3)
        result = run_distillation(config, tmp_path / "run")
        saved = (result.folder / "stages" / "distill").glob("checkpoint-*")
        assert sorted(path.name for path in saved) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]

"""LiveControls: what sliders, pause and stop do to a run in the background, and what is left where nobody is there."""

import base64
import time

import numpy as np
import pytest
import torch
from IPython.display import DisplayHandle
from safetensors.torch import load_file
from tiny import make_pair, tiny_config
from transformers import TrainerCallback

from kdkit.errors import UserError
from kdkit.evaluation import GenerationSettings, generate_answers
from kdkit.loading import load_model, load_tokenizer
from kdkit.plots import plot_live
from kdkit.runtime import preflight
from kdkit.session.place import Session
from kdkit.session.runs import start_or_resume
from kdkit.training.controls import TEMPERATURE, THRESHOLD, Controls, read_changes
from kdkit.training.metrics import MetricsFile
from kdkit.training.run import run_distillation
from kdkit.training.stopping import Interrupted, StopRequest
from kdkit.widgets import LiveControls, live

KD, LM, DTW = (f"objective.{name}.weight" for name in ("kd", "lm", "dtw"))
ROLLOUT = "rollout={mode: mixed, threshold: 0.5, max_new_tokens: 6, guard: null, collapse: null, capacity: 16}"
SECONDS = 120


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def session():
    return Session(preflight(), is_kaggle=False, is_batch=False, has_internet=False, hours=10_000)


@pytest.fixture
def config(pair):
    return tiny_config(pair, ROLLOUT, max_steps=100_000, batch_size=2)


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """What is displayed, and what it is updated to."""
    bundles = []

    class Handle(DisplayHandle):
        def update(self, data, **kwargs):
            bundles.append(data)

    def display(data, **kwargs):
        bundles.append(data)
        return Handle("one")

    monkeypatch.setattr(live, "display", display)
    return bundles


def until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def rows(folder, kind):
    return [row for row in MetricsFile(folder / "metrics.jsonl").rows() if row["kind"] == kind]


def steps_of(folder):
    return max((row["step"] for row in rows(folder, "train")), default=0)


@pytest.fixture
def started(config, session, tmp_path):
    """A run in the background that has begun."""
    controls = LiveControls(config, tmp_path / "run", session=session)
    controls.start()
    until(lambda: steps_of(controls.folder) > 2)
    assert not any(slider.disabled for slider in controls.sliders.values())
    yield controls
    controls.stop.ask("the end of the test")
    controls.controls.go_on()
    controls.wait(SECONDS)


class TestSliders:
    def test_there_is_one_for_each_thing_that_can_be_changed(self, started):
        starts = {field: slider.value for field, slider in started.sliders.items()}
        assert starts == {KD: 0.7, LM: 0.3, DTW: 0.5, TEMPERATURE: 2.0, THRESHOLD: 0.5}
        assert not any(slider.continuous_update for slider in started.sliders.values())

    def test_every_term_of_the_run_has_one_in_steps_that_fit_its_weight(self, pair, session, tmp_path):
        """Only kd, lm and dtw had names; and in steps of 0.05 a weight of 0.05 is on or off."""
        ramp = {"start": 0.0, "end": 0.05, "begin": 0.4, "finish": 0.7}
        objective = {"kd": {"weight": 1.0}, "hidden": {"weight": ramp}, "contrastive": {"weight": 0.3}}
        many = LiveControls(tiny_config(pair, objective=objective), tmp_path / "run", session=session)
        named = {slider.description: (slider.value, slider.max, slider.step) for slider in many.sliders.values()}
        assert named.pop("temperature")
        assert named == {
            "kd weight": (1.0, 2.0, 0.05),
            "hidden weight": (0.0, 0.2, pytest.approx(0.005)),
            "contrastive weight": (0.3, 2.0, 0.05),
        }

    def test_they_wait_for_the_stage_to_begin(self, config, session, tmp_path):
        """A slider moved before that was refused, and stood where the run was not."""
        waiting = LiveControls(config, tmp_path / "run", session=session)
        assert all(slider.disabled for slider in waiting.sliders.values())

    def test_between_stages_nothing_is_asked_of_the_next_one(self, pair, session, tmp_path):
        """A weight that the second stage has not, asked for after the first one's last step, broke the run."""
        stages = (
            "stages={labels: {objective: {kd: {weight: 0}, lm: {weight: 1}, dtw: {weight: 0}}},"
            " distill: {objective: {kd: {weight: 1}, lm: {weight: 0}, dtw: {weight: 0}}}}"
        )
        two = LiveControls(tiny_config(pair, stages, max_steps=2), tmp_path / "run", session=session)
        assert set(two.sliders) == {LM, KD, TEMPERATURE}
        real = two.update_picture

        def at_the_last_log(*_):
            if two.controls.values.keys() == {LM}:
                two.sliders[LM].value = 0.5
                two.controls.ask(LM, 0.25)
            real()

        two.update_picture = at_the_last_log
        two.start()
        assert two.wait(SECONDS) is not None, two.status.value
        assert not [row for row in rows(two.folder, "change") if row["stage"] == "distill"]

    def test_what_other_cells_draw_meanwhile_changes_nothing(self, session, tmp_path):
        """Random states are the process's: asking a model in another cell shifted the dropout of the run."""
        dropping = make_pair(tmp_path, dropout=0.2)
        config = tiny_config(dropping, max_steps=30, batch_size=4)
        alone = run_distillation(config, tmp_path / "alone")
        watched = LiveControls(config, tmp_path / "watched", session=session)
        tokenizer = load_tokenizer(dropping["teacher"])
        model = load_model(dropping["teacher"], dtype=torch.float32, device="cpu")
        watched.start()
        while watched.wait(0) is None and "finished" not in watched.status.value:
            generate_answers(model, tokenizer, ["Count the eggs."], GenerationSettings(max_new_tokens=4))
            assert "alert" not in watched.status.value, watched.status.value
        ours, theirs = (load_file(result.model / "model.safetensors") for result in (watched.result, alone))
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours | theirs)

    def test_a_slider_acts_from_the_next_step_on_and_the_log_repeats_the_run(self, started, config, tmp_path):
        before = steps_of(started.folder)
        started.sliders[TEMPERATURE].value = 4.0
        until(lambda: rows(started.folder, "change"))
        started.stop_button.click()
        assert started.wait(SECONDS) is None
        (change,) = rows(started.folder, "change")
        assert change["step"] >= before
        for row in rows(started.folder, "train"):
            assert row["kd_temperature"] == (4.0 if row["step"] > change["step"] else 2.0)
        (saved,) = (started.folder / "stages" / "distill").glob("checkpoint-*")
        num_steps = int(saved.name.removeprefix("checkpoint-"))
        stop = StopRequest()

        class StopThere(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step + 1 == num_steps:
                    stop.ask("the end of the log")

        with pytest.raises(Interrupted):
            run_distillation(
                config,
                tmp_path / "replayed",
                stop=stop,
                controls=Controls(read_changes(started.folder / "metrics.jsonl")),
                callbacks=[StopThere()],
            )
        again = tmp_path / "replayed" / "stages" / "distill" / saved.name / "model.safetensors"
        ours, theirs = load_file(saved / "model.safetensors"), load_file(again)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours | theirs)

    def test_what_may_not_be_is_said_and_changes_nothing(self, started):
        started.sliders[LM].value = 0.0
        started.sliders[DTW].value = 0.0
        started.sliders[KD].value = 0.0
        assert "without a weight" in started.message.value
        started.sliders[KD].value = 1.0
        assert started.message.value == ""

    def test_curves_are_drawn_while_it_trains(self, started):
        until(lambda: started.picture.png)
        assert "loss" in started.picture.alt
        first = started.picture.png
        until(lambda: started.picture.png != first)


class TestPauseAndStop:
    def test_pause_saves_and_stands_still(self, started):
        started.pause_button.click()
        until(lambda: "paused after step" in started.status.value)
        stages = started.folder / "stages" / "distill"
        until(lambda: list(stages.glob("checkpoint-*/complete.json")))
        seen = steps_of(started.folder)
        time.sleep(0.5)
        assert steps_of(started.folder) == seen
        assert started.pause_button.description == "Go on"
        started.pause_button.click()
        until(lambda: steps_of(started.folder) > seen)

    def test_stop_saves_and_the_next_one_goes_on_in_the_same_folder(self, started, config, session):
        started.stop_button.click()
        assert started.wait(SECONDS) is None
        assert "stopped by you" in started.status.value
        assert all(slider.disabled for slider in started.sliders.values())
        (saved,) = (started.folder / "stages" / "distill").glob("checkpoint-*")
        second = LiveControls(config, started.folder, session=session)
        second.start()
        until(lambda: steps_of(second.folder) > int(saved.name.removeprefix("checkpoint-")))
        second.stop_button.click()
        second.wait(SECONDS)
        steps = [row["step"] for row in rows(second.folder, "train")]
        assert steps == list(range(1, len(steps) + 1))

    def test_a_cell_run_again_shows_the_controls_of_the_run_that_trains(self, started, config, session):
        """The new ones were bound to the name, and nothing could stop the run any more."""
        again = LiveControls(config, started.folder, session=session).start()
        assert again is started
        with pytest.raises(UserError, match="is training in the background"):
            start_or_resume(config, started.folder, session=session)
        again.stop_button.click()
        assert again.wait(SECONDS) is None
        assert "stopped by you" in started.status.value

    def test_a_second_run_beside_it_is_refused(self, started, config, session, tmp_path):
        """accelerate's state is the process's: each run took it from the other, and both broke."""
        with pytest.raises(UserError, match=r"run is training in the background .* one at a time: stop it first"):
            LiveControls(config, tmp_path / "second", session=session).start()
        with pytest.raises(UserError, match="one at a time"):
            start_or_resume(config, tmp_path / "second", session=session)
        assert not (tmp_path / "second").exists()

    def test_a_pause_during_an_evaluation_is_saved_and_said(self, pair, session, tmp_path):
        """Only the end of a step looked for a pause: the run stood still unsaved, and the box said otherwise."""
        config = tiny_config(pair, "evaluation.every_steps=2", max_steps=100_000, batch_size=2)
        paused = LiveControls(config, tmp_path / "run", session=session)

        class Pause(TrainerCallback):
            def on_evaluate(self, args, state, control, **kwargs):
                if state.global_step == 4:
                    paused.controls.pause()

        paused.watch.append(Pause())
        paused.start()
        until(lambda: "paused after step 4, which is saved" in paused.status.value)
        assert (paused.folder / "stages" / "distill" / "checkpoint-4" / "complete.json").is_file()
        paused.stop_button.click()
        paused.wait(SECONDS)


class TestTheEnd:
    def test_a_finished_run_says_so_and_leaves_its_last_picture_in_the_notebook(self, pair, session, tmp_path, shown):
        short = LiveControls(tiny_config(pair), tmp_path / "run", session=session)
        short.start()
        result = short.wait(SECONDS)
        assert result is not None
        assert "finished: ROUGE-L" in short.status.value
        first, last = shown
        assert "image/png" not in first
        assert base64.b64decode(last["image/png"]) == short.picture.png != b""
        assert "application/vnd.jupyter.widget-view+json" in last
        assert "optimizer steps" in short.log.value  # the banner of the stage

    def test_what_breaks_the_run_is_shown_in_its_place(self, config, session, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine.txt").touch()
        broken = LiveControls(config, tmp_path / "run", session=session)
        broken.start()
        assert broken.wait(SECONDS) is None
        assert "exists and is not empty" in broken.status.value

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_what_nobody_expected_is_shown_too(self, config, session, tmp_path, monkeypatch):
        """The thread died and the box said "starting" for ever."""

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(live, "run_distillation", full)
        broken = LiveControls(config, tmp_path / "run", session=session).start()
        assert broken.wait(SECONDS) is None
        assert "OSError: [Errno 28] No space left on device" in broken.status.value
        again = LiveControls(config, tmp_path / "run", session=session).start()
        assert again is not broken
        again.wait(SECONDS)

    def test_without_a_person_it_trains_in_the_foreground_and_shows_the_picture(
        self, pair, session, tmp_path, monkeypatch, shown
    ):
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        alone = LiveControls(tiny_config(pair), tmp_path / "run", session=session)
        alone.start()
        assert alone.result is not None
        assert [set(data) for data in shown] == [{"text/plain", "image/png"}]


class TestConfig:
    def test_without_a_time_of_its_own_it_saves_every_ten_minutes(self, pair, session, tmp_path):
        assert LiveControls(tiny_config(pair), tmp_path, session=session).config.checkpoint.every_minutes == 10
        own = tiny_config(pair, "checkpoint.every_steps=5")
        assert LiveControls(own, tmp_path, session=session).config.checkpoint.every_minutes == 0


class TestFigure:
    @pytest.fixture
    def logged(self):
        train = {"kind": "train", "stage": "distill", "part/kd": 2.0, "weight/kd": 1.0}
        steps = [
            train | {"step": n, "loss": 3.0 - n / 10, "kd_temperature": 1.0 if n < 5 else 4.0} for n in range(1, 10)
        ]
        change = {"kind": "change", "stage": "distill", "step": 4, TEMPERATURE: 4.0}
        return [*steps, change, {"kind": "eval", "stage": "distill", "step": 9, "rouge_l": 31.0}]

    def test_its_title_says_what_was_turned_and_from_when_on(self, logged):
        assert plot_live(logged).get_suptitle() == "Step 9: loss 2.1; temperature 4 from step 5 on"

    def test_a_line_marks_the_change_in_every_panel(self, logged):
        for axes in plot_live(logged).axes:
            assert 4 in [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]

    @pytest.fixture
    def many(self, logged):
        """The same of a run with a term more than fits in one panel."""
        more = {f"part/{name}": 1.0 for name in ("lm", "hidden", "routing")}
        more |= {f"weight/{name}": 0.05 for name in ("lm", "hidden", "routing")}
        return [row | more if row["kind"] == "train" else row for row in logged]

    def test_many_terms_have_a_strip_each_with_the_change_marked_in_every_one(self, many):
        axes = [axes for axes in plot_live(many).axes if axes.axison]
        assert [a.get_ylabel() for a in axes if a.get_ylabel()] == ["kd", "lm", "hidden", "routing"]
        assert len(axes) == 2 * 4 + 3  # ROUGE-L, total, temperature
        assert all(4 in [line.get_xdata()[0] for line in a.lines if line.get_linestyle() == "--"] for a in axes)

    def test_what_an_evaluation_measured_is_no_point_of_a_training_curve(self, many):
        evaluated = [row | {"part/kd": 77.0, "loss": 77.0} if row["kind"] == "eval" else row for row in many]
        drawn = [line.get_ydata() for a in plot_live(evaluated).axes for line in a.lines]
        assert not any(77.0 in values for values in drawn)

    def test_a_change_of_any_term_is_told_by_its_name(self, many):
        many.append({"kind": "change", "stage": "distill", "step": 6, "objective.routing.weight": 0.2})
        title = plot_live(many).get_suptitle().replace("\n", " ")
        assert title.endswith("; routing weight 0.2 from step 7 on")

    def test_without_a_training_row_there_is_nothing_to_draw(self):
        with pytest.raises(UserError, match="nothing to draw"):
            plot_live([])

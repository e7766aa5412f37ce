"""The doctor while a stage trains: warned once, stopped whole, left alone when healthy; digests of evaluations."""

from functools import partial

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import make_pair, tiny_config
from transformers import TrainerCallback, TrainerControl, TrainerState

from kdkit.config import DoctorConfig
from kdkit.doctor import Check, Planned, read_traces
from kdkit.doctor.findings import fail, warn
from kdkit.errors import RunFailed
from kdkit.evaluation import Answer, texts_digest
from kdkit.training import checkpoint, stage, watching
from kdkit.training.metrics import MetricsFile
from kdkit.training.progress import heard_by
from kdkit.training.run import run_distillation
from kdkit.training.watching import LiveDoctor

OFTEN = ("doctor.every_steps=1", "evaluation.every_steps=2")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), dropout=0.2)


@pytest.fixture(scope="module")
def config(pair):
    return partial(tiny_config, pair, *OFTEN, objective={"kd": {"weight": 1.0}}, max_steps=6)


@pytest.fixture
def without_rate(monkeypatch):
    """Every row says that the learning rate is 0."""
    append = MetricsFile.append

    def changed(self, row):
        append(self, row | {"learning_rate": 0.0} if "learning_rate" in row else row)

    monkeypatch.setattr(MetricsFile, "append", changed)


def run(config, folder, **arguments):
    """Run it; returns what was said."""
    said = []
    with heard_by(said.append):
        run_distillation(config, folder, **arguments)
    return [text for text in said if "doctor" in text]


def rows_of(folder, kind="doctor"):
    rows = MetricsFile(folder / "metrics.jsonl").rows()
    return [row for row in rows if row["kind"] == kind]


class TestInTraining:
    def test_of_a_healthy_run_it_says_nothing_and_sees_what_the_folder_shows(self, config, tmp_path, monkeypatch):
        made = []
        monkeypatch.setattr(
            stage, "LiveDoctor", lambda *args, **kwargs: made.append(LiveDoctor(*args, **kwargs)) or made[0]
        )
        assert run(config(), tmp_path / "run") == []
        assert rows_of(tmp_path / "run") == []
        (live,), shown = made, read_traces(tmp_path / "run")["distill"]
        for seen, read in ((live.trace.train, shown.train), (live.trace.evals, shown.evals)):
            assert seen.keys() == read.keys() > {"loss"}
            assert all(np.array_equal(seen[name].steps, read[name].steps) for name in read)
            assert all(np.array_equal(seen[name].values, read[name].values, equal_nan=True) for name in read)
        assert live.trace.digests == shown.digests

    def test_warns_once_and_the_run_goes_on(self, config, tmp_path, without_rate):
        (said,) = run(config(), tmp_path / "run")
        assert said.startswith("distill 3: doctor: fail KD201 learning rate is 0: learning rate 0 at all 3 log rows")
        (row,) = rows_of(tmp_path / "run")
        assert (row["step"], row["code"], row["severity"]) == (3, "KD201", "fail")
        assert (tmp_path / "run" / "evaluation.json").is_file()

    def test_a_stage_given_up_is_whole_and_goes_on_where_that_is_asked_for(
        self, config, tmp_path, without_rate, monkeypatch
    ):
        monkeypatch.setattr(watching, "FIRST_STEPS", 4)
        folder, stopping = tmp_path / "run", config("doctor.on_fail=stop")
        with pytest.raises(
            RunFailed, match=r"step 4: the doctor gave it up\.\n  KD201 learning rate is 0: .*\nWhat is"
        ):
            run(stopping, folder)
        assert checkpoint.newest_checkpoint(folder / "stages" / "distill").name == "checkpoint-4"
        assert not (folder / "model").exists()
        assert [row.get("stopped_by") for row in rows_of(folder)] == [None, ["KD201"]]

        said = []
        with heard_by(said.append), pytest.raises(RunFailed, match="step 4"):
            run_distillation(stopping, folder, resume=True)
        assert not any("KD201" in text for text in said)

        assert run(config("doctor.on_fail=warn"), folder, resume=True) == []
        assert run(config("doctor.on_fail=off"), tmp_path / "uninterrupted") == []
        ours, theirs = (
            load_file(path / "model" / "model.safetensors") for path in (folder, tmp_path / "uninterrupted")
        )
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours | theirs)


def doctor_of(folder, look, *, live=True, **settings):
    """Watching with one check."""
    check = Check("KD299", "made up", "seen", "cause", "Mend it.", "source", look, live)
    metrics = MetricsFile(folder / "metrics.jsonl")
    return LiveDoctor(DoctorConfig(**settings), stage="a", metrics=metrics, planned=Planned(), checks=[check])


def evaluate(doctor, step, **state):
    """What an evaluation at a step leads to."""
    control = TrainerControl()
    doctor.metrics.append({"kind": "eval", "stage": "a", "step": step, "loss": float(step)})
    doctor.on_evaluate(None, TrainerState(global_step=step, max_steps=1000, **state), control)
    return control.should_training_stop


class TestLiveDoctor:
    def test_a_warning_ends_no_stage(self, tmp_path):
        assert not evaluate(doctor_of(tmp_path, lambda trace: [warn("bad")], on_fail="stop"), 500)

    def test_a_failure_does_from_step_100_on_unless_the_stage_is_over(self, tmp_path):
        for step, stops in ((99, False), (100, True), (1000, False)):
            assert evaluate(doctor_of(tmp_path, lambda trace: [fail("bad")], on_fail="stop"), step) is stops

    def test_what_becomes_worse_is_said_again(self, tmp_path):
        doctor = doctor_of(tmp_path, lambda trace: [(fail if trace.last_step > 20 else warn)("bad")])
        for step in (10, 20, 30, 40):
            evaluate(doctor, step)
        assert [(row["step"], row["severity"]) for row in rows_of(tmp_path)] == [(10, "warn"), (30, "fail")]

    def test_a_check_that_needs_a_finished_run_is_not_asked(self, tmp_path):
        evaluate(doctor_of(tmp_path, lambda trace: [fail("bad")], live=False), 500)
        assert rows_of(tmp_path) == []

    def test_other_stages_are_not_looked_at(self, tmp_path):
        doctor = doctor_of(tmp_path, lambda trace: [])
        doctor.metrics.append({"kind": "eval", "stage": "before", "step": 9, "loss": 9.0})
        evaluate(doctor, 10)
        assert doctor.trace.evals["loss"].values.tolist() == [10.0]

    def test_looks_at_log_rows_as_far_apart_as_asked_for(self, tmp_path):
        looked = []
        doctor = doctor_of(tmp_path, lambda trace: looked.append(1) or [], every_steps=100)
        state = TrainerState(global_step=150, max_steps=1000)
        doctor.on_train_begin(None, state, TrainerControl())
        seen = []
        for state.global_step in range(160, 501, 20):
            doctor.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
            seen += [state.global_step] * len(looked)
            looked.clear()
        assert seen == [200, 300, 400, 500]
        doctor.on_log(None, TrainerState(global_step=900), TrainerControl(), logs={"eval_loss": 1.0})
        assert not looked

    def test_all_processes_do_what_the_first_decides(self, tmp_path, monkeypatch):
        sent = []
        monkeypatch.setattr(watching, "broadcast_object_list", lambda given: sent.extend(given) or given)
        assert evaluate(doctor_of(tmp_path, lambda trace: [fail("bad")], on_fail="stop"), 500)
        assert sent == [["KD299 made up: bad"]]
        monkeypatch.setattr(watching, "broadcast_object_list", lambda given: sent)
        other = doctor_of(tmp_path / "other", lambda trace: pytest.fail("examined"), on_fail="stop")
        other.metrics.path.parent.mkdir()
        assert evaluate(other, 500, is_world_process_zero=False)
        assert rows_of(tmp_path / "other") == []
        with pytest.raises(RunFailed, match="KD299 made up: bad"):
            other.check()


class Metrics(TrainerCallback):
    """Keeps what trackers are given of evaluations."""

    def __init__(self):
        self.values = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.values += metrics.values()


class TestDigests:
    def test_name_the_rows_and_the_answers_of_each_evaluation_in_the_log_alone(self, config, tmp_path):
        tracked = Metrics()
        run(config(), tmp_path / "run", callbacks=[tracked])
        assert tracked.values
        assert all(isinstance(value, float) for value in tracked.values)
        run(config("data.validation_rows=6", "data.test_rows=2"), tmp_path / "fewer")
        ours, fewer = rows_of(tmp_path / "run", "eval"), rows_of(tmp_path / "fewer", "eval")
        (rows,) = {row["rows_digest"] for row in ours}
        assert rows not in {row["rows_digest"] for row in fewer}
        assert [row["texts_digest"] for row in ours] == [row["texts_digest"] for row in fewer]  # of the first two rows
        digests = read_traces(tmp_path / "run")["distill"].digests
        assert digests["rows_digest"] == {2: rows, 4: rows, 6: rows}
        assert digests["texts_digest"] == {row["step"]: row["texts_digest"] for row in ours}

    def test_every_token_counts(self):
        answers = [Answer("a b", (1, 2), True), Answer("", (3,), False)]
        assert texts_digest(answers) == texts_digest(list(answers))
        assert texts_digest(answers) != texts_digest(answers[::-1])
        assert texts_digest(answers) != texts_digest([Answer("a b", (1, 4), True), answers[1]])

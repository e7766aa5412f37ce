"""A run as a whole: stages, folder, resume after a kill at any moment, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from killing import run_forked, run_killed_then_resumed
from safetensors.torch import load_file
from tiny import OF_THE_MACHINE, make_pair, tiny_config

from kdkit.errors import UserError
from kdkit.losses.blocks import fastest_backend as losses_backend
from kdkit.softdtw import fastest_backend
from kdkit.training.run import run_distillation
from kdkit.training.stopping import Interrupted, StopRequest

STAGES = (
    "stages={warm_start: {objective: {kd: {weight: 0}, lm: {weight: 1}, dtw: {weight: 0}}, data: {train_rows: 24}},"
    " distill: {}}",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=2",
    "logging.every_steps=2",  # off the grid of the interrupted steps
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), dropout=0.2)


@pytest.fixture(scope="module")
def config(pair):
    return tiny_config(pair, *STAGES, max_steps=5)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return folder, run_forked(config, folder)


def trace(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows]


def assert_same_run(ours, theirs):
    for name in ("model.safetensors", "adapters.safetensors"):
        mine, other = load_file(ours / "model" / name), load_file(theirs / "model" / name)
        assert all(np.array_equal(mine[key], other[key]) for key in mine | other), name
    assert trace(ours) == trace(theirs)
    assert json.loads((ours / "evaluation.json").read_text()) == json.loads((theirs / "evaluation.json").read_text())


class TestBanner:
    def test_a_stage_with_soft_dtw_says_which_backend_runs_and_why(self, pair, tmp_path, capsys):
        run_distillation(tiny_config(pair, *STAGES, max_steps=1), tmp_path / "run")
        warm_start, distill = capsys.readouterr().err.split("stage distill:")
        assert "soft-DTW" not in warm_start
        (losses,) = [line for line in warm_start.splitlines() if "losses: backend" in line]
        assert losses == "  losses: backend {}: {}".format(*losses_backend(PartialState().device))
        (line,) = [line for line in distill.splitlines() if "soft-DTW" in line]
        assert line == "  soft-DTW: backend {}: {}".format(*fastest_backend(PartialState().device))

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ("seed=0", "left out, where that pays, by student and teacher"),
            ("teacher.attention=eager", "left out, where that pays, by student; kept by teacher"),
            ("student.attention=eager", "left out, where that pays, by teacher; kept by student"),
            (
                "objective={kd: {weight: 0}, dtw: {weight: 0}, lm: {weight: 1}}",
                "left out, where that pays, by student",
            ),
        ],
    )
    def test_it_says_whose_passes_leave_padding_out(self, pair, tmp_path, capsys, setting, said):
        run_distillation(tiny_config(pair, setting, max_steps=1), tmp_path / "run")
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  padding: ")]
        assert line == f"  padding: {said}"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the card")
    @pytest.mark.parametrize("units", ["", "AMX"])
    def test_bfloat16_on_a_cpu_that_emulates_it_is_not_silent(self, pair, tmp_path, capsys, monkeypatch, units):
        monkeypatch.setattr("kdkit.training.run.cpu_bfloat16_units", lambda: units)
        config = tiny_config(pair, "optim.precision=bfloat16", max_steps=1)
        run_distillation(config, tmp_path / "run")
        said = capsys.readouterr().err
        assert ("torch emulates it" in said) == (not units)
        assert ("teacher.dtype=bfloat16" in said) == bool(units)


class TestResume:
    def test_after_a_kill_at_random_moments_weights_and_log_are_those_of_the_uninterrupted_run(
        self, config, uninterrupted, tmp_path
    ):
        folder, num_events = uninterrupted
        moments = np.random.default_rng(0).choice(np.arange(1, num_events + 1), size=6, replace=False)
        for moment in sorted(moments.tolist()):
            assert_same_run(run_killed_then_resumed(config, tmp_path / "run", moment), folder)

    @pytest.mark.slow
    def test_after_a_kill_at_every_change_of_a_file_and_every_step(self, config, uninterrupted, tmp_path):
        folder, num_events = uninterrupted
        for moment in range(1, num_events + 1):
            assert_same_run(run_killed_then_resumed(config, tmp_path / "run", moment), folder)

    def test_a_stop_request_ends_after_the_step_and_resumes_to_the_same_run(self, config, uninterrupted, tmp_path):
        class StopAfter(StopRequest):
            def __init__(self, reads):
                super().__init__()
                self.reads, self.signum = reads, 15

            @property
            def reason(self):
                self.reads -= 1
                return "SIGTERM" if self.reads < 0 else ""

        for reads in (1, 8, 14):
            out = tmp_path / str(reads)
            with pytest.raises(Interrupted) as caught:
                run_distillation(config, out, stop=StopAfter(reads))
            assert caught.value.signum == 15
            run_forked(config, out, resume=True)
            assert_same_run(out, uninterrupted[0])

    def test_of_a_finished_run_changes_nothing(self, config, uninterrupted, tmp_path):
        folder, _ = uninterrupted
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
        run_forked(config, folder, resume=True)
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before

    def test_refuses_other_settings_and_names_them(self, pair, config, uninterrupted):
        changed = tiny_config(pair, *STAGES, "objective.dtw.gamma=0.5", max_steps=5)
        with pytest.raises(UserError, match=r"objective\.dtw\.gamma: 0\.1 there, 0\.5 given"):
            run_distillation(changed, uninterrupted[0], resume=True)

    def test_refuses_another_precision_or_number_of_processes(self, config, uninterrupted, tmp_path):
        """A checkpoint with a loss scaler cannot go on without one, and another row order is another run."""
        from shutil import copytree

        folder = copytree(uninterrupted[0], tmp_path / "run")
        written = json.loads((folder / "environment.json").read_text())
        (folder / "environment.json").write_text(json.dumps(written | {"precision": "float16"}))
        with pytest.raises(UserError, match="began with precision float16, and here it is float32"):
            run_distillation(config, folder, resume=True)

    def test_refuses_a_folder_without_a_run(self, config, tmp_path):
        with pytest.raises(UserError, match="holds no run to resume"):
            run_distillation(config, tmp_path / "none", resume=True)


class TestRunDistillation:
    def test_refuses_a_folder_that_is_not_empty(self, config, tmp_path):
        (tmp_path / "mine.txt").touch()
        with pytest.raises(UserError, match="exists and is not empty"):
            run_distillation(config, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

    def test_each_stage_starts_from_the_one_before_with_its_own_seed(self, uninterrupted):
        folder, _ = uninterrupted
        rows = [row for row in trace(folder) if row["kind"] == "train"]
        assert [row["stage"] for row in rows] == ["warm_start"] * 4 + ["distill"] * 4  # steps 1, 2, 4, 5
        last_of_first = next(r for r in trace(folder) if r["stage"] == "warm_start" and r["kind"] == "eval")
        first_of_second = next(r for r in trace(folder) if r["stage"] == "distill" and r["kind"] == "train")
        assert first_of_second["part/lm"] < last_of_first["part/lm"] + 0.5

    def test_a_stage_may_read_other_rows_and_all_are_on_record(self, uninterrupted):
        rows = json.loads((uninterrupted[0] / "rows.json").read_text())
        assert (rows["train"]["num_kept"], rows["distill.train"]["num_kept"]) == (24, 32)
        assert rows["train"]["sha256"] != rows["distill.train"]["sha256"]
        assert "distill.validation" not in rows

    def test_the_model_carries_a_card_with_its_figures(self, uninterrupted):
        from huggingface_hub import ModelCard

        card = ModelCard.load(uninterrupted[0] / "model" / "README.md")
        measured = json.loads((uninterrupted[0] / "evaluation.json").read_text())["models"]["student"]
        stated = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert stated == {name: measured[name] for name in ("rouge_l", "exact_match", "perplexity")}
        assert f"| student | {measured['rouge_l']:.2f} (" in card.text

    def test_the_same_seed_gives_the_same_run_and_another_seed_another(self, pair, tmp_path):
        plain = tiny_config(pair, max_steps=2)
        other = tiny_config(pair, "seed=11", max_steps=2)
        for name, config in (("a", plain), ("b", plain), ("c", other)):
            run_forked(config, tmp_path / name)
        assert_same_run(tmp_path / "a", tmp_path / "b")
        assert trace(tmp_path / "a") != trace(tmp_path / "c")

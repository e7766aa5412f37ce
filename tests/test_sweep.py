"""A sweep runs every combination once, goes on where it was stopped, and names what failed."""

import io
import json
import threading
import time

import pytest
from tiny import make_pair, tiny_config

from kdkit.config import dump_config
from kdkit.errors import RunFailed, UserError
from kdkit.report import sweep_table
from kdkit.training import sweep as sweep_module
from kdkit.training.stopping import Interrupted, StopRequest
from kdkit.training.sweep import parse_axis, plan_sweep, run_sweep


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    config = tiny_config(make_pair(folder), objective={"kd": {"weight": 1.0}}, max_steps=1)
    file = folder / "run.yaml"
    file.write_text(dump_config(config))
    return file


class TestParseAxis:
    @pytest.mark.parametrize(
        ("text", "values"),
        [
            ("a.b=1,2", (1, 2)),
            ("a.b=0,0.1,...,0.8", (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
            ("a.b=5,4,...,1", (5, 4, 3, 2, 1)),
            ("a.b=0,1,...,3,10", (0, 1, 2, 3, 10)),
            ("a.b=null,{},{c: 1}", (None, {}, {"c": 1})),
            ("preset=[demo, fkl],[demo, srkl]", (["demo", "fkl"], ["demo", "srkl"])),
            ("a.b=srkl, 'off'", ("srkl", "off")),
        ],
    )
    def test_values_are_yaml_and_dots_count_on(self, text, values):
        assert parse_axis(text).values == values

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a.b", "expects field.path=value"),
            ("a.b=", "expects field.path=value"),
            ("=1,2", "expects field.path=value"),
            ("a.b=1,1.0", "given twice"),
            ("a.b=1,...,3", "counts on from two numbers"),
            ("a.b=x,y,...,z", "counts on from two numbers"),
            ("a.b=0,0.3,...,1", "does not arrive at 1"),
            ("a.b=1,1,...,3", "counts on"),
            ("a.b=[1,2", "not readable as YAML"),
        ],
    )
    def test_what_cannot_be_read_is_refused(self, text, message):
        with pytest.raises(UserError, match=message):
            parse_axis(text)


class TestPlanSweep:
    def test_every_combination_and_seed_with_a_folder_of_its_own(self, source, tmp_path):
        axes = [parse_axis("objective.kd.temperature=1,2"), parse_axis("objective.kd.loss=forward_kl,jsd")]
        runs = plan_sweep(source, axes, tmp_path, num_seeds=3, overrides=["seed=5"])
        assert len(runs) == len({run.folder for run in runs}) == 12
        assert [run.seed for run in runs] == [5] * 4 + [15] * 4 + [25] * 4
        assert runs[3].config.objective.kd.loss == "jsd"
        assert runs[3].config.objective.kd.temperature.start == 2
        assert runs[5].folder == tmp_path / "objective.kd.temperature=1,objective.kd.loss=jsd" / "seed-15"

    def test_values_that_look_alike_as_a_file_name_are_kept_apart(self, source, tmp_path):
        axes = [parse_axis("data.template=plain,'plain {instruction}','plain/{instruction}'")]
        folders = {run.folder.parent.name for run in plan_sweep(source, axes, tmp_path)}
        assert len(folders) == 3
        assert not any("/" in name or " " in name for name in folders)

    @pytest.mark.parametrize(
        ("axes", "message"),
        [
            ([], "at least one --over"),
            (["objective.kd.temperatur=1,2"], "did you mean temperature"),
            (["objective.kd.temperature=1,-2"], "objective.kd.temperature"),
            (["seed=1,2"], "seeds are set by --seeds"),
            (["optim.max_steps=1", "optim.max_steps=2"], "each field once"),
        ],
    )
    def test_a_wrong_field_or_value_is_found_before_anything_runs(self, source, tmp_path, axes, message):
        with pytest.raises(UserError, match=message):
            plan_sweep(source, [parse_axis(axis) for axis in axes], tmp_path)
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def axes():
    return [parse_axis("objective.kd.temperature=1,2")]


class TestRunSweep:
    def test_runs_all_gathers_figures_and_runs_nothing_twice(self, source, axes, tmp_path, monkeypatch, capsys):
        runs = plan_sweep(source, axes, tmp_path, num_seeds=2)
        result = run_sweep(runs, axes, tmp_path)
        cells = result.cells()
        assert [(cell["objective.kd.temperature"], cell["seeds"]) for cell in cells] == [(1, [10, 20]), (2, [10, 20])]
        measured = json.loads((runs[0].folder / "evaluation.json").read_text())["models"]["student"]
        assert cells[0]["perplexity"][0] == measured["perplexity"]
        assert "4/4 done: objective.kd.temperature=2, seed 20" in capsys.readouterr().err
        written = json.loads((tmp_path / "sweep.json").read_text())
        assert [run["figures"]["perplexity"] for run in written["runs"]] == [
            result.figures[run.folder]["perplexity"] for run in runs
        ]
        monkeypatch.setattr(sweep_module, "run_distillation", lambda *args, **kwargs: pytest.fail("ran again"))
        assert run_sweep(runs, axes, tmp_path).cells() == cells

    def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(self, source, axes, tmp_path):
        run_sweep(plan_sweep(source, axes, tmp_path), axes, tmp_path)
        with pytest.raises(UserError, match=r"optim\.learning_rate: 0\.01 there, 0\.02 given"):
            run_sweep(plan_sweep(source, axes, tmp_path, overrides=["optim.learning_rate=0.02"]), axes, tmp_path)

    def test_a_run_that_fails_is_named_and_the_others_go_on(self, source, axes, tmp_path, monkeypatch):
        original = sweep_module.run_distillation

        def run(config, *args, **kwargs):
            if config.objective.kd.temperature.start == 1:
                raise RunFailed("the loss is nan")
            return original(config, *args, **kwargs)

        monkeypatch.setattr(sweep_module, "run_distillation", run)
        runs = plan_sweep(source, axes, tmp_path)
        result = run_sweep(runs, axes, tmp_path)
        assert result.failures == {runs[0].folder: "the loss is nan"}
        assert [cell["seeds"] for cell in result.cells()] == [[], [10]]
        assert json.loads((tmp_path / "sweep.json").read_text())["runs"][0]["failure"] == "the loss is nan"

    def test_side_by_side_gives_the_same_figures_and_leaves_a_log(self, source, axes, tmp_path):
        one = run_sweep(plan_sweep(source, axes, tmp_path / "one"), axes, tmp_path / "one")
        two = run_sweep(plan_sweep(source, axes, tmp_path / "two"), axes, tmp_path / "two", jobs=2)
        assert one.cells() == two.cells()
        logs = sorted((tmp_path / "two").rglob("seed-10.log"))
        assert len(logs) == 2
        assert "optimizer steps" in logs[0].read_text()

    def test_a_stop_request_ends_the_processes_and_the_same_sweep_goes_on(self, source, axes, tmp_path):
        runs = plan_sweep(source, axes, tmp_path, overrides=["optim.max_steps=60"])
        stop = StopRequest()

        def ask_to_stop():
            while not list(tmp_path.rglob("metrics.jsonl")):
                time.sleep(0.05)
            stop.signum = 15

        asking = threading.Thread(target=ask_to_stop)
        asking.start()
        with pytest.raises(Interrupted):
            run_sweep(runs, axes, tmp_path, jobs=2, stop=stop)
        asking.join()
        assert not list(tmp_path.rglob("evaluation.json"))
        result = run_sweep(runs, axes, tmp_path)
        assert len(result.figures) == 2


class TestSweepTable:
    CELLS = (
        {"a.b": 1, "seeds": [10, 20, 30], "rouge_l": [20.0, 21.0, 22.0], "exact_match": [0.0] * 3, "perplexity": []},
        {"a.b": None, "seeds": [10, 30], "rouge_l": [22.0, 25.0], "exact_match": [1.0, 2.0], "perplexity": [2.0, 4.0]},
        {"a.b": {}, "seeds": [], "rouge_l": [], "exact_match": [], "perplexity": []},
    )  # fmt: skip

    def test_means_half_intervals_and_differences_paired_by_seed(self):
        from rich.console import Console

        console = Console(width=80, file=io.StringIO())
        console.print(sweep_table(self.CELLS, ["a.b"]))
        lines = [line.split() for line in console.file.getvalue().splitlines()]
        # t(0.975, 2) · 1/√3 = 2.48; differences of seeds 10 and 30: 2, 3, mean 2.5, half t(0.975, 1) · 0.5 = 6.35
        assert any(line[:4] == ["1", "3", "21.0", "±2.5"] for line in lines)
        assert any(line[:3] == ["null", "2", "23.5"] and line[-2:] == ["+2.5", "±6.4"] for line in lines)
        assert any(line[:3] == ["{}", "0", "–"] for line in lines)


class TestCommand:
    def test_prints_a_table_and_leaves_a_figure(self, kdkit, source, tmp_path):
        over = ("sweep", source, "--over", "objective.kd.temperature=1,2", "--output", tmp_path)
        code, out, err = kdkit(*over)
        assert code == 0, err
        assert "temperature" in out
        assert "difference" in out
        assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
        code, out, _ = kdkit(*over, "--json")
        assert code == 0
        assert json.loads(out)["over"] == {"objective.kd.temperature": [1, 2]}

    def test_a_wrong_field_is_bad_usage(self, kdkit, source):
        code, out, err = kdkit("sweep", source, "--over", "rollout.thresold=0,1")
        assert (code, out) == (2, "")
        assert "did you mean threshold" in err

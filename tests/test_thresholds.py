"""Traces of a sweep over the threshold: gathered from a real one, kept in a file, and drawn."""

import json

import pytest
from tiny import tiny_config
from traces import LABELS, SEEDS, THRESHOLDS, made_up_traces

from kdkit.config import dump_config
from kdkit.errors import UserError
from kdkit.inspection import load_traces, save_traces, thresholds
from kdkit.inspection.thresholds import threshold_traces
from kdkit.plots import figure_bytes, plot_threshold
from kdkit.training.sweep import parse_axis, plan_sweep, run_sweep

GUARDED, NEITHER = LABELS


@pytest.fixture(scope="module")
def sweep(tiny_pair, tmp_path_factory):
    """Two thresholds, two ways to replay, one seed."""
    free = ("rollout.mode=mixed", "rollout.max_new_tokens=4", "rollout.guard=null", "rollout.collapse=null")
    config = tiny_config(tiny_pair, *free, "evaluation.every_steps=2", objective={"kd": {"weight": 1.0}}, max_steps=4)
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "run.yaml").write_text(dump_config(config))
    axes = [parse_axis("rollout.replay_ratio=none,constant"), parse_axis("rollout.threshold=0,1")]
    run_sweep(plan_sweep(folder / "run.yaml", axes, folder), axes, folder)
    return folder


class TestThresholdTraces:
    def test_each_run_is_a_row_with_what_it_logged(self, sweep):
        traces = threshold_traces({"no guard": sweep})
        assert [(t["label"], t["threshold"], t["seed"]) for t in traces] == [
            ("no guard, replay_ratio=constant", 0.0, 10),
            ("no guard, replay_ratio=constant", 1.0, 10),
            ("no guard, replay_ratio=none", 0.0, 10),
            ("no guard, replay_ratio=none", 1.0, 10),
        ]
        gold, fresh = traces[2], traces[3]
        assert gold["train_steps"] == fresh["train_steps"] == [1, 2, 3, 4]
        assert (gold["gold"], gold["fresh"], gold["phi"]) == ([1.0] * 4, [0.0] * 4, [0.0] * 4)
        assert (fresh["gold"], fresh["fresh"], fresh["phi"]) == ([0.0] * 4, [1.0] * 4, [1.0] * 4)
        run = next(r for r in json.loads((sweep / "sweep.json").read_text())["runs"] if r["values"] == {
            "rollout.replay_ratio": "none", "rollout.threshold": 1})  # fmt: skip
        rows = [json.loads(line) for line in (sweep / run["folder"] / "metrics.jsonl").read_text().splitlines()]
        evaluated = [row for row in rows if row["kind"] == "eval"]
        assert fresh["eval_steps"] == [row["step"] for row in evaluated]
        assert fresh["rouge_l"] == pytest.approx([row["rouge_l"] for row in evaluated], abs=1e-4)

    def test_several_sweeps_keep_their_order(self, sweep):
        labels = [trace["label"] for trace in threshold_traces({"z": sweep, "a": sweep})]
        assert labels[0].startswith("z")
        assert labels[-1].startswith("a")

    def test_a_folder_without_such_a_sweep_is_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no sweep over rollout\.threshold: make one with `kdkit sweep"):
            threshold_traces({"x": tmp_path})
        (tmp_path / "sweep.json").write_text(json.dumps({"over": {"seed": [1]}, "runs": []}))
        with pytest.raises(UserError, match="holds no sweep over"):
            threshold_traces({"x": tmp_path})

    def test_a_sweep_without_a_finished_run_is_refused(self, tmp_path):
        run = {"values": {"rollout.threshold": 0}, "seed": 10, "folder": "x", "figures": None, "failure": "nan"}
        (tmp_path / "sweep.json").write_text(json.dumps({"over": {"rollout.threshold": [0]}, "runs": [run]}))
        with pytest.raises(UserError, match=r"no run of the sweep .* is finished"):
            threshold_traces({"x": tmp_path})


class TestTracesFile:
    def test_what_is_saved_is_read_back(self, sweep, tmp_path):
        traces = threshold_traces({"no guard": sweep})
        save_traces(traces, tmp_path / "traces.json")
        assert load_traces(tmp_path / "traces.json") == traces
        assert len((tmp_path / "traces.json").read_text().splitlines()) == len(traces) + 2

    def test_by_default_it_is_the_embedded_one(self, tmp_path, monkeypatch):
        monkeypatch.setattr(thresholds, "demo_folder", lambda: tmp_path)
        with pytest.raises(UserError, match=r"there is no .*threshold_sweep\.json: make one with `kdkit sweep"):
            load_traces()
        save_traces(made_up_traces(), tmp_path / "threshold_sweep.json")
        assert load_traces() == made_up_traces()

    @pytest.mark.parametrize(
        ("text", "message"), [("{", "is no JSON"), ("[]", "holds no traces"), ('[{"label": "x"}]', "holds no traces")]
    )
    def test_a_file_of_something_else_is_refused(self, tmp_path, text, message):
        (tmp_path / "traces.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_traces(tmp_path / "traces.json")


class TestPlotThreshold:
    def test_the_title_has_the_share_and_the_end_beside_that_without_own_text(self):
        title = plot_threshold(made_up_traces(), threshold=0.8, label=NEITHER).get_suptitle().replace("\n", " ")
        # 40 (1 − e^(−200/60)) (1 − 0.8² · 0.9) + mean seed 20 / 5 = 20.4 and, at 0, 42.6
        assert title == (
            "φ = 0.8, neither: 80% of the rows were the student's own text; "
            "validation ROUGE-L ended at 20.4 (3 seeds), without own text at 42.6"
        )

    def test_a_log_row_weighs_as_much_as_the_steps_it_speaks_of(self):
        """Half of 0.8 up to step 100, half of 0.4 after it: 0.3; a mean over log rows would say 0.31."""
        title = plot_threshold(made_up_traces(), threshold=0.8, label=GUARDED).get_suptitle()
        assert "30% of the rows" in title

    def test_the_chosen_threshold_is_bold_the_others_faint_and_the_other_sweep_dashed(self):
        figure = plot_threshold(made_up_traces(), threshold=0.6, label=GUARDED)
        lines = figure.axes[2].get_lines()
        (bold,) = [line for line in lines if line.get_label().replace("\n", " ") == GUARDED]
        (dashed,) = [line for line in lines if line.get_linestyle() == "--"]
        faint = [line for line in lines if line.get_linewidth() < 1 and len(line.get_xdata())]
        assert dashed.get_label() == NEITHER
        assert len(faint) == len(THRESHOLDS) - 1
        own = [t["rouge_l"] for t in made_up_traces() if t["label"] == GUARDED and t["threshold"] == 0.6]
        assert bold.get_ydata() == pytest.approx([sum(column) / len(SEEDS) for column in zip(*own, strict=True)])

    def test_it_says_in_how_many_runs_the_threshold_was_taken_back(self):
        def said(threshold):
            axes = plot_threshold(made_up_traces(), threshold=threshold, label=GUARDED).axes[1]
            return [text.get_text() for text in axes.texts]

        assert said(0.6) == ["taken back in\n3 of 3 runs"]
        assert said(0.5) == []

    def test_seeds_that_logged_other_steps_meet_where_all_have_one(self):
        traces = made_up_traces([NEITHER])
        traces[0] = {**traces[0], **{key: value[:3] for key, value in traces[0].items() if isinstance(value, list)}}
        figure = plot_threshold(traces, threshold=0.0, label=NEITHER)
        assert figure.axes[2].get_lines()[0].get_xdata().tolist() == [40, 80, 120]

    def test_a_real_sweep_can_be_drawn(self, sweep):
        traces = threshold_traces({"no guard": sweep})
        figure = plot_threshold(traces, threshold=1.0, label="no guard, replay_ratio=none")
        assert "100% of the rows" in figure.get_suptitle().replace("\n", " ")
        assert figure_bytes(figure, "png").startswith(b"\x89PNG")

    def test_a_threshold_or_label_that_was_not_run_is_refused(self):
        with pytest.raises(UserError, match=r"no run of 'neither' has threshold 0\.95; it has \[0\.0, 0\.1"):
            plot_threshold(made_up_traces(), threshold=0.95, label=NEITHER)
        with pytest.raises(UserError, match="no run of 'x' has threshold 0; it has none"):
            plot_threshold(made_up_traces(), threshold=0.0, label="x")

"""The page holds all it was given, escaped and in one file; the table fits a terminal."""

import base64
import json
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from diagnoses import EVIL, healthy_diagnosis, made_up_diagnosis, quoting_diagnosis
from rich.console import Console

from kdkit.errors import UserError
from kdkit.plots import plot_comparison
from kdkit.report import (
    NUM_EXAMPLES,
    Example,
    Illustration,
    RowsUsed,
    comparison_table,
    write_comparison_report,
    write_report,
    write_run_report,
)


def model_row(name, rouge_l, **others):
    figures = {"exact_match": 3.0, "perplexity": 9.5, "mean_tokens": 31.4, "ended_fraction": 0.97} | others
    row = {"model": name, "rouge_l": rouge_l} | figures
    for metric in ("rouge_l", "exact_match", "perplexity"):
        row |= {f"{metric}_low": 0.9 * row[metric], f"{metric}_high": 1.1 * row[metric]}
    return row


ROWS = [model_row("teacher", 30.0), model_row("SFT", 20.0), model_row("KD", 26.0, steps=300)]


class Page(HTMLParser):
    """Text, image sources and outside references of a page; fails on tags that do not close."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.images, self.tags, self.outside = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.images.append(value)
            elif name in ("src", "href"):
                self.outside.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


class TestWriteReport:
    def test_holds_everything_in_one_file(self, tmp_path):
        path = write_report(
            tmp_path / "new" / "report.html",
            ROWS,
            title="A run",
            figures=[Illustration(plot_comparison(ROWS), "The caption.")],
            examples=[Example("Say <b>hi</b> & go", ["Hi"], {"teacher": "Hi!", "before": "", "after": None})],
            settings={"config.yaml": "kd:\n  weight: 1.0"},
            environment={"torch": "2.13.0", "gpu": None},
            rows=[RowsUsed("train", "ab" * 32, 100, 93, {"prompt longer than 9 tokens": 7})],
        )
        page = Page(path)
        for piece in (
            "A run",
            "KD closes 60 % of the ROUGE-L gap between SFT and the teacher.",
            "26.0 (23.4–28.6)",
            "9.50 (8.55–10.45)",
            "97 %",
            "The caption.",
            "Say <b>hi</b> & go",
            "Hi!",
            "empty answer",
            "not answered",
            "kd: weight: 1.0",
            "2.13.0",
            "93 of 100",
            "prompt longer than 9 tokens: 7",
            "ab" * 32,
        ):
            assert piece in page.text
        assert "None" not in page.text
        assert page.outside == []
        assert "script" not in page.tags
        assert "link" not in page.tags

    def test_figures_travel_inside_as_svg(self, tmp_path):
        figures = [Illustration(plot_comparison(ROWS), "c")]
        (image,) = Page(write_report(tmp_path / "r.html", ROWS, title="t", figures=figures)).images
        head, content = image.split(",", 1)
        assert head == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(content)

    def test_text_is_escaped_wherever_it_goes(self, tmp_path):
        evil = "<script>alert(1)</script>"
        path = write_report(
            tmp_path / "r.html",
            [model_row(evil, 5.0)],
            title=evil,
            finding=evil,
            examples=[Example(evil, [evil], {evil: evil})],
            settings={evil: evil},
            environment={evil: evil},
            rows=[RowsUsed(evil, evil, 1, 1, {evil: 1})],
        )
        assert "<script" not in path.read_text(encoding="utf-8")
        assert Page(path).text.count(evil) == 15

    @pytest.mark.parametrize(("seeds", "over"), [(None, "rows."), (1, "rows."), (5, "sampling seeds, that of perplex")])
    def test_says_what_the_intervals_are_over(self, tmp_path, seeds, over):
        rows = [model_row("a", 20.0), model_row("b", 24.0, **({"seeds": seeds} if seeds else {}))]
        text = Page(write_report(tmp_path / "r.html", rows, title="t")).text
        assert f"Below each value stands its 95 % interval over {over}" in text

    def test_leaves_out_sections_that_have_nothing(self, tmp_path):
        text = Page(write_report(tmp_path / "r.html", ROWS, title="t")).text
        for heading in ("Figures", "Examples", "Rows", "Settings", "Environment"):
            assert heading not in text

    def test_replaces_an_older_page_whole_and_leaves_nothing_beside_it(self, tmp_path):
        path = tmp_path / "r.html"
        write_report(path, ROWS, title="first one")
        write_report(path, ROWS, title="second")
        assert [file.name for file in tmp_path.iterdir()] == ["r.html"]
        assert "first one" not in path.read_text()

    def test_a_page_that_cannot_be_made_leaves_the_older_one(self, tmp_path):
        path = write_report(tmp_path / "r.html", ROWS, title="first one")
        with pytest.raises(UserError, match="at least one measured model"):
            write_report(path, [], title="second")
        assert "first one" in path.read_text()

    def test_the_same_input_gives_the_same_page(self, tmp_path):
        figures = [Illustration(plot_comparison(ROWS), "c")]
        pages = [write_report(tmp_path / f"{i}.html", ROWS, title="t", figures=figures) for i in range(2)]
        assert pages[0].read_bytes() == pages[1].read_bytes()


class TestDoctorSection:
    def test_says_what_was_found_after_the_comparison(self, tmp_path):
        page = Page(write_report(tmp_path / "r.html", ROWS, title="t", doctor={"": made_up_diagnosis()}))
        pieces = ("Comparison", "Doctor", "2 fail", "warm-up of 1000 of 4687 steps", "optim.warmup_steps: 468")
        places = [page.text.index(piece) for piece in pieces]
        assert places == sorted(places)
        assert page.outside == []

    def test_names_the_run_where_there_are_several(self, tmp_path):
        doctor = {"first": healthy_diagnosis(), "second": "It has no log."}
        text = Page(write_report(tmp_path / "r.html", ROWS, title="t", doctor=doctor)).text
        assert "Doctor first good Nothing wrong was found." in text
        assert "second It has no log." in text

    def test_text_is_escaped(self, tmp_path):
        doctor = {EVIL: quoting_diagnosis(EVIL), "other": EVIL}
        path = write_report(tmp_path / "r.html", ROWS, title="t", doctor=doctor)
        assert "<script" not in path.read_text(encoding="utf-8")
        assert Page(path).text.count(EVIL) == 12


def make_run(folder, *, rows="ab" * 32, with_teacher=True, num_evaluations=2):
    """A finished run as its files."""
    folder.mkdir(parents=True)
    models = {"student": model_row("x", 24.0), "before": model_row("x", 20.0)}
    if with_teacher:
        models["teacher"] = model_row("x", 30.0)
    models = {name: {key: v for key, v in row.items() if key != "model"} for name, row in models.items()}
    predictions = [
        {"prompt": f"question {i}?", "references": [f"gold {i}"]}
        | {name: f"{name} of {folder.name} says {i}" for name in models}
        for i in range(NUM_EXAMPLES + 3)
    ]
    metrics = [
        {"kind": "train", "stage": stage, "step": step, "loss": 1.0 / step, "learning_rate": 1e-3}
        for stage in ("warm_start", "distill")
        for step in (10, 20)
    ]
    for step, rouge_l in [(10, 22.0), (20, 24.0)][-num_evaluations:]:
        metrics.append({"kind": "eval", "stage": "distill", "step": step, "rouge_l": rouge_l, "perplexity": 9.0})
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows, "models": models, "predictions": predictions}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "config.yaml").write_text("seed: 10\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0"}))
    return folder


class TestWriteRunReport:
    def test_reads_the_folder_of_a_run(self, tmp_path):
        folder = make_run(tmp_path / "my_run")
        path = write_run_report(folder)
        page = Page(path)
        assert path == folder / "report.html"
        assert "Distillation run my_run" in page.text
        assert "The student closes 40 % of the ROUGE-L gap between its start and the teacher" in page.text
        assert len(page.images) == 3
        assert "student 40 24.0" in page.text  # 20 steps of each stage
        assert "seed: 10" in page.text
        assert "ab" * 32 in page.text

    def test_says_how_full_the_device_got_beside_the_plan(self, tmp_path):
        folder = make_run(tmp_path / "r")
        peaks = [(8.0, 0.5), (9.25, 0.63), (9.0, 0.6)]
        with (folder / "metrics.jsonl").open("a") as file:
            for step, (peak, share) in enumerate(peaks):
                memory = {"memory/peak_gib": peak, "memory/used_fraction": share, "memory/planned_gib": 9.0}
                file.write(
                    json.dumps({"kind": "train", "stage": "distill", "step": 20 + step, "loss": 1.0} | memory) + "\n"
                )
        page = Page(write_run_report(folder))
        assert "peak memory while training 9.25 GiB, 63% of what there is; 9.00 GiB were planned" in page.text

    def test_what_was_changed_by_hand_has_a_figure_of_its_own(self, tmp_path):
        folder = make_run(tmp_path / "r")
        change = {"kind": "change", "stage": "distill", "step": 10, "objective.kd.temperature": 4.0}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(change) + "\n")
        page = Page(write_run_report(folder))
        assert len(page.images) == 4
        assert "What was changed by hand while it trained" in page.text

    def test_shows_the_first_rows_teacher_first(self, tmp_path):
        text = Page(write_run_report(make_run(tmp_path / "r"))).text
        for i in range(NUM_EXAMPLES):
            answers = [f"teacher of r says {i}", f"before of r says {i}", f"student of r says {i}"]
            places = [text.index(piece) for piece in (f"question {i}?", f"gold {i}", *answers)]
            assert places == sorted(places)
        assert f"question {NUM_EXAMPLES}?" not in text

    def test_tells_what_was_dropped_where_the_run_wrote_it(self, tmp_path):
        folder = make_run(tmp_path / "r")
        part = {"num_read": 9, "num_kept": 5, "dropped": {"no answer": 4}, "sha256": "cd" * 32}
        (folder / "rows.json").write_text(json.dumps({"train": part}))
        text = Page(write_run_report(folder)).text
        assert "train 5 of 9 no answer: 4 " + "cd" * 32 in text

    def test_does_with_the_figures_alone(self, tmp_path):
        folder = make_run(tmp_path / "r")
        for name in ("metrics.jsonl", "config.yaml", "environment.json"):
            (folder / name).unlink()
        page = Page(write_run_report(folder))
        assert len(page.images) == 1
        assert "Settings" not in page.text

    def test_the_doctor_looks_at_the_log(self, tmp_path):
        folder = make_run(tmp_path / "r")
        assert "good Nothing wrong was found." in Page(write_run_report(folder)).text
        still = [{"kind": "train", "stage": "s", "step": step, "loss": 3.0, "learning_rate": 0.0} for step in range(5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in still))
        text = Page(write_run_report(folder)).text
        assert "KD201 learning rate is 0 seen stage s: learning rate 0 at all 5 log rows, steps 0 to 4" in text

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "neither metrics.jsonl nor trainer_state.json is in it."),
            (b"", "names no figure that a trainer logs"),
            (b"\xff junk\n[1]\n7\n{}\n", "names no figure that a trainer logs"),
        ],
    )
    def test_a_log_that_is_none_is_said_and_breaks_nothing(self, tmp_path, content, said):
        folder = make_run(tmp_path / "r")
        (folder / "metrics.jsonl").unlink()
        if content is not None:
            (folder / "metrics.jsonl").write_bytes(content)
        page = Page(write_run_report(folder))
        assert "Doctor The doctor could not look at this run: " in page.text
        assert said in page.text
        assert len(page.images) == 1

    def test_a_line_that_was_cut_costs_that_line_alone(self, tmp_path):
        """The report of a run whose log ended in half a line was a traceback."""
        folder = make_run(tmp_path / "r")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "sta')
        page = Page(write_run_report(folder))
        assert len(page.images) == 3
        assert "student 40 24.0" in page.text

    def test_refuses_a_folder_without_a_finished_run(self, tmp_path):
        with pytest.raises(UserError, match=r"evaluation\.json is missing"):
            write_run_report(tmp_path)


class TestWriteComparisonReport:
    def test_puts_the_students_side_by_side(self, tmp_path):
        folders = {
            "sft": make_run(tmp_path / "sft", with_teacher=False),
            "kd": make_run(tmp_path / "kd"),
        }
        page = Page(write_comparison_report(tmp_path / "out", folders, ROWS))
        pieces = ["question 0?", "gold 0", "teacher of kd says 0", "student of sft says 0", "student of kd says 0"]
        assert all(piece in page.text for piece in pieces)
        assert "before of" not in page.text
        assert "while training (sft)." in page.text
        assert len(page.images) == 1 + 2 * 2
        assert "kd: config.yaml" in page.text
        assert "Doctor sft good Nothing wrong was found." in page.text

    def test_a_single_evaluation_draws_no_curve(self, tmp_path):
        page = Page(write_run_report(make_run(tmp_path / "run", num_evaluations=1)))
        assert "Validation rows while training" not in page.text

    def test_refuses_runs_on_different_rows(self, tmp_path):
        folders = {"a": make_run(tmp_path / "a"), "b": make_run(tmp_path / "b", rows="cd" * 32)}
        with pytest.raises(UserError, match="the runs a and b measured different rows"):
            write_comparison_report(tmp_path, folders, ROWS)

    def test_refuses_no_run(self, tmp_path):
        with pytest.raises(UserError, match="at least one finished run"):
            write_comparison_report(tmp_path, {}, ROWS)


class TestComparisonTable:
    def render(self, rows, width=80):
        console = Console(file=StringIO(), width=width, color_system=None)
        console.print(comparison_table(rows))
        return console.file.getvalue()

    def test_shows_values_above_their_intervals_at_80_columns(self):
        rows = [model_row("KD + DTW student", 26.0, steps=123456, perplexity=485165195.4), *ROWS]
        lines = self.render(rows).splitlines()
        assert max(map(len, lines)) <= 80
        value, interval = (line for line in lines[3:5])
        assert value.split() == ["KD", "+", "DTW", "student", "123456", "26.0", "3.0", "4.9e+08"]
        assert interval.split() == ["(23.4–28.6)", "(2.7–3.3)", "(4.4e+08–5.3e+08)"]

    def test_a_name_in_brackets_is_no_markup(self):
        assert "[red]x[/red]" in self.render([model_row("[red]x[/red]", 1.0)])

    def test_leaves_out_columns_that_nobody_has_and_marks_what_one_lacks(self):
        text = self.render([{"model": "a", "rouge_l": 1.0}, {"model": "b", "exact_match": 2.0}])
        assert "perplexity" not in text
        assert "steps" not in text
        assert text.count("–") == 2

    @pytest.mark.parametrize(("seeds", "over"), [(1, "rows"), (3, "sampling seeds")])
    def test_one_seed_has_no_interval_over_seeds(self, seeds, over):
        assert f"95 % interval over {over}\n" in re.sub(" *\n", "\n", self.render([model_row("a", 1.0, seeds=seeds)]))

    def test_rows_are_counted_where_models_differ_in_them(self):
        same = [model_row("student", 26.0, steps=300, num_rows=250), model_row("teacher", 30.0, num_rows=250)]
        assert "rows" not in self.render(same).splitlines()[1]
        lines = self.render([same[0], same[1] | {"num_rows": 249.0}]).splitlines()
        assert max(map(len, lines)) <= 80
        assert "rows" in lines[1].split()
        assert lines[3].split()[:3] == ["student", "300", "250"]
        assert lines[5].split()[:3] == ["teacher", "–", "249"]

    def test_a_perplexity_that_json_could_not_hold_is_infinite(self):
        row = {"model": "a", "perplexity": None, "perplexity_low": 1e300, "perplexity_high": None}
        bounds = {"cross_entropy": 800.0, "cross_entropy_low": 690.8, "cross_entropy_high": 900.0}
        text = self.render([row | bounds, {"model": "b", "rouge_l": 1.0}])
        assert "∞" in text
        assert "(1.0e+300–∞)" in text
        assert text.count(" – ") + text.count(" –\n") == 2  # what was not measured

    def test_a_point_interval_is_not_shown_and_infinity_is(self):
        row = {"model": "a", "exact_match": 0.0, "exact_match_low": 0.0, "exact_match_high": 0.0}
        text = self.render([row | {"perplexity": float("inf")}])
        assert "(" not in text.split("second line")[0].replace("exact match (%)", "")
        assert "∞" in text

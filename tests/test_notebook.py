"""What notebooks call: runs that go on, figures, answers side by side, and the box for a prompt."""

import base64
import json

import pytest
from matplotlib.figure import Figure
from tiny import make_pair, tiny_config

from kdkit import notebook
from kdkit.errors import UserError
from kdkit.inspection import load_run_models
from kdkit.notebook import AnswersTable, ask_models, show, start_or_resume
from kdkit.training.run import run_distillation

OBJECTIVE = {"kd": {"weight": 1.0}, "dtw": {"weight": 0.5, "band": 4}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def config(pair):
    return tiny_config(pair, "data.train_rows=8", objective=OBJECTIVE, max_steps=1)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return run_distillation(config, tmp_path_factory.mktemp("session") / "demo" / "after")


@pytest.fixture(scope="module")
def models(finished):
    return load_run_models(finished.folder)


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, in order."""
    objects = []
    monkeypatch.setattr(notebook, "display", objects.append)
    return objects


class TestStartOrResume:
    def test_the_second_time_nothing_is_trained_again(self, config, tmp_path, capsys):
        first = start_or_resume(config, tmp_path / "run")
        said = capsys.readouterr()
        assert "1 optimizer steps" in said.out
        assert said.err == ""
        metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        second = start_or_resume(config, tmp_path / "run")
        assert "optimizer steps" not in capsys.readouterr().out
        assert second.evaluations == first.evaluations
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics

    def test_without_resume_a_folder_that_holds_a_run_is_refused(self, config, finished):
        with pytest.raises(UserError, match="is not empty"):
            start_or_resume(config, finished.folder, resume=False)

    def test_a_run_in_an_attached_output_goes_on(self, config, finished, tmp_path, capsys):
        attached = tmp_path / "input" / "notebooks" / "someone" / "slug"
        attached.mkdir(parents=True)
        (attached / "demo").symlink_to(finished.folder.parent)
        again = start_or_resume(config, tmp_path / "demo" / "after", inputs=attached.parent.parent.parent)
        said = capsys.readouterr().out
        assert "continuing " in said
        assert "optimizer steps" not in said
        assert again.evaluations == finished.evaluations
        assert again.folder == tmp_path / "demo" / "after"
        assert not list(again.folder.parent.glob("*.partial"))

    def test_an_attached_run_of_another_name_is_left_alone(self, config, finished, tmp_path):
        start_or_resume(config, tmp_path / "other" / "after", inputs=finished.folder.parent.parent)
        rows = [json.loads(line) for line in (tmp_path / "other" / "after" / "metrics.jsonl").read_text().splitlines()]
        assert rows != [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]

    def test_two_attached_outputs_need_a_choice(self, config, tmp_path):
        for slug in ("one", "two"):
            run = tmp_path / "input" / slug / "demo" / "after"
            run.mkdir(parents=True)
            (run / "config.yaml").touch()
        with pytest.raises(UserError, match="2 attached outputs"):
            start_or_resume(config, tmp_path / "demo" / "after", inputs=tmp_path / "input")
        assert not (tmp_path / "demo").exists()


class TestShow:
    def test_the_figure_becomes_a_picture_with_its_title_as_text(self, shown):
        figure = Figure()
        figure.suptitle("It learns")
        show(figure, size="narrow")
        (image,) = shown
        data, metadata = image._repr_mimebundle_()
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        assert metadata["image/png"] == {"width": 480, "alt": "It learns"}


class TestAnswersTable:
    ROWS = (
        {"prompt": "Add 1 < 2\nAnswer:\n", "references": ["3", "three"], "student": "\n\n<b>3</b>\n", "before": None},
        {"prompt": "Hi", "teacher": "Hello"},
    )

    def test_text_has_one_line_for_each_voice_in_order(self):
        assert repr(AnswersTable(self.ROWS)).splitlines() == [
            "Add 1 < 2",
            "Answer:",
            "  reference  3",
            "  before     –",
            "  after      <b>3</b>",
            "",
            "Hi",
            "  teacher    Hello",
        ]

    def test_html_escapes_what_models_write(self):
        page = AnswersTable(self.ROWS)._repr_html_()
        assert "&lt;b&gt;3&lt;/b&gt;" in page
        assert "<b>" not in page
        assert "1 &lt; 2" in page
        assert page.count("<tr>") == 2 + 3 + 1


class TestAskModels:
    def test_a_typed_prompt_is_answered_by_all_three(self, models, shown):
        box = ask_models(models, "Say hello.")
        table, widget = shown
        assert widget is box
        assert list(table.rows[0]) == ["prompt", "before", "student", "teacher"]
        text, button, answers = box.children
        assert (text.value, answers.value) == ("Say hello.", "")
        text.value = "Count the eggs."
        button.click()
        for expected in ("Count the eggs.", ">before<", ">after<", ">teacher<"):
            assert expected in answers.value
        assert (button.disabled, button.description) == (False, "Answer")

    def test_what_the_reader_gets_wrong_is_said_in_the_box(self, models, shown):
        text, button, answers = ask_models(models, "Say hello.").children
        text.value = " "
        button.click()
        assert "prompt is empty" in answers.value
        assert not button.disabled

    def test_a_batch_run_has_answers_and_no_box(self, models, shown, monkeypatch):
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        assert ask_models(models, "Say hello.") is None
        assert len(shown) == 1

    def test_without_ipywidgets_there_is_no_box(self, models, shown, monkeypatch):
        monkeypatch.setattr(notebook, "has_front_end", lambda: False)
        assert ask_models(models, "Say hello.") is None
        assert len(shown) == 1

"""What notebooks call: figures, answers side by side, the box for a prompt, and the student handed over."""

import base64
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from matplotlib.figure import Figure
from tiny import make_pair, tiny_config

from kdkit import notebook
from kdkit.errors import UserError
from kdkit.inspection import load_run_models
from kdkit.notebook import AnswersTable, ask_models, hand_over, show
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


class TestHandOver:
    @pytest.fixture
    def model(self, tmp_path):
        folder = tmp_path / "after" / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        return folder

    @pytest.fixture
    def hub(self, monkeypatch):
        """What the hub is asked to do."""
        asked = []
        monkeypatch.setattr(
            notebook, "create_repo", lambda name, **kwargs: asked.append((name, kwargs)) or f"hub/{name}"
        )
        monkeypatch.setattr(notebook, "upload_folder", lambda **kwargs: asked.append(kwargs))
        return asked

    def test_a_link_leads_to_a_zip_that_holds_the_model(self, model, shown, hub):
        hand_over(model)
        (link,) = shown
        with ZipFile(Path(link.path)) as archive:
            assert archive.namelist() == ["config.json"]
        assert hub == []

    def test_the_hub_gets_a_private_repository(self, model, shown, hub, capsys):
        hand_over(model, hub="you/student")
        assert hub == [
            ("you/student", {"private": True, "exist_ok": True}),
            {"repo_id": "you/student", "folder_path": model},
        ]
        assert "pushed to hub/you/student (private)" in capsys.readouterr().out

    @pytest.mark.parametrize("error", [LocalTokenNotFoundError("no token"), HFValidationError("a b is no name")])
    def test_what_the_hub_refuses_is_one_message_and_the_zip_stays(self, model, shown, hub, monkeypatch, error):
        def refuse(*_, **__):
            raise error

        monkeypatch.setattr(notebook, "create_repo", refuse)
        with pytest.raises(UserError, match=r"the hub did not take you/student: .*HF_TOKEN"):
            hand_over(model, hub="you/student")
        assert Path(shown[0].path).is_file()

    def test_without_room_nothing_is_packed(self, model, shown, monkeypatch):
        monkeypatch.setattr(notebook.shutil, "disk_usage", lambda place: SimpleNamespace(free=1))
        with pytest.raises(UserError, match=r"room for 0\.0: free some"):
            hand_over(model)
        assert not list(model.parent.glob("*.zip"))

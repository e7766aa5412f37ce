"""Sliders: a value set changes the picture, and where nobody can set one there is a picture all the same."""

import base64
import os
import re
import sys
from pathlib import Path

import ipywidgets
import nbformat
import pytest
from diagnoses import EVIL, healthy_diagnosis, made_up_diagnosis, quoting_diagnosis
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from traces import LABELS, made_up_traces

from kdkit.config import load_config
from kdkit.errors import UserError
from kdkit.inspection import save_traces
from kdkit.memory.cards import find_card
from kdkit.memory.shapes import shape_folder
from kdkit.widgets import (
    Control,
    DiagnosisBox,
    alignment_explorer,
    explorer,
    memory_explorer,
    temperature_explorer,
    threshold_explorer,
)
from kdkit.widgets.explorer import Explorer

VIEW = "application/vnd.jupyter.widget-view+json"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def draw(height, shape):
    """A bar, for tests of the mechanism alone."""
    if height == 3:
        raise UserError("3 is <too> high")
    figure = Figure(figsize=(2, 1))
    figure.suptitle(f"{shape} of\nheight {height} & more")
    figure.subplots().bar([0], [height])
    return figure


def controls(start=1):
    return (
        Control("height", "height", [(f"{n} m", n) for n in (1, 2, 3)], start),
        Control("shape", "shape", [("Bar", "bar"), ("Column", "column")], "bar", kind="buttons"),
    )


@pytest.fixture
def drawn():
    """Calls of the drawing function, in order."""
    return []


@pytest.fixture
def shown(drawn):
    def counted(**values):
        drawn.append(values)
        return draw(**values)

    return Explorer(counted, controls())


class TestExplorer:
    def test_a_value_set_changes_the_picture_and_its_text(self, shown):
        before = shown.png
        shown.widgets["height"].value = 2
        assert shown.values == {"height": 2, "shape": "bar"}
        assert shown.png.startswith(PNG_MAGIC)
        assert shown.png != before
        assert shown.alt == "bar of height 2 & more"
        assert base64.b64encode(shown.png).decode() in shown.picture.widget().value
        assert 'alt="bar of height 2 &amp; more"' in shown.picture.widget().value

    def test_every_control_is_passed_on_by_name(self, shown, drawn):
        shown.widgets["shape"].value = "column"
        shown.widgets["height"].value = 2
        assert drawn[1:] == [{"height": 1, "shape": "column"}, {"height": 2, "shape": "column"}]

    def test_a_value_is_drawn_once(self, shown, drawn):
        first = shown.png
        for height in (2, 1, 2, 1):
            shown.widgets["height"].value = height
        assert len(drawn) == 2
        assert shown.png == first

    def test_what_cannot_be_drawn_is_said_below_the_last_picture_until_another_can(self, shown):
        shown.widgets["height"].value = 2
        last = shown.picture.widget().value
        shown.widgets["height"].value = 3
        assert shown.message.value == '<b role="alert">3 is &lt;too&gt; high</b>'
        assert shown.picture.widget().value == last
        shown.widgets["height"].value = 2
        assert shown.message.value == ""

    def test_a_start_that_cannot_be_drawn_or_is_no_option_is_refused(self):
        with pytest.raises(UserError, match="too"):
            Explorer(draw, controls(start=3))
        with pytest.raises(UserError, match=r"height cannot start at 7: allowed are 1 m, 2 m, 3 m"):
            Explorer(draw, controls(start=7))

    def test_it_shows_controls_where_there_are_some_and_the_picture_elsewhere(self, shown):
        bundle, metadata = shown._repr_mimebundle_()
        assert bundle[VIEW] == {"version_major": 2, "version_minor": 0, "model_id": shown.box.model_id}
        assert base64.b64decode(bundle["image/png"]) == shown.png
        assert bundle["text/plain"] == metadata["image/png"]["alt"] == "bar of height 1 & more"
        assert shown.box.children == (*shown.widgets.values(), shown.picture.widget(), shown.message)

    @pytest.mark.parametrize("why", ["batch", "no ipywidgets"])
    def test_where_nobody_could_move_it_there_is_the_picture_alone(self, monkeypatch, why):
        if why == "batch":
            monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        else:
            monkeypatch.setattr(explorer, "find_spec", lambda name: None)
            monkeypatch.setitem(sys.modules, "ipywidgets", None)  # an import of it fails
        shown = Explorer(draw, controls())
        bundle, _ = shown._repr_mimebundle_()
        assert sorted(bundle) == ["image/png", "text/plain"]
        assert base64.b64decode(bundle["image/png"]).startswith(PNG_MAGIC)
        assert (shown.widgets, shown.box, shown.values) == ({}, None, {"height": 1, "shape": "bar"})

    def test_an_interactive_session_on_kaggle_has_controls(self, monkeypatch):
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
        assert Explorer(draw, controls()).box is not None


@pytest.fixture(scope="module")
def traces_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "traces.json"
    save_traces(made_up_traces(), path)
    return path


def planned_pair(*changes):
    """The preset of the MoE teacher and SmolLM, by their sizes alone."""
    models = [f"teacher.path={shape_folder('huihui-moe-1b')}", f"student.path={shape_folder('smollm-135m')}"]
    return load_config("moe-smollm", [*models, "evaluation.batch_size=4", *changes])


@pytest.fixture(scope="module")
def every_explorer(aligned_models, trained_row, traces_file):
    prompt, answer = trained_row
    return (
        threshold_explorer(traces_file),
        temperature_explorer(aligned_models, [{"prompt": prompt, "references": [answer]}]),
        memory_explorer(planned_pair()),
        alignment_explorer(aligned_models, prompt, answer),
    )


class TestEveryExplorer:
    def test_each_control_changes_the_picture(self, every_explorer):
        for shown in every_explorer:
            for name, control in shown.controls.items():
                before = shown.png
                shown.widgets[name].value = next(v for _, v in control.options if v != shown.values[name])
                assert shown.png != before, name

    def test_sliders_report_when_they_are_let_go(self, every_explorer):
        sliders = [w for shown in every_explorer for w in shown.widgets.values() if hasattr(w, "continuous_update")]
        assert len(sliders) == 9
        assert not any(slider.continuous_update for slider in sliders)


class TestThresholdExplorer:
    def test_it_starts_at_the_highest_threshold_of_the_first_sweep(self, traces_file):
        shown = threshold_explorer(traces_file)
        assert shown.values == {"threshold": 0.8, "label": LABELS[0]}
        shown.widgets["label"].value = LABELS[1]
        shown.widgets["threshold"].value = 0.3
        assert shown.alt.startswith("φ = 0.3, neither: 30% of the rows")

    def test_a_threshold_that_one_sweep_lacks_is_said(self, tmp_path):
        traces = [t for t in made_up_traces() if t["label"] == LABELS[0] or t["threshold"] < 0.5]
        save_traces(traces, tmp_path / "traces.json")
        shown = threshold_explorer(tmp_path / "traces.json")
        shown.widgets["label"].value = LABELS[1]
        assert "no run of &#x27;neither&#x27; has threshold 0.8" in shown.message.value

    def test_without_the_embedded_file_it_says_how_to_make_one(self, tmp_path, monkeypatch):
        monkeypatch.setattr("kdkit.inspection.thresholds.demo_folder", lambda: tmp_path)
        with pytest.raises(UserError, match="make one with `kdkit sweep"):
            threshold_explorer()


class TestTemperatureExplorer:
    def test_positions_are_the_tokens_of_the_answers(self, aligned_models, trained_row):
        prompt, answer = trained_row
        rows = [{"prompt": prompt, "references": [text]} for text in (answer, "Yes.")]
        shown = temperature_explorer(aligned_models, rows)
        names = [name for name, _ in shown.controls["position"].options]
        assert names[0].startswith("row 1, 1: ")
        own = [name.split(": ")[1] for name in names if name.startswith("row 2")]
        assert "".join(own) == f"Yes.{aligned_models.tokenizer.eos_token}"
        shown.widgets["position"].value = (1, len(own) - 1)
        assert shown.alt.endswith(f"Yes.” → “{aligned_models.tokenizer.eos_token}”")

    def test_it_starts_at_the_runs_temperature_and_loss(self, aligned_models, trained_row):
        shown = temperature_explorer(aligned_models, [{"prompt": trained_row[0], "references": [trained_row[1]]}])
        assert shown.values == {"temperature": 1.0, "position": (0, 0), "loss": "forward_kl"}
        temperatures = [value for _, value in shown.controls["temperature"].options]
        assert (temperatures[0], temperatures[-1]) == (0.5, 8)

    def test_no_row_is_refused(self, aligned_models):
        with pytest.raises(UserError, match="there is no row"):
            temperature_explorer(aligned_models, [])


class TestAlignmentExplorer:
    def test_gamma_and_band_change_what_the_title_says(self, aligned_models, trained_row):
        shown = alignment_explorer(aligned_models, *trained_row)
        assert shown.values == {"gamma": 0.1, "band": 4}
        assert shown.alt.startswith("γ = 0.1, band 4: soft-DTW / diagonal = ")
        shown.widgets["band"].value = "none"
        shown.widgets["gamma"].value = 10.0
        assert shown.alt.startswith("γ = 10, no band: soft-DTW / diagonal = ")

    def test_the_teacher_may_read_another_wording(self, aligned_models, trained_row):
        same = alignment_explorer(aligned_models, *trained_row)
        other = alignment_explorer(aligned_models, *trained_row, teacher_answer="Quite another answer.")
        assert same.alt != other.alt


def used_gib(shown):
    """What the title says is used."""
    return float(re.search(r"([\d.]+) of [\d.]+ GiB", shown.alt)[1])


class TestMemoryExplorer:
    def test_it_starts_at_the_runs_settings_on_the_first_card(self):
        shown = memory_explorer(planned_pair("optim.batch_size=3", "teacher.dtype=float16"))
        expected = {"batch": 3, "length": 256, "k": 256, "chunk": 128, "recompute": False, "weights": "float16"}
        assert shown.values == expected | {"card": "P100 16 GB"}
        assert shown.alt.startswith("3 × 256 tokens, K 256, chunks of 128, teacher float16: Fits: ")

    @pytest.mark.parametrize(
        ("name", "value", "is_more"),
        [
            ("batch", 8, True),
            ("length", 512, True),
            ("chunk", 1024, True),
            ("recompute", True, False),
            ("weights", "float32", True),
            ("weights", "nf4", False),
            ("card", "T4 x2", False),  # the teacher has left
        ],
    )
    def test_each_setting_moves_the_peak_its_way(self, name, value, is_more):
        shown = memory_explorer(planned_pair("preset=[moe-smollm, fkl]", "objective.hidden.weight=0"))
        before = used_gib(shown)
        shown.widgets[name].value = value
        assert shown.message.value == ""
        assert (used_gib(shown) > before) is is_more
        assert used_gib(shown) != before

    def test_how_many_ids_are_compared_moves_no_bar_of_a_live_teacher(self):
        shown = memory_explorer(planned_pair())
        before = used_gib(shown)
        shown.widgets["k"].value = "all"
        assert used_gib(shown) == before
        assert "K all" in shown.alt

    def test_a_longer_row_than_the_prompts_limit_is_not_asked_for(self):
        """A row shorter than `max_prompt_length` was refused by the config's own check."""
        shown = memory_explorer(planned_pair())
        shown.widgets["length"].value = 64
        assert (shown.message.value, shown.alt[:6]) == ("", "4 × 64")

    def test_int8_on_a_card_without_it_is_said(self):
        shown = memory_explorer(planned_pair(), [find_card("p100")])
        shown.widgets["weights"].value = "int8"
        assert "int8 needs compute capability 7.5, and the P100 16 GB has 6.0: take nf4" in shown.message.value

    def test_of_several_stages_it_is_the_one_that_needs_most(self):
        """At the run's own 4 rows the figure showed less than the run would take."""
        stages = "stages={warm: {optim: {batch_size: 2, max_steps: 9}}, long: {optim: {batch_size: 16}}}"
        shown = memory_explorer(planned_pair(stages))
        assert shown.values["batch"] == 16
        before = used_gib(shown)
        shown.widgets["batch"].value = 8
        assert used_gib(shown) < before


class TestDiagnosisBox:
    def options(self, shown):
        return [name for name, _ in shown.buttons.options]

    def test_the_buttons_are_what_there_is_any_of(self):
        assert self.options(DiagnosisBox(made_up_diagnosis())) == ["all", "2 fail", "1 warn", "2 good", "3 skipped"]
        assert self.options(DiagnosisBox(healthy_diagnosis())) == ["all", "1 good", "1 skipped"]

    def test_it_starts_with_all_findings_folded(self):
        shown = DiagnosisBox(made_up_diagnosis())
        assert shown.buttons.value == "all"
        assert re.findall(r"<code>(KD\d+)</code>", shown.findings.value) == [f"KD90{n}" for n in range(1, 8)]
        assert " open>" not in shown.findings.value

    def test_a_button_leaves_its_part(self):
        shown = DiagnosisBox(made_up_diagnosis())
        shown.buttons.value = "warn"
        assert re.findall(r"<code>(KD\d+)</code>", shown.findings.value) == ["KD902"]
        shown.buttons.value = "all"
        assert "KD901" in shown.findings.value

    def test_it_shows_the_box_and_all_of_it_as_html_and_text_elsewhere(self):
        shown = DiagnosisBox(made_up_diagnosis())
        bundle, _ = shown._repr_mimebundle_()
        assert bundle[VIEW]["model_id"] == shown.box.model_id
        assert bundle["text/plain"].startswith("fail  KD901 too long ×2\n")
        assert bundle["text/html"].count(" open>") == 2
        assert all(f"KD90{n}" in bundle["text/html"] for n in range(1, 8))

    def test_a_batch_run_has_no_box(self, monkeypatch):
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        monkeypatch.setitem(sys.modules, "ipywidgets", None)  # an import of it fails
        bundle, _ = DiagnosisBox(made_up_diagnosis())._repr_mimebundle_()
        assert sorted(bundle) == ["text/html", "text/plain"]

    def test_text_is_escaped(self):
        shown = DiagnosisBox(quoting_diagnosis(EVIL))
        assert "<script" not in shown.findings.value + shown._repr_mimebundle_()[0]["text/html"]


SET = """
import hashlib
for shown in (threshold, temperature, memory, alignment):
    for name, control in shown.controls.items():
        before = hashlib.sha256(shown.picture.widget().value.encode()).hexdigest()
        shown.widgets[name].value = next(v for _, v in control.options if v != shown.widgets[name].value)
        after = hashlib.sha256(shown.picture.widget().value.encode()).hexdigest()
        print(name, "changed" if after != before else "stayed", shown.message.value)
"""


@pytest.fixture(scope="module")
def executed(explorer_cells, tmp_path_factory):
    """A notebook without a front end: every explorer, each of its controls set to another value, then a batch run."""
    batch = "import os\nos.environ['KAGGLE_KERNEL_RUN_TYPE'] = 'Batch'\n" + explorer_cells["threshold"]
    sources = [*explorer_cells.values(), SET, batch]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    folder = tmp_path_factory.mktemp("notebook")
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONPATH": paths})
    return notebook


class TestInANotebook:
    def test_setting_a_value_changes_the_picture(self, executed):
        outputs = executed.cells[-2].outputs
        assert {output.name for output in outputs} == {"stdout"}
        names = ["threshold", "label", "temperature", "position", "loss"]
        names += ["batch", "length", "k", "chunk", "recompute", "weights", "card", "gamma", "band"]
        assert "".join(output.text for output in outputs).splitlines() == [f"{name} changed " for name in names]

    def test_what_is_kept_holds_the_controls_and_the_picture(self, executed):
        for cell in executed.cells[1:-2]:
            (output,) = cell.outputs
            assert {VIEW, "image/png", "text/plain"} == set(output.data)
            assert base64.b64decode(output.data["image/png"]).startswith(PNG_MAGIC)
            assert output.metadata["image/png"]["alt"] == output.data["text/plain"]
        state = executed.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
        assert all(cell.outputs[0].data[VIEW]["model_id"] in state for cell in executed.cells[1:-2])

    def test_a_page_made_of_it_has_the_pictures_where_no_widget_state_was_kept(self, executed):
        saved = nbformat.from_dict({**executed, "metadata": {}})
        page, _ = HTMLExporter().from_notebook_node(saved)
        for cell in executed.cells[1:-2]:
            assert cell.outputs[0].data["image/png"].strip()[:200] in page
        assert page.count('alt="') >= 4

    def test_a_page_made_of_it_has_the_controls_where_it_was(self, executed):
        page, _ = HTMLExporter().from_notebook_node(executed)
        for cell in executed.cells[1:-2]:
            assert cell.outputs[0].data[VIEW]["model_id"] in page

    def test_a_batch_run_on_kaggle_keeps_pictures_alone(self, executed):
        (output,) = executed.cells[-1].outputs
        assert set(output.data) == {"image/png", "text/plain"}


def test_the_widgets_are_those_of_ipywidgets(every_explorer):
    kinds = {name: type(widget) for shown in every_explorer for name, widget in shown.widgets.items()}
    assert kinds["label"] is kinds["loss"] is ipywidgets.ToggleButtons
    assert kinds["temperature"] is kinds["position"] is kinds["gamma"] is ipywidgets.SelectionSlider

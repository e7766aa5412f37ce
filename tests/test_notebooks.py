"""Notebooks: thin, the same as their source, and they run from top to bottom without a front end."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
MOST_LINES_OF_A_CELL = 15
MOST_LINES_IN_FUNCTIONS = 0.03
TRAINING_LOOP_CALLS = {"backward", "zero_grad"}
SECONDS_OF_THE_DEFAULT = 300
VIEW = "application/vnd.jupyter.widget-view+json"
THE_CLOCK_STRIKES = """
from kdkit.training.flow import StageFlow
on_step_end = StageFlow.on_step_end
def strike(flow, args, state, control, **kwargs):
    if state.global_step == 2:
        flow.stop.deadline = 0.0
    return on_step_end(flow, args, state, control, **kwargs)
StageFlow.on_step_end = strike
"""


def read_source(path):
    return jupytext.read(path, config=jupytext.config.load_jupytext_config(str(ROOT / "jupytext.toml")))


def read_notebook(path):
    return nbformat.read(path.with_suffix(".ipynb"), as_version=4)


def described(notebook):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def code_cells(path):
    return [cell.source for cell in read_source(path).cells if cell.cell_type == "code"]


def code_lines(source):
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def lines_in_functions(source):
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sum(node.end_lineno - node.lineno + 1 for node in functions)


def execute(path, folder, *, size, extra=(), after_settings=(), **variables):
    """Run a copy in `folder` with nothing of this machine's home; returns the notebook with its outputs.

    `extra` cells are a reader's, at the end; those `after_settings` stand in for what happens to a session.
    """
    home = folder / "home"
    home.mkdir(exist_ok=True)
    notebook = read_notebook(path)
    settings = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells[settings + 1 : settings + 1] = [nbformat.v4.new_code_cell(source) for source in after_settings]
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in extra]
    places = {name: str(home) for name in ("HOME", "IPYTHONDIR", "MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE", "KDKIT"))}
    environment |= {**places, "KDKIT_SIZE": size, "HF_HUB_OFFLINE": "1", **variables}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
class TestPair:
    def test_the_notebook_is_what_its_source_makes(self, path):
        """jupytext --test does not notice when the two have drifted apart."""
        assert described(read_notebook(path)) == described(read_source(path))

    def test_it_is_valid_and_carries_no_outputs(self, path):
        notebook = read_notebook(path)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code)
        assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
        assert {key for cell in notebook.cells for key in cell.metadata} <= {"tags"}


def test_no_notebook_is_without_its_source():
    assert SOURCES
    assert [p.stem for p in sorted((ROOT / "notebooks").glob("*.ipynb"))] == [path.stem for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
class TestThinness:
    def test_cells_are_short(self, path):
        long = [source for source in code_cells(path) if len(code_lines(source)) > MOST_LINES_OF_A_CELL]
        assert not long

    def test_prose_stands_before_each_cell(self, path):
        kinds = [cell.cell_type for cell in read_source(path).cells]
        assert kinds[0] == "markdown"
        assert not [i for i in range(1, len(kinds)) if kinds[i - 1] == kinds[i] == "code"]

    def test_there_is_no_class_no_training_loop_and_next_to_no_function(self, path):
        source = "\n".join(code_cells(path))
        nodes = list(ast.walk(ast.parse(source)))
        assert not [node for node in nodes if isinstance(node, ast.ClassDef)]
        assert not TRAINING_LOOP_CALLS & {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert lines_in_functions(source) < MOST_LINES_IN_FUNCTIONS * len(code_lines(source))

    def test_it_ends_with_what_it_did_not_show(self, path):
        assert read_source(path).cells[-1].source.startswith("## What this did not show")


DISTILL = ROOT / "notebooks" / "01_dtw_distill.py"
TYPE_A_PROMPT = """
text, button, answers = box.children
text.value = "Count the eggs."
button.click()
print(answers.value)
"""
MOVE_EVERY_SLIDER = """
for explorer in [shown for shown in Out.values() if type(shown).__name__ == "Explorer"]:
    for name, widget in explorer.widgets.items():
        before = explorer.png
        widget.value = next(value for _, value in widget.options if value != widget.value)
        print("moved", name, explorer.png != before, repr(explorer.message.value))
"""
WAIT_FOR_THE_LIVE_RUN = """
live.wait(120)
print("live:", live.status.value)
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The distillation notebook at its smallest size, and after it a reader who types a prompt and moves sliders."""
    folder = tmp_path_factory.mktemp("notebook")
    before = sorted((ROOT / "notebooks").rglob("*"))
    reader = [TYPE_A_PROMPT, MOVE_EVERY_SLIDER, WAIT_FOR_THE_LIVE_RUN]
    notebook = execute(DISTILL, folder, size="smoke", extra=reader)
    assert sorted((ROOT / "notebooks").rglob("*")) == before
    notebook.metadata.folder = folder
    yield notebook
    shutil.rmtree(folder)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
class TestFirstCell:
    """Before anything of kdkit is there."""

    @pytest.fixture
    def bare(self, monkeypatch, tmp_path):
        """A Python without kdkit, and the commands that the cell runs."""
        commands = []
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
        monkeypatch.setenv("KDKIT_INPUTS", str(tmp_path / "input"))
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        return commands

    def pip(self, place):
        return [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", place]

    def test_takes_the_newest_attached_wheel_without_what_it_needs(self, path, bare, tmp_path):
        wheels = tmp_path / "input" / "datasets" / "me" / "wheels"
        wheels.mkdir(parents=True)
        for version in ("0.9.0", "0.10.0"):
            (wheels / f"kdkit-{version}-py3-none-any.whl").touch()
        exec(code_cells(path)[0], {})
        assert bare == [self.pip(str(wheels / "kdkit-0.10.0-py3-none-any.whl"))]

    def test_takes_the_checkout_that_it_lies_in(self, path, bare, monkeypatch):
        monkeypatch.chdir(ROOT / "notebooks")
        exec(code_cells(path)[0], {})
        assert bare == [self.pip("..")]

    def test_says_what_to_attach_where_there_is_neither(self, path, bare):
        with pytest.raises(ModuleNotFoundError, match="attach the dataset of its wheels"):
            exec(code_cells(path)[0], {})
        assert bare == []

    def test_is_silent_where_kdkit_is_there(self, path, monkeypatch):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing lacks"))
        exec(code_cells(path)[0], {})


class TestDistillNotebook:
    def test_nothing_is_red_and_nothing_warns(self, executed):
        assert not [o for o in outputs(executed) if o.output_type == "error" or o.get("name") == "stderr"]
        assert not re.search(r"warning", printed(executed), re.IGNORECASE)

    def test_every_figure_is_a_picture_with_words_that_stand_for_it(self, executed):
        pictures = [o for o in outputs(executed) if "image/png" in o.get("data", {})]
        assert len(pictures) == 7  # curves, comparison, two alignments, two sliders, the live run
        assert all(o.metadata["image/png"]["alt"] for o in pictures)

    def test_sliders_are_shown_with_a_picture_for_those_who_cannot_move_them(self, executed):
        shown = [o.data for o in outputs(executed) if VIEW in o.get("data", {}) and "image/png" in o.data]
        assert len(shown) == 3

    def test_every_slider_changes_the_picture(self, executed):
        moved = [line.split() for line in printed(executed).splitlines() if line.startswith("moved ")]
        assert {name for _, name, *_ in moved} == {"gamma", "band", "temperature", "position", "loss"}
        assert all(rest == ["True", "''"] for _, _, *rest in moved)

    def test_the_doctor_speaks_of_the_run(self, executed):
        (diagnosis,) = [o.data for o in outputs(executed) if "diagnosis" in o.get("data", {}).get("text/html", "")]
        assert VIEW in diagnosis
        assert re.search(r"^\d fail, \d warn, \d+ good, \d+ skipped$", diagnosis["text/plain"], re.MULTILINE)

    def test_the_run_with_knobs_ends(self, executed):
        assert re.search(r"live: finished: ROUGE-L \d", printed(executed))

    def test_the_student_can_be_taken_along(self, executed):
        assert list(executed.metadata.folder.rglob("after/student.zip"))

    def test_its_tables_name_before_after_and_teacher(self, executed):
        tables = [o.data["text/html"] for o in outputs(executed) if "text/html" in o.get("data", {})]
        complete = [t for t in tables if all(name in t for name in ("before", "after", "teacher"))]
        assert len(complete) == 3  # comparison, answers side by side, the reader's prompt

    def test_a_typed_prompt_is_answered(self, executed):
        (output,) = executed.cells[-3].outputs
        assert "Count the eggs." in output.text
        assert all(f">{name}<" in output.text for name in ("before", "after", "teacher"))

    def test_a_batch_that_ends_by_its_clock_goes_on_from_its_attached_output_to_the_same_weights(
        self, executed, tmp_path
    ):
        session = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "KDKIT_INPUTS": str(tmp_path / "input")}
        (tmp_path / "input" / "version-1").mkdir(parents=True)
        (tmp_path / "second").mkdir()
        first = execute(
            DISTILL, tmp_path / "input" / "version-1", size="smoke", after_settings=[THE_CLOCK_STRIKES], **session
        )
        assert "add this version's output under Input" in printed(first)
        code = [cell for cell in first.cells if cell.cell_type == "code"]
        stopped = next(i for i, cell in enumerate(code) if 'RUN / "before", session' in cell.source)
        assert not any(cell.outputs for cell in code[stopped + 1 :])
        again = execute(DISTILL, tmp_path / "second", size="smoke", **session)
        assert "continuing " in printed(again)
        models = [
            next(place.rglob("after/model/model.safetensors"))
            for place in (tmp_path / "second", executed.metadata.folder)
        ]
        ours, theirs = map(load_file, models)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours | theirs)
        assert not [o for o in outputs(again) if VIEW in o.get("data", {})]  # nobody is there to move anything

    @pytest.mark.slow
    def test_a_second_execution_goes_on_and_the_default_takes_less_than_five_minutes(self, tmp_path):
        started = time.monotonic()
        first = execute(DISTILL, tmp_path, size="10 minutes")
        assert time.monotonic() - started < SECONDS_OF_THE_DEFAULT
        again = execute(DISTILL, tmp_path, size="10 minutes")
        assert "optimizer steps" in printed(first)
        assert "optimizer steps" not in printed(again)
        assert not [o for o in outputs(again) if o.output_type == "error" or o.get("name") == "stderr"]


LOADING = ROOT / "notebooks" / "02_teacher_loading.py"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The notebook on choosing a teacher at its smallest size."""
    folder = tmp_path_factory.mktemp("loading")
    yield execute(LOADING, folder, size="smoke")
    shutil.rmtree(folder)


class TestTeacherLoadingNotebook:
    def test_nothing_is_red_and_nothing_warns(self, loaded):
        assert not [o for o in outputs(loaded) if o.output_type == "error" or o.get("name") == "stderr"]
        assert not re.search(r"warning", printed(loaded), re.IGNORECASE)

    def test_its_figures_are_weights_experts_words_spans_and_the_run(self, loaded):
        titles = [o.metadata["image/png"]["alt"] for o in outputs(loaded) if "image/png" in o.get("data", {})]
        telling = ["nf4 takes", "An even share", "experts as their first", "meet in", "distill, 3 steps: ", "ROUGE-L"]
        assert len(titles) == len(telling)
        assert all(words in title for words, title in zip(telling, titles, strict=True))

    def test_its_three_pairs_are_one_of_each_kind(self, loaded):
        for pair, kind in {"dense teacher": "same", "a reserved token": "padded", "demo-moe": "different"}.items():
            assert f"{pair}: {kind}; " in printed(loaded)

    def test_each_dtype_is_tried_and_what_is_left_out_is_said(self, loaded):
        rows = [line.split() for line in printed(loaded).splitlines() if re.match(r" *b?float\d+ +True ", line)]
        assert [row[0] for row in rows] == ["float32", "float16", "bfloat16"]
        assert float(rows[0][2]) == 0 < float(rows[1][2]) < float(rows[2][2])
        assert "4 bits (nf4): left out, there is no GPU" in printed(loaded)

    @pytest.mark.slow
    def test_the_default_takes_less_than_five_minutes_and_the_student_learns(self, tmp_path):
        started = time.monotonic()
        notebook = execute(LOADING, tmp_path, size="5 minutes")
        assert time.monotonic() - started < SECONDS_OF_THE_DEFAULT
        titles = [o.metadata["image/png"]["alt"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
        assert "closes" in titles[-1]


GENERATION = ROOT / "notebooks" / "05_student_generation.py"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The notebook on the student's own text at its smallest size."""
    folder = tmp_path_factory.mktemp("generation")
    yield execute(GENERATION, folder, size="smoke")
    shutil.rmtree(folder)


class TestGenerationNotebook:
    def test_nothing_is_red_and_nothing_warns(self, generated):
        assert not [o for o in outputs(generated) if o.output_type == "error" or o.get("name") == "stderr"]
        assert not re.search(r"warning", printed(generated), re.IGNORECASE)

    def test_it_shows_the_comparison_both_rollouts_and_the_slider_as_pictures(self, generated):
        titles = [o.metadata["image/png"]["alt"] for o in outputs(generated) if "image/png" in o.get("data", {})]
        assert len(titles) == 4
        assert sum("student's own text" in title for title in titles) == 3
        assert titles[-1].startswith("φ = ")

    def test_distillms_trace_is_shown_for_each_reference(self, generated):
        (line,) = [line for line in printed(generated).splitlines() if line.split()[:1] == ["previous"]]
        assert line.split()[1:] == ["0.0", "0.0", "0.1", "0.2", "0.2", "0.3", "0.3", "0.4", "0.4", "0.5"]

    @pytest.mark.slow
    def test_the_default_takes_less_than_five_minutes_and_a_second_execution_goes_on(self, tmp_path):
        started = time.monotonic()
        execute(GENERATION, tmp_path, size="5 minutes")
        assert time.monotonic() - started < SECONDS_OF_THE_DEFAULT
        again = execute(GENERATION, tmp_path, size="5 minutes")
        assert "optimizer steps" not in printed(again)


BUDGET = ROOT / "notebooks" / "04_memory_budget.py"


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory):
    """The notebook on memory at its smallest size, and after it a reader who moves sliders."""
    folder = tmp_path_factory.mktemp("budget")
    yield execute(BUDGET, folder, size="smoke", extra=[MOVE_EVERY_SLIDER])
    shutil.rmtree(folder)


class TestMemoryNotebook:
    def test_nothing_is_red_and_nothing_warns(self, budgeted):
        assert not [o for o in outputs(budgeted) if o.output_type == "error" or o.get("name") == "stderr"]
        assert not re.search(r"warning", printed(budgeted), re.IGNORECASE)

    def test_it_shows_one_card_two_cards_the_explorer_and_the_proposal(self, budgeted):
        titles = [o.metadata["image/png"]["alt"] for o in outputs(budgeted) if "image/png" in o.get("data", {})]
        one, two, explorer, proposal = (" ".join(title.split()) for title in titles)
        assert one.startswith("Does not fit: ")
        assert "of 14.6 GiB on the T4 x2" in two
        assert explorer.endswith(one)
        assert proposal.startswith("Fits")
        assert "of 15.9 GiB on the P100" in proposal

    def test_the_recorded_table_stands_beside_arithmetic(self, budgeted):
        """1,066,392,576 and 134,515,008 numbers of four bytes; 1,536 positions of 2 x 151,936 and 3 x 49,152 ids."""
        assert re.search(r"teacher weights +4\.5 +4\.3\n +student weights +0\.5 +0\.5\n", printed(budgeted))
        assert "1,536 positions x 151,936 and 49,152 ids: 2.8 GB" in printed(budgeted)

    def test_every_slider_changes_the_picture(self, budgeted):
        moved = [line.split() for line in printed(budgeted).splitlines() if line.startswith("moved ")]
        assert [name for _, name, *_ in moved] == ["batch", "length", "k", "chunk", "recompute", "weights", "card"]
        assert all(rest == ["True", "''"] for _, _, *rest in moved)

    def test_what_a_row_more_takes_is_as_planned(self, budgeted):
        (row,) = [line.split() for line in printed(budgeted).splitlines() if re.match(r" +64 ", line)]
        planned, measured = map(float, row[-2:])
        assert measured == pytest.approx(planned, rel=0.3)

    @pytest.mark.slow
    def test_the_default_takes_less_than_five_minutes(self, tmp_path):
        started = time.monotonic()
        execute(BUDGET, tmp_path, size="5 minutes")
        assert time.monotonic() - started < SECONDS_OF_THE_DEFAULT


CURRICULUM = ROOT / "notebooks" / "03_curriculum.py"


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The notebook on the curriculum at its smallest size."""
    folder = tmp_path_factory.mktemp("curriculum")
    notebook = execute(CURRICULUM, folder, size="smoke")
    notebook.metadata.folder = folder
    yield notebook
    shutil.rmtree(folder)


class TestCurriculumNotebook:
    def test_nothing_is_red_and_nothing_warns(self, taught):
        assert not [o for o in outputs(taught) if o.output_type == "error" or o.get("name") == "stderr"]
        assert not re.search(r"warning", printed(taught), re.IGNORECASE)

    def test_it_shows_the_schedule_the_terms_their_gradients_and_the_ablation(self, taught):
        titles = [o.metadata["image/png"]["alt"] for o in outputs(taught) if "image/png" in o.get("data", {})]
        schedule, terms, gradients, ablation = (title.replace("\n", " ") for title in titles)
        assert schedule.startswith("From the start kd, lm, span; after 10 % of the steps hidden, attention; after 40 %")
        assert terms.endswith("of the loss")
        assert "of the gradients' norms" in gradients
        assert "one seed each" in ablation

    def test_shares_of_loss_and_gradients_are_whole(self, taught):
        lines = [line.split() for line in printed(taught).splitlines()]
        shares = {words[0]: words[2:4] for words in lines if len(words) == 5 and words[2].endswith("%")}
        assert list(shares) == ["kd", "lm", "span", "hidden", "attention", "layerwise", "contrastive", "routing"]
        for place in (0, 1):
            assert sum(float(pair[place].rstrip("%")) for pair in shares.values()) == pytest.approx(100, abs=0.4)

    def test_the_ablation_takes_the_run_that_is_there(self, taught):
        log = next(taught.metadata.folder.rglob("arms/log.txt")).read_text()
        assert log.count("optimizer steps, warm-up") == 1  # of the arm without features
        assert "2/2 features, seed 10: cross-entropy" in printed(taught)

    @pytest.mark.slow
    def test_the_default_takes_less_than_five_minutes_and_a_second_execution_goes_on(self, tmp_path):
        started = time.monotonic()
        execute(CURRICULUM, tmp_path, size="5 minutes")
        assert time.monotonic() - started < SECONDS_OF_THE_DEFAULT
        again = execute(CURRICULUM, tmp_path, size="5 minutes")
        assert "optimizer steps" not in printed(again)

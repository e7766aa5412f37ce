"""Notebooks: thin, the same as their source, and they run from top to bottom without a front end."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
MOST_LINES_OF_A_CELL = 15
MOST_LINES_IN_FUNCTIONS = 0.03
TRAINING_LOOP_CALLS = {"backward", "zero_grad"}
SECONDS_OF_THE_DEFAULT = 300


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


def execute(path, folder, *, size, extra=()):
    """Run a copy in `folder` with nothing of this machine's home; returns the notebook with its outputs."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    notebook = read_notebook(path)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in extra]
    places = {name: str(home) for name in ("HOME", "IPYTHONDIR", "MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME")}
    environment = {**os.environ, **places, "KDKIT_SIZE": size, "HF_HUB_OFFLINE": "1"}
    environment.pop("KAGGLE_KERNEL_RUN_TYPE", None)
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


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The distillation notebook at its smallest size, and after it a reader who types a prompt."""
    folder = tmp_path_factory.mktemp("notebook")
    before = sorted((ROOT / "notebooks").rglob("*"))
    notebook = execute(DISTILL, folder, size="smoke", extra=[TYPE_A_PROMPT])
    assert sorted((ROOT / "notebooks").rglob("*")) == before
    yield notebook
    shutil.rmtree(folder)


class TestDistillNotebook:
    def test_nothing_is_red_and_nothing_warns(self, executed):
        assert not [o for o in outputs(executed) if o.output_type == "error" or o.get("name") == "stderr"]
        assert not re.search(r"warning", printed(executed), re.IGNORECASE)

    def test_the_install_cell_is_silent_where_kdkit_is_there(self, executed):
        (install,) = [cell for cell in executed.cells if cell.cell_type == "code" and '"pip"' in cell.source]
        assert install.outputs == []
        assert not re.search(r"torch|numpy|ipywidgets", install.source)
        assert "--no-deps" in install.source

    @pytest.mark.parametrize(
        ("attached", "places"),
        [
            ((), ["..", "rouge-score"]),
            (
                ("kdkit-0.1-py3-none-any.whl", "kdkit-0.2-py3-none-any.whl"),
                ["kdkit-0.2-py3-none-any.whl", "rouge-score"],
            ),
            (("rouge_score-0.1.2-py3-none-any.whl",), ["..", "rouge_score-0.1.2-py3-none-any.whl"]),
        ],
    )
    def test_what_lacks_comes_from_attached_wheels_first_and_without_what_it_needs(self, monkeypatch, attached, places):
        commands = []
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(Path, "rglob", lambda self, pattern: [Path(n) for n in attached if fnmatch(n, pattern)])
        monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
        exec(code_cells(DISTILL)[0], {})
        assert commands == [[sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *places]]

    def test_it_shows_curves_comparison_and_two_alignments_as_pictures(self, executed):
        pictures = [o for o in outputs(executed) if "image/png" in o.get("data", {})]
        assert len(pictures) == 4
        assert all(o.metadata["image/png"]["alt"] for o in pictures)

    def test_its_tables_name_before_after_and_teacher(self, executed):
        tables = [o.data["text/html"] for o in outputs(executed) if "text/html" in o.get("data", {})]
        complete = [t for t in tables if all(name in t for name in ("before", "after", "teacher"))]
        assert len(complete) == 3  # comparison, answers side by side, the reader's prompt

    def test_a_typed_prompt_is_answered(self, executed):
        (output,) = executed.cells[-1].outputs
        assert "Count the eggs." in output.text
        assert all(f">{name}<" in output.text for name in ("before", "after", "teacher"))

    @pytest.mark.slow
    def test_a_second_execution_goes_on_and_the_default_takes_less_than_five_minutes(self, tmp_path):
        started = time.monotonic()
        first = execute(DISTILL, tmp_path, size="10 minutes")
        assert time.monotonic() - started < SECONDS_OF_THE_DEFAULT
        again = execute(DISTILL, tmp_path, size="10 minutes")
        assert "optimizer steps" in printed(first)
        assert "optimizer steps" not in printed(again)
        assert not [o for o in outputs(again) if o.output_type == "error" or o.get("name") == "stderr"]


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

    def test_it_shows_the_comparison_and_both_rollouts_as_pictures(self, generated):
        titles = [o.metadata["image/png"]["alt"] for o in outputs(generated) if "image/png" in o.get("data", {})]
        assert len(titles) == 3
        assert sum("student's own text" in title for title in titles) == 2

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

"""Sliders in JupyterLab in a headless browser, moved by keyboard, with the ipywidgets installed and with Kaggle's."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from browser import find_chromium, jupyter_lab, open_browser
from tiny import make_pair

INSTALLED = importlib.metadata.version("ipywidgets")
KAGGLES = "8.1.5"
TRIO = (f"ipywidgets=={KAGGLES}", "jupyterlab_widgets==3.0.13", "widgetsnbextension==4.0.13")
CELLS = ("models", "threshold", "temperature", "memory", "alignment")
PRESSED = {
    "threshold": (("threshold φ", "ArrowLeft"), ("sweep", "Space")),
    "temperature": (("temperature T", "ArrowRight"), ("position", "ArrowRight"), ("loss", "Space")),
    "memory": (
        ("rows at a time", "ArrowRight"),
        ("tokens a row", "ArrowRight"),
        ("teacher's ids K", "ArrowRight"),
        ("chunk (tokens)", "ArrowLeft"),
        ("checkpointing", "Space"),
        ("teacher weights", "Space"),
        ("card", "Space"),
    ),
    "alignment": (("smoothing γ", "ArrowRight"), ("band (units)", "ArrowLeft")),
}
"""Every control of every explorer, and the key that moves it."""
VERSION = "import ipywidgets\nprint(ipywidgets.__version__)"
MANAGER = "@jupyter-widgets/jupyterlab-manager/static"
TRAIN = """
from kdkit.config import load_config
from kdkit.session.place import Session
from kdkit.runtime import preflight
from kdkit.widgets import LiveControls
config = load_config({{
    "preset": "demo", "teacher": {{"path": "{teacher}"}}, "student": {{"path": "{student}", "from_scratch": False}},
    "objective": {{"kd": {{"temperature": 2.0}}}}, "optim": {{"max_steps": 100000, "batch_size": 2}},
    "logging": {{"every_steps": 1}}, "evaluation": {{"every_steps": 0}},
}})
session = Session(preflight(), is_kaggle=False, is_batch=False, has_internet=False, hours=1)
live = LiveControls(config, "runs/live", session=session)
live.start()
"""
LOG = """
from kdkit.training.folder import RunFolder
rows = RunFolder(live.folder).metrics.rows()
changes = [row for row in rows if row["kind"] == "change"]
if changes:
    (change,) = changes
    steps = {row["step"]: row["kd_temperature"] for row in rows if row["kind"] == "train"}
    print(change["objective.kd.temperature"], steps[change["step"]], steps[change["step"] + 1], sep="\\n")
    print(len(list(live.folder.glob("stages/distill/checkpoint-*/complete.json"))))
"""
DIAGNOSE = """
from diagnoses import made_up_diagnosis
from kdkit.widgets import DiagnosisBox
DiagnosisBox(made_up_diagnosis())
"""
SCREENSHOTS = os.environ.get("KDKIT_SCREENSHOTS")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One for the file, not the session: while it is open no event loop can run in other tests, as nbclient needs."""
    with open_browser(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture(scope="module", params=[INSTALLED, pytest.param(KAGGLES, marks=pytest.mark.slow)])
def packages(request, tmp_path_factory):
    """Version of ipywidgets, and the folder that it lies in where it is not the one installed."""
    if request.param == INSTALLED:
        return INSTALLED, None
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), *TRIO], check=True)
    return request.param, folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def lab(packages, tmp_path_factory):
    with jupyter_lab(tmp_path_factory.mktemp("lab"), packages=packages[1]) as running:
        yield running


@pytest.fixture(scope="module")
def notebook(lab, browser, explorer_cells):
    """A notebook with every explorer, run in JupyterLab."""
    sources = [*(explorer_cells[name] for name in CELLS), VERSION]
    with lab.open_notebook(browser, sources) as shown:
        shown.run_all()
        yield shown


@pytest.fixture
def steered(lab, browser, pair):
    """A notebook in which a run trains in the background, longer than a test."""
    with lab.open_notebook(browser, [TRAIN.format(**pair), LOG]) as shown:
        shown.run_all()
        yield shown


def take_screenshot(notebook, packages, name):
    """Where someone asked for it: KDKIT_SCREENSHOTS=FOLDER."""
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        notebook.screenshot(Path(SCREENSHOTS) / f"{name}-{packages[0]}.png", CELLS.index(name.partition("-")[0]))


class TestVersions:
    def test_kernel_and_page_run_the_version_asked_for(self, notebook, packages):
        version, folder = packages
        assert notebook.text(len(CELLS)) == version
        (entry,) = {url.rpartition("/")[2] for url in notebook.requested if f"{MANAGER}/remoteEntry" in url}
        own = (folder or Path(sys.prefix)) / "share" / "jupyter" / "labextensions" / MANAGER
        assert (own / entry.partition("?")[0]).is_file()


@pytest.mark.parametrize("name", PRESSED)
class TestExplorers:
    def test_each_control_moved_by_keyboard_changes_the_picture(self, notebook, packages, name):
        number = CELLS.index(name)
        notebook.picture(number).wait_for()
        seen = [notebook.picture(number).get_attribute("alt")]
        take_screenshot(notebook, packages, f"{name}-start")
        for label, key in PRESSED[name]:
            seen.append(notebook.press(number, label, key))
        take_screenshot(notebook, packages, name)
        assert len(set(seen)) == len(seen)
        assert notebook.cell(number).locator("[role=alert]").count() == 0
        assert notebook.red() == []
        assert notebook.problems == []


class TestLiveControls:
    def test_a_slider_moved_by_keyboard_acts_from_the_next_step_and_stop_saves(self, steered, packages):
        status = steered.cell(0).locator(".widget-html", has_text="step ").first
        status.wait_for()
        steered.cell(0).locator("[role=slider]:not([disabled])").first.wait_for()
        steered.picture(0).wait_for()
        steered.control(0, "temperature").focus()
        steered.page.keyboard.press("ArrowRight")
        steered.page.wait_for_function(
            "() => /temperature .* from step \\d+ on/.test(document.querySelector('.jp-OutputArea-output img').alt)"
        )
        if SCREENSHOTS:
            steered.screenshot(Path(SCREENSHOTS) / f"live-{packages[0]}.png", 0)
        steered.cell(0).get_by_role("button", name="Pause").click()
        steered.cell(0).get_by_text("paused after step").wait_for()
        steered.cell(0).get_by_role("button", name="Go on").click()
        steered.cell(0).get_by_role("button", name="Stop and save").click()
        steered.cell(0).get_by_text("stopped by you, saved in").wait_for()
        steered.run(1)
        changed, before, after, saved = steered.text(1).split()
        assert (before, after) == ("2.0", changed)
        assert float(changed) == pytest.approx(2.0 * 2**0.05)
        assert saved == "2"  # at the pause and at the stop
        assert steered.red() == []
        assert steered.problems == []


class TestDiagnosisBox:
    def test_findings_are_unfolded_and_filtered_by_keyboard(self, lab, browser, packages):
        with lab.open_notebook(
            browser, [f"import sys\nsys.path.append({str(Path(__file__).parent)!r})", DIAGNOSE]
        ) as shown:
            shown.run_all()
            found, cause = shown.cell(1).locator("details.found"), shown.cell(1).get_by_text("cause of KD902")
            found.first.wait_for()
            assert not cause.is_visible()
            found.nth(1).locator("summary").focus()
            shown.page.keyboard.press("Enter")
            cause.wait_for()
            if SCREENSHOTS:
                shown.screenshot(Path(SCREENSHOTS) / f"diagnosis-{packages[0]}.png", 1)
            shown.cell(1).get_by_role("button", name="2 fail").focus()
            shown.page.keyboard.press("Space")
            cause.wait_for(state="detached")
            assert found.count() == 1
            assert shown.red() == []
            assert shown.problems == []

"""Sliders in JupyterLab in a headless browser, moved by keyboard, with the ipywidgets installed and with Kaggle's."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from browser import find_chromium, jupyter_lab, open_browser

INSTALLED = importlib.metadata.version("ipywidgets")
KAGGLES = "8.1.5"
TRIO = (f"ipywidgets=={KAGGLES}", "jupyterlab_widgets==3.0.13", "widgetsnbextension==4.0.13")
CELLS = ("models", "threshold", "temperature", "alignment")
PRESSED = {
    "threshold": (("threshold φ", "ArrowLeft"), ("sweep", "Space")),
    "temperature": (("temperature T", "ArrowRight"), ("position", "ArrowRight"), ("loss", "Space")),
    "alignment": (("smoothing γ", "ArrowRight"), ("band (units)", "ArrowLeft")),
}
"""Every control of every explorer, and the key that moves it."""
VERSION = "import ipywidgets\nprint(ipywidgets.__version__)"
MANAGER = "@jupyter-widgets/jupyterlab-manager/static"
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
def notebook(packages, browser, explorer_cells, tmp_path_factory):
    """A notebook with every explorer, run in JupyterLab."""
    sources = [*(explorer_cells[name] for name in CELLS), VERSION]
    folder = tmp_path_factory.mktemp("lab")
    with jupyter_lab(folder, packages=packages[1]) as lab, lab.open_notebook(browser, sources) as shown:
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

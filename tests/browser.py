"""A JupyterLab and a headless Chromium of a test's own: what a reader of a notebook sees, and does by keyboard."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError

import nbformat
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS_TO_START = 120
MILLISECONDS_TO_WAIT = 90_000
SETTINGS = {
    # Else cells outside the window are taken out of the page, and their outputs with them.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
RED = "[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']"


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_browser(folder: Path) -> Iterator[BrowserContext]:
    """A headless browser with an empty profile in `folder`."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(folder),
            executable_path=find_chromium(),
            headless=True,
            viewport={"width": 1100, "height": 1300},
            args=list(SWITCHES),
        )
        context.set_default_timeout(MILLISECONDS_TO_WAIT)
        yield context
        context.close()


@dataclass
class Lab:
    """A running JupyterLab."""

    url: str
    token: str
    root: Path

    @contextmanager
    def open_notebook(self, context: BrowserContext, sources: Sequence[str]) -> Iterator["NotebookPage"]:
        """A notebook of these code cells, not yet run; its page is closed and its kernel ended afterwards."""
        name = f"{secrets.token_hex(4)}.ipynb"
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), self.root / name)
        shown = NotebookPage(context.new_page(), len(cells))
        with shown.page.expect_websocket(
            lambda socket: "/channels" in socket.url
        ):  # idle is said before there is a kernel
            shown.page.goto(f"{self.url}/doc/tree/{name}?token={self.token}&reset")
        shown.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
        yield shown
        shown.page.close()


@dataclass
class NotebookPage:
    """A notebook in the browser; cells are counted from 0."""

    page: Page
    num_cells: int
    problems: list[str] = field(default_factory=list)
    """Uncaught errors of the page and what it wrote to the console as an error."""
    requested: list[str] = field(default_factory=list)
    """Addresses the page asked for."""

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", lambda request: self.requested.append(request.url))

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.problems.append(f"{message.text} ({message.location.get('url')})")

    def run_all(self) -> None:
        """Run every cell from the keyboard and wait until all are done."""
        self.cell(0).locator(".jp-InputPrompt").click()
        for _ in range(self.num_cells - 1):
            self.page.keyboard.press("Shift+Enter")
        self.page.keyboard.press("Control+Enter")  # of the last one; Shift+Enter would add another
        done = "([last]) => /^\\[\\d+\\]:?$/.test(last.textContent.trim())"
        prompt = self.cell(self.num_cells - 1).locator(".jp-InputPrompt").element_handle()
        self.page.wait_for_function(done, arg=[prompt])
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")

    def run(self, number: int) -> None:
        """Run one cell again and wait until it is done."""
        prompt = self.cell(number).locator(".jp-InputPrompt")
        before = prompt.inner_text()
        prompt.click()
        self.page.keyboard.press("Control+Enter")
        done = "([prompt, before]) => /^\\[\\d+\\]:?$/.test(prompt.innerText.trim()) && prompt.innerText !== before"
        self.page.wait_for_function(done, arg=[prompt.element_handle(), before])

    def cell(self, number: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(number)

    def text(self, number: int) -> str:
        """What a cell has put out, as text."""
        return self.cell(number).locator(".jp-OutputArea").inner_text().strip()

    def red(self) -> list[str]:
        """Error output of all cells."""
        return self.page.locator(RED).all_inner_texts()

    def picture(self, number: int) -> Locator:
        """The one picture in a cell's output."""
        return self.cell(number).locator(".jp-OutputArea-output img")

    def control(self, number: int, label: str) -> Locator:
        """A cell's control: a slider's handle, or the first of some buttons that is not pressed."""
        row = self.cell(number).locator(".widget-inline-hbox, .widget-toggle-buttons").filter(has_text=label)
        return row.locator("[role=slider], button:not(.mod-active)").first

    def press(self, number: int, label: str, key: str) -> str:
        """Focus a control, press a key, wait until the cell's picture is another; its new text is returned."""
        picture = self.picture(number)
        before = picture.get_attribute("src")
        self.control(number, label).focus()
        self.page.keyboard.press(key)
        self.page.wait_for_function(
            "([cell, before]) => { const all = cell.querySelectorAll('.jp-OutputArea-output img');"
            " return all.length === 1 && all[0].getAttribute('src') !== before; }",
            arg=[self.cell(number).element_handle(), before],
        )
        return picture.get_attribute("alt") or ""

    def screenshot(self, path: Path, number: int | None = None) -> None:
        """Of the page, or of one cell."""
        (self.page if number is None else self.cell(number)).screenshot(path=str(path))


@contextmanager
def jupyter_lab(folder: Path, *, packages: Path | None = None) -> Iterator[Lab]:
    """A JupyterLab whose files, settings and kernels' home lie in `folder`; `packages` go before the installed ones."""
    lab = Lab(f"http://127.0.0.1:{_free_port()}", secrets.token_hex(16), folder / "notebooks")
    lab.root.mkdir()
    log = (folder / "lab.log").open("wb")
    process = subprocess.Popen(_command(lab), env=_environment(folder, packages), stdout=log, stderr=log)
    try:
        _wait_until_up(lab, process, folder / "lab.log")
        yield lab
    finally:
        process.terminate()  # its kernels end with it
        process.wait(60)
        log.close()


def _command(lab: Lab) -> list[str]:
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": lab.url.rpartition(":")[2],
        "ServerApp.port_retries": "0",
        "ServerApp.root_dir": str(lab.root),
        "ServerApp.open_browser": "False",
        "ServerApp.allow_root": "True",
        "IdentityProvider.token": lab.token,
    }
    return [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]


def _environment(folder: Path, packages: Path | None) -> dict[str, str]:
    """Nothing of this machine's home; the checkout's kdkit."""
    homes = ("HOME", "IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    for name, settings in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    environment = {**os.environ, **{name: str(folder / name.lower()) for name in homes}, "HF_HUB_OFFLINE": "1"}
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(folder / "settings")
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    if packages is not None:
        paths.insert(0, str(packages))
        environment["JUPYTER_PATH"] = str(packages / "share" / "jupyter")
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment.pop("KAGGLE_KERNEL_RUN_TYPE", None)
    return environment


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def _wait_until_up(lab: Lab, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{lab.url}/api?token={lab.token}", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-3000:]}")

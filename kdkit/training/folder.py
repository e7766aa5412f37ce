"""The folder of a run: opened once, refused when it belongs to another run, and read back to resume."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import yaml
from pydantic import JsonValue

from kdkit.config import DistillConfig, dump_config, load_config
from kdkit.errors import UserError
from kdkit.runtime import environment
from kdkit.training.checkpoint import write_text
from kdkit.training.metrics import MetricsFile

CONFIG_FILE = "config.yaml"


class RowsUsed(TypedDict):
    """Which rows of one kind a run reads, by content."""

    sha256: str
    num_read: int
    num_kept: int
    dropped: dict[str, int]
    """Reason -> rows left out or cut."""


class RunFolder:
    """Where one run keeps everything.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = MetricsFile(path / "metrics.jsonl")

    @property
    def model(self) -> Path:
        """The finished student."""
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        """Figures of the finished run."""
        return self.path / "evaluation.json"

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        return self.path / "stages" / name

    def open(
        self, config: DistillConfig, *, rows: Mapping[str, RowsUsed], setup: Mapping[str, str | int], resume: bool
    ) -> None:
        """Make the folder for a new run, or check that it holds this very run.

        Args:
            config: the run that is about to start.
            rows: which rows it reads, for rows.json.
            setup: what of the machine changes the arithmetic (precision, processes), for environment.json.
            resume: continue what is there.
        Raises:
            UserError: the folder holds something and `resume` is off; or there is nothing to resume; or the run in it
                has other settings, read other rows or had another setup (each is named).
        """
        config_file, rows_file = self.path / CONFIG_FILE, self.path / "rows.json"
        if not resume:
            self._refuse_occupied()
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "environment.json", json.dumps(environment() | dict(setup), indent=1))
            write_text(rows_file, json.dumps(rows, indent=1))
            write_text(config_file, dump_config(config))  # last: with it the folder holds a run
            return
        if not config_file.is_file():
            raise UserError(f"{self.path} holds no run to resume; leave --resume out to start one")
        self.check_settings(config)
        begun_with = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        for name, value in setup.items():
            if begun_with.get(name) != value:
                raise UserError(
                    f"the run in {self.path} began with {name} {begun_with.get(name)}, and here it is {value}: "
                    "resume it on a setup like that, or give a new --output"
                )
        held = json.loads(rows_file.read_text(encoding="utf-8"))
        changed = [name for name in rows if held.get(name, {}).get("sha256") != rows[name]["sha256"]]
        if changed:
            raise UserError(
                f"the {' and '.join(changed)} rows are no longer those that the run in {self.path} began with: "
                "put them back, or give a new --output"
            )

    def check_settings(self, config: DistillConfig) -> None:
        """Refuse a config other than the one that the run in the folder has.

        Args:
            config: the run that is meant.
        Raises:
            UserError: names each field that differs.
        """
        changes = list(_differences(load_config(self.path / CONFIG_FILE), config))
        if changes:
            raise UserError(
                f"{self.path} holds a run with other settings:\n  " + "\n  ".join(changes) + "\n"
                "Resume it with its own config, or give a new --output"
            )

    def discard_unbegun(self) -> None:
        """Take back what `open` wrote, where nothing was trained yet: the same name can then be given again."""
        files = {file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()}
        if files <= {CONFIG_FILE, "environment.json", "rows.json"}:
            shutil.rmtree(self.path, ignore_errors=True)

    def _refuse_occupied(self) -> None:
        if self.path.is_file():
            raise UserError(f"--output {self.path} is a file; give a folder")
        whole = {"environment.json", "rows.json"}  # of a run that was killed before its config was there
        begun = whole | {f"{name}.partial" for name in (*whole, CONFIG_FILE)}
        if self.path.is_dir() and any(file.name not in begun for file in self.path.iterdir()):
            hint = "add --resume to continue the run in it, or " if (self.path / CONFIG_FILE).is_file() else ""
            raise UserError(f"--output {self.path} exists and is not empty: {hint}give another folder")


OF_THE_SESSION = {"teacher.device", "doctor.on_fail", "doctor.every_steps"}
"""Fields that another session may have to set otherwise; they do not change the run."""


def _differences(held: DistillConfig, given: DistillConfig) -> Iterator[str]:
    """Fields in which two configs differ."""
    before, after = _flat(yaml.safe_load(dump_config(held))), _flat(yaml.safe_load(dump_config(given)))
    for name in sorted((before.keys() | after.keys()) - OF_THE_SESSION):
        if before.get(name) != after.get(name):
            yield f"{name}: {before.get(name)} there, {after.get(name)} given"


def _flat(tree: Mapping[str, JsonValue], above: str = "") -> dict[str, JsonValue]:
    """A tree as one level of dotted names."""
    flat: dict[str, JsonValue] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[above + name] = value
    return flat

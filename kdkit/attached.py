"""What is attached to a notebook: models, rows and earlier outputs, wherever in the input folder they were mounted.

Kaggle mounts under /kaggle/input, at paths that have changed before and hold the owner's name: nothing is expected at
a fixed place. The variable KDKIT_INPUTS names another folder, for instance a mounted drive.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from kdkit.errors import UserError

INPUTS_VARIABLE = "KDKIT_INPUTS"
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")
_ABOUT_ROWS = ("dataset_info", "dataset-metadata")
"""Beginnings of the names of files that describe rows and hold none."""
_BETWEEN = {"models", "datasets", "transformers", "pytorch", "huggingface", "default", "snapshots"}
"""Folders that Kaggle or the hub's cache puts between the parts of a name."""


def inputs() -> Path:
    """The folder below which attached things are; it need not be there."""
    return Path(os.environ.get(INPUTS_VARIABLE, "/kaggle/input"))


def find_model(name: str) -> Path | None:
    """An attached model of a hub name.

    Args:
        name: such as "openai-community/gpt2-xl".
    Returns:
        The folder with its config.json, whose path spells the name, with or without the owner: a Kaggle model
        (".../qwen2.5/transformers/0.5b/1"), a folder of a dataset, or a copy of the hub's cache. None: not attached.
    Raises:
        UserError: several are.
    """
    folders = (file.parent for file in _files("config.json"))
    return _only_one((folder for folder in folders if _spells(folder, name)), name)


def find_rows(name: str) -> Path | None:
    """Attached rows of a hub name.

    Args:
        name: such as "databricks/databricks-dolly-15k".
    Returns:
        A file of rows, or a folder written by `datasets`, whose path spells the name. None: not attached.
    Raises:
        UserError: several are.
    """
    plain = name.partition(":")[0]
    saved = [file.parent for marker in _SAVED_BY_DATASETS for file in _files(marker) if _spells(file.parent, plain)]
    outermost = [folder for folder in saved if folder.parent not in saved]  # of a folder with splits
    if outermost:
        return _only_one(outermost, name)
    files = [file for file in _files("*") if file.suffix in ROW_SUFFIXES and not file.stem.startswith(_ABOUT_ROWS)]
    own_name = [file for file in files if _spells(file.with_suffix(""), plain)]
    return _only_one(own_name or (file for file in files if _spells(file.parent, plain)), name)


def find_output(path: Path) -> Path | None:
    """What an attached output of an earlier session has at a path.

    Args:
        path: relative, such as runs/demo/config.yaml; it may lie at any depth of an output.
    Returns:
        The file or folder there, or None.
    Raises:
        UserError: several outputs have it.
    """
    root = inputs()
    return _only_one(root.rglob(str(path)) if root.is_dir() else (), str(path))


def find_wheels(distribution: str) -> list[Path]:
    """Attached wheels of a distribution, in the order of their names."""
    plain = _letters(distribution)
    return [file for file in _files("*.whl") if _letters(file.name.partition("-")[0]) == plain]


def _files(pattern: str) -> list[Path]:
    root = inputs()
    return sorted(root.rglob(pattern)) if root.is_dir() else []


def _spells(path: Path, name: str) -> bool:
    """Whether the last parts of a path, put together, are a hub name with or without its owner."""
    parts = [part.removeprefix("models--").removeprefix("datasets--") for part in path.relative_to(inputs()).parts]
    parts = [part for part in parts if part.lower() not in _BETWEEN and not _is_version(part)]
    wanted = {_letters(name), _letters(name.rpartition("/")[2])}
    return any(_letters("".join(parts[start:])) in wanted for start in range(len(parts)))


def _is_version(part: str) -> bool:
    """A number of a version, or a commit in the hub's cache."""
    return re.fullmatch(r"v?\d+|[0-9a-f]{40}", part) is not None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _only_one(found: Iterable[Path], what: str) -> Path | None:
    """The thing that was found; two are a question for the person who attached them."""
    places = sorted(found)
    if len(places) > 1:
        said = ", ".join(map(str, places[:4]))
        raise UserError(f"{what} is attached {len(places)} times ({said}): detach all but one, or give its path")
    return places[0] if places else None

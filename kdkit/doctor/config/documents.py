"""What kind of config a file or a name is: kdkit's own, or another trainer's keys or flags."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import yaml

from kdkit.config import DistillConfig, list_presets, load_config
from kdkit.config.reading import parse_override
from kdkit.doctor.config.flags import FlagsDocument
from kdkit.doctor.config.foreign import Translation
from kdkit.doctor.config.foreign_document import ForeignDocument
from kdkit.doctor.config.json_text import is_json
from kdkit.doctor.config.keys import KeysDocument
from kdkit.doctor.config.own import OwnDocument
from kdkit.doctor.findings import Value
from kdkit.errors import UserError

_OWN_PARTS = frozenset(DistillConfig.model_fields) | {"preset"}


class Document(Protocol):
    """A config as it is written."""

    @property
    def source(self) -> str:
        """What the user called it."""
        ...

    @property
    def text(self) -> str:
        """The file."""
        ...

    @property
    def config(self) -> DistillConfig:
        """What it says, in kdkit's terms."""
        ...

    @property
    def translation(self) -> Translation | None:
        """How another trainer's terms were read; None: the terms are kdkit's."""
        ...

    def patched(self, patch: Mapping[str, Value]) -> "Document":
        """The same with other values; a field that the file has no word for stays away."""
        ...

    def in_its_words(self, patch: Mapping[str, Value]) -> Mapping[str, Value]:
        """What a patch changes, by the file's own names."""
        ...


def read_document(source: str, overrides: Iterable[str] = ()) -> Document:
    """Find out what kind of config there is.

    Args:
        source: a preset's name, a YAML or JSON file of kdkit or another trainer, or a shell script with its flags.
        overrides: `field.path=value`, for a config of kdkit.
    Returns:
        The document.
    Raises:
        UserError: there is no such file, it is not readable, or no setting in it is known.
    """
    overrides = list(overrides)
    path = Path(source)
    if source in list_presets() or not path.is_file():
        return _own(source, f"preset: {source}\n" if source in list_presets() else None, overrides)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is no text in UTF-8: {error}") from error
    document = _foreign(source, path, text)
    if document is None:
        return _own(source, text, overrides)
    if overrides:
        raise UserError(f"--set sets fields of kdkit, and {source} is another trainer's: change the file itself")
    if not (document.translation.stated or document.translation.refused):
        raise UserError(
            f"{source} has no setting that is known here: give a config of kdkit, HF, TRL, axolotl, LLaMA-Factory, "
            "torchtune, Megatron or DistiLLM"
        )
    return document


def _foreign(source: str, path: Path, text: str) -> ForeignDocument | None:
    if path.suffix == ".sh":
        return FlagsDocument(source, text)
    tree = _parsed(source, text)
    if not isinstance(tree, dict) or "preset" in tree:
        return None
    parts = {name for name, value in tree.items() if isinstance(value, dict)}
    own = parts & _OWN_PARTS
    if own and len(own) >= len(parts - own):  # a slip in a name does not make it another trainer's
        return None
    return KeysDocument(source, text)


def _parsed(source: str, text: str) -> object:
    try:
        return json.loads(text) if is_json(source) else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if is_json(source) else "YAML"
        raise UserError(f"{source} is not readable as {kind}: {error}") from error


def _own(source: str, text: str | None, overrides: list[str]) -> OwnDocument:
    load_config(source, overrides)  # says what is missing or wrong by the name that the user gave
    assert text is not None
    document = OwnDocument(source, text)
    for override in overrides:
        document = document.merged(parse_override(override))
    return document

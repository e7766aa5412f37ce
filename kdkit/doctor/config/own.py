"""Configs of kdkit itself, YAML or JSON, written back with changes."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import yaml

from kdkit.config import DistillConfig, load_config
from kdkit.config.reading import is_schedule
from kdkit.doctor.config.json_text import edited_json, indent_of, is_json
from kdkit.doctor.findings import Value
from kdkit.errors import UserError


@dataclass(frozen=True)
class OwnDocument:
    """YAML, or JSON, of kdkit; comments and order stay."""

    source: str
    text: str
    translation: None = None

    @cached_property
    def config(self) -> DistillConfig:
        """As a run would read it."""
        tree = yaml.safe_load(self.text)
        if not isinstance(tree, dict):
            raise UserError(f"{self.source} must hold a mapping of fields, found {type(tree).__name__}")
        return load_config(tree)

    def patched(self, patch: Mapping[str, Value]) -> "OwnDocument":
        """With other values, each at its dotted path."""
        document = self
        for field, value in patch.items():
            if field == "stages" and isinstance(value, Mapping):
                document = document._with_stages(value)
                continue
            tree: Any = value
            for name in reversed(field.split(".")):
                tree = {name: tree}
            document = document.merged(tree, whole=field)
        return document

    def _with_stages(self, stages: Mapping[str, Value]) -> "OwnDocument":
        """With stages that are new; the others stay as they are written, here or in a preset."""
        there = self.config.stages

        def edit(tree: Any) -> None:
            held = tree.get("stages") or type(tree)()
            tree["stages"] = held
            for place, (name, overrides) in enumerate(stages.items()):
                if name not in held:
                    _insert(held, place, name, {} if name in there else _quoted(overrides))

        return replace(self, text=_edited(self.source, self.text, edit))

    def in_its_words(self, patch: Mapping[str, Value]) -> Mapping[str, Value]:
        """The paths of kdkit's fields."""
        return patch

    def merged(self, above: Mapping[str, Any], *, whole: str = "") -> "OwnDocument":
        """With a tree laid over it; `whole` is a field whose value is replaced rather than merged."""
        path = whole.split(".")
        return replace(self, text=_edited(self.source, self.text, lambda tree: _lay_over(tree, above, path)))


def _lay_over(below: Any, above: Mapping[str, Any], whole: list[str]) -> None:
    """Mappings merge, anything else, and what the path `whole` names, replaces."""
    for key, value in above.items():
        is_whole = whole == [key]
        held = below.get(key)
        is_merged = isinstance(value, Mapping) and isinstance(held, Mapping) and not is_schedule(held, value)
        if is_merged and not is_whole:
            _lay_over(held, value, whole[1:] if whole[:1] == [key] else [])
        else:
            below[key] = _quoted(value)


def _insert(mapping: Any, place: int, name: str, value: Any) -> None:
    """At a place among the keys, of ruamel's mappings, which hold comments, or of plain ones."""
    from ruamel.yaml.comments import CommentedMap

    if isinstance(mapping, CommentedMap):
        mapping.insert(place, name, value)
        return
    items = list(mapping.items())
    mapping.clear()
    mapping.update([*items[:place], (name, value), *items[place:]])


def _quoted(value: Any) -> Any:
    """With quotes about texts such as off, which YAML 1.1 reads as something else."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if isinstance(value, Mapping):
        return {key: _quoted(item) for key, item in value.items()}
    is_plain = not isinstance(value, str) or yaml.safe_load(value) == value
    return value if is_plain else DoubleQuotedScalarString(value)


def _edited(source: str, text: str, edit: Callable[[Any], None]) -> str:
    """JSON or YAML, as the name ends, after a change of its tree; comments, order and indentation stay."""
    if is_json(source):
        return edited_json(text, edit)
    return _edited_yaml(source, text, edit, indent=indent_of(text) or 2)


def _edited_yaml(source: str, text: str, edit: Callable[[Any], None], *, indent: int) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    loader, stream = YAML(), io.StringIO()
    loader.preserve_quotes = True
    loader.width = 4096
    loader.map_indent = indent
    try:
        tree = loader.load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise UserError(f"{source} cannot be changed: {error.problem}, line {line}; mend that first") from error
    edit(tree)
    loader.dump(tree, stream)
    return stream.getvalue()

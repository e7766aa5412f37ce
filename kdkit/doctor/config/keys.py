"""JSON and YAML files of other trainers, written back with changes."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import yaml

from kdkit.doctor.config.foreign import foreign_patch, keys_of
from kdkit.doctor.config.foreign_document import ForeignDocument
from kdkit.doctor.config.json_text import edited_json, is_json
from kdkit.doctor.findings import Value

MOST_DEPTH = 4
"""Of mappings in one another that are read."""
_MEASURES = re.compile(r"(?:eval|valid|val_|val$|test|generation|inference|sampling)", re.IGNORECASE)


@dataclass(frozen=True)
class KeysDocument(ForeignDocument):
    """A JSON or YAML file of another trainer: keys at its top, or in mappings below."""

    def patched(self, patch: Mapping[str, Value]) -> "KeysDocument":
        """With other values under the file's own names."""
        keys, wanted = keys_of(self.values), dict(foreign_patch(patch))
        written = {name: key.write(wanted[key.field]) for name, key in keys.items() if key.field in wanted}
        if not is_json(self.source):
            return replace(self, text=_rewritten(self.text, written))

        def edit(tree: dict[str, Any]) -> None:
            for part in _sections(tree):
                part |= {name: value for name, value in written.items() if name in part}

        return replace(self, text=edited_json(self.text, edit))

    @property
    def _tree(self) -> dict[str, Any]:
        tree = json.loads(self.text) if is_json(self.source) else yaml.safe_load(self.text)
        return cast("dict[str, Any]", tree)

    @property
    def values(self) -> Mapping[str, Value]:
        """Of all sections; of two for one key the first."""
        values: dict[str, Value] = {}
        for section in _sections(self._tree):
            own = {str(name): value for name, value in section.items() if not isinstance(value, dict)}
            values = own | values
        return values


def _sections(tree: dict[str, Any], depth: int = MOST_DEPTH) -> Iterator[dict[str, Any]]:
    """Itself and the mappings below, but for those of evaluation, whose batches and lengths are not training's."""
    yield tree
    for name, value in tree.items() if depth else ():
        if isinstance(value, dict) and not _MEASURES.match(str(name)):
            yield from _sections(value, depth - 1)


def _rewritten(text: str, written: Mapping[str, Value]) -> str:
    """YAML with other values of these keys; every other character stays."""
    for name, node in sorted(_scalars(yaml.compose(text)), key=lambda one: one[1].start_mark.index, reverse=True):
        if name in written:
            value = yaml.safe_dump(written[name]).partition("\n")[0]
            text = text[: node.start_mark.index] + value + text[node.end_mark.index :]
    return text


def _scalars(node: yaml.Node | None, depth: int = MOST_DEPTH) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """The keys of `_sections`, and where their values are."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.ScalarNode):
            yield str(key.value), value
        elif depth and not _MEASURES.match(str(key.value)):
            yield from _scalars(value, depth - 1)

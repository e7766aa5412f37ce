"""Files that hold a config, read to be judged and written back with changes: kdkit's YAML, other trainers' files."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import yaml

from kdkit.config import DistillConfig, list_presets, load_config
from kdkit.config.reading import is_schedule, parse_override
from kdkit.doctor.config.foreign import Translation, foreign_patch, is_distillm, keys_of, translate
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


def _foreign(source: str, path: Path, text: str) -> "KeysDocument | FlagsDocument | None":
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


def _is_json(source: str) -> bool:
    return Path(source).suffix == ".json"


def _parsed(source: str, text: str) -> object:
    try:
        return json.loads(text) if _is_json(source) else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if _is_json(source) else "YAML"
        raise UserError(f"{source} is not readable as {kind}: {error}") from error


def _own(source: str, text: str | None, overrides: list[str]) -> "OwnDocument":
    load_config(source, overrides)  # says what is missing or wrong by the name that the user gave
    assert text is not None
    document = OwnDocument(source, text)
    for override in overrides:
        document = document.merged(parse_override(override))
    return document


# --- kdkit -----------------------------------------------------------------------------------------------------------


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
    indent = re.search(r"^( +)[^\s#-]", text, re.MULTILINE)
    if _is_json(source):
        tree = json.loads(text)
        edit(tree)
        written = json.dumps(tree, indent=len(indent[1]) if indent else None, ensure_ascii=False)
        return written + "\n" * text.endswith("\n")
    return _edited_yaml(source, text, edit, indent=len(indent[1]) if indent else 2)


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


# --- others ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeysDocument:
    """A JSON or YAML file of another trainer: keys at its top, or in mappings below."""

    source: str
    text: str

    @cached_property
    def translation(self) -> Translation:
        """In kdkit's terms."""
        return translate(self._values)

    @property
    def config(self) -> DistillConfig:
        """What it says."""
        return self.translation.config

    def patched(self, patch: Mapping[str, Value]) -> "KeysDocument":
        """With other values under the file's own names."""
        keys, wanted = keys_of(self._values), dict(foreign_patch(patch))
        written = {name: key.write(wanted[key.field]) for name, key in keys.items() if key.field in wanted}
        if not _is_json(self.source):
            return replace(self, text=_rewritten(self.text, written))
        tree = self._tree
        for part in _sections(tree):
            part |= {name: value for name, value in written.items() if name in part}
        indent = re.search(r"\n( +)", self.text)
        text = json.dumps(tree, indent=len(indent[1]) if indent else None, ensure_ascii=False)
        return replace(self, text=text + "\n" * self.text.endswith("\n"))

    def in_its_words(self, patch: Mapping[str, Value]) -> Mapping[str, Value]:
        """Keys."""
        return _changed(self._values, self.patched(patch)._values)

    @property
    def _tree(self) -> dict[str, Any]:
        tree = json.loads(self.text) if _is_json(self.source) else yaml.safe_load(self.text)
        return cast("dict[str, Any]", tree)

    @property
    def _values(self) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for section in _sections(self._tree):
            own = {str(name): value for name, value in section.items() if not isinstance(value, dict)}
            values = own | values
        return values


MOST_DEPTH = 4
"""Of mappings in one another that are read."""
_MEASURES = re.compile(r"(?:eval|valid|val_|val$|test|generation|inference|sampling)", re.IGNORECASE)


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


def _changed(before: Mapping[str, Value], after: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in after.items() if value != before.get(name)}


MOST_VARIABLES = 8
"""One of which names the next."""
_FLAG = re.compile(
    r"--([a-z][a-z0-9_-]*)(?:[ \t=]+(?:\"([^\"\n]+)\"|'([^'\n]+)'|([^\s\"'\\|&;<>()-][^\s\"'\\;]*|-\d[\d.]*)))?"
)
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_DEFAULT = re.compile(r"\$\{\w+:?-([^{}\"']+)\}")
_REST = re.compile(r"\$(?:@|\*|\{[@*].*)")
_ASSIGNED = re.compile(r"^\s*(?:export\s+)?(\w+)=[\"']?([^\s\"'#;]+)", re.MULTILINE)


@dataclass(frozen=True)
class FlagsDocument:
    """A shell script that gives flags, such as DistiLLM's: `OPTS+=" --warmup-iters 500"`."""

    source: str
    text: str

    @cached_property
    def translation(self) -> Translation:
        """In kdkit's terms."""
        return translate(self._values)

    @property
    def config(self) -> DistillConfig:
        """What it says."""
        return self.translation.config

    def patched(self, patch: Mapping[str, Value]) -> "FlagsDocument":
        """With other values, where the flag or its variable has them."""
        values = self._values
        keys = keys_of(values)
        edits: dict[tuple[int, int], str] = {}
        for field, value in foreign_patch(patch):
            for name, place in self._places.items():
                if name in keys and keys[name].field == field and value is not None:
                    edits |= _edit(self.text, place, keys[name].write(value))
            if field == "rollout.mode" and value == "off" and is_distillm(values) and "type" in self._places:
                parts = str(values["type"]).split("-")
                edits[self._places["type"]] = "-".join(part for part in parts if part not in ("adaptive", "mixed"))
        text = self.text
        for (start, end), written in sorted(edits.items(), reverse=True):
            text = text[:start] + written + text[end:]
        return replace(self, text=text)

    def in_its_words(self, patch: Mapping[str, Value]) -> Mapping[str, Value]:
        """Flags."""
        return _changed(self._values, self.patched(patch)._values)

    @property
    def _values(self) -> dict[str, Value]:
        return {name: _value(self.text[start:end]) for name, (start, end) in self._places.items()}

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Flag, dashes as underscores -> where its value is; an empty place for a switch. The last one counts."""
        code = re.sub(r"(?m)(^|\s)#.*$", lambda comment: " " * len(comment[0]), self.text)
        variables = {found[1]: found.span(2) for found in _ASSIGNED.finditer(code)}
        places = {}
        for found in _FLAG.finditer(code):
            group = next((group for group in (2, 3, 4) if found[group] is not None), None)
            is_switch = group is None or _REST.fullmatch(found[group])
            place = (found.end(1),) * 2 if is_switch else _resolved(code, found.span(group or 0), variables)
            places[found[1].replace("-", "_")] = place
        return places


def _edit(text: str, place: tuple[int, int], value: Value) -> dict[tuple[int, int], str]:
    """A value in its place; a switch that is to be off goes away."""
    start, end = place
    if start < end:
        return {place: str(value)}
    flag = text.rindex("--", 0, start) if value is False else start
    return {(flag, end): "" if value is False else f" {value}"}


def _resolved(code: str, place: tuple[int, int], variables: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Where the value of `$LR` or `${LR:-5e-5}` is written."""
    for _ in range(MOST_VARIABLES):
        text = code[slice(*place)]
        default, variable = _DEFAULT.fullmatch(text), _VARIABLE.fullmatch(text)
        if default is not None:
            place = place[0] + default.start(1), place[0] + default.end(1)
        elif variable is not None and variable[1] in variables:
            place = variables[variable[1]]
        else:
            break
    return place


def _value(text: str) -> Value:
    """As YAML reads it; a switch is true."""
    if not text:
        return True
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return cast("Value", value)

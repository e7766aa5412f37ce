"""Shell scripts that give another trainer its flags, written back with changes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import yaml

from kdkit.doctor.config.foreign import foreign_patch, is_distillm, keys_of
from kdkit.doctor.config.foreign_document import ForeignDocument
from kdkit.doctor.findings import Value

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
class FlagsDocument(ForeignDocument):
    """A shell script that gives flags, such as DistiLLM's: `OPTS+=" --warmup-iters 500"`."""

    def patched(self, patch: Mapping[str, Value]) -> "FlagsDocument":
        """With other values, where the flag or its variable has them."""
        values = self.values
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

    @property
    def values(self) -> Mapping[str, Value]:
        """Of the flags, dashes as underscores."""
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

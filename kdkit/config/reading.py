"""From presets, YAML files and `--set` to one validated config, or one message that says what is wrong."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import yaml
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from kdkit.config.fields import DistillConfig
from kdkit.errors import UserError

STAGE_PARTS = frozenset({"data", "objective", "rollout", "optim", "evaluation", "checkpoint", "logging", "doctor"})
Tree = dict[str, JsonValue]


def demo_folder() -> Path:
    """The folder of the embedded rows and teacher: `data/demo` of a checkout, else the wheel's copy."""
    package = Path(str(files("kdkit")))
    checkout = package.parent / "data" / "demo"
    return checkout if checkout.is_dir() else package / "demo_data"


def list_presets() -> list[str]:
    """Names of the presets that come with kdkit, sorted."""
    return sorted(path.stem for path in _preset_folder().glob("*.yaml"))


def list_launch_configs() -> list[str]:
    """Names of the files for `accelerate launch` that come with kdkit, sorted."""
    return sorted(path.stem for path in _launch_folder().glob("*.yaml"))


def read_launch_config(name: str) -> str:
    """One of those files, as text.

    Raises:
        UserError: there is none of that name.
    """
    known = list_launch_configs()
    if name not in known:
        raise UserError(f"no launch config is called {name!r}{_nearest(name, known)}. There are: {', '.join(known)}")
    return (_launch_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def load_config(source: str | Path | Mapping[str, JsonValue], overrides: Iterable[str] = ()) -> DistillConfig:
    """One validated run from a YAML file, a preset's name or a mapping.

    A `preset:` key (one name or a list) is read first and lies below the rest; `overrides` lie on top.
    `${demo}` in any text stands for the folder of the embedded rows and teacher.

    Args:
        source: path of a YAML file, name of a preset, or the mapping itself.
        overrides: `field.path=value` as given to `--set`; the value is read as YAML.
    Returns:
        The config; every stage of it has been validated too.
    Raises:
        UserError: the file is missing or no YAML, a preset or field is unknown, or a value is out of
            range; says which, what is allowed, and the nearest known name.
    """
    tree = _read_source(source)
    for override in overrides:
        _merge_into(tree, parse_override(override))
    tree = _with_presets(tree)
    config = _validate(_fill_in(tree), where="")
    for name in config.stages:
        stage_config(config, name)
    return config


def stage_config(config: DistillConfig, name: str) -> DistillConfig:
    """The config of one stage: the base with the stage's overrides.

    Args:
        config: the run.
        name: one of `config.stages`.
    Returns:
        A config whose only stage is `name`, with nothing left to override.
    Raises:
        UserError: the stage overrides a part that belongs to the whole run, or a value is wrong.
    """
    overrides = config.stages[name]
    for part in overrides:
        if part not in STAGE_PARTS:
            raise UserError(
                f"stages.{name}.{part}: a stage may set {', '.join(sorted(STAGE_PARTS))}; "
                f"{part} belongs to the whole run{_nearest(part, STAGE_PARTS)}"
            )
    tree = config.model_dump(mode="json")
    _merge_into(tree, overrides)
    tree["stages"] = {name: {}}
    return _validate(tree, where=f"stages.{name}.")


def dump_config(config: DistillConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_source(source: str | Path | Mapping[str, JsonValue]) -> Tree:
    """The tree of a mapping (copied), a file, or a preset."""
    if isinstance(source, Mapping):
        return deepcopy(dict(source))
    if str(source) in list_presets():
        return {"preset": str(source)}
    path = Path(source)
    if not path.is_file():
        known = list_presets()
        raise UserError(
            f"no config file and no preset is called {str(source)!r}{_nearest(str(source), known)}. "
            f"Presets: {', '.join(known)}"
        )
    return _read_yaml(path)


def _read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of fields, found {type(tree).__name__}")
    return tree


def _preset_folder() -> Path:
    return Path(str(files("kdkit"))) / "presets"


def _launch_folder() -> Path:
    return _preset_folder() / "accelerate"


def _with_presets(tree: Tree) -> Tree:
    """The tree laid over the presets it names, and those over theirs."""
    names = tree.pop("preset", None) or []
    merged: Tree = {}
    for name in names if isinstance(names, list) else [names]:
        if name not in list_presets():
            known = list_presets()
            raise UserError(f"preset {name!r} is not known{_nearest(str(name), known)}. Presets: {', '.join(known)}")
        _merge_into(merged, _with_presets(_read_yaml(_preset_folder() / f"{name}.yaml")))
    _merge_into(merged, tree)
    return merged


def _merge_into(below: Tree, above: Mapping[str, JsonValue]) -> None:
    """Lay one tree over another: mappings merge, anything else replaces."""
    for key, value in above.items():
        held = below.get(key)
        if key == "stages" and isinstance(held, dict) and isinstance(value, dict):
            below[key] = held = {name: held.get(name, {}) for name in _stage_order(list(held), list(value))}
        if isinstance(held, dict) and isinstance(value, dict) and not is_schedule(held, value):
            _merge_into(held, value)
        else:
            below[key] = value


def _stage_order(below: list[str], above: list[str]) -> list[str]:
    """Of all stages: as below, each that is new above ahead of the one it stands ahead of there, else at the end."""
    order = list(below)
    for name, after in reversed(list(zip(above, [*above[1:], None], strict=True))):
        if name not in order:
            order.insert(order.index(after) if after is not None else len(order), name)
    return order


def is_schedule(held: Mapping[str, JsonValue], value: Mapping[str, JsonValue]) -> bool:
    """A schedule is one value: a new one replaces the old as a whole."""
    return "start" in value and "end" in value and "start" in held


def parse_override(text: str) -> Tree:
    """`a.b=value` as a tree."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UserError(f"--set expects field.path=value, got {text!r}")
    try:
        leaf: JsonValue = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not readable as YAML: {error}") from error
    for key in reversed(path.strip().split(".")):
        leaf = {key: leaf}
    assert isinstance(leaf, dict)
    return leaf


def _fill_in(value: JsonValue) -> JsonValue:
    """Replace `${demo}` in every text of a tree."""
    if isinstance(value, str):
        return value.replace("${demo}", str(demo_folder()))
    if isinstance(value, dict):
        return {key: _fill_in(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_in(item) for item in value]
    return value


def _validate(tree: JsonValue, *, where: str) -> DistillConfig:
    """The config of a tree, or every fault of it in one message."""
    try:
        return DistillConfig.model_validate(tree)
    except ValidationError as error:
        lines = [where + _explain(details) for details in error.errors()]
        raise UserError("the config is not usable:\n  " + "\n  ".join(lines)) from error


def _explain(details: ErrorDetails) -> str:
    """One fault: the field, what was given, what is allowed."""
    location = [str(part) for part in details["loc"]]
    path, given = ".".join(location), details["input"]
    if details["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        return f"{path}: no such field{_nearest(location[-1], known)}; known here: {', '.join(known)}"
    if details["type"] == "missing":
        return f"{path}: required, not given"
    reason = details["msg"].removeprefix("Value error, ")
    said = f"{reason[0].lower()}{reason[1:]}"
    if isinstance(given, dict):  # of a part as a whole: the message names the fields
        return f"{path}: {said}" if path else said
    return f"{path}: {said} (given: {given!r})"


def _fields_at(location: Sequence[str]) -> list[str]:
    """Names of the fields of the part at a path."""
    part: type[BaseModel] = DistillConfig
    for name in location:
        field = part.model_fields.get(name)
        inner = part_in(field.annotation) if field else None
        if inner is None:
            break
        part = inner
    return list(part.model_fields)


def part_in(annotation: object) -> type[BaseModel] | None:
    """The config part inside an annotation such as `Part | None`."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""

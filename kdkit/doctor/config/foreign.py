"""Another trainer's settings as a config of kdkit, and a patch of that in the fields its keys stand for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from kdkit.config import DistillConfig
from kdkit.config.part import Part
from kdkit.config.reading import part_in
from kdkit.doctor.config.names import DISTILLM_KEYS, USUAL_KEYS, Key, Unstated
from kdkit.doctor.findings import Value

NOT_GIVEN = "(not given)"
_REQUIRED = {"teacher": {"path": NOT_GIVEN}, "student": {"path": NOT_GIVEN}}
_REQUIRED_ROWS = {"train": NOT_GIVEN, "validation": NOT_GIVEN}
_HF_MARKS = ("per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type")
_HF_SEED = 42
_GKD_MARKS = ("lmbda", "seq_kd")
_STRATEGIES = {"eval_steps": ("eval_strategy", "evaluation_strategy"), "save_steps": ("save_strategy",)}
"""An interval -> what must be `steps` for it to count."""

DISTILLM_MARKS = ("warmup_iters", "loss_eps", "init_threshold", "skew_alpha", "student_gen")
_DISTILLM_DEFAULTS: dict[str, Value] = {
    "optim.warmup_steps": 0,
    "optim.accumulation": 1,
    "optim.batch_size": 32,
    "rollout.guard": None,
    "rollout.collapse": None,
    "seed": 1234,
}
"""What its arguments.py sets where nothing is given, and what it does not have."""
_DISTILLM_LOSSES = {
    "fkl": "forward_kl",
    "kd": "forward_kl",
    "rkl": "reverse_kl",
    "jsd": "jsd",
    "tvd": "tvd",
    "sfkl": "skew_forward_kl",
    "srkl": "skew_reverse_kl",
}
_OWN_TEXT_TYPES = ("adaptive", "mixed")


@dataclass(frozen=True)
class Translation:
    """Another trainer's settings in kdkit's terms."""

    config: DistillConfig
    stated: Mapping[str, Value]
    """Field -> value, of what the file speaks of."""
    refused: tuple[str, ...]
    """Values that no trainer can mean, in words."""

    @property
    def as_read(self) -> str:
        """Each field as it was understood."""
        return "in kdkit's terms: " + ", ".join(f"{field}={value}" for field, value in self.stated.items())


def is_distillm(given: Mapping[str, Value]) -> bool:
    """Whether these are DistiLLM's arguments, rather than another trainer's."""
    names_loss = any(part in _DISTILLM_LOSSES for part in _type(given))
    has_mark = names_loss or any(mark in given for mark in DISTILLM_MARKS)
    return has_mark and not any(name.startswith("alpha_") for name in given)


def _type(given: Mapping[str, Value]) -> list[str]:
    """The parts of `--type adaptive-srkl-dtw`."""
    return str(given.get("type", "")).split("-")


def keys_of(given: Mapping[str, Value]) -> Mapping[str, Key]:
    """The names by which a file speaks."""
    return DISTILLM_KEYS if is_distillm(given) else USUAL_KEYS


def translate(given: Mapping[str, Value]) -> Translation:
    """A trainer's settings, by its own names, as a config of kdkit; what it is silent about has kdkit's defaults."""
    keys = keys_of(given)
    stated: dict[str, Value] = {}
    if is_distillm(given):
        stated |= _DISTILLM_DEFAULTS | _distillm_type(given)
    else:
        given = _as_hf_reads(given)
    for name, value in given.items():
        key = keys.get(name)
        if key is None:
            continue
        try:
            stated[key.field] = key.read(value)
        except Unstated:
            continue
    refused: dict[str, str | None] = {}
    tree = _tree(stated)
    config = _build(DistillConfig, tree, "", refused)
    assert isinstance(config, DistillConfig)
    kept = {field: value for field, value in stated.items() if field not in refused}
    if "objective.kd.temperature.start" in kept:
        kept["objective.kd.temperature"] = kept["objective.kd.temperature.start"]
    said = tuple(problem for problem in refused.values() if problem is not None)
    return Translation(config, kept, said)


def _as_hf_reads(given: Mapping[str, Value]) -> dict[str, Value]:
    """Without what the HF Trainer and TRL overrule, and with the seed that they take."""
    read = dict(given)
    for interval, strategies in _STRATEGIES.items():
        if any(given.get(name, "steps") != "steps" for name in strategies):
            read.pop(interval, None)
    warmup = given.get("warmup_steps")
    if isinstance(warmup, float) and 0 < warmup < 1:
        read["warmup_ratio"] = read.pop("warmup_steps")
    elif warmup == 0 and given.get("warmup_ratio"):
        del read["warmup_steps"]
    if given.get("max_steps") not in (None, -1):
        read.pop("num_train_epochs", None)
    if any(mark in given for mark in _GKD_MARKS):
        read.pop("temperature", None)  # of sampling
    return ({"seed": _HF_SEED} if any(mark in given for mark in _HF_MARKS) else {}) | read


def _distillm_type(given: Mapping[str, Value]) -> dict[str, Value]:
    """What `--type` and `--student-gen` say."""
    parts = _type(given)
    stated: dict[str, Value] = {"rollout.mode": "off"}
    loss = next((_DISTILLM_LOSSES[part] for part in parts if part in _DISTILLM_LOSSES), None)
    if loss is not None:
        stated["objective.kd.loss"] = loss
    mode = next((part for part in parts if part in _OWN_TEXT_TYPES), None)
    if mode is not None and given.get("student_gen"):
        stated["rollout.mode"] = mode
    return stated


def _tree(stated: Mapping[str, Value]) -> dict[str, Any]:
    """Dotted fields as nested mappings, with what a config cannot be without."""
    tree: dict[str, Any] = {name: dict(part) for name, part in _REQUIRED.items()} | {"data": dict(_REQUIRED_ROWS)}
    for field, value in stated.items():
        *path, last = field.split(".")
        below = tree
        for name in path:
            below = below.setdefault(name, {})
        below[last] = value
    return tree


def _build(part: type[BaseModel], tree: Mapping[str, Any], where: str, refused: dict[str, str | None]) -> BaseModel:
    """A part of its values one by one: fields that contradict each other are what the checks are for.

    `refused` takes the field of each value that does not fit, and why; None where it is only a word of another trainer.
    """
    given: dict[str, Any] = {}
    for name, value in tree.items():
        field = part.model_fields.get(name)
        if field is None:
            continue
        inner = part_in(field.annotation)
        if inner is not None and issubclass(inner, Part) and isinstance(value, Mapping):
            given[name] = _build(inner, value, f"{where}{name}.", refused)
            continue
        value = _temperature(value) if name == "temperature" else value
        kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        try:
            given[name] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]
            is_unknown = reason["type"] == "literal_error" or "$" in str(value)  # a variable of the shell
            refused[f"{where}{name}"] = None if is_unknown else f"{where}{name}={value!r}: {reason['msg']}"
    return part.model_construct(**given)


def _temperature(value: Value) -> Value:
    if not isinstance(value, Mapping):
        return value
    start, end = value.get("start", value.get("end")), value.get("end", value.get("start"))
    return {"start": start, "end": end} if start != end else start


def foreign_patch(patch: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    """A patch by the fields that keys stand for: a schedule is its two ends."""
    for field, value in patch.items():
        if field == "objective.kd.temperature":
            ends = value if isinstance(value, Mapping) else {"start": value, "end": value}
            yield from ((f"{field}.{end}", ends[end]) for end in ("start", "end"))
        else:
            yield field, value

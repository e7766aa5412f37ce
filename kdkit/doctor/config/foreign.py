"""What other trainers call the fields of kdkit: keys of a JSON or YAML file, flags of a command line."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from kdkit.config import DistillConfig
from kdkit.config.part import Part
from kdkit.config.reading import part_in
from kdkit.doctor.findings import Value

NOT_GIVEN = "(not given)"
_REQUIRED = {"teacher": {"path": NOT_GIVEN}, "student": {"path": NOT_GIVEN}}
_REQUIRED_ROWS = {"train": NOT_GIVEN, "validation": NOT_GIVEN}


class Unstated(Exception):
    """A value by which a trainer leaves the field to itself."""


def _as_given(value: Value) -> Value:
    """A null leaves it to the trainer."""
    if value is None:
        raise Unstated
    return value


@dataclass(frozen=True)
class Key:
    """A key of another trainer."""

    field: str
    """What kdkit calls it; a field that kdkit lacks is for checks alone."""
    read: Callable[[Value], Value] = _as_given
    """Its value as kdkit has it.

    Raises:
        Unstated: it says nothing.
    """
    write: Callable[[Value], Value] = lambda value: value
    """The other way."""


def _never(value: Value) -> Value:
    """-1 switches an interval off; below 1 it is a share of the steps."""
    if isinstance(value, float) and 0 < value < 1:
        raise Unstated
    return 0 if value == -1 else _as_given(value)


def _unless_zero(value: Value) -> Value:
    """0 clips nothing, which kdkit has no word for."""
    if value is None or value == 0:
        raise Unstated
    return value


def _by_itself(value: Value) -> Value:
    """-1 and null leave it to the trainer: once an epoch, all rows, as long as the epochs last."""
    if value is None or value == -1:
        raise Unstated
    return value


def _when_true(meaning: Value) -> Callable[[Value], Value]:
    def read(value: Value) -> Value:
        if value is not True:
            raise Unstated
        return meaning

    return read


def _dtype(value: Value) -> Value:
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "no": "float32"}
    said = str(value).removeprefix("torch.")
    return names.get(said, said)


def _quantization(value: Value) -> Value:
    if value is not True:
        raise Unstated
    return "nf4"


def _mixed_precision(value: Value) -> Value:
    return {"bfloat16": "bf16", "float32": "no"}.get(str(value), "fp16")


_PATIENCE = "evaluation.early_stopping.patience"
LAUNCHED = {
    "n_gpu": Key("processes"),
    "num_processes": Key("processes"),
    "nproc_per_node": Key("processes"),
    "nnodes": Key("nodes"),
}
"""Of launchers: each process, on each node, takes a batch of its own."""
USUAL_KEYS = {
    "learning_rate": Key("optim.learning_rate"),
    "lr": Key("optim.learning_rate"),
    "scheduler_type": Key("optim.scheduler"),
    "lr_scheduler_type": Key("optim.scheduler"),
    "lr_scheduler": Key("optim.scheduler"),
    "lr_decay_style": Key("optim.scheduler"),
    "warmup_steps": Key("optim.warmup_steps"),
    "num_warmup_steps": Key("optim.warmup_steps"),
    "lr_warmup_iters": Key("optim.warmup_steps"),
    "warmup_ratio": Key("optim.warmup_fraction"),
    "weight_decay": Key("optim.weight_decay"),
    "max_grad_norm": Key("optim.max_grad_norm", _unless_zero),
    "clip_grad_norm": Key("optim.max_grad_norm", _unless_zero),
    "gradient_clip_val": Key("optim.max_grad_norm", _unless_zero),
    "batch_size": Key("optim.batch_size"),
    "per_device_train_batch_size": Key("optim.batch_size"),
    "micro_batch_size": Key("optim.batch_size"),
    "gradient_accumulation_steps": Key("optim.accumulation"),
    "accumulate_grad_batches": Key("optim.accumulation"),
    "num_epochs": Key("optim.epochs"),
    "num_train_epochs": Key("optim.epochs"),
    "epochs": Key("optim.epochs"),
    "max_epochs": Key("optim.epochs"),
    "train_iters": Key("optim.max_steps", _by_itself),
    "max_steps": Key("optim.max_steps", _by_itself),
    "num_training_steps": Key("optim.max_steps", _by_itself),
    "total_steps": Key("optim.max_steps", _by_itself),
    "fp16": Key("optim.precision", _when_true("float16"), lambda value: value == "float16"),
    "bf16": Key("optim.precision", _when_true("bfloat16"), lambda value: value == "bfloat16"),
    "mixed_precision": Key("optim.precision", _dtype, _mixed_precision),
    "student_dtype": Key("student.dtype", _dtype),
    "teacher_dtype": Key("teacher.dtype", _dtype),
    "load_in_4bit": Key("teacher.quantization", _quantization),
    "gradient_checkpointing": Key("student.gradient_checkpointing"),
    "teacher_model": Key("teacher.path"),
    "teacher_model_name": Key("teacher.path"),
    "teacher_model_name_or_path": Key("teacher.path"),
    "teacher_path": Key("teacher.path"),
    "student_model": Key("student.path"),
    "student_model_name": Key("student.path"),
    "student_path": Key("student.path"),
    "model_name_or_path": Key("student.path"),
    "base_model": Key("student.path"),
    "temperature": Key("objective.kd.temperature.start"),
    "kd_temperature": Key("objective.kd.temperature.start"),
    "min_temperature": Key("objective.kd.temperature.end"),
    "final_temperature": Key("objective.kd.temperature.end"),
    "kd_loss_type": Key("objective.kd.loss"),
    "kd_top_k": Key("objective.kd.top_k"),
    "kd_alpha": Key("objective.kd.weight"),
    "kd_ce_alpha": Key("objective.lm.weight"),
    "alpha_kd": Key("objective.kd.weight"),
    "alpha_lm": Key("objective.lm.weight"),
    "alpha_ce": Key("objective.lm.weight"),
    "alpha_feature": Key("objective.hidden.weight"),
    "alpha_attention": Key("objective.attention.weight"),
    "alpha_layerwise": Key("objective.layerwise.weight"),
    "alpha_contrastive": Key("objective.contrastive.weight"),
    "alpha_dtw": Key("objective.dtw.weight"),
    "attention_layers": Key("objective.attention.num_layers"),
    "max_length": Key("data.max_length"),
    "max_seq_length": Key("data.max_length"),
    "max_seq_len": Key("data.max_length"),
    "seq_length": Key("data.max_length"),
    "sequence_len": Key("data.max_length"),
    "cutoff_len": Key("data.max_length"),
    "max_prompt_length": Key("data.max_prompt_length"),
    "train_file": Key("data.train"),
    "train_data": Key("data.train"),
    "eval_file": Key("data.validation"),
    "eval_data": Key("data.validation"),
    "max_train_samples": Key("data.train_rows", _by_itself),
    "num_train_samples": Key("data.train_rows", _by_itself),
    "eval_steps": Key("evaluation.every_steps", _never),
    "early_stopping_patience": Key(_PATIENCE, _by_itself),
    "save_steps": Key("checkpoint.every_steps", _never),
    "seed": Key("seed"),
    **LAUNCHED,
}
"""Of HF's Trainer, TRL, axolotl, LLaMA-Factory, torchtune, Lightning, Megatron, and the student-aware trainer of the
post-mortems."""

_HF_MARKS = ("per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type")
_HF_SEED = 42
_GKD_MARKS = ("lmbda", "seq_kd")
_STRATEGIES = {"eval_steps": ("eval_strategy", "evaluation_strategy"), "save_steps": ("save_strategy",)}
"""An interval -> what must be `steps` for it to count."""

DISTILLM_KEYS = {
    "lr": Key("optim.learning_rate"),
    "scheduler_name": Key("optim.scheduler"),
    "warmup_iters": Key("optim.warmup_steps"),
    "weight_decay": Key("optim.weight_decay"),
    "clip_grad": Key("optim.max_grad_norm", _unless_zero),
    "batch_size": Key("optim.batch_size"),
    "gradient_accumulation_steps": Key("optim.accumulation"),
    "epochs": Key("optim.epochs"),
    "total_iters": Key("optim.max_steps", _by_itself),
    "gradient_checkpointing": Key("student.gradient_checkpointing"),
    "model_path": Key("student.path"),
    "teacher_model_path": Key("teacher.path"),
    "skew_alpha": Key("objective.kd.alpha"),
    "kd_ratio": Key("objective.kd.weight"),
    "max_length": Key("data.max_length"),
    "max_prompt_length": Key("data.max_prompt_length"),
    "train_num": Key("data.train_rows", _by_itself),
    "eval_interval": Key("evaluation.every_steps", _by_itself),
    "save_interval": Key("checkpoint.every_steps", _by_itself),
    "init_threshold": Key("rollout.threshold"),
    "loss_eps": Key("rollout.loss_epsilon"),
    "capacity": Key("rollout.capacity"),
    "replay_ratio": Key("rollout.replay_ratio"),
    "gen_num_beams": Key("rollout.num_beams"),
    "gen_top_p": Key("rollout.top_p"),
    "temperature": Key("evaluation.sampling_temperature"),
    "seed": Key("seed"),
    **LAUNCHED,
}
"""Of DistiLLM; dashes of its flags are underscores here. An interval of -1 is once an epoch there."""
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
    refused: list[str] = []
    tree = _tree(stated)
    config = _build(DistillConfig, tree, "", refused)
    assert isinstance(config, DistillConfig)
    broken = {problem.partition("=")[0] for problem in refused}
    kept = {field: value for field, value in stated.items() if field not in broken}
    if "objective.kd.temperature.start" in kept:
        kept["objective.kd.temperature"] = kept["objective.kd.temperature.start"]
    said = tuple(problem for problem in refused if not problem.endswith("?"))
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


def _build(part: type[BaseModel], tree: Mapping[str, Any], where: str, refused: list[str]) -> BaseModel:
    """A part of its values one by one: fields that contradict each other are what the checks are for."""
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
            refused.append(f"{where}{name}={value!r}" + ("?" if is_unknown else f": {reason['msg']}"))
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

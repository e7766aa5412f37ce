"""What other trainers call the fields of kdkit, and how they write their values."""

from collections.abc import Callable
from dataclasses import dataclass

from kdkit.doctor.findings import Value


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

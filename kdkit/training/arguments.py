"""transformers' TrainingArguments for one stage, with every default that would harm distillation set."""

import os
from pathlib import Path

from transformers import TrainingArguments

from kdkit.config import DistillConfig
from kdkit.training.progress import say

MIXED_PRECISION = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
"""accelerate's names for autocast."""


def training_arguments(
    config: DistillConfig, folder: Path, *, num_steps: int, precision: str, use_cpu: bool = False
) -> TrainingArguments:
    """The Trainer's arguments for a stage.

    Args:
        config: the stage's config.
        folder: where its checkpoints go.
        num_steps: optimizer steps of the stage.
        precision: "float32", "float16" or "bfloat16": autocast of the student's passes.
        use_cpu: stay on the CPU although there is a GPU.
    Returns:
        Arguments on which logging, saving and evaluating are decided by `StageFlow` alone.
    """
    optim = config.optim
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=optim.batch_size,
        per_device_eval_batch_size=config.evaluation.batch_size,
        gradient_accumulation_steps=optim.accumulation,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.scheduler,
        warmup_steps=num_warmup_steps(config, num_steps),
        optim=_optimizer(optim.optimizer),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        fp16=precision == "float16",
        bf16=precision == "bfloat16",
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=use_cpu,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=config.logging.report_to or "none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # would log a NaN as 0
        remove_unused_columns=False,  # would drop positions and unit ids
        label_names=["labels"],
        prediction_loss_only=True,  # would gather (B, T, V) logits
        ddp_find_unused_parameters=True,  # a term whose weight is still 0 leaves its adapter unused
        include_num_input_tokens_seen="no",
        dataloader_pin_memory=not use_cpu,
    )
    _overrule_launcher(arguments, precision)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # two visible cards would become nn.DataParallel
    return arguments


def _overrule_launcher(arguments: TrainingArguments, precision: str) -> None:
    """Take the config's precision: for float32 the Trainer would take what `accelerate launch` was told."""
    arguments.mixed_precision = MIXED_PRECISION[precision]
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", arguments.mixed_precision) and os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"accelerate was told mixed_precision {asked}; optim.precision decides, and takes {precision}")


def num_warmup_steps(config: DistillConfig, num_steps: int) -> int:
    """Optimizer steps of warm-up of a stage."""
    if config.optim.warmup_steps is not None:
        return min(config.optim.warmup_steps, num_steps)
    return round(config.optim.warmup_fraction * num_steps)


def _optimizer(asked: str) -> str:
    """AdamW's fused form: one pass over the weights, where the others take ten or make temporaries as large as them."""
    return "adamw_torch_fused" if asked == "adamw_torch" else asked

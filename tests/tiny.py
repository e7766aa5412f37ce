"""Tiny models on disk and trainers over them, for tests; run as a script it is one process of a distributed step."""

import json
import os
import sys
from pathlib import Path

import torch
from cpu_sharding import shard_on_cpu
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from kdkit.config import DistillConfig, demo_folder, load_config
from kdkit.data import DistillCollator, encode_rows, load_rows
from kdkit.loading import load_model
from kdkit.teacher.sources import LiveTeacher
from kdkit.training.arguments import training_arguments
from kdkit.training.early_stopping import EarlyStopping
from kdkit.training.flow import StageFlow
from kdkit.training.metrics import MetricsFile
from kdkit.training.model import DistillModel
from kdkit.training.objective import Objective
from kdkit.training.rollout import build_rollout
from kdkit.training.rollout.generator import StudentText
from kdkit.training.stopping import StopRequest
from kdkit.training.trainer import DistillTrainer

OF_THE_MACHINE = {"seconds", "tokens_per_second", "rollout/seconds", "memory/peak_gib", "memory/used_fraction"}
"""Figures of a log row that two equal runs do not share."""
ALL_TERMS = {
    "kd": {"loss": "skew_reverse_kl", "weight": 0.7, "temperature": 2.0},
    "lm": {"weight": 0.3},
    "dtw": {"weight": 0.5, "band": 4, "importance": "inverse_entropy"},
    "chunk_tokens": 50,
}


def save_llama(folder: Path, *, hidden_size: int, seed: int, num_layers: int = 1, dropout: float = 0.0) -> Path:
    """A random Llama with the demo's tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder() / "teacher")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        attention_dropout=dropout,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_pair(folder: Path, *, dropout: float = 0.0) -> dict[str, str]:
    """A teacher and a student of different widths; with dropout the student's training draws random numbers."""
    return {
        "teacher": str(save_llama(folder / "teacher", hidden_size=24, seed=1)),
        "student": str(save_llama(folder / "student", hidden_size=16, seed=2, dropout=dropout)),
    }


def tiny_config(pair: dict[str, str], *overrides: str, objective: dict | None = None, **optim: object) -> DistillConfig:
    """A run of a few steps on a few rows of the demo."""
    tree = {
        "teacher": {"path": pair["teacher"]},
        "student": {"path": pair["student"]},
        "data": {
            "train": "${demo}/train.jsonl",
            "validation": "${demo}/validation.jsonl",
            "template": "plain",
            "train_rows": 32,
            "validation_rows": 7,
            "max_length": 160,
            "max_prompt_length": 128,
        },
        "objective": objective if objective is not None else ALL_TERMS,
        "optim": {"max_steps": 3, "batch_size": 8, "learning_rate": 0.01, **optim},
        "evaluation": {"max_new_tokens": 4, "generate_rows": 2, "teacher": False, "before": False, "batch_size": 4},
        "logging": {"every_steps": 1},
        "threads": 1,
    }
    return load_config(tree, overrides)


class GradientDump(TrainerCallback):
    """Keeps the gradients of each optimizer step, clipped or not, as the optimizer sees them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


def build_trainer(
    config: DistillConfig, folder: Path, *, callbacks: tuple[TrainerCallback, ...] = (), stage: str = "distill"
) -> DistillTrainer:
    """A trainer as a stage makes it, without the run around it."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(config.student.path)
    objective = Objective(config.objective)

    def rows(source: str, limit: int | None):
        loaded = load_rows(source, template=config.data.template, limit=limit)
        lengths = {"max_length": config.data.max_length, "max_prompt_length": config.data.max_prompt_length}
        return encode_rows(loaded, tokenizer, unit=config.objective.unit, **lengths).dataset

    teacher = None
    if config.objective.needs_teacher:
        teacher = LiveTeacher(load_model(config.teacher.path, dtype=torch.float32, device="cpu"))
    student = load_model(config.student.path, dtype=torch.float32, device="cpu", trainable=True)
    torch.manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    every, stopping = config.evaluation.every_steps, config.evaluation.early_stopping
    flow = StageFlow(log_every=1, save_every=0, evaluate_every=every, stop=StopRequest())
    trainer = DistillTrainer(
        DistillModel(student, objective, teacher=None if teacher is None else teacher.shape),
        training_arguments(config, folder, num_steps=config.optim.max_steps, precision="float32", use_cpu=True),
        stage=stage,
        collator=DistillCollator(tokenizer.pad_token_id),
        train_rows=rows(config.data.train, config.data.train_rows),
        eval_rows=rows(config.data.validation, config.data.validation_rows),
        teacher=teacher,
        tokenizer=tokenizer,
        metrics=MetricsFile(folder / "metrics.jsonl"),
        rollout=build_rollout(
            config,
            tokenizer=tokenizer,
            teacher=teacher,
            collator=DistillCollator(tokenizer.pad_token_id),
            num_steps=config.optim.max_steps,
            num_warmup_steps=0,
            references=list,
        ),
        ema=config.optim.ema,
        early_stopping=None if stopping is None else EarlyStopping(stopping, folder),
        on_nonfinite=config.objective.on_nonfinite,
        callbacks=[flow, *callbacks],
    )
    flow.trainer = trainer
    return trainer


def given_text(student, rows, *, key) -> list[StudentText]:
    """In a generator's place: for each row the first half of its own answer, whatever the student knows by now."""
    cut = [row["prompt_length"] + (len(row["input_ids"]) - row["prompt_length"] + 1) // 2 for row in rows]
    halves = [
        row | {"input_ids": row["input_ids"][:end], "unit_ids": row["unit_ids"][:end], "is_gold": False}
        for row, end in zip(rows, cut, strict=True)
    ]
    return [StudentText(half, "half of an answer", ended=False) for half in halves]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> None:
    """Train the config in `FOLDER/config.json` as one of several processes; the first writes down its gradients."""
    folder = Path(sys.argv[1])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    given = json.loads((folder / "config.json").read_text())
    dump = GradientDump()
    trainer = build_trainer(load_config(given), folder / "run", callbacks=(dump,))
    script = folder / "rouge_l.json"
    if script.is_file():
        found = iter(json.loads(script.read_text()))
        trainer.generate = lambda student, limit: {"rouge_l": 0.0 if limit else next(found)}
    if (folder / "given_text").is_file():
        trainer.rollout.generate = given_text
    trainer.train()
    (folder / "wrapper.txt").write_text(type(trainer.model_wrapped).__name__)
    if trainer.rollout is not None:
        trainer.rollout.save(_made(folder / f"rollout-{trainer.accelerator.process_index}"))
    if trainer.average is not None:
        with trainer.average.in_place():
            values = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        save_file(values, folder / f"average-{trainer.accelerator.process_index}.safetensors")
    if trainer.is_world_process_zero():
        for number, gradients in enumerate(dump.steps):
            plain = {name.removeprefix("module."): value.contiguous() for name, value in gradients.items()}
            save_file(plain, folder / f"gradients-{number}.safetensors")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo that want Python's lock while it ends abort the process, once in ten times


if __name__ == "__main__":
    main()

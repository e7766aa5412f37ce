"""One stage of a run: its length, its trainer, and the student it leaves behind."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from kdkit.config import DistillConfig, EarlyStoppingConfig, EvaluationConfig
from kdkit.data.batch import DistillCollator
from kdkit.doctor import Planned
from kdkit.errors import UserError
from kdkit.loading import describe_model
from kdkit.loading.backbone import takes_packed_rows
from kdkit.losses.blocks import fastest_backend as losses_backend
from kdkit.runtime import seed_everything
from kdkit.softdtw import fastest_backend
from kdkit.teacher.signal import Views
from kdkit.teacher.sources import LiveTeacher, TeacherSource
from kdkit.training import checkpoint, rollout
from kdkit.training.arguments import num_warmup_steps, training_arguments
from kdkit.training.controls import ChangeableStage, Controls, needs_controls
from kdkit.training.early_stopping import FIGURE_FILE, EarlyStopping
from kdkit.training.flow import ConsoleProgress, StageFlow
from kdkit.training.memory import watch_memory
from kdkit.training.metrics import MetricsFile
from kdkit.training.model import DistillModel
from kdkit.training.objective import Across, Objective
from kdkit.training.progress import say
from kdkit.training.sampling import LengthGroupedSampler
from kdkit.training.saving import ADAPTERS_FILE, AVERAGE_FOLDER, merge_student
from kdkit.training.state import STATE_FILE
from kdkit.training.stopping import StopRequest
from kdkit.training.trainer import DistillTrainer, Generate
from kdkit.training.watching import LiveDoctor

OF_TRAINING = (
    checkpoint.SEAL,
    STATE_FILE,
    rollout.STATE_FILE,
    rollout.TEXTS_FILE,
    FIGURE_FILE,
    AVERAGE_FOLDER,
    "trainer_state.json",
    "*.pt",
    "*.pth",
    "pytorch_model_fsdp*",
    "*.bin",
)
"""Files of a checkpoint that are not the student's."""


@dataclass(frozen=True)
class StageInputs:
    """What a stage works on."""

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: TeacherSource | None
    train_rows: Dataset
    eval_rows: Dataset
    collator: DistillCollator
    generate: Generate | None
    references: Callable[[], Sequence[Sequence[str]]]
    """Right answers of the training rows, by row id."""
    vocab_size: int | None
    """Leading token ids that student and teacher share; None where their widths agree."""
    across: Across | None
    """How the ids of the two vocabularies relate; None where there is one tokenizer."""
    teacher_tokenizer: PreTrainedTokenizerBase | None
    """The teacher's, where it is another one."""
    dense_student: bool
    """Whether the student's logits have to come from its own forward pass."""
    precision: str
    use_cpu: bool
    adapters_from: Path | None
    """Folder of an earlier stage whose adapters are taken over where they fit."""


def run_stage(
    config: DistillConfig,
    inputs: StageInputs,
    *,
    folder: Path,
    metrics: MetricsFile,
    stop: StopRequest,
    controls: Controls | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train one stage from its newest whole checkpoint, or from the start, and leave `folder/model`.

    Args:
        config: the stage's config, with its own seed.
        inputs: models, rows and how to batch them.
        folder: the stage's folder; its checkpoints are looked for here.
        metrics: the run's log; what a lost part of this stage wrote is cut off.
        stop: asked after each step.
        controls: asked between steps what to change.
        callbacks: of whoever wants to watch.
    Raises:
        Interrupted: someone asked to stop; the last complete step is saved.
        RunFailed: something was not finite, a checkpoint could not be written, or the doctor gave the stage up.
    """
    (name,) = config.stages
    folder.mkdir(parents=True, exist_ok=True)
    num_steps = config.optim.num_steps(len(inputs.train_rows), num_processes=_num_processes())
    resumed_from = checkpoint.newest_checkpoint(folder)
    if controls is None and needs_controls(name, metrics):
        controls = Controls()
    flow = StageFlow(
        log_every=config.logging.every_steps,
        save_every=config.checkpoint.every_steps,
        evaluate_every=config.evaluation.every_steps,
        save_every_seconds=60 * config.checkpoint.every_minutes,
        stop=stop,
        resumed_from=resumed_from,
    )
    doctor = _call_doctor(config, num_steps, metrics)
    callbacks = [flow, ConsoleProgress(name), *doctor, *callbacks]
    trainer = _build_trainer(
        config, inputs, folder, num_steps=num_steps, metrics=metrics, stop=stop, controls=controls, callbacks=callbacks
    )
    flow.trainer = trainer
    trainer.accelerator.wait_for_everyone()  # every process has read the log by now
    if trainer.is_world_process_zero():
        metrics.cut(name, step=_step_of(resumed_from))
        say(describe_stage(config, inputs, num_steps, resumed_from))
    if resumed_from is not None and _step_of(resumed_from) == num_steps:
        trainer.finish(resumed_from)
    else:
        trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    stop.check()
    for watching in doctor:
        watching.check()
    _leave_model(trainer, folder)


def describe_stage(config: DistillConfig, inputs: StageInputs, num_steps: int, resumed_from: Path | None) -> str:
    """The banner of a stage: what will happen, in the units in which it happens.

    Args:
        config: the stage's config.
        inputs: what it works on.
        num_steps: its optimizer steps.
        resumed_from: the checkpoint it continues, or None.
    Returns:
        A few lines of text.
    """
    (name,) = config.stages
    optim, warmup = config.optim, num_warmup_steps(config, num_steps)
    processes = _num_processes()
    rows = optim.batch_size * optim.accumulation * processes
    objective = Objective(config.objective, across=inputs.across)
    terms = ", ".join(
        f"{term.name} {term.schedule.start:g}" + ("" if term.schedule.is_constant else f"..{term.schedule.end:g}")
        for term in objective.terms
    )
    lines = [
        f"stage {name}: {num_steps} optimizer steps, warm-up {warmup} ({warmup / num_steps:.0%}), "
        f"{optim.scheduler} from {optim.learning_rate:g}, seed {config.seed}",
        f"  terms: {terms} (kd loss: {config.objective.kd.loss})",
        f"  batch: {optim.batch_size} rows x {optim.accumulation} accumulation x {processes} "
        f"processes = {rows} rows a step, {inputs.precision}",
        f"  rows: {len(inputs.train_rows)} to train on, "
        f"{num_steps * rows / len(inputs.train_rows):.1f} passes; {len(inputs.eval_rows)} to evaluate on",
    ]
    lines.append("  losses: backend {}: {}".format(*losses_backend(_device())))
    if config.objective.weights["dtw"].largest > 0:
        lines.append("  soft-DTW: backend {}: {}".format(*fastest_backend(_device())))
    lines.append(_describe_padding(inputs, objective.views))
    if config.student.lora is not None:
        student = describe_model(inputs.student)
        share = student.num_trainable_parameters / student.num_parameters
        lines.append(f"  trained: LoRA layers of rank {config.student.lora.rank}, {share:.2%} of the student's weights")
    if config.rollout.is_on:
        lines.append(_describe_rollout(config))
    if config.optim.ema is not None:
        lines.append(f"  evaluated and left: the average of the weights, decay {config.optim.ema.decay:g}")
    if config.evaluation.early_stopping is not None:
        lines.append(_describe_early_stopping(config.evaluation, config.evaluation.early_stopping, num_steps))
    if resumed_from is not None:
        lines.append(f"  resumed from {resumed_from.name}")
    return "\n".join(lines)


def _describe_padding(inputs: StageInputs, views: Views) -> str:
    """Whose passes leave padding out: of rows within the model's window, where a batch has enough of it."""
    leaves_out = {"student": not inputs.dense_student and takes_packed_rows(inputs.student)}
    if isinstance(inputs.teacher, LiveTeacher):
        leaves_out["teacher"] = inputs.teacher.leaves_padding_out(views)
    said = {True: "left out, where that pays, by", False: "kept by"}
    sides = {answer: " and ".join(name for name, own in leaves_out.items() if own is answer) for answer in said}
    return "  padding: " + "; ".join(f"{said[answer]} {names}" for answer, names in sides.items() if names)


def _describe_rollout(config: DistillConfig) -> str:
    """How much of the training is the student's own text, and what is asked of it."""
    settings = config.rollout
    moves = f", + {settings.threshold_step:g} when the validation loss rises by {settings.loss_epsilon:g}"
    guards = {"guard": settings.guard, "collapse rule": settings.collapse, "gate": settings.gate}
    return (
        f"  student's own text: {settings.mode}, threshold {settings.start_threshold:g}"
        f"{moves if settings.mode == 'adaptive' else ''}, at most {settings.max_new_tokens} tokens; "
        + ", ".join(f"{name} {'off' if part is None else 'on'}" for name, part in guards.items())
    )


def _describe_early_stopping(evaluation: EvaluationConfig, stopping: EarlyStoppingConfig, num_steps: int) -> str:
    """What ends the stage early, and whether the stage is long enough for it."""
    num_evaluations = math.ceil(num_steps / evaluation.every_steps)
    line = f"  early stopping: after {stopping.patience} evaluations without a better {stopping.metric}"
    if stopping.patience >= num_evaluations:
        line += f", which {num_evaluations} evaluations cannot show: the stage runs to its end and leaves its best"
    return line


def _num_processes() -> int:
    from accelerate import PartialState

    return PartialState().num_processes


def _device() -> torch.device:
    from accelerate import PartialState

    return PartialState().device


def _step_of(path: Path | None) -> int:
    """Completed steps of a checkpoint; 0 without one."""
    return 0 if path is None else int(path.name.removeprefix(checkpoint.PREFIX))


def _build_trainer(
    config: DistillConfig,
    inputs: StageInputs,
    folder: Path,
    *,
    num_steps: int,
    metrics: MetricsFile,
    stop: StopRequest,
    controls: Controls | None,
    callbacks: list[TrainerCallback],
) -> DistillTrainer:
    """The trainer of a stage, with the student's own text and a person's hand where there are such."""
    (name,) = config.stages
    model, own_text = _build_model(config, inputs), _build_rollout(config, inputs, num_steps)
    stopping, changeable = config.evaluation.early_stopping, None
    if controls is not None:
        changeable = ChangeableStage(
            controls,
            stage=name,
            objective=model.objective,
            rollout=own_text,
            num_steps=num_steps,
            metrics=metrics,
            stop=stop,
        )
    return DistillTrainer(
        model,
        training_arguments(config, folder, num_steps=num_steps, precision=inputs.precision, use_cpu=inputs.use_cpu),
        stage=name,
        collator=inputs.collator,
        train_rows=inputs.train_rows,
        eval_rows=inputs.eval_rows,
        teacher=inputs.teacher,
        tokenizer=inputs.tokenizer,
        metrics=metrics,
        sampler=_build_sampler(config, inputs.train_rows) if config.optim.group_by_length else None,
        generate=inputs.generate,
        rollout=own_text,
        ema=config.optim.ema,
        early_stopping=None if stopping is None else EarlyStopping(stopping, folder),
        changeable=changeable,
        memory=watch_memory(
            config,
            student=inputs.student,
            teacher=inputs.teacher.model if isinstance(inputs.teacher, LiveTeacher) else None,
            precision=inputs.precision,
            teacher_width=None if inputs.teacher is None else inputs.teacher.shape.hidden_size,
        ),
        on_nonfinite=config.objective.on_nonfinite,
        keep=config.checkpoint.keep,
        callbacks=callbacks,
    )


def _build_sampler(config: DistillConfig, rows: Dataset) -> LengthGroupedSampler:
    """Rows of nearly the same length side by side, in the batches that the processes take at the same time."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return LengthGroupedSampler(lengths, group_size=config.optim.batch_size * _num_processes(), seed=config.seed)


def _call_doctor(config: DistillConfig, num_steps: int, metrics: MetricsFile) -> list[LiveDoctor]:
    """The one who watches the stage, or nobody."""
    (name,) = config.stages
    if config.doctor.on_fail == "off":
        return []
    planned = Planned(
        num_steps=num_steps,
        accumulation=config.optim.accumulation,
        warmup_steps=num_warmup_steps(config, num_steps),
        scheduler=config.optim.scheduler,
    )
    return [LiveDoctor(config.doctor, stage=name, metrics=metrics, planned=planned)]


def _build_model(config: DistillConfig, inputs: StageInputs) -> DistillModel:
    """Student, objective and adapters, the latter taken over from an earlier stage where they fit."""
    seed_everything(config.seed)  # adapters start the same whether or not a stage ran before in this process
    objective = Objective(config.objective, across=inputs.across)
    if isinstance(inputs.teacher, LiveTeacher):
        inputs.teacher.check(objective.views)
    model = DistillModel(
        inputs.student,
        objective,
        teacher=None if inputs.teacher is None else inputs.teacher.shape,
        vocab_size=inputs.vocab_size,
        dense=inputs.dense_student,
    )
    file = None if inputs.adapters_from is None else inputs.adapters_from / ADAPTERS_FILE
    if file is not None and file.is_file():
        _take_over(model.adapters, load_file(file))
    model.check_views()
    return model


def _take_over(adapters: nn.ModuleDict, saved: Mapping[str, Tensor]) -> None:
    """Load each adapter that an earlier stage trained in the same shape; others keep their start."""
    for name, adapter in adapters.items():
        own = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
        if {key: value.shape for key, value in own.items()} == {k: v.shape for k, v in adapter.state_dict().items()}:
            adapter.load_state_dict(own)


def _build_rollout(config: DistillConfig, inputs: StageInputs, num_steps: int) -> rollout.Rollout | None:
    """The stage's rollout, once it is sure that its texts fit the student."""
    if config.rollout.is_on:
        _check_positions(config, inputs.student)
    if config.rollout.mode == "adaptive" and config.evaluation.every_steps >= num_steps:
        raise UserError(
            f"rollout.mode adaptive moves its threshold at evaluations, and of {num_steps} steps with "
            f"evaluation.every_steps={config.evaluation.every_steps} the first evaluation is the last: lower it"
        )
    return rollout.build_rollout(
        config,
        tokenizer=inputs.tokenizer,
        teacher=inputs.teacher,
        teacher_tokenizer=inputs.teacher_tokenizer,
        collator=inputs.collator,
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps(config, num_steps),
        references=inputs.references,
    )


def _check_positions(config: DistillConfig, student: PreTrainedModel) -> None:
    """Refuse texts beyond the positions that the student knows, before the first prompt that is long enough."""
    limit = getattr(student.config.get_text_config(), "max_position_embeddings", None)  # not every architecture bounds
    needed = config.data.max_prompt_length + config.rollout.max_new_tokens
    if limit is not None and 0 < limit < needed:
        raise UserError(
            f"rollout.max_new_tokens ({config.rollout.max_new_tokens}) after a prompt of data.max_prompt_length "
            f"({config.data.max_prompt_length}) exceeds the student's {limit} positions: lower one of them"
        )


def _leave_model(trainer: DistillTrainer, folder: Path) -> None:
    """Publish the stage's student as `folder/model`; only then is the stage done."""
    source = _student_to_leave(trainer, folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        staged = folder / checkpoint.STAGING
        checkpoint.clear_staging(folder)
        staged.mkdir()
        shutil.copytree(source, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*OF_TRAINING))
        merge_student(trainer.model, staged)
        checkpoint.publish(staged, folder / "model")
    trainer.accelerator.wait_for_everyone()


def _student_to_leave(trainer: DistillTrainer, folder: Path) -> Path:
    """The best evaluated student where such are kept, else the last one, as the average where there is one."""
    if trainer.early_stopping is not None and trainer.early_stopping.best is not None:
        return trainer.early_stopping.best.folder
    newest = checkpoint.newest_checkpoint(folder)
    assert newest is not None
    return newest if trainer.average is None else newest / AVERAGE_FOLDER

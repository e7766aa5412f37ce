"""transformers' Trainer with distillation's counting, feeding, evaluating and saving; no arithmetic of losses in here.

What the Trainer does well stays its own: optimizer, learning-rate schedule, accumulation, mixed precision, clipping,
DDP and FSDP, resuming. Each method below exists because the Trainer's own would fail silently under distillation; its
docstring says how.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from kdkit.config import EmaConfig
from kdkit.data.batch import Batch, DistillCollator
from kdkit.errors import RunFailed
from kdkit.loading import has_lora
from kdkit.runtime import preserved_rng_state, rng_state, set_rng_state, undisturbed_rng
from kdkit.teacher.sources import TeacherSource
from kdkit.training import checkpoint
from kdkit.training.averaging import WeightAverage
from kdkit.training.controls import ChangeableStage
from kdkit.training.early_stopping import EarlyStopping
from kdkit.training.failures import out_of_memory, stop_at_nonfinite
from kdkit.training.figures import TrainFigures
from kdkit.training.memory import MemoryWatch
from kdkit.training.metrics import MetricsFile
from kdkit.training.model import DistillModel
from kdkit.training.objective import ITEMS, Item, Moment, count_items
from kdkit.training.optimizer import keep_embeddings_in_32_bits, parameter_groups
from kdkit.training.progress import say
from kdkit.training.rollout import Rollout
from kdkit.training.sampling import LengthGroupedSampler
from kdkit.training.saving import AVERAGE_FOLDER, StageWriter, read_student, write_student
from kdkit.training.sharding import check_sharding
from kdkit.training.state import StageState
from kdkit.training.validation import measure_objective, noted_rows, shared_batches
from kdkit.training.windows import Windows

logger = logging.getLogger(__name__)

Generate = Callable[[PreTrainedModel, int | None], Mapping[str, float | str]]
"""Figures of the student's answers, and text about them that the log alone keeps."""


class DistillTrainer(Trainer):
    """Trains a `DistillModel` against a teacher's signal.

    Args:
        model: student, adapters and objective.
        args: made by `kdkit.training.arguments.training_arguments`; `max_steps` is set.
        stage: name of the stage, for messages and log rows.
        collator: makes batches.
        train_rows: tokenised training rows.
        eval_rows: tokenised rows of the evaluation while training.
        teacher: where the signal comes from; None where no term needs it.
        tokenizer: saved with every checkpoint.
        metrics: file of log rows.
        sampler: order of the training rows, with `set_epoch`; None: a random one.
        generate: answers validation rows with the student and measures them; called with the student and a limit of
            rows (None: all), in all processes. None: no generation while training.
        rollout: puts the student's own text in place of gold rows; None: never.
        ema: how the average of the weights moves that is evaluated and left; None: the weights themselves are.
        early_stopping: ends the stage when evaluations bring nothing more; None: never.
        changeable: what a person may change between steps; None: nobody is there.
        memory: how full the devices get, for the log; None: not watched.
        on_nonfinite: what a NaN or infinite loss or gradient does, "stop" or "skip".
        keep: newest checkpoints that stay.
        callbacks: further callbacks, after the trainer's own.
    """

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: DistillModel,
        args: TrainingArguments,
        *,
        stage: str,
        collator: DistillCollator,
        train_rows: Dataset,
        eval_rows: Dataset,
        teacher: TeacherSource | None,
        tokenizer: PreTrainedTokenizerBase,
        metrics: MetricsFile,
        sampler: LengthGroupedSampler | None = None,
        generate: Generate | None = None,
        rollout: Rollout | None = None,
        ema: EmaConfig | None = None,
        early_stopping: EarlyStopping | None = None,
        changeable: ChangeableStage | None = None,
        memory: MemoryWatch | None = None,
        on_nonfinite: str = "stop",
        keep: int = 2,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.stage = stage
        self.teacher = teacher
        self.metrics = metrics
        self.sampler = sampler
        self.generate = generate
        self.rollout = rollout
        self.early_stopping = early_stopping
        self.changeable = changeable
        self.memory = memory
        self.on_nonfinite = on_nonfinite
        self.keep = keep
        self.objective = model.objective
        self.figures = TrainFigures(model.objective)
        self.update_norm: float | None = None
        self._losses: list[tuple[Batch, Tensor, Mapping[str, Tensor]]] = []
        self._settled_rng: dict | None = None
        self._is_step_empty = self._is_overflow = False
        self.windows = Windows()
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.writer = StageWriter(
            Path(args.output_dir), stage=stage, accelerator=self.accelerator, is_writing=args.should_save
        )
        if self.is_fsdp_enabled:
            check_sharding(
                self.accelerator.state.fsdp_plugin,
                has_rollout=rollout is not None,
                has_average=ema is not None,
                has_lora=has_lora(model.student),
                watches_rouge_l=early_stopping is not None and early_stopping.config.metric == "rouge_l",
            )
        self.average = None if ema is None else WeightAverage(self.model, ema)
        self.remembered = StageState(self.figures.sums, rollout, self.average, early_stopping)

    # ---- what is fed ----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """The order of the rows; the Trainer's own way to group them by length finds another order after a resume."""
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    # ---- what is counted -------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch; its dropout is drawn undisturbed by what a notebook asks models in another thread."""
        with undisturbed_rng():
            return super().training_step(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[Item, float]]:
        """The batches of the next accumulation window, the student's own text among them, counted after it came in."""
        self._losses = []
        if self.sampler is not None:  # nobody else reaches it through what a resume wraps around it
            self.sampler.set_epoch(math.floor((self.state.epoch or 0) + 1e-6))
        if self.control.should_training_stop:  # a stage that had ended early was resumed: there is nothing left to do
            return [], {}
        if self.changeable is not None:
            if self.changeable.is_paused and self.state.global_step and self.accelerator.num_processes == 1:
                self._save_checkpoint(self.model_wrapped)  # whoever pauses may not come back
            self.figures.leave_out(self.changeable.take_up(self.state.global_step, accelerator=self.accelerator))
        batches = self.windows.next_of(epoch_iterator, num_batches)
        if self.rollout is None or not batches:
            return batches, self._get_num_items_in_batch(batches, device)
        batches, figures = self.rollout.mix(
            batches,
            self.model.student,
            step=self.state.global_step,
            accelerator=self.accelerator,
            autocast=self.accelerator.autocast,
            read_ahead=partial(self.windows.peek, epoch_iterator, num_batches),
        )
        for name, figure in figures.items():
            self.figures.sums.add(name, torch.tensor(figure, dtype=torch.float64, device=device))
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> dict[Item, float]:
        """Items of each kind over the accumulation window and all processes; the Trainer's own counts labels only."""
        items = [count_items(batch) for batch in batch_samples]
        counts = [sum(batch[name] for batch in items) for name in ITEMS]
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(torch.tensor(counts, device=device), reduction="sum").tolist()
        return dict(zip(ITEMS, map(float, counts), strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: dict[Item, float] | None = None,
    ) -> Tensor:
        """This micro-batch's share of the window's loss, times the processes, over which DDP and FSDP average."""
        assert num_items_in_batch is not None
        moment = Moment(self.state.global_step, self.args.max_steps, num_items_in_batch)
        outputs = model(inputs, signal=self._signal(inputs, moment), moment=moment)
        step_share = 1.0 / (self.current_gradient_accumulation_steps * self.accelerator.num_processes)
        self.figures.record(outputs, moment, num_tokens=inputs["positions"].numel(), step_share=step_share)
        self._losses.append((inputs, outputs["loss"].detach(), outputs["sums"]))
        return outputs["loss"] * self.accelerator.num_processes

    def _signal(self, inputs: Batch, moment: Moment) -> object | None:
        """The teacher's signal where a term that is active now looks at it."""
        active = any(term.needs_teacher and term.weight(moment) > 0 for term in self.objective.terms)
        if not active:
            return None
        assert self.teacher is not None
        return self.teacher(inputs, self.objective.views_at(moment))

    # ---- what is not finite ----------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float:
        """The gradient's norm; a non-finite one stops the run or empties the step instead of poisoning the weights.

        Here alone the host waits for the device within a step, when all but the optimizer has been given to it.
        """
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        self._check_losses()
        self._is_overflow = self.accelerator.scaler is not None and not math.isfinite(norm)
        if math.isfinite(norm) or self._is_overflow:  # a loss scaler skips such steps by itself
            return norm
        if self.on_nonfinite == "stop":
            batch = self._losses[-1][0]
            self._stop_at_nonfinite(f"the gradient's norm is {norm} although the loss is finite", batch)
        model.zero_grad()
        self.figures.sums.forget_step()
        self.remembered.num_skipped_steps += 1
        self._is_step_empty = True
        return norm

    def _check_losses(self) -> None:
        """Stop at a loss of the window that is not finite: its gradient may be, as that of a label held impossible."""
        if self.on_nonfinite != "stop" or torch.stack([loss for _, loss, _ in self._losses]).isfinite().all():
            return
        batch, loss, sums = next(seen for seen in self._losses if not torch.isfinite(seen[1]))
        culprits = [name for name, value in sums.items() if not torch.isfinite(value)]
        self._stop_at_nonfinite(f"the loss is {loss.item()}; term {' and '.join(culprits) or 'total'}", batch)

    def _stop_at_nonfinite(self, what: str, batch: Batch | None) -> NoReturn:
        """Save the batch and end the run."""
        step, folder = self.state.global_step + 1, Path(self.args.output_dir)
        stop_at_nonfinite(what, stage=self.stage, step=step, batch=batch, folder=folder)

    # ---- what is trained -------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over student and adapters; adapters get their own learning rate and no weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        trained = self.model if model is None else model
        groups = parameter_groups(
            trained,
            set(self.get_decay_parameter_names(trained)),
            weight_decay=self.args.weight_decay,
            adapter_rate=self.objective.config.adapter_learning_rate,
        )
        optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
        self.optimizer = optimizer_class(groups, **arguments)
        if arguments.get("optim_bits") == 8:
            keep_embeddings_in_32_bits(trained)
        return self.optimizer

    # ---- what is evaluated -----------------------------------------------------------------------------------

    def evaluate(self, *args: Any, limit: int | None = None, **kwargs: Any) -> dict[str, float]:
        """The training objective at this step's weights, by sums and counts, and the student's own answers.

        The Trainer's own averages batch means, and would draw from the random state that training continues with.

        Args:
            *args, **kwargs: of the Trainer's method; not used.
            limit: rows to look at; None: all.
        Returns:
            Figures under the names of metrics.jsonl, each with `eval_` before it.
        """
        with preserved_rng_state(), self._averaged():
            figures, texts = self._measure_objective(limit)
            if self.generate is not None and not self.is_fsdp_enabled:  # no process has a whole student under FSDP
                found = self.generate(self.model.student, limit)
                figures |= {name: value for name, value in found.items() if not isinstance(value, str)}
                texts |= {name: value for name, value in found.items() if isinstance(value, str)}
            self.accelerator.wait_for_everyone()
        if limit is None:
            figures = self._take_up(figures, texts)
        prefixed = {f"eval_{name}": value for name, value in figures.items()}
        if limit is None:
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, prefixed)
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(prefixed))
        return prefixed

    def _averaged(self) -> AbstractContextManager[None]:
        """The weights that are evaluated and left in place of those that are trained."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _take_up(self, figures: dict[str, float], texts: Mapping[str, str]) -> dict[str, float]:
        """Log an evaluation and let threshold, early stopping and the best student follow from it."""
        if self.accelerator.num_processes > 1:  # to the last bit: the same has to follow in all
            (figures,) = broadcast_object_list([figures])
        step, is_best, notes = self.state.global_step, False, []
        if self.rollout is not None:
            moved, note = self.rollout.observe(figures)
            figures |= moved
            notes.append(note)
        if self.early_stopping is not None and step > 0:
            is_best = self.early_stopping.observe(step, figures)
            notes.append(self.early_stopping.say(is_last=step == self.args.max_steps))
        if self.is_world_process_zero():
            note = "; ".join(filter(None, notes))
            place = {"kind": "eval", "stage": self.stage, "step": step}
            self.metrics.append({**place, **figures, **texts, **({"note": note} if note else {})})
            if note:
                say(f"{self.stage} {step}: {note}")
        if self.early_stopping is not None and is_best:
            save = partial(self.save_model, _internal_call=True)
            with undisturbed_rng(), self._averaged():
                self.early_stopping.keep(self.writer, save, estimated_bytes=self._weight_bytes())
        return figures

    def _measure_objective(self, limit: int | None) -> tuple[dict[str, float], dict[str, str]]:
        """Objective and cross-entropy over the evaluation rows at this step, and a digest of the rows as they came."""
        rows, digest = self.eval_dataset, hashlib.sha256()
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        loader = DataLoader(rows, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        moment = Moment(self.state.global_step, self.args.max_steps)

        def feed(batch: Batch) -> tuple[Batch, object]:
            inputs = self._prepare_inputs(batch)
            return inputs, self._signal(inputs, moment)

        figures = measure_objective(
            self.model_wrapped if self.is_fsdp_enabled else self.model,
            self.objective,
            shared_batches(noted_rows(loader, digest.update), self.accelerator),
            feed=feed,
            moment=moment,
            accelerator=self.accelerator,
        )
        return figures, {"rows_digest": digest.hexdigest()[:16]}

    # ---- what is logged --------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row per log step, from our own sums: the Trainer's loss starts anew after a resume."""
        if "loss" not in logs:  # the summary at the end of training; the report makes a better one
            return
        row = {
            **self.figures.take(Moment(self.state.global_step - 1, self.args.max_steps), self.accelerator),
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
        }
        row["epoch"] = self.state.epoch or 0.0
        if self.update_norm is not None:
            row["update_norm"] = self.update_norm
        if self.remembered.num_skipped_steps:
            row["skipped_steps"] = float(self.remembered.num_skipped_steps)
        if self.memory is not None:
            figures, warnings = self.memory.take()
            row |= figures
            for line in warnings:
                say(f"{self.stage} {self.state.global_step}: {line}")
        self.state.log_history.append({**row, "step": self.state.global_step})
        if self.is_world_process_zero():  # before any tracker, which may fail
            self.metrics.append({"kind": "train", "stage": self.stage, "step": self.state.global_step, **row})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, row)

    # ---- what is saved ---------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, save, evaluate: the Trainer evaluates first and loses the interval when that crashes."""
        wants_evaluation, self.control.should_evaluate = self.control.should_evaluate, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if wants_evaluation:
            self.evaluate()

    def begin_update(self) -> None:
        """Mark that weights are about to change: until the step is settled, no checkpoint of it can be written."""
        self._settled_rng = None

    def settle_step(self) -> None:
        """Mark the end of an optimizer step: from here a checkpoint can be written, also after a later failure."""
        if self._is_overflow:  # accelerate's own word does not know of steps that a fused optimizer leaves out
            self.figures.sums.forget_step()
            self.remembered.num_skipped_steps += 1
            self._check_loss_scale()
        elif self.average is not None and not self._is_step_empty:
            self.average.update()
        self._is_step_empty = False
        self.figures.sums.complete_step()
        if self.rollout is not None:
            self.rollout.settle()
        with undisturbed_rng():
            self._settled_rng = rng_state()

    def _check_loss_scale(self) -> None:
        """Lowering the scale cures an overflow in a few steps; below 1 there is none left to cure."""
        scaler = self.accelerator.scaler
        if scaler is not None and self.on_nonfinite == "stop" and scaler.get_scale() < 1.0:
            self._stop_at_nonfinite(
                f"no loss scale gives a finite gradient ({self.remembered.num_skipped_steps} steps skipped)",
                self._losses[-1][0],
            )

    def check_saving(self) -> None:
        """Write a checkpoint and throw it away."""
        self._save_checkpoint(self.model_wrapped, publish=False)

    def _get_output_dir(self, trial: Any) -> str:
        """The staging folder while a checkpoint is written."""
        return str(self.writer.target)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None, *, publish: bool = True) -> None:
        """Write a whole checkpoint or none; `publish=False` writes and throws away, to see whether it works."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        if publish and checkpoint.is_whole(folder / f"{checkpoint.PREFIX}{step}"):
            return
        remembered = self.remembered.collect(self.accelerator)
        copies = 3 if self.average is None else 4  # AdamW keeps two
        with (
            undisturbed_rng(),
            self.writer.staged(checkpoint.PREFIX, step, estimated_bytes=copies * self._weight_bytes()) as staged,
        ):
            super()._save_checkpoint(model, trial)
            if self.average is not None:
                with self._averaged():
                    self.save_model(str(staged / AVERAGE_FOLDER), _internal_call=True)
            if self.args.should_save:
                self.remembered.write(staged, remembered)
            if not publish:
                self.writer.discard(staged)
                return
            self.writer.publish(staged)
            if self.args.should_save:
                checkpoint.rotate(folder, keep=self.keep)

    def _weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The student as `from_pretrained` reads it, and what belongs to it."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            unwrapped = self.accelerator.unwrap_model(self.model)
            write_student(unwrapped, folder, tokenizer=self.processing_class, gathered=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Student and adapters back into place, every key accounted for."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if self.average is not None:
            read_student(self.model, Path(resume_from_checkpoint) / AVERAGE_FOLDER)
            self.average.take()
        read_student(self.model, Path(resume_from_checkpoint))

    def restore_state(self, folder: Path) -> None:
        """Go on with sums, rollout and evaluations as a checkpoint left them."""
        self.remembered.restore(folder, self.accelerator, step=self.state.global_step)
        if self.changeable is not None:
            self.changeable.restore(self.state.global_step)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; whatever ends it early, the last complete step is on disk afterwards."""
        self._settled_rng = None
        finished = False
        try:
            output = super().train(resume_from_checkpoint, **kwargs)
            finished = True
            return output
        except torch.OutOfMemoryError as error:
            plan = None if self.memory is None else self.memory.plan
            raise out_of_memory(error, stage=self.stage, step=self.state.global_step + 1, plan=plan) from error
        finally:
            if not finished and self._settled_rng is not None:
                self._save_emergency_checkpoint(self._settled_rng)

    def finish(self, folder: Path) -> None:
        """Take up a checkpoint of the last step: nothing is left to train, only its evaluation may be missing."""
        self._load_from_checkpoint(str(folder))
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # autocast as while training
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.state.is_world_process_zero = self.accelerator.is_main_process
        self.restore_state(folder)
        self.evaluate()

    def _save_emergency_checkpoint(self, settled_rng: dict) -> None:
        """A checkpoint of the last complete step, exact to the random state; only where no other process waits."""
        if self.accelerator.num_processes > 1:
            return
        self.figures.sums.forget_step()
        set_rng_state(settled_rng)
        try:
            self._save_checkpoint(self.model_wrapped)
        except RunFailed as error:
            logger.error("no emergency checkpoint: %s", error)

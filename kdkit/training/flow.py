"""When a stage logs, saves, evaluates and stops, and what it shows meanwhile: callbacks of the trainer."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdkit.runtime import preserved_rng_state
from kdkit.training.progress import say
from kdkit.training.stopping import StopRequest
from kdkit.training.trainer import DistillTrainer


class StageFlow(TrainerCallback):
    """Decides at each optimizer step what happens next.

    Args:
        log_every: optimizer steps between log rows.
        save_every: optimizer steps between checkpoints; 0: only at the end.
        evaluate_every: optimizer steps between evaluations; 0: only at the end.
        stop: asked after each step.
        save_every_seconds: after the last checkpoint another is due; 0: the clock asks for none.
        resumed_from: checkpoint that the trainer continues, or None.
    """

    def __init__(
        self,
        *,
        log_every: int,
        save_every: int,
        evaluate_every: int,
        stop: StopRequest,
        save_every_seconds: float = 0.0,
        resumed_from: Path | None = None,
    ) -> None:
        self.log_every = log_every
        self.save_every = save_every
        self.evaluate_every = evaluate_every
        self.stop = stop
        self.save_every_seconds = save_every_seconds
        self.resumed_from = resumed_from
        self.trainer: DistillTrainer | None = None  # given after the trainer exists
        self._saved_at = time.monotonic()
        self._weights_before: list[torch.Tensor] = []

    def is_evaluation_step(self, step: int, num_steps: int) -> bool:
        """Whether an evaluation belongs after this many completed steps."""
        return step == num_steps or (self.evaluate_every > 0 and step > 0 and step % self.evaluate_every == 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Try evaluation, generation and saving before step 1, or take up what a checkpoint left."""
        assert self.trainer is not None
        if self.resumed_from is None:
            if self.trainer.changeable is not None:
                self.trainer.changeable.restore(0)  # of a run that ended before its first checkpoint
            with preserved_rng_state():
                self.trainer.evaluate(limit=args.per_device_eval_batch_size)
                self.trainer.check_saving()
            if self.trainer.rollout is not None and self.trainer.rollout.needs_first_evaluation:
                self.trainer.evaluate()
            return
        self.trainer.restore_state(self.resumed_from)
        if self.is_evaluation_step(state.global_step, state.max_steps):
            self.trainer.evaluate()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the weights where the norm of their change will be logged; on the host, for a card may be full."""
        assert self.trainer is not None
        self.trainer.begin_update()
        if self._logs_after(state.global_step + 1, state.max_steps):
            self._weights_before = [p.detach().to("cpu", copy=True) for p in self._trained()]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure how far this step moved the weights."""
        assert self.trainer is not None
        if not self._weights_before:
            return
        moved = zip(self._trained(), self._weights_before, strict=True)
        changes = (now.detach() - before.to(now.device) for now, before in moved)  # one parameter at a time
        norms = [torch.linalg.vector_norm(change, dtype=torch.float64) for change in changes]
        squares = torch.stack(norms).square().sum()
        if self.trainer.is_fsdp_enabled:  # each process holds its own shard
            squares = self.trainer.accelerator.reduce(squares, reduction="sum")
        self.trainer.update_norm = math.sqrt(squares.item())
        self._weights_before = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Settle the step and decide what follows it."""
        assert self.trainer is not None
        self.trainer.settle_step()
        step, is_last = state.global_step, state.global_step >= state.max_steps
        control.should_log = self._logs_after(step, state.max_steps)
        control.should_evaluate = self.is_evaluation_step(step, state.max_steps)
        is_stopped, is_due = self._asked_of_any(bool(self.stop.reason), self._is_save_due())
        control.should_save = is_last or is_stopped or is_due or (self.save_every > 0 and step % self.save_every == 0)
        if control.should_save:
            self._saved_at = time.monotonic()
        if is_stopped:
            control.should_training_stop, control.should_evaluate = True, False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the stage where evaluations bring nothing more; the checkpoint is where a resume finds that end."""
        assert self.trainer is not None
        stopping = self.trainer.early_stopping
        if stopping is not None and stopping.is_exhausted and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True  # saved when the Trainer leaves its epoch

    def _is_save_due(self) -> bool:
        """Whether the clock asks for a checkpoint."""
        return self.save_every_seconds > 0 and time.monotonic() - self._saved_at >= self.save_every_seconds

    def _asked_of_any(self, *asked: bool) -> list[bool]:
        """Whether any process was asked: all have to save and leave at the same step, or they wait for each other."""
        assert self.trainer is not None
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return list(asked)
        flags = torch.tensor(list(map(int, asked)), device=accelerator.device)
        return [bool(flag) for flag in accelerator.reduce(flags, reduction="sum").tolist()]

    def _logs_after(self, step: int, num_steps: int) -> bool:
        return step % self.log_every == 0 or step == 1 or step == num_steps

    def _trained(self) -> list[torch.nn.Parameter]:
        assert self.trainer is not None
        return [p for p in self.trainer.model.parameters() if p.requires_grad]


class ConsoleProgress(TrainerCallback):
    """A bar with the time left on a terminal, plain lines elsewhere; at most one line per log row, on stderr.

    Args:
        stage: shown before the bar.
        seconds_between_lines: least time between two plain lines.
        most_lines: plain lines of a whole stage at most, and one for its end; a long stage has them further apart.
    """

    def __init__(self, stage: str, *, seconds_between_lines: float = 10.0, most_lines: int = 500) -> None:
        self.stage = stage
        self.seconds_between_lines = seconds_between_lines
        self.most_lines = most_lines
        self._bar: tqdm | None = None
        self._started = self._last_line = 0.0
        self._first_step = self._last_line_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step that training continues from."""
        self._started = self._last_line = time.monotonic()
        self._first_step = self._last_line_step = state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show loss and parts, with the time left."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        parts = {name.removeprefix("part/"): f"{value:.4g}" for name, value in logs.items() if name[:5] == "part/"}
        if self._bar is not None:
            self._bar.set_postfix({"loss": f"{logs['loss']:.4g}", **parts})
            return
        now = time.monotonic()
        is_early = now - self._last_line < self.seconds_between_lines
        is_near = (state.global_step - self._last_line_step) * self.most_lines < state.max_steps
        if (is_early or is_near) and state.global_step < state.max_steps:
            return
        self._last_line, self._last_line_step = now, state.global_step
        done = max(state.global_step - self._first_step, 1)
        left = (state.max_steps - state.global_step) * (now - self._started) / done
        figures = "  ".join(f"{name} {value}" for name, value in parts.items())
        say(
            f"{self.stage} {state.global_step}/{state.max_steps}  loss {logs['loss']:.4g}  {figures}  "
            f"lr {logs['learning_rate']:.2e}  {left:.0f} s left"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

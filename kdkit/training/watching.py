"""The doctor while a stage trains: reads its log as it grows, says once what it finds, and may end the stage."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdkit.config import DoctorConfig
from kdkit.doctor import RUN_CHECKS, Check, Finding, Planned, Severity, Trace, examine
from kdkit.doctor.figures import Figures
from kdkit.errors import RunFailed
from kdkit.training.metrics import MetricsFile
from kdkit.training.progress import say

KIND = "doctor"
"""Of the rows of metrics.jsonl that say what was found, and what a stage was ended for."""
FIRST_STEPS = 100
"""Completed steps before which no stage is given up."""


class LiveDoctor(TrainerCallback):
    """Looks at a stage's rows of metrics.jsonl at each evaluation and every so many steps.

    What it has said stands in the log as well, so that a resumed stage does not say it again.

    Args:
        config: what a failure does, and how often to look.
        stage: name of the stage.
        metrics: the run's log, already cut to where the stage goes on.
        planned: what the stage is to be.
        checks: those of a run; what needs a finished one is left out.
    """

    def __init__(
        self,
        config: DoctorConfig,
        *,
        stage: str,
        metrics: MetricsFile,
        planned: Planned,
        checks: Sequence[Check[Trace]] = RUN_CHECKS,
    ) -> None:
        self.config = config
        self.stage = stage
        self.metrics = metrics
        self.checks = [check for check in checks if check.live]
        self.trace = Trace(str(metrics.path), planned=planned)
        self._place = self._looked_at = 0
        self._said: set[tuple[str, str]] = set()  # code and severity
        self._given_up: tuple[int, list[str]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from where the stage goes on."""
        self._looked_at = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look where a look is due; an evaluation has its own."""
        every, is_training_row = self.config.every_steps, "loss" in (logs or {})
        if is_training_row and every > 0 and state.global_step // every > self._looked_at // every:
            self._look(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look."""
        self._look(state, control)

    def check(self) -> None:
        """Say why the stage was given up, where it was.

        Raises:
            RunFailed: with the findings by code.
        """
        if self._given_up is not None:
            step, reasons = self._given_up
            raise RunFailed(
                f"stage {self.stage}, step {step}: the doctor gave it up.\n  " + "\n  ".join(reasons) + "\nWhat is "
                "done is saved: mend the cause and start again with another --output, or go on all the same with "
                "--resume --set doctor.on_fail=warn"
            )

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        """Let the main process examine the stage, and all of them do what follows."""
        step, self._looked_at = state.global_step, state.global_step
        if self._given_up is not None:
            return
        reasons = self._examine(step) if state.is_world_process_zero else []
        if self.config.on_fail != "stop" or not FIRST_STEPS <= step < state.max_steps:
            return
        (reasons,) = broadcast_object_list([reasons])
        if reasons:
            self._given_up = step, reasons
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                codes = sorted({reason.split()[0] for reason in reasons})
                self.metrics.append({"kind": KIND, "stage": self.stage, "step": step, "stopped_by": codes})

    def _examine(self, step: int) -> list[str]:
        """Say what is new; returns what spoils the run, whether or not it was said before."""
        self._read()
        with np.errstate(over="ignore", invalid="ignore"):
            findings = examine(self.stage, {self.stage: self.trace}, self.checks).findings
        for finding in findings:
            if (finding.code, finding.severity.value) not in self._said:
                self._say(finding, step)
        self._said |= {(finding.code, finding.severity.value) for finding in findings}
        return [f"{f.code} {f.name}: {f.evidence}" for f in findings if f.severity == Severity.FAIL]

    def _say(self, finding: Finding, step: int) -> None:
        say(
            f"{self.stage} {step}: doctor: {finding.severity.value} {finding.code} {finding.name}: "
            f"{finding.evidence}. {finding.fix}"
        )
        said = {"code": finding.code, "severity": finding.severity.value, "evidence": finding.evidence}
        self.metrics.append({"kind": KIND, "stage": self.stage, "step": step, **said})

    def _read(self) -> None:
        """Take up the stage's rows that came since the last look, and what was said in them."""
        rows, self._place = self.metrics.rows_after(self._place)
        figures = Figures()
        for row in rows:
            if row["stage"] == self.stage and row["kind"] in ("train", "eval"):
                figures.add_row(row, row["step"], is_eval=row["kind"] == "eval")
            elif row["stage"] == self.stage and "code" in row:
                self._said.add((row["code"], row["severity"]))
        self.trace = self.trace.followed_by(figures.trace(self.trace.source, self.trace.planned))

"""The figures of a training log row: parts, weights and rates, from sums of our own over the steps since the last one.

The Trainer's own loss starts anew after a resume, and knows no parts.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from kdkit.training.metrics import RunningSums
from kdkit.training.objective import Moment, Objective


class TrainFigures:
    """What training steps leave for the log.

    Args:
        objective: whose parts are logged.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.sums = RunningSums()
        self._last_row_at = time.monotonic()

    def leave_out(self, seconds: float) -> None:
        """Not count a time in which nothing was trained."""
        self._last_row_at += seconds

    def record(self, outputs: Mapping[str, Any], moment: Moment, *, num_tokens: int, step_share: float) -> None:
        """Add a micro-batch's parts.

        Args:
            outputs: of the model.
            moment: of the step, with its counts.
            num_tokens: counted positions.
            step_share: this micro-batch as a share of the step, over all processes.
        """
        # A part is a mean over the steps in which its term was on.
        for term in self.objective.terms:
            if term.name not in outputs["sums"]:
                continue
            value = outputs["sums"][term.name]
            mean = (value / max(moment.counts[term.counts], 1.0)).double()
            share = step_share if moment.counts[term.counts] else 0.0  # a window without items says nothing
            self.sums.add(f"part/{term.name}", torch.stack([mean, torch.full_like(mean, share)]))
            self.sums.add(f"weighted/{term.name}", value * self.objective.coefficient(term, moment))
        for name, pair in outputs["statistics"].items():
            self.sums.add(name, pair)
        self.sums.add("tokens", torch.tensor(float(num_tokens)))

    def take(self, moment: Moment, accelerator: Accelerator) -> dict[str, float]:
        """Means over the steps since the last row, and the weights of the last of them.

        Args:
            moment: of the last step.
            accelerator: adds up over processes.
        Returns:
            Figures under the names of metrics.jsonl.
        """
        numbers, num_steps = self.sums.take_over_processes(accelerator)
        if not numbers:  # every step since the last row was skipped
            return {"loss": math.nan}
        tokens, seconds = numbers.pop("tokens")[0], time.monotonic() - self._last_row_at
        self._last_row_at = time.monotonic()
        row = {
            "loss": 0.0,
            "tokens": tokens / num_steps,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
        for name, number in numbers.items():
            if len(number) == 2 and number[1] == 0:  # a mean over nothing
                continue
            row[name] = number[0] / (num_steps if len(number) == 1 else number[1])
            row["loss"] += row[name] if name.startswith("weighted/") else 0.0
        for term in self.objective.terms:
            row[f"weight/{term.name}"] = term.weight(moment)
        row["kd_temperature"] = self.objective.kd.temperature(moment)
        return row

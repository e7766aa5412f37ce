"""What a run measures of itself: sums between two log rows, and the file of log rows."""

import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from kdkit.training.checkpoint import write_text


class RunningSums:
    """Named sums since the last log row, kept apart for the step that is not complete yet.

    A step that fails leaves no trace in them, so that they can be saved at any time and go on exactly from there.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._done: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a detached figure of the current step; it stays on its device until the next log row."""
        value = value.detach().double()
        held = self._pending.get(name)
        self._pending[name] = value if held is None else held + value

    def complete_step(self) -> None:
        """Count the current step's figures."""
        for name, value in self._pending.items():
            held = self._done.get(name)
            self._done[name] = value if held is None else held + value
        self.num_steps += bool(self._pending)
        self._pending = {}

    def forget_step(self) -> None:
        """Drop the figures of a step that did not happen."""
        self._pending = {}

    def take(self) -> tuple[dict[str, Tensor], int]:
        """The sums and the number of steps since the last time, and start over."""
        taken = self._done, self.num_steps
        self._done, self.num_steps = {}, 0
        return taken

    def take_over_processes(self, accelerator: Accelerator) -> tuple[dict[str, list[float]], int]:
        """As `take`, with the sums added up over all processes, which hold the same names, and as numbers."""
        values, num_steps = self.take()
        if not values:
            return {}, num_steps
        names = sorted(values)
        flat = torch.cat([values[name].reshape(-1).to(accelerator.device) for name in names])
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(flat, reduction="sum")
        split = flat.split([values[name].numel() for name in names])
        return {name: value.tolist() for name, value in zip(names, split, strict=True)}, num_steps

    def state(self, accelerator: Accelerator | None = None) -> dict[str, object]:
        """The sums over all processes as JSON-ready numbers; 64-bit floats survive JSON exactly."""
        sums = {name: self._done[name] for name in sorted(self._done)}
        if accelerator is not None and accelerator.num_processes > 1:
            sums = {name: accelerator.reduce(value.to(accelerator.device), "sum") for name, value in sums.items()}
        return {"num_steps": self.num_steps, "sums": {name: value.tolist() for name, value in sums.items()}}

    def restore(self, state: dict, device: torch.device, *, share: float = 1.0) -> None:
        """Go on from what `state` returned; of several processes one takes all of it and the others nothing."""
        self._pending = {}
        self.num_steps = state["num_steps"]
        self._done = {
            name: share * torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in state["sums"].items()
        }


class MetricsFile:
    """metrics.jsonl: one row per log step or evaluation, each with its stage and step.

    Args:
        path: the file; made on the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, object]) -> None:
        """Add a row at the end; what is not finite becomes null, since JSON has no NaN."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        """All whole rows; a last line that was cut off by a crash is left out."""
        return self.rows_after(0)[0]

    def rows_after(self, place: int) -> tuple[list[dict], int]:
        """Whole rows from a byte of the file on, and the byte after the last of them."""
        if not self.path.is_file():
            return [], place
        with self.path.open("rb") as file:
            file.seek(place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.split(b"\n") if line], place + len(whole)

    def cut(self, stage: str, *, step: int) -> None:
        """Drop what a stage wrote after a checkpoint that is now resumed.

        Args:
            stage: name of the stage that goes on; rows of stages before it stay.
            step: the checkpoint's step; its own log row stays, and what was changed right after it; an evaluation at
                it is made again.
        """
        kept, reached = [], False
        for row in self.rows():
            reached = reached or row["stage"] == stage
            in_time = row["step"] < step or (row["step"] == step and row["kind"] != "eval")
            if not reached or (row["stage"] == stage and in_time):
                kept.append(row)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

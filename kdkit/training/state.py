"""What a stage remembers besides weights, and how a checkpoint holds it."""

import json
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from kdkit.training.averaging import WeightAverage
from kdkit.training.early_stopping import EarlyStopping
from kdkit.training.metrics import RunningSums
from kdkit.training.rollout import Rollout

STATE_FILE = "kdkit_state.json"


@dataclass
class StageState:
    """Sums, counts, rollout and evaluations of a stage that goes on."""

    sums: RunningSums
    """Of the next log row."""
    rollout: Rollout | None
    average: WeightAverage | None
    early_stopping: EarlyStopping | None
    num_skipped_steps: int = 0

    def collect(self, accelerator: Accelerator) -> str:
        """What `write` will need, as JSON; every process has to ask."""
        numbers = {
            "sums": self.sums.state(accelerator),
            "num_skipped_steps": self.num_skipped_steps,
            "num_averaged": 0 if self.average is None else self.average.num_updates,
            "evaluations": [] if self.early_stopping is None else self.early_stopping.evaluations,
        }
        return json.dumps(numbers)

    def write(self, folder: Path, collected: str) -> None:
        """Write what was collected, and the rollout as it was at the last complete step."""
        (folder / STATE_FILE).write_text(collected, encoding="utf-8")
        if self.rollout is not None:
            self.rollout.save(folder)

    def restore(self, folder: Path, accelerator: Accelerator, *, step: int) -> None:
        """Go on as a checkpoint of so many steps left it."""
        numbers = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self.sums.restore(numbers["sums"], accelerator.device, share=float(accelerator.is_main_process))
        self.num_skipped_steps = numbers["num_skipped_steps"]
        if self.average is not None:
            self.average.num_updates = numbers["num_averaged"]
        if self.early_stopping is not None:
            self.early_stopping.restore(numbers["evaluations"], step=step)
        if self.rollout is not None:
            self.rollout.restore(folder)

"""When a stage has stopped getting better, and which of its students it then leaves: the one of its best evaluation.

The evaluations are remembered with their steps, so that one which a resumed run makes again counts once.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kdkit.config import EarlyStoppingConfig
from kdkit.training import checkpoint
from kdkit.training.saving import StageWriter

PREFIX = "best-"
"""Of the folder with the student of the best evaluation; its step follows."""
FIGURE_FILE = "best.json"
HIGHER_IS_BETTER = {"rouge_l": True, "cross_entropy": False}


@dataclass(frozen=True)
class BestStudent:
    """A student on disk that no later evaluation has beaten."""

    folder: Path
    step: int
    value: float
    """Of the metric."""


class EarlyStopping:
    """Watches a metric at evaluations.

    Args:
        config: metric, patience and least gain.
        folder: the stage's, where the best student lies.
    """

    def __init__(self, config: EarlyStoppingConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.evaluations: list[tuple[int, float | None]] = []
        """Completed steps and value, None where that was not finite."""
        self.best = self._best_of(folder.glob(f"{PREFIX}*"))

    def observe(self, step: int, figures: Mapping[str, float]) -> bool:
        """Take up an evaluation.

        Args:
            step: completed optimizer steps; what was observed from there on is forgotten.
            figures: with the metric.
        Returns:
            Whether its student is to be kept as the best; `self.best` is that student already.
        """
        value = figures[self.config.metric]
        self._forget_from(step)
        self.evaluations.append((step, value if math.isfinite(value) else None))
        if not math.isfinite(value) or (self.best is not None and self._gain(value, self.best.value) <= 0):
            return False
        self.best = BestStudent(self.folder / f"{PREFIX}{step}", step, value)
        return True

    @property
    def is_exhausted(self) -> bool:
        """Whether the last `patience` evaluations brought nothing."""
        level, num_fruitless = None, 0
        for _, value in self.evaluations:
            if value is not None and (level is None or self._gain(value, level) > self.config.min_delta):
                level, num_fruitless = value, 0
            else:
                num_fruitless += 1
        return num_fruitless >= self.config.patience

    def say(self, *, is_last: bool) -> str | None:
        """What a reader has to know after the last evaluation taken up, if anything.

        Args:
            is_last: the stage has no further step.
        """
        (step, _), best, config = self.evaluations[-1], self.best, self.config
        left = "the stage leaves the student of this step"
        if best is not None:
            left = f"the stage leaves the student of step {best.step}, its best ({config.metric} {best.value:.4g})"
        if is_last:
            return None if best is None or best.step == step else left
        if not self.is_exhausted:
            return None
        margin = f" by more than {config.min_delta:g}" if config.min_delta else ""
        return f"stopped early: {config.patience} evaluations without a better {config.metric}{margin}; {left}"

    def keep(self, writer: StageWriter, save: Callable[[str], None], *, estimated_bytes: int) -> None:
        """Write the best student, which is the model's of now, in place of the one before.

        Args:
            writer: of the stage.
            save: writes the model's student into a folder.
            estimated_bytes: room that it needs.
        """
        assert self.best is not None
        with writer.staged(PREFIX, self.best.step, estimated_bytes=estimated_bytes) as staged:
            save(str(staged))
            if writer.is_writing:
                figure = {"metric": self.config.metric, "value": self.best.value, "step": self.best.step}
                (staged / FIGURE_FILE).write_text(json.dumps(figure), encoding="utf-8")
            writer.publish(staged)
            if writer.is_writing:
                for beaten in set(self.folder.glob(f"{PREFIX}*")) - {self.best.folder}:
                    shutil.rmtree(beaten)

    def restore(self, evaluations: Iterable[tuple[int, float | None]], *, step: int) -> None:
        """Go on from a checkpoint, which holds the evaluations; one at its own step is made again."""
        self.evaluations = [(at, value) for at, value in evaluations]
        self._forget_from(step)

    def _forget_from(self, step: int) -> None:
        self.evaluations = [(at, value) for at, value in self.evaluations if at < step]

    def _gain(self, value: float, over: float) -> float:
        return value - over if HIGHER_IS_BETTER[self.config.metric] else over - value

    def _best_of(self, folders: Iterable[Path]) -> BestStudent | None:
        """The best whole student; a kill while one took another's place leaves both."""
        best = None
        for folder in filter(checkpoint.is_whole, folders):
            figure = json.loads((folder / FIGURE_FILE).read_text(encoding="utf-8"))
            if best is None or self._gain(figure["value"], best.value) > 0:
                best = BestStudent(folder, figure["step"], figure["value"])
        return best

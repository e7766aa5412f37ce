"""How much of the training is the student's own text: DistiLLM's threshold, and a rule that takes it back."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kdkit.config import CollapseConfig

Reference = Literal["initial", "previous", "best", "last_fired"]
ReplayRatio = Literal["constant", "decreasing", "increasing", "none"]
SMALLEST = 0.01
"""A threshold taken back below this is 0."""


class Shares(NamedTuple):
    """Probabilities of a batch."""

    fresh: float
    """Of being generated now."""
    student: float
    """Of being the student's text at all, fresh or replayed."""


def shares(threshold: float, fraction: float, replay_ratio: ReplayRatio) -> Shares:
    """How a threshold φ is shared between fresh and replayed text after a fraction t/T of the stage.

    fresh = φ/2 | φ(1 − t/T) | φ t/T | φ, student = φ. The names are DistiLLM's and speak of the fresh share; "none" is
    ours, and replays nothing.

    Args:
        threshold: φ, 0..1.
        fraction: t/T in optimizer steps, 0..1.
        replay_ratio: "constant", "decreasing", "increasing" or "none".
    Returns:
        Shares, fresh at most student.
    Source: Ko et al. 2024, arXiv:2402.03898, and its code. Differs: t counts optimizer steps, not micro-batches.
    """
    fresh = {"constant": 0.5, "decreasing": 1.0 - fraction, "increasing": fraction, "none": 1.0}[replay_ratio]
    return Shares(threshold * fresh, threshold)


@dataclass
class AdaptiveThreshold:
    """DistiLLM's φ: it rises by a step whenever the validation loss L rises by ε above a reference.

    if L >= L_ref + ε: φ <- min(φ + step, cap)

    L_ref is the first L ("initial"), the one before ("previous", as in the paper), the lowest so far ("best"), or
    the last one that fired, at first the first one ("last_fired", as in the code).

    Source: Ko et al. 2024, arXiv:2402.03898, algorithm 1, and its code.
    """

    value: float
    """φ."""
    step: float = 0.1
    cap: float = 1.0
    epsilon: float = 0.1
    """Nats a token."""
    reference: Reference = "last_fired"
    level: float | None = None
    """L_ref; None before the first observation, which fires nothing."""

    def observe(self, loss: float, *, may_rise: bool = True) -> bool:
        """Take up a validation loss.

        Args:
            loss: cross-entropy in nats a token; one that is not finite is left out.
            may_rise: False keeps φ whatever the loss; the reference moves all the same.
        Returns:
            Whether φ rose.
        """
        if not math.isfinite(loss):
            return False
        if self.level is None:
            self.level = loss
            return False
        fired = loss >= self.level + self.epsilon
        if self.reference == "previous" or (self.reference == "last_fired" and fired):
            self.level = loss
        elif self.reference == "best":
            self.level = min(self.level, loss)
        if fired and may_rise and self.value < self.cap:
            self.value = min(self.value + self.step, self.cap)
            return True
        return False


@dataclass
class TextCounts:
    """What became of the student's texts since the last evaluation."""

    num_texts: int = 0
    """Generated."""
    num_trained: int = 0
    """Trained on, fresh or replayed."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> texts."""

    @property
    def num_passed(self) -> int:
        """Texts that the guard let through."""
        return self.num_texts - self.refused.total()

    def reasons(self) -> str:
        """Why texts were refused, the commonest reason first."""
        return ", ".join(f"{reason} {count}" for reason, count in self.refused.most_common())


@dataclass
class CollapseRule:
    """Finds out at evaluations that the student's text does harm: ROUGE-L falls, or the guard's pass rate does, and
    the next evaluation finds it too."""

    config: CollapseConfig
    best_rouge_l: float | None = None
    """Percent."""
    best_threshold: float = 0.0
    """φ under which that was reached; 0 where none of the student's text had been trained on."""
    has_passed: bool = False
    """Whether the pass rate was ever high enough, so that it can fall."""
    num_falls: int = 0
    """Evaluations in a row that found a fall; one that can say nothing leaves it."""

    def observe(self, rouge_l: float | None, texts: TextCounts, *, threshold: float) -> str | None:
        """Take up an evaluation.

        Args:
            rouge_l: of the validation rows, in percent; None where it was not measured.
            texts: since the last evaluation; where none was trained on, no fall is blamed on them.
            threshold: φ up to now.
        Returns:
            What fell, or None; it is a collapse where `is_collapse` holds.
        """
        reason, best = self._fallen_pass_rate(texts), self.best_rouge_l
        is_low = False
        if rouge_l is not None and best is not None:
            is_low = rouge_l < best * (1.0 - self.config.max_rouge_drop_fraction)
            if is_low and texts.num_trained:
                reason = f"ROUGE-L fell from {best:.1f} to {rouge_l:.1f}"
        if reason is not None:
            self.num_falls += 1
        elif not is_low and (rouge_l is not None or texts.num_texts >= self.config.min_texts):
            self.num_falls = 0
        if rouge_l is not None and (best is None or rouge_l > best):
            self.best_rouge_l, self.best_threshold = rouge_l, threshold if texts.num_trained else 0.0
        return reason

    @property
    def is_collapse(self) -> bool:
        """Whether a fall was found often enough to be no dip."""
        return self.num_falls >= self.config.patience

    def _fallen_pass_rate(self, texts: TextCounts) -> str | None:
        """What the guard's pass rate fell to; without a guard every text passes."""
        if texts.num_texts < self.config.min_texts:
            return None
        fraction = texts.num_passed / texts.num_texts
        if fraction >= self.config.min_pass_fraction:
            self.has_passed = True
            return None
        return f"the guard let only {fraction:.0%} of {texts.num_texts} texts pass" if self.has_passed else None

    def take_back(self, threshold: float, rouge_l: float | None) -> float:
        """Where φ goes after a collapse: to what it was at the best ROUGE-L, and to half of what it is at most.

        The ROUGE-L of now becomes the one to fall below: a slow recovery is no further collapse.
        """
        lowered = min(self.best_threshold, threshold / 2)
        lowered = 0.0 if lowered < SMALLEST else lowered
        self.num_falls = 0
        if rouge_l is not None:
            self.best_rouge_l, self.best_threshold = rouge_l, lowered
        return lowered

"""What of the student's text may be trained on, and why the rest may not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from kdkit.config import GuardConfig
from kdkit.data.batch import EncodedRow
from kdkit.evaluation import rouge_l
from kdkit.training.rollout.generator import StudentText

Reason = Literal["outside_vocabulary", "too_short", "no_end", "repeats", "unlikely", "unlike_reference"]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""In the order in which they are looked for; a text is refused for the first that holds."""

Score = Callable[[Sequence[EncodedRow]], Sequence[float]]
"""Teacher's mean log-likelihood of each row's response, in nats a token."""


@dataclass(frozen=True)
class Verdict:
    """Whether a text may be trained on."""

    reason: Reason | None
    """Why not; None: it may."""
    repeat_fraction: float
    """Share of its n-grams that occurred in it before."""
    score: float
    """Teacher's mean log-likelihood in nats a token; NaN where it was not asked for."""


def repeat_fractions(sequences: Sequence[Sequence[int]], ngram: int) -> np.ndarray:
    """Share of each sequence's n-grams that occurred in it before.

    1 − (different n-grams) / (n-grams). 0 for a sequence without any.

    Args:
        sequences: token ids, ragged.
        ngram: tokens of one n-gram.
    Returns:
        (len(sequences),) float64, 0..1.
    """
    counts = np.array([max(len(sequence) - ngram + 1, 0) for sequence in sequences])  # (R,)
    if not counts.any():
        return np.zeros(len(sequences))
    flat = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    lengths = np.array([len(sequence) for sequence in sequences])
    owner = np.repeat(np.arange(len(sequences)), counts)  # (G,)
    begins = np.repeat(np.cumsum(lengths) - lengths, counts) + _counted_up(counts)  # (G,)
    grams = np.column_stack([owner, flat[begins[:, None] + np.arange(ngram)]])  # (G, 1 + ngram)
    different = np.bincount(np.unique(grams, axis=0)[:, 0], minlength=len(sequences))
    return np.where(counts > 0, 1.0 - different / np.maximum(counts, 1), 0.0)


class Guard:
    """Judges texts before they are trained on or kept.

    Args:
        config: what is asked of a text; None asks nothing but that the teacher can read it.
        score: how likely the teacher finds rows; None where nothing asks for it.
        references: right answers by row id; None where nothing asks for them.
        vocab_size: ids below it mean the same to the teacher; None: all do.
    """

    def __init__(
        self,
        config: GuardConfig | None,
        *,
        score: Score | None = None,
        references: Sequence[Sequence[str]] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        assert config is None or config.min_teacher_logprob is None or score is not None
        assert config is None or config.min_rouge_l is None or references is not None
        self.config = config
        self.score = score
        self.references = references
        self.vocab_size = vocab_size

    def __call__(self, texts: Sequence[StudentText]) -> list[Verdict]:
        """A verdict for each text; the teacher reads only those that nothing cheaper refuses."""
        ngram = (self.config or GuardConfig()).ngram
        repeats = repeat_fractions([text.response_ids for text in texts], ngram).tolist()
        reasons = [self._plain_reason(text, own) for text, own in zip(texts, repeats, strict=True)]
        scores = self._scores(texts, reasons)
        return [
            Verdict(reason or self._costly_reason(text, score), own, score)
            for text, reason, own, score in zip(texts, reasons, repeats, scores, strict=True)
        ]

    def _plain_reason(self, text: StudentText, repeat_fraction: float) -> Reason | None:
        """Why a text may not be trained on, from its tokens alone."""
        if not text.response_ids:  # nothing that teacher and student both have tokens for
            return "too_short"
        if self.vocab_size is not None and max(text.response_ids) >= self.vocab_size:
            return "outside_vocabulary"
        if self.config is None:
            return None
        if len(text.response_ids) < self.config.min_tokens:
            return "too_short"
        if self.config.require_end and not text.ended:
            return "no_end"
        return "repeats" if repeat_fraction > self.config.max_repeat_fraction else None

    def _scores(self, texts: Sequence[StudentText], reasons: Sequence[Reason | None]) -> list[float]:
        """The teacher's opinion of the texts that are not refused yet, NaN for the others."""
        scores = [float("nan")] * len(texts)
        open_ = [index for index, reason in enumerate(reasons) if reason is None]
        if self.score is not None and open_:
            for index, score in zip(open_, self.score([texts[index].row for index in open_]), strict=True):
                scores[index] = score
        return scores

    def _costly_reason(self, text: StudentText, score: float) -> Reason | None:
        """Why a text may not be trained on, as the teacher or the right answer sees it."""
        if self.config is None:
            return None
        if self.config.min_teacher_logprob is not None and not score >= self.config.min_teacher_logprob:  # NaN: no
            return "unlikely"
        if self.config.min_rouge_l is not None:
            assert self.references is not None
            right = self.references[text.row["row_id"]]
            if right and rouge_l(text.text, right) < self.config.min_rouge_l:
                return "unlike_reference"
        return None


def _counted_up(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., count − 1 for each count, end to end."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)

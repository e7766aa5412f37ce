"""A teacher with another tokenizer: what it says at the spans of bytes that both sides agree on."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kdkit.teacher.signal import DenseSignal, Features, LiveSignal, moved


@dataclass(frozen=True, eq=False)
class CrossSignal:
    """The teacher at the M counted positions of its own reading of a text, which make up S spans."""

    whole: DenseSignal | LiveSignal
    """At all M positions."""
    targets: Tensor
    """(M,) ids of the teacher's that these positions predict."""
    span_starts: np.ndarray
    """(S,) the first position of each span, on the host."""
    device: torch.device
    """The student's; what is asked of the signal comes there."""
    chunk_tokens: int = 256
    """Positions whose logits exist at a time."""

    @property
    def hidden_states(self) -> Tensor | None:
        """(B, S, H) final hidden states of the teacher's tokens."""
        return self.whole.hidden_states

    @property
    def features(self) -> Features:
        """What else of the teacher's inside was asked for."""
        return self.whole.features

    @cached_property
    def starts(self) -> DenseSignal | LiveSignal:
        """The signal at the first position of each span, in order: there both models have read the same bytes."""
        if isinstance(self.whole, DenseSignal):
            return DenseSignal(self.whole.logits.index_select(0, self._index(self.whole.logits.device)))
        return LiveSignal(self.whole.hidden.index_select(0, self._index(self.whole.hidden.device)), self.whole.head)

    @cached_property
    def span_logprobs(self) -> Tensor:
        """(S,) float32 how likely the teacher finds the text of each span, in nats, at temperature 1.

        The sum of its conditional log-probabilities within the span: exact for the tokens that its tokenizer makes.
        """
        lengths = np.diff(np.append(self.span_starts, len(self.targets)))
        spans = moved(torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)), self.device)  # (M,)
        return self.logprobs.new_zeros(len(lengths)).index_add_(0, spans, self.logprobs)

    @property
    def logprobs(self) -> Tensor:
        """(M,) float32 log-probability of each target, at temperature 1."""
        return self._read[0]

    @property
    def entropies(self) -> Tensor:
        """(M,) float32 entropy of the teacher at each of its positions, in nats, at temperature 1."""
        return self._read[1]

    @cached_property
    def _read(self) -> Tensor:
        """(2, M) log-probability of each target, and entropy; the logits of a few positions exist at a time."""
        found = torch.zeros(2, len(self.targets), device=self.device)
        targets = moved(self.targets, self.device)
        for start in range(0, len(targets), self.chunk_tokens):
            rows = slice(start, min(start + self.chunk_tokens, len(targets)))
            logprobs = self.whole.rows(rows.start, rows.stop, self.device).logprobs_at(1.0)  # (m, W)
            found[0, rows] = logprobs.gather(1, targets[rows, None]).squeeze(1)
            surprisal = logprobs.neg().clamp_max(torch.finfo(logprobs.dtype).max)  # 0 · inf, where p = 0, is to be 0
            found[1, rows] = (logprobs.exp() * surprisal).sum(1)
        return found

    def _index(self, device: torch.device) -> Tensor:
        return moved(torch.from_numpy(self.span_starts), device)

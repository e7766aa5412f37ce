"""How a token is drawn from the scores of the next one: one number a row, from a generator of its own."""

from typing import cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor, TopPLogitsWarper


class DrawToken(LogitsProcessor):
    """Draws the next token of each row and leaves it as the only one, for a greedy decoder to take.

    `generate` draws by torch.multinomial, which takes a random number for every entry of the vocabulary from the global
    state: on a CPU that takes longer than a small model's pass. Here the cumulative distribution is looked up at one.

    Args:
        temperature: divides the scores, above 0.
        top_p: nucleus, the likeliest tokens that together hold this share; 1: all.
        seed: of the draws.
        device: where the scores are.
    """

    def __init__(self, *, temperature: float, top_p: float, seed: int, device: torch.device) -> None:
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.generator = torch.Generator(device).manual_seed(seed)
        self.is_lost = torch.zeros((), dtype=torch.bool, device=device)
        """Whether scores were NaN or infinite at some token: what was drawn from them is no text. Looked at once."""

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """(B, V) 0 at the token that was drawn, -inf elsewhere."""
        scores = cast(FloatTensor, scores / self.temperature)
        if self.nucleus is not None:
            scores = self.nucleus(input_ids, scores)
        drawn = self._draw(scores.softmax(-1))
        return cast(FloatTensor, torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0))

    def _draw(self, probs: Tensor) -> Tensor:
        """(B, 1) ids; one of probability 0 is never among them."""
        sums = probs.cumsum(-1, dtype=torch.float64)  # (B, V); in float32 a long tail would be lost in rounding
        self.is_lost |= ~sums[:, -1].isfinite().all()
        shares = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=self.generator)
        drawn = torch.searchsorted(sums, shares * sums[:, -1:], right=True)  # the first sum above
        return drawn.clamp_(max=probs.shape[-1] - 1)

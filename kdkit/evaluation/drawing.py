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
        every = torch.arange(len(scores), device=scores.device)
        drawn = self.chosen(scores, rows=every, num_rows=len(scores))
        return cast(FloatTensor, torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0))

    def chosen(self, scores: Tensor, *, rows: Tensor, num_rows: int) -> Tensor:
        """One token for each of some rows; what a row gets does not depend on which others are asked for.

        Args:
            scores: (b, V) of the next token.
            rows: (b,) which of the batch's rows they are.
            num_rows: B, of the batch.
        Returns:
            (b,) ids; one of probability 0 is never among them.
        """
        scores = scores / self.temperature
        if self.nucleus is not None:
            scores = self.nucleus(cast(LongTensor, rows), cast(FloatTensor, scores))  # looks at the scores alone
        sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)  # (b, V); in float32 a long tail would be lost
        self.is_lost |= ~sums[:, -1].isfinite().all()
        shares = torch.rand(num_rows, 1, dtype=torch.float64, device=scores.device, generator=self.generator)[rows]
        drawn = torch.searchsorted(sums, shares * sums[:, -1:], right=True)  # the first sum above
        return drawn[:, 0].clamp_(max=scores.shape[-1] - 1)

"""What answering takes: the prompt's pass and the last of the new tokens, with the cache that it reads.

Writing looks at values between tokens, so no fake tensor passes through it; what it allocates is all here.
"""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def answer(model: PreTrainedModel, num_rows: int, prompt_tokens: int, new_tokens: int) -> None:
    """The passes that allocate the most, in kdkit's own loop as in `generate`.

    Args:
        model: in evaluation mode.
        num_rows: prompts answered together, times the beams.
        prompt_tokens: of the longest prompt.
        new_tokens: of an answer.
    """
    keeps_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = torch.ones(num_rows, prompt_tokens, dtype=torch.int64)
    output = model(input_ids=ids, attention_mask=_left_padded(num_rows, prompt_tokens), use_cache=True, **keeps_last)
    _scores(output.logits)
    cache = output.past_key_values
    del output
    for layer in cache.layers:
        if layer.keys is not None and new_tokens > 2:
            rows, heads, _, width = layer.keys.shape
            more = layer.keys.new_empty(rows, heads, new_tokens - 2, width)
            layer.update(more, layer.values.new_empty(*more.shape[:3], layer.values.shape[-1]))
    total = prompt_tokens + max(new_tokens, 2) - 1
    output = model(
        input_ids=ids[:, :1],
        attention_mask=_left_padded(num_rows, total),
        past_key_values=cache,
        use_cache=True,
        **keeps_last,
    )
    _scores(output.logits)


def _left_padded(num_rows: int, length: int) -> Tensor:
    """(B, T) mask; the last of several prompts is one token shorter."""
    mask = torch.ones(num_rows, length, dtype=torch.int64)
    if num_rows > 1:
        mask[-1, 0] = 0
    return mask


def _scores(logits: Tensor) -> Tensor:
    """(B, V) of the last token: in float32, and once more as they are sorted or drawn from."""
    last = logits[:, -1].to(torch.float32, copy=True)
    return last.softmax(-1)

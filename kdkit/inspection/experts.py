"""Which experts of an MoE teacher read what: over many rows, and word by word of one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkit.data.batch import Batch
from kdkit.data.encoding import encode_responses
from kdkit.data.spans import word_units
from kdkit.errors import UserError
from kdkit.loading import backbone_states
from kdkit.teacher.experts import capture_block_inputs, expert_outputs, find_moe_blocks

_ROWS_AT_A_TIME = 16


@dataclass(frozen=True, eq=False)
class WordExperts:
    """Where the words of a text were sent."""

    words: list[str]
    """W texts."""
    layers: list[int]
    """L indices of decoder layers with experts."""
    gates: np.ndarray
    """(L, W, E) share of a word that went to each expert: the block's gates, their sum made 1, mean over its tokens."""


@torch.no_grad()
def expert_shares(model: PreTrainedModel, batch: Batch) -> dict[int, np.ndarray]:
    """How the tokens of rows are spread over the experts of each layer.

    Args:
        model: an MoE model.
        batch: rows as it reads them; the last token of a row, which predicts nothing, is not counted.
    Returns:
        Layer -> (E,) share of the choices that tokens made, sum 1; 1/E each when evenly used.
    Raises:
        UserError: a dense model, or a family whose experts cannot be read.
    """
    blocks = find_moe_blocks(model)
    counts: dict[int, Tensor] = {}
    for start in range(0, len(batch["lengths"]), _ROWS_AT_A_TIME):
        ids, mask, read = (
            batch[name][start : start + _ROWS_AT_A_TIME].to(model.device)
            for name in ("input_ids", "attention_mask", "lengths")
        )
        kept = torch.arange(ids.shape[1], device=ids.device) < read[:, None] - 1  # (B, T)
        with capture_block_inputs(model, blocks) as inputs:
            backbone_states(model, ids, mask)
            for layer, block in blocks.items():
                chosen = expert_outputs(block, inputs[layer][kept])
                num_experts = chosen.router_probs.shape[1]
                found = chosen.ids.flatten().bincount(minlength=num_experts)  # (E,)
                counts[layer] = counts[layer] + found if layer in counts else found
    return {layer: (count / count.sum()).cpu().numpy() for layer, count in counts.items()}


@torch.no_grad()
def word_experts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    layers: Sequence[int] | None = None,
) -> WordExperts:
    """Which experts the words of a text are sent to.

    Args:
        model: an MoE model.
        tokenizer: its own, a fast one.
        text: what it reads.
        layers: indices of decoder layers; None: all that have experts.
    Returns:
        Words and their gates.
    Raises:
        UserError: a dense model, a layer without experts, or a text without words.
    """
    ((ids, offsets),) = encode_responses([text], tokenizer, wants_offsets=True)
    units = np.array(word_units(text, offsets), dtype=np.int64)  # (T,)
    num_words = int(units.max(initial=-1)) + 1
    if num_words == 0:
        raise UserError(f"the text {text!r} has no words: give one that has")
    blocks = find_moe_blocks(model)
    layers = list(blocks) if layers is None else list(layers)
    spans = np.array(offsets)
    words = [text[spans[units == u, 0].min() : spans[units == u, 1].max()].strip() for u in range(num_words)]
    of_token = torch.from_numpy(units).to(model.device)
    tokens = torch.tensor([ids], device=model.device)
    with capture_block_inputs(model, layers) as inputs:
        backbone_states(model, tokens, None)
        gates = [
            _word_gates(blocks[layer], inputs[layer][0][of_token >= 0], of_token[of_token >= 0], num_words)
            for layer in layers
        ]
    return WordExperts(words, layers, np.stack(gates))


@torch.no_grad()
def gated_sum_errors(model: PreTrainedModel, batch: Batch) -> dict[int, float]:
    """How far the gated sum of the experts' own outputs, kept apart, lies from what each block gives out.

    Args:
        model: an MoE model, in evaluation mode.
        batch: rows as it reads them.
    Returns:
        Layer -> largest difference of a number, as a fraction of the largest number in the block's output.
    Raises:
        UserError: a dense model, or a family whose experts cannot be read.
    """
    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    errors = {}
    with capture_block_inputs(model, blocks := find_moe_blocks(model)) as inputs:
        backbone_states(model, ids, mask)
        for layer, block in blocks.items():
            hidden = inputs[layer][mask.bool()]  # (N, H)
            apart, whole = expert_outputs(block, hidden), block(hidden[None])[0]
            together = (apart.gates[..., None] * apart.outputs).sum(1)
            together = together if apart.shared is None else together + apart.shared
            errors[layer] = ((together - whole).abs().max() / whole.abs().max()).item()
    return errors


def _word_gates(block: nn.Module, hidden: Tensor, words: Tensor, num_words: int) -> np.ndarray:
    """(W, E) from hidden (N, H) of tokens and the word of each (N,)."""
    chosen = expert_outputs(block, hidden)
    shares = chosen.gates.float() / chosen.gates.float().sum(1, keepdim=True)
    by_token = torch.zeros_like(chosen.router_probs).scatter_add(1, chosen.ids, shares)  # (N, E)
    sums = by_token.new_zeros(num_words, by_token.shape[1]).index_add_(0, words, by_token)
    return (sums / words.bincount(minlength=num_words)[:, None]).cpu().numpy()

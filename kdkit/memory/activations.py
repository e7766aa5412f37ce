"""What a decoder layer keeps for the backward pass, and what it needs in passing, in bytes per token.

The numbers were counted on the tensors of transformers 5.23, not derived: each family's layer was run at several
widths, and the bytes alive afterwards are these whole multiples of the widths, without a remainder. The tests count
them again. Half means autocast over float32 weights, as CUDA does it: the residual stream stays float32.
"""

from dataclasses import dataclass

from kdkit.memory.sizes import ModelSizes

HALF, SINGLE = 2, 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Kept:
    """Bytes that one layer keeps of one token, for each number of a width."""

    hidden: int
    inner: int
    query: int
    kv: int
    heads: int = 4
    """The softmax's normaliser, float32."""
    fixed: int = 8
    """The norms' scales."""

    def of(self, sizes: ModelSizes) -> int:
        """Bytes of a token in one layer."""
        widths = self.hidden * sizes.hidden + self.inner * sizes.intermediate
        attention = self.query * sizes.query_width + self.kv * sizes.kv_width + self.heads * sizes.num_heads
        return widths + attention + self.fixed


KEPT = {
    "llama": {HALF: Kept(26, 8, 4, 4), SINGLE: Kept(24, 16, 8, 8)},
    "qwen3": {HALF: Kept(26, 8, 10, 10, heads=10), SINGLE: Kept(24, 16, 16, 16, heads=10)},
    "gpt2": {HALF: Kept(16, 16, 2, 2, fixed=16), SINGLE: Kept(16, 20, 8, 8, fixed=16)},
    "gpt_neox": {HALF: Kept(16, 4, 2, 2, fixed=16), SINGLE: Kept(20, 8, 8, 8, fixed=16)},
}
"""By family and bytes of the products' numbers; other families as llama."""
KIN = {"qwen3_moe": "qwen3"}
OUTSIDE = 12
"""Bytes of a token for each number of the hidden width, kept outside the layers: embeddings and the last norm."""
MASK_OF_DROPOUT = 2
"""Masks of one byte a number that a layer keeps where the residual stream is dropped out."""


def kept_bytes(
    sizes: ModelSizes, *, num_rows: int, length: int, number: int, attention: str, repeats_kv: bool, checkpointing: bool
) -> int:
    """Activations of a forward pass that wait for the backward pass, without the weights' half-precision copies.

    Args:
        sizes: the model.
        num_rows: B.
        length: T, tokens of a row.
        number: HALF under autocast, SINGLE without.
        attention: "sdpa" or "eager".
        repeats_kv: whether shared keys and values are laid out for every head.
        checkpointing: whether layers keep their input alone; one layer at a time is then there again in full.
    Returns:
        Bytes.
    """
    num_tokens = num_rows * length
    per_layer = _layer_bytes(sizes, length=length, number=number, attention=attention, repeats_kv=repeats_kv)
    outside = OUTSIDE * sizes.hidden
    if checkpointing:
        return num_tokens * (sizes.num_layers * SINGLE * sizes.hidden + per_layer + outside)
    return num_tokens * (sizes.num_layers * per_layer + outside)


def _layer_bytes(sizes: ModelSizes, *, length: int, number: int, attention: str, repeats_kv: bool) -> int:
    """Bytes of a token in one layer; rows are padded, as in nearly every batch."""
    cost = KEPT.get(KIN.get(sizes.family, sizes.family), KEPT["llama"])[number]
    total = cost.of(sizes)
    if sizes.is_grouped and (repeats_kv or attention == "eager"):
        total += 2 * number * (sizes.query_width - sizes.kv_width)
    if attention == "eager":
        total += sizes.num_heads * (length * _score_bytes(sizes, number) - SINGLE)
    else:  # what is added to the scores of padded rows, one for all heads
        total += length * number
    if sizes.num_experts:  # the tokens' copies on their way through the experts
        total += (sizes.experts_per_token - 1) * (cost.inner * sizes.intermediate + 2 * number * sizes.hidden)
    if sizes.dropout:
        total += MASK_OF_DROPOUT * sizes.hidden
    return total


def _score_bytes(sizes: ModelSizes, number: int) -> int:
    """Of one entry of a written-down attention map: the softmax in float32, what is cast of it, what dropout keeps."""
    if number == HALF:
        return SINGLE + HALF + (1 if sizes.dropout else 0)
    return SINGLE + (SINGLE + 1 if sizes.dropout else 0)


def backward_bytes(sizes: ModelSizes, *, num_tokens: int, number: int) -> int:
    """Gradients of activations that are alive at one time while going back through a layer."""
    inner = 2 * number * sizes.intermediate if number == HALF else 9 * sizes.intermediate
    return num_tokens * max(16 * sizes.hidden, inner)


def passing_bytes(
    sizes: ModelSizes, *, num_rows: int, length: int, number: int, attention: str, all_layers: bool = False
) -> int:
    """The most that a pass without gradients has alive at one time.

    Args:
        sizes: the model.
        num_rows: B.
        length: T, tokens of a row.
        number: bytes of a number of its weights.
        attention: "sdpa" or "eager".
        all_layers: whether the states of all layers are kept.
    """
    num_tokens = num_rows * length
    copies = max(sizes.experts_per_token, 1)
    through = number * (2 * sizes.hidden)  # the residual stream and what a block adds to it
    norm = 2 * SINGLE * sizes.hidden + number * sizes.hidden
    feed_forward = number * copies * (3 * sizes.intermediate + (sizes.hidden if copies > 1 else 0))
    attend = number * (2 * sizes.query_width + 2 * max(sizes.kv_width, sizes.query_width))
    if attention == "eager":
        attend += sizes.num_heads * length * (SINGLE + number)
    kept = number * sizes.hidden * (sizes.num_layers + 1) if all_layers else 0
    return num_tokens * (through + max(norm, feed_forward, attend) + kept)


def kv_cache_bytes(sizes: ModelSizes, *, num_rows: int, length: int, number: int) -> int:
    """Keys and values of all layers."""
    return 2 * num_rows * length * sizes.num_layers * sizes.kv_width * number

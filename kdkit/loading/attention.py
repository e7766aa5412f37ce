"""torch's attention as kdkit's models use it: over rows packed into one, and on cards without a flash kernel.

Of packed rows only the attention knows where one ends. It lays them out with padding, which no token looks at, and
packs what it found: all else of a pass, which is most of it, works on tokens alone.

Where heads share keys and values and there is no mask, transformers hands torch the shared keys as they are. Of torch's
kernels the flash one alone reads them so, and it wants half precision and capability 8.0; on a T4 or a P100, and in
float32 anywhere, torch goes over to the one that writes down all (B, heads, T, T) scores, in float32, without a word
(transformers #48633). Laid out for every head, the same keys go through the memory-efficient kernel.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdkit.runtime import FLASH_CAPABILITY

UNGROUPED, PACKED = "sdpa_ungrouped", "sdpa_packed"
"""`attend` as transformers knows it: in any model, and in one that was seen to find the same for packed rows."""


@dataclass(frozen=True, eq=False)
class PackedRows:
    """B rows of T places, of which L hold a token, and how to do without the others."""

    tokens: Tensor
    """(L,) ascending flat indices b * T + t of the tokens; each row's stand at its begin."""
    num_rows: int
    width: int

    def packed(self, laid_out: Tensor) -> Tensor:
        """(B, T, ...) -> (1, L, ...)"""
        return laid_out.flatten(0, 1).index_select(0, self.tokens)[None]

    def laid_out(self, packed: Tensor) -> Tensor:
        """(1, L, ...) -> (B, T, ...), 0 where there is no token."""
        places = packed.new_zeros(self.num_rows * self.width, *packed.shape[2:])
        return places.index_copy(0, self.tokens, packed[0]).unflatten(0, (self.num_rows, self.width))


def spread_shared_keys(model: PreTrainedModel) -> None:
    """Have a model that uses torch's attention use it without shared keys where they would cost (T, T) scores.

    Args:
        model: on its device; others than torch's attention are left as they are.
    """
    if model.config._attn_implementation == "sdpa":
        use(model, UNGROUPED)


def use(model: PreTrainedModel, name: str) -> None:
    """Have a model use an attention of transformers' or one of `UNGROUPED` and `PACKED`."""
    if name in (UNGROUPED, PACKED):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """torch's attention, as transformers calls it.

    Args:
        module: the attention layer.
        query: (B, heads, T, D); of packed rows (1, heads, L, D), and likewise below.
        key: (B, kv_heads, S, D)
        value: (B, kv_heads, S, D)
        attention_mask: None where it is causal and nothing is padded; not looked at where rows are packed.
        packed_rows: where the one row holds several.
        **options: dropout, scaling and the like.
    Returns:
        (B, T, heads, D), and no attention map.
    """
    if packed_rows is not None:
        query, key, value = (packed_rows.laid_out(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
        seen, _ = attend(module, query, key, value, None, None, **options)
        return packed_rows.packed(seen), None
    groups = query.shape[1] // key.shape[1]
    if attention_mask is not None or groups == 1 or has_flash(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    plain = SimpleNamespace(is_causal=getattr(module, "is_causal", True), training=module.training)
    if query.shape[2] > 1:
        key, value = (shared.repeat_interleave(groups, dim=1) for shared in (key, value))
        return sdpa_attention_forward(plain, query, key, value, None, **options)
    # One new token: the heads that share a key stand side by side as if they were tokens, and nothing is copied.
    packed = query.view(query.shape[0], key.shape[1], groups, query.shape[3])  # (B, kv_heads, groups, D)
    seen, _ = sdpa_attention_forward(plain, packed, key, value, None, **{**options, "is_causal": False})
    return seen.transpose(1, 2).reshape(query.shape[0], 1, query.shape[1], query.shape[3]), None


def has_flash(query: Tensor) -> bool:
    """Whether torch has a kernel for this query that reads shared keys as they are; on a CPU it always has."""
    if query.device.type != "cuda":
        return True
    return query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY

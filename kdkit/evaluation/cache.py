"""The keys and values that a model keeps while it writes, in tensors that have room for all of the answer."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, written into tensors made once.

    transformers' own layer lays old and new end to end at every token: all of it is copied for each, and for a moment
    there twice. What is returned has the same values and is a view.

    Args:
        room: tokens of prompt and answer; further ones fall back to copying.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._held: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add tokens, (B, heads, T, D) each; returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.room:
            self._held = None
            return super().update(key_states, value_states, *args, **kwargs)
        if self._held is None:
            self._held = _room_for(key_states, self.room), _room_for(value_states, self.room)
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[..., start:end, :] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch alone."""
        if self._held is None:
            super().batch_select_indices(indices)
            return
        num_tokens = self.get_seq_length()
        self._held = self._held[0][indices], self._held[1][indices]
        self._show(num_tokens)

    def _show(self, num_tokens: int) -> None:
        assert self._held is not None
        self.keys, self.values = (held[..., :num_tokens, :] for held in self._held)


def roomy_cache(model: PreTrainedModel, num_tokens: int, *, num_beams: int = 1) -> DynamicCache | None:
    """The cache that `generate` would make, with room for so many tokens in layers that keep all of them.

    Layers that keep a window, or a state instead of keys, stay as transformers makes them.

    Args:
        model: that writes.
        num_tokens: of prompt and answer.
        num_beams: several are reordered at every token, which copies all of it anyway.
    Returns:
        A cache for one call; None for beams and for a model that has one of its own kind.
    """
    if num_beams > 1 or not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(num_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _room_for(states: Tensor, room: int) -> Tensor:
    """(B, heads, room, D), not filled."""
    return torch.empty(*states.shape[:-2], room, states.shape[-1], dtype=states.dtype, device=states.device)

"""Token after token for a batch of prompts, in a loop of kdkit's own where a model allows it.

transformers' `generate` does more at every token than most models need: it makes a mask anew, copies what is written so
far, and carries rows that have ended along until the last one has. On a small model that takes as long as the model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel

from kdkit.evaluation.cache import RoomyLayer
from kdkit.evaluation.drawing import DrawToken
from kdkit.loading.backbone import takes_packed_rows

TOKENS_A_LOOK = {"cpu": 1}
TOKENS_A_LOOK_ELSEWHERE = 8
"""After as many tokens is it asked which rows have ended: a card must have caught up for that."""
CHANGING_ROPES = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that depend on the longest row of a batch."""


def can_write(model: PreTrainedModel, cache: Cache, num_tokens: int) -> bool:
    """Whether `write` does for a model what `generate` would do.

    Args:
        model: as `kdkit.loading.load_model` leaves it.
        cache: of `kdkit.evaluation.cache.roomy_cache`.
        num_tokens: of prompt and answer.
    Returns:
        True where its attention takes masks and positions as packed rows have them, all its layers keep all tokens, a
        row depends on no other one, and `generate` would do nothing of the model's own or change how its experts run.
    """
    return (
        type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and not CHANGING_ROPES & _rope_types(model)
        and all(type(layer) is RoomyLayer for layer in cache.layers)
        and takes_packed_rows(model, num_tokens)
        and model._supports_logits_to_keep()
        and (model.device.type == "cpu" or "grouped_mm" not in model.get_experts_implementation().values())
    )


def _rope_types(model: PreTrainedModel) -> set[str]:
    """Of all its layers."""
    given = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer = [own for own in (given, *given.values()) if isinstance(own, Mapping)]
    return {str(own["rope_type"]) for own in by_layer if "rope_type" in own}


@torch.no_grad()
def write(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor,
    cache: Cache,
    max_new_tokens: int,
    end_ids: list[int],
    draw: DrawToken | None,
) -> Tensor:
    """The answers of a batch; once at most half of the rows carried still write, the others are left out.

    Args:
        model: one that `can_write`, in evaluation mode.
        input_ids: (B, T) prompts, padded on the left.
        attention_mask: (B, T) 1 for a token and 0 for padding.
        cache: new, of `roomy_cache`; its rows are fewer afterwards.
        max_new_tokens: of an answer.
        end_ids: tokens that end one.
        draw: what chooses tokens; None: the likeliest.
    Returns:
        (B, max_new_tokens) or fewer columns; what stands behind the first end of a row is no text.
    """
    batch, width = input_ids.shape
    device, ends = input_ids.device, torch.tensor(end_ids, device=input_ids.device)
    written = torch.full((batch, max_new_tokens), end_ids[0], device=device)
    rows, ended = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.bool, device=device)
    is_padded = not bool(attention_mask.all())
    # What a new token may look at, (b, 1, 1, T + max_new_tokens): in four dimensions transformers takes it as it is.
    seen = torch.cat([attention_mask.bool(), attention_mask.new_ones(batch, max_new_tokens).bool()], 1)[:, None, None]
    tokens, mask = input_ids, attention_mask if is_padded else None
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (b, T), later (b, 1)
    tokens_a_look = TOKENS_A_LOOK.get(device.type, TOKENS_A_LOOK_ELSEWHERE)
    for column in range(max_new_tokens):
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        scores = output.logits[:, -1].float()  # (b, V)
        chosen = scores.argmax(-1) if draw is None else draw.chosen(scores, rows=rows, num_rows=batch)  # (b,)
        written[rows, column] = chosen
        ended = ended | torch.isin(chosen, ends)
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        if (column + 1) % tokens_a_look == 0 and column + 1 < max_new_tokens:
            at_work = (~ended).nonzero()[:, 0]
            if not len(at_work):
                return written[:, : column + 1]
            if 2 * len(at_work) <= len(rows):
                cache.batch_select_indices(at_work)
                rows, ended, seen = rows[at_work], ended[at_work], seen[at_work]
                tokens, positions = tokens[at_work], positions[at_work]
        mask = seen[..., : width + column + 1] if is_padded else None
    return written

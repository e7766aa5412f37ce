"""A model's pass up to its head: last hidden states, and what else of its inside is asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from kdkit.errors import UserError
from kdkit.loading.attention import PACKED, UNGROUPED, PackedRows
from kdkit.teacher.signal import NO_VIEWS, Views

MOST_TOKENS, MOST_WITH_LAYERS = 0.8, 0.75
"""Of all places, for a pass to leave padding out; the latter where all layers are asked for. With more it would still
be faster, up to 0.92, and need more memory than with padding, which is what is planned for: the attention's inputs are
kept laid out."""


@dataclass(frozen=True, eq=False)
class States:
    """What a pass over B rows of T tokens showed."""

    last: Tensor
    """(B, T, H) as the head sees them, after the last norm."""
    layers: tuple[Tensor, ...] | None = None
    """(B, T, H) each, the embeddings first, the last one after the final norm; None where not asked for."""
    attentions: tuple[Tensor, ...] | None = None
    """(B, heads, T, T) each, probabilities; None where not asked for."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that what is learnt between two models depends on."""

    head_size: int
    """Width of the states that the head sees."""
    hidden_size: int
    """Width of every layer's states."""
    num_layers: int
    num_experts: int | None = None
    """Experts of each MoE block; None in a dense model."""


def backbone_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    views: Views = NO_VIEWS,
    tokens: Tensor | None = None,
) -> States:
    """The states of a pass, with gradient where it is enabled.

    Args:
        model: a causal language model.
        input_ids: (B, T) on the model's device.
        attention_mask: (B, T), 1 for a token and 0 for padding on the right; None when nothing is padded, or where
            nobody reads the states of padding: a causal model's tokens never look there.
        views: what is asked for besides the last states.
        tokens: (L,) ascending flat indices b * T + t of the tokens. Where they are given, the model allows it
            (`kdkit.loading.heads.allow_packing`) and enough is padding, the pass leaves padding out, and the states
            of padding are 0. Not where hooks count on (B, T).
    Returns:
        `States` in the model's compute dtype.
    Raises:
        UserError: attention maps are asked for and the model gives none.
    """
    most = MOST_WITH_LAYERS if views.layers else MOST_TOKENS
    if tokens is not None and len(tokens) <= most * input_ids.numel() and takes_packed_rows(model, input_ids.shape[1]):
        return packed_states(model, input_ids, PackedRows(tokens, *input_ids.shape), views=views)
    output = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **output_flags(views)
    )
    return States(output.last_hidden_state, *inside_of(output, model, views))


def packed_states(model: PreTrainedModel, input_ids: Tensor, rows: PackedRows, *, views: Views) -> States:
    """The states of a pass over tokens alone, as if there were padding.

    Args:
        model: one that takes packed rows.
        input_ids: (B, T) on the model's device.
        rows: which of them are tokens.
        views: what is asked for besides the last states.
    Returns:
        `States`, 0 where there is padding.
    """
    output = model.base_model(
        input_ids=rows.packed(input_ids),
        position_ids=(rows.tokens % rows.width)[None],
        # In four dimensions transformers takes it for what the attention wants. `attend` looks at the rows instead; a
        # model that did not hand them down would let all tokens see all, which `allow_packing` finds out.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        packed_rows=rows,
        use_cache=False,
        **output_flags(views),
    )
    layers, _ = inside_of(output, model, views)
    return States(
        rows.laid_out(output.last_hidden_state),
        None if layers is None else tuple(rows.laid_out(layer) for layer in layers),
    )


def takes_packed_rows(model: PreTrainedModel, width: int = 1) -> bool:
    """Whether rows of so many places can be packed: attention that looks back less far would need its own mask.

    Args:
        model: as `load_model` leaves it, which tries it.
        width: T; 1 asks of the shortest rows.
    Returns:
        Whether `backbone_states` leaves padding out where there is enough of it.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return model.config._attn_implementation == PACKED and (not window or width <= window)


def output_flags(views: Views) -> dict[str, bool]:
    """What a transformers model is told, to return what is asked for."""
    flags = {"output_hidden_states": views.layers, "output_attentions": views.attentions}
    return {name: True for name, asked in flags.items() if asked}


def inside_of(
    output: ModelOutput, model: PreTrainedModel, views: Views
) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Layers and attention maps of a model's output, None for what was not asked for.

    Raises:
        UserError: as `backbone_states`.
    """
    if views.attentions and not output.attentions:
        own = model.config._attn_implementation
        raise UserError(
            f"{model.config.name_or_path or type(model).__name__} returns no attention maps under its attention "
            f"implementation {'sdpa' if own in (UNGROUPED, PACKED) else own}, and the term attention compares them: "
            "set teacher.attention=eager and student.attention=eager, or objective.attention.weight=0"
        )
    return output.hidden_states if views.layers else None, output.attentions if views.attentions else None


def backbone_hidden(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, *, tokens: Tensor | None = None
) -> Tensor:
    """Final hidden states as the head sees them, after the last norm.

    Args:
        model: a causal language model.
        input_ids: (B, T) on the model's device.
        attention_mask: (B, T), 1 for a token and 0 for padding on the right; None when nothing is padded.
        tokens: as in `backbone_states`.
    Returns:
        (B, T, H) in the model's compute dtype, with gradient where it is enabled.
    """
    return backbone_states(model, input_ids, attention_mask, tokens=tokens).last

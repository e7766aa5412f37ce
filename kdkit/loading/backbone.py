"""A model's pass up to its head: last hidden states, and what else of its inside is asked for."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from kdkit.errors import UserError
from kdkit.teacher.signal import NO_VIEWS, Views


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
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, *, views: Views = NO_VIEWS
) -> States:
    """The states of a pass, with gradient where it is enabled.

    Args:
        model: a causal language model.
        input_ids: (B, T) on the model's device.
        attention_mask: (B, T), 1 for a token and 0 for padding on the right; None when nothing is padded, or where
            nobody reads the states of padding: a causal model's tokens never look there.
        views: what is asked for besides the last states.
    Returns:
        `States` in the model's compute dtype.
    Raises:
        UserError: attention maps are asked for and the model gives none.
    """
    output = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **output_flags(views)
    )
    return States(output.last_hidden_state, *inside_of(output, model, views))


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
        raise UserError(
            f"{model.config.name_or_path or type(model).__name__} returns no attention maps under its attention "
            f"implementation {model.config._attn_implementation}, and the term attention compares them: set "
            "teacher.attention=eager and student.attention=eager, or objective.attention.weight=0"
        )
    return output.hidden_states if views.layers else None, output.attentions if views.attentions else None


def backbone_hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Final hidden states as the head sees them, after the last norm.

    Args:
        model: a causal language model.
        input_ids: (B, T) on the model's device.
        attention_mask: (B, T), 1 for a token and 0 for padding on the right; None when nothing is padded.
    Returns:
        (B, T, H) in the model's compute dtype, with gradient where it is enabled.
    """
    return backbone_states(model, input_ids, attention_mask).last

"""What each expert of a mixture-of-experts teacher makes of a token: its real output, from its own weights.

The block's input is caught on the way (`capture_block_inputs`); router and expert slices are then applied to it:

    blocks = find_moe_blocks(model)
    with capture_block_inputs(model, [layer]) as inputs:
        model.base_model(...)
        experts = unit_experts(blocks[layer], inputs[layer], unit_ids, max_units=max_units, num_experts=4)
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from kdkit.errors import UserError
from kdkit.teacher.signal import UnitExperts


@dataclass(frozen=True, eq=False)
class Routing:
    """How a block routes tokens: all probabilities, and its own choice."""

    probs: Tensor
    """(N, E) float32, softmax over all experts."""
    ids: Tensor
    """(N, top_k) the block's own choice, most likely first."""
    gates: Tensor
    """(N, top_k) what the block multiplies those experts' outputs by."""


@dataclass(frozen=True, eq=False)
class ExpertOutputs:
    """The k most likely experts of each token. `sum_j gates_j outputs_j + shared` is the block's own output."""

    router_probs: Tensor
    """(N, E) float32, softmax over all experts."""
    ids: Tensor
    """(N, k) most likely first."""
    gates: Tensor
    """(N, k) as the block weighs its own top-k; 0 for experts beyond those."""
    outputs: Tensor
    """(N, k, H) in the block's dtype, not weighted."""
    shared: Tensor | None
    """(N, H) of the expert that every token goes to, weighted by its gate; None where the block has none."""


@dataclass(frozen=True)
class BlockReader:
    """How the parts of one class of block are read."""

    route: Callable[[nn.Module, Tensor], Routing]
    """Block, hidden (N, H) -> its routing."""
    expert: Callable[[nn.Module, int, Tensor], Tensor]
    """Block, expert, hidden (n, H) -> what that expert makes of these tokens (n, H), not weighted."""
    shared: Callable[[nn.Module, Tensor], Tensor] | None = None
    """Block, hidden (N, H) -> what is added for every token (N, H)."""


def find_moe_blocks(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The blocks whose experts can be read, by index of their decoder layer (0 = the first).

    Args:
        model: a causal language model.
    Returns:
        Layer index -> block, in order; layers with a dense MLP are left out.
    Raises:
        UserError: there is none: a dense model, or a family that has no entry in `BLOCKS`.
    """
    blocks = {_layer_index(name): module for name, module in model.named_modules() if type(module) in BLOCKS}
    if not blocks:
        known = ", ".join(block.__name__.removesuffix("SparseMoeBlock") for block in BLOCKS)
        raise UserError(
            f"routing needs an MoE teacher whose experts can be read ({known}), and"
            f" {model.config.name_or_path or type(model).__name__} is of type {model.config.model_type!r}, without such"
            " experts: choose an MoE teacher, or leave the routing term out"
        )
    return blocks


@contextmanager
def capture_block_inputs(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what goes into the MoE blocks of these layers during the forward passes inside `with`.

    Args:
        model: as for `find_moe_blocks`.
        layers: indices of decoder layers that have such a block.
    Returns:
        A dict that each forward pass fills: layer -> (B, S, H), detached. It is emptied at the end of `with`, and the
        hooks are gone, so that nothing outlives it: use the states inside.
    Raises:
        UserError: a layer without experts.
    """
    blocks = find_moe_blocks(model)
    captured: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured[layer] = inputs[0].detach()

        return hook

    handles = []
    try:
        for layer in layers:
            if layer not in blocks:
                raise UserError(f"layer {layer} has no experts; layers that have some: {', '.join(map(str, blocks))}")
            handles.append(blocks[layer].register_forward_pre_hook(keep(layer)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()
        captured.clear()


@torch.no_grad()
def expert_outputs(block: nn.Module, hidden: Tensor, *, num_experts: int | None = None) -> ExpertOutputs:
    """The outputs of the k most likely experts of each token.

    Args:
        block: from `find_moe_blocks`, in evaluation mode.
        hidden: (N, H) inputs of the block, in its dtype and on its device.
        num_experts: k, 1 to all experts; None for as many as the block itself uses.
    Returns:
        `ExpertOutputs`, without gradient. k may exceed the block's own top-k; below it, the gated sum lacks the rest.
    Raises:
        ValueError: k out of range.
    Source: none; the blocks' own forward passes. Differs: outputs are kept apart.
    """
    routing = _reader(block).route(block, hidden)
    own = routing.ids.shape[1]
    k = _checked_k(own if num_experts is None else num_experts, routing)
    # the block's own choice first: another top-k could break ties in another way
    further = routing.probs.scatter(1, routing.ids, -1.0).topk(max(k - own, 0)).indices
    ids = torch.cat([routing.ids, further], 1)[:, :k]
    gates = F.pad(routing.gates, (0, max(k - own, 0)))[:, :k]
    shared = _reader(block).shared
    return ExpertOutputs(
        router_probs=routing.probs,
        ids=ids,
        gates=gates,
        outputs=_apply_experts(block, hidden, ids),
        shared=None if shared is None else shared(block, hidden),
    )


@torch.no_grad()
def unit_experts(
    block: nn.Module, hidden: Tensor, unit_ids: Tensor, *, max_units: int, num_experts: int
) -> UnitExperts:
    """The experts of each unit: chosen by the mean of the router's probabilities over the unit's tokens.

    Tokens of one unit go to different experts, and a mean of the outputs of different experts is nobody's output; so
    the unit's experts are chosen once and applied to all of its tokens.

    Args:
        block: from `find_moe_blocks`, in evaluation mode.
        hidden: (B, S, H) inputs of the block, from `capture_block_inputs`; tokens in no unit are never read.
        unit_ids: (B, S) integer, the teacher's, -1 = in no unit.
        max_units: U, the padded number of units, > every id.
        num_experts: k, 1 to all experts.
    Returns:
        `UnitExperts`, without gradient.
    Raises:
        ValueError: k out of range.
    Source: none.
    """
    batch = len(unit_ids)
    ids = unit_ids.to(hidden.device)
    slots = (ids + max_units * torch.arange(batch, device=ids.device)[:, None])[ids >= 0]  # (N,)
    tokens = hidden[ids >= 0]  # (N, H)
    routing = _reader(block).route(block, tokens)
    k = _checked_k(num_experts, routing)
    top = _means(routing.probs, slots, batch * max_units).topk(k)  # (B * U, k)
    outputs = _apply_experts(block, tokens, top.indices[slots])  # (N, k, H)
    pooled = _means(outputs.flatten(1), slots, batch * max_units)
    return UnitExperts(
        ids=top.indices.view(batch, max_units, k),
        probs=top.values.view(batch, max_units, k),
        outputs=pooled.view(batch, max_units, k, hidden.shape[2]),
        num_experts=routing.probs.shape[1],
    )


def _layer_index(name: str) -> int:
    """model.layers.3.mlp -> 3."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _reader(block: nn.Module) -> BlockReader:
    return BLOCKS[type(block)]


def _checked_k(k: int, routing: Routing) -> int:
    num_experts = routing.probs.shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"num_experts is {k}; allowed: 1 to {num_experts}, the experts of the block.")
    return k


def _means(values: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """(num_slots, F) float32 mean of the rows (N, F) of each slot (N,); 0 for a slot without rows."""
    sums = values.new_zeros(num_slots, values.shape[1], dtype=torch.float32).index_add_(0, slots, values.float())
    counts = sums.new_zeros(num_slots).index_add_(0, slots, sums.new_ones(len(slots)))
    return sums / counts.clamp(min=1)[:, None]


def _apply_experts(block: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """(N, k, H): expert ids[n, j] on token n, expert by expert on all tokens that want it."""
    num_tokens, k = ids.shape
    reader = _reader(block)
    by_expert = ids.flatten().argsort(stable=True)  # places of (N, k), those of one expert side by side
    outputs = hidden.new_empty(num_tokens * k, hidden.shape[1])
    start = 0
    for expert, count in enumerate(ids.flatten().bincount().tolist()):
        places = by_expert[start : start + count]
        if count:
            outputs[places] = reader.expert(block, expert, hidden[places // k])
        start += count
    return outputs.view(num_tokens, k, hidden.shape[1])


def _route(block: nn.Module, hidden: Tensor) -> Routing:
    """By the block's `gate`, which gives logits, gates and ids."""
    logits, gates, ids = block.get_submodule("gate")(hidden)
    return Routing(logits.float().softmax(-1), ids, gates)


def _stacked_expert(block: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """From weights stacked as gate_up_proj (E, 2I, H) and down_proj (E, H, I)."""
    gate, up = F.linear(hidden, block.get_parameter("experts.gate_up_proj")[expert]).chunk(2, dim=-1)
    activation = block.get_submodule("experts.act_fn")
    return F.linear(activation(gate) * up, block.get_parameter("experts.down_proj")[expert])


def _gated_shared_expert(block: nn.Module, hidden: Tensor) -> Tensor:
    """An MLP behind a gate of its own."""
    gate = block.get_submodule("shared_expert_gate")(hidden).sigmoid()
    return gate * block.get_submodule("shared_expert")(hidden)


BLOCKS: dict[type[nn.Module], BlockReader] = {
    MixtralSparseMoeBlock: BlockReader(_route, _stacked_expert),
    Qwen2MoeSparseMoeBlock: BlockReader(_route, _stacked_expert, shared=_gated_shared_expert),
    Qwen3MoeSparseMoeBlock: BlockReader(_route, _stacked_expert),
}
"""Every class of block that can be read."""

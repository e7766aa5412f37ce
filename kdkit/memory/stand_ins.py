"""What a CUDA card allocates where a CPU does otherwise, and bitsandbytes' layers, which no fake tensor passes through.

`CardKernels` is active around a step on fake CPU tensors. It stands in for what differs in size: fused attention,
dropout's mask, and the operations that autocast takes to float32 on a card. The work space of cuBLAS is not in it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdkit.runtime import NF4_BLOCK

# CUDA's autocast list, as far as models use it: those that get float32 inputs, and those that get float32 inside.
_INPUTS_IN_FLOAT32 = {"exp", "group_norm", "layer_norm", "log", "norm", "pow", "__pow__", "reciprocal", "rsqrt"}
_INPUTS_IN_FLOAT32 |= {"cosine_similarity", "cross_entropy", "softplus"}
_INSIDE_IN_FLOAT32 = {"cumsum", "log_softmax", "prod", "softmax", "sum"}

EIGHT_BIT_BLOCK_STATES = 256
"""Numbers that share a float32 scale in bitsandbytes' 8-bit optimizers."""
EIGHT_BIT_LEAST_STATES = 4096
"""A tensor of fewer numbers keeps its optimizer state in 32 bits."""


class CardKernels(TorchFunctionMode):
    """Sends what a card computes in another way to an operation that allocates as the card does.

    Args:
        has_flash_attention: compute capability 8.0 or newer.
    """

    def __init__(self, *, has_flash_attention: bool) -> None:
        super().__init__()
        self.has_flash_attention = has_flash_attention

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is torch._grouped_mm:  # fake tensors pass through it in bfloat16 alone
            return torch.ops.transformers.grouped_mm_fallback(args[0], args[1], kwargs["offs"])
        if func is Tensor.split_with_sizes and not torch.is_grad_enabled():
            return _split(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = _as_cuda_autocasts(func.__name__, args, kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """By the memory-efficient kernel, whose output and log-sums are of the flash kernel's size, too."""
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if enable_gqa and self.has_flash_attention:
            return _SharedKeys.apply(query, key, value)
        if enable_gqa:  # as `kdkit.loading.attention` does on a card without
            groups = query.shape[1] // key.shape[1]
            key, value = (shared.repeat_interleave(groups, dim=1) for shared in (key, value))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_full((), -math.inf))
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        keeps_sums = torch.is_grad_enabled() and query.requires_grad
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps_sums, dropout_p, is_causal, scale=scale
        )[0]


class _SharedKeys(torch.autograd.Function):
    """The flash kernel with keys that heads share: it reads them as they are; only its gradients are of every head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, *_ = ctx.saved_tensors
        batch, heads, _, width = query.shape
        of_heads = [query.new_empty(batch, heads, key.shape[2], width) for _ in range(2)]
        shared = (batch, key.shape[1], heads // key.shape[1], *key.shape[2:])
        by_key, by_value = (gradient.view(shared).sum(2) for gradient in of_heads)
        return torch.empty_like(query), by_key, by_value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """With a mask of one byte a number, as on a card; a CPU keeps the mask in the input's dtype."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _split(input: Tensor, split_sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """One view for all pieces of a size: soft-DTW makes thousands, and without values one is as good as another."""
    views = {size: input.narrow(dim, 0, size) for size in set(split_sizes)}
    return [views[size] for size in split_sizes]


def _as_cuda_autocasts(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments as CUDA's autocast makes them of half-precision ones."""
    is_half = bool(args) and isinstance(args[0], Tensor) and args[0].dtype in (torch.float16, torch.bfloat16)
    if is_half and name in _INSIDE_IN_FLOAT32 and kwargs.get("dtype") is None:
        return args, kwargs | {"dtype": torch.float32}
    if name in _INPUTS_IN_FLOAT32:
        args = tuple(_at_least_float32(arg) for arg in args)
        kwargs = {key: _at_least_float32(arg) for key, arg in kwargs.items()}
    return args, kwargs


def _at_least_float32(arg: Any) -> Any:
    is_half = isinstance(arg, Tensor) and arg.dtype in (torch.float16, torch.bfloat16)
    return arg.float() if is_half else arg


class FourBitLinear(nn.Module):
    """A frozen linear layer as bitsandbytes holds it in NF4: half a byte a weight and the scales of blocks.

    Args:
        source: the layer, in the dtype it computes in.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        rows, columns, self.bias = _sizes_of(source)
        self.shape = (rows, columns)
        self.register_buffer("weight", torch.empty(math.ceil(rows * columns / 2), 1, dtype=torch.int8))
        self.register_buffer("absmax", torch.empty(math.ceil(rows * columns / NF4_BLOCK), dtype=torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        """The whole weight exists in the input's dtype for as long as the product takes."""
        return F.linear(input, input.new_empty(self.shape), self.bias)


class EightBitLinear(nn.Module):
    """A frozen linear layer as bitsandbytes holds it for LLM.int8, without outlier columns, whose number depends on
    the text.

    Args:
        source: the layer, in the dtype it computes in.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        rows, columns, self.bias = _sizes_of(source)
        self.num_outputs = rows
        self.register_buffer("weight", torch.empty(rows, columns, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(rows, dtype=torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        """The input in 8 bits, the product in 32, then the output."""
        quantized = torch.empty_like(input, dtype=torch.int8)
        product = input.new_empty(*quantized.shape[:-1], self.num_outputs, dtype=torch.int32)
        output = product.to(input.dtype)
        return output if self.bias is None else output.add_(self.bias)


def _sizes_of(source: nn.Module) -> tuple[int, int, nn.Parameter | None]:
    """Rows, columns and bias of a linear layer; a Conv1D of GPT-2's kind is one whose weight lies the other way."""
    assert isinstance(source, nn.Linear | Conv1D)
    rows, columns = source.weight.shape if isinstance(source, nn.Linear) else reversed(source.weight.shape)
    return rows, columns, source.bias


QUANTIZED = {"nf4": FourBitLinear, "int8": EightBitLinear}
"""What stands for a linear layer, by the config's name of the quantization."""


def quantize(model: PreTrainedModel, quantization: str) -> None:
    """Put stand-ins in the place of all linear layers but the head, as transformers does with bitsandbytes' own.

    Experts that are stacked in one tensor are no linear layers and stay as they are.

    Args:
        model: on fake tensors, in its compute dtype.
        quantization: a name of `QUANTIZED`.
    """
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and module is not head:
            model.set_submodule(name, QUANTIZED[quantization](module))


class KernelAdamW(torch.optim.Optimizer):
    """AdamW whose kernel updates in place, torch's fused one or bitsandbytes', as far as its memory goes.

    Args:
        groups: of parameters.
        in_8_bits: parameters whose two states take a byte a number and the scales of blocks.
    """

    def __init__(self, groups: list[dict[str, Any]], *, in_8_bits: Sequence[nn.Parameter] = ()) -> None:
        super().__init__(groups, {})
        self._in_8_bits = {id(parameter) for parameter in in_8_bits}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # as no loss is asked
        """Makes the states at the first step."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if not self.state[parameter]:
                self.state[parameter] = self._states(parameter)

    def _states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if id(parameter) not in self._in_8_bits or parameter.numel() < EIGHT_BIT_LEAST_STATES:
            return {name: torch.zeros_like(parameter) for name in ("state1", "state2")}
        scales = math.ceil(parameter.numel() / EIGHT_BIT_BLOCK_STATES)
        states = {name: torch.zeros_like(parameter, dtype=torch.int8) for name in ("state1", "state2")}
        return states | {f"{name}_scales": parameter.new_zeros(scales) for name in ("first", "second")}

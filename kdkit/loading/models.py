"""Causal language models from a checkpoint or from scratch, with nothing left to a silent default."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from kdkit.errors import UserError
from kdkit.loading.attention import spread_shared_keys
from kdkit.loading.heads import allow_packing, check_causal
from kdkit.loading.places import Place, locate, one_message
from kdkit.runtime import GIB, INT8_CAPABILITY, preserved_rng_state

logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "int8"]
"""Weights in 4 or in 8 bits."""

_NUM_NAMES_SHOWN = 3


@dataclass(frozen=True)
class ModelDescription:
    """A loaded model in numbers."""

    architecture: str
    num_parameters: int
    """Weights that are shared between two places count once."""
    num_trainable_parameters: int
    dtype: str
    device: str
    size_bytes: int
    """Parameters and buffers."""


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    trainable: bool = False,
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    from_scratch: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Load a text-only causal language model, in evaluation mode, on one device.

    Random draws outside are not disturbed, and none of them reaches the weights.

    Args:
        path: folder of a model or a hub name; with `from_scratch` a config's folder or file will do.
        dtype: of the weights; the checkpoint's own dtype is never taken over.
        device: where the model goes.
        trainable: a student (weights want gradients, float32 only) or a frozen teacher.
        attn_implementation: as transformers names it; None is the model's own choice.
        quantization: load a frozen model's linear layers in 4 or 8 bits; `dtype` is then the compute dtype.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model.
        from_scratch: random weights, a function of `seed` alone, instead of the trained ones.
        seed: for `from_scratch`.
    Returns:
        The model; call `.train()` on it to train.
    Raises:
        UserError: it cannot be read, is no text-only causal language model, would keep weights that are not in the
            checkpoint at their random values, does not fit on the device, or the arguments contradict each other.
    """
    _check_arguments(dtype, trainable=trainable, quantization=quantization, from_scratch=from_scratch)
    place = locate(path, revision=revision)
    arguments: dict[str, object] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if quantization is not None:
        arguments["quantization_config"] = _quantization_config(quantization, dtype, torch.device(device))
    with preserved_rng_state(), one_message("model", place):
        config = AutoConfig.from_pretrained(place.name, trust_remote_code=trust_remote_code, **place.read_arguments())
        _check_family(config, place.name)
        is_quantized = quantization is not None or getattr(config, "quantization_config", None) is not None
        if from_scratch:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, **arguments)
        else:
            in_place = {"device_map": {"": device}} if is_quantized else {}  # cannot be moved later
            model = _from_checkpoint(place, config, arguments | in_place)
    if from_scratch or not is_quantized:
        _move(model, torch.device(device), place.name)
    if torch.device(device).type == "cuda":
        spread_shared_keys(model)
    if quantization is not None:
        _say_what_stays_unpacked(model, place.name)
    if trainable:
        _check_all_float32(model, place.name)
    model.eval().requires_grad_(trainable)
    check_causal(model)
    allow_packing(model)
    return model


def describe_model(model: PreTrainedModel) -> ModelDescription:
    """Architecture, size, dtype and device of a loaded model."""
    return ModelDescription(
        architecture=type(model).__name__,
        num_parameters=model.num_parameters(),
        num_trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        size_bytes=_size_bytes(model),
    )


def _check_arguments(
    dtype: torch.dtype, *, trainable: bool, quantization: Quantization | None, from_scratch: bool
) -> None:
    if trainable and dtype != torch.float32:
        raise UserError(
            f"a student's weights were asked for in {dtype}: they are always torch.float32, because small updates"
            " round away in half precision; for speed set mixed precision instead"
        )
    if quantization is not None and (trainable or from_scratch):
        raise UserError(f"quantization={quantization!r} is for a trained, frozen teacher: leave it out here")


def _quantization_config(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise UserError(f"quantization={quantization!r} needs bitsandbytes, which is missing: pip install bitsandbytes")
    if quantization == "int8":
        _check_int8_capability(device)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _check_int8_capability(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= INT8_CAPABILITY:
        return
    raise UserError(
        f"int8 needs compute capability {INT8_CAPABILITY[0]}.{INT8_CAPABILITY[1]}, and"
        f" {torch.cuda.get_device_name(device)} is older: use quantization nf4"
    )


def _check_family(config: PreTrainedConfig, name: str) -> None:
    """Refuse by the config what is not a text-only causal language model, before any weight is read."""
    wanted = "kdkit distils text-only causal language models such as Llama, Qwen or GPT-2"
    kind = f"{name} is a {config.model_type} model"
    if config.is_encoder_decoder:
        raise UserError(f"{kind}, which has an encoder and a decoder; {wanted}")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class = cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        if model_class.__name__.endswith("ForConditionalGeneration"):
            raise UserError(f"{kind}, which also reads images or sound; {wanted}: take a text-only sibling")
    elif "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise UserError(f"{kind}, which predicts no next token; {wanted}")


def _from_checkpoint(place: Place, config: PreTrainedConfig, arguments: Mapping[str, object]) -> PreTrainedModel:
    with _no_progress_bar():
        loaded = AutoModelForCausalLM.from_pretrained(
            place.name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **arguments,
            **place.read_arguments(),
        )
    model, found = cast("tuple[PreTrainedModel, dict[str, set]]", loaded)
    random_weights = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    if random_weights:
        raise UserError(
            f"{place.name} lacks weights that its config asks for, or has them in another shape"
            f" ({_some(random_weights)}); they would be random numbers. Its config.json and its weights do not"
            " belong together, or a file is missing"
        )
    if found["unexpected_keys"]:
        unused = _some(list(found["unexpected_keys"]))
        logger.warning("%s has weights that its architecture does not use: %s", place.name, unused)
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without transformers' bar for every model read, which says nothing and stays on the screen."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_NUM_NAMES_SHOWN])
    more = len(names) - _NUM_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _move(model: PreTrainedModel, device: torch.device, name: str) -> None:
    try:
        torch.nn.Module.to(model, device)
    except torch.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info(device)
        raise UserError(
            f"{name} needs {_size_bytes(model) / GIB:.2f} GiB in {model.dtype}, and {device} has"
            f" {free / GIB:.2f} GiB free: load it in float16, quantize it to nf4, or use another device"
        ) from error


def _check_all_float32(model: PreTrainedModel, name: str) -> None:
    others = sorted({str(p.dtype) for p in model.parameters()} - {"torch.float32"})
    if others:
        raise UserError(
            f"{name} has weights that stay in {', '.join(others)} (a quantized checkpoint?): a student needs a"
            " checkpoint in full or half precision"
        )


def _say_what_stays_unpacked(model: PreTrainedModel, name: str) -> None:
    """bitsandbytes packs linear layers alone: experts that lie in one stacked parameter stay as they are."""
    sizes = {key: p.numel() * p.element_size() for key, p in model.named_parameters() if p.is_floating_point()}
    unpacked, total = sum(sizes.values()), sum(p.numel() * p.element_size() for p in model.parameters())
    if unpacked > total / 2:
        logger.warning(
            "%s: quantization packs %.2f GiB and leaves %.2f GiB as they are (most of them in %s): bitsandbytes packs "
            "linear layers alone, not embeddings and not experts that lie in one parameter",
            name,
            (total - unpacked) / GIB,
            unpacked / GIB,
            max(sizes, key=sizes.__getitem__),
        )


def _size_bytes(model: PreTrainedModel) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

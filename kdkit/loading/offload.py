"""A frozen model that does not fit the card: its layers stay in the machine's memory and visit the card one by one."""

import torch
from accelerate import cpu_offload
from torch import nn
from transformers import PreTrainedModel

from kdkit.errors import UserError
from kdkit.loading.attention import spread_shared_keys


def offload_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the decoder layers in the machine's memory; each is on the device while it computes, and no longer.

    Embeddings, last norm and head go to the device and stay, so that the head can still be had apart. Between two
    passes the layers' weights are on no device: nothing outside a pass can read them. Memory on the device is that of
    one layer beside what stays; each pass moves all layers over the bus, from page-locked memory where there is a card.

    Args:
        model: on the CPU, frozen; changed in place.
        device: where it computes.
    Raises:
        UserError: its layers cannot be told apart.
    """
    layers = _layers(model)
    if not layers:
        raise UserError(
            f"{model.config.name_or_path or type(model).__name__} does not say what its layers are, and cannot be"
            " offloaded one by one: quantize it (teacher.quantization=nf4), or give teacher.device a card"
        )
    inside = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    if device.type == "cuda":
        spread_shared_keys(model)
    for layer in layers:
        weights = {name: _locked(weight, device) for name, weight in layer.state_dict().items()}
        cpu_offload(layer, device, state_dict=weights, preload_module_classes=[type(layer).__name__])


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers itself never splits over two devices."""
    names = set(model._no_split_modules or ())
    return [module for module in model.base_model.modules() if type(module).__name__ in names]


def _locked(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    return weight.pin_memory() if device.type == "cuda" else weight

"""A frozen model with LoRA layers in it: peft's layers, but the model stays of its own class, so that all else holds.

peft's own wrapper would hide backbone and head behind other names. Here its layers take the place of linear ones, and
whatever asks the model for its states, its head or its answers goes on as before.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdkit.config import LoraConfig
from kdkit.errors import UserError
from kdkit.runtime import preserved_rng_state

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

LORA_FOLDER = "lora"
"""In a checkpoint, and beside a finished student: the LoRA weights alone, as peft reads them."""

_SET = "default"  # peft's name for the only set of LoRA layers
_FILE, _PREFIX = "adapter_model.safetensors", "base_model.model."  # where peft looks for them, and under which names
_LINEAR = (nn.Linear, Conv1D)  # the second is GPT-2's, with its weight the other way round


def add_lora(model: PreTrainedModel, settings: LoraConfig, *, seed: int) -> None:
    """Freeze a model and put LoRA layers into it, in float32; they change nothing until they are trained.

    Args:
        model: changed in place; its own weights may be in half precision.
        settings: rank, scale, dropout, and which layers.
        seed: of the half of each layer that starts at random; no draw outside is disturbed.
    Raises:
        UserError: peft is missing, there is no such layer, or its weights are the embeddings too.
    """
    if find_spec("peft") is None:
        raise UserError("student.lora needs peft, which is missing: pip install peft, or set student.lora=null")
    from peft import LoraConfig as Settings
    from peft import inject_adapter_in_model

    targets = _targets(model, settings)
    given = Settings(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=any(type(model.get_submodule(name)) is Conv1D for name in targets),
        base_model_name_or_path=model.config.name_or_path,
        task_type="CAUSAL_LM",
    )
    with preserved_rng_state():
        torch.manual_seed(seed)
        inject_adapter_in_model(given, model, _SET)
    model.requires_grad_(False)
    for weight in lora_weights(model).values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    model.eval()  # new layers begin in training mode


def has_lora(model: nn.Module) -> bool:
    """Whether there are LoRA layers in a model."""
    return next(_lora_layers(model), None) is not None


def lora_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The LoRA weights of a model, live, under the names that peft's files have."""
    return {
        _PREFIX + name.replace(f".{_SET}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def write_lora(model: PreTrainedModel, folder: Path) -> None:
    """Write the LoRA weights and their settings, for `read_lora` and for `peft.PeftModel.from_pretrained`.

    Args:
        model: with LoRA layers.
        folder: made where it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[_SET].save_pretrained(folder)
    save_file({name: weight.detach().contiguous() for name, weight in lora_weights(model).items()}, folder / _FILE)


@torch.no_grad()
def read_lora(model: PreTrainedModel, folder: Path) -> None:
    """Put what `write_lora` wrote into a model's LoRA layers, every weight accounted for.

    Args:
        model: with LoRA layers of the same settings.
        folder: as given to `write_lora`.
    Raises:
        UserError: the layers differ.
    """
    held, read = lora_weights(model), load_file(folder / _FILE)
    shapes, expected = ({name: tuple(w.shape) for name, w in weights.items()} for weights in (read, held))
    if shapes != expected:
        differing = sorted(dict(shapes.items() ^ expected.items()))
        raise UserError(
            f"{folder} holds LoRA weights for other layers or of another rank ({differing[0].removeprefix(_PREFIX)}): "
            "student.lora has to be as it was"
        )
    for name, weight in read.items():
        held[name].copy_(weight)


@torch.no_grad()
def merge_lora(model: PreTrainedModel) -> None:
    """Add what the LoRA layers learnt to the weights that they stand beside, in float32, and take the layers out.

    The model is a plain one afterwards, on the CPU, where there is room for float32: call it when training is over.

    Args:
        model: with LoRA layers; changed in place.
    """
    nn.Module.to(model, device="cpu", dtype=torch.float32)
    for name, layer in list(_lora_layers(model)):
        plain = layer.get_base_layer()
        plain.weight += layer.get_delta_weight(_SET)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    del model.peft_config


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, "LoraLayer"]]:
    if find_spec("peft") is None:
        return
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _targets(model: PreTrainedModel, settings: LoraConfig) -> list[str]:
    """Full names of the layers that get LoRA."""
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    if settings.target_modules == "all-linear":
        return [name for name, module in linear.items() if module is not head]
    found: dict[str, nn.Module] = {}
    for asked in settings.target_modules:
        matches = {name: module for name, module in linear.items() if f".{name}".endswith(f".{asked}")}
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"student.lora.target_modules names {asked}, and the student has no such linear layer: it has "
                f"{', '.join(known)}; give some of these, or all-linear"
            )
        found |= matches
    embeddings = model.get_input_embeddings().weight
    tied = [name for name, module in found.items() if module.weight is embeddings]
    if tied:
        raise UserError(
            f"student.lora.target_modules names {tied[0]}, whose weights are the embeddings too: what it learnt could "
            "not be merged into one without changing the other; leave it out"
        )
    return list(found)

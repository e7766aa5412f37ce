"""Which of the trained parameters get which learning rate and weight decay."""

from collections.abc import Container
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, decayed: Container[str], *, weight_decay: float, adapter_rate: float
) -> list[dict[str, Any]]:
    """Groups of an optimizer: the student with and without weight decay, and the adapters where there are some.

    Args:
        model: a `DistillModel`, sharded or not.
        decayed: names of the parameters that may decay.
        weight_decay: of the student's.
        adapter_rate: peak learning rate of the adapters, which do not decay.
    Returns:
        Groups without a learning rate of their own get the optimizer's.
    """
    student: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    adapters: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_adapter = name.replace("_fsdp_wrapped_module.", "").startswith("adapters.")
        (adapters if is_adapter else student[name in decayed]).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": student[True], "weight_decay": weight_decay},
        {"params": student[False], "weight_decay": 0.0},
    ]
    if adapters:
        groups.append({"params": adapters, "weight_decay": 0.0, "lr": adapter_rate})
    return groups


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Embeddings see each row rarely, and 8-bit states of such rows are too coarse: bitsandbytes' own advice."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})

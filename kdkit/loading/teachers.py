"""The teacher as a config describes it, on the machine at hand."""

import torch
from transformers import PreTrainedModel

from kdkit.config import TeacherConfig
from kdkit.errors import UserError
from kdkit.loading.models import load_model
from kdkit.loading.offload import offload_layers
from kdkit.runtime import Preflight, usable_dtype


def teacher_device(settings: TeacherConfig, machine: Preflight, *, student: str, num_processes: int = 1) -> str:
    """The device on which a run's teacher computes.

    Args:
        settings: names it, or says auto or offload.
        machine: what `preflight` found.
        student: the student's device in this process.
        num_processes: of the run; each of several has one card and keeps its teacher there.
    Returns:
        The one named; for auto the card with most free memory besides the student's where one process has several,
        else the student's; for offload the student's.
    Raises:
        UserError: the one named is a card that this machine has not.
    """
    if (named := _named_device(settings, machine)) is not None:
        return named
    others = [card for card in machine.cards if card != machine.card(student)]
    if settings.device == "offload" or num_processes > 1 or machine.card(student) is None or not others:
        return student
    return max(others, key=lambda card: card.free_memory_bytes).device  # the first of equals


def load_teacher(settings: TeacherConfig, machine: Preflight, *, device: str | None = None) -> PreTrainedModel:
    """The frozen teacher of a run, in evaluation mode.

    Args:
        settings: which model, in which dtype, where.
        machine: what `preflight` found; decides what "auto" means.
        device: where it computes, as `teacher_device` says; None is the machine's first device unless one is named.
    Returns:
        The model, as `load_model` returns it; with `device: offload` its layers are on the device one at a time.
    Raises:
        UserError: as `load_model`, the model cannot be offloaded, or the device named is a card that is not there.
    """
    is_offloaded = settings.device == "offload"
    place = _named_device(settings, machine) or device or machine.device
    model = load_model(
        settings.path,
        dtype=teacher_dtype(settings, machine, device=place),
        device="cpu" if is_offloaded else place,
        quantization=settings.quantization,
        revision=settings.revision,
        attn_implementation=settings.attention,
        trust_remote_code=settings.trust_remote_code,
    )
    if is_offloaded:
        offload_layers(model, torch.device(place))
    return model


def _named_device(settings: TeacherConfig, machine: Preflight) -> str | None:
    """The device that the settings name, if this machine has it; None where they name none."""
    if settings.device in ("auto", "offload"):
        return None
    kind, _, index = settings.device.partition(":")
    num_cards = machine.num_devices if machine.device == "cuda" else 0
    if kind == "cuda" and int(index or 0) >= num_cards:
        raise UserError(
            f"teacher.device is {settings.device}, and this machine has {num_cards} cards that can be used: give "
            "another one, auto, or cpu"
        )
    return settings.device


def teacher_dtype(settings: TeacherConfig, machine: Preflight, *, device: str) -> torch.dtype:
    """The dtype of a teacher's weights: the one named, or what its device computes natively.

    Args:
        settings: names it, or says auto.
        machine: what `preflight` found.
        device: where the teacher computes; half precision is for cards, on the CPU beside one it would crawl.
    """
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    card = machine.card(device)
    capability = machine.capability if card is None else card.capability
    named_cpu = settings.device == "cpu"
    return getattr(torch, "float32" if named_cpu else usable_dtype(machine.device, capability).dtype)

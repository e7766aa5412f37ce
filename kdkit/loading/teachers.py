"""The teacher as a config describes it, on the machine at hand."""

import torch
from transformers import PreTrainedModel

from kdkit.config import TeacherConfig
from kdkit.loading.models import load_model
from kdkit.runtime import Preflight, usable_dtype


def load_teacher(settings: TeacherConfig, machine: Preflight, *, device: str | None = None) -> PreTrainedModel:
    """The frozen teacher of a run, in evaluation mode.

    Args:
        settings: which model, in which dtype, where.
        machine: what `preflight` found; decides what "auto" means.
        device: where a teacher with `device: auto` goes; None is the machine's first device.
    Returns:
        The model, as `load_model` returns it.
    Raises:
        UserError: as `load_model`.
    """
    place = (device or machine.device) if settings.device == "auto" else settings.device
    dtype = settings.dtype
    if dtype == "auto":  # half precision is for cards: on the CPU beside one it would crawl
        dtype = "float32" if settings.device == "cpu" else usable_dtype(machine.device, machine.capability).dtype
    return load_model(
        settings.path,
        dtype=getattr(torch, dtype),
        device=place,
        quantization=settings.quantization,
        revision=settings.revision,
        attn_implementation=settings.attention,
        trust_remote_code=settings.trust_remote_code,
    )

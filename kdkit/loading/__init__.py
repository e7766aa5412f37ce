"""Models and tokenizers, teacher and student: dtype always explicit, every doubt settled before the first step."""

from kdkit.loading.backbone import ModelShape, States, backbone_hidden, backbone_states, inside_of, output_flags
from kdkit.loading.heads import (
    LogitsOverflow,
    TokenizerKind,
    check_causal,
    check_finite_logits,
    check_head,
    check_tokenizer_fits,
    head_of,
    head_width,
    num_experts,
    shape_of,
    shared_vocab_size,
)
from kdkit.loading.lora import LORA_FOLDER, add_lora, has_lora, merge_lora, read_lora, write_lora
from kdkit.loading.models import ModelDescription, Quantization, describe_model, load_model
from kdkit.loading.places import files_of
from kdkit.loading.teachers import load_teacher, teacher_device, teacher_dtype
from kdkit.loading.tokenizers import load_tokenizer

__all__ = [
    "LORA_FOLDER",
    "LogitsOverflow",
    "ModelDescription",
    "ModelShape",
    "Quantization",
    "States",
    "TokenizerKind",
    "add_lora",
    "backbone_hidden",
    "backbone_states",
    "check_causal",
    "check_finite_logits",
    "check_head",
    "check_tokenizer_fits",
    "describe_model",
    "files_of",
    "has_lora",
    "head_of",
    "head_width",
    "inside_of",
    "load_model",
    "load_teacher",
    "load_tokenizer",
    "merge_lora",
    "num_experts",
    "output_flags",
    "read_lora",
    "shape_of",
    "shared_vocab_size",
    "teacher_device",
    "teacher_dtype",
    "write_lora",
]

"""Pairs of tiny random models that differ in what a pair can differ in, and what both read; for tests."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from kdkit.config import KdConfig, ObjectiveConfig, demo_folder
from kdkit.data import DistillCollator, encode_rows, load_rows
from kdkit.data.batch import Batch
from kdkit.data.encoding import TeacherText
from kdkit.loading import head_width
from kdkit.teacher.sources import LiveTeacher
from kdkit.training.model import DistillModel
from kdkit.training.objective import Across, Moment, Objective, count_items, relate_vocabularies

BYTES, META_SPACE = "moe_teacher", "deep_student"
"""Folders of data/demo with a byte-level tokenizer and one with meta-space."""


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_folder() / name)


def sizes(hidden_size: int, num_layers: int, heads: int, *, tied: bool) -> dict[str, object]:
    """What a config of the Llama kind is told."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }


def llama(vocab_size: int, hidden_size: int, num_layers: int, heads: int, *, tied: bool, **own: object):
    shape = sizes(hidden_size, num_layers, heads, tied=tied)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape, **own))


def qwen_moe(vocab_size: int, **own: object):
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    shape = sizes(24, 2, 3, tied=True)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(vocab_size=vocab_size, **shape, **experts, shared_expert_intermediate_size=16, **own)
    )


def mixtral(vocab_size: int, **own: object):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=vocab_size, **sizes(32, 3, 4, tied=False), **experts, **own))


def gpt2(vocab_size: int, *, dropout: float = 0.0):
    rates = {"attn_pdrop": dropout, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    shape = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 512}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape, **rates, **ends, attn_implementation="eager"))


SHARP = {"initializer_range": 0.2}  # a trained teacher is sure of something; with the usual 0.02 it is of nothing
PAIRS: dict[str, tuple[Callable, Callable]] = {
    "a deeper student, tied": (
        lambda v: llama(v, 16, 5, 2, tied=True),
        lambda v: llama(v, 24, 2, 3, tied=True, **SHARP),
    ),
    "a wider student, untied": (
        lambda v: llama(v, 48, 2, 4, tied=False),
        lambda v: llama(v, 16, 3, 2, tied=True, **SHARP),
    ),
    "a Qwen2-MoE teacher": (lambda v: llama(v, 16, 4, 4, tied=True), lambda v: qwen_moe(v, **SHARP)),
    "a Mixtral teacher, untied": (lambda v: llama(v, 16, 4, 2, tied=False), lambda v: mixtral(v, **SHARP)),
    "a GPT-2 student": (lambda v: gpt2(v), lambda v: qwen_moe(v, **SHARP)),
    "a GPT-2 teacher": (lambda v: llama(v, 24, 2, 2, tied=True), lambda v: gpt2(v)),
}
"""Makers of student and teacher, given the width of their vocabulary."""


@dataclass
class Pair:
    """Two models, and what each reads with."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    """None where it is the student's."""

    @property
    def is_moe(self) -> bool:
        """Whether the teacher has experts."""
        return "moe" in self.teacher.config.model_type or self.teacher.config.model_type == "mixtral"

    def across(self, config: KdConfig) -> Across | None:
        """How the ids of both relate; None for one tokenizer."""
        if self.teacher_tokenizer is None:
            return None
        widths = head_width(self.student), head_width(self.teacher)
        return relate_vocabularies(config, self.tokenizer, self.teacher_tokenizer, widths=widths)

    def batch(self, num_rows: int, *, skip: int = 0, unit: str = "word") -> Batch:
        """Rows of the demo as both sides read them."""
        return batch_of(self.tokenizer, self.teacher_tokenizer, num_rows, skip=skip, unit=unit)

    def model(self, objective: dict, *, across: Across | None = None) -> DistillModel:
        """The student under an objective, its ids related as told or as they are; adapters are drawn from one seed."""
        torch.manual_seed(5)
        config = ObjectiveConfig.model_validate(objective)
        built = Objective(config, across=across or self.across(config.kd))
        return DistillModel(self.student, built, teacher=LiveTeacher(self.teacher).shape)


def make_pair(name: str, *, crosses: bool) -> Pair:
    """A pair of `PAIRS`, always the same weights; with different tokenizers or one for both."""
    student, teacher = PAIRS[name]
    own, theirs = (META_SPACE, BYTES) if crosses else (BYTES, BYTES)
    torch.manual_seed(1)
    return Pair(
        student(len(tokenizer_of(own))).eval(),
        teacher(len(tokenizer_of(theirs))).eval(),
        tokenizer_of(own),
        tokenizer_of(theirs) if crosses else None,
    )


@cache
def rows_of(own: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase | None, unit: str) -> list:
    """The first rows of the demo, encoded."""
    rows = load_rows(str(Path(demo_folder()) / "train.jsonl"), template="plain", limit=24)
    text = None if theirs is None else TeacherText(theirs, rows.dataset["prompt"])
    encoded = encode_rows(rows, own, max_length=256, max_prompt_length=192, unit=unit, teacher=text)
    return list(encoded.dataset)


def batch_of(
    own: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase | None,
    num_rows: int,
    *,
    skip: int = 0,
    unit: str = "word",
) -> Batch:
    """A batch of the demo's rows."""
    collate = DistillCollator.of(own, theirs)
    return collate(rows_of(own, theirs, unit)[skip : skip + num_rows])


def moment_of(batch: Batch, *, step: int = 10, num_steps: int = 10) -> Moment:
    """A moment whose window is this batch alone."""
    return Moment(step, num_steps, {name: float(number) for name, number in count_items(batch).items()})


def run_objective(
    model: DistillModel, teacher: LiveTeacher, batch: Batch, moment: Moment
) -> dict[str, Tensor | dict[str, Tensor]]:
    """One forward pass as the trainer makes it."""
    return model(batch, signal=teacher(batch, model.objective.views_at(moment)), moment=moment)


def gradients(model: DistillModel) -> Tensor:
    """All gradients end to end, and none left behind; parameters without one count as 0."""
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    model.zero_grad()
    return torch.cat([gradient.flatten() for gradient in found])

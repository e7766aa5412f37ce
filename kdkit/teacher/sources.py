"""Where a teacher's signal comes from: a model that is asked at every step."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from kdkit.data.batch import Batch
from kdkit.loading import backbone_hidden, head_of
from kdkit.teacher.signal import DenseSignal, LiveSignal, TeacherSignal


class TeacherSource(Protocol):
    """Answers a batch with what the losses may know of the teacher there."""

    hidden_size: int
    """Width of the hidden states that the signal carries."""

    def __call__(self, batch: Batch) -> TeacherSignal:
        """The signal at the batch's counted positions."""
        ...


class LiveTeacher:
    """A frozen model, asked at every step.

    Args:
        model: the teacher, in evaluation mode, on its own device.
        vocab_size: number of leading token ids that both models share; None where the widths agree.
        dense: take the model's own logits instead of its head's inputs; needed where the head cannot be had apart.
    """

    def __init__(self, model: PreTrainedModel, *, vocab_size: int | None = None, dense: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = vocab_size
        self.dense = dense
        self.hidden_size: int = model.config.hidden_size if dense else head_of(model).weight.shape[1]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherSignal:
        """The signal at the batch's counted positions, with the hidden states of the whole batch.

        Args:
            batch: what the collator made; `input_ids`, `attention_mask` (B, T) and `positions` (N,) are read.
        Returns:
            A `LiveSignal`, or a `DenseSignal` for a dense teacher.
        """
        device = self.model.device
        tokens, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        positions = batch["positions"].to(device)
        if self.dense:
            output = self.model(input_ids=tokens, attention_mask=mask, use_cache=False, output_hidden_states=True)
            logits = output.logits.flatten(0, 1).index_select(0, positions)
            return DenseSignal(logits[:, : self.vocab_size], hidden_states=output.hidden_states[-1])
        hidden = backbone_hidden(self.model, tokens, mask)  # (B, S, H)
        rows = hidden.flatten(0, 1).index_select(0, positions)  # (N, H)
        return LiveSignal(rows, head_of(self.model, vocab_size=self.vocab_size), hidden_states=hidden)

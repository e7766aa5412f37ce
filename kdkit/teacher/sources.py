"""Where a teacher's signal comes from: a model that is asked at every step."""

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkit.data.batch import Batch, teacher_view
from kdkit.errors import UserError
from kdkit.loading import ModelShape, States, backbone_states, head_of, inside_of, output_flags, shape_of
from kdkit.loading.backbone import takes_packed_rows
from kdkit.teacher.cross import CrossSignal
from kdkit.teacher.experts import capture_block_inputs, find_moe_blocks, unit_experts
from kdkit.teacher.signal import NO_VIEWS, DenseSignal, Features, LiveSignal, TeacherSignal, UnitExperts, Views


class TeacherSource(Protocol):
    """Answers a batch with what the losses may know of the teacher there."""

    shape: ModelShape
    """The teacher's sizes."""

    def __call__(self, batch: Batch, views: Views = NO_VIEWS) -> TeacherSignal | CrossSignal:
        """The signal at the batch's counted positions, with what is asked for of the teacher's inside."""
        ...


class LiveTeacher:
    """A frozen model, asked at every step.

    Args:
        model: the teacher, in evaluation mode, on its own device.
        vocab_size: number of leading token ids that both models share; None where the widths agree.
        dense: take the model's own logits instead of its head's inputs; needed where the head cannot be had apart.
        chunk_tokens: positions whose logits exist at a time, where it has another tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int | None = None,
        dense: bool = False,
        chunk_tokens: int = 256,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = vocab_size
        self.dense = dense
        self.chunk_tokens = chunk_tokens
        self.shape = shape_of(model, dense=dense)

    @torch.no_grad()
    def __call__(self, batch: Batch, views: Views = NO_VIEWS) -> TeacherSignal | CrossSignal:
        """The signal at the batch's counted positions, with the hidden states of the whole batch.

        Args:
            batch: what the collator made.
            views: what is asked for of the teacher's inside.
        Returns:
            A `LiveSignal`, or a `DenseSignal` for a dense teacher; a `CrossSignal` of one of these where the teacher
            reads the batch with a tokenizer of its own.
        Raises:
            UserError: the teacher has not what is asked for.
        """
        read = teacher_view(batch)
        if views.experts is None:
            states, logits = self._see(read, views)
            signal = self._signal(states, logits, read)
        else:
            layer, num_experts = self._moe_layer(views.experts[0]), views.experts[1]
            with capture_block_inputs(self.model, [layer]) as inputs:
                states, logits = self._see(read, views)
                block, units = self._blocks[layer], read["unit_ids"].to(self.model.device)
                experts = unit_experts(
                    block, inputs[layer], units, max_units=read["max_units"], num_experts=num_experts
                )
            signal = self._signal(states, logits, read, experts)
        if "teacher" not in batch:
            return signal
        targets = read["labels"].flatten().index_select(0, read["positions"] + 1)  # (M,)
        return CrossSignal(signal, targets, read["span_starts"], batch["positions"].device, self.chunk_tokens)

    @torch.no_grad()
    def check(self, views: Views) -> None:
        """Refuse at once what terms will ask for later and the teacher has not.

        Args:
            views: all that the terms of a stage look at.
        Raises:
            UserError: no attention maps, no experts that can be read, or fewer than are asked for.
        """
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        backbone_states(self.model, token, torch.ones_like(token), views=views)
        if views.experts is None:
            return
        layer, num_experts = views.experts
        self._moe_layer(layer)
        has = self.shape.num_experts
        if has is not None and num_experts > has:
            raise UserError(
                f"objective.routing.num_experts goes up to {num_experts}, and the teacher has {has} experts in a layer"
            )

    @cached_property
    def _blocks(self) -> dict[int, nn.Module]:
        return find_moe_blocks(self.model)

    def _moe_layer(self, asked: int) -> int:
        """Index of the decoder layer that is meant, from the end where negative."""
        layers = list(self._blocks)
        if asked < 0 and -asked <= len(layers):
            return layers[asked]
        if asked not in layers:
            raise UserError(
                f"objective.routing.layer is {asked}; layers of the teacher with experts: "
                f"{', '.join(map(str, layers))}, or -1 to -{len(layers)} from the end"
            )
        return asked

    def leaves_padding_out(self, views: Views) -> bool:
        """Whether its passes may: not where whole rows are read, as for its own logits or, place by place, its experts.

        Args:
            views: what is asked for of the teacher's inside.
        """
        return not self.dense and views.experts is None and takes_packed_rows(self.model)

    def _see(self, read: Batch, views: Views) -> tuple[States, Tensor | None]:
        """The teacher's states, and its own logits (M, W) where its head cannot be had apart.

        Without a mask, as the student's: nothing of a causal model looks at padding on the right.
        """
        device = self.model.device
        input_ids = read["input_ids"].to(device)
        if not self.dense:
            tokens = read["tokens"].to(device) if self.leaves_padding_out(views) else None
            return backbone_states(self.model, input_ids, None, views=views, tokens=tokens), None
        flags = output_flags(views) | {"output_hidden_states": True}
        output = self.model(input_ids=input_ids, use_cache=False, **flags)
        logits = output.logits.flatten(0, 1).index_select(0, read["positions"].to(device))
        return States(output.hidden_states[-1], *inside_of(output, self.model, views)), logits[:, : self.vocab_size]

    def _signal(
        self, states: States, logits: Tensor | None, read: Batch, experts: UnitExperts | None = None
    ) -> DenseSignal | LiveSignal:
        """The signal at all positions of the teacher's reading."""
        features = Features(states.layers, states.attentions, experts)
        if logits is not None:
            return DenseSignal(logits, states.last, features)
        positions = read["positions"].to(states.last.device)
        rows = states.last.flatten(0, 1).index_select(0, positions)  # (M, H)
        return LiveSignal(rows, head_of(self.model, vocab_size=self.vocab_size), states.last, features)

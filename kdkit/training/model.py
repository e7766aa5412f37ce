"""The one module that is trained: student and adapters, with the objective inside its forward.

The trainer wraps, clips, reduces, autocasts and saves exactly what is in here. The teacher is not: it is asked for its
signal outside and handed in, so that nobody trains, moves or saves it by accident.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kdkit.data.batch import Batch
from kdkit.loading import ModelShape, backbone_states, head_of, inside_of, output_flags, shape_of
from kdkit.teacher.cross import CrossSignal
from kdkit.teacher.signal import TeacherSignal, Views
from kdkit.training.objective import Moment, Objective, StudentPass


class DistillModel(nn.Module):
    """A student, the adapters of its objective, and the objective as the forward pass.

    Args:
        student: causal language model, float32 weights.
        objective: the terms and their schedules.
        teacher: sizes of the teacher; None without one.
        vocab_size: number of leading token ids that both models share; None where the widths agree.
        dense: take the student's own logits; needed where its head cannot be applied apart.
    """

    accepts_loss_kwargs = True
    """Tells the Trainer that the loss is normalised over the whole accumulation window by ourselves."""

    def __init__(
        self,
        student: PreTrainedModel,
        objective: Objective,
        *,
        teacher: ModelShape | None = None,
        vocab_size: int | None = None,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.dense = dense
        self.student = student
        self.objective = objective
        self.vocab_size = vocab_size
        self._no_split_modules = student._no_split_modules  # FSDP cuts by the student's own layers
        self.adapters = objective.build_adapters(shape_of(student, dense=dense), teacher)

    @torch.no_grad()
    def check_views(self) -> None:
        """Refuse at once what terms will ask of the student later and it has not.

        Raises:
            UserError: no attention maps.
        """
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.student.device)
        backbone_states(self.student, token, torch.ones_like(token), views=self.objective.views)

    def forward(
        self,
        batch: Batch,
        *,
        signal: TeacherSignal | CrossSignal | None,
        moment: Moment,
        extras: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Student's pass and objective of one batch.

        Args:
            batch: what the collator made, on the student's device.
            signal: the teacher at the N counted positions, or at the spans where it has another tokenizer, or None.
            moment: step and counts, see `Objective`.
            extras: per-token figures wanted besides.
        Returns:
            As `Objective.__call__`.
        """
        seen = self.see(batch, self.objective.views_at(moment))
        return self.objective(seen, batch, signal=signal, moment=moment, adapters=self.adapters, extras=extras)

    def see(self, batch: Batch, views: Views) -> StudentPass:
        """The student's pass over a batch, as the objective takes it.

        It gets no mask: padding stands on the right, where no token of a causal model looks, and no term reads what the
        model makes of padding itself. A mask would be (B, 1, T, T) and keep torch from its causal kernels.

        Args:
            batch: what the collator made, on the student's device.
            views: what the terms look at of its inside.
        """
        return self._see_dense(batch, views) if self.dense else self._see(batch, views)

    def _see(self, batch: Batch, views: Views) -> StudentPass:
        """The student's hidden states, and its head beside them."""
        states = backbone_states(self.student, batch["input_ids"], None, views=views, tokens=batch["tokens"])
        head = head_of(self.student, vocab_size=self.vocab_size)
        return StudentPass(states.last, head=head, layers=states.layers, attentions=states.attentions)

    def _see_dense(self, batch: Batch, views: Views) -> StudentPass:
        """The student's own logits at the counted positions, for a head that cannot be applied apart."""
        output = self.student(
            input_ids=batch["input_ids"], use_cache=False, **output_flags(views) | {"output_hidden_states": True}
        )
        logits = output.logits.flatten(0, 1).index_select(0, batch["positions"])  # (N, V)
        layers, attentions = inside_of(output, self.student, views)
        return StudentPass(
            output.hidden_states[-1], logits=logits[:, : self.vocab_size], layers=layers, attentions=attentions
        )

"""The one module that is trained: student and adapters, with the objective inside its forward.

The trainer wraps, clips, reduces, autocasts and saves exactly what is in here. The teacher is not: it is asked for its
signal outside and handed in, so that nobody trains, moves or saves it by accident.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkit.loading import backbone_hidden, head_of
from kdkit.teacher.signal import TeacherSignal
from kdkit.training.objective import Moment, Objective, StudentPass


class DistillModel(nn.Module):
    """A student, the adapters of its objective, and the objective as the forward pass.

    Args:
        student: causal language model, float32 weights.
        objective: the terms and their schedules.
        teacher_hidden_size: width of the teacher's last hidden states; None without a teacher.
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
        teacher_hidden_size: int | None = None,
        vocab_size: int | None = None,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.dense = dense
        self.student = student
        self.objective = objective
        self.vocab_size = vocab_size
        self.adapters = objective.build_adapters(self._hidden_size(), teacher_hidden_size)

    def _hidden_size(self) -> int:
        """Width of the states that the head sees; some models project before it."""
        return self.student.config.hidden_size if self.dense else head_of(self.student).weight.shape[1]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        signal: TeacherSignal | None,
        moment: Moment,
        extras: tuple[str, ...] = (),
        **batch: Tensor | int,
    ) -> dict[str, Any]:
        """Student's pass and objective of one batch.

        Args:
            input_ids: (B, T) int64, right-padded.
            attention_mask: (B, T), 1 on tokens.
            signal: the teacher at the N counted positions, or None.
            moment: step and counts, see `Objective`.
            extras: per-token figures wanted besides.
            **batch: the rest of the collator's batch.
        Returns:
            As `Objective.__call__`.
        """
        if self.dense:
            seen = self._see_dense(input_ids, attention_mask, batch["positions"])
        else:
            hidden = backbone_hidden(self.student, input_ids, attention_mask)  # (B, T, H)
            seen = StudentPass(hidden, head=head_of(self.student, vocab_size=self.vocab_size))
        return self.objective(
            seen, batch, signal=signal, moment=moment, adapters=self.adapters, extras=extras
        )

    def _see_dense(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> StudentPass:
        """The student's own logits at the counted positions, for a head that cannot be applied apart."""
        output = self.student(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True
        )
        logits = output.logits.flatten(0, 1).index_select(0, positions)  # (N, V)
        return StudentPass(output.hidden_states[-1], logits=logits[:, : self.vocab_size])

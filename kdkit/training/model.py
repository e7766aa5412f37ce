"""The one module that is trained: student and adapters, with the objective inside its forward.

The trainer wraps, clips, reduces, autocasts and saves exactly what is in here. The teacher is not: it is asked for its
signal outside and handed in, so that nobody trains, moves or saves it by accident.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kdkit.data.batch import Batch
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
        batch: Batch,
        *,
        signal: TeacherSignal | None,
        moment: Moment,
        extras: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Student's pass and objective of one batch.

        Args:
            batch: what the collator made, on the student's device.
            signal: the teacher at the N counted positions, or None.
            moment: step and counts, see `Objective`.
            extras: per-token figures wanted besides.
        Returns:
            As `Objective.__call__`.
        """
        seen = self._see_dense(batch) if self.dense else self._see(batch)
        return self.objective(seen, batch, signal=signal, moment=moment, adapters=self.adapters, extras=extras)

    def _see(self, batch: Batch) -> StudentPass:
        """The student's hidden states, and its head beside them."""
        hidden = backbone_hidden(self.student, batch["input_ids"], batch["attention_mask"])  # (B, T, H)
        return StudentPass(hidden, head=head_of(self.student, vocab_size=self.vocab_size))

    def _see_dense(self, batch: Batch) -> StudentPass:
        """The student's own logits at the counted positions, for a head that cannot be applied apart."""
        output = self.student(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=True,
        )
        logits = output.logits.flatten(0, 1).index_select(0, batch["positions"])  # (N, V)
        return StudentPass(output.hidden_states[-1], logits=logits[:, : self.vocab_size])

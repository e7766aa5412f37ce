"""How soft-DTW aligns a student's reading of an answer with the teacher's."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdkit.errors import UserError
from kdkit.inspection.runs import RunModels, StudentName, aligning_stage, encode_answer
from kdkit.loading import backbone_hidden, check_head
from kdkit.losses.alignment import alignment_loss, pool_units
from kdkit.softdtw import expected_alignment, pairwise_cost


@dataclass(frozen=True, eq=False)
class Alignment:
    """How soft-DTW aligns a student's reading of an answer with the teacher's; costs are means per unit."""

    matrix: np.ndarray
    """(n, m) probability that the alignment passes through a pair of units."""
    student_units: list[str]
    """n texts."""
    teacher_units: list[str]
    """m texts."""
    cost: float
    """Of an alignment drawn by soft-DTW."""
    diagonal_cost: float
    """Of the alignment that does not warp."""
    off_diagonal_fraction: float
    """Share of the alignment that lies off the one that does not warp, 0..1."""

    @property
    def finding(self) -> str:
        """Soft-DTW beside the diagonal, in one sentence."""
        return (
            f"soft-DTW costs {self.cost:.2f} a unit, the diagonal {self.diagonal_cost:.2f}; "
            f"{100 * self.off_diagonal_fraction:.0f} % of the alignment is off the diagonal"
        )


@dataclass(frozen=True, eq=False)
class AnswerUnits:
    """An answer as a student and the teacher read it, unit by unit, in the teacher's space."""

    student: Tensor
    """(1, N, D) float32."""
    teacher: Tensor
    """(1, M, D) float32."""
    student_units: list[str]
    """N texts."""
    teacher_units: list[str]
    """M texts."""
    metric: str
    """Distance between two hidden states, as in the run."""
    gamma: float
    """The run's own, where this student stands."""
    band: int | None
    """The run's own."""

    @torch.no_grad()
    def align(self, *, gamma: float, band: int | None) -> Alignment:
        """The expected alignment at a smoothing and in a band.

        Args:
            gamma: smoothing of the minimum, in units of the cost, > 0.
            band: half-width >= 1 around the diagonal, in units; None = none.
        Returns:
            The alignment; importance weights and an adaptive band are left out.
        """
        x, y = self.student, self.teacher
        matrix = expected_alignment(pairwise_cost(x, y, self.metric), None, None, gamma=gamma, band=band)  # (1, N, M)
        # The run's own normaliser is put aside: costs are per unit.
        compared = alignment_loss(x, y, None, None, gamma=gamma, band=band, metric=self.metric, normalize="max_length")
        return Alignment(
            matrix[0].cpu().numpy(),
            self.student_units,
            self.teacher_units,
            cost=compared.expected.item(),
            diagonal_cost=compared.diagonal.item(),
            off_diagonal_fraction=compared.off_diagonal_fraction.item(),
        )


@torch.no_grad()
def read_units(
    models: RunModels,
    prompt: str,
    answer: str,
    *,
    student: StudentName = "student",
    teacher_answer: str | None = None,
) -> AnswerUnits:
    """An answer read by a student and by the teacher, to be aligned at several settings.

    Args:
        models: of a run with a dtw term.
        prompt: as the models read it, template included.
        answer: the text whose hidden states are aligned.
        student: whose: at the start of training (with the projector training began with) or at its end.
        teacher_answer: what the teacher reads instead of `answer`; training always gives both the same.
    Returns:
        Both sides' units.
    Raises:
        UserError: the run aligned nothing, or an answer has no units.
    """
    aligning = aligning_stage(models.config)
    if aligning is None or student not in models.projectors:
        raise UserError("the run aligned nothing, so that there is no projector: give objective.dtw a weight")
    dtw = aligning[1].objective.dtw
    x, student_units = _read(models, models.students[student], prompt, answer)  # (1, N, H)
    y, teacher_units = _read(models, models.teacher, prompt, answer if teacher_answer is None else teacher_answer)
    x = models.projectors[student](x)  # (1, N, D)
    gamma = dtw.gamma.at(int(student == "student"), 1)
    return AnswerUnits(x, y.to(x.device), student_units, teacher_units, metric=dtw.metric, gamma=gamma, band=dtw.band)


def alignment_of(
    models: RunModels,
    prompt: str,
    answer: str,
    *,
    student: StudentName = "student",
    teacher_answer: str | None = None,
    gamma: float | None = None,
    band: int | Literal["run"] | None = "run",
) -> Alignment:
    """The expected alignment of one answer, with the run's metric and unit and, unless told, its gamma and band.

    Importance weights and an adaptive band are left out: costs of different runs can be compared.

    Args:
        models, prompt, answer, student, teacher_answer: as for `read_units`.
        gamma: smoothing of the minimum; None: the run's.
        band: half-width in units around the diagonal, None = none; "run": the run's.
    Returns:
        The alignment of the answer's units.
    Raises:
        UserError: as `read_units`.
    """
    units = read_units(models, prompt, answer, student=student, teacher_answer=teacher_answer)
    return units.align(gamma=units.gamma if gamma is None else gamma, band=units.band if band == "run" else band)


def _read(models: RunModels, model: PreTrainedModel, prompt: str, answer: str) -> tuple[Tensor, list[str]]:
    """Pooled hidden states (1, U, H) of an answer's units, float32, and the units' texts."""
    batch = encode_answer(models, prompt, answer, model=model)
    if batch["max_units"] == 0:
        raise UserError(f"the answer {answer!r} has no words to align")
    ids, unit_ids = batch["input_ids"], batch["unit_ids"]
    hidden = _hidden_states(model, ids.to(model.device), batch["attention_mask"].to(model.device))
    units, _ = pool_units(hidden.float(), unit_ids.to(model.device), batch["max_units"])
    decode = models.tokenizer_of(model).decode
    return units, [decode(ids[unit_ids == u]).strip() for u in range(batch["max_units"])]


def _hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(1, T, H) as training sees them."""
    if check_head(model) is None:
        return backbone_hidden(model, input_ids, attention_mask)
    seen = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True)
    return seen.hidden_states[-1]

"""The term that aligns the two models' hidden states by soft-DTW."""

import torch
from torch import Tensor, nn

from kdkit.config import AdaptiveBandConfig, DtwConfig
from kdkit.data.batch import teacher_view
from kdkit.loading import ModelShape
from kdkit.losses.alignment import AdaptiveBand, alignment_loss, pool_units
from kdkit.teacher.cross import CrossSignal
from kdkit.training.objective.terms import PROJECTOR, HiddenTerm, Moment, Scene, TermValue, build_projector


class DtwTerm(HiddenTerm):
    """Soft-DTW between the last hidden states of the answer's units, summed over sequences."""

    name, counts, needs_teacher = "dtw", "sequences", True

    def __init__(self, config: DtwConfig) -> None:
        super().__init__(config.weight)
        self.config = config

    @property
    def extras(self) -> tuple[str, ...]:
        """The teacher's entropy where importance is taken from it."""
        return ("teacher_entropy",) if self.config.importance == "inverse_entropy" else ()

    def build_adapters(self, student: ModelShape, teacher: ModelShape) -> dict[str, nn.Module]:
        """The projector."""
        return {PROJECTOR: build_projector(student.head_size, teacher.head_size)}

    def __call__(self, scene: Scene, moment: Moment) -> TermValue:
        """Align the projected student with the teacher."""
        importance = self._importance(scene)
        result = alignment_loss(
            scene.projected,
            scene.target,
            scene.host_lengths,
            scene.host_lengths,
            gamma=self.config.gamma.at(moment.step, moment.num_steps),
            band=self.config.band,
            metric=self.config.metric,
            divergence=self.config.divergence,
            normalize=self.config.normalize,
            student_weights=importance,
            teacher_weights=importance,
            adaptive_band=self._adaptive_band(self.config.adaptive_band, moment),
        )
        return TermValue(
            result.per_sample.sum(),
            {
                "dtw/off_diagonal_fraction": (result.off_diagonal_fraction.sum(), result.counted.sum()),
                "dtw/to_diagonal_ratio": (result.expected.sum(), result.diagonal.sum()),
            },
        )

    def _importance(self, scene: Scene) -> Tensor | None:
        """(B, U) certainty of the teacher about each unit; a unit is the same text on both sides."""
        if self.config.importance == "none":
            return None
        read = teacher_view(scene.batch)
        units, max_units = read["unit_ids"], scene.batch["max_units"]
        signal = scene.signal
        known = signal.entropies if isinstance(signal, CrossSignal) else scene.extras["teacher_entropy"]
        entropy = torch.zeros(units.numel(), device=units.device)
        entropy[read["positions"] + 1] = known.float()
        pooled, _ = pool_units(entropy.view(*units.shape, 1), units, max_units, lengths=scene.lengths)  # (B, U, 1)
        return 1.0 / (1.0 + pooled.squeeze(-1))

    def _adaptive_band(self, config: AdaptiveBandConfig | None, moment: Moment) -> AdaptiveBand | None:
        """The soft band once its warm-up is over."""
        if config is None or moment.fraction < config.begin:
            return None
        return AdaptiveBand(
            mix=config.mix,
            half_width=config.half_width,
            entropy_scale=config.entropy_scale,
            penalty=config.penalty,
        )

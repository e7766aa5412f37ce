"""Terms over what goes on inside the two models, unit by unit: one tokenizer or two makes no difference."""

import torch
from torch import Tensor, nn

from kdkit.config import AttentionConfig, ContrastiveConfig, HiddenConfig, LayerwiseConfig, RoutingConfig
from kdkit.errors import UserError
from kdkit.loading import ModelShape
from kdkit.losses.features import (
    LayerMixer,
    attention_divergence,
    contrastive,
    hidden_distance,
    layer_pairs,
    map_heads,
    pool_attention,
    pool_sequences,
)
from kdkit.losses.routing import StudentAwareRouter
from kdkit.teacher.signal import Views
from kdkit.training.objective.terms import PROJECTOR, HiddenTerm, Moment, Scene, TermValue, build_projector

LAYER_PROJECTORS, LAYER_MIXER = "layer_projectors", "layer_mixer"
ROUTER, ROUTING_PROJECTOR = "router", "routing_projector"


class HiddenDistanceTerm(HiddenTerm):
    """Distance of the last hidden states, summed over units."""

    name, counts, needs_teacher = "hidden", "units", True

    def __init__(self, config: HiddenConfig) -> None:
        super().__init__(config.weight)
        self.config = config

    def build_adapters(self, student: ModelShape, teacher: ModelShape) -> dict[str, nn.Module]:
        """The projector."""
        return {PROJECTOR: build_projector(student.head_size, teacher.head_size)}

    def __call__(self, scene: Scene, moment: Moment) -> TermValue:
        """Compare unit with unit."""
        return TermValue(hidden_distance(scene.projected, scene.target, scene.lengths, kind=self.config.kind).sum())


class AttentionTerm(HiddenTerm):
    """Divergence between attention maps of the last layers, summed over units and averaged over heads and layers."""

    name, counts, needs_teacher = "attention", "units", True
    views = Views(attentions=True)

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config.weight)
        self.config = config

    def build_adapters(self, student: ModelShape, teacher: ModelShape) -> dict[str, nn.Module]:
        """None.

        Raises:
            UserError: more layers are asked for than the shallower model has.
        """
        most = min(student.num_layers, teacher.num_layers)
        if self.config.num_layers > most:
            raise UserError(
                f"objective.attention.num_layers is {self.config.num_layers}, and the shallower model has {most} "
                f"layers: give 1 to {most}"
            )
        return {}

    def __call__(self, scene: Scene, moment: Moment) -> TermValue:
        """Compare the maps of pairs of layers, from the last one down."""
        ours, theirs = scene.student.attentions, scene.signal.features.attentions
        assert ours is not None
        assert theirs is not None
        totals = [
            self._compare(scene, ours[-depth], theirs[-depth]).sum() for depth in range(1, self.config.num_layers + 1)
        ]
        return TermValue(torch.stack(totals).mean())

    def _compare(self, scene: Scene, ours: Tensor, theirs: Tensor) -> Tensor:
        """(B, U) of one pair of layers."""
        max_units = scene.batch["max_units"]
        student = pool_attention(ours, scene.batch["unit_ids"], max_units)  # (B, heads, U, U + 1)
        teacher = pool_attention(theirs.to(ours.device), scene.teacher_units, max_units)
        return attention_divergence(student, map_heads(teacher, student.shape[1]), scene.lengths)


class LayerwiseTerm(HiddenTerm):
    """Distance of the states of layers at equal shares of the depth, summed over units, mean over pairs of layers."""

    name, counts, needs_teacher = "layerwise", "units", True
    views = Views(layers=True)

    def __init__(self, config: LayerwiseConfig) -> None:
        super().__init__(config.weight)
        self.config = config

    def build_adapters(self, student: ModelShape, teacher: ModelShape) -> dict[str, nn.Module]:
        """A projector for each pair, and the weights of the pairs.

        Raises:
            UserError: more pairs are asked for than the shallower model has layers.
        """
        try:
            pairs = layer_pairs(student.num_layers, teacher.num_layers, self.config.num_pairs)
        except ValueError as error:
            raise UserError(f"objective.layerwise: {error}") from error
        projectors = [build_projector(student.hidden_size, teacher.hidden_size) for _ in pairs]
        mixer = LayerMixer(len(pairs), learnt=self.config.mixing == "learnt")
        return {LAYER_PROJECTORS: nn.ModuleList(projectors), LAYER_MIXER: mixer}

    def __call__(self, scene: Scene, moment: Moment) -> TermValue:
        """Compare pair by pair."""
        ours, theirs = scene.student.layers, scene.signal.features.layers
        assert ours is not None
        assert theirs is not None
        projectors = scene.adapters[LAYER_PROJECTORS]
        assert isinstance(projectors, nn.ModuleList)
        pairs = layer_pairs(len(ours) - 1, len(theirs) - 1, self.config.num_pairs)
        distances = [
            hidden_distance(
                projector(scene.pool_student(ours[own])[0]),
                scene.pool_teacher(theirs[other]),
                scene.lengths,
                kind=self.config.kind,
            ).sum()
            for projector, (own, other) in zip(projectors, pairs, strict=True)
        ]
        return TermValue(scene.adapters[LAYER_MIXER](torch.stack(distances)))


class ContrastiveTerm(HiddenTerm):
    """InfoNCE between student and teacher, summed over units or sequences; each is told apart from its whole batch."""

    name, needs_teacher = "contrastive", True
    decomposable = False

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__(config.weight)
        self.config = config
        self.counts = config.over

    def build_adapters(self, student: ModelShape, teacher: ModelShape) -> dict[str, nn.Module]:
        """The projector."""
        return {PROJECTOR: build_projector(student.head_size, teacher.head_size)}

    def __call__(self, scene: Scene, moment: Moment) -> TermValue:
        """Find each one's own among all."""
        if self.config.over == "sequences":
            counted = scene.counted_rows
            ours, theirs = (pool_sequences(side, scene.lengths) for side in (scene.projected, scene.target))
        else:
            counted = scene.counted_units
            ours, theirs = (side.flatten(0, 1) for side in (scene.projected, scene.target))
        ours, theirs = (side.index_select(0, counted) for side in (ours, theirs))
        return TermValue(contrastive(ours, theirs, temperature=self.config.temperature).sum())


class RoutingTerm(HiddenTerm):
    """Distance to a mixture of the teacher's own experts that fits the student, summed over units."""

    name, counts, needs_teacher = "routing", "units", True
    decomposable = False  # for the load balance

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config.weight)
        self.config = config
        self.views = Views(experts=(config.layer, int(-(-config.num_experts.largest // 1))))

    def build_adapters(self, student: ModelShape, teacher: ModelShape) -> dict[str, nn.Module]:
        """A projector into the space of the experts' outputs, and the router."""
        assert teacher.num_experts is not None
        return {
            ROUTING_PROJECTOR: build_projector(student.head_size, teacher.hidden_size),
            ROUTER: StudentAwareRouter(student.head_size, teacher.num_experts),
        }

    def __call__(self, scene: Scene, moment: Moment) -> TermValue:
        """Mix what the experts say, and compare."""
        experts = scene.signal.features.experts
        assert experts is not None
        counted = scene.counted_units  # (n,)
        student = scene.student_units[0].flatten(0, 1).index_select(0, counted)  # (n, H)
        gates, ids, outputs = (
            theirs.flatten(0, 1).index_select(0, counted.to(theirs.device)).to(student.device)
            for theirs in (experts.probs, experts.ids, experts.outputs)
        )
        result = scene.adapters[ROUTER](
            student,
            scene.adapters[ROUTING_PROJECTOR](student),
            gates=gates,
            ids=ids,
            outputs=outputs,
            active=self.config.num_experts.at(moment.step, moment.num_steps),
        )
        num_units = float(len(student))
        total = result.distance.sum() + self.config.anchor * result.anchor.sum()
        total = total + self.config.load_balance * num_units * result.load_balance
        one = total.new_tensor(num_units)
        return TermValue(
            total,
            {
                "routing/anchor": (result.anchor.detach().sum(), one),
                "routing/load_balance": (result.load_balance.detach() * num_units, one),
            },
        )

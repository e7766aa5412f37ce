"""The fields of what is minimised: each term with its weight and what it needs to know."""

from typing import Literal

from pydantic import Field, model_validator

from kdkit.config.part import Count, Part
from kdkit.schedules import Positive, Schedule, Weight

LossName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "alpha_beta",
]
Bounds = tuple[float, float]
LOSS_ARGUMENTS: dict[str, dict[str, Bounds]] = {
    "jsd": {"beta": (0.0, 1.0)},
    "skew_forward_kl": {"alpha": (0.0, 1.0)},
    "skew_reverse_kl": {"alpha": (0.0, 1.0)},
    "alpha_beta": {"alpha": (-2.0, 2.0), "beta": (-2.0, 2.0)},
}
"""What each loss takes besides the two distributions, and the open range of it; a skew may also be 0."""

TERM_NAMES = ("kd", "lm", "span", "dtw", "hidden", "attention", "layerwise", "contrastive", "routing")
"""Every term of the objective."""
UNIT_TERMS = ("dtw", "hidden", "attention", "layerwise", "contrastive", "routing")
"""Those that compare units of text."""
LAST_HIDDEN_TERMS = ("dtw", "hidden", "contrastive")
"""Of these, those that look at the last hidden states alone, which a cache can hold."""
CACHED_IDS = 64
"""Ids that a cached teacher keeps of a token where kd.top_k is unset: about 400 bytes; 256 take four times that."""


class KdConfig(Part):
    """The divergence between the two models' next-token distributions."""

    weight: Weight = Schedule.model_validate(1.0)
    """Share of the total; DistiLLM's kd_ratio is 1."""
    loss: LossName = "forward_kl"
    """Which divergence; `kdkit.losses` says when to pick which."""
    alpha: float | None = None
    """Skew of the skew divergences (DistiLLM: 0.1) or alpha of alpha_beta; None: the loss's own default."""
    beta: float | None = None
    """Teacher's share in jsd or beta of alpha_beta; None: the loss's own default."""
    temperature: Positive = Schedule.model_validate(1.0)
    """Softens both distributions before they are compared; 1 compares them as they are."""
    temperature_scaling: Literal["square", "none"] = "square"
    """square multiplies by temperature squared, so that gradients keep their size (Hinton et al. 2015)."""
    top_k: Count | None = None
    """Compare the teacher's K most likely tokens and the rest as one bucket; None compares all. A good K is 256."""
    across: Literal["grouped", "hybrid", "uld"] = "grouped"
    """Where tokenizers differ, at the first token of a span: `loss` on groups of tokens that may begin the same text,
    `loss` on the tokens that both vocabularies have with ULD on the others (hybrid), or ULD alone."""

    @model_validator(mode="after")
    def _arguments_fit(self) -> "KdConfig":
        takes = LOSS_ARGUMENTS.get(self.loss, {})
        for name, value in self.loss_arguments.items():
            if name not in takes:
                owners = ", ".join(loss for loss, names in LOSS_ARGUMENTS.items() if name in names)
                raise ValueError(f"{self.loss} takes no {name}; it belongs to {owners}")
            low, high = takes[name]
            if not (low < value < high or (value == 0.0 and "skew" in self.loss)):
                raise ValueError(f"{name} of {self.loss} is {value}; allowed is above {low:g} and below {high:g}")
        return self

    @model_validator(mode="after")
    def _alpha_beta_fit_each_other(self) -> "KdConfig":
        if self.loss != "alpha_beta" or self.alpha is None or self.beta is None:
            return self
        numbers = {"alpha": self.alpha, "beta": self.beta, "alpha + beta": self.alpha + self.beta}
        for name, value in numbers.items():
            if 0 < abs(value) < 0.01 or (name == "alpha + beta" and value < 0):
                raise ValueError(
                    f"{name} of alpha_beta is {value:g}; allowed is 0 exactly or at least 0.01 away from it, and a "
                    "sum that is not negative"
                )
        return self

    @property
    def loss_arguments(self) -> dict[str, float]:
        """The arguments that were set, for the loss function."""
        given = {"alpha": self.alpha, "beta": self.beta}
        return {name: value for name, value in given.items() if value is not None}


class LmConfig(Part):
    """Cross-entropy of the labels."""

    weight: Weight = Schedule.model_validate(0.0)
    """Share of the total; DistiLLM trains with 0 next to a kd weight of 1."""


class SpanConfig(Part):
    """How likely both models find the same bytes, where their tokenizers differ; with one tokenizer kd says more."""

    weight: Weight | None = None
    """Share of the total. None: that of kd where tokenizers differ, as kd compares the first token of a span alone."""
    temperature: float = Field(default=1.0, gt=0)
    """Takes this root of both likelihoods before they are compared; more brings long spans into range. ALM: 100."""


class HiddenConfig(Part):
    """Distance of the last hidden states, unit by unit: what dtw compares, without a choice of partners."""

    weight: Weight = Schedule.model_validate(0.0)
    """Share of the total; 0 is off."""
    kind: Literal["cosine", "mse"] = "cosine"
    """cosine ignores size; mse is the squared error relative to the states' own variance."""


class AttentionConfig(Part):
    """Divergence between the attention maps of the last layers, unit by unit; both models in attention `eager`.

    A student whose config drops attention while it trains (GPT-2: attn_pdrop 0.1) is compared as it is then, each map
    divided by its sum, which keeps the term above 0 even where the models agree: set the rate to 0 to be rid of that.
    """

    weight: Weight = Schedule.model_validate(0.0)
    """Share of the total; 0 is off."""
    num_layers: Count = 1
    """Pairs of layers, counted from the last one down. MiniLM: 1."""


class LayerwiseConfig(Part):
    """Distance of the hidden states of layers at equal shares of the depth, whichever model is the deeper."""

    weight: Weight = Schedule.model_validate(0.0)
    """Share of the total; 0 is off."""
    kind: Literal["cosine", "mse"] = "cosine"
    """As for hidden."""
    num_pairs: Count | None = None
    """Pairs of layers; None: as many as the shallower model has layers."""
    mixing: Literal["equal", "learnt"] = "equal"
    """What a pair counts; learnt weights keep at least half of the equal share, or they would run to the easiest."""


class ContrastiveConfig(Part):
    """Each state of the student has to find the teacher's state of the same text among all of the batch (InfoNCE)."""

    weight: Weight = Schedule.model_validate(0.0)
    """Share of the total; 0 is off."""
    over: Literal["units", "sequences"] = "units"
    """What is told apart: units, or whole answers, which need a batch of more than a few rows."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the similarities."""


class RoutingConfig(Part):
    """The outputs of an MoE teacher's own experts, mixed by what the student can follow, as the student's target."""

    weight: Weight = Schedule.model_validate(0.0)
    """Share of the total; 0 is off."""
    layer: int = -1
    """MoE layer of the teacher, counted from the end where negative."""
    num_experts: Positive = Schedule(start=1.0, end=4.0)
    """Experts in the mixture, most likely first; in between, the next one takes part by the fraction. Seeds: 1 to 4."""
    anchor: float = Field(default=0.1, ge=0)
    """Pull of the mixture towards the teacher's own gates; without one the easiest expert wins."""
    load_balance: float = Field(default=0.01, ge=0)
    """Cost of sending all units to one expert (0 when even, 1 at worst). Switch Transformers: 0.01."""

    @model_validator(mode="after")
    def _an_expert_at_least(self) -> "RoutingConfig":
        if self.num_experts.smallest < 1:
            raise ValueError(f"num_experts goes down to {self.num_experts.smallest:g}; a mixture has at least 1")
        return self


class AdaptiveBandConfig(Part):
    """A soft band around where the alignment is expected to run (WARD, DWA-KD)."""

    mix: float = Field(default=0.7, ge=0, le=1)
    """Share of the expected position in the band's centre; the rest is the diagonal. DWA-KD: 0.7."""
    half_width: float = Field(default=5.0, ge=0)
    """Units on either side that cost nothing extra. DWA-KD: 5."""
    entropy_scale: float = Field(default=2.0, ge=0)
    """How much a row's uncertainty widens the band, in units per nat. DWA-KD: 2."""
    penalty: float = Field(default=1.0, ge=0)
    """Cost added far outside the band. DWA-KD: 1."""
    begin: float = Field(default=0.1, ge=0, le=1)
    """Fraction of the stage before which the band is off, since early alignments mean little."""


class DtwConfig(Part):
    """Soft dynamic time warping between the two models' last hidden states over the answer."""

    weight: Weight = Schedule.model_validate(0.0)
    """Share of the total; 0 is off."""
    gamma: Positive = Schedule.model_validate(0.1)
    """Smoothing of the minimum, in units of the cost; smaller is closer to hard DTW. WARD: 0.1."""
    band: Count | None = 32
    """Largest distance from the (slope-corrected) diagonal, in units; None is off. WARD: 32."""
    metric: Literal["cosine", "sqeuclidean"] = "cosine"
    """Distance between two hidden states."""
    normalize: Literal["max_length", "sum_length", "none"] = "max_length"
    """Constant of the two lengths by which a sequence's value is divided."""
    divergence: bool = True
    """Take off the self-alignments, so that the value and its gradient vanish at equality (Blondel 2021)."""
    importance: Literal["none", "inverse_entropy"] = "none"
    """inverse_entropy weighs units by how certain the teacher is there, on each side by itself (WARD)."""
    adaptive_band: AdaptiveBandConfig | None = None
    """Soft band around the expected alignment; None is off."""


class ObjectiveConfig(Part):
    """What is minimised: the weighted sum of the terms, each a mean over counted items."""

    kd: KdConfig = KdConfig()
    lm: LmConfig = LmConfig()
    span: SpanConfig = SpanConfig()
    dtw: DtwConfig = DtwConfig()
    hidden: HiddenConfig = HiddenConfig()
    attention: AttentionConfig = AttentionConfig()
    layerwise: LayerwiseConfig = LayerwiseConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    routing: RoutingConfig = RoutingConfig()
    unit: Literal["word", "token"] = "word"
    """What the terms over hidden states compare: states averaged over words, or those of single tokens."""
    adapter_learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of what the terms bring along, such as the student-to-teacher projector. DWA-KD: 1e-3."""
    chunk_tokens: Count = 256
    """Positions whose logits exist at the same time; smaller saves memory."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: end the run, or skip that step and count it."""

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> "ObjectiveConfig":
        if max(schedule.largest for schedule in self.weights.values()) == 0:
            raise ValueError("every term has the weight 0; give kd, lm or another one above it")
        return self

    @property
    def weights(self) -> dict[str, Schedule]:
        """The weight of each term by its name; of span what the config says, 0 where it follows kd."""
        given = {name: getattr(self, name).weight for name in TERM_NAMES}
        return {name: Schedule.model_validate(0.0) if weight is None else weight for name, weight in given.items()}

    @property
    def needs_teacher(self) -> bool:
        """Whether a term besides lm is on: such a one learns from any text, the student's own included."""
        return any(schedule.largest > 0 for name, schedule in self.weights.items() if name != "lm")

    @property
    def compares_units(self) -> bool:
        """Whether a term over units of text is on."""
        return any(self.weights[name].largest > 0 for name in UNIT_TERMS)

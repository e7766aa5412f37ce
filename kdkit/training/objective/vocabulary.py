"""Terms over what comes next: divergences, labels, and the likelihood of spans."""

from functools import partial

from kdkit.config import KdConfig, LmConfig, SpanConfig
from kdkit.data.batch import Batch
from kdkit.losses import (
    LOSSES,
    CrossTerm,
    DivergenceTerm,
    LabelTerm,
    SpanTerm,
    grouped,
    hybrid,
    span_likelihood,
    uld,
)
from kdkit.losses.divergences import Loss
from kdkit.losses.terms import Term as HeadTerm
from kdkit.schedules import Schedule
from kdkit.teacher.cross import CrossSignal
from kdkit.teacher.signal import TeacherSignal
from kdkit.training.objective.across import Across
from kdkit.training.objective.terms import Item, Moment, VocabularyTerm, label_targets


class KdTerm(VocabularyTerm):
    """Divergence between teacher and student over the vocabulary, summed over counted tokens."""

    name, needs_teacher = "kd", True
    counts: Item = "tokens"

    def __init__(self, config: KdConfig) -> None:
        super().__init__(config.weight)
        self.config = config
        self.softening: Schedule = config.temperature
        self.loss = partial(LOSSES[config.loss], **config.loss_arguments)

    def temperature(self, moment: Moment) -> float:
        """Softening of both distributions at a moment."""
        return self.softening.at(moment.step, moment.num_steps)

    def scale(self, moment: Moment) -> float:
        """Temperature squared where the config asks for it."""
        return self.temperature(moment) ** 2 if self.config.temperature_scaling == "square" else 1.0

    def head_term(
        self, batch: Batch, signal: TeacherSignal | CrossSignal | None, moment: Moment, coefficient: float
    ) -> HeadTerm:
        """The term as the head pass takes it."""
        return DivergenceTerm(self.name, self.loss, weight=coefficient, temperature=self.temperature(moment))


class CrossKdTerm(KdTerm):
    """The same across two vocabularies, summed over the spans that both tokenizers agree on.

    At the first token of a span both models have read the same bytes, so that what they expect next can be compared.
    """

    counts: Item = "spans"

    def __init__(self, config: KdConfig, across: Across) -> None:
        super().__init__(config)
        self.across = across

    def head_term(
        self, batch: Batch, signal: TeacherSignal | CrossSignal | None, moment: Moment, coefficient: float
    ) -> HeadTerm:
        """The term as the head pass takes it."""
        self.across = self.across.to(batch["positions"].device)
        compared: Loss
        if self.config.across == "grouped":
            assert self.across.groups is not None
            compared = partial(grouped, groups=self.across.groups, loss=self.loss, top_k=self.config.top_k)
        elif self.config.across == "hybrid":
            assert self.across.match is not None
            compared = partial(hybrid, match=self.across.match, loss=self.loss, top_k=self.config.top_k)
        else:
            compared = partial(uld, top_k=self.config.top_k)
        return CrossTerm(self.name, compared, weight=coefficient, temperature=self.temperature(moment))


class LmTerm(VocabularyTerm):
    """Cross-entropy of the labels, summed over the counted tokens of gold rows: what the student wrote is no label."""

    name, counts, needs_teacher = "lm", "labels", False

    def __init__(self, config: LmConfig) -> None:
        super().__init__(config.weight)

    def head_term(
        self, batch: Batch, signal: TeacherSignal | CrossSignal | None, moment: Moment, coefficient: float
    ) -> HeadTerm:
        """The term as the head pass takes it."""
        return LabelTerm(self.name, label_targets(batch), weight=coefficient, token_weights=batch["is_gold"])


class SpanLikelihoodTerm(VocabularyTerm):
    """How likely both models find the text of each span, where their tokenizers differ; without a weight of its own it
    has that of kd, which says nothing of the tokens within a span: a student would never learn to end a word.

    A mean over the student's counted tokens, not over spans: the likelihood of a span of many tokens is a product of as
    many conditionals.
    """

    name, counts, needs_teacher = "span", "tokens", True

    def __init__(self, config: SpanConfig, *, follows: Schedule | None) -> None:
        super().__init__(config.weight or follows or Schedule.model_validate(0.0))
        self.config = config

    def head_term(
        self, batch: Batch, signal: TeacherSignal | CrossSignal | None, moment: Moment, coefficient: float
    ) -> HeadTerm:
        """The term as the head pass takes it."""
        assert isinstance(signal, CrossSignal)
        return SpanTerm(
            self.name,
            label_targets(batch),
            signal.span_logprobs,
            weight=coefficient,
            temperature=self.config.temperature,
            loss=span_likelihood,
        )

"""Losses as pure functions, and the chunked pass that applies them from hidden states."""

from kdkit.losses.cross_tokenizer import (
    GroupedIds,
    VocabularyGroups,
    VocabularyMatch,
    grouped,
    hybrid,
    span_likelihood,
    uld,
)
from kdkit.losses.divergences import (
    LOSSES,
    Loss,
    alpha_beta,
    divergence,
    forward_kl,
    jsd,
    resolve_loss,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from kdkit.losses.head_pass import HeadPassResult, head_pass, linear_divergence, logits_pass
from kdkit.losses.spans import Spans
from kdkit.losses.terms import CrossTerm, DivergenceTerm, LabelTerm, SpanTerm

__all__ = [
    "LOSSES",
    "CrossTerm",
    "DivergenceTerm",
    "GroupedIds",
    "HeadPassResult",
    "LabelTerm",
    "Loss",
    "SpanTerm",
    "Spans",
    "VocabularyGroups",
    "VocabularyMatch",
    "alpha_beta",
    "divergence",
    "forward_kl",
    "grouped",
    "head_pass",
    "hybrid",
    "jsd",
    "linear_divergence",
    "logits_pass",
    "resolve_loss",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "span_likelihood",
    "tvd",
    "uld",
]

"""Losses as pure functions, and the chunked pass that applies them from hidden states."""

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
from kdkit.losses.terms import DivergenceTerm, LabelTerm

__all__ = [
    "LOSSES",
    "DivergenceTerm",
    "HeadPassResult",
    "LabelTerm",
    "Loss",
    "alpha_beta",
    "divergence",
    "forward_kl",
    "head_pass",
    "jsd",
    "linear_divergence",
    "logits_pass",
    "resolve_loss",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
]

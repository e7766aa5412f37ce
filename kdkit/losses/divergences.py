"""Divergences between teacher p and student q, on log-probabilities, one value per position.

They neither reduce nor mask, and know no temperature and no model. Each is ≥ 0 up to rounding and 0 at equality: the
teacher's entropy is included. Gradient flows to the student only; it is formed in closed form beside the value, so
that a position costs few passes over the vocabulary.

An id whose log-probability is −inf on both sides contributes nothing. On one side only it is an error of the caller.
`divergence` looks and says so; the losses do not, as a look makes the host wait for the device. From them such an id
gets either its exact contribution or inf or NaN, at which a training run stops: never a wrong finite number.
"""

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdkit.teacher.signal import at_least_float32, tempered_logprobs

Loss = Callable[[Tensor, Tensor], Tensor]
"""(student_logprobs (N, C), teacher_logprobs (N, C)) -> (N,); a plain callable is differentiated by autograd."""

_Entries = tuple[Tensor, Callable[[], Tensor]]
"""Summands (N, C), and how to get their derivative by log q (N, C); asked for once, so that it may overwrite."""

_EntriesOf = Callable[[Tensor, Tensor, Tensor], _Entries]
"""(log q, log p, log q/p), each (N, C) -> their entries."""

# Closer to a limit than this, float32 loses the divergence in cancellation.
_SMALLEST_EXPONENT = 0.01


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Forward Kullback-Leibler divergence KL(p‖q), in nats.

    Σ p (log p − log q). Covers all that the teacher finds likely, the usual start; `reverse_kl` where a small student
    should rather leave out than smear.

    Args:
        student_logprobs: (N, C) log-probabilities; gradient flows.
        teacher_logprobs: (N, C) log-probabilities; no gradient.
    Returns:
        (N,) float32, float64 for float64; ≥ 0, 0 where p = q. Not multiplied by temperature².
    Source: Hinton et al. 2015, arXiv:1503.02531. Differs: the teacher's entropy is included.
    """
    return _sum_entries(student_logprobs, teacher_logprobs, _forward_kl_entries)


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(q‖p), in nats.

    Σ q (log q − log p). Punishes what the teacher finds unlikely, so that the student settles on modes; for a student
    that has been warmed up, where `forward_kl` makes it too diffuse.

    Args:
        student_logprobs: (N, C) log-probabilities; gradient flows.
        teacher_logprobs: (N, C) log-probabilities; no gradient.
    Returns:
        (N,) float32, float64 for float64; ≥ 0, 0 where p = q.
    Source: Gu et al. 2023, arXiv:2306.08543. Differs: per token, on given text, not per sequence by sampling.
    """
    return _sum_entries(student_logprobs, teacher_logprobs, _reverse_kl_entries)


def jsd(student_logprobs: Tensor, teacher_logprobs: Tensor, *, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, in nats.

    β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q. Bounded, between `forward_kl` and `reverse_kl`: for noisy teachers.

    Args:
        student_logprobs: (N, C) log-probabilities; gradient flows.
        teacher_logprobs: (N, C) log-probabilities; no gradient.
        beta: the teacher's share in m, strictly between 0 and 1.
    Returns:
        (N,) float32, float64 for float64; 0 where p = q, at most the entropy of (β, 1−β), log 2 for a half.
    Raises:
        ValueError: beta is not strictly between 0 and 1.
    Source: Agarwal et al. 2023, arXiv:2306.13649, generalised JSD(β). Differs: none.
    """
    if not 0 < beta < 1:
        raise ValueError(f"jsd: beta={beta}, must be between 0 and 1; at the ends use forward_kl or reverse_kl")
    return _sum_entries(student_logprobs, teacher_logprobs, partial(_jsd_entries, beta))


def tvd(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Total variation distance, as probability mass.

    ½ Σ |p − q|. Bounded and indifferent to how small a small probability is; `jsd` where a smooth gradient matters.

    Args:
        student_logprobs: (N, C) log-probabilities; gradient flows, 0 where p = q.
        teacher_logprobs: (N, C) log-probabilities; no gradient.
    Returns:
        (N,) float32, float64 for float64; 0 where p = q, at most 1.
    Source: Wen et al. 2023, arXiv:2307.15190, TVD. Differs: per token.
    """
    return _sum_entries(student_logprobs, teacher_logprobs, _tvd_entries)


def skew_forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, *, alpha: float = 0.1) -> Tensor:
    """Skewed forward Kullback-Leibler divergence KL(p ‖ αp + (1−α)q), in nats.

    Bounded by −log α: where the student gives nearly nothing to a likely token, gradients stay small, unlike those of
    `forward_kl`.

    Args:
        student_logprobs: (N, C) log-probabilities; gradient flows.
        teacher_logprobs: (N, C) log-probabilities; no gradient.
        alpha: the teacher's share in the mixture, 0 (`forward_kl`) to below 1.
    Returns:
        (N,) float32, float64 for float64; ≥ 0, 0 where p = q.
    Raises:
        ValueError: alpha is not within [0, 1).
    Source: Ko et al. 2024, arXiv:2402.03898, α-SKL. Differs: the teacher's entropy is included.
    """
    _check_skew("skew_forward_kl", alpha)
    if alpha == 0:
        return forward_kl(student_logprobs, teacher_logprobs)
    return _sum_entries(student_logprobs, teacher_logprobs, partial(_skew_forward_kl_entries, alpha))


def skew_reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, *, alpha: float = 0.1) -> Tensor:
    """Skewed reverse Kullback-Leibler divergence KL(q ‖ (1−α)p + αq), in nats.

    Bounded by −log α: a token of the student that the teacher excludes does not blow up, as it does with `reverse_kl`.
    The first choice for a student that also learns from its own text.

    Args:
        student_logprobs: (N, C) log-probabilities; gradient flows.
        teacher_logprobs: (N, C) log-probabilities; no gradient.
        alpha: the student's share in the mixture, 0 (`reverse_kl`) to below 1.
    Returns:
        (N,) float32, float64 for float64; ≥ 0, 0 where p = q.
    Raises:
        ValueError: alpha is not within [0, 1).
    Source: Ko et al. 2024, arXiv:2402.03898, α-SRKL. Differs: the mixture is formed in log space.
    """
    _check_skew("skew_reverse_kl", alpha)
    if alpha == 0:
        return reverse_kl(student_logprobs, teacher_logprobs)
    return _sum_entries(student_logprobs, teacher_logprobs, partial(_skew_reverse_kl_entries, alpha))


def alpha_beta(student_logprobs: Tensor, teacher_logprobs: Tensor, *, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """Alpha-beta divergence.

    −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)], by its closed form where α, β or α+β is 0. (1, 0) is
    `forward_kl`, (0, 1) `reverse_kl`; between them α and β set apart how much it minds a gap and how much it minds
    where the student is sure. When there is time to tune two numbers.

    Args:
        student_logprobs: (N, C) log-probabilities; gradient flows.
        teacher_logprobs: (N, C) log-probabilities; no gradient.
        alpha: exponent of p; 0, or at least 0.01 away from it.
        beta: exponent of q; the same.
    Returns:
        (N,) float32, float64 for float64; ≥ 0, 0 where p = q. With a negative exponent it overflows to inf once
        |log p − log q| nears 88 / |exponent|.
    Raises:
        ValueError: alpha, beta or alpha + beta is nearer to 0 than 0.01 but not 0, or alpha + beta < 0.
    Source: Wang et al. 2025, arXiv:2505.04560, α-β-divergence; limits: Cichocki et al. 2011, Entropy 13(1), 134-170.
        Differs: α + β < 0 is refused, as it divides by probabilities that may be 0.
    """
    total = round(alpha + beta, 12)  # 0.3 - 0.3 in floating point
    allowed = [x == 0 or _SMALLEST_EXPONENT <= abs(x) < math.inf for x in (alpha, beta, total)]
    if total < 0 or not all(allowed):
        raise ValueError(
            f"alpha_beta: alpha={alpha}, beta={beta}; alpha, beta and their sum must each be 0 or at least "
            f"{_SMALLEST_EXPONENT} in size, and the sum not negative"
        )
    if alpha == beta == 0:
        entries: _EntriesOf = _log_square_entries
    elif total == 0:
        entries = partial(_log_ratio_entries, alpha)
    elif beta == 0:
        entries = partial(_teacher_power_entries, alpha)
    elif alpha == 0:
        entries = partial(_student_power_entries, beta)
    else:
        entries = partial(_alpha_beta_entries, alpha, beta)
    return _sum_entries(student_logprobs, teacher_logprobs, entries)


def divergence(
    name_or_loss: str | Loss,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    **own: float,
) -> Tensor:
    """A divergence straight from logits, with its inputs checked; for analysis and small vocabularies.

    The check for −inf waits for the device, and the logits must exist: training goes through `head_pass`.

    Args:
        name_or_loss: a name in `LOSSES`, or any loss on log-probabilities.
        student_logits: (N, V); −inf leaves an id out; gradient flows.
        teacher_logits: (N, V); −inf at the same ids; no gradient.
        temperature: divides both sides' logits, above 0.
        **own: the loss's own arguments, such as alpha.
    Returns:
        (N,) float32, float64 for float64; not multiplied by temperature².
    Raises:
        ValueError: unknown name; shapes differ; temperature is not above 0; −inf on one side only.
    """
    loss = resolve_loss(name_or_loss, **own)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}: shapes must "
            "agree; cut padded vocabularies to the ids that both tokenizers share"
        )
    num_alone = int((student_logits.isneginf() ^ teacher_logits.isneginf()).sum())
    if num_alone:
        raise ValueError(
            f"{num_alone} logits are -inf on one side only, where a divergence is infinite or undefined: mask the same "
            "ids for student and teacher"
        )
    student = tempered_logprobs(student_logits, temperature)  # (N, V)
    teacher = tempered_logprobs(teacher_logits.detach(), temperature)  # (N, V)
    return loss(student, teacher)


def resolve_loss(name_or_loss: str | Loss, **own: float) -> Loss:
    """The loss that is meant, with its own arguments bound.

    Args:
        name_or_loss: a name in `LOSSES`, or a callable.
        **own: arguments to bind, such as alpha.
    Returns:
        (student_logprobs, teacher_logprobs) -> (N,).
    Raises:
        ValueError: unknown name; the nearest known one is named.
    """
    if callable(name_or_loss):
        return partial(name_or_loss, **own) if own else name_or_loss
    if name_or_loss not in LOSSES:
        near = difflib.get_close_matches(name_or_loss, LOSSES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown loss {name_or_loss!r}: known are {', '.join(LOSSES)}{hint}")
    return partial(LOSSES[name_or_loss], **own)


class _EntrySum(torch.autograd.Function):
    """Sum over the last dimension, with the closed-form derivative by log q."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, entries: _EntriesOf) -> Tensor:
        log_ratio = log_q - log_p  # (N, C), NaN where both are −inf
        log_ratio.masked_fill_(log_q.isneginf().logical_and_(log_p.isneginf()), 0.0)
        values, derivative = entries(log_q, log_p, log_ratio)
        total = values.sum(-1)  # (N,)
        del values
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(derivative())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return derivative * grad.unsqueeze(-1), None, None


def _sum_entries(student_logprobs: Tensor, teacher_logprobs: Tensor, entries: _EntriesOf) -> Tensor:
    """Apply `_EntrySum` in float32 or better; no derivative is formed under no_grad."""
    student = student_logprobs if torch.is_grad_enabled() else student_logprobs.detach()
    return _EntrySum.apply(at_least_float32(student), at_least_float32(teacher_logprobs.detach()), entries)


def _check_skew(name: str, alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"{name}: alpha={alpha}, must be at least 0 and below 1 (1 is zero everywhere)")


def _log_mix(share: float, log_x: Tensor) -> Tensor:
    """log(share + (1 − share) x)."""
    log_share = torch.full((), math.log(share), dtype=log_x.dtype, device=log_x.device)
    return torch.logaddexp(log_share, log_x + math.log1p(-share))


def _forward_kl_entries(log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    p = log_p.exp()
    return (p * log_ratio).neg_(), p.neg


def _reverse_kl_entries(log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    q = log_q.exp()
    return q * log_ratio, lambda: (log_ratio + 1).mul_(q)


def _jsd_entries(beta: float, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    log_p_over_m = _log_mix(beta, log_ratio).neg_()
    log_q_over_m = _log_mix(1 - beta, -log_ratio).neg_()  # not log_ratio + log_p_over_m, which cancels
    q = log_q.exp()
    values = log_p.exp().mul_(log_p_over_m).mul_(beta).add_(q * log_q_over_m, alpha=1 - beta)
    return values, lambda: log_q_over_m.mul_(q).mul_(1 - beta)


def _tvd_entries(log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    q = log_q.exp()
    gap = q - log_p.exp()
    return gap.abs().mul_(0.5), lambda: gap.sign().mul_(q).mul_(0.5)


def _skew_forward_kl_entries(alpha: float, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    log_p_over_m = _log_mix(alpha, log_ratio).neg_()
    values = log_p.exp().mul_(log_p_over_m)
    return values, lambda: log_p_over_m.add_(log_q).exp_().mul_(alpha - 1)  # −(1 − α) q p/m


def _skew_reverse_kl_entries(alpha: float, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    log_q_over_m = _log_mix(alpha, -log_ratio).neg_()
    q = log_q.exp()
    values = q * log_q_over_m
    # q (log q/m + 1 − α q/m)
    return values, lambda: log_q_over_m.exp().mul_(-alpha).add_(log_q_over_m).add_(1).mul_(q)


def _alpha_beta_entries(alpha: float, beta: float, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    total = alpha + beta
    cross = (log_p * total).add_(log_ratio, alpha=beta).exp_()  # p^α q^β, 0 where both are
    p_power = (log_p * total).exp_()
    q_power = (log_q * total).exp_()
    values = p_power.mul_(alpha / total).add_(q_power, alpha=beta / total).sub_(cross)
    return values.div_(alpha * beta), lambda: q_power.sub_(cross).div_(alpha)


def _teacher_power_entries(alpha: float, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    """The limit β → 0: 1/α² [p^α log(p^α/q^α) − p^α + q^α]."""
    p_power, q_power = (log_p * alpha).exp_(), (log_q * alpha).exp_()
    gap = q_power - p_power
    return (p_power * log_ratio).mul_(-alpha).add_(gap).div_(alpha**2), lambda: gap.div_(alpha)


def _student_power_entries(beta: float, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    """The limit α → 0: 1/β² [q^β log(q^β/p^β) − q^β + p^β]."""
    p_power, q_power = (log_p * beta).exp_(), (log_q * beta).exp_()
    values = (q_power * log_ratio).mul_(beta).sub_(q_power).add_(p_power).div_(beta**2)
    return values, lambda: q_power.mul_(log_ratio)


def _log_ratio_entries(alpha: float, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    """The limit α + β → 0: 1/α² [(p/q)^α − 1 − log (p/q)^α]."""
    excess = (log_ratio * -alpha).expm1_()  # (p/q)^α − 1
    values = (excess + alpha * log_ratio).div_(alpha**2)
    return values, lambda: excess.div_(-alpha)


def _log_square_entries(log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> _Entries:
    """The limit α, β → 0: ½ (log p/q)²."""
    return log_ratio.square().mul_(0.5), lambda: log_ratio


LOSSES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tvd": tvd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "alpha_beta": alpha_beta,
}
"""Every divergence by its name in a config."""

"""Losses between a student and a teacher of different vocabularies, V and W ids wide.

Both read the same bytes, so they are compared where their tokens meet: a span is the smallest stretch of bytes at
both ends of which a token of either side ends, and at its first position both have read the same.

=================  ==============================================  =======================  ===========================
Loss               When                                            Range                    Cost of a span
=================  ==============================================  =======================  ===========================
`grouped`          the first choice: what each side may begin a    that of its divergence,  the divergence and `uld`,
                   text with is compared group by group            and 0 to 2 more          each over a part of the ids
`hybrid`           the vocabularies share nearly all tokens of     that of its divergence,  the same
                   the text by their bytes; else it teaches the    and 0 to 2 more
                   student to begin words as only the teacher can
`uld`              they share little, as other scripts do;         0 to 2                   a selection of K; to sort
                   with top_k where V or W is large                                         150,000 takes 30 times that
`span_likelihood`  spans of several tokens; or the teacher's       0 and more               none beside the labels'
                   log-probability of the text is all one has                               log-probabilities
=================  ==============================================  =======================  ===========================

`grouped`, `hybrid` and `uld` see the whole distribution over one token, the first of the span. `span_likelihood` sees
all tokens of the span, but of each distribution only the outcome that the text took. So either goes together with it.

Without top_k, float32 on the CPU goes through compiled loops where numba is installed, which sort next to nothing:
`cross_native`.

They neither reduce nor mask. Each is ≥ 0 up to rounding and 0 at equality; gradient flows to the student only.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkit.losses import cross_native
from kdkit.losses.divergences import Loss, forward_kl
from kdkit.teacher.signal import at_least_float32, bucket_logprobs, log_mass

# Stands for an id without mass, and unlike −inf has gradients.
_LEFT_OUT = -1e30


@dataclass(frozen=True, eq=False)
class VocabularyMatch:
    """Which ids of two vocabularies stand for the same bytes; made once, as the check reads the ids.

    Raises:
        ValueError: the ids are no pairs, beyond a vocabulary's width, or in several pairs.
    """

    student_ids: Tensor
    """(C,) int64"""
    teacher_ids: Tensor
    """(C,) int64; entry c of both stands for the same bytes"""
    student_width: int
    """V of the student's logits; ids beyond its tokenizer are unmatched."""
    teacher_width: int
    """W of the teacher's logits."""
    student_rest: Tensor = field(init=False)
    """(V − C,) int64 ids that are in no pair"""
    teacher_rest: Tensor = field(init=False)
    """(W − C,) int64"""

    def __post_init__(self) -> None:
        if self.student_ids.shape != self.teacher_ids.shape or self.student_ids.dim() != 1 or not len(self.student_ids):
            raise ValueError(
                f"student_ids {tuple(self.student_ids.shape)}, teacher_ids {tuple(self.teacher_ids.shape)}: must be "
                "pairs, both of shape (C,); vocabularies without any pair can be compared by uld"
            )
        student_rest = _unmatched("student", self.student_ids, self.student_width)
        teacher_rest = _unmatched("teacher", self.teacher_ids, self.teacher_width)
        object.__setattr__(self, "student_rest", student_rest)  # the way to set a frozen field
        object.__setattr__(self, "teacher_rest", teacher_rest)

    @property
    def has_bucket(self) -> bool:
        """Whether both sides have unmatched ids; a bucket for them is none that one side could never fill."""
        return len(self.student_rest) > 0 and len(self.teacher_rest) > 0

    def to(self, device: torch.device | str) -> "VocabularyMatch":
        """The same match on a device; itself where it is there already."""
        if self.student_ids.device == torch.empty(0, device=device).device:
            return self
        student_ids, teacher_ids = self.student_ids.to(device), self.teacher_ids.to(device)
        return VocabularyMatch(student_ids, teacher_ids, self.student_width, self.teacher_width)


def uld(student_logprobs: Tensor, teacher_logprobs: Tensor, *, top_k: int | None = None) -> Tensor:
    """Universal logit distillation: distance of the sorted probabilities.

    Σ_r |p_(r) − q_(r)|, the shorter filled up with zeros. The ids mean nothing: a student that is as sure as the
    teacher, but of another token, is at distance 0. So it goes beside a term that knows the text, such as `LabelTerm`
    or `span_likelihood`; `hybrid` where the vocabularies share ids.

    Args:
        student_logprobs: (N, V) normalised log-probabilities; gradient flows.
        teacher_logprobs: (N, W) normalised log-probabilities; no gradient.
        top_k: take the K largest of each side by rank and compare the mass of all others as one; None ranks all.
    Returns:
        (N,) float32, float64 for float64; 0 to 2. With top_k never more than without, and equal from K = max(V, W).
    Raises:
        ValueError: top_k is below 1.
    Source: Boizard et al. 2024, arXiv:2402.12030, the distance in its ULD loss. Differs: top_k; the cross-entropy is
        a term of its own.
    """
    _check_top_k(top_k)
    student, teacher = at_least_float32(student_logprobs), at_least_float32(teacher_logprobs.detach())
    if top_k is None and cross_native.takes(student, teacher):
        return cross_native.ranked_distance(student, teacher)
    return _ranked_distance(student, teacher, top_k)


def span_likelihood(student_logprobs: Tensor, teacher_logprobs: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Divergence of the probabilities of a whole span, in nats.

    KL(p^(1/T) ‖ q^(1/T)) of two outcomes, this span or any other. p and q are the products of the tokens'
    probabilities, so that it does not matter into how many tokens either side cuts the span. Not included: other
    tokenizations of the same bytes, whose probability a model's token probabilities do not give.

    Args:
        student_logprobs: (S,) sum of the student's log-probabilities over the tokens of each span; gradient flows.
        teacher_logprobs: (S,) the same of the teacher; no gradient.
        temperature: T, above 0; above 1 it keeps spans of small probability from counting next to nothing.
    Returns:
        (S,) float32, float64 for float64; ≥ 0, 0 where p = q. A probability closer to 1 than rounding tells (1e-7 in
        float32) counts as that close, for the gradient too. Not multiplied by temperature.
    Raises:
        ValueError: temperature is not above 0.
    Source: Minixhofer et al. 2025, arXiv:2503.20083, approximate likelihood matching with f = KL. Differs: no
        correction for tokenization bias.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"span_likelihood: temperature {temperature}: give a finite number above 0")
    student = at_least_float32(student_logprobs) / temperature
    teacher = at_least_float32(teacher_logprobs.detach()) / temperature
    return forward_kl(_with_any_other(student), _with_any_other(teacher))


def hybrid(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    match: VocabularyMatch,
    loss: Loss,
    top_k: int | None = None,
    unmatched_weight: float = 1.0,
) -> Tensor:
    """A divergence over the ids that both vocabularies have, universal logit distillation over the others.

    loss over C + 1 outcomes, the matched ids and one bucket for all others, plus unmatched_weight · Σ_r |p_(r) − q_(r)|
    over the unmatched ids' probabilities, which are not normalised anew. Where one vocabulary has no unmatched id it
    has no bucket either: there the divergence is over the matched ids alone, normalised.

    Args:
        student_logprobs: (N, V) normalised log-probabilities; gradient flows.
        teacher_logprobs: (N, W) normalised log-probabilities; no gradient.
        match: the pairs, on the same device, for these V and W.
        loss: a divergence such as those in `LOSSES`.
        top_k: compare the teacher's K most likely matched ids, all others in the bucket, and rank K unmatched ids of
            each side; None takes all.
        unmatched_weight: factor on the second part; at 0 it is not computed.
    Returns:
        (N,) float32, float64 for float64; 0 where all compared probabilities are equal. Equal to `loss` where all ids
        match.
    Raises:
        ValueError: the log-probabilities are not as wide as the match says; top_k is below 1.
    Source: Boizard et al. 2024, arXiv:2402.12030 for the unmatched ids. Differs: the matched ones are compared by id.
    """
    _check_top_k(top_k)
    if (student_logprobs.shape[-1], teacher_logprobs.shape[-1]) != (match.student_width, match.teacher_width):
        raise ValueError(
            f"log-probabilities over {student_logprobs.shape[-1]} and {teacher_logprobs.shape[-1]} ids, a match of "
            f"{match.student_width} and {match.teacher_width}: make it for the width of the models' logits"
        )
    student, teacher = at_least_float32(student_logprobs), at_least_float32(teacher_logprobs.detach())
    if top_k is None and cross_native.takes(student, teacher):
        return _native_hybrid(student, teacher, match=match, loss=loss, unmatched_weight=unmatched_weight)
    student_rest = student.index_select(-1, match.student_rest)  # (N, V − C)
    teacher_rest = teacher.index_select(-1, match.teacher_rest)  # (N, W − C)
    columns = _matched_columns(student, teacher, (student_rest, teacher_rest), match=match, top_k=top_k)
    value = loss(*columns)  # (N,)
    if unmatched_weight == 0:
        return value
    mass_gap = 0.0 if top_k is None else student_rest.exp().sum(-1) - teacher_rest.exp().sum(-1)  # (N,)
    return value + unmatched_weight * _ranked_distance(student_rest, teacher_rest, top_k, mass_gap)


def _native_hybrid(
    student: Tensor, teacher: Tensor, *, match: VocabularyMatch, loss: Loss, unmatched_weight: float
) -> Tensor:
    """`hybrid` without top_k, by compiled loops."""
    has_bucket = match.has_bucket
    *columns, distance = cross_native.compare(
        student,
        teacher,
        student_ids=(match.student_ids, match.student_rest),
        teacher_ids=(match.teacher_ids, match.teacher_rest),
        with_bucket=has_bucket,
        with_distance=unmatched_weight != 0,
    )  # (N, C + 1) or (N, C) twice, (N,)
    value = loss(*columns if has_bucket else (side.log_softmax(-1) for side in columns))  # (N,)
    return value if unmatched_weight == 0 else value + unmatched_weight * distance


@dataclass(frozen=True, eq=False)
class GroupedIds:
    """The ids of one vocabulary, put into G groups; made once, as it reads the groups.

    Raises:
        ValueError: a group has no id, or an id is in a group beyond them.
    """

    group_ids: Tensor
    """(V,) int64 group of each id, 0 to G − 1; −1 for an id in none."""
    num_groups: int
    """G."""
    members: Tensor = field(init=False)
    """(M,) int64 ids that are in a group"""
    free: Tensor = field(init=False)
    """(V − M,) int64 ids that are in none"""

    def __post_init__(self) -> None:
        ids = self.group_ids
        if ids.dtype != torch.int64 or ids.dim() != 1 or self.num_groups < 1:
            raise ValueError(
                f"group_ids {tuple(ids.shape)} of {ids.dtype}, {self.num_groups} groups: must be (V,) of int64, and 1 "
                "group or more"
            )
        if set(ids.unique().tolist()) - {-1} != set(range(self.num_groups)):
            raise ValueError(
                f"group_ids from {int(ids.min())} to {int(ids.max())} for {self.num_groups} groups: each of 0 to "
                f"{self.num_groups - 1} must have an id, and no other but -1"
            )
        object.__setattr__(self, "members", (ids >= 0).nonzero().squeeze(-1))  # the way to set a frozen field
        object.__setattr__(self, "free", (ids < 0).nonzero().squeeze(-1))

    @cached_property
    def in_order(self) -> tuple[Tensor, Tensor]:
        """(M,) int64 members in the order of their groups; (G + 1,) where each group begins among them, and M."""
        order = self.group_ids[self.members].argsort(stable=True)  # (M,)
        sizes = self.group_ids[self.members].bincount(minlength=self.num_groups)  # (G,)
        return self.members[order], F.pad(sizes.cumsum(0), (1, 0))

    def to(self, device: torch.device | str) -> "GroupedIds":
        """The same on a device."""
        return GroupedIds(self.group_ids.to(device), self.num_groups)


@dataclass(frozen=True, eq=False)
class VocabularyGroups:
    """Groups of ids of two vocabularies whose masses mean the same on both sides: what may begin the same text."""

    student: GroupedIds
    teacher: GroupedIds
    match: VocabularyMatch = field(init=False)
    """Of the columns that `group_logprobs` makes: group with group, an id in no group with none."""

    def __post_init__(self) -> None:
        num_groups = self.student.num_groups
        if self.teacher.num_groups != num_groups:
            raise ValueError(
                f"{num_groups} groups of the student, {self.teacher.num_groups} of the teacher: give as many"
            )
        every = torch.arange(num_groups, device=self.student.group_ids.device)
        widths = (num_groups + len(side.free) for side in (self.student, self.teacher))
        object.__setattr__(self, "match", VocabularyMatch(every, every, *widths))

    def to(self, device: torch.device | str) -> "VocabularyGroups":
        """The same groups on a device; itself where they are there already."""
        if self.student.group_ids.device == torch.empty(0, device=device).device:
            return self
        return VocabularyGroups(self.student.to(device), self.teacher.to(device))


def grouped(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    groups: VocabularyGroups,
    loss: Loss,
    top_k: int | None = None,
    unmatched_weight: float = 1.0,
) -> Tensor:
    """A divergence over groups of ids that may begin the same text, universal logit distillation over ids in none.

    `hybrid` over the masses of the groups, P_g = Σ_{t in g} p_t and Q_g = Σ_{s in g} q_s: a divergence of the two
    models' texts seen through coarser eyes, so 0 where they agree on all texts. `hybrid` over single ids is not: where
    only the teacher writes " and" in one token, it takes from the student's " a" the mass that " a", "nd" needs.

    Args:
        student_logprobs: (N, V) normalised log-probabilities; gradient flows.
        teacher_logprobs: (N, W) normalised log-probabilities; no gradient.
        groups: for these V and W, on the same device.
        loss: a divergence such as those in `LOSSES`.
        top_k: compare the teacher's K most likely groups, all others in one bucket; None takes all.
        unmatched_weight: factor on what is in no group; at 0 it is not computed.
    Returns:
        (N,) float32, float64 for float64. Equal to `loss` where every group is one id of each side and none is left.
    Raises:
        ValueError: the log-probabilities are not as wide as the groups say; top_k is below 1.
    Source: none.
    """
    widths = len(groups.student.group_ids), len(groups.teacher.group_ids)
    if (student_logprobs.shape[-1], teacher_logprobs.shape[-1]) != widths:
        raise ValueError(
            f"log-probabilities over {student_logprobs.shape[-1]} and {teacher_logprobs.shape[-1]} ids, groups of "
            f"{widths[0]} and {widths[1]}: make them for the width of the models' logits"
        )
    return hybrid(
        group_logprobs(student_logprobs, groups.student),
        group_logprobs(teacher_logprobs.detach(), groups.teacher),
        match=groups.match,
        loss=loss,
        top_k=top_k,
        unmatched_weight=unmatched_weight,
    )


def group_logprobs(logprobs: Tensor, ids: GroupedIds) -> Tensor:
    """Log of each group's mass, then the ids in no group one by one.

    Args:
        logprobs: (N, V) log-probabilities; gradient flows.
        ids: which of the V are in which of G groups, on the same device.
    Returns:
        (N, G + R) float32, float64 for float64, for R ids in no group; a group of one is that id.
    Raises:
        ValueError: the groups are of another number of ids.
    """
    if logprobs.shape[-1] != len(ids.group_ids):
        raise ValueError(f"{logprobs.shape[-1]} ids, in groups of {len(ids.group_ids)}: make groups for this width")
    precise = at_least_float32(logprobs)
    if cross_native.takes(precise):
        members, starts = ids.in_order
        return cross_native.group_logprobs(precise, members=members, starts=starts, free=ids.free)
    kept = precise.index_select(-1, ids.members).clamp_min(_LEFT_OUT)  # (N, M)
    slots = ids.group_ids.index_select(0, ids.members).expand(len(kept), -1)  # (N, M)
    largest = kept.new_full((len(kept), ids.num_groups), _LEFT_OUT)
    largest = largest.scatter_reduce(-1, slots, kept.detach(), "amax")  # (N, G)
    shares = (kept - largest.gather(-1, slots)).exp()  # (N, M)
    masses = largest + torch.zeros_like(largest).scatter_add(-1, slots, shares).log()  # (N, G)
    masses = masses.masked_fill(masses < 0.5 * _LEFT_OUT, -math.inf)
    return torch.cat([masses, precise.index_select(-1, ids.free)], dim=-1)


def _unmatched(side: str, ids: Tensor, width: int) -> Tensor:
    """The ids below `width` that are not among `ids`, which are checked."""
    if ids.dtype != torch.int64:
        raise ValueError(f"{side}_ids of {ids.dtype}: give int64, as indices are")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= width:
        raise ValueError(f"{side}_ids from {low} to {high}: must be within 0 to {width - 1}, the {side}'s logits")
    is_free = torch.ones(width, dtype=torch.bool, device=ids.device)
    is_free[ids] = False
    rest = is_free.nonzero().squeeze(-1)
    num_repeated = len(ids) + len(rest) - width
    if num_repeated:
        raise ValueError(f"{num_repeated} of {len(ids)} {side}_ids are in a pair before: give each id one partner")
    return rest


def _matched_columns(
    student: Tensor, teacher: Tensor, rests: tuple[Tensor, Tensor], *, match: VocabularyMatch, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """Both sides' log-probabilities over the ids that are compared one by one and, as last column, all others."""
    num_matched = len(match.student_ids)
    if top_k is not None and top_k < num_matched:
        likeliest = teacher.index_select(-1, match.teacher_ids).topk(top_k, dim=-1).indices  # (N, K)
        student_ids, teacher_ids = match.student_ids[likeliest], match.teacher_ids[likeliest]  # (N, K)
        return bucket_logprobs(student, student_ids), bucket_logprobs(teacher, teacher_ids)
    student_matched = student.index_select(-1, match.student_ids)  # (N, C)
    teacher_matched = teacher.index_select(-1, match.teacher_ids)  # (N, C)
    if not match.has_bucket:
        return student_matched.log_softmax(-1), teacher_matched.log_softmax(-1)
    student_rest, teacher_rest = rests
    return _with_bucket(student_matched, student_rest), _with_bucket(teacher_matched, teacher_rest)  # (N, C + 1)


def _with_bucket(matched: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([matched, log_mass(rest)], dim=-1)


def _ranked_distance(student: Tensor, teacher: Tensor, top_k: int | None, mass_gap: Tensor | float = 0.0) -> Tensor:
    """Σ of the gaps between the sorted probabilities; `mass_gap` is the student's whole mass less the teacher's."""
    student_ranked, teacher_ranked = _ranked(student, top_k), _ranked(teacher, top_k)  # (N, K) at most
    num_ranks = max(student_ranked.shape[-1], teacher_ranked.shape[-1])
    gaps = _filled(student_ranked, num_ranks) - _filled(teacher_ranked, num_ranks)  # (N, K)
    distance = gaps.abs().sum(-1)  # (N,)
    if num_ranks == max(student.shape[-1], teacher.shape[-1]):
        return distance
    return distance + (mass_gap - gaps.sum(-1)).abs()  # all others, as one


def _ranked(logprobs: Tensor, top_k: int | None) -> Tensor:
    """The largest probabilities in falling order, (N, K) or all."""
    if top_k is None or top_k >= logprobs.shape[-1]:
        return logprobs.sort(dim=-1, descending=True).values.exp()
    return logprobs.topk(top_k, dim=-1).values.exp()


def _filled(probabilities: Tensor, num_columns: int) -> Tensor:
    return F.pad(probabilities, (0, num_columns - probabilities.shape[-1]))


def _with_any_other(logprobs: Tensor) -> Tensor:
    """(S, 2) log-probabilities of an outcome and of any other, kept from certainty by as much as rounding tells."""
    nearest = -torch.finfo(logprobs.dtype).eps
    bounded = logprobs + (logprobs.clamp_max(nearest) - logprobs).detach()  # with the gradient of logprobs
    # log(1 − exp x) by the form that keeps its digits; neither has a gradient that is not finite.
    by_log, by_log1p = bounded.expm1().neg().log(), bounded.exp().neg().log1p()
    return torch.stack([bounded, torch.where(bounded > -math.log(2), by_log, by_log1p)], dim=-1)


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: give 1 or more, or None for all ids")

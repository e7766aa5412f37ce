"""What goes on inside the two models: hidden states, attention maps and layers, compared unit by unit.

Unit u is the same bytes on both sides (`kdkit.losses.alignment.pool_units`), so one tokenizer or two makes no
difference here. Nothing is reduced over the batch: every item has its own value, the caller sums and counts.
The student's states must already lie in the teacher's space, by a trained projection; the teacher is detached.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkit.softdtw.cost import ZERO_NORM, directions
from kdkit.softdtw.divergence import zero_padding

SMOOTHING = 1e-3
"""Share of every attention map that is spread evenly before maps are compared."""
SAME_DIRECTION = 1e-5
"""Teacher vectors whose cosine is this close to 1 are taken for the same; float32 sums differ by less."""


def unit_mask(lengths: Tensor, max_units: int) -> Tensor:
    """Which units count: (B, U) bool, true below each sample's length."""
    return torch.arange(max_units, device=lengths.device) < lengths[:, None]


def pool_sequences(units: Tensor, lengths: Tensor) -> Tensor:
    """Mean over each sample's units, for `contrastive` over sequences.

    Args:
        units: (B, U, D) float; gradient flows; what stands beyond the lengths is never read.
        lengths: (B,) integer, 0..U.
    Returns:
        (B, D) float32 (float64 for float64), 0 for a sample without units.
    Source: none.
    """
    units = zero_padding(_precise(units), lengths)
    return units.sum(1) / lengths.to(units).clamp(min=1)[:, None]


def vector_distance(student: Tensor, teacher: Tensor, *, kind: str) -> Tensor:
    """Distance of each student vector s from its teacher vector t, relative to their size.

    "cosine": 1 - cos(s, t), in 0..2; ignores lengths; 1 with gradient 0 where one is the zero vector.
    "mse": mean (s - t)^2 / max(mean t^2, mean s^2), means over the D entries of the vector, the divisor detached;
    in 0..4. As long as s is no larger than t, that is the squared error in units of the teacher's variance about 0.
    Where s is larger, as a fresh student's may be by orders of magnitude, its own size keeps the value in range.

    The variance is taken vector by vector: no statistic of the batch enters, so that splitting a batch changes
    nothing; one token with massive activations does not hide all others; a vector that is constant has one, too.

    Args:
        student: (..., D) float; gradient flows.
        teacher: (..., D) float; gradient flows if asked for, usually detached.
        kind: "cosine" or "mse"; mse where the size of the states matters too.
    Returns:
        (...) float32 (float64 if one side is); value and gradient exactly 0 at equality.
    Raises:
        ValueError: unknown kind, or shapes that differ.
    Source: none.
    """
    check_kind(kind)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student is {tuple(student.shape)} and teacher {tuple(teacher.shape)}; they must be the same."
            " Project the student into the teacher's space first."
        )
    return DISTANCES[kind](*_same_precision(student, teacher))


def hidden_distance(student: Tensor, teacher: Tensor, lengths: Tensor, *, kind: str) -> Tensor:
    """`vector_distance` of every unit.

    Args:
        student: (B, U, D) float; gradient flows.
        teacher: (B, U, D) float; detached.
        lengths: (B,) integer, 0..U; what stands beyond is never read.
        kind: "cosine" or "mse".
    Returns:
        (B, U) float32 (float64 if one side is), 0 beyond the lengths; cosine in 0..2, mse in 0..4.
    Raises:
        ValueError: unknown kind, or shapes that differ.
    Source: none.
    """
    found = vector_distance(zero_padding(student, lengths), zero_padding(teacher.detach(), lengths), kind=kind)
    return found.masked_fill(~unit_mask(lengths.to(found.device), found.shape[1]), 0.0)


def pool_attention(attention: Tensor, unit_ids: Tensor, max_units: int) -> Tensor:
    """Attention between units: how much of a unit's attention goes to each unit, and to all else.

    Mean over the unit's query tokens, sum over each unit's key tokens; a row stays a distribution.

    Args:
        attention: (B, heads, T, T) probabilities, queries by keys, as the model returns them; gradient flows to the
            rows of tokens that belong to a unit, no other row is read. Padded keys have probability 0.
        unit_ids: (B, T) integer, -1..max_units - 1; -1 = in no unit.
        max_units: U, the padded number of units.
    Returns:
        (B, heads, U, U + 1) float32 (float64 for float64); the last column is attention to tokens in no unit (prompt,
        special tokens); 0 for a unit that no token bears.
    Raises:
        ValueError: shapes that do not fit.
    Source: none.
    """
    if attention.dim() != 4 or unit_ids.shape != attention.shape[::3] or attention.shape[2] != attention.shape[3]:
        raise ValueError(
            f"attention is {tuple(attention.shape)} and unit_ids {tuple(unit_ids.shape)}; they must be"
            " (B, heads, T, T) and (B, T)."
        )
    with torch.autocast(attention.device.type, enabled=False):
        rows = _precise(attention).masked_fill((unit_ids < 0)[:, None, :, None], 0.0)
        slots = unit_ids.long().where(unit_ids >= 0, max_units)
        keys = F.one_hot(slots, max_units + 1).to(rows)  # (B, T, U + 1)
        queries = keys[:, :, :max_units]
        queries = queries / queries.sum(1, keepdim=True).clamp(min=1)  # a mean, (B, T, U)
        return queries.mT[:, None] @ (rows @ keys[:, None])  # (B, heads, U, U + 1)


def map_heads(attention: Tensor, num_heads: int) -> Tensor:
    """As many attention maps as the other model has heads, each a mixture of the given ones.

    Both sets of heads are laid along 0..1, and head i of the result is the mean of the given heads over its share of
    that line: 12 to 4 is the mean of three neighbours each, 4 to 12 repeats each thrice, 3 to 2 mixes 2:1 and 1:2.
    Heads of two models have no true correspondence; a fixed one is enough, for a student orders its own as it learns.

    Args:
        attention: (B, heads, U, K) float, rows that are distributions.
        num_heads: number of heads wanted, >= 1.
    Returns:
        (B, num_heads, U, K) float32 (float64 for float64), rows that are distributions.
    Source: none.
    """
    given = attention.shape[1]
    first, start = torch.arange(num_heads)[:, None], torch.arange(given)
    # both lines cut into num_heads * given pieces, so that overlaps are whole numbers
    end = torch.minimum((first + 1) * given, (start + 1) * num_heads)
    overlap = (end - torch.maximum(first * given, start * num_heads)).clamp(min=0)  # (num_heads, heads)
    precise = _precise(attention)
    with torch.autocast(attention.device.type, enabled=False):
        return torch.einsum("ij,bjuk->biuk", overlap.to(precise) / given, precise)


def attention_divergence(student: Tensor, teacher: Tensor, lengths: Tensor, *, smoothing: float = SMOOTHING) -> Tensor:
    """KL(p || q) between attention maps of units, mean over heads, in nats.

    Compares probabilities as the models returned them, no second softmax. Both sides are divided by their sum
    (rounding in half precision, and dropout after the softmax, leave it off 1), then mixed with a uniform share over
    the u + 2 entries that unit u can attend to: p = (1 - smoothing) a / sum(a) + smoothing / (u + 2).
    So a 0 on either side is finite, and heads that share no key at all are log((u + 2) / smoothing) apart at most.

    Args:
        student: (B, heads, U, U + 1) >= 0, from `pool_attention`; gradient flows.
        teacher: (B, heads, U, U + 1) >= 0, from `pool_attention` and `map_heads`; detached.
        lengths: (B,) integer, 0..U; queries and keys beyond are never read, nor are keys after the query, which no
            causal model sees.
        smoothing: uniform share, in 0..1, both ends left out.
    Returns:
        (B, U) float32 (float64 if one side is); >= 0 within rounding; value and gradient 0 at equality; 0 beyond
        the lengths, and for a head and unit where one side attends to nothing (dropped out, or no token).
    Raises:
        ValueError: shapes that differ or are no maps of units, or smoothing out of range.
    Source: the KL between attention maps of MiniLM (arXiv:2002.10957). Differs: units for tokens, smoothing.
    """
    if student.shape != teacher.shape or student.dim() != 4 or student.shape[3] != student.shape[2] + 1:
        raise ValueError(
            f"student is {tuple(student.shape)} and teacher {tuple(teacher.shape)}; both must be"
            " (B, heads, U, U + 1), with heads mapped by map_heads."
        )
    if not 0.0 < smoothing < 1.0:
        raise ValueError(f"smoothing is {smoothing}; allowed: between 0 and 1, both left out.")
    student, teacher = _same_precision(student, teacher.detach())
    visible = _visible(lengths.to(student.device), student.shape[2])  # (B, 1, U, U + 1)
    maps = [side.masked_fill(~visible, 0.0) for side in (teacher, student)]
    totals = [side.sum(-1, keepdim=True) for side in maps]
    floor = smoothing / visible.sum(-1, keepdim=True).clamp(min=1).to(student)
    logs = [
        ((1.0 - smoothing) * side / total.masked_fill(total == 0, 1.0) + floor).log()
        for side, total in zip(maps, totals, strict=True)
    ]
    kl = (logs[0].exp() * (logs[0] - logs[1])).masked_fill(~visible, 0.0).sum(-1)  # (B, heads, U)
    empty = (totals[0] == 0) | (totals[1] == 0)
    return kl.masked_fill(empty.squeeze(-1), 0.0).mean(1)


def layer_pairs(
    num_student_layers: int, num_teacher_layers: int, num_pairs: int | None = None
) -> list[tuple[int, int]]:
    """Which student layer is compared with which teacher layer: at equal shares of the depth, the last with the last.

    The k-th of n pairs takes from each side the layer nearest to k/n of its depth, whichever model is the deeper.

    Args:
        num_student_layers: number of layers, >= 1.
        num_teacher_layers: likewise.
        num_pairs: 1 to the layers of the shallower model; None for as many as that.
    Returns:
        (student, teacher) indices into `hidden_states`, where 0 is the embeddings and the last layer comes after the
        final norm; strictly increasing on both sides. For `attentions`, which have no entry 0, take 1 off.
    Raises:
        ValueError: a number out of range.
    Source: none; the uniform map of TinyBERT (arXiv:1909.10351) where the teacher's layers are a multiple.
    """
    shallower = min(num_student_layers, num_teacher_layers)
    if shallower < 1:
        raise ValueError(f"layers are {num_student_layers} and {num_teacher_layers}; allowed: 1 or more.")
    wanted = shallower if num_pairs is None else num_pairs
    if not 1 <= wanted <= shallower:
        raise ValueError(
            f"num_pairs is {wanted}; allowed: 1 to {shallower}, the layers of the shallower model"
            f" (student {num_student_layers}, teacher {num_teacher_layers})."
        )

    def nearest(k: int, layers: int) -> int:
        return (2 * k * layers + wanted) // (2 * wanted)  # k / wanted of the depth, halves rounded up

    return [(nearest(k, num_student_layers), nearest(k, num_teacher_layers)) for k in range(1, wanted + 1)]


class LayerMixer(nn.Module):
    """A weighted mean over pairs of layers, with fixed or learnt weights.

        learnt weight = floor * start + (1 - floor) * softmax(log start + logits),   logits = 0 at first

    A plain softmax collapses: the gradient on logit i is w_i (d_i - mean), which is against every pair that is
    harder than the mean, so the weights run to the easiest pair and the loss falls without the student learning
    anything. The floor keeps at least that share of each pair's starting weight, so no layer is dropped.

    Args:
        num_pairs: P, from `layer_pairs`.
        learnt: train the weights.
        floor: share of the starting weights that learning cannot take away, 0 < floor <= 1.
        start: P positive weights, scaled to sum 1; None for equal ones.
    """

    start: Tensor

    def __init__(
        self, num_pairs: int, *, learnt: bool = False, floor: float = 0.5, start: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        given = [1.0] * num_pairs if start is None else list(start)
        if len(given) != num_pairs or min(given, default=0.0) <= 0:
            raise ValueError(f"start is {given}; allowed: one positive weight for each of the {num_pairs} pairs.")
        if not 0.0 < floor <= 1.0:
            raise ValueError(f"floor is {floor}; allowed: above 0, up to 1.")
        self.floor = floor
        self.register_buffer("start", torch.tensor(given) / sum(given), persistent=False)
        self.logits = nn.Parameter(torch.zeros(num_pairs)) if learnt else None

    def weights(self) -> Tensor:
        """(P,) positive, of sum 1; each at least floor times its start."""
        if self.logits is None:
            return self.start
        return self.floor * self.start + (1.0 - self.floor) * (self.start.log() + self.logits).softmax(0)

    def forward(self, values: Tensor) -> Tensor:
        """Mean over pairs.

        Args:
            values: (P, ...) float, a distance of each pair.
        Returns:
            (...) float, between the least and the largest of the pairs.
        """
        return torch.tensordot(self.weights().to(values), values, dims=1)


def contrastive(student: Tensor, teacher: Tensor, *, temperature: float = 0.1, groups: Tensor | None = None) -> Tensor:
    """InfoNCE: each student vector must find its own teacher vector among all of the batch, in nats.

    -log(exp(c_ii / temperature) / sum_j exp(c_ij / temperature)), c_ij = cos(s_i, t_j). Teacher vectors that are equal
    are no negatives of each other: the same text twice in a batch has no wrong answer. Equal means of one direction
    within rounding (cos > 1 - 1e-5), for the same text in another place of a batch comes out with other last bits.
    About log M at chance. Not a sum over items: the other items of the batch enter each value.

    Args:
        student: (M, D) float; gradient flows.
        teacher: (M, D) float; detached.
        temperature: of the similarities, > 0.
        groups: (M,) integer; items of one group are no negatives of each other. None = all items stand alone.
    Returns:
        (M,) float32 (float64 if one side is), >= 0; 0 with gradient 0 for an item without negatives, so for M = 1.
    Raises:
        ValueError: shapes that do not fit, or a temperature out of range.
    Source: van den Oord et al. 2018, arXiv:1807.03748, eq. 4. Differs: duplicates are no negatives.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(f"student is {tuple(student.shape)} and teacher {tuple(teacher.shape)}; both must be (M, D).")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; allowed: above 0.")
    with torch.autocast(student.device.type, enabled=False):
        s, t = _same_precision(student, teacher.detach())
        targets = directions(t)
        logits = directions(s) @ targets.mT / temperature  # (M, M)
        no_negative = targets @ targets.mT > 1.0 - SAME_DIRECTION  # (M, M)
    if groups is not None:
        groups = groups.to(logits.device)
        no_negative |= groups[:, None] == groups
    no_negative.fill_diagonal_(False)
    return logits.masked_fill(no_negative, float("-inf")).logsumexp(1) - logits.diagonal()


def check_kind(kind: str) -> None:
    """Refuse what is no name in `DISTANCES`, with a ValueError."""
    if kind not in DISTANCES:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(DISTANCES)}.")


def _visible(lengths: Tensor, max_units: int) -> Tensor:
    """(B, 1, U, U + 1): keys up to the query, and the last column, for queries within the lengths."""
    unit = torch.arange(max_units + 1, device=lengths.device)
    keys = (unit <= unit[:-1, None]) | (unit == max_units)  # (U, U + 1)
    return (keys & unit_mask(lengths, max_units)[:, :, None])[:, None]


def _precise(x: Tensor) -> Tensor:
    """float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _same_precision(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 where one is; both on the first one's device."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(x.device, dtype)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos as half the squared chord: exact next to equality, where 1 - cos is rounding."""
    s, t = directions(student), directions(teacher)
    is_zero = (s == 0).all(-1) | (t == 0).all(-1)
    return (0.5 * (s - t).square().sum(-1)).masked_fill(is_zero, 1.0)


def _relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the larger of the two mean squares."""
    size = torch.maximum(teacher.detach().square().mean(-1), student.detach().square().mean(-1))
    return (student - teacher).square().mean(-1) / size.clamp(min=ZERO_NORM**2)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": _cosine, "mse": _relative_mse}
"""Every kind of `vector_distance` by name."""

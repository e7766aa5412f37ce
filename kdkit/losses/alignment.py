"""Two sequences of hidden states -> the cost of aligning them, by soft-DTW.

The student's states must already lie in the teacher's space (a trained projection), so that the
teacher's own term is constant and nothing can collapse onto it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkit.softdtw import diagonal_path, expected_alignment, pairwise_cost, soft_dtw_and_alignment
from kdkit.softdtw.api import checked_lengths
from kdkit.softdtw.cost import divergence_costs
from kdkit.softdtw.divergence import combine_terms, stack_problems, zero_padding


@dataclass(frozen=True)
class AdaptiveBand:
    """A soft band that follows the alignment found so far, one centre and width for each unit.

        centre = mix * expected position + (1 - mix) * diagonal position
        half-width = half_width + entropy_scale * entropy of the unit's expected alignment, in nats

    Outside, the cost grows by `penalty`, reached over one unit of distance.

    Source: WARD and DWA-KD (arXiv:2602.21669), whose values are the defaults. Differs: the penalty
    is the mean of a band around each student unit and one around each teacher unit, so that it is
    symmetric, and each term of a divergence has its own: value and gradient stay 0 at equality.
    The penalty ramps up over one unit instead of jumping. No warm-up: that is a schedule's business.
    """

    mix: float = 0.7
    """Share of the expected position in the centre, 0..1."""
    half_width: float = 5.0
    """Half-width in units where the alignment is certain, >= 0."""
    entropy_scale: float = 2.0
    """Units of half-width for each nat of entropy, >= 0."""
    penalty: float = 1.0
    """Added cost of a cell outside, >= 0, in units of the cost."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.mix <= 1.0:
            raise ValueError(f"adaptive band: mix is {self.mix}; allowed: 0 to 1.")
        for name in ("half_width", "entropy_scale", "penalty"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"adaptive band: {name} is {value}; allowed: a finite number >= 0.")


@dataclass(frozen=True, eq=False)
class AlignmentResult:
    """One number per sample each; all but `counted` are 0 where a sample is not counted.

    `expected / diagonal` says what warping buys: near 1 with `off_diagonal_fraction` near 0, soft-DTW
    does what matching unit by unit would; well below 1, it found cheaper partners off the diagonal;
    above 1, gamma blurs the alignment more than warping gains.
    """

    per_sample: Tensor
    """(B,) the loss, with gradient, divided by the normaliser of the lengths."""
    counted: Tensor
    """(B,) bool: both sides have at least one unit."""
    expected: Tensor
    """(B,) detached: mean cost of an alignment drawn by soft-DTW, same normaliser; x-y term only."""
    diagonal: Tensor
    """(B,) detached: cost of the alignment that does not warp, same normaliser and same costs."""
    off_diagonal_fraction: Tensor
    """(B,) detached, 0..1: share of the expected alignment's mass off that alignment's cells."""


def pool_units(
    hidden: Tensor, unit_ids: Tensor, max_units: int, *, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean hidden state of each unit (a word, or whatever `unit_ids` numbers).

    Args:
        hidden: (B, T, D) float; gradient flows to tokens that belong to a unit.
        unit_ids: (B, T) integer, ids 0, 1, ... of each sample's units in order, -1 = in no unit;
            hidden states of such tokens are never read.
        max_units: U, the padded number of units, > every id.
        lengths: (B,) units of each sample, from whoever made the ids: these are then taken as they are, and nothing
            waits for the device. None: ids are checked and counted.
    Returns:
        units: (B, U, D) float32 (float64 for float64), 0 beyond the lengths and for an id that no
        token bears; lengths: (B,) int64, the highest id + 1.
    Raises:
        ValueError: shapes that do not fit, or an id outside -1..max_units - 1.
    Source: none.
    """
    if hidden.dim() != 3 or unit_ids.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and unit_ids {tuple(unit_ids.shape)}; they must be (B, T, D) and (B, T)."
        )
    batch, _, width = hidden.shape
    if lengths is None and bool(((unit_ids < -1) | (unit_ids >= max_units)).any()):  # the only wait for the device
        raise ValueError(
            f"unit_ids run from {int(unit_ids.min())} to {int(unit_ids.max())}; allowed: -1 to "
            f"max_units - 1 = {max_units - 1}."
        )
    ids = unit_ids.long()
    offset = torch.arange(batch, device=ids.device)[:, None] * (max_units + 1)
    slots = (ids.where(ids >= 0, max_units) + offset).flatten()  # (B * T,); each sample's last = no unit
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.zeros(batch * (max_units + 1), width, dtype=dtype, device=hidden.device)
    sums = sums.index_add(0, slots, hidden.reshape(-1, width).to(dtype))
    counts = sums.new_zeros(len(sums)).index_add_(0, slots, sums.new_ones(len(slots))).clamp_(min=1)
    shape = batch, max_units + 1
    units = sums.view(*shape, width)[:, :max_units] / counts.view(*shape, 1)[:, :max_units]
    return units, F.pad(ids + 1, (0, 1)).amax(1) if lengths is None else lengths


def alignment_loss(
    student: Tensor,
    teacher: Tensor,
    lengths_s: Tensor | None,
    lengths_t: Tensor | None,
    *,
    gamma: float,
    band: int | None = None,
    metric: str = "cosine",
    divergence: bool = True,
    normalize: str = "max_length",
    student_weights: Tensor | None = None,
    teacher_weights: Tensor | None = None,
    adaptive_band: AdaptiveBand | None = None,
) -> AlignmentResult:
    """Soft-DTW, or its divergence, between the student's and the teacher's units of each sample.

    per_sample = D(student, teacher) / normaliser(lengths), the cost of a pair of units being
    cost_ij (a_i + b_j) / 2 with importance weights a, b of mean 1. With `divergence`, least where the
    two sequences are equal; without it the value may be negative and equality is not its minimum.

    Args:
        student: (B, U, D) float, projected into the teacher's space; gradient flows.
        teacher: (B, W, D) float; gradient flows if asked for, usually detached.
        lengths_s: (B,) integer, units of each student sample, 0..U; None = all U.
        lengths_t: (B,) integer, units of each teacher sample, 0..W; None = all W.
        gamma: smoothing, in units of the cost, > 0.
        band: half-width >= 1 of the slope-corrected band, in units; None = none.
        metric: "cosine" or "sqeuclidean".
        divergence: subtract the mean of the student's and the teacher's own terms.
        normalize: "max_length", "sum_length" or "none": what each sample is divided by.
        student_weights: (B, U) >= 0, importance; scaled to mean 1 over the sample's own units,
            detached; equal weights where they sum to 0. None = 1. Give both sides corresponding
            weights, or equality of the states is no longer exactly the minimum.
        teacher_weights: (B, W) >= 0, likewise.
        adaptive_band: a soft band on top of `band`, from the detached expected alignment.
    Returns:
        AlignmentResult; a sample with an empty side has value 0, no gradient, and counted False.
    Raises:
        ValueError: an option outside its range, shapes or lengths that do not fit.
    Source: the DTW terms of WARD and DWA-KD (arXiv:2602.21669). Differs: response units only, one
    weight vector for each side, a band that is never infeasible, the constant normaliser.
    """
    if normalize not in NORMALIZERS:
        raise ValueError(f"normalize is {normalize!r}; allowed: {', '.join(NORMALIZERS)}.")
    n = checked_lengths(lengths_s, "lengths_s", (student.shape[0], student.shape[1]))
    m = checked_lengths(lengths_t, "lengths_t", (teacher.shape[0], teacher.shape[1]))
    sides = (
        _Side(zero_padding(student, n), _mean_one(student_weights, n, student)),
        _Side(zero_padding(teacher, m), _mean_one(teacher_weights, m, teacher)),
    )
    costs = _weighted_costs(*sides, metric, divergence=divergence)
    cross = costs[0]
    cost, rows, columns = stack_problems(costs, n, m) if divergence else (cross, n, m)
    if adaptive_band is not None:
        found = expected_alignment(cost, rows, columns, gamma=gamma, band=band)
        cost = cost + _soft_band(found, rows, columns, adaptive_band)
    values, alignment = soft_dtw_and_alignment(cost, rows, columns, gamma=gamma, band=band)
    values = combine_terms(values) if divergence else values
    alignment = alignment[: cross.shape[0], : cross.shape[1], : cross.shape[2]]
    counted = torch.minimum(n, m) > 0
    divisor = NORMALIZERS[normalize](n, m).clamp(min=1).to(values)
    expected, diagonal, off_diagonal = _against_diagonal(cross.detach(), alignment, n, m)
    return AlignmentResult(
        per_sample=values / divisor,
        counted=counted.to(values.device),
        expected=expected / divisor,
        diagonal=diagonal / divisor,
        off_diagonal_fraction=off_diagonal,
    )


@dataclass(frozen=True, eq=False)
class _Side:
    """Units and their weights, (B, U, D) and (B, U) or None."""

    units: Tensor
    weights: Tensor | None


def _mean_one(weights: Tensor | None, lengths: Tensor, units: Tensor) -> Tensor | None:
    """Weights scaled to mean 1 over each sample's own units; all 1 where they sum to 0."""
    if weights is None:
        return None
    if weights.shape != units.shape[:2]:
        raise ValueError(f"weights are {tuple(weights.shape)}; allowed: one for each unit, {tuple(units.shape[:2])}.")
    kept = zero_padding(weights.detach().float()[:, :, None], lengths).squeeze(-1)  # (B, U)
    total = kept.sum(1, keepdim=True)
    count = lengths.to(kept)[:, None]
    return torch.where(total == 0, 1.0, kept * count / total.masked_fill(total == 0, 1.0))


def _weighted_costs(x: _Side, y: _Side, metric: str, *, divergence: bool) -> list[Tensor]:
    """Of x and y, and of each with itself for a divergence."""
    if not divergence:
        return [_weighted(pairwise_cost(x.units, y.units, metric), x, y)]
    costs = divergence_costs(x.units, y.units, metric)
    return [_weighted(cost, *pair) for cost, pair in zip(costs, ((x, y), (x, x), (y, y)), strict=True)]


def _weighted(cost: Tensor, x: _Side, y: _Side) -> Tensor:
    """cost_ij (a_i + b_j) / 2, (B, N, M)."""
    if x.weights is None and y.weights is None:
        return cost
    a = cost.new_ones(cost.shape[:2]) if x.weights is None else x.weights
    b = cost.new_ones(cost.shape[::2]) if y.weights is None else y.weights
    return cost * (0.5 * (a[:, :, None] + b[:, None, :]))


def _soft_band(alignment: Tensor, rows: Tensor, columns: Tensor, band: AdaptiveBand) -> Tensor:
    """The added cost of every cell, (B, N, M): the mean of the bands around rows and columns."""
    n, m = rows.to(alignment)[:, None], columns.to(alignment)[:, None]  # (B, 1)
    around_rows = _excess(alignment, n, m, band)
    around_columns = _excess(alignment.mT, m, n, band).mT
    return 0.5 * band.penalty * (around_rows + around_columns)


def _excess(alignment: Tensor, n: Tensor, m: Tensor, band: AdaptiveBand) -> Tensor:
    """How far outside its row's band each cell lies, (B, N, M), clamped to 0..1 units."""
    row = torch.arange(alignment.shape[1], device=alignment.device, dtype=alignment.dtype)
    column = torch.arange(alignment.shape[2], device=alignment.device, dtype=alignment.dtype)
    share = alignment / alignment.sum(2, keepdim=True).clamp(min=1.0)  # a row's mass is >= 1, or 0
    entropy = torch.special.entr(share).sum(2)  # (B, N)
    on_line = torch.where(n > 1, row * (m - 1) / (n - 1).clamp(min=1), (m - 1) / 2)  # (B, N)
    centre = band.mix * (share * column).sum(2) + (1.0 - band.mix) * on_line
    half_width = band.half_width + band.entropy_scale * entropy
    return ((column - centre[:, :, None]).abs() - half_width[:, :, None]).clamp(0.0, 1.0)


def _against_diagonal(
    cost: Tensor, alignment: Tensor, lengths_n: Tensor, lengths_m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Expected cost, cost of the diagonal, and share of the mass off the diagonal; (B,) each."""
    rows, columns, on_path = (t.to(cost.device) for t in diagonal_path(lengths_n, lengths_m))
    cells = rows * cost.shape[2] + columns  # (B, L)

    def along(grid: Tensor) -> Tensor:
        return grid.flatten(1).gather(1, cells).masked_fill(~on_path, 0.0).sum(1)

    mass = alignment.sum((1, 2))
    off_diagonal = (1.0 - along(alignment) / mass.clamp(min=1.0)).clamp(min=0.0)
    return (alignment * cost).sum((1, 2)), along(cost), off_diagonal.masked_fill(mass == 0, 0.0)


NORMALIZERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max_length": torch.maximum,
    "sum_length": torch.add,
    "none": lambda lengths_n, _: torch.ones_like(lengths_n),
}

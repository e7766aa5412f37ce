"""A target for the student mixed from the outputs of an MoE teacher's experts, by what the student can follow."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkit.losses.features import check_kind, vector_distance

TINY = 1e-12
"""Gates are taken to be at least this, so that their logarithm is finite."""


@dataclass(frozen=True, eq=False)
class RoutingResult:
    """The three parts of the routing loss; the caller weighs, sums and counts them."""

    distance: Tensor
    """(n,) from the projected student to the mixture; cosine in 0..2, mse in 0..4."""
    anchor: Tensor
    """(n,) KL(teacher's gates || mixture's weights) in nats, among the active experts; 0 at initialisation."""
    load_balance: Tensor
    """Scalar: 0 when units are spread evenly over the teacher's experts, 1 when all go to one. Not a sum over items."""
    weights: Tensor
    """(n, k) of the mixture, detached; rows sum to 1, 0 beyond the active experts."""

    @property
    def num_units(self) -> int:
        """n, what each of the three counts."""
        return len(self.weights)


class StudentAwareRouter(nn.Module):
    """Mixes the outputs of a unit's experts into a target that fits the student.

        logit_j = log p_j + capacity_j(s) + slope_j * gap_j        p = the teacher's gates, j one of k experts
        weights = softmax(logits + log mask(active));   target = sum_j weights_j * output_j

    capacity is a linear function of the student's state s, brought to mean square 1; gap_j = 1 - cos(projected student,
    output_j). Each of the teacher's experts has its own capacity and slope, all 0 at first, so that the mixture starts
    as the teacher's own. What the router reads of the student is detached: it must not teach the student to steer it.

    The distance's gradient flows to the projected student, and through the weights to the router, never to the
    experts' outputs. Alone, that gradient makes the router pick the target that is easiest (the nearest expert), which
    lowers the loss and teaches nothing. Detaching the weights would leave the router at its start for good. So it is
    let through, and `anchor`, to be added with a small coefficient, pulls the weights back to the teacher's gates:
    the router may leave them as far as the distance gained is worth it.

    Args:
        student_size: Hs, width of the student's states.
        num_experts: E, all experts of the teacher's block.
        kind: "cosine" or "mse", as in `kdkit.losses.features.vector_distance`.
    Raises:
        ValueError: unknown kind.
    Source: none. The idea of routing by the student's capacity and gap, progressive top-k, and the load balance of
    Switch Transformers (arXiv:2101.03961, eq. 4); differs: E sum f P - 1, divided by E - 1.
    """

    def __init__(self, student_size: int, num_experts: int, *, kind: str = "cosine") -> None:
        super().__init__()
        check_kind(kind)
        self.num_experts = num_experts
        self.kind = kind
        self.capacity = nn.Linear(student_size, num_experts)
        self.slope = nn.Parameter(torch.zeros(num_experts))
        nn.init.zeros_(self.capacity.weight)
        nn.init.zeros_(self.capacity.bias)

    def forward(
        self,
        student: Tensor,
        projected: Tensor,
        *,
        gates: Tensor,
        ids: Tensor,
        outputs: Tensor,
        active: float,
    ) -> RoutingResult:
        """The parts of the loss for n units.

        Args:
            student: (n, Hs) float, the student's states; detached.
            projected: (n, H) float, the same in the teacher's space; gradient flows from the distance.
            gates: (n, k) >= 0, the teacher's probabilities of the unit's k experts, most likely first; any scale.
            ids: (n, k) integer, 0..E - 1, which experts these are.
            outputs: (n, k, H) float, their outputs; detached.
            active: how many of the k experts take part, 1 to k. In between, the next one's gate is multiplied by the
                fraction, so that a schedule from 1 to k is continuous: at 2.5 the first two in full, the third by half.
        Returns:
            `RoutingResult`; float32, or float64 where `projected` is; n = 0 gives empty values and load balance 0.
        Raises:
            ValueError: `active` out of range, or shapes that do not fit.
        """
        k = gates.shape[1]
        if not 1.0 <= active <= k:
            raise ValueError(f"active is {active}; allowed: 1 to {k}, the experts given for each unit.")
        if ids.shape != gates.shape or outputs.shape != (*gates.shape, projected.shape[1]):
            raise ValueError(
                f"gates are {tuple(gates.shape)}, ids {tuple(ids.shape)}, outputs {tuple(outputs.shape)} and projected"
                f" {tuple(projected.shape)}; they must be (n, k), (n, k), (n, k, H) and (n, H)."
            )
        num_active = math.ceil(active)
        ids, outputs = ids.to(projected.device)[:, :num_active], outputs[:, :num_active].detach()
        with torch.autocast(projected.device.type, enabled=False):
            projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
            outputs = outputs.to(projected)
            teacher = _log_gates(gates.detach().to(projected), active)  # (n, num_active)
            logits = teacher + self._preference(student.detach().to(projected), projected.detach(), ids, outputs)
            log_teacher, log_weights = teacher.log_softmax(1), logits.log_softmax(1)
            weights = log_weights.exp()
            mixture = torch.einsum("nk,nkh->nh", weights, outputs)
            return RoutingResult(
                distance=vector_distance(projected, mixture, kind=self.kind),
                anchor=(log_teacher.exp() * (log_teacher - log_weights)).sum(1),
                load_balance=load_balance(weights, ids, self.num_experts),
                weights=F.pad(weights.detach(), (0, k - num_active)),
            )

    def _preference(self, student: Tensor, projected: Tensor, ids: Tensor, outputs: Tensor) -> Tensor:
        """What is added to the log gates of the active experts, (n, num_active)."""
        state = F.rms_norm(student, student.shape[1:])
        capacity = F.linear(state, self.capacity.weight.to(state), self.capacity.bias.to(state))  # (n, E)
        gap = vector_distance(projected[:, None].expand_as(outputs), outputs, kind="cosine")
        return capacity.gather(1, ids) + self.slope.to(gap)[ids] * gap


def load_balance(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """How unevenly units are spread over experts: (E sum_e f_e P_e - 1) / (E - 1).

    f_e = share of units whose largest weight is on expert e, constant; P_e = mean weight of expert e.

    Args:
        weights: (n, k) >= 0, rows of sum 1; gradient flows.
        ids: (n, k) integer, 0..E - 1, different within a row.
        num_experts: E; with one there is nothing to balance.
    Returns:
        Scalar: 0 when even, 1 when all units go to one expert; slightly below 0 where large weights and mean weights
        differ. Depends on the whole batch: fewer units than experts cannot be even, (E / n - 1) / (E - 1) at best.
    Source: Switch Transformers, arXiv:2101.03961, eq. 4 to 6. Differs: minus 1 and divided by E - 1, so that its size
        does not depend on E.
    """
    if num_experts == 1 or len(weights) == 0:
        return weights.sum() * 0.0
    per_expert = weights.new_zeros(len(weights), num_experts).scatter(1, ids, weights)  # (n, E)
    strongest = ids.gather(1, weights.detach().argmax(1, keepdim=True)).squeeze(1)
    share = weights.new_zeros(num_experts).index_add_(0, strongest, weights.new_ones(len(strongest))) / len(strongest)
    return (num_experts * (share * per_expert.mean(0)).sum() - 1.0) / (num_experts - 1)


def _log_gates(gates: Tensor, active: float) -> Tensor:
    """Logarithm of the active experts' gates, (n, ceil(active)), the last one's multiplied by the fraction."""
    num_active = math.ceil(active)
    mask = gates.new_ones(num_active)
    mask[-1] = active - (num_active - 1)
    return (gates[:, :num_active].clamp(min=TINY) * mask).log()

"""One contract for every entry of LOSSES, then what is particular to each."""

import math
from functools import partial

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from torch import Tensor

from kdkit.losses import (
    LOSSES,
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

EVERY = pytest.mark.parametrize("name", list(LOSSES))


def naive_kl(p: list[float], q: list[float]) -> float:
    total = 0.0
    for p_v, q_v in zip(p, q, strict=True):
        if p_v > 0:
            total += p_v * (math.log(p_v) - math.log(q_v))
    return total


def mixed(share: float, p: list[float], q: list[float]) -> list[float]:
    return [share * p_v + (1 - share) * q_v for p_v, q_v in zip(p, q, strict=True)]


def naive_alpha_beta(p: list[float], q: list[float], alpha: float = 0.2, beta: float = 0.7) -> float:
    total = 0.0
    for p_v, q_v in zip(p, q, strict=True):
        total += p_v**alpha * q_v**beta
        total -= alpha / (alpha + beta) * p_v ** (alpha + beta)
        total -= beta / (alpha + beta) * q_v ** (alpha + beta)
    return -total / (alpha * beta)


NAIVE = {
    "forward_kl": lambda p, q: naive_kl(p, q),
    "reverse_kl": lambda p, q: naive_kl(q, p),
    "jsd": lambda p, q, beta=0.5: beta * naive_kl(p, mixed(beta, p, q)) + (1 - beta) * naive_kl(q, mixed(beta, p, q)),
    "tvd": lambda p, q: 0.5 * sum(abs(p_v - q_v) for p_v, q_v in zip(p, q, strict=True)),
    "skew_forward_kl": lambda p, q, alpha=0.1: naive_kl(p, mixed(alpha, p, q)),
    "skew_reverse_kl": lambda p, q, alpha=0.1: naive_kl(q, mixed(1 - alpha, p, q)),
    "alpha_beta": naive_alpha_beta,
}

OWN_ARGUMENTS = [
    *((name, {}) for name in LOSSES),
    ("jsd", {"beta": 0.9}),
    ("jsd", {"beta": 0.2}),
    ("skew_forward_kl", {"alpha": 0.7}),
    ("skew_forward_kl", {"alpha": 0.0}),
    ("skew_reverse_kl", {"alpha": 0.7}),
    ("skew_reverse_kl", {"alpha": 0.0}),
    ("alpha_beta", {"alpha": 1.0, "beta": 1.0}),
    ("alpha_beta", {"alpha": 0.5, "beta": 0.01}),
    ("alpha_beta", {"alpha": -0.3, "beta": 1.0}),
    ("alpha_beta", {"alpha": 1.2, "beta": -0.5}),
]
"""Each loss at its defaults, then away from them."""


def log_softmax_rows(*shape: int, seed: int, spread: float = 2.0) -> Tensor:
    """Log-probabilities in float64 drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def logits_pair(dtype: torch.dtype = torch.float64, num_rows: int = 5, num_ids: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pair = 2 * torch.randn(2, num_rows, num_ids, generator=generator, dtype=torch.float64)
    return pair[0].to(dtype), pair[1].to(dtype)


class TestEveryLoss:
    @pytest.mark.parametrize(("name", "own"), OWN_ARGUMENTS)
    def test_equals_a_float64_loop_over_entries(self, name: str, own: dict[str, float]) -> None:
        student, teacher = log_softmax_rows(6, 13, seed=1), log_softmax_rows(6, 13, seed=2)
        expected = [
            NAIVE[name](p, q, **own) for p, q in zip(teacher.exp().tolist(), student.exp().tolist(), strict=True)
        ]
        value = LOSSES[name](student, teacher, **own)
        assert value.dtype == torch.float64
        assert value.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert LOSSES[name](student.float(), teacher.float(), **own).tolist() == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize(("name", "own"), OWN_ARGUMENTS)
    def test_gradient_is_that_of_the_value(self, name: str, own: dict[str, float]) -> None:
        student, teacher = logits_pair()
        student.requires_grad_()
        assert torch.autograd.gradcheck(lambda z: divergence(name, z, teacher, temperature=1.5, **own), student)
        # by log-probabilities that need not be normalised, too
        free = student.detach().sub(3).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, teacher - 3, **own), free)

    @pytest.mark.parametrize(("name", "own"), OWN_ARGUMENTS)
    def test_is_never_negative_and_zero_at_equality(self, name: str, own: dict[str, float]) -> None:
        student, teacher = (log_softmax_rows(200, 17, seed=seed).float() for seed in (4, 5))
        assert (LOSSES[name](student, teacher, **own) > 1e-3).all()
        near = (student + 1e-4 * torch.randn(200, 17, generator=torch.Generator().manual_seed(6))).log_softmax(-1)
        tolerance = 3e-4 if own.get("beta") == 0.01 else 3e-6  # cancellation next to a limit
        assert (LOSSES[name](near, student, **own) > -tolerance).all()
        at_equality = student.clone().requires_grad_()
        value = LOSSES[name](at_equality, student, **own)
        assert value.abs().max() < tolerance
        logits = student.clone().requires_grad_()
        divergence(name, logits, student, **own).sum().backward()
        assert logits.grad.abs().max() < 1e-5

    @EVERY
    def test_permuting_the_vocabulary_changes_nothing(self, name: str) -> None:
        student, teacher = logits_pair()
        order = torch.randperm(student.shape[-1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            divergence(name, student[:, order], teacher[:, order]), divergence(name, student, teacher)
        )

    @EVERY
    def test_positions_do_not_see_each_other(self, name: str) -> None:
        student, teacher = logits_pair()
        together = divergence(name, student, teacher)
        alone = torch.cat([divergence(name, student[i : i + 1], teacher[i : i + 1]) for i in range(len(student))])
        torch.testing.assert_close(together, alone)

    @EVERY
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_extreme_logits_give_finite_values_and_gradients(self, name: str, dtype: torch.dtype) -> None:
        student, teacher = logits_pair(dtype, num_rows=6, num_ids=9)
        student[0, 0], teacher[0, 1] = 1e4, 1e4  # each sure of something else
        student[1, 0], teacher[1, 0] = -1e4, 1e4
        student[2], teacher[2] = -1e4, 1e4
        student[3, ::2], teacher[3, 1::2] = 1e4, 1e4
        student[4, :] = torch.linspace(-1e4, 1e4, 9)
        teacher[4, :] = torch.linspace(1e4, -1e4, 9)
        student.requires_grad_()
        value = divergence(name, student, teacher)
        value.sum().backward()
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert student.grad.isfinite().all()
        assert value[0] > 0.5

    @EVERY
    def test_ids_masked_on_both_sides_count_as_absent(self, name: str) -> None:
        student, teacher = logits_pair()
        masked = [1, 4, 10]
        kept = [v for v in range(student.shape[-1]) if v not in masked]
        student[:, masked], teacher[:, masked] = -math.inf, -math.inf
        student.requires_grad_()
        value = divergence(name, student, teacher)
        value.sum().backward()
        reduced = student.detach()[:, kept].requires_grad_()
        expected = divergence(name, reduced, teacher[:, kept])
        expected.sum().backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(student.grad[:, kept], reduced.grad)
        assert (student.grad[:, masked] == 0).all()

    @EVERY
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_an_id_masked_on_one_side_is_never_a_wrong_finite_number(self, name: str, side: str) -> None:
        pair = dict(zip(("student", "teacher"), logits_pair(), strict=True))
        pair[side][:, 3] = -math.inf
        student, teacher = (pair[key].log_softmax(-1) for key in ("student", "teacher"))
        value = LOSSES[name](student, teacher)
        if value.isfinite().all():
            p, q = teacher.exp().tolist(), student.exp().tolist()
            assert value.tolist() == pytest.approx([NAIVE[name](*row) for row in zip(p, q, strict=True)])

    @EVERY
    def test_no_gradient_is_formed_under_no_grad(self, name: str) -> None:
        student, teacher = logits_pair()
        logprobs = student.log_softmax(-1).requires_grad_()
        with torch.no_grad():
            assert not LOSSES[name](logprobs, teacher.log_softmax(-1)).requires_grad

    @EVERY
    def test_gradient_reaches_the_student_only(self, name: str) -> None:
        student, teacher = (logits.requires_grad_() for logits in logits_pair())
        divergence(name, student, teacher).sum().backward()
        assert student.grad.norm() > 0
        assert teacher.grad is None

    @EVERY
    def test_differentiating_twice_is_refused(self, name: str) -> None:
        student, teacher = logits_pair()
        student = student.log_softmax(-1).requires_grad_()
        value = LOSSES[name](student, teacher.log_softmax(-1)).square().sum()
        (gradient,) = torch.autograd.grad(value, student, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    @EVERY
    def test_inputs_stay_as_they_are(self, name: str) -> None:
        student, teacher = (logits.log_softmax(-1) for logits in logits_pair())
        before = student.clone(), teacher.clone()
        LOSSES[name](student.requires_grad_(), teacher).sum().backward()
        assert torch.equal(student, before[0])
        assert torch.equal(teacher, before[1])

    @EVERY
    def test_leading_dimensions_are_free(self, name: str) -> None:
        student, teacher = logits_pair(num_rows=6)
        shaped = divergence(name, student.view(2, 3, -1), teacher.view(2, 3, -1))
        torch.testing.assert_close(shaped.flatten(), divergence(name, student, teacher))


class TestKullbackLeibler:
    def test_forward_and_reverse_agree_with_scipy(self) -> None:
        student, teacher = log_softmax_rows(4, 9, seed=1), log_softmax_rows(4, 9, seed=2)
        p, q = teacher.exp().numpy(), student.exp().numpy()
        assert forward_kl(student, teacher).tolist() == pytest.approx(rel_entr(p, q).sum(-1).tolist())
        assert reverse_kl(student, teacher).tolist() == pytest.approx(rel_entr(q, p).sum(-1).tolist())

    def test_forward_kl_includes_the_entropy_of_the_teacher(self) -> None:
        # A well-known "KL" is the cross-entropy, log 8 here at equality.
        uniform = torch.full((1, 8), -math.log(8))
        assert forward_kl(uniform, uniform).item() == 0


class TestJsd:
    def test_agrees_with_scipy_at_a_half(self) -> None:
        student, teacher = log_softmax_rows(4, 9, seed=1), log_softmax_rows(4, 9, seed=2)
        expected = jensenshannon(teacher.exp().numpy(), student.exp().numpy(), axis=-1) ** 2
        assert jsd(student, teacher).tolist() == pytest.approx(expected.tolist())

    def test_disjoint_distributions_reach_the_bound(self) -> None:
        student, teacher = torch.tensor([[0.0, 1e4]]), torch.tensor([[1e4, 0.0]])
        assert divergence("jsd", student, teacher).item() == pytest.approx(math.log(2))
        bound = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
        assert divergence("jsd", student, teacher, beta=0.9).item() == pytest.approx(bound)

    @pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, math.nan])
    def test_beta_outside_the_open_interval_is_refused(self, beta: float) -> None:
        with pytest.raises(ValueError, match=r"beta=.*between 0 and 1.*forward_kl or reverse_kl"):
            jsd(*logits_pair(), beta=beta)


class TestTvd:
    def test_disjoint_distributions_are_at_distance_one(self) -> None:
        assert tvd(torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])).item() == 1.0


class TestSkew:
    @pytest.mark.parametrize("loss", [skew_forward_kl, skew_reverse_kl])
    def test_disjoint_distributions_reach_the_bound(self, loss: object) -> None:
        value = loss(torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]]), alpha=0.1)
        assert value.item() == pytest.approx(-math.log(0.1))

    @pytest.mark.parametrize("loss", [skew_forward_kl, skew_reverse_kl])
    @pytest.mark.parametrize("alpha", [-0.1, 1.0, math.nan])
    def test_alpha_outside_its_range_is_refused(self, loss: object, alpha: float) -> None:
        with pytest.raises(ValueError, match=r"alpha=.*at least 0 and below 1"):
            loss(*logits_pair(), alpha=alpha)

    def test_alpha_skews_towards_the_first_argument(self) -> None:
        # KL(p ‖ αp + (1−α)q) against KL(q ‖ (1−α)p + αq): swapping p and q swaps the two.
        student, teacher = log_softmax_rows(4, 9, seed=1), log_softmax_rows(4, 9, seed=2)
        torch.testing.assert_close(
            skew_forward_kl(student, teacher, alpha=0.3), skew_reverse_kl(teacher, student, alpha=0.3)
        )


class TestAlphaBeta:
    @pytest.mark.parametrize(
        ("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 0.3), (0.4, -0.4), (-0.4, 0.4), (0.0, 0.0)]
    )
    def test_limits_are_what_the_formula_tends_to(self, alpha: float, beta: float) -> None:
        student, teacher = log_softmax_rows(4, 9, seed=1), log_softmax_rows(4, 9, seed=2)
        near = [
            naive_alpha_beta(p, q, alpha + 1e-5, beta + 1.3e-5)
            for p, q in zip(teacher.exp().tolist(), student.exp().tolist(), strict=True)
        ]
        assert alpha_beta(student, teacher, alpha=alpha, beta=beta).tolist() == pytest.approx(near, rel=1e-3)

    @pytest.mark.parametrize(
        ("alpha", "beta"), [(0.5, 0.0), (0.0, 0.3), (0.4, -0.4), (-0.4, 0.4), (0.0, 0.0), (0.1 + 0.2, -0.3)]
    )
    def test_limits_have_the_gradient_of_their_value(self, alpha: float, beta: float) -> None:
        student, teacher = logits_pair()
        assert torch.autograd.gradcheck(
            partial(divergence, "alpha_beta", teacher_logits=teacher, alpha=alpha, beta=beta), student.requires_grad_()
        )

    def test_corners_are_the_kullback_leibler_divergences(self) -> None:
        student, teacher = log_softmax_rows(4, 9, seed=1), log_softmax_rows(4, 9, seed=2)
        torch.testing.assert_close(alpha_beta(student, teacher, alpha=1.0, beta=0.0), forward_kl(student, teacher))
        torch.testing.assert_close(alpha_beta(student, teacher, alpha=0.0, beta=1.0), reverse_kl(student, teacher))

    def test_a_half_each_is_four_times_the_squared_hellinger_distance(self) -> None:
        student, teacher = log_softmax_rows(4, 9, seed=1), log_softmax_rows(4, 9, seed=2)
        gap = teacher.mul(0.5).exp() - student.mul(0.5).exp()
        torch.testing.assert_close(alpha_beta(student, teacher, alpha=0.5, beta=0.5), 2 * gap.square().sum(-1))

    @pytest.mark.parametrize(
        "own", [{"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 0.5}, {"alpha": 0.0, "beta": 0.0}]
    )
    def test_limits_stay_finite_at_extreme_and_masked_logits(self, own: dict[str, float]) -> None:
        student, teacher = torch.tensor([[1e4, -1e4, 0.0, -math.inf]]), torch.tensor([[-1e4, 1e4, 0.0, -math.inf]])
        student.requires_grad_()
        value = divergence("alpha_beta", student, teacher, **own)
        value.sum().backward()
        assert value.isfinite().all()
        assert student.grad.isfinite().all()

    @pytest.mark.parametrize(("alpha", "beta"), [(1e-4, 0.5), (0.5, 1e-4), (0.5, -0.499), (-1.0, 0.5), (math.nan, 1.0)])
    def test_exponents_that_float32_cannot_resolve_are_refused(self, alpha: float, beta: float) -> None:
        with pytest.raises(ValueError, match=r"alpha=.*beta=.*0 or at least 0.01"):
            alpha_beta(*logits_pair(), alpha=alpha, beta=beta)


class TestDivergence:
    def test_temperature_divides_both_sides(self) -> None:
        student, teacher = logits_pair()
        torch.testing.assert_close(
            divergence("jsd", student, teacher, temperature=2.0), divergence("jsd", student / 2, teacher / 2)
        )

    def test_takes_a_callable(self) -> None:
        def squared_gap(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
            return (student_logprobs - teacher_logprobs).square().sum(-1)

        student, teacher = logits_pair()
        gap = student.log_softmax(-1) - teacher.log_softmax(-1)
        torch.testing.assert_close(divergence(squared_gap, student, teacher), gap.square().sum(-1))

    @pytest.mark.parametrize("side", [0, 1])
    def test_an_id_masked_on_one_side_is_refused(self, side: int) -> None:
        pair = logits_pair()
        pair[side][0, 2] = -math.inf
        with pytest.raises(ValueError, match=r"1 logits are -inf on one side only.*mask the same ids"):
            divergence("tvd", *pair)

    def test_other_shapes_are_refused(self) -> None:
        student, teacher = logits_pair()
        with pytest.raises(ValueError, match=r"\(5, 11\).*\(5, 10\).*shapes must agree"):
            divergence("tvd", student, teacher[:, :10])

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
    def test_a_temperature_that_is_not_above_zero_is_refused(self, temperature: float) -> None:
        with pytest.raises(ValueError, match=r"temperature.*above 0"):
            divergence("tvd", *logits_pair(), temperature=temperature)


class TestResolveLoss:
    def test_an_unknown_name_is_refused_with_the_nearest_known(self) -> None:
        with pytest.raises(ValueError, match=r"'revers_kl'.*did you mean reverse_kl"):
            resolve_loss("revers_kl")

    def test_binds_the_arguments_of_the_loss(self) -> None:
        student, teacher = log_softmax_rows(4, 9, seed=1), log_softmax_rows(4, 9, seed=2)
        for asked in ("jsd", jsd):
            torch.testing.assert_close(resolve_loss(asked, beta=0.3)(student, teacher), jsd(student, teacher, beta=0.3))

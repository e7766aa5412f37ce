"""Losses between two vocabularies against loops over entries, scipy, and closed forms."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from dense import DENSE, LargestTensor
from scipy.special import rel_entr
from scipy.stats import wasserstein_distance
from torch import Tensor

from kdkit.losses import LOSSES, VocabularyMatch, forward_kl, hybrid, reverse_kl, span_likelihood, uld

ROWS, V, W = 5, 11, 17
EVERY = pytest.mark.parametrize("name", list(LOSSES))
MATCH = VocabularyMatch(torch.tensor([7, 0, 3, 10]), torch.tensor([2, 16, 5, 0]), V, W)
LOOSE = [torch.tensor([1, 2, 4, 5, 6, 8, 9]), torch.tensor([1, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])]
"""The unmatched ids of either side, written out."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sides(num_student: int = V, num_teacher: int = W, *, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a student and a teacher."""
    return draw(rows, num_student, seed=1).log_softmax(-1), draw(rows, num_teacher, seed=2).log_softmax(-1)


def naive_uld(q: list[float], p: list[float], top_k: int | None = None) -> float:
    width = max(len(q), len(p))
    q, p = (sorted(x, reverse=True) + [0.0] * (width - len(x)) for x in (q, p))
    k = width if top_k is None else min(top_k, width)
    total = 0.0
    for rank in range(k):
        total += abs(p[rank] - q[rank])
    return total + abs(sum(p[k:]) - sum(q[k:]))


def rows_of(*logprobs: Tensor) -> list[tuple[list[float], ...]]:
    return list(zip(*(x.exp().tolist() for x in logprobs), strict=True))


def loss_named(name: str) -> Callable[..., Tensor]:
    return {"uld": uld, "uld_top_k": partial(uld, top_k=3), **hybrids()}[name]


def hybrids() -> dict[str, Callable[..., Tensor]]:
    return {
        f"hybrid_{loss}_{top_k}": partial(hybrid, match=MATCH, loss=LOSSES[loss], top_k=top_k)
        for loss in LOSSES
        for top_k in (None, 2)
    }


EVERY_FORM = pytest.mark.parametrize("form", ["uld", "uld_top_k", *hybrids()])


class TestEveryForm:
    @EVERY_FORM
    def test_gradient_is_that_of_the_value_and_reaches_the_student_only(self, form: str) -> None:
        loss = loss_named(form)
        student, teacher = draw(ROWS, V, seed=1).requires_grad_(), draw(ROWS, W, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: loss(z.log_softmax(-1), teacher.detach().log_softmax(-1)), student)
        loss(student.log_softmax(-1), teacher.log_softmax(-1)).sum().backward()
        assert student.grad.norm() > 0
        assert teacher.grad is None

    @EVERY_FORM
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_extreme_logits_give_finite_values_and_gradients_in_float32(self, form: str, dtype: torch.dtype) -> None:
        student, teacher = draw(ROWS, V, dtype=dtype), draw(ROWS, W, dtype=dtype)
        student[0, 0], teacher[0, 1] = 1e4, 1e4
        student[1, 0], teacher[1, 0] = -1e4, 1e4
        student[2], teacher[2] = -1e4, 1e4
        student[3] = torch.linspace(-1e4, 1e4, V)
        teacher[3] = torch.linspace(-1e4, 1e4, W)
        student.requires_grad_()
        value = loss_named(form)(student.log_softmax(-1), teacher.log_softmax(-1))
        value.sum().backward()
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert student.grad.isfinite().all()

    @EVERY_FORM
    def test_is_never_negative(self, form: str) -> None:
        student, teacher = (x.float() for x in sides(rows=300))
        assert (loss_named(form)(student, teacher) > 0).all()

    @EVERY_FORM
    def test_positions_do_not_see_each_other(self, form: str) -> None:
        student, teacher = sides()
        alone = [loss_named(form)(student[i : i + 1], teacher[i : i + 1]) for i in range(ROWS)]
        torch.testing.assert_close(loss_named(form)(student, teacher), torch.cat(alone))

    @EVERY_FORM
    def test_no_gradient_is_formed_under_no_grad(self, form: str) -> None:
        student, teacher = sides()
        with torch.no_grad():
            assert not loss_named(form)(student.requires_grad_(), teacher).requires_grad

    @EVERY_FORM
    def test_no_rows_give_no_values(self, form: str) -> None:
        student, teacher = sides(rows=0)
        value = loss_named(form)(student.requires_grad_(), teacher)
        value.sum().backward()
        assert value.shape == (0,)
        assert student.grad.shape == (0, V)


class TestUld:
    @pytest.mark.parametrize("top_k", [None, 1, 4, 11, 12, 17, 40])
    @pytest.mark.parametrize(("num_student", "num_teacher"), [(V, W), (W, V), (V, V)])
    def test_equals_a_float64_loop_over_ranks(self, num_student: int, num_teacher: int, top_k: int | None) -> None:
        student, teacher = sides(num_student, num_teacher)
        expected = [naive_uld(q, p, top_k) for q, p in rows_of(student, teacher)]
        assert uld(student, teacher, top_k=top_k).tolist() == pytest.approx(expected)
        assert uld(student.float(), teacher.float(), top_k=top_k).tolist() == pytest.approx(expected, rel=1e-5)

    def test_is_the_wasserstein_distance_of_the_probabilities_as_values(self) -> None:
        # The paper derives its distance so: optimal transport between equally weighted values pairs them by rank.
        student, teacher = sides()
        for value, (q, p) in zip(uld(student, teacher).tolist(), rows_of(student, teacher), strict=True):
            assert value == pytest.approx(W * wasserstein_distance(q + [0.0] * (W - V), p))

    @pytest.mark.parametrize("top_k", [None, 1, 5, W])
    def test_permuting_either_vocabulary_changes_nothing(self, top_k: int | None) -> None:
        student, teacher = sides()
        mixed = student[:, torch.randperm(V, generator=torch.Generator().manual_seed(0))]
        other = teacher[:, torch.randperm(W, generator=torch.Generator().manual_seed(1))]
        torch.testing.assert_close(uld(mixed, other, top_k=top_k), uld(student, teacher, top_k=top_k))

    @pytest.mark.parametrize("top_k", [None, 1, 5])
    def test_is_zero_for_one_distribution_in_any_order(self, top_k: int | None) -> None:
        student = draw(ROWS, V, dtype=torch.float32).requires_grad_()
        order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
        value = uld(student.log_softmax(-1), student.detach()[:, order].log_softmax(-1), top_k=top_k)
        value.sum().backward()
        assert value.abs().max() < 1e-6

    def test_disjoint_shapes_reach_the_bound(self) -> None:
        sure, even = torch.tensor([[1e4, 0.0]]).log_softmax(-1), torch.zeros(1, 100_000).log_softmax(-1)
        assert uld(sure, even).item() == pytest.approx(2, abs=1e-3)
        assert uld(even, sure).item() == pytest.approx(2, abs=1e-3)

    @pytest.mark.parametrize("top_k", [1, 2, 5, 11, 16])
    def test_top_k_is_a_lower_bound(self, top_k: int) -> None:
        student, teacher = sides(rows=200)
        whole = uld(student, teacher)
        assert (uld(student, teacher, top_k=top_k) <= whole + 1e-12).all()
        assert (uld(student, teacher, top_k=1) < whole - 1e-3).any()

    @pytest.mark.parametrize("top_k", [W, W + 1])
    def test_every_rank_kept_equals_all(self, top_k: int) -> None:
        student, teacher = sides()
        student.requires_grad_()
        torch.testing.assert_close(uld(student, teacher, top_k=top_k), uld(student, teacher))
        kept, whole = (torch.autograd.grad(uld(student, teacher, top_k=k).sum(), student)[0] for k in (top_k, None))
        torch.testing.assert_close(kept, whole)

    def test_top_k_sorts_nothing(self) -> None:
        student, teacher = sides()
        with LargestTensor() as seen:
            uld(student.requires_grad_(), teacher, top_k=3).sum().backward()
        assert not {"sort", "exp_"} & seen.calls.keys()
        assert seen.calls["topk"] == 2

    def test_a_k_below_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"top_k=0: give 1 or more"):
            uld(*sides(), top_k=0)


class TestSpanLikelihood:
    LOGPROBS = (-1e-3, -0.1, -0.7, -3.0, -20.0, -300.0)

    def pairs(self) -> tuple[Tensor, Tensor]:
        pairs = [(q, p) for q in self.LOGPROBS for p in self.LOGPROBS]
        student, teacher = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
        return student.clone(), teacher.clone()

    @pytest.mark.parametrize("temperature", [1.0, 2.5, 100.0])
    def test_is_the_divergence_of_two_coins(self, temperature: float) -> None:
        student, teacher = self.pairs()
        q, p = (student / temperature).exp().numpy(), (teacher / temperature).exp().numpy()
        expected = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).tolist()
        value = span_likelihood(student, teacher, temperature=temperature)
        assert value.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        single = span_likelihood(student.float(), teacher.float(), temperature=temperature)
        assert single.dtype == torch.float32
        assert single.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert (single > -1e-7).all()

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_gradient_is_the_closed_form(self, temperature: float) -> None:
        student, teacher = self.pairs()
        q, p = (student / temperature).exp(), (teacher / temperature).exp()
        expected = (q - p) / (1 - q) / temperature
        for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
            leaf = student.detach().clone().to(dtype).requires_grad_()
            span_likelihood(leaf, teacher.to(dtype), temperature=temperature).sum().backward()
            torch.testing.assert_close(leaf.grad.double(), expected, rtol=rtol, atol=1e-6)

    def test_gradient_by_finite_differences(self) -> None:
        student, teacher = self.pairs()
        assert torch.autograd.gradcheck(lambda x: span_likelihood(x, teacher), student.requires_grad_())

    def test_gradient_reaches_the_student_only(self) -> None:
        student, teacher = (x.requires_grad_() for x in self.pairs())
        span_likelihood(student, teacher).sum().backward()
        assert teacher.grad is None

    @pytest.mark.parametrize("logprob", [0.0, -1e-9, -1e-5, -0.3, -100.0, -1e4])
    def test_is_zero_at_equality(self, logprob: float) -> None:
        student = torch.tensor([logprob], requires_grad=True)
        value = span_likelihood(student, torch.tensor([logprob]))
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert student.grad.item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
    def test_is_finite_from_certain_to_impossible(self, temperature: float) -> None:
        ends = (0.0, -1e-45, -1e-9, -1e-7, -0.69, -1.0, -88.0, -104.0, -1e4)
        student, teacher = torch.tensor([(q, p) for q in ends for p in ends]).unbind(-1)
        leaf = student.clone().requires_grad_()
        value = span_likelihood(leaf, teacher, temperature=temperature)
        value.sum().backward()
        assert value.isfinite().all()
        assert (value > -1e-6).all()
        assert leaf.grad.isfinite().all()
        # Where the student is surer than the teacher it is pushed down, and the other way round.
        is_surer = student.clamp_max(-1e-6).exp() > teacher.clamp_max(-1e-6).exp() + 1e-3
        assert (leaf.grad[is_surer] > 0).all()

    def test_a_student_wrongly_certain_is_taught_through_its_softmax(self) -> None:
        # In float32 a logit 20 above the others has log-probability 0: bounding it there must not stop the gradient.
        logits = torch.tensor([20.0, 0.0, 0.0], requires_grad=True)
        span_likelihood(logits.log_softmax(-1)[:1], torch.tensor([math.log(0.5)])).backward()
        assert logits.detach().log_softmax(-1)[0] == 0
        assert (logits.grad[1:] < -1e-3).all()

    def test_tokens_count_by_their_product(self) -> None:
        # "ab" as one token of the teacher, as "a" then "b" of the student.
        value = span_likelihood(torch.tensor([math.log(0.5) + math.log(0.4)]), torch.tensor([math.log(0.2)]))
        assert value.item() == pytest.approx(0, abs=1e-7)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
    def test_a_temperature_that_is_not_above_zero_is_refused(self, temperature: float) -> None:
        with pytest.raises(ValueError, match=r"temperature.*above 0"):
            span_likelihood(torch.zeros(1), torch.zeros(1), temperature=temperature)


class TestHybrid:
    def expected(self, name: str, student: Tensor, teacher: Tensor, ids: tuple[Tensor, Tensor]) -> Tensor:
        """The divergence over ids (one row each) and a bucket, on probabilities."""
        columns = []
        for logprobs, kept in zip((teacher, student), (ids[1], ids[0]), strict=True):
            probabilities = logprobs.exp()
            named = probabilities.gather(-1, kept)
            columns.append(torch.cat([named, 1 - named.sum(-1, keepdim=True)], dim=-1))
        return DENSE[name](*columns)

    @EVERY
    def test_is_a_divergence_over_matched_ids_and_the_rest_by_rank(self, name: str) -> None:
        student, teacher = sides()
        ids = MATCH.student_ids.expand(ROWS, -1), MATCH.teacher_ids.expand(ROWS, -1)
        ranked = [naive_uld(q, p) for q, p in rows_of(student[:, LOOSE[0]], teacher[:, LOOSE[1]])]
        expected = self.expected(name, student, teacher, ids) + 0.3 * torch.tensor(ranked, dtype=torch.float64)
        found = hybrid(student, teacher, match=MATCH, loss=LOSSES[name], unmatched_weight=0.3)
        torch.testing.assert_close(found, expected)

    @EVERY
    def test_top_k_keeps_the_teachers_likeliest_matched_ids(self, name: str) -> None:
        student, teacher = sides()
        order = teacher[:, MATCH.teacher_ids].argsort(dim=-1, descending=True)[:, :2]
        ids = MATCH.student_ids[order], MATCH.teacher_ids[order]
        ranked = [naive_uld(q, p, 2) for q, p in rows_of(student[:, LOOSE[0]], teacher[:, LOOSE[1]])]
        expected = self.expected(name, student, teacher, ids) + torch.tensor(ranked, dtype=torch.float64)
        torch.testing.assert_close(hybrid(student, teacher, match=MATCH, loss=LOSSES[name], top_k=2), expected)

    @EVERY
    @pytest.mark.parametrize("top_k", [None, 50])
    def test_equals_the_loss_where_all_ids_match(self, name: str, top_k: int | None) -> None:
        student, teacher = draw(ROWS, V, seed=1).requires_grad_(), draw(ROWS, V, seed=2).log_softmax(-1)
        order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
        match = VocabularyMatch(order, torch.arange(V), V, V)
        found = hybrid(student.log_softmax(-1), teacher, match=match, loss=LOSSES[name], top_k=top_k)
        expected = LOSSES[name](student[:, order].log_softmax(-1), teacher)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in (found, expected)]
        torch.testing.assert_close(*gradients)

    @EVERY
    def test_every_matched_id_kept_equals_all(self, name: str) -> None:
        student, teacher = sides()
        torch.testing.assert_close(
            hybrid(student, teacher, match=MATCH, loss=LOSSES[name], top_k=W),
            hybrid(student, teacher, match=MATCH, loss=LOSSES[name]),
        )

    @pytest.mark.parametrize("top_k", [None, 2])
    def test_is_zero_at_equality_whatever_the_unmatched_ids_are_called(self, top_k: int | None) -> None:
        teacher = draw(ROWS, V, dtype=torch.float32)
        student = teacher.clone()
        student[:, MATCH.student_ids] = teacher[:, [2, 1, 5, 0]]
        student[:, LOOSE[0]] = teacher[:, [10, 9, 8, 7, 6, 4, 3]]
        match = VocabularyMatch(MATCH.student_ids, torch.tensor([2, 1, 5, 0]), V, V)
        student.requires_grad_()
        value = hybrid(student.log_softmax(-1), teacher.log_softmax(-1), match=match, loss=forward_kl, top_k=top_k)
        assert value.abs().max() < 1e-6
        hybrid(
            student.log_softmax(-1), teacher.log_softmax(-1), match=match, loss=forward_kl, unmatched_weight=0.0
        ).sum().backward()
        assert student.grad.abs().max() < 1e-6

    @EVERY
    def test_a_bucket_that_one_side_cannot_fill_is_left_out(self, name: str) -> None:
        # A forward KL to a student without any unmatched id was infinite, whatever the student did.
        student, teacher = sides(4, W)
        match = VocabularyMatch(torch.tensor([3, 0, 2, 1]), MATCH.teacher_ids, 4, W)
        p, q = teacher.exp()[:, MATCH.teacher_ids], student.exp()[:, [3, 0, 2, 1]]
        left = 1 - p.sum(-1)
        expected = DENSE[name](p / p.sum(-1, keepdim=True), q) + left
        torch.testing.assert_close(hybrid(student, teacher, match=match, loss=LOSSES[name]), expected)
        swapped = VocabularyMatch(MATCH.teacher_ids, torch.tensor([3, 0, 2, 1]), W, 4)
        assert hybrid(teacher, student, match=swapped, loss=reverse_kl).isfinite().all()

    def test_unmatched_ids_without_any_mass_keep_the_gradient(self) -> None:
        student, teacher = draw(ROWS, V, seed=1), draw(ROWS, W, seed=2)
        student[:, LOOSE[0]], teacher[:, LOOSE[1]] = -math.inf, -math.inf
        student.requires_grad_()
        value = hybrid(student.log_softmax(-1), teacher.log_softmax(-1), match=MATCH, loss=forward_kl)
        value.sum().backward()
        expected = forward_kl(
            student.detach()[:, MATCH.student_ids].log_softmax(-1), teacher[:, MATCH.teacher_ids].log_softmax(-1)
        )
        torch.testing.assert_close(value, expected)
        assert student.grad.isfinite().all()

    def test_log_probabilities_of_another_width_are_refused(self) -> None:
        student, teacher = sides()
        with pytest.raises(ValueError, match=r"over 10 and 17 ids, a match of 11 and 17"):
            hybrid(student[:, :10], teacher, match=MATCH, loss=forward_kl)


class TestVocabularyMatch:
    def test_finds_the_ids_that_stand_alone(self) -> None:
        assert MATCH.student_rest.tolist() == LOOSE[0].tolist()
        assert MATCH.teacher_rest.tolist() == LOOSE[1].tolist()

    def test_stays_where_it_is_or_moves_as_a_whole(self) -> None:
        assert MATCH.to("cpu") is MATCH
        assert MATCH.to(torch.device("cpu")) is MATCH

    @pytest.mark.parametrize(
        ("student_ids", "teacher_ids", "message"),
        [
            ([0, 1], [0], r"student_ids \(2,\), teacher_ids \(1,\): must be pairs"),
            ([[0]], [[0]], r"both of shape \(C,\)"),
            ([], [], "without any pair can be compared by uld"),
            ([0, V], [0, 1], r"student_ids from 0 to 11: must be within 0 to 10"),
            ([0, 1], [-1, 1], r"teacher_ids from -1 to 1: must be within 0 to 16"),
            ([3, 3, 4], [0, 1, 2], r"1 of 3 student_ids are in a pair before"),
        ],
    )
    def test_what_is_no_match_is_refused(self, student_ids: list[int], teacher_ids: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            VocabularyMatch(torch.tensor(student_ids).long(), torch.tensor(teacher_ids).long(), V, W)

    def test_ids_of_another_dtype_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"student_ids of torch.int32: give int64"):
            VocabularyMatch(torch.tensor([0]).int(), torch.tensor([0]), V, W)

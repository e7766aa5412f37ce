"""Compiled loops between two vocabularies against loops over ranks, and against the float64 path, which has none."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kdkit import compiled
from kdkit.losses import LOSSES, VocabularyMatch, cross_native, forward_kl, grouped, hybrid, jsd, uld
from kdkit.losses.cross_tokenizer import GroupedIds, VocabularyGroups, group_logprobs

pytest.importorskip("numba")

Loss = Callable[[Tensor, Tensor], Tensor]
SHAPES = [(1, 1), (1, 40), (40, 1), (300, 700), (700, 300), (500, 500)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(rows: int, ids: int, *, seed: int, size: float = 3.0) -> Tensor:
    return size * torch.randn(rows, ids, generator=seeded(seed))


def masked(values: Tensor, *, seed: int) -> Tensor:
    """Half of the ids at −inf or far below, but the first."""
    drawn = torch.rand(values.shape, generator=seeded(seed))
    drawn[:, 0] = 1
    return values.masked_fill(drawn < 0.25, -torch.inf).masked_fill((drawn >= 0.25) & (drawn < 0.5), -1e4)


def pair(kind: str, num_student: int, num_teacher: int) -> tuple[Tensor, Tensor]:
    """Float32 log-probabilities of a student and a teacher, six rows."""
    student, teacher = logits(6, num_student, seed=1), logits(6, num_teacher, seed=2)
    if kind == "tied":  # few values, and the same on both sides
        student, teacher = student.round(), teacher.round()
    if kind == "masked":
        student, teacher = masked(student, seed=3), masked(teacher, seed=4)
    if kind == "flat":  # all in one bin
        student, teacher = student * 1e-5, teacher * 1e-5
    if kind == "sure":
        student, teacher = student * 1e3, teacher * 1e3
    return student.log_softmax(-1), teacher.log_softmax(-1)


KINDS = pytest.mark.parametrize("kind", ["plain", "tied", "masked", "flat", "sure"])


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher)
    weights = torch.linspace(0.5, 2, len(value), dtype=value.dtype)
    return value.detach(), torch.autograd.grad((value * weights).sum(), leaf)[0]


def shared_by_ties(gradient: Tensor, student: Tensor) -> Tensor:
    """The mean over the ids of a row that have one probability: which of them gets which rank is nobody's business."""
    rows = []
    for own, values in zip(gradient.double(), student, strict=True):
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        rows.append((torch.zeros(len(count)).double().index_add_(0, place, own) / count)[place])
    return torch.stack(rows)


def assert_equals_float64(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    found = value_and_gradient(loss, student, teacher)
    expected = value_and_gradient(loss, student.double(), teacher.double())
    assert {x.dtype for x in found} == {torch.float32}
    gradients = (shared_by_ties(gradient, student) for _, gradient in (found, expected))
    for ours, exact in ((found[0], expected[0]), gradients):
        scale = max(1e-3, exact.abs().max().item())
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6 * scale)


def match_of(num_matched: int, num_student: int, num_teacher: int) -> VocabularyMatch:
    chosen = (torch.randperm(n, generator=seeded(n))[:num_matched] for n in (num_student, num_teacher))
    return VocabularyMatch(*chosen, num_student, num_teacher)


def groups_of(num_groups: int, num_student: int, num_teacher: int) -> VocabularyGroups:
    """Groups of one to several ids, the last ids of either side in none."""
    sides = []
    for width, free in ((num_student, 7), (num_teacher, 11)):
        ids = torch.arange(width) % num_groups
        ids[-free:] = -1
        sides.append(GroupedIds(ids[torch.randperm(width, generator=seeded(width))], num_groups))
    return VocabularyGroups(*sides)


class TestUld:
    @KINDS
    @pytest.mark.parametrize(("num_student", "num_teacher"), SHAPES)
    def test_equals_a_loop_over_ranks(self, kind: str, num_student: int, num_teacher: int) -> None:
        student, teacher = pair(kind, num_student, num_teacher)
        expected = []
        for q, p in zip(student.double().exp().tolist(), teacher.double().exp().tolist(), strict=True):
            width = max(num_student, num_teacher)
            q, p = (sorted(x, reverse=True) + [0.0] * (width - len(x)) for x in (q, p))
            expected.append(sum(abs(a - b) for a, b in zip(q, p, strict=True)))
        assert uld(student, teacher).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)

    @KINDS
    @pytest.mark.parametrize(("num_student", "num_teacher"), SHAPES)
    def test_ids_of_one_probability_share_the_signs_of_their_ranks(
        self, kind: str, num_student: int, num_teacher: int
    ) -> None:
        student, teacher = pair(kind, num_student, num_teacher)
        gradient = value_and_gradient(lambda q, p: uld(q, p)[:1], student, teacher)[1][0] / 0.5
        width = max(num_student, num_teacher)
        ranked = [sorted(x[0].exp().tolist(), reverse=True) for x in (student, teacher)]
        q, p = (x + [0.0] * (width - len(x)) for x in ranked)
        for value in set(ranked[0]):
            signs = sum((a > b) - (a < b) for a, b in zip(q, p, strict=True) if a == value)
            found = gradient[student[0].exp() == value].sum().item()
            assert found == pytest.approx(value * signs, rel=1e-5, abs=1e-7)

    def test_one_distribution_in_two_orders_is_at_distance_zero_without_gradient(self) -> None:
        student = pair("plain", 5_000, 1)[0]
        teacher = student[:, torch.randperm(5_000, generator=seeded(0))]
        value, gradient = value_and_gradient(uld, student, teacher)
        assert value.tolist() == [0] * 6
        assert not gradient.any()

    def test_models_that_differ_little_are_ranked_as_others_are(self) -> None:
        student = logits(6, 20_000, seed=1)
        teacher = student + 0.01 * logits(6, 20_000, seed=2)
        assert_equals_float64(uld, student.log_softmax(-1), teacher.log_softmax(-1))

    @pytest.mark.parametrize("side", [0, 1])
    def test_nan_comes_through(self, side: int) -> None:
        sides = pair("plain", 30, 40)
        sides[side][2, 5] = torch.nan
        assert uld(*sides).isnan().tolist() == [False, False, True, False, False, False]


class TestHybrid:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("kind", ["plain", "tied"])
    @pytest.mark.parametrize("num_matched", [1, 100, 299])
    def test_equals_the_float64_path(self, name: str, kind: str, num_matched: int) -> None:
        match = match_of(num_matched, 300, 700)
        assert_equals_float64(partial(hybrid, match=match, loss=LOSSES[name]), *pair(kind, 300, 700))

    @pytest.mark.parametrize(("num_student", "num_teacher"), [(40, 90), (90, 40), (40, 40)])
    @pytest.mark.parametrize("weight", [0.0, 0.3])
    def test_equals_it_where_a_side_has_no_unmatched_id(
        self, num_student: int, num_teacher: int, weight: float
    ) -> None:
        match = match_of(40, num_student, num_teacher)
        loss = partial(hybrid, match=match, loss=jsd, unmatched_weight=weight)
        assert_equals_float64(loss, *pair("plain", num_student, num_teacher))

    @pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
    def test_a_rest_of_next_to_no_mass_keeps_its_digits(self, size: float) -> None:
        # Its probabilities are 0 in float32, the logarithm of their sum is not.
        student, teacher = logits(6, 50, seed=1), logits(6, 60, seed=2)
        student[:, 10:] -= size
        teacher[:, 10:] -= 2 * size  # apart: the difference of two large logarithms has few digits
        match = VocabularyMatch(torch.arange(10), torch.arange(10), 50, 60)
        loss = partial(hybrid, match=match, loss=partial(LOSSES["alpha_beta"], alpha=0.0, beta=0.0))
        assert_equals_float64(loss, student.log_softmax(-1), teacher.log_softmax(-1))

    def test_a_rest_without_any_mass_is_as_on_the_other_path(self) -> None:
        student, teacher = logits(6, 50, seed=1), logits(6, 60, seed=2)
        student[:, 10:] = teacher[:, 10:] = -torch.inf
        match = VocabularyMatch(torch.arange(10), torch.arange(10), 50, 60)
        loss = partial(hybrid, match=match, loss=jsd)
        assert_equals_float64(loss, student.log_softmax(-1), teacher.log_softmax(-1))

    def test_rows_that_lie_apart_in_memory_are_read_as_they_are(self) -> None:
        student, teacher = pair("plain", 30, 40)
        loss = partial(hybrid, match=match_of(10, 30, 40), loss=jsd)
        expected = loss(student, teacher)
        assert torch.equal(loss(student.T.contiguous().T, teacher.T.contiguous().T), expected)


class TestGrouped:
    @KINDS
    @pytest.mark.parametrize("num_groups", [1, 120, 293])
    def test_masses_equal_the_float64_path(self, kind: str, num_groups: int) -> None:
        ids = groups_of(num_groups, 300, 700).student
        student, _ = pair(kind, 300, 700)
        upstream = torch.randn(6, num_groups + 7, generator=seeded(5))

        def weighed(logprobs: Tensor, _: Tensor) -> Tensor:
            masses = group_logprobs(logprobs, ids)
            return torch.where(masses.isinf(), 0.0, masses * upstream.to(masses)).sum(-1)

        assert_equals_float64(weighed, student, student)
        masses, exact = group_logprobs(student, ids), group_logprobs(student.double(), ids)
        torch.testing.assert_close(masses.double(), exact, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_equals_the_float64_path(self, name: str) -> None:
        groups = groups_of(120, 300, 700)
        assert_equals_float64(partial(grouped, groups=groups, loss=LOSSES[name]), *pair("plain", 300, 700))

    def test_a_group_of_one_is_that_id_to_the_last_bit(self) -> None:
        student, _ = pair("plain", 300, 700)
        order = torch.randperm(300, generator=seeded(0))
        assert torch.equal(group_logprobs(student, GroupedIds(order, 300))[:, order], student)

    def test_nan_comes_through(self) -> None:
        student, _ = pair("plain", 300, 700)
        student[3, 8] = torch.nan
        ids = groups_of(120, 300, 700).student
        assert group_logprobs(student, ids)[3].isnan().any()


class TestWhoRuns:
    def test_the_number_of_threads_changes_no_bit(self) -> None:
        loss = partial(hybrid, match=match_of(100, 300, 700), loss=forward_kl)
        before, found = torch.get_num_threads(), []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(value_and_gradient(loss, *pair("plain", 300, 700)))
        torch.set_num_threads(before)
        assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))

    def test_without_numba_the_same_comes_from_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sides, loss = pair("plain", 300, 700), partial(hybrid, match=match_of(100, 300, 700), loss=jsd)
        expected = value_and_gradient(loss, *sides)
        monkeypatch.setattr(compiled, "is_installed", lambda: False)
        monkeypatch.setattr(cross_native, "compare", None)
        for ours, native in zip(value_and_gradient(loss, *sides), expected, strict=True):
            torch.testing.assert_close(ours, native, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_float64_alone_is_left_to_torch(self, dtype: torch.dtype) -> None:
        student, _ = pair("plain", 30, 40)
        assert cross_native.takes(student.to(dtype).to(torch.promote_types(dtype, torch.float32))) == (
            dtype != torch.float64
        )

    def test_tensors_without_values_are_left_to_torch(self) -> None:
        with FakeTensorMode():
            student, teacher = torch.zeros(2, 30), torch.zeros(2, 40)
            assert uld(student, teacher).shape == (2,)

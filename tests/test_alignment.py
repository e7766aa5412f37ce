"""The alignment loss against loops written the dumb way, and what must leave it unchanged."""

import math

import pytest
import torch
from dense import LargestTensor, on_each_device
from scipy.spatial.distance import cdist
from torch import Tensor

from kdkit.losses.alignment import AdaptiveBand, alignment_loss, pool_units
from kdkit.softdtw import expected_alignment, pairwise_cost, soft_dtw, soft_dtw_divergence


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values)


def naive_soft_dtw(cost: list[list[float]], gamma: float) -> float:
    """The recursion, one cell after the other."""
    total = {(-1, -1): 0.0}
    for i, row in enumerate(cost):
        for j, c in enumerate(row):
            before = [total[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in total]
            total[i, j] = c - gamma * math.log(sum(math.exp(-b / gamma) for b in before))
    return total[len(cost) - 1, len(cost[0]) - 1]


class TestPoolUnits:
    @on_each_device
    def test_equals_the_mean_of_each_units_tokens(self, device: str) -> None:
        hidden = states(3, 7, 4)
        ids = torch.tensor([[-1, 0, 0, 1, 2, 2, 2], [0, 1, 2, 3, -1, -1, -1], [-1, -1, 0, -1, 1, 1, -1]])
        units, found = pool_units(hidden.to(device), ids.to(device), 5)
        assert units.device.type == found.device.type == device
        assert units.shape == (3, 5, 4)
        assert found.tolist() == [3, 4, 2]
        for b in range(3):
            for u in range(5):
                tokens = [hidden[b, t] for t in range(7) if ids[b, t] == u]
                mean = sum(tokens) / len(tokens) if tokens else torch.zeros(4, dtype=torch.float64)
                torch.testing.assert_close(units[b, u].cpu(), mean)

    def test_waits_for_the_device_once_at_most(self) -> None:
        # The least id, the greatest and the size of a histogram were each fetched from the device.
        with LargestTensor() as seen:
            pool_units(states(3, 7, 4), torch.zeros(3, 7, dtype=torch.int64), 5)
        waits = ("_local_scalar_dense", "bincount", "nonzero")
        assert sum(seen.calls.get(name, 0) for name in waits) <= 1

    def test_the_middle_of_a_word_split_by_a_token_outside_is_still_pooled(self) -> None:
        units, _ = pool_units(torch.tensor([[[1.0], [9.0], [3.0]]]), torch.tensor([[0, -1, 0]]), 1)
        assert units.tolist() == [[[2.0]]]

    def test_gradcheck(self) -> None:
        hidden = states(2, 5, 3).requires_grad_()
        ids = torch.tensor([[0, 0, 1, -1, 2], [-1, 0, 1, 1, 1]])
        assert torch.autograd.gradcheck(lambda h: pool_units(h, ids, 3)[0], (hidden,))

    def test_tokens_outside_every_unit_are_never_read(self) -> None:
        hidden = states(1, 4, 3)
        hidden[0, 0], hidden[0, 3] = math.nan, math.inf
        hidden.requires_grad_()
        units, _ = pool_units(hidden, torch.tensor([[-1, 0, 1, -1]]), 2)
        units.sum().backward()
        assert units.isfinite().all()
        assert hidden.grad[0].sum(1).tolist() == [0.0, 3.0, 3.0, 0.0]

    def test_a_sample_without_units_and_a_batch_without_tokens_have_length_zero(self) -> None:
        units, found = pool_units(states(2, 3, 4), torch.tensor([[-1, -1, -1], [0, 0, 0]]), 2)
        assert found.tolist() == [0, 1]
        assert (units[0] == 0).all()
        assert pool_units(states(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), 0)[1].tolist() == [0, 0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_summed_in_float32(self, dtype: torch.dtype) -> None:
        # 4096 ones: a half-precision sum stops growing long before.
        hidden = torch.ones(1, 4096, 1, dtype=dtype).requires_grad_()
        units, _ = pool_units(hidden, torch.zeros(1, 4096, dtype=torch.int64), 1)
        units.sum().backward()
        assert units.dtype == torch.float32
        assert units.item() == 1.0
        assert hidden.grad.dtype == dtype

    @pytest.mark.parametrize("wrong", [2, -2])
    def test_refuses_ids_outside_the_padded_units(self, wrong: int) -> None:
        with pytest.raises(ValueError, match="max_units"):
            pool_units(states(1, 2, 3), torch.tensor([[0, wrong]]), 2)

    def test_refuses_ids_of_another_shape(self) -> None:
        with pytest.raises(ValueError, match="unit_ids"):
            pool_units(states(1, 2, 3), torch.tensor([[0, 0, 0]]), 2)


class TestAlignmentLoss:
    @on_each_device
    @pytest.mark.parametrize("divergence", [False, True])
    @pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
    def test_equals_the_naive_loop_on_weighted_costs(self, metric: str, divergence: bool, device: str) -> None:
        x, y = states(2, 5, 3, seed=1), states(2, 6, 3, seed=2)
        n, m = [4, 5], [6, 3]
        a, b = states(2, 5, seed=3).abs(), states(2, 6, seed=4).abs()
        found = alignment_loss(
            x.to(device),
            y.to(device),
            lengths(*n).to(device),
            lengths(*m).to(device),
            gamma=0.3,
            metric=metric,
            divergence=divergence,
            student_weights=a.to(device),
            teacher_weights=b.to(device),
        )
        assert found.per_sample.device.type == device
        for k in range(2):
            sides = []
            for vectors, weights, size in ((x, a, n[k]), (y, b, m[k])):
                own = weights[k, :size]
                sides.append((vectors[k, :size].numpy(), (own / own.mean()).numpy()))

            def value(one: tuple, other: tuple) -> float:
                importance = (one[1][:, None] + other[1][None, :]) / 2
                return naive_soft_dtw((cdist(one[0], other[0], metric) * importance).tolist(), 0.3)

            s, t = sides
            expected = value(s, t) - (value(s, s) + value(t, t)) / 2 if divergence else value(s, t)
            assert found.per_sample[k].item() == pytest.approx(expected / max(n[k], m[k]), abs=1e-6)

    def test_without_weights_is_the_soft_dtw_divergence(self) -> None:
        x, y, n, m = states(3, 6, 4, seed=1), states(3, 9, 4, seed=2), lengths(6, 2, 4), lengths(9, 9, 1)
        found = alignment_loss(x, y, n, m, gamma=0.2, band=2).per_sample
        expected = soft_dtw_divergence(x, y, n, m, gamma=0.2, band=2) / torch.maximum(n, m)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(
        ("normalize", "divisors"), [("max_length", [7, 5]), ("sum_length", [9, 10]), ("none", [1, 1])]
    )
    def test_is_divided_by_a_constant_of_the_lengths(self, normalize: str, divisors: list[int]) -> None:
        x, y, n, m = states(2, 5, 4, seed=1), states(2, 7, 4, seed=2), lengths(2, 5), lengths(7, 5)
        found = alignment_loss(x, y, n, m, gamma=0.2, divergence=False, normalize=normalize)
        expected = soft_dtw(pairwise_cost(x, y), n, m, gamma=0.2) / torch.tensor(divisors)
        torch.testing.assert_close(found.per_sample, expected)

    def test_gradcheck_on_the_student(self) -> None:
        x, y, n = states(2, 3, 4, seed=1).requires_grad_(), states(2, 4, 4, seed=2), lengths(3, 2)
        weights = states(2, 3, seed=3).abs()
        assert torch.autograd.gradcheck(
            lambda s: alignment_loss(s, y, n, None, gamma=0.3, student_weights=weights).per_sample, (x,)
        )

    @pytest.mark.parametrize("adaptive_band", [None, AdaptiveBand(half_width=0.5, entropy_scale=0.2)])
    @pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
    def test_value_and_gradient_are_zero_at_equality(self, metric: str, adaptive_band: AdaptiveBand | None) -> None:
        x, n, weights = states(2, 8, 4), lengths(8, 5), states(2, 8, seed=1).abs()
        student = x.clone().requires_grad_()
        found = alignment_loss(
            student,
            x,
            n,
            n,
            gamma=0.3,
            band=3,
            metric=metric,
            student_weights=weights,
            teacher_weights=weights,
            adaptive_band=adaptive_band,
        )
        found.per_sample.sum().backward()
        assert found.per_sample.abs().max() < 1e-12
        assert student.grad.abs().max() < 1e-12

    def test_padding_and_batching_change_nothing_and_padding_is_never_read(self) -> None:
        sizes = [(3, 5), (6, 2), (1, 1), (6, 7)]
        x, y = torch.full((4, 6, 3), math.nan), torch.full((4, 8, 3), math.nan)
        a, b = torch.full((4, 6), math.nan), torch.full((4, 8), math.nan)
        for k, (n, m) in enumerate(sizes):
            x[k, :n], y[k, :m] = states(n, 3, seed=k), states(m, 3, seed=10 + k)
            a[k, :n], b[k, :m] = states(n, seed=20 + k).abs(), states(m, seed=30 + k).abs()
        x.requires_grad_()
        n, m = (torch.tensor(side) for side in zip(*sizes, strict=True))
        options = {"gamma": 0.3, "band": 2, "adaptive_band": AdaptiveBand(half_width=1.0)}
        found = alignment_loss(x, y, n, m, student_weights=a, teacher_weights=b, **options)
        found.per_sample.sum().backward()
        assert x.grad.isfinite().all()
        for k, (rows, columns) in enumerate(sizes):
            alone = alignment_loss(
                x[k : k + 1, :rows],
                y[k : k + 1, :columns],
                None,
                None,
                student_weights=a[k : k + 1, :rows],
                teacher_weights=b[k : k + 1, :columns],
                **options,
            )
            for name in ("per_sample", "expected", "diagonal", "off_diagonal_fraction"):
                torch.testing.assert_close(getattr(found, name)[k : k + 1], getattr(alone, name), rtol=1e-4, atol=1e-5)
            assert (x.grad[k, rows:] == 0).all()

    def test_an_empty_side_is_zero_without_gradient_and_not_counted(self) -> None:
        x, y = states(3, 4, 3, seed=1).requires_grad_(), states(3, 4, 3, seed=2)
        found = alignment_loss(x, y, lengths(0, 4, 4), lengths(4, 0, 4), gamma=0.3, adaptive_band=AdaptiveBand())
        found.per_sample.sum().backward()
        assert found.counted.tolist() == [False, False, True]
        for value in (found.per_sample, found.expected, found.diagonal, found.off_diagonal_fraction):
            assert value[:2].tolist() == [0.0, 0.0]
        assert (x.grad[:2] == 0).all()
        assert x.grad[2].abs().max() > 0

    def test_the_teacher_gets_no_gradient_unless_it_asks(self) -> None:
        x, y = states(1, 4, 3, seed=1).requires_grad_(), states(1, 4, 3, seed=2)
        alignment_loss(x, y, None, None, gamma=0.3).per_sample.sum().backward()
        assert y.grad is None

    def test_weights_are_relative_and_detached(self) -> None:
        x, y = states(1, 4, 3, seed=1), states(1, 5, 3, seed=2)
        weights = states(1, 5, seed=3).abs().requires_grad_()
        one, many = (
            alignment_loss(x, y, None, None, gamma=0.3, teacher_weights=factor * weights).per_sample
            for factor in (1.0, 1000.0)
        )
        torch.testing.assert_close(one, many)
        assert not one.requires_grad

    def test_equal_weights_or_weights_that_sum_to_zero_are_no_weights(self) -> None:
        x, y = states(1, 4, 3, seed=1), states(1, 5, 3, seed=2)
        plain = alignment_loss(x, y, None, None, gamma=0.3).per_sample
        for weights in (torch.full((1, 5), 7.0), torch.zeros(1, 5)):
            weighted = alignment_loss(x, y, None, None, gamma=0.3, teacher_weights=weights).per_sample
            torch.testing.assert_close(plain, weighted)

    def test_each_side_has_its_own_weights(self) -> None:
        # One vector used on both axes cannot tell these two apart.
        x, y = states(1, 4, 3, seed=1), states(1, 4, 3, seed=2)
        weights = torch.tensor([[1.0, 0.0, 0.0, 3.0]])
        options = {"gamma": 0.3, "divergence": False}
        by_student = alignment_loss(x, y, None, None, student_weights=weights, **options).per_sample
        by_teacher = alignment_loss(x, y, None, None, teacher_weights=weights, **options).per_sample
        mirrored = alignment_loss(y, x, None, None, student_weights=weights, **options).per_sample
        assert not torch.allclose(by_student, by_teacher)
        torch.testing.assert_close(by_teacher, mirrored)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_states_give_a_float32_loss_and_a_half_gradient(self, dtype: torch.dtype) -> None:
        x, y = states(2, 5, 16, seed=1, dtype=dtype).requires_grad_(), states(2, 6, 16, seed=2, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = alignment_loss(x, y, None, None, gamma=0.1, adaptive_band=AdaptiveBand(half_width=1.0))
        found.per_sample.sum().backward()
        exact = alignment_loss(
            x.detach().double(), y.double(), None, None, gamma=0.1, adaptive_band=AdaptiveBand(half_width=1.0)
        )
        assert found.per_sample.dtype == torch.float32
        assert x.grad.dtype == dtype
        torch.testing.assert_close(found.per_sample.double(), exact.per_sample, rtol=1e-4, atol=1e-5)

    def test_autocast_changes_nothing(self) -> None:
        x, y = states(2, 300, 8, seed=1, dtype=torch.float32), states(2, 300, 8, seed=2, dtype=torch.float32)
        options = {"gamma": 0.1, "band": 20, "adaptive_band": AdaptiveBand(half_width=1.0, entropy_scale=0.1)}
        plain = alignment_loss(x, y, None, None, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = alignment_loss(x, y, None, None, **options)
        assert torch.equal(plain.per_sample, cast.per_sample)
        assert torch.equal(plain.expected, cast.expected)

    def test_nan_in_is_nan_out(self) -> None:
        x, y = states(2, 4, 3, seed=1), states(2, 4, 3, seed=2)
        x[0, 1] = math.nan
        found = alignment_loss(x, y, None, None, gamma=0.3, adaptive_band=AdaptiveBand())
        assert found.per_sample.isnan().tolist() == [True, False]

    def test_refuses_unknown_options(self) -> None:
        x = states(1, 2, 3)
        with pytest.raises(ValueError, match=r"'mean'.*max_length, sum_length, none"):
            alignment_loss(x, x, None, None, gamma=0.1, normalize="mean")
        with pytest.raises(ValueError, match="metric"):
            alignment_loss(x, x, None, None, gamma=0.1, metric="l1")
        with pytest.raises(ValueError, match="lengths_s"):
            alignment_loss(x, x, lengths(3), None, gamma=0.1)
        with pytest.raises(ValueError, match="weights"):
            alignment_loss(x, x, None, None, gamma=0.1, student_weights=torch.ones(1, 3))


class TestAgainstDiagonal:
    def sparse(self, order: list[int]) -> Tensor:
        """One-hot vectors in the given order: cost 0 where they agree, 1 elsewhere."""
        return torch.eye(8)[order][None]

    def test_matching_sequences_have_all_mass_on_the_diagonal_and_equal_costs(self) -> None:
        x = self.sparse([0, 1, 2, 3, 4])
        found = alignment_loss(x, x, None, None, gamma=0.02)
        assert found.off_diagonal_fraction.item() < 1e-6
        assert found.diagonal.item() == 0
        assert found.expected.item() < 1e-6

    def test_a_shifted_copy_is_found_off_the_diagonal_and_is_cheaper(self) -> None:
        # Four of the five pairs are off by one.
        found = alignment_loss(
            self.sparse([0, 1, 2, 3, 4]), self.sparse([0, 0, 1, 2, 3]), None, None, gamma=0.02, normalize="none"
        )
        assert found.diagonal.item() == pytest.approx(4)
        assert found.expected.item() == pytest.approx(1, abs=1e-3)  # only the last unit has no partner
        assert found.off_diagonal_fraction.item() == pytest.approx(4 / 6, abs=1e-3)

    def test_a_large_gamma_blurs_and_costs_more_than_the_diagonal(self) -> None:
        x = self.sparse([0, 1, 2, 3, 4])
        found = alignment_loss(x, x, None, None, gamma=50.0)
        assert found.expected.item() > found.diagonal.item() + 0.1
        assert found.off_diagonal_fraction.item() > 0.3

    def test_unequal_lengths_follow_the_corrected_slope(self) -> None:
        # Each teacher unit is the student's said twice: the sloped diagonal costs nothing.
        x, y = self.sparse([0, 1, 2]), self.sparse([0, 0, 1, 1, 1, 2, 2])
        found = alignment_loss(x, y, None, None, gamma=0.02)
        assert found.diagonal.item() == pytest.approx(0, abs=1e-6)
        x, y = states(1, 4, 3, seed=1), states(1, 7, 3, seed=2)
        cells = [(0, 0), (1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)]  # round(j / 2), halves up
        cost = pairwise_cost(x, y)
        found = alignment_loss(x, y, None, None, gamma=0.3)
        assert found.diagonal.item() == pytest.approx(sum(cost[0, i, j].item() for i, j in cells) / 7)
        alignment = expected_alignment(cost, gamma=0.3)[0]
        on_path = sum(alignment[i, j].item() for i, j in cells)
        assert found.off_diagonal_fraction.item() == pytest.approx(1 - on_path / alignment.sum().item())
        assert found.expected.item() == pytest.approx((alignment * cost[0]).sum().item() / 7)

    def test_carries_no_gradient(self) -> None:
        x = states(1, 4, 3).requires_grad_()
        found = alignment_loss(x, states(1, 4, 3, seed=1), None, None, gamma=0.3)
        assert found.per_sample.requires_grad
        for value in (found.expected, found.diagonal, found.off_diagonal_fraction):
            assert not value.requires_grad


class TestAdaptiveBand:
    def off_diagonal(self, band: AdaptiveBand, **options: float) -> tuple[float, float]:
        """Share of the expected mass off the diagonal, without and with the band."""
        x, y = states(1, 20, 3, seed=1), states(1, 20, 3, seed=2)
        plain = alignment_loss(x, y, None, None, **options)
        banded = alignment_loss(x, y, None, None, adaptive_band=band, **options)
        return plain.off_diagonal_fraction.item(), banded.off_diagonal_fraction.item()

    def test_a_narrow_diagonal_band_with_a_great_penalty_forces_the_diagonal(self) -> None:
        band = AdaptiveBand(mix=0.0, half_width=0.0, entropy_scale=0.0, penalty=1000.0)
        plain, banded = self.off_diagonal(band, gamma=0.1)
        assert plain > 0.5
        assert banded < 1e-6

    def test_a_band_around_the_expected_alignment_keeps_it(self) -> None:
        band = AdaptiveBand(mix=1.0, half_width=3.0, entropy_scale=2.0, penalty=1.0)
        plain, banded = self.off_diagonal(band, gamma=0.05)
        assert banded == pytest.approx(plain, abs=0.1)

    def test_a_band_wider_than_the_grid_changes_nothing(self) -> None:
        plain, banded = self.off_diagonal(AdaptiveBand(half_width=40.0), gamma=0.1)
        assert plain == banded

    def test_equals_the_formula_cell_by_cell(self) -> None:
        x, y, gamma = states(1, 5, 3, seed=1), states(1, 7, 3, seed=2), 0.3
        band = AdaptiveBand(mix=0.6, half_width=0.4, entropy_scale=0.5, penalty=1.7)
        cost = pairwise_cost(x, y)
        found = expected_alignment(cost, gamma=gamma)[0].tolist()
        penalised = cost[0].tolist()
        for i in range(5):
            for j in range(7):
                for here, line, at, other in (
                    ([found[i][k] for k in range(7)], i * 6 / 4, j, 7),
                    ([found[k][j] for k in range(5)], j * 4 / 6, i, 5),
                ):
                    share = [value / sum(here) for value in here]
                    expected = sum(k * share[k] for k in range(other))
                    entropy = -sum(p * math.log(p) for p in share if p > 0)
                    centre = 0.6 * expected + 0.4 * line
                    excess = abs(at - centre) - (0.4 + 0.5 * entropy)
                    penalised[i][j] += 1.7 / 2 * min(max(excess, 0.0), 1.0)
        value = alignment_loss(x, y, None, None, gamma=gamma, divergence=False, adaptive_band=band).per_sample
        assert value.item() == pytest.approx(naive_soft_dtw(penalised, gamma) / 7, abs=1e-9)

    @pytest.mark.parametrize(
        "wrong", [{"mix": 1.1}, {"mix": -0.1}, {"half_width": -1.0}, {"entropy_scale": math.nan}, {"penalty": math.inf}]
    )
    def test_refuses_values_out_of_range(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AdaptiveBand(**wrong)

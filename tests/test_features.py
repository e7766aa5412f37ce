"""Feature losses against loops written the dumb way, and what must leave them unchanged."""

import math

import pytest
import torch
from dense import LargestTensor, on_each_device
from scipy.special import rel_entr, softmax
from torch import Tensor

from kdkit.losses.features import (
    DISTANCES,
    LayerMixer,
    attention_divergence,
    contrastive,
    hidden_distance,
    layer_pairs,
    map_heads,
    pool_attention,
    pool_sequences,
    vector_distance,
)

EVERY_KIND = pytest.mark.parametrize("kind", list(DISTANCES))
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def causal_attention(batch: int, heads: int, tokens: int, *, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Random attention probabilities of a causal model, float64."""
    logits = spread * draw(batch, heads, tokens, tokens, seed=seed)
    future = torch.ones(tokens, tokens).triu(1).bool()
    return logits.masked_fill(future, -math.inf).softmax(-1)


def unit_maps(*shape: int, lengths: list[int], seed: int = 0) -> Tensor:
    """Random maps of units (B, heads, U, U + 1): causal, with a last column, 0 beyond the lengths."""
    batch, heads, units = shape
    maps = torch.zeros(batch, heads, units, units + 1, dtype=torch.float64)
    for b, length in enumerate(lengths):
        for u in range(length):
            row = (2 * draw(heads, u + 2, seed=seed + 100 * b + u)).softmax(-1)
            maps[b, :, u, : u + 1], maps[b, :, u, -1] = row[:, :-1], row[:, -1]
    return maps


def naive_distance(s: list[float], t: list[float], kind: str) -> float:
    dot, ss, tt = (sum(a * b for a, b in zip(x, y, strict=True)) for x, y in ((s, t), (s, s), (t, t)))
    if kind == "cosine":
        return 1 - dot / math.sqrt(ss * tt)
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / max(ss, tt)


class TestHiddenDistance:
    @on_each_device
    @EVERY_KIND
    def test_equals_a_loop_over_units(self, kind: str, device: str) -> None:
        student, teacher, lengths = draw(3, 5, 7, seed=1), 3 * draw(3, 5, 7, seed=2), [5, 2, 0]
        found = hidden_distance(student.to(device), teacher.to(device), torch.tensor(lengths).to(device), kind=kind)
        assert found.shape == (3, 5)
        for b in range(3):
            for u in range(5):
                expected = naive_distance(student[b, u].tolist(), teacher[b, u].tolist(), kind) if u < lengths[b] else 0
                assert found[b, u].item() == pytest.approx(expected, rel=1e-12)

    def test_gradcheck_of_the_cosine(self) -> None:
        student, teacher = draw(2, 3, 4, seed=1).requires_grad_(), draw(2, 3, 4, seed=2)
        lengths = torch.tensor([3, 1])
        assert torch.autograd.gradcheck(lambda s: hidden_distance(s, teacher, lengths, kind="cosine"), (student,))

    def test_mse_is_a_square_in_units_of_the_teachers_variance_and_its_divisor_has_no_gradient(self) -> None:
        student, teacher = draw(1, 2, 4, seed=1).requires_grad_(), 5 * draw(1, 2, 4, seed=2)
        hidden_distance(student, teacher, torch.tensor([2]), kind="mse").sum().backward()
        expected = 2 * (student.detach() - teacher) / teacher.square().sum(-1, keepdim=True)
        torch.testing.assert_close(student.grad, expected)

    @EVERY_KIND
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_value_and_gradient_are_exactly_zero_at_equality(self, kind: str, dtype: torch.dtype) -> None:
        student = draw(2, 4, 32, dtype=dtype).requires_grad_()
        found = hidden_distance(student, student.detach().clone(), torch.tensor([4, 4]), kind=kind)
        found.sum().backward()
        assert (found == 0).all()
        assert (student.grad == 0).all()

    @EVERY_KIND
    def test_padding_and_batching_change_nothing_and_padding_is_never_read(self, kind: str) -> None:
        student, teacher, lengths = draw(3, 6, 4, seed=1), draw(3, 6, 4, seed=2), [6, 2, 3]
        for b, length in enumerate(lengths):
            student[b, length:], teacher[b, length:] = math.nan, math.inf
        student.requires_grad_()
        found = hidden_distance(student, teacher, torch.tensor(lengths), kind=kind)
        found.sum().backward()
        assert student.grad.isfinite().all()
        for b, length in enumerate(lengths):
            one = slice(b, b + 1)
            alone = hidden_distance(student[one, :length], teacher[one, :length], torch.tensor([length]), kind=kind)
            torch.testing.assert_close(found[one, :length], alone, rtol=0, atol=0)
            assert (found[b, length:] == 0).all()
            assert (student.grad[b, length:] == 0).all()

    @EVERY_KIND
    @pytest.mark.parametrize("student_scale", [1e-3, 1.0, 1e4])
    @pytest.mark.parametrize("teacher_scale", [1e-3, 1.0, 1e4])
    @pytest.mark.parametrize("shape", [(1, 1, 8), (2, 9, 16), (4, 30, 64), (3, 5, 576), (1, 40, 1024)])
    def test_is_of_order_one_for_any_pair(
        self, shape: tuple[int, ...], teacher_scale: float, student_scale: float, kind: str
    ) -> None:
        # Un-normalised squares of fresh pairs came to 40 to 200 and drowned every other term.
        teacher = teacher_scale * (draw(*shape, seed=1, dtype=torch.float32) + 3)
        student = student_scale * (draw(*shape, seed=2, dtype=torch.float32) - 3)
        found = hidden_distance(student, teacher, torch.full(shape[:1], shape[1]), kind=kind)
        assert (found <= 4).all()
        assert (found > 0.5).all()

    def test_a_unit_with_massive_activations_does_not_hide_the_others(self) -> None:
        student, teacher = draw(1, 4, 8, seed=1), draw(1, 4, 8, seed=2)
        plain = hidden_distance(student, teacher, torch.tensor([4]), kind="mse")
        teacher[0, 0] *= 1e4
        spiked = hidden_distance(student, teacher, torch.tensor([4]), kind="mse")
        torch.testing.assert_close(plain[:, 1:], spiked[:, 1:])

    @EVERY_KIND
    def test_zero_vectors_are_finite(self, kind: str) -> None:
        student, teacher = draw(1, 3, 4, seed=1), draw(1, 3, 4, seed=2)
        student[0, 0], teacher[0, 1] = 0, 0
        student[0, 2], teacher[0, 2] = 0, 0
        student.requires_grad_()
        found = hidden_distance(student, teacher, torch.tensor([3]), kind=kind)
        found.sum().backward()
        assert found[0, :2].tolist() == [1.0, 1.0]
        assert student.grad.isfinite().all()

    @EVERY_KIND
    @HALF
    def test_half_precision_is_computed_in_float32(self, kind: str, dtype: torch.dtype) -> None:
        # squares of 1e3 over 64 entries leave float16
        student, teacher = 1e3 * draw(2, 3, 64, seed=1), 1e3 * draw(2, 3, 64, seed=2)
        student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = hidden_distance(student, teacher, torch.tensor([3, 3]), kind=kind)
        found.sum().backward()
        exact = hidden_distance(student.detach().double(), teacher.double(), torch.tensor([3, 3]), kind=kind)
        assert found.dtype == torch.float32
        assert student.grad.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)

    def test_the_teacher_gets_no_gradient(self) -> None:
        student, teacher = draw(1, 2, 3, seed=1).requires_grad_(), draw(1, 2, 3, seed=2).requires_grad_()
        hidden_distance(student, teacher, torch.tensor([2]), kind="mse").sum().backward()
        assert student.grad.abs().max() > 0
        assert teacher.grad is None

    def test_refuses_unknown_kinds_and_other_widths(self) -> None:
        x = draw(1, 2, 3)
        with pytest.raises(ValueError, match=r"'l1'.*cosine, mse"):
            hidden_distance(x, x, torch.tensor([2]), kind="l1")
        with pytest.raises(ValueError, match="Project"):
            vector_distance(x, draw(1, 2, 4), kind="mse")


class TestPoolSequences:
    def test_is_the_mean_over_own_units(self) -> None:
        units = draw(3, 4, 5)
        units[1, 2:] = math.nan
        found = pool_sequences(units, torch.tensor([4, 2, 0]))
        torch.testing.assert_close(found[0], (units[0, 0] + units[0, 1] + units[0, 2] + units[0, 3]) / 4)
        torch.testing.assert_close(found[1], (units[1, 0] + units[1, 1]) / 2)
        assert (found[2] == 0).all()

    def test_half_precision_is_summed_in_float32(self) -> None:
        units = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
        assert pool_sequences(units, torch.tensor([4096])).tolist() == [[1.0]]


class TestPoolAttention:
    UNIT_IDS = torch.tensor([[-1, -1, 0, 1, 1, -1, 2, 2], [-1, 0, 0, 0, 1, -1, -1, -1]])

    @on_each_device
    def test_equals_a_loop_over_tokens(self, device: str) -> None:
        attention, ids = causal_attention(2, 3, 8), self.UNIT_IDS
        found = pool_attention(attention.to(device), ids.to(device), 4).cpu()
        assert found.shape == (2, 3, 4, 5)
        for b in range(2):
            for head in range(3):
                for u in range(4):
                    queries = [q for q in range(8) if ids[b, q] == u]
                    for column in range(5):
                        keys = [k for k in range(8) if ids[b, k] == (column if column < 4 else -1)]
                        total = sum(attention[b, head, q, k].item() for q in queries for k in keys)
                        assert found[b, head, u, column].item() == pytest.approx(total / max(len(queries), 1))

    def test_rows_stay_distributions_and_causal(self) -> None:
        found = pool_attention(causal_attention(2, 3, 8), self.UNIT_IDS, 4)
        torch.testing.assert_close(found.sum(-1)[0, :, :3], torch.ones(3, 3, dtype=torch.float64))
        torch.testing.assert_close(found.sum(-1)[1, :, :2], torch.ones(3, 2, dtype=torch.float64))
        assert (found[..., :4].triu(1) == 0).all()

    def test_each_token_its_own_unit_is_the_attention_itself(self) -> None:
        attention = causal_attention(1, 2, 5)
        found = pool_attention(attention, torch.arange(5)[None], 5)
        torch.testing.assert_close(found[..., :5], attention)
        assert (found[..., 5] == 0).all()

    def test_rows_of_tokens_outside_are_never_read(self) -> None:
        attention = causal_attention(2, 3, 8).masked_fill((self.UNIT_IDS < 0)[:, None, :, None], math.nan)
        attention.requires_grad_()
        found = pool_attention(attention, self.UNIT_IDS, 4)
        found.square().sum().backward()
        assert found.isfinite().all()
        assert attention.grad.isfinite().all()
        assert (attention.grad[0, :, [0, 1, 5]] == 0).all()

    def test_gradcheck(self) -> None:
        attention = causal_attention(1, 2, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda a: pool_attention(a, torch.tensor([[-1, 0, 0, 1]]), 2), (attention,))

    @HALF
    def test_half_precision_is_summed_in_float32(self, dtype: torch.dtype) -> None:
        # 4096 keys of 1/4096 each: a half-precision sum stalls, and autocast would sum in half precision.
        attention = torch.full((1, 1, 4096, 4096), 1 / 4096, dtype=dtype)
        ids = torch.full((1, 4096), -1)
        ids[0, 0] = 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = pool_attention(attention, ids, 1)
        assert found.dtype == torch.float32
        assert found.sum().item() == pytest.approx(1.0, abs=1e-6)

    def test_refuses_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="unit_ids"):
            pool_attention(causal_attention(2, 3, 8), self.UNIT_IDS[:, :7], 4)


class TestMapHeads:
    def test_a_multiple_is_the_mean_of_neighbours(self) -> None:
        given = unit_maps(2, 6, 3, lengths=[3, 3])
        found = map_heads(given, 2)
        torch.testing.assert_close(found[:, 0], (given[:, 0] + given[:, 1] + given[:, 2]) / 3)
        torch.testing.assert_close(found[:, 1], (given[:, 3] + given[:, 4] + given[:, 5]) / 3)

    def test_fewer_are_repeated_and_equal_numbers_left_alone(self) -> None:
        given = unit_maps(1, 2, 3, lengths=[3])
        torch.testing.assert_close(map_heads(given, 6), given[:, [0, 0, 0, 1, 1, 1]], rtol=0, atol=0)
        torch.testing.assert_close(map_heads(given, 2), given, rtol=0, atol=0)

    def test_other_numbers_mix_by_overlap(self) -> None:
        given = unit_maps(1, 3, 2, lengths=[2])
        found = map_heads(given, 2)
        torch.testing.assert_close(found[:, 0], given[:, 0] * 2 / 3 + given[:, 1] / 3)
        torch.testing.assert_close(found[:, 1], given[:, 1] / 3 + given[:, 2] * 2 / 3)

    @pytest.mark.parametrize(("given", "wanted"), [(16, 9), (9, 16), (7, 5), (12, 12), (1, 3), (14, 1)])
    def test_rows_stay_distributions_and_every_head_counts_the_same(self, given: int, wanted: int) -> None:
        maps = unit_maps(1, given, 4, lengths=[4])
        found = map_heads(maps, wanted)
        torch.testing.assert_close(found.sum(-1), torch.ones(1, wanted, 4, dtype=torch.float64))
        torch.testing.assert_close(found.mean(1), maps.mean(1))


class TestAttentionDivergence:
    @on_each_device
    def test_equals_scipys_relative_entropy_of_smoothed_rows(self, device: str) -> None:
        lengths = [4, 2]
        student, teacher = unit_maps(2, 3, 4, lengths=lengths, seed=1), unit_maps(2, 3, 4, lengths=lengths, seed=2)
        found = attention_divergence(
            student.to(device), teacher.to(device), torch.tensor(lengths).to(device), smoothing=0.02
        )
        for b in range(2):
            for u in range(4):
                expected = 0.0
                for head in range(3):
                    seen = [*range(u + 1), 4]
                    p, q = (0.98 * side[b, head, u, seen].numpy() + 0.02 / (u + 2) for side in (teacher, student))
                    expected += rel_entr(p, q).sum() / 3 if u < lengths[b] else 0.0
                assert found[b, u].item() == pytest.approx(expected, rel=1e-10, abs=1e-15)

    def test_gradcheck(self) -> None:
        student, teacher = unit_maps(1, 2, 3, lengths=[3], seed=1), unit_maps(1, 2, 3, lengths=[3], seed=2)
        logits = student.clamp(min=0.01).log().requires_grad_()
        assert torch.autograd.gradcheck(lambda z: attention_divergence(z.exp(), teacher, torch.tensor([3])), (logits,))

    def test_takes_probabilities_and_does_no_second_softmax(self) -> None:
        # Maps that are probabilities already went through a softmax once more, which makes all of them nearly even.
        student, teacher = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
        student[0, 0, 1], teacher[0, 0, 1] = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.7])
        student[0, 0, 0, 2] = teacher[0, 0, 0, 2] = 1.0
        found = attention_divergence(student, teacher, torch.tensor([2]), smoothing=1e-9)
        assert found[0, 1].item() == pytest.approx(0.6 * math.log(7), rel=1e-5)
        twice = rel_entr(softmax([0.1, 0.2, 0.7]), softmax([0.7, 0.2, 0.1])).sum()
        assert found[0, 1].item() > 5 * twice

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_value_and_gradient_are_zero_at_equality(self, dtype: torch.dtype) -> None:
        student = unit_maps(2, 3, 5, lengths=[5, 2]).to(dtype).requires_grad_()
        found = attention_divergence(student, student.detach().clone(), torch.tensor([5, 2]))
        found.sum().backward()
        assert (found == 0).all()
        assert student.grad.abs().max() < 1e-5

    def test_zeros_on_either_side_are_finite_and_bounded(self) -> None:
        student, teacher = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
        student[..., 0], teacher[..., 3] = 1.0, 1.0  # no key in common
        student.requires_grad_()
        found = attention_divergence(student, teacher, torch.tensor([3]))
        found.sum().backward()
        assert student.grad.isfinite().all()
        for u in range(3):
            assert 6 < found[0, u].item() <= math.log((u + 2) / 1e-3)

    def test_a_row_that_attends_to_nothing_counts_nothing(self) -> None:
        # Dropout after the softmax takes the only key of a first token away now and then.
        student, teacher = unit_maps(1, 2, 3, lengths=[3], seed=1), unit_maps(1, 2, 3, lengths=[3], seed=2)
        whole = attention_divergence(student, teacher, torch.tensor([3]))
        student[0, 0, 0] = 0
        student.requires_grad_()
        found = attention_divergence(student, teacher, torch.tensor([3]))
        found.sum().backward()
        assert student.grad.isfinite().all()
        assert 0 < found[0, 0] < whole[0, 0]
        assert torch.equal(found[0, 1:], whole[0, 1:])

    def test_rows_that_do_not_sum_to_one_are_compared_by_shares(self) -> None:
        student, teacher = unit_maps(1, 2, 3, lengths=[3], seed=1), unit_maps(1, 2, 3, lengths=[3], seed=2)
        found = attention_divergence(student * 1.7, teacher * 0.3, torch.tensor([3]))
        torch.testing.assert_close(found, attention_divergence(student, teacher, torch.tensor([3])))

    def test_padding_and_batching_change_nothing_and_padding_is_never_read(self) -> None:
        lengths, units = [4, 2, 0], 4
        sides = [unit_maps(3, 2, units, lengths=lengths, seed=seed) for seed in (1, 2)]
        for side in sides:
            for b, length in enumerate(lengths):
                side[b, :, length:] = math.nan
                side[b, :, :, length:units] = math.inf
        student, teacher = sides[0].requires_grad_(), sides[1]
        found = attention_divergence(student, teacher, torch.tensor(lengths))
        found.sum().backward()
        assert student.grad.isfinite().all()
        for b, length in enumerate(lengths):
            kept = [*range(length), units]
            alone = [side[b : b + 1, :, :length][..., kept] for side in (student, teacher)]
            expected = attention_divergence(*alone, torch.tensor([length]))
            torch.testing.assert_close(found[b : b + 1, :length], expected, rtol=1e-12, atol=0)
            assert (found[b, length:] == 0).all()

    @pytest.mark.parametrize(
        ("heads_s", "heads_t", "tokens"), [(2, 2, 6), (9, 16, 40), (12, 4, 25), (3, 8, 64), (1, 14, 10)]
    )
    def test_is_of_order_one_for_any_pair_of_models(self, heads_s: int, heads_t: int, tokens: int) -> None:
        ids = (torch.arange(tokens)[None] - 3).clamp(min=-1) // 2
        ids[0, :3] = -1
        num_units = int(ids.max()) + 1
        student = pool_attention(causal_attention(1, heads_s, tokens, seed=1, spread=4.0).float(), ids, num_units)
        teacher = pool_attention(causal_attention(1, heads_t, tokens, seed=2, spread=4.0).float(), ids, num_units)
        found = attention_divergence(student, map_heads(teacher, heads_s), torch.tensor([num_units]))
        assert (found >= 0).all()
        assert (found < 10).all()

    def test_the_teacher_gets_no_gradient(self) -> None:
        student, teacher = (unit_maps(1, 2, 3, lengths=[3], seed=seed).requires_grad_() for seed in (1, 2))
        attention_divergence(student, teacher, torch.tensor([3])).sum().backward()
        assert student.grad.abs().max() > 0
        assert teacher.grad is None

    def test_refuses_what_are_no_maps_of_units_and_smoothing_out_of_range(self) -> None:
        maps = unit_maps(1, 2, 3, lengths=[3])
        with pytest.raises(ValueError, match="map_heads"):
            attention_divergence(maps, maps[:, :1], torch.tensor([3]))
        with pytest.raises(ValueError, match="U \\+ 1"):
            attention_divergence(maps[..., :3], maps[..., :3], torch.tensor([3]))
        with pytest.raises(ValueError, match="smoothing"):
            attention_divergence(maps, maps, torch.tensor([3]), smoothing=0.0)


class TestLayerPairs:
    def test_a_multiple_is_the_uniform_map(self) -> None:
        assert layer_pairs(4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]

    def test_a_student_deeper_than_its_teacher(self) -> None:
        # SmolLM-135M has 30 layers, its teacher of 1 B 24: there was no map for that.
        pairs = layer_pairs(30, 24)
        assert [teacher for _, teacher in pairs] == list(range(1, 25))
        assert pairs[:4] == [(1, 1), (3, 2), (4, 3), (5, 4)]
        assert pairs[-1] == (30, 24)

    def test_fewer_pairs_than_layers(self) -> None:
        assert layer_pairs(12, 24, 3) == [(4, 8), (8, 16), (12, 24)]
        assert layer_pairs(30, 24, 1) == [(30, 24)]

    def test_every_combination_is_increasing_within_range_and_ends_with_the_last(self) -> None:
        for student in range(1, 14):
            for teacher in range(1, 14):
                for wanted in [None, *range(1, min(student, teacher) + 1)]:
                    pairs = layer_pairs(student, teacher, wanted)
                    assert len(pairs) == (wanted or min(student, teacher))
                    assert pairs[-1] == (student, teacher)
                    for side in zip(*pairs, strict=True):
                        assert list(side) == sorted(set(side))
                        assert side[0] >= 1

    def test_no_layer_is_more_than_half_a_layer_off_its_depth(self) -> None:
        for k, (student, teacher) in enumerate(layer_pairs(11, 7, 5), start=1):
            assert abs(student - 11 * k / 5) <= 0.5
            assert abs(teacher - 7 * k / 5) <= 0.5

    def test_refuses_numbers_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="1 to 4"):
            layer_pairs(4, 9, 5)
        with pytest.raises(ValueError, match="1 or more"):
            layer_pairs(0, 9)


class TestLayerMixer:
    def test_starts_as_the_mean_or_as_the_given_weights(self) -> None:
        values = draw(3, 2, 4, dtype=torch.float32)
        torch.testing.assert_close(LayerMixer(3)(values), values.mean(0))
        for learnt in (False, True):
            mixer = LayerMixer(3, learnt=learnt, start=[1.0, 1.0, 2.0])
            torch.testing.assert_close(mixer(values), (values[0] + values[1] + 2 * values[2]) / 4)

    def test_fixed_weights_have_nothing_to_learn(self) -> None:
        assert list(LayerMixer(3).parameters()) == []
        assert len(list(LayerMixer(3, learnt=True).parameters())) == 1

    def test_the_floor_keeps_every_layer_where_a_plain_softmax_drops_them(self) -> None:
        values = torch.tensor([0.1, 1.0, 2.0])
        ends = {}
        for floor in (1e-9, 0.5):
            mixer = LayerMixer(3, learnt=True, floor=floor)
            optimizer = torch.optim.SGD(mixer.parameters(), lr=10.0)
            for _ in range(200):
                optimizer.zero_grad()
                mixer(values).backward()
                optimizer.step()
            ends[floor] = mixer.weights().tolist()
        assert ends[1e-9][1] < 0.01
        assert ends[0.5][1:] == pytest.approx([1 / 6, 1 / 6], abs=0.01)
        assert sum(ends[0.5]) == pytest.approx(1.0)

    def test_gradient_reaches_values_and_logits(self) -> None:
        mixer, values = LayerMixer(2, learnt=True).double(), draw(2, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda v, _: mixer(v), (values, mixer.logits))

    def test_is_saved_with_what_it_learnt_alone(self) -> None:
        assert list(LayerMixer(2, learnt=True).state_dict()) == ["logits"]
        assert list(LayerMixer(2).state_dict()) == []

    def test_refuses_weights_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="positive weight"):
            LayerMixer(2, start=[1.0, 0.0])
        with pytest.raises(ValueError, match="3 pairs"):
            LayerMixer(3, start=[1.0, 1.0])
        with pytest.raises(ValueError, match="floor"):
            LayerMixer(3, floor=0.0)


class TestContrastive:
    @on_each_device
    def test_equals_a_loop_over_items(self, device: str) -> None:
        student, teacher = draw(5, 6, seed=1), draw(5, 6, seed=2)
        found = contrastive(student.to(device), teacher.to(device), temperature=0.3)
        for i in range(5):
            scores = [1 - naive_distance(student[i].tolist(), teacher[j].tolist(), "cosine") for j in range(5)]
            expected = math.log(sum(math.exp((score - scores[i]) / 0.3) for score in scores))
            assert found[i].item() == pytest.approx(expected)

    def test_gradcheck(self) -> None:
        student, teacher = draw(4, 3, seed=1).requires_grad_(), draw(4, 3, seed=2)
        groups = torch.tensor([0, 1, 1, 2])
        assert torch.autograd.gradcheck(lambda s: contrastive(s, teacher, groups=groups), (student,))

    def test_identical_teacher_vectors_are_no_negatives(self) -> None:
        # The same text twice in a batch: to tell the two apart is impossible, and the loss would ask for it.
        student, teacher = draw(5, 6, seed=1), draw(5, 6, seed=2)
        teacher[3] = teacher[1]
        found = contrastive(student, teacher)
        for kept, dropped in ((1, 3), (3, 1)):
            rest = [i for i in range(5) if i != dropped]
            torch.testing.assert_close(found[kept], contrastive(student[rest], teacher[rest])[rest.index(kept)])

    def test_identity_holds_within_rounding_and_for_any_width(self) -> None:
        teacher = draw(4, 4096, seed=2, dtype=torch.float32)
        teacher[2] = teacher[0] * (1 + 1e-6)
        found = contrastive(teacher, teacher, temperature=0.02)
        assert found.abs().max() < 1e-5
        teacher[2, :200] *= 0.9  # near, not the same
        assert contrastive(teacher, teacher, temperature=0.02)[0] > 0.5

    def test_items_of_one_group_are_no_negatives(self) -> None:
        student, teacher = draw(4, 6, seed=1), draw(4, 6, seed=2)
        found = contrastive(student, teacher, groups=torch.tensor([7, 7, 8, 9]))
        torch.testing.assert_close(found[0], contrastive(student[[0, 2, 3]], teacher[[0, 2, 3]])[0])
        torch.testing.assert_close(found[2:], contrastive(student, teacher)[2:])
        assert (contrastive(student, teacher, groups=torch.zeros(4, dtype=torch.int64)) == 0).all()

    @pytest.mark.parametrize("num_items", [0, 1])
    def test_no_item_and_one_item_give_zero_with_zero_gradient(self, num_items: int) -> None:
        student = draw(num_items, 3, seed=1).requires_grad_()
        found = contrastive(student, draw(num_items, 3, seed=2))
        found.sum().backward()
        assert found.tolist() == [0.0] * num_items
        assert (student.grad == 0).all()

    @pytest.mark.parametrize(("items", "width"), [(2, 8), (32, 16), (128, 64), (300, 576), (1024, 768)])
    def test_is_about_the_logarithm_of_the_batch_at_chance(self, items: int, width: int) -> None:
        student, teacher = draw(items, width, seed=1, dtype=torch.float32), draw(items, width, seed=2)
        found = contrastive(student, teacher.float())
        assert found.mean() < 10
        if width > 500:
            assert found.mean().item() == pytest.approx(math.log(items), rel=0.1)

    def test_a_trained_pair_is_near_zero(self) -> None:
        teacher = draw(32, 256, dtype=torch.float32)
        assert contrastive(3 * teacher, teacher).max() < 0.05

    def test_memory_is_pairs_not_pairs_by_width(self) -> None:
        student, teacher = draw(64, 512, seed=1).requires_grad_(), draw(64, 512, seed=2)
        with LargestTensor() as seen:
            contrastive(student, teacher).sum().backward()
        assert seen.num_entries <= 64 * 512

    @HALF
    def test_half_precision_and_autocast_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        student, teacher = draw(6, 32, seed=1).to(dtype).requires_grad_(), draw(6, 32, seed=2).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = contrastive(student, teacher)
        found.sum().backward()
        exact = contrastive(student.detach().double(), teacher.double())
        assert found.dtype == torch.float32
        assert student.grad.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)

    def test_the_teacher_gets_no_gradient(self) -> None:
        student, teacher = draw(3, 4, seed=1).requires_grad_(), draw(3, 4, seed=2).requires_grad_()
        contrastive(student, teacher).sum().backward()
        assert student.grad.abs().max() > 0
        assert teacher.grad is None

    def test_refuses_shapes_and_temperatures_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"\(M, D\)"):
            contrastive(draw(3, 4), draw(2, 4))
        with pytest.raises(ValueError, match="temperature"):
            contrastive(draw(3, 4), draw(3, 4), temperature=0.0)

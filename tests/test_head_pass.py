"""The chunked pass against formulas written on whole (N, V) probabilities and left to autograd."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from dense import DENSE, TEACHER_H, H, LargestTensor, N, V, assert_same_gradients, kl, make_scene
from torch import Tensor, nn

from kdkit.losses import (
    LOSSES,
    DivergenceTerm,
    LabelTerm,
    divergence,
    forward_kl,
    head_pass,
    linear_divergence,
    logits_pass,
    reverse_kl,
    skew_reverse_kl,
    tvd,
)
from kdkit.losses.blocks import BLOCK_ENTRIES
from kdkit.teacher.kept import TopKSignal
from kdkit.teacher.signal import DenseSignal, Head, LiveSignal, Room

EVERY = pytest.mark.parametrize("name", list(LOSSES))


class TestHeadPassEqualsTheDensePath:
    @EVERY
    @pytest.mark.parametrize("chunk_tokens", [1, 8, 20, 21, 256])
    @pytest.mark.parametrize("block_rows", [3, 1000])
    def test_for_lengths_that_do_not_divide(
        self, name: str, chunk_tokens: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(BLOCK_ENTRIES, "cpu", block_rows * V)
        scene = make_scene()
        term = DivergenceTerm(name, LOSSES[name])
        result = head_pass(scene.hidden, scene.head, scene.signal, [term], chunk_tokens=chunk_tokens)
        expected = scene.dense(name).sum()
        torch.testing.assert_close(result.total, expected)
        assert_same_gradients(scene.gradients(result.total), scene.gradients(expected), rtol=1e-9)

    @EVERY
    def test_in_float32_within_its_rounding(self, name: str) -> None:
        scene, exact = make_scene(torch.float32), make_scene()
        result = head_pass(scene.hidden, scene.head, scene.signal, [DivergenceTerm(name, LOSSES[name])], chunk_tokens=8)
        expected = divergence(name, scene.student_logits(), scene.teacher_logits()).sum()
        assert result.total.dtype == torch.float32
        torch.testing.assert_close(result.total, expected, rtol=1e-5, atol=0)
        assert_same_gradients(scene.gradients(result.total), scene.gradients(expected), rtol=1e-5)
        assert result.total.item() == pytest.approx(exact.dense(name).sum().item(), rel=1e-4)

    def test_for_two_terms_of_other_weight_temperature_and_token_weights(self) -> None:
        scene = make_scene()
        first = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        second = torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        terms = [
            DivergenceTerm("kd", skew_reverse_kl, weight=0.7, temperature=2.0, token_weights=first),
            DivergenceTerm("cover", forward_kl, weight=1e-3, temperature=0.5, token_weights=second),
            LabelTerm("lm", scene.targets, weight=0.3, token_weights=second),
            DivergenceTerm("same_temperature", tvd, weight=0.2),
        ]
        result = head_pass(scene.hidden, scene.head, scene.signal, terms, chunk_tokens=8)
        parts = {
            "kd": (scene.dense("skew_reverse_kl", temperature=2.0) * first).sum(),
            "cover": (scene.dense("forward_kl", temperature=0.5) * second).sum(),
            "lm": (F.cross_entropy(scene.student_logits(), scene.targets, reduction="none") * second).sum(),
            "same_temperature": scene.dense("tvd").sum(),
        }
        total = 0.7 * parts["kd"] + 1e-3 * parts["cover"] + 0.3 * parts["lm"] + 0.2 * parts["same_temperature"]
        torch.testing.assert_close(result.total, total)
        torch.testing.assert_close(result.parts, {key: part.detach() for key, part in parts.items()})
        assert not any(part.requires_grad for part in result.parts.values())
        assert_same_gradients(scene.gradients(result.total), scene.gradients(total), rtol=1e-9)

    @pytest.mark.parametrize("head", [{"scale": 0.3}, {"softcap": 1.5}, {"scale": 2.0, "softcap": 3.0}])
    def test_with_logit_scale_and_softcap(self, head: dict[str, float]) -> None:
        scene = make_scene(**head)
        term = DivergenceTerm("kd", reverse_kl, temperature=1.5)
        result = head_pass(scene.hidden, scene.head, scene.signal, [term], chunk_tokens=8)
        expected = scene.dense("reverse_kl", temperature=1.5).sum()
        torch.testing.assert_close(result.total, expected)
        assert_same_gradients(scene.gradients(result.total), scene.gradients(expected), rtol=1e-9)

    def test_without_bias(self) -> None:
        scene = make_scene()
        scene.head = Head(scene.head.weight)
        result = head_pass(scene.hidden, scene.head, scene.signal, [DivergenceTerm("kd", tvd)], chunk_tokens=8)
        expected = scene.dense("tvd").sum()
        torch.testing.assert_close(result.total, expected)
        assert_same_gradients(scene.gradients(result.total), scene.gradients(expected), rtol=1e-9)

    def test_with_a_vocabulary_that_is_padded_differently(self) -> None:
        scene = make_scene(vocab_size=V - 9)
        padded = torch.cat([scene.signal.head.weight, torch.ones(4, TEACHER_H, dtype=torch.float64)])
        scene.signal = LiveSignal(scene.signal.hidden, Head(padded, vocab_size=V - 9))
        result = head_pass(scene.hidden, scene.head, scene.signal, [DivergenceTerm("kd", forward_kl)], chunk_tokens=8)
        expected = scene.dense("forward_kl").sum()
        torch.testing.assert_close(result.total, expected)
        found = scene.gradients(result.total)
        assert_same_gradients(found, scene.gradients(expected), rtol=1e-9)
        assert (found[1][V - 9 :] == 0).all()

    def test_when_the_weight_is_tied_to_the_embedding(self) -> None:
        scene = make_scene()
        embedding = nn.Embedding(V, H, dtype=torch.float64)
        tokens = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))

        def tied_gradient(total: Callable[[Tensor], Tensor]) -> Tensor:
            return torch.autograd.grad(total(embedding(tokens).tanh()), embedding.weight)[0]

        def chunked(hidden: Tensor) -> Tensor:
            return linear_divergence("forward_kl", hidden, Head(embedding.weight), scene.signal, chunk_tokens=8)

        def dense(hidden: Tensor) -> Tensor:
            q = (hidden @ embedding.weight.T).softmax(-1)
            return kl(scene.teacher_logits().softmax(-1), q).sum()

        assert_same_gradients([tied_gradient(chunked)], [tied_gradient(dense)], rtol=1e-9)

    def test_when_hidden_states_and_weight_are_of_other_dtypes(self) -> None:
        for hidden_dtype, weight_dtype in [(torch.float64, torch.float32), (torch.float32, torch.float64)]:
            scene = make_scene()
            scene.hidden = scene.hidden.detach().to(hidden_dtype).requires_grad_()
            scene.head = Head(scene.head.weight.detach().to(weight_dtype).requires_grad_())
            total = linear_divergence("tvd", scene.hidden, scene.head, scene.signal, chunk_tokens=8)
            q = (scene.hidden.double() @ scene.head.weight.double().T).softmax(-1)
            expected = DENSE["tvd"](scene.teacher_logits().softmax(-1), q).sum()
            torch.testing.assert_close(total, expected)
            assert_same_gradients(scene.gradients(total), scene.gradients(expected), rtol=1e-6)

    def test_when_the_total_is_scaled_afterwards(self) -> None:
        scene = make_scene()
        result = head_pass(scene.hidden, scene.head, scene.signal, [DivergenceTerm("kd", tvd)], chunk_tokens=8)
        expected = scene.dense("tvd").sum()
        assert_same_gradients(
            scene.gradients(result.total.square() / 3), scene.gradients(expected.square() / 3), rtol=1e-9
        )

    def test_for_a_loss_that_brings_no_gradient_of_its_own(self) -> None:
        def squared_gap(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
            return (student_logprobs.exp() - teacher_logprobs.exp()).square().sum(-1)

        scene = make_scene()
        total = linear_divergence(squared_gap, scene.hidden, scene.head, scene.signal, chunk_tokens=8)
        expected = (scene.student_logits().softmax(-1) - scene.teacher_logits().softmax(-1)).square().sum()
        torch.testing.assert_close(total, expected)
        assert_same_gradients(scene.gradients(total), scene.gradients(expected), rtol=1e-9)

    @EVERY
    def test_by_finite_differences(self, name: str) -> None:
        scene = make_scene(num_positions=5, num_ids=6)
        inputs = [x.detach().requires_grad_() for x in scene.inputs]

        def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            head = Head(weight, bias, scale=0.7, softcap=3.0)
            return linear_divergence(name, hidden, head, scene.signal, chunk_tokens=2, temperature=1.5)

        assert torch.autograd.gradcheck(total, inputs, fast_mode=True)


class TestSignals:
    @EVERY
    def test_every_id_kept_equals_dense(self, name: str) -> None:
        scene = make_scene()
        kept = TopKSignal.from_logits(scene.teacher_logits(), V, [2.0])
        terms = [DivergenceTerm("kd", LOSSES[name], temperature=2.0)]
        result = head_pass(scene.hidden, scene.head, kept, terms, chunk_tokens=8)
        expected = scene.dense(name, temperature=2.0).sum()
        torch.testing.assert_close(result.total, expected)
        assert_same_gradients(scene.gradients(result.total), scene.gradients(expected), rtol=1e-9)

    @EVERY
    def test_top_k_compares_k_ids_and_one_bucket_for_the_rest(self, name: str) -> None:
        scene = make_scene()
        kept = TopKSignal.from_logits(scene.teacher_logits(), 6, [2.0])
        terms = [DivergenceTerm("kd", LOSSES[name], temperature=2.0)]
        result = head_pass(scene.hidden, scene.head, kept, terms, chunk_tokens=8)

        def buckets(logits: Tensor) -> Tensor:
            p = (logits / 2).softmax(-1)
            others = torch.ones_like(p).scatter(-1, kept.ids, 0.0)
            return torch.cat([p.gather(-1, kept.ids), (p * others).sum(-1, keepdim=True)], dim=-1)

        expected = DENSE[name](buckets(scene.teacher_logits()), buckets(scene.student_logits())).sum()
        torch.testing.assert_close(result.total, expected)
        assert_same_gradients(scene.gradients(result.total), scene.gradients(expected), rtol=1e-9)

    def test_dense_equals_live(self) -> None:
        scene = make_scene()
        dense = linear_divergence("jsd", scene.hidden, scene.head, DenseSignal(scene.teacher_logits()), chunk_tokens=8)
        live = linear_divergence("jsd", scene.hidden, scene.head, scene.signal, chunk_tokens=8)
        torch.testing.assert_close(dense, live)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_dense_equals_live_under_the_students_autocast(self, dtype: torch.dtype) -> None:
        # The teacher's head ran in the student's autocast, so that a live teacher was coarser than its own logits.
        scene = make_scene(torch.float32)
        logits = DenseSignal(scene.teacher_logits())
        with torch.autocast("cpu", dtype=dtype):
            dense = linear_divergence("forward_kl", scene.hidden, scene.head, logits, chunk_tokens=8)
            live = linear_divergence("forward_kl", scene.hidden, scene.head, scene.signal, chunk_tokens=8)
        torch.testing.assert_close(live, dense, rtol=1e-6, atol=0)

    def test_the_teacher_is_not_asked_where_nothing_looks_at_it(self) -> None:
        class Silent(LiveSignal):
            def rows(self, start: int, stop: int, device: torch.device, room: Room | None = None) -> DenseSignal:
                raise AssertionError("asked")

        scene = make_scene()
        signal = Silent(scene.signal.hidden, scene.signal.head)
        terms, extras = [LabelTerm("lm", scene.targets)], ("label_logprobs",)
        expected = head_pass(scene.hidden, scene.head, None, terms, extras=extras)
        found = head_pass(scene.hidden, scene.head, signal, terms, extras=extras)
        assert torch.equal(found.total, expected.total)
        assert torch.equal(logits_pass(scene.student_logits(), signal, terms).parts["lm"], expected.parts["lm"])
        with pytest.raises(AssertionError, match="asked"):
            head_pass(scene.hidden, scene.head, signal, [], extras=("teacher_entropy",))

    def test_the_teacher_is_asked_once_for_each_chunk(self) -> None:
        scene = make_scene()
        asked: list[int] = []

        class Counting(LiveSignal):
            def rows(self, start: int, stop: int, device: torch.device, room: Room | None = None) -> DenseSignal:
                asked.append(stop - start)
                return super().rows(start, stop, device, room)

        terms = [DivergenceTerm(str(t), reverse_kl, temperature=t) for t in (1.0, 1.5, 2.0)]
        signal = Counting(scene.signal.hidden, scene.signal.head)
        head_pass(scene.hidden, scene.head, signal, terms, chunk_tokens=16)
        assert asked == [16, 5]

    def test_a_temperature_that_is_not_cached_is_refused(self) -> None:
        scene = make_scene()
        kept = TopKSignal.from_logits(scene.teacher_logits(), 6, [1.5])
        with pytest.raises(ValueError, match=r"temperature 2.0 .* holds 1 to 1.5"):
            linear_divergence("tvd", scene.hidden, scene.head, kept, temperature=2.0)


class TestNothingToCount:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_no_positions_give_zero_that_still_depends_on_the_inputs(self, dtype: torch.dtype) -> None:
        scene = make_scene(dtype, num_positions=0)
        terms = [DivergenceTerm("kd", forward_kl), LabelTerm("lm", scene.targets)]
        result = head_pass(scene.hidden, scene.head, scene.signal, terms, extras=("teacher_entropy", "label_logprobs"))
        assert result.total.item() == 0
        assert all(part.item() == 0 for part in result.parts.values())
        assert {name: tuple(x.shape) for name, x in result.extras.items()} == {
            "teacher_entropy": (0,),
            "label_logprobs": (0,),
        }
        for gradient, x in zip(scene.gradients(result.total), scene.inputs, strict=True):
            assert (gradient.shape, gradient.dtype) == (x.shape, dtype)
            assert (gradient == 0).all()

    @EVERY
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_token_weights_of_zero_give_zero_with_finite_gradient(self, name: str, dtype: torch.dtype) -> None:
        scene = make_scene(dtype)
        total = linear_divergence(name, scene.hidden, scene.head, scene.signal, token_weights=torch.zeros(N))
        assert total.item() == 0
        assert all((gradient == 0).all() for gradient in scene.gradients(total))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_no_terms_at_all_give_zero_without_a_walk_over_the_chunks(self, dtype: torch.dtype) -> None:
        scene = make_scene(dtype)
        with torch.no_grad():
            scene.hidden[3] = math.nan
        student_logits = scene.student_logits()
        with LargestTensor() as seen:
            result = head_pass(scene.hidden, scene.head, scene.signal, [])
            from_logits = logits_pass(student_logits, scene.signal, [])
        assert seen.num_entries == 3  # the zeros of three inputs
        assert result.parts == result.extras == from_logits.parts == from_logits.extras == {}
        assert result.total.item() == from_logits.total.item() == 0
        assert result.total.dtype == from_logits.total.dtype == torch.promote_types(dtype, torch.float32)
        for gradient, x in zip(scene.gradients(result.total), scene.inputs, strict=True):
            assert (gradient.shape, gradient.dtype) == (x.shape, dtype)
            assert (gradient == 0).all()
        assert (torch.autograd.grad(from_logits.total, student_logits)[0] == 0).all()


class TestFreshMemory:
    @pytest.fixture(autouse=True)
    def nothing_but_nan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was in memory before may be anything."""
        monkeypatch.setattr(torch, "empty_like", lambda x, **given: torch.full_like(x, math.nan, **given))

    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.bfloat16, 0.03)])
    def test_ids_that_the_head_does_not_have_get_no_gradient(self, dtype: torch.dtype, rtol: float) -> None:
        scene = make_scene(dtype, vocab_size=V - 3)
        targets = scene.targets.clamp(max=V - 4)
        result = head_pass(scene.hidden, scene.head, None, [LabelTerm("lm", targets)], chunk_tokens=8)
        gradients = scene.gradients(result.total)
        assert all((gradient[V - 3 :] == 0).all() for gradient in gradients[1:])
        expected = torch.nn.functional.cross_entropy(scene.student_logits(), targets, reduction="sum")
        assert_same_gradients(gradients, scene.gradients(expected), rtol=rtol)

    @pytest.mark.parametrize("num_positions", [0, 5])
    def test_terms_that_count_for_nothing_give_none(self, num_positions: int) -> None:
        scene = make_scene(num_positions=num_positions)
        terms = [DivergenceTerm("kd", forward_kl, weight=0.0), LabelTerm("lm", scene.targets, weight=0.0)]
        result = head_pass(scene.hidden, scene.head, scene.signal, terms)
        assert all((gradient == 0).all() for gradient in scene.gradients(result.total))


class TestMemory:
    @pytest.mark.parametrize("kept", [None, 5])
    def test_no_tensor_of_all_positions_and_ids_is_made(self, kept: int | None) -> None:
        scene = make_scene(num_positions=64, num_ids=40)
        signal = scene.signal if kept is None else TopKSignal.from_logits(scene.teacher_logits(), kept, [1.0, 2.0])
        terms = [
            DivergenceTerm("kd", LOSSES["jsd"], temperature=2.0),
            DivergenceTerm("ab", LOSSES["alpha_beta"]),
            LabelTerm("lm", scene.targets),
        ]
        with LargestTensor() as seen:
            head_pass(scene.hidden, scene.head, signal, terms, chunk_tokens=16).total.backward()
        assert seen.num_entries == max(16 * 40, 64 * H, 40 * H)

    def test_no_gradient_is_formed_under_no_grad(self) -> None:
        scene = make_scene()
        terms = [DivergenceTerm("kd", reverse_kl), LabelTerm("lm", scene.targets)]
        with torch.no_grad(), LargestTensor() as seen:
            result = head_pass(scene.hidden, scene.head, scene.signal, terms, chunk_tokens=8)
        assert not result.total.requires_grad
        assert seen.calls["mm"] == math.ceil(N / 8)  # the teacher's logits
        assert "addmm_" not in seen.calls
        assert "_log_softmax_backward_data" not in seen.calls
        torch.testing.assert_close(result.total, head_pass(scene.hidden, scene.head, scene.signal, terms).total)

    @pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
    def test_no_gradient_is_formed_for_an_input_that_requires_none(self, frozen: str) -> None:
        scene = make_scene()
        expected = dict(zip(("hidden", "weight", "bias"), scene.gradients(scene.dense("tvd").sum()), strict=True))
        inputs = {"hidden": scene.hidden, "weight": scene.head.weight, "bias": scene.head.bias}
        inputs[frozen].requires_grad_(False)
        with LargestTensor() as seen:
            linear_divergence("tvd", scene.hidden, scene.head, scene.signal, chunk_tokens=8).backward()
        assert inputs[frozen].grad is None
        for name in inputs.keys() - {frozen}:
            assert_same_gradients([inputs[name].grad], [expected[name]], rtol=1e-9)
        assert ("addmm_" in seen.calls) == (frozen != "weight")

    def test_inference_mode_works(self) -> None:
        scene = make_scene()
        with torch.inference_mode():
            total = linear_divergence("tvd", scene.hidden, scene.head, scene.signal, chunk_tokens=8)
        torch.testing.assert_close(total, scene.dense("tvd").sum().detach())


class TestHalfPrecision:
    """Dividing the gradient by N before the matrix product makes fp16 lose a third of it, unseen by a grad scaler."""

    NUM_POSITIONS, NUM_IDS, WIDTH = 4096, 256, 8

    def scene(self) -> tuple[Tensor, Tensor, LiveSignal]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.NUM_POSITIONS, self.WIDTH, generator=generator).half().float()
        weight = (0.005 * torch.randn(self.NUM_IDS, self.WIDTH, generator=generator)).half().float()
        teacher = LiveSignal(
            torch.randn(self.NUM_POSITIONS, 4, generator=generator),
            Head(0.005 * torch.randn(self.NUM_IDS, 4, generator=generator)),
        )
        return hidden.requires_grad_(), nn.Parameter(weight), teacher

    def gradients(self, hidden: Tensor, weight: Tensor, teacher: LiveSignal) -> list[Tensor]:
        term = DivergenceTerm("kd", forward_kl, weight=1 / self.NUM_POSITIONS)
        total = head_pass(hidden, Head(weight), teacher, [term]).total
        assert total.dtype == torch.float32
        # The scaling of the loss that a grad scaler does, as the last cast is to the inputs' dtype.
        return [gradient.float() for gradient in torch.autograd.grad(total * 1024, [hidden, weight])]

    def test_the_trap_is_there(self) -> None:
        hidden, weight, teacher = self.scene()
        q = (hidden @ weight.T).softmax(-1)
        p = (teacher.hidden @ teacher.head.weight.T).softmax(-1)
        gradient = (q - p) / self.NUM_POSITIONS
        naive = gradient.half() @ weight.half()
        exact = gradient @ weight
        assert naive.float().norm() < 0.5 * exact.norm()

    def test_fp16_keeps_the_norm_of_the_gradient(self) -> None:
        hidden, weight, teacher = self.scene()
        exact = self.gradients(hidden, weight, teacher)
        halves = hidden.detach().half().requires_grad_(), weight.detach().half().requires_grad_()
        for found, expected in zip(self.gradients(*halves, teacher), exact, strict=True):
            assert found.norm().item() == pytest.approx(expected.norm().item(), rel=0.01)
            assert (found - expected).norm() < 0.01 * expected.norm()

    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 0.01), (torch.bfloat16, 0.03)])
    def test_autocast_decides_the_dtype_of_the_products_only(self, dtype: torch.dtype, rtol: float) -> None:
        hidden, weight, teacher = self.scene()
        exact = self.gradients(hidden, weight, teacher)
        with torch.autocast("cpu", dtype=dtype), LargestTensor() as seen:
            found = self.gradients(hidden, weight, teacher)
        for ours, expected in zip(found, exact, strict=True):
            assert (ours - expected).norm() < rtol * expected.norm()
            assert not torch.equal(ours, expected)
        assert seen.num_entries == 256 * self.NUM_IDS

    @EVERY
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_extreme_logits_give_finite_values_and_gradients(self, name: str, dtype: torch.dtype) -> None:
        scene = make_scene(dtype)
        head = Head(scene.head.weight, scene.head.bias)
        with torch.no_grad():
            logits = F.linear(scene.hidden.double(), head.weight.double(), head.bias.double())
            stretch = 1e4 / logits.abs().max().item()
        head = Head(scene.head.weight, scene.head.bias, scale=stretch)
        signal = DenseSignal(-logits.flip(-1) * stretch)
        total = linear_divergence(name, scene.hidden, head, signal, chunk_tokens=8)
        assert total.isfinite()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total / 1e4, scene.inputs))

    def test_large_hidden_states_do_not_overflow_the_products(self) -> None:
        # 256 positions that all want the same label, hidden states of 500: their sum is beyond fp16's 65,504.
        hidden = torch.full((256, 4), 500.0)
        weight = torch.zeros(8, 4, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.float16):
            total = head_pass(hidden, Head(weight), None, [LabelTerm("lm", torch.zeros(256).long())]).total
        total.backward()
        assert weight.grad[0].tolist() == pytest.approx([-256 * 500 * 7 / 8] * 4, rel=1e-3)

    def test_nan_and_infinity_are_never_replaced(self) -> None:
        scene = make_scene(torch.float16)
        with torch.no_grad():
            scene.hidden[5, 0] = math.nan
        total = linear_divergence("skew_reverse_kl", scene.hidden, scene.head, scene.signal, chunk_tokens=8)
        assert total.isnan()
        hidden, weight, bias = scene.gradients(total)
        assert hidden[5].isnan().all()
        assert hidden[[4, 6]].isfinite().all()
        assert weight.isnan().any()
        assert bias.isnan().any()


class TestDifferentiability:
    def test_differentiating_twice_is_refused(self) -> None:
        scene = make_scene()
        total = linear_divergence("tvd", scene.hidden, scene.head, scene.signal).square()
        (gradient,) = torch.autograd.grad(total, scene.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    def test_the_gradient_can_be_asked_for_again(self) -> None:
        scene = make_scene()
        total = linear_divergence("tvd", scene.hidden, scene.head, scene.signal)
        first = torch.autograd.grad(total, scene.inputs, retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        second = torch.autograd.grad(2 * total, scene.inputs)
        assert all(torch.equal(2 * a, b) for a, b in zip(kept, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True))

    def test_no_copy_of_the_weights_gradient_is_made(self) -> None:
        scene = make_scene(torch.float32)
        total = linear_divergence("tvd", scene.hidden, scene.head, scene.signal)
        with LargestTensor() as seen:
            total.backward()
        assert not seen.calls.keys() & {"mul", "clone", "_to_copy", "copy_", "add"}
        assert scene.head.weight.grad is not None

    def test_inputs_stay_as_they_are(self) -> None:
        scene = make_scene(torch.float32)
        before = [x.detach().clone() for x in scene.inputs]
        linear_divergence("tvd", scene.hidden, scene.head, DenseSignal(scene.student_logits())).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, scene.inputs, strict=True))

    def test_a_weighted_loss_without_gradient_is_an_error(self) -> None:
        scene = make_scene()

        def detached(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
            return tvd(student_logprobs.detach(), teacher_logprobs)

        with pytest.raises(RuntimeError, match="does not require grad"):
            linear_divergence(detached, scene.hidden, scene.head, scene.signal)


class TestLogitsPass:
    @pytest.mark.parametrize("chunk_tokens", [5, 256])
    def test_equals_the_head_pass(self, chunk_tokens: int) -> None:
        scene = make_scene()
        terms = [
            DivergenceTerm("kd", skew_reverse_kl, weight=0.7, temperature=2.0),
            LabelTerm("lm", scene.targets, weight=0.3),
        ]
        extras = ("teacher_entropy", "label_logprobs")
        expected = head_pass(scene.hidden, scene.head, scene.signal, terms, extras=extras)
        found = logits_pass(scene.student_logits(), scene.signal, terms, chunk_tokens=chunk_tokens, extras=extras)
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(found.parts, expected.parts)
        torch.testing.assert_close(found.extras, expected.extras)
        assert_same_gradients(scene.gradients(found.total), scene.gradients(expected.total), rtol=1e-9)

    def test_no_positions_give_zero_that_still_depends_on_the_logits(self) -> None:
        logits = torch.zeros(0, 4, requires_grad=True)
        total = logits_pass(logits, DenseSignal(torch.zeros(0, 4)), [DivergenceTerm("kd", tvd)]).total
        total.backward()
        assert total.item() == 0
        assert logits.grad.shape == (0, 4)


class TestLinearDivergence:
    @EVERY
    def test_is_the_sum_over_positions(self, name: str) -> None:
        scene = make_scene()
        total = linear_divergence(name, scene.hidden, scene.head, scene.signal, temperature=1.5)
        torch.testing.assert_close(total, scene.dense(name, temperature=1.5).sum())

    def test_binds_the_arguments_of_the_loss(self) -> None:
        scene = make_scene()
        total = linear_divergence("skew_reverse_kl", scene.hidden, scene.head, scene.signal, alpha=0.4)
        p, q = scene.teacher_logits().softmax(-1), scene.student_logits().softmax(-1)
        torch.testing.assert_close(total, kl(q, 0.6 * p + 0.4 * q).sum())

    def test_an_unknown_loss_is_refused(self) -> None:
        scene = make_scene()
        with pytest.raises(ValueError, match="did you mean forward_kl"):
            linear_divergence("forwardkl", scene.hidden, scene.head, scene.signal)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestDevices:
    def test_a_teacher_on_another_device_computes_there(self) -> None:
        scene = make_scene(torch.float32)
        expected = linear_divergence("jsd", scene.hidden, scene.head, scene.signal, chunk_tokens=8)
        inputs = [x.detach().cuda().requires_grad_() for x in scene.inputs]
        head = Head(inputs[1], inputs[2])
        total = linear_divergence("jsd", inputs[0], head, scene.signal, chunk_tokens=8)  # the teacher stays on the CPU
        torch.testing.assert_close(total.cpu(), expected, rtol=1e-4, atol=0)
        found = [gradient.cpu() for gradient in torch.autograd.grad(total, inputs)]
        assert_same_gradients(found, scene.gradients(expected), rtol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast_on_the_device_keeps_the_gradient(self, dtype: torch.dtype) -> None:
        scene = make_scene(torch.float32)
        expected = linear_divergence("jsd", scene.hidden, scene.head, scene.signal, chunk_tokens=8)
        inputs = [x.detach().cuda().requires_grad_() for x in scene.inputs]
        signal = LiveSignal(scene.signal.hidden.cuda(), Head(scene.signal.head.weight.cuda()))
        with torch.autocast("cuda", dtype=dtype):
            total = linear_divergence("jsd", inputs[0], Head(inputs[1], inputs[2]), signal, chunk_tokens=8)
        torch.testing.assert_close(total.cpu(), expected, rtol=0.03, atol=0)
        found = [gradient.cpu() for gradient in torch.autograd.grad(total, inputs)]
        assert_same_gradients(found, scene.gradients(expected), rtol=0.03)

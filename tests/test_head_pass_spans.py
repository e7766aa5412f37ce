"""Terms that count spans, in the chunked pass, against whole (N, V) tensors and loops over spans."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense import CUDA, LargestTensor, N, Scene, V, assert_same_gradients, make_scene
from torch import Tensor

from kdkit.losses import (
    CrossTerm,
    DivergenceTerm,
    LabelTerm,
    Spans,
    SpanTerm,
    VocabularyMatch,
    forward_kl,
    head_pass,
    hybrid,
    jsd,
    logits_pass,
    span_likelihood,
    tvd,
    uld,
)
from kdkit.losses.blocks import BLOCK_ENTRIES
from kdkit.losses.spans import pieces
from kdkit.teacher.kept import TopKSignal
from kdkit.teacher.signal import DenseSignal, Head, LiveSignal, Room, SparseSignal

STARTS = [0, 1, 2, 5, 6, 8, 17, 18, 20]
"""Spans of 1 to 9 of the 21 positions; the last is one position."""
S, W, TEACHER_H = len(STARTS), 67, 7
MATCH = VocabularyMatch(torch.arange(0, 40, 2), torch.arange(60, 40, -1), V, W)

LOSSES_ACROSS: dict[str, Callable[..., Tensor]] = {
    "uld": uld,
    "uld_top_k": partial(uld, top_k=5),
    "hybrid": partial(hybrid, match=MATCH, loss=jsd),
    "hybrid_top_k": partial(hybrid, match=MATCH, loss=forward_kl, top_k=5),
}
EVERY = pytest.mark.parametrize("name", list(LOSSES_ACROSS))
chunk_sizes = pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 8, 20, 21, 256])
block_sizes = pytest.mark.parametrize("block_rows", [1, 3, 1000])


def spans_at(*starts: int, num_positions: int = N) -> Spans:
    return Spans(np.array(starts, dtype=np.int64), num_positions)


SPANS = spans_at(*STARTS)


@dataclass
class Across:
    """A student, spans of its positions, and a teacher of another vocabulary at their starts."""

    student: Scene
    signal: LiveSignal
    teacher_logprobs: Tensor
    weights: Tensor

    def run(self, *terms: Any, signal: Any = "live", **options: Any) -> Any:
        given = self.signal if signal == "live" else signal
        return head_pass(self.student.hidden, self.student.head, given, terms, **{"spans": SPANS, **options})

    def teacher_logits(self) -> Tensor:
        return self.signal.hidden @ self.signal.head.weight.T

    def at_starts(self, loss: Callable[..., Tensor], temperature: float = 1.0) -> Tensor:
        """(S,) dense"""
        student = (self.student.student_logits() / temperature).log_softmax(-1)
        return loss(student[STARTS], (self.teacher_logits() / temperature).log_softmax(-1))

    def span_sums(self) -> Tensor:
        """(S,) the student's log-probability of each span, added up one by one."""
        logprobs = self.student.student_logits().log_softmax(-1)
        sums = []
        for start, end in zip(STARTS, [*STARTS[1:], N], strict=True):
            total = torch.zeros((), dtype=logprobs.dtype)
            for position in range(start, end):
                total = total + logprobs[position, self.student.targets[position]]
            sums.append(total)
        return torch.stack(sums)


def make_across(dtype: torch.dtype = torch.float64, **head: Any) -> Across:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    signal = LiveSignal(draw(S, TEACHER_H), Head(draw(W, TEACHER_H) / 2))
    return Across(make_scene(dtype, **head), signal, -draw(S).abs() * 3, draw(S).abs())


class TestEqualsTheDensePath:
    @EVERY
    @chunk_sizes
    @block_sizes
    def test_at_the_starts_of_spans(
        self, name: str, chunk_tokens: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(BLOCK_ENTRIES, "cpu", block_rows * W)
        scene = make_across()
        term = CrossTerm("kd", LOSSES_ACROSS[name], temperature=1.5, span_weights=scene.weights)
        result = scene.run(term, chunk_tokens=chunk_tokens)
        expected = (scene.at_starts(LOSSES_ACROSS[name], 1.5) * scene.weights).sum()
        torch.testing.assert_close(result.total, expected)
        assert_same_gradients(scene.student.gradients(result.total), scene.student.gradients(expected), rtol=1e-9)

    @chunk_sizes
    @block_sizes
    def test_over_whole_spans(self, chunk_tokens: int, block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(BLOCK_ENTRIES, "cpu", block_rows * V)
        scene = make_across()
        term = SpanTerm(
            "span", scene.student.targets, scene.teacher_logprobs, temperature=2.0, span_weights=scene.weights
        )
        result = scene.run(term, signal=None, chunk_tokens=chunk_tokens)
        values = span_likelihood(scene.span_sums(), scene.teacher_logprobs, temperature=2.0)
        expected = (values * scene.weights).sum()
        torch.testing.assert_close(result.total, expected)
        assert_same_gradients(scene.student.gradients(result.total), scene.student.gradients(expected), rtol=1e-9)

    @chunk_sizes
    def test_for_all_kinds_at_once_under_a_head_with_scale_softcap_and_padding(self, chunk_tokens: int) -> None:
        scene = make_across(scale=0.7, softcap=3.0, vocab_size=50)
        targets = scene.student.targets.clamp_max(49)
        scene.student.targets = targets
        ones = torch.linspace(0, 1, N, dtype=torch.float64)
        terms = [
            CrossTerm("soft", uld, weight=0.5, temperature=2.0),
            CrossTerm("ranked", partial(uld, top_k=3), weight=0.2, span_weights=scene.weights),
            SpanTerm("span", targets, scene.teacher_logprobs, weight=0.1, temperature=3.0),
            LabelTerm("lm", targets, weight=0.3, token_weights=ones),
        ]
        result = scene.run(*terms, chunk_tokens=chunk_tokens, extras=("teacher_entropy", "label_logprobs"))
        labels = scene.student.student_logits().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        parts = {
            "soft": scene.at_starts(uld, 2.0).sum(),
            "ranked": (scene.at_starts(partial(uld, top_k=3)) * scene.weights).sum(),
            "span": span_likelihood(scene.span_sums(), scene.teacher_logprobs, temperature=3.0).sum(),
            "lm": -(labels * ones).sum(),
        }
        total = 0.5 * parts["soft"] + 0.2 * parts["ranked"] + 0.1 * parts["span"] + 0.3 * parts["lm"]
        torch.testing.assert_close(result.total, total)
        torch.testing.assert_close(result.parts, {name: part.detach() for name, part in parts.items()})
        assert_same_gradients(scene.student.gradients(result.total), scene.student.gradients(total), rtol=1e-9)
        entropy = torch.distributions.Categorical(logits=scene.teacher_logits()).entropy()
        torch.testing.assert_close(result.extras["teacher_entropy"], entropy)
        torch.testing.assert_close(result.extras["label_logprobs"], labels.detach())

    @pytest.mark.parametrize("chunk_tokens", [4, 256])
    def test_from_logits_as_from_hidden_states(self, chunk_tokens: int) -> None:
        scene = make_across()
        terms = [
            CrossTerm("kd", LOSSES_ACROSS["hybrid"], weight=0.5, temperature=1.5),
            SpanTerm("span", scene.student.targets, scene.teacher_logprobs, span_weights=scene.weights),
        ]
        expected = scene.run(*terms)
        logits = scene.student.student_logits()
        found = logits_pass(logits, scene.signal, terms, chunk_tokens=chunk_tokens, spans=SPANS)
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(found.parts, expected.parts)
        assert_same_gradients(scene.student.gradients(found.total), scene.student.gradients(expected.total), rtol=1e-9)

    def test_one_span_per_position_of_one_vocabulary_is_a_divergence(self) -> None:
        scene = make_scene()
        each = spans_at(*range(N))
        found = head_pass(scene.hidden, scene.head, scene.signal, [CrossTerm("kd", tvd)], chunk_tokens=8, spans=each)
        expected = head_pass(scene.hidden, scene.head, scene.signal, [DivergenceTerm("kd", tvd)], chunk_tokens=8)
        assert torch.equal(found.total, expected.total)

    def test_spans_that_nothing_counts_change_nothing_but_the_chunks(self) -> None:
        scene = make_scene()
        terms = [DivergenceTerm("kd", tvd), LabelTerm("lm", scene.targets)]
        found = head_pass(scene.hidden, scene.head, scene.signal, terms, chunk_tokens=8, spans=SPANS)
        expected = head_pass(scene.hidden, scene.head, scene.signal, terms, chunk_tokens=8)
        torch.testing.assert_close(found.total, expected.total)
        assert_same_gradients(scene.gradients(found.total), scene.gradients(expected.total), rtol=1e-9)


class TestNothingToCount:
    def test_no_positions_give_zero_that_still_depends_on_the_inputs(self) -> None:
        scene = make_scene(torch.float32, num_positions=0)
        signal = LiveSignal(torch.zeros(0, TEACHER_H), Head(torch.zeros(W, TEACHER_H)))
        terms = [CrossTerm("kd", uld), SpanTerm("span", scene.targets, torch.zeros(0))]
        none = spans_at(num_positions=0)
        result = head_pass(scene.hidden, scene.head, signal, terms, spans=none, extras=("teacher_entropy",))
        from_logits = logits_pass(scene.student_logits(), signal, terms, spans=none)
        assert result.total.item() == from_logits.total.item() == 0
        assert result.extras["teacher_entropy"].shape == (0,)
        assert all((gradient == 0).all() for gradient in scene.gradients(result.total))
        assert all((gradient == 0).all() for gradient in scene.gradients(from_logits.total))

    def test_weights_of_zero_give_zero_with_finite_gradient(self) -> None:
        scene = make_across(torch.float32)
        zeros = torch.zeros(S)
        terms = [
            CrossTerm("kd", LOSSES_ACROSS["hybrid"], span_weights=zeros),
            SpanTerm("span", scene.student.targets, scene.teacher_logprobs, span_weights=zeros),
        ]
        total = scene.run(*terms).total
        assert total.item() == 0
        assert all((gradient == 0).all() for gradient in scene.student.gradients(total))

    def test_terms_of_weight_zero_are_still_valued(self) -> None:
        scene = make_across()
        terms = [
            CrossTerm("kd", uld, weight=0.0),
            SpanTerm("span", scene.student.targets, scene.teacher_logprobs, weight=0.0),
        ]
        result = scene.run(*terms, chunk_tokens=8)
        assert result.parts["kd"].item() == pytest.approx(scene.at_starts(uld).sum().item())
        assert result.parts["span"].item() > 0
        assert result.total.item() == 0
        assert all((gradient == 0).all() for gradient in scene.student.gradients(result.total))

    def test_no_gradient_is_formed_under_no_grad(self) -> None:
        scene = make_across()
        terms = [CrossTerm("kd", uld), SpanTerm("span", scene.student.targets, scene.teacher_logprobs)]
        with torch.no_grad(), LargestTensor() as seen:
            result = scene.run(*terms, chunk_tokens=8)
        assert not result.total.requires_grad
        assert "addmm_" not in seen.calls
        assert "_log_softmax_backward_data" not in seen.calls
        torch.testing.assert_close(result.total, scene.run(*terms).total.detach())


class TestHalfPrecision:
    @EVERY
    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 0.01), (torch.bfloat16, 0.03)])
    def test_autocast_decides_the_dtype_of_the_products_only(self, name: str, dtype: torch.dtype, rtol: float) -> None:
        scene = make_across(torch.float32)
        hidden, weight, bias = scene.student.inputs
        terms = [
            CrossTerm("kd", LOSSES_ACROSS[name], weight=1 / S),
            SpanTerm("span", scene.student.targets, scene.teacher_logprobs, weight=1 / S, temperature=10.0),
        ]
        with torch.autocast("cpu", dtype=dtype):
            found = scene.run(*terms, chunk_tokens=8).total
            logits = F.linear(hidden, weight, bias).float().detach().requires_grad_()
        # The order of probabilities hangs on the logits' digits, so the reference takes those that autocast gives.
        exact = logits_pass(logits, scene.signal, terms, spans=SPANS).total
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact)
        (gradient,) = torch.autograd.grad(exact, logits)
        expected = [gradient @ weight, gradient.T @ hidden, gradient.sum(0)]
        assert_same_gradients(scene.student.gradients(found), expected, rtol=rtol)

    @EVERY
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_extreme_logits_give_finite_values_and_gradients(self, name: str, dtype: torch.dtype) -> None:
        scene = make_across(dtype, scale=1.0)
        with torch.no_grad():
            stretch = 1e4 / scene.student.student_logits().abs().max().item()
        head = Head(scene.student.head.weight, scene.student.head.bias, scale=stretch)
        signal = DenseSignal(-scene.teacher_logits().sign() * 1e4)
        terms = [
            CrossTerm("kd", LOSSES_ACROSS[name]),
            SpanTerm("span", scene.student.targets, torch.linspace(-1e4, 0, S), temperature=2.0),
        ]
        total = head_pass(scene.student.hidden, head, signal, terms, chunk_tokens=8, spans=SPANS).total
        assert total.isfinite()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total / 1e4, scene.student.inputs))


class TestWork:
    def test_chunks_end_where_spans_end_and_the_teacher_is_asked_once_for_each(self) -> None:
        scene = make_across()
        asked: list[tuple[int, int]] = []

        class Counting(LiveSignal):
            def rows(self, start: int, stop: int, device: torch.device, room: Room | None = None) -> DenseSignal:
                asked.append((start, stop))
                return super().rows(start, stop, device, room)

        terms = [CrossTerm(str(t), uld, temperature=t) for t in (1.0, 2.0)]
        scene.run(*terms, signal=Counting(scene.signal.hidden, scene.signal.head), chunk_tokens=6)
        # Positions [0, 6), [6, 8), [8, 17) longer than a chunk, [17, 21).
        assert asked == [(0, 4), (4, 5), (5, 6), (6, 9)]

    def test_blocks_are_as_small_as_the_wider_vocabulary_asks_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(BLOCK_ENTRIES, "cpu", 4 * W)  # 5 rows of the student's 53 ids
        seen: list[int] = []

        def counted(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
            seen.append(len(teacher_logprobs))
            return uld(student_logprobs, teacher_logprobs)

        scene, each = make_scene(), spans_at(*range(N))
        signal = DenseSignal(torch.zeros(N, W))
        head_pass(scene.hidden, scene.head, signal, [CrossTerm("kd", counted)], spans=each)
        assert seen == [4, 4, 4, 4, 4, 1]

    def test_no_tensor_of_all_positions_or_spans_and_ids_is_made(self) -> None:
        positions, ids, teacher_ids = 64, 90, 120
        student = make_scene(num_positions=positions, num_ids=ids)
        spans = spans_at(*range(0, positions, 2), num_positions=positions)
        signal = LiveSignal(torch.randn(32, TEACHER_H), Head(torch.randn(teacher_ids, TEACHER_H)))
        match = VocabularyMatch(torch.arange(50), torch.arange(50), ids, teacher_ids)
        terms = [
            CrossTerm("kd", partial(hybrid, match=match, loss=forward_kl), temperature=2.0),
            SpanTerm("span", student.targets, torch.full((32,), -2.0)),
        ]
        with LargestTensor() as seen:
            head_pass(student.hidden, student.head, signal, terms, chunk_tokens=16, spans=spans).total.backward()
        assert seen.num_entries == 16 * ids

    @pytest.mark.parametrize("spans", [None, SPANS])
    def test_the_host_never_reads_from_the_device(self, spans: Spans | None) -> None:
        scene = make_across()
        terms: list[Any] = [LabelTerm("lm", scene.student.targets)]
        if spans is not None:
            terms += [CrossTerm(name, loss) for name, loss in LOSSES_ACROSS.items()]
            terms += [SpanTerm("span", scene.student.targets, scene.teacher_logprobs, span_weights=scene.weights)]
        with LargestTensor() as seen:
            scene.run(*terms, chunk_tokens=8, spans=spans).total.backward()
        assert not {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"} & seen.calls.keys()

    @pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
    def test_the_host_never_waits_for_the_device(self, device: str) -> None:
        scene = make_across(torch.float32)
        inputs = [x.detach().to(device).requires_grad_() for x in scene.student.inputs]
        signal = LiveSignal(scene.signal.hidden.to(device), Head(scene.signal.head.weight.to(device)))
        loss = partial(hybrid, match=MATCH.to(device), loss=forward_kl, top_k=5)
        targets, given = scene.student.targets.to(device), scene.teacher_logprobs.to(device)
        terms = [CrossTerm("kd", loss), SpanTerm("span", targets, given)]
        expected = scene.run(
            CrossTerm("kd", LOSSES_ACROSS["hybrid_top_k"]), SpanTerm("span", targets.cpu(), given.cpu())
        )
        torch.cuda.set_sync_debug_mode("error")
        try:
            total = head_pass(inputs[0], Head(*inputs[1:]), signal, terms, chunk_tokens=8, spans=SPANS).total
            total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(total.cpu(), expected.total, rtol=1e-4, atol=0)


class TestSpans:
    def test_every_piece_ends_where_a_span_ends_and_is_as_long_as_it_may_be(self) -> None:
        edges = [*STARTS, N]
        for size in range(1, N + 2):
            found, start = [], 0
            while start < N:  # the dumb way: the last edge within reach, else the next one
                within = [edge for edge in edges if start < edge <= start + size]
                end = max(within) if within else min(edge for edge in edges if edge > start)
                found.append((start, end))
                start = end
            assert [(piece.start, piece.stop) for piece in pieces(slice(0, N), size, SPANS)] == found

    def test_pieces_of_a_piece_stay_within_it(self) -> None:
        found = [(piece.start, piece.stop) for piece in pieces(slice(5, 18), 2, SPANS)]
        assert found == [(5, 6), (6, 8), (8, 17), (17, 18)]
        assert [(piece.start, piece.stop) for piece in pieces(slice(5, 10), 3, None)] == [(5, 8), (8, 10)]

    def test_within_are_those_that_start_there(self) -> None:
        assert SPANS.within(slice(2, 8)) == slice(2, 5)
        assert SPANS.within(slice(0, N)) == slice(0, S)
        assert SPANS.within(slice(8, 17)) == slice(5, 6)

    @pytest.mark.parametrize(
        ("starts", "num_positions"), [([1, 2], 5), ([0, 2, 2], 5), ([0, 3, 2], 5), ([0, 5], 5), ([], 5), ([0], 0)]
    )
    def test_starts_that_do_not_cover_the_positions_once_are_refused(
        self, starts: list[int], num_positions: int
    ) -> None:
        with pytest.raises(ValueError, match=r"starts must begin with 0, ascend, and stay below"):
            spans_at(*starts, num_positions=num_positions)

    @pytest.mark.parametrize("starts", [np.array([0.0, 1.0]), np.array([[0, 1]])])
    def test_starts_of_another_form_are_refused(self, starts: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"must be int64 of shape \(S,\)"):
            Spans(starts, 5)


class TestRefusals:
    def refuse(self, match: str, *terms: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            make_across().run(*terms, **options)

    def span_term(self, **fields: Any) -> SpanTerm:
        scene = make_across()
        return SpanTerm(
            **{"name": "span", "targets": scene.student.targets, "teacher_logprobs": torch.zeros(S), **fields}
        )

    def test_terms_over_spans_without_spans(self) -> None:
        self.refuse("term 'kd' counts spans, but spans is None", CrossTerm("kd", uld), spans=None)
        self.refuse("term 'span' counts spans, but spans is None", self.span_term(), signal=None, spans=None)

    def test_spans_of_other_positions(self) -> None:
        other = spans_at(0, 3, num_positions=20)
        self.refuse("21 positions of the student, spans over 20", CrossTerm("kd", uld), spans=other)

    def test_a_comparison_without_a_teacher(self) -> None:
        self.refuse("term 'kd' compares with a teacher, but signal is None", CrossTerm("kd", uld), signal=None)

    def test_a_divergence_by_ids_beside_one_across_vocabularies(self) -> None:
        self.refuse(
            "term 'same' compares the same ids at every position", CrossTerm("kd", uld), DivergenceTerm("same", tvd)
        )

    def test_a_signal_of_all_positions(self) -> None:
        self.refuse(
            "9 spans, 21 positions of the teacher's signal", CrossTerm("kd", uld), signal=DenseSignal(torch.zeros(N, W))
        )

    def test_a_signal_of_a_few_ids(self) -> None:
        logits = torch.zeros(S, W)
        for signal in (TopKSignal.from_logits(logits, 3, [1.0]), SparseSignal(DenseSignal(logits), 3)):
            match = f"a CrossTerm looks at all ids of the teacher, {type(signal).__name__} keeps a few"
            self.refuse(match, CrossTerm("kd", uld), signal=signal)

    @pytest.mark.parametrize("field", ["span_weights", "teacher_logprobs"])
    def test_columns_of_another_number_of_spans(self, field: str) -> None:
        self.refuse(
            rf"{field} of term 'span' .* \(21,\): must be \(9,\), one for each span",
            self.span_term(**{field: torch.zeros(N)}),
        )

    def test_targets_of_another_number_of_positions(self) -> None:
        term = self.span_term(targets=torch.zeros(S).long())
        self.refuse(r"targets of term 'span' .* \(9,\): must be \(21,\), one for each position", term)

    def test_a_loss_that_reduces(self) -> None:
        self.refuse(
            r"returned shape \(\) for \d spans.*one value per span", CrossTerm("kd", lambda q, p: uld(q, p).sum())
        )

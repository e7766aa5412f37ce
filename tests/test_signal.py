"""What a loss may know of the teacher, in each of its forms."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from dense import LargestTensor, on_each_device
from torch import Tensor

from kdkit.losses import forward_kl
from kdkit.teacher.kept import SampledSignal, TopKSignal
from kdkit.teacher.signal import (
    DenseSignal,
    Head,
    LiveSignal,
    Room,
    SparseSignal,
    TeacherSignal,
    at_least_float32,
    bucket_logprobs,
    compute_dtype,
    tempered_logprobs,
)

CPU = torch.device("cpu")


@pytest.fixture
def logits() -> Tensor:
    """(7, 12) float64."""
    return 3 * torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def head() -> Head:
    """12 ids, hidden size 5, with all that a head may have."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(12, generator=generator, dtype=torch.float64)
    return Head(weight, bias, scale=0.5, softcap=2.0)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def naive_logprob(logits: list[float], v: int, temperature: float) -> float:
    normaliser = math.log(sum(math.exp(z / temperature) for z in logits))
    return logits[v] / temperature - normaliser


class TestHead:
    def test_logits_are_the_formula_entry_by_entry(self, head: Head, hidden: Tensor) -> None:
        value = head.logits(hidden)
        for n, v in [(0, 0), (3, 7), (6, 11)]:
            product = sum(float(w) * float(h) for w, h in zip(head.weight[v], hidden[n], strict=True))
            scaled = 0.5 * (product + float(head.bias[v]))
            assert value[n, v].item() == pytest.approx(2.0 * math.tanh(scaled / 2.0))

    def test_vocab_size_keeps_the_first_ids(self, head: Head, hidden: Tensor) -> None:
        cut = Head(head.weight, head.bias, scale=0.5, softcap=2.0, vocab_size=9)
        assert cut.num_ids == 9
        torch.testing.assert_close(cut.logits(hidden), head.logits(hidden)[:, :9])

    def test_holds_the_parameters_themselves(self, hidden: Tensor) -> None:
        weight = torch.nn.Parameter(torch.zeros(12, 5, dtype=torch.float64))
        head = Head(weight)
        with torch.no_grad():
            weight.fill_(1.0)
        torch.testing.assert_close(head.logits(hidden), hidden.sum(-1, keepdim=True).expand(7, 12))
        with pytest.raises(FrozenInstanceError):
            head.scale = 2.0  # type: ignore[misc]

    def test_mixed_precision_promotes_instead_of_failing(self, head: Head, hidden: Tensor) -> None:
        # A half-precision teacher against float32 hidden states once ended a run with a dtype error.
        half = Head(head.weight.half(), head.bias.half())
        assert half.logits(hidden.float()).dtype == torch.float32
        assert half.logits(hidden.half()).dtype == torch.float16

    @pytest.mark.parametrize("vocab_size", [0, 13])
    def test_a_cut_beyond_the_rows_is_refused(self, head: Head, vocab_size: int) -> None:
        with pytest.raises(ValueError, match=r"the head has 12 rows; give 1 to 12"):
            Head(head.weight, vocab_size=vocab_size)

    def test_a_softcap_of_zero_is_refused(self, head: Head) -> None:
        with pytest.raises(ValueError, match=r"softcap=0.*above 0, or None"):
            Head(head.weight, softcap=0.0)


class TestRoom:
    @pytest.mark.parametrize("num_threads", [1, 2])
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_a_product_in_pieces_is_the_product(
        self, num_threads: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        widths: list[int] = []
        for name in ("mm", "addmm"):
            product = getattr(torch, name)

            def watched(*args: Tensor, out: Tensor, product: Callable[..., Tensor] = product) -> Tensor:
                widths.append(out.shape[1])
                return product(*args, out=out)

            monkeypatch.setattr(torch, name, watched)
        draws, before = torch.Generator().manual_seed(0), torch.get_num_threads()
        hidden, weight = torch.randn(7, 2048, generator=draws), torch.randn(1100, 2048, generator=draws)
        bias = torch.randn(1100, generator=draws) if has_bias else None
        expected = torch.nn.functional.linear(hidden.double(), weight.double(), bias if bias is None else bias.double())
        room = Room()
        room.product(torch.randn(9, 2048, generator=draws), weight, bias)  # what is there before does not matter
        widths.clear()
        torch.set_num_threads(num_threads)
        try:
            found = room.product(hidden, weight, bias)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
        assert widths == ([1100] if num_threads == 1 else [512, 512, 76])


def every_signal(logits: Tensor) -> dict[str, TeacherSignal]:
    """The same teacher in each form."""
    identity = Head(torch.eye(logits.shape[-1], dtype=logits.dtype))
    return {
        "live": LiveSignal(logits, identity),
        "dense": DenseSignal(logits),
        "top-k": TopKSignal.from_logits(logits, 4, [1.0, 2.0]),
        "sparse": SparseSignal(LiveSignal(logits, identity), 4).rows(0, len(logits), logits.device),
    }


@pytest.mark.parametrize("form", ["live", "dense", "top-k", "sparse"])
class TestEverySignal:
    def test_columns_are_a_distribution(self, logits: Tensor, form: str) -> None:
        signal = every_signal(logits)[form]
        for temperature in (1.0, 2.0):
            mass = signal.logprobs_at(temperature).exp().sum(-1)
            torch.testing.assert_close(mass, torch.ones(7, dtype=torch.float64))

    def test_equals_a_float64_loop(self, logits: Tensor, form: str) -> None:
        signal = every_signal(logits)[form]
        columns, support = signal.logprobs_at(2.0), signal.support
        for n, row in enumerate(logits.tolist()):
            ids = range(12) if support is None else support[n].tolist()
            for column, v in enumerate(ids):
                assert columns[n, column].item() == pytest.approx(naive_logprob(row, v, 2.0))

    @on_each_device
    @pytest.mark.parametrize("to_student", [True, False])
    def test_rows_are_a_part_of_the_whole(self, logits: Tensor, form: str, device: str, to_student: bool) -> None:
        here, there = (CPU, torch.device(device)) if to_student else (torch.device(device), CPU)
        signal = every_signal(logits.to(here))[form]
        part = signal.rows(2, 5, there)
        columns = part.logprobs_at(2.0)
        assert (signal.num_positions, part.num_positions) == (7, 3)
        assert columns.device.type == there.type
        torch.testing.assert_close(columns.cpu(), signal.logprobs_at(2.0)[2:5].cpu())
        if signal.support is not None:
            assert part.support.device.type == there.type
            assert torch.equal(part.support.cpu(), signal.support[2:5].cpu())

    def test_knows_the_width_of_the_vocabulary(self, logits: Tensor, form: str) -> None:
        signal = every_signal(logits)[form]
        assert signal.num_ids == signal.rows(2, 5, CPU).num_ids == 12

    def test_no_gradient_reaches_the_teacher(self, logits: Tensor, form: str) -> None:
        signal = every_signal(logits.requires_grad_())[form]
        assert not signal.logprobs_at(1.0).requires_grad
        assert not signal.rows(0, 7, CPU).logprobs_at(1.0).requires_grad

    def test_half_precision_is_normalised_in_float32(self, logits: Tensor, form: str) -> None:
        columns = every_signal(logits.half())[form].logprobs_at(1.0)
        assert columns.dtype == torch.float32
        torch.testing.assert_close(columns.exp().sum(-1), torch.ones(7))

    def test_zero_positions_are_fine(self, logits: Tensor, form: str) -> None:
        assert every_signal(logits[:0])[form].logprobs_at(1.0).shape[0] == 0


class TestLiveSignal:
    def test_a_cut_head_cuts_the_ids(self, head: Head, hidden: Tensor) -> None:
        assert LiveSignal(hidden, Head(head.weight, vocab_size=9)).num_ids == 9

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_students_autocast_leaves_the_teacher_alone(self, dtype: torch.dtype) -> None:
        # A float32 teacher's head was cast to the student's half precision: logits beyond 65,504 became inf.
        signal = LiveSignal(torch.tensor([[400.0], [1.001]]), Head(torch.tensor([[300.0], [1.001]])))
        with torch.autocast("cpu", dtype=dtype):
            part, columns = signal.rows(0, 2, CPU), signal.logprobs_at(1.0)
        expected = torch.tensor([[400.0 * 300.0, 400.0 * 1.001], [1.001 * 300.0, 1.001 * 1.001]])
        assert part.logits.dtype == torch.float32
        torch.testing.assert_close(part.logits, expected)
        torch.testing.assert_close(columns, expected.log_softmax(-1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_head_of_the_states_dtype_is_not_cast_again_for_every_chunk(self, dtype: torch.dtype) -> None:
        signal = LiveSignal(torch.ones(7, 5, dtype=dtype), Head(torch.ones(12, 5, dtype=dtype)))
        with torch.autocast("cpu", dtype=torch.bfloat16), LargestTensor() as seen:
            part = signal.rows(0, 7, CPU)
        assert part.logits.dtype == dtype
        assert "_to_copy" not in seen.calls

    def test_mixed_precision_is_promoted_under_autocast_too(self) -> None:
        signal = LiveSignal(torch.ones(7, 5), Head(torch.ones(12, 5).half()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert signal.rows(0, 7, CPU).logits.dtype == torch.float32


class TestTopKSignal:
    def test_keeps_the_most_likely_and_the_mass_of_the_rest(self, logits: Tensor) -> None:
        signal = TopKSignal.from_logits(logits, 3)
        p = logits.softmax(-1)
        for n in range(7):
            order = sorted(range(12), key=lambda v: -p[n, v].item())
            assert signal.ids[n].tolist() == order[:3]
            rest = signal.logprobs_at(1.0)[n, -1].item()
            assert rest == pytest.approx(math.log(sum(p[n, v].item() for v in order[3:])))

    def test_a_tail_far_below_rounding_is_kept(self) -> None:
        # 1 − Σ in float32 would be 0 or noise here.
        signal = TopKSignal.from_logits(torch.tensor([[50.0, 0.0, 0.0, 0.0]]), 1)
        assert signal.logprobs_at(1.0)[0, -1].item() == pytest.approx(math.log(3) - 50)

    @pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0])
    def test_every_id_kept_leaves_an_empty_tail(self, logits: Tensor, temperature: float) -> None:
        signal = TopKSignal.from_logits(logits, 12, [2.0])
        columns = signal.logprobs_at(temperature)
        assert (columns[:, -1] == -math.inf).all()
        torch.testing.assert_close(columns[:, :-1], (logits / temperature).log_softmax(-1).gather(-1, signal.ids))

    @pytest.mark.parametrize("asked", [[1.0, 2.0], [4.0], [0.5, 2.0]])
    def test_any_temperature_of_the_range_is_that_of_softened_logits(self, asked: list[float]) -> None:
        # Zipf-like logits over 20,000 ids, 64 kept: a tail that matters, of terms over many orders of magnitude.
        generator = torch.Generator().manual_seed(5)
        ranks = torch.arange(1, 20_001, dtype=torch.float64)
        logits = -1.2 * ranks.log() + torch.randn(16, 20_000, generator=generator, dtype=torch.float64)
        signal = TopKSignal.from_logits(logits, 64, asked)
        low, high = signal.temperatures
        assert (low, high) == (min(1.0, *asked), max(1.0, *asked))
        for step in range(11):
            temperature = low + (high - low) * step / 10
            dense = (logits / temperature).softmax(-1)
            kept = dense.gather(-1, signal.ids)
            expected = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()
            torch.testing.assert_close(signal.logprobs_at(temperature), expected, rtol=0, atol=1e-3)

    def test_the_ends_of_the_range_and_one_are_exact(self, logits: Tensor) -> None:
        signal = TopKSignal.from_logits(logits, 3, [2.0])
        for temperature in (1.0, 2.0):
            dense = (logits / temperature).softmax(-1)
            others = torch.ones_like(dense).scatter(-1, signal.ids, 0.0)
            expected = (dense * others).sum(-1).log()
            torch.testing.assert_close(signal.logprobs_at(temperature)[:, -1], expected)

    @pytest.mark.parametrize("temperature", [0.9, 2.1])
    def test_a_temperature_beyond_what_was_kept_is_refused_by_name(self, logits: Tensor, temperature: float) -> None:
        signal = TopKSignal.from_logits(logits, 3, [1.0, 2.0])
        with pytest.raises(ValueError, match=rf"temperature {temperature} .* holds 1 to 2.*cache again"):
            signal.logprobs_at(temperature)

    def test_a_temperature_equal_up_to_rounding_is_found(self, logits: Tensor) -> None:
        signal = TopKSignal.from_logits(logits, 3, [0.3])
        torch.testing.assert_close(signal.logprobs_at(0.1 + 0.2), signal.logprobs_at(0.3))
        torch.testing.assert_close(signal.logprobs_at(0.3 * (1 - 1e-9)), signal.logprobs_at(0.3))

    def test_narrow_ids_are_widened_for_indexing(self, logits: Tensor) -> None:
        signal = TopKSignal.from_logits(logits, 3)
        narrow = TopKSignal(signal.ids.int(), signal.logprobs, signal.tails, 12)
        assert narrow.rows(0, 7, CPU).support.dtype == torch.int64

    @pytest.mark.parametrize("k", [1, 3, 6])
    def test_narrowed_is_what_keeping_fewer_gives(self, logits: Tensor, k: int) -> None:
        narrowed = TopKSignal.from_logits(logits, 6, [2.0]).narrowed(k)
        fewer = TopKSignal.from_logits(logits, k, [2.0])
        assert torch.equal(narrowed.support, fewer.support)
        for temperature in (1.0, 1.4, 2.0):
            torch.testing.assert_close(narrowed.logprobs_at(temperature), fewer.logprobs_at(temperature))

    def test_narrowed_to_more_than_there_are_is_refused(self, logits: Tensor) -> None:
        with pytest.raises(ValueError, match="k=4: 3 ids are kept"):
            TopKSignal.from_logits(logits, 3).narrowed(4)

    @pytest.mark.parametrize("k", [0, 13])
    def test_k_beyond_the_vocabulary_is_refused(self, logits: Tensor, k: int) -> None:
        with pytest.raises(ValueError, match=rf"k={k}: give 1 to 12"):
            TopKSignal.from_logits(logits, k)

    def test_parts_that_do_not_fit_are_refused(self, logits: Tensor) -> None:
        whole = TopKSignal.from_logits(logits, 3)
        with pytest.raises(ValueError, match=r"must be \(N, K\), \(N, K\) and \(N, 1\)"):
            TopKSignal(whole.ids[:, :2], whole.logprobs, whole.tails, 12)
        with pytest.raises(ValueError, match=r"temperatures \(1.0, 2.0\).*\(N, 7\)"):
            TopKSignal(whole.ids, whole.logprobs, whole.tails, 12, (1.0, 2.0))
        for nothing in ([], [0.0, 1.0]):
            with pytest.raises(ValueError, match="at least one, each above 0"):
                TopKSignal.from_logits(logits, 3, nothing)


class TestSampledSignal:
    def draws(self, logits: Tensor, num_draws: int, *, seed: int = 0) -> SampledSignal:
        generator = torch.Generator().manual_seed(seed)
        return SampledSignal.from_logits(
            logits, torch.rand(len(logits), num_draws, generator=generator, dtype=torch.float64)
        )

    def test_an_id_is_drawn_as_often_as_it_is_likely(self, logits: Tensor) -> None:
        signal = self.draws(logits, 200_000)
        shares = torch.zeros_like(logits).scatter(-1, signal.ids, signal.counts.double() / 200_000)
        torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=5e-3)  # four standard deviations

    def test_columns_hold_shares_of_distinct_ids_and_no_rest(self, logits: Tensor) -> None:
        signal = self.draws(logits, 8).rows(1, 6, CPU)
        assert (signal.counts.sum(-1) == 8).all()
        assert all(len(set(row)) == 8 for row in signal.ids.tolist())
        columns = signal.logprobs_at(1.0).exp()
        torch.testing.assert_close(columns[:, :-1], signal.counts / 8)
        assert (columns[:, -1] == 0).all()

    def test_the_mean_of_many_gradients_is_that_of_forward_kl(self, logits: Tensor) -> None:
        student = torch.randn(7, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

        def gradient(signal: TeacherSignal) -> Tensor:
            leaf = student.clone().requires_grad_()
            ours = bucket_logprobs(leaf.log_softmax(-1), signal.support)
            forward_kl(ours, signal.logprobs_at(1.0).double()).sum().backward()
            return leaf.grad

        mean = torch.stack([gradient(self.draws(logits, 4, seed=seed)) for seed in range(2000)]).mean(0)
        exact = gradient(DenseSignal(logits))
        top_k = gradient(TopKSignal.from_logits(logits, 4))
        torch.testing.assert_close(mean, exact, rtol=0, atol=0.03)
        assert (top_k - exact).abs().max() > 0.001  # one bucket for the rest is another, biased objective

    @pytest.mark.parametrize("num_draws", [2, 30])  # 30 leave no id for the last column
    def test_gradients_are_finite_where_ids_were_not_drawn(self, logits: Tensor, num_draws: int) -> None:
        student = torch.zeros(7, 12, requires_grad=True)
        signal = self.draws(logits, num_draws)
        value = forward_kl(bucket_logprobs(student.log_softmax(-1), signal.support), signal.logprobs_at(1.0))
        value.sum().backward()
        assert value.isfinite().all()
        assert student.grad.isfinite().all()

    def test_another_temperature_is_refused_by_name(self, logits: Tensor) -> None:
        with pytest.raises(ValueError, match=r"temperature 2.0 .* draws at temperature 1.*objective.kd.temperature=1"):
            self.draws(logits, 2).logprobs_at(2.0)


class TestHiddenStates:
    def test_any_signal_may_carry_them(self, logits: Tensor, head: Head, hidden: Tensor) -> None:
        states = torch.zeros(2, 4, 5)
        kept = TopKSignal.from_logits(logits, 3, [1.0])
        signals: list[TeacherSignal] = [
            LiveSignal(hidden, head, hidden_states=states),
            DenseSignal(logits, hidden_states=states),
            TopKSignal(kept.ids, kept.logprobs, kept.tails, 12, hidden_states=states),
        ]
        assert all(signal.hidden_states is states for signal in signals)
        assert kept.hidden_states is None


class TestComputeDtype:
    def test_autocast_decides_where_it_is_on(self) -> None:
        single = torch.zeros(2, 2)
        assert compute_dtype(single, single) == torch.float32
        assert compute_dtype(single.half(), single) == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert compute_dtype(single, single) == torch.bfloat16


class TestAtLeastFloat32:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_widens_half_precision_only(self, given: torch.dtype, expected: torch.dtype) -> None:
        assert at_least_float32(torch.zeros(1, dtype=given)).dtype == expected


class TestTemperedLogprobs:
    def test_equals_a_float64_loop(self, logits: Tensor) -> None:
        value = tempered_logprobs(logits, 0.5)
        assert value[3, 4].item() == pytest.approx(naive_logprob(logits[3].tolist(), 4, 0.5))


class TestBucketLogprobs:
    def test_gradient_is_that_of_the_value(self, logits: Tensor) -> None:
        ids = logits.topk(3).indices
        logits.requires_grad_()
        assert torch.autograd.gradcheck(lambda z: bucket_logprobs(z.log_softmax(-1), ids), logits)

    def test_a_tail_without_mass_has_finite_gradient(self, logits: Tensor) -> None:
        ids = logits.topk(3).indices
        masked = torch.full_like(logits, -math.inf).scatter(-1, ids, logits.gather(-1, ids)).requires_grad_()
        buckets = bucket_logprobs(masked.log_softmax(-1), ids)
        buckets[:, :-1].sum().backward()
        assert (buckets[:, -1] == -math.inf).all()
        assert masked.grad.isfinite().all()


class TestSparseSignal:
    def test_kept_ids_are_chosen_once_for_a_chunk(self, logits: Tensor) -> None:
        chunk = SparseSignal(DenseSignal(logits), 3).rows(0, 7, CPU)
        block = chunk.rows(2, 4, CPU)
        assert block.support.data_ptr() == chunk.support[2:4].data_ptr()

    def test_gives_what_a_top_k_signal_of_the_same_logits_gives_at_any_temperature(self):
        logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(3))
        sparse = SparseSignal(DenseSignal(logits), 4).rows(2, 6, logits.device)
        kept = TopKSignal.from_logits(logits[2:6], 4, [1.0, 1.7])
        assert torch.equal(sparse.support, kept.support)
        for temperature in (1.0, 1.7):
            torch.testing.assert_close(sparse.logprobs_at(temperature), kept.logprobs_at(temperature))

    def test_more_ids_than_there_are_is_refused(self):
        with pytest.raises(ValueError, match="k=12: give 1 to 11"):
            SparseSignal(DenseSignal(torch.zeros(2, 11)), 12).rows(0, 2, torch.device("cpu"))

    def test_the_ids_of_uncut_rows_are_not_known(self):
        with pytest.raises(ValueError, match="call rows"):
            _ = SparseSignal(DenseSignal(torch.zeros(2, 11)), 3).support

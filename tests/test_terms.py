"""What a term may be and may ask of the head pass."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import H, LargestTensor, N, V, assert_same_gradients, make_scene
from torch import Tensor

from kdkit.losses import DivergenceTerm, LabelTerm, head_pass, logits_pass, reverse_kl, tvd
from kdkit.teacher.kept import TopKSignal
from kdkit.teacher.signal import DenseSignal, LiveSignal, SparseSignal, TeacherSignal


def signals_of(logits: Tensor) -> dict[str, TeacherSignal]:
    """The same teacher as each form but the live one."""
    return {
        "dense": DenseSignal(logits),
        "top-k": TopKSignal.from_logits(logits, 4, [1.0]),
        "sparse": SparseSignal(DenseSignal(logits), 4),
    }


class TestWeightOfZero:
    def test_gives_the_part_and_no_gradient(self) -> None:
        scene = make_scene()
        terms = [DivergenceTerm("kd", reverse_kl, weight=0.0), LabelTerm("lm", scene.targets)]
        result = head_pass(scene.hidden, scene.head, scene.signal, terms, chunk_tokens=8)
        expected = F.cross_entropy(scene.student_logits(), scene.targets, reduction="sum")
        torch.testing.assert_close(result.total, expected)
        torch.testing.assert_close(result.parts["kd"], scene.dense("reverse_kl").sum().detach())
        assert_same_gradients(scene.gradients(result.total), scene.gradients(expected), rtol=1e-9)

    def test_everywhere_costs_no_matrix_product_for_gradients(self) -> None:
        scene = make_scene()
        with LargestTensor() as seen:
            head_pass(scene.hidden, scene.head, scene.signal, [DivergenceTerm("kd", tvd, weight=0.0)], chunk_tokens=8)
        num_chunks = math.ceil(N / 8)
        assert seen.calls["addmm"] == num_chunks  # student's logits
        assert seen.calls["mm"] == num_chunks  # teacher's
        assert "addmm_" not in seen.calls

    def test_keeps_a_value_that_is_not_finite_out_of_the_total(self) -> None:
        scene = make_scene()

        def infinite(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
            return tvd(student_logprobs, teacher_logprobs) + math.inf

        terms = [DivergenceTerm("off", infinite, weight=0.0), DivergenceTerm("on", tvd)]
        result = head_pass(scene.hidden, scene.head, scene.signal, terms)
        assert result.parts["off"].item() == math.inf
        torch.testing.assert_close(result.total, scene.dense("tvd").sum())


class TestExtras:
    @pytest.mark.parametrize("num_kept", [None, V, 6])
    def test_teacher_entropy_is_at_temperature_one(self, num_kept: int | None) -> None:
        scene = make_scene()
        p = scene.teacher_logits().softmax(-1)
        signal: LiveSignal | TopKSignal = scene.signal
        if num_kept is not None:
            signal = TopKSignal.from_logits(scene.teacher_logits(), num_kept, [1.0, 2.0])
            best = p.topk(num_kept).values
            p = torch.cat([best, 1 - best.sum(-1, keepdim=True)], dim=-1) if num_kept < V else p
        terms = [DivergenceTerm("kd", tvd, temperature=2.0)]
        found = head_pass(scene.hidden, scene.head, signal, terms, chunk_tokens=8, extras=("teacher_entropy",)).extras
        assert list(found) == ["teacher_entropy"]
        assert found["teacher_entropy"].tolist() == pytest.approx(torch.special.entr(p).sum(-1).tolist())

    def test_an_id_without_probability_adds_no_entropy(self) -> None:
        logits = torch.tensor([[0.0, -math.inf, 0.0]])
        result = logits_pass(torch.zeros(1, 3), DenseSignal(logits), [], extras=("teacher_entropy",))
        assert result.extras["teacher_entropy"].item() == pytest.approx(math.log(2))

    def test_label_logprobs_are_those_of_the_student(self) -> None:
        scene = make_scene()
        terms = [LabelTerm("lm", scene.targets, weight=0.0)]
        result = head_pass(scene.hidden, scene.head, None, terms, chunk_tokens=8, extras=("label_logprobs",))
        expected = -F.cross_entropy(scene.student_logits(), scene.targets, reduction="none")
        torch.testing.assert_close(result.extras["label_logprobs"], expected.detach())
        assert result.parts["lm"].item() == pytest.approx(-expected.sum().item())

    def test_come_without_gradient(self) -> None:
        scene = make_scene()
        terms = [LabelTerm("lm", scene.targets)]
        result = head_pass(scene.hidden, scene.head, scene.signal, terms, extras=("teacher_entropy", "label_logprobs"))
        assert not any(extra.requires_grad for extra in result.extras.values())


class TestRefusals:
    def refuse(self, match: str, *terms: DivergenceTerm | LabelTerm, signal: Any = "live", **options: Any) -> None:
        scene = make_scene()
        with pytest.raises(ValueError, match=match):
            head_pass(scene.hidden, scene.head, scene.signal if signal == "live" else signal, terms, **options)

    def test_a_divergence_without_a_teacher(self) -> None:
        self.refuse(r"'kd' compares with a teacher, but signal is None", DivergenceTerm("kd", tvd), signal=None)

    def test_another_number_of_positions(self) -> None:
        self.refuse(
            r"21 positions of the student, 20", DivergenceTerm("kd", tvd), signal=DenseSignal(torch.zeros(20, V))
        )

    @pytest.mark.parametrize("num_ids", [V - 3, V + 3])
    @pytest.mark.parametrize("form", ["dense", "top-k", "sparse"])
    def test_another_vocabulary(self, form: str, num_ids: int) -> None:
        # Kept ids told nobody how many there were: beyond the student's, an index out of bounds; below, a wrong tail.
        signal = signals_of(torch.zeros(N, num_ids))[form]
        match = rf"gives 53 ids, the teacher's signal {num_ids}.*Head\(.*vocab_size"
        self.refuse(match, DivergenceTerm("kd", tvd), signal=signal)
        self.refuse(match, signal=signal, extras=("teacher_entropy",))

    @pytest.mark.parametrize("form", ["dense", "top-k", "sparse"])
    def test_another_vocabulary_than_the_logits(self, form: str) -> None:
        signal = signals_of(torch.zeros(2, 9))[form]
        with pytest.raises(ValueError, match=r"gives 8 ids, the teacher's signal 9.*student_logits\[:, :V'\]") as error:
            logits_pass(torch.zeros(2, 8), signal, [DivergenceTerm("kd", tvd)])
        assert "vocab_size" not in str(error.value)

    def test_nothing_of_a_vocabulary_that_nobody_looks_at(self) -> None:
        scene = make_scene()
        result = head_pass(scene.hidden, scene.head, DenseSignal(torch.zeros(N, 9)), [LabelTerm("lm", scene.targets)])
        expected = F.cross_entropy(scene.student_logits(), scene.targets, reduction="sum")
        torch.testing.assert_close(result.total, expected)

    def test_the_same_name_twice(self) -> None:
        self.refuse("names must differ", DivergenceTerm("kd", tvd), DivergenceTerm("kd", reverse_kl))

    def test_token_weights_of_another_shape(self) -> None:
        self.refuse(r"token_weights .* \(3,\)", DivergenceTerm("kd", tvd, token_weights=torch.ones(3)))

    def test_targets_of_another_shape(self) -> None:
        self.refuse(r"targets .* \(21, 1\)", LabelTerm("lm", torch.zeros(N, 1).long()))

    def test_a_loss_that_reduces(self) -> None:
        mean = DivergenceTerm("kd", lambda student, teacher: tvd(student, teacher).mean())
        self.refuse(r"returned shape \(\).*one value per position", mean)

    @pytest.mark.parametrize("shape", [(3, 7, H), (N, H + 1)])
    def test_hidden_states_of_another_shape(self, shape: tuple[int, ...]) -> None:
        scene = make_scene()
        with pytest.raises(ValueError, match=r"student_hidden of shape .*: must be \(N, 11\)"):
            head_pass(torch.zeros(shape), scene.head, scene.signal, [DivergenceTerm("kd", tvd)])

    def test_an_unknown_extra(self) -> None:
        self.refuse("unknown extra 'entropy'", extras=("entropy",))

    def test_label_logprobs_without_labels(self) -> None:
        self.refuse("needs a LabelTerm", DivergenceTerm("kd", tvd), extras=("label_logprobs",))

    def test_teacher_entropy_without_a_teacher(self) -> None:
        self.refuse("needs a teacher", signal=None, extras=("teacher_entropy",))

    def test_a_chunk_without_positions(self) -> None:
        self.refuse("chunk_tokens=0", chunk_tokens=0)

    def test_a_temperature_of_zero(self) -> None:
        self.refuse(r"temperature 0.*above 0", DivergenceTerm("kd", tvd, temperature=0.0))

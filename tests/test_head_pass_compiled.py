"""The compiled backends "native" and "cuda" of the head pass find what backend "torch" finds in float64.

"cuda" runs on the CPU, by a driver that does so, and on a card where there is one.
"""

import math
from dataclasses import dataclass
from functools import partial

import emulated
import pytest
import torch
from dense import CUDA, Scene, assert_same_gradients
from passes import V, assert_equal_passes, every_form, make_scenes, on_logits, passed
from torch import Tensor

from kdkit import compiled
from kdkit.losses import DivergenceTerm, LabelTerm, blocks, forward_kl, resolve_loss, reverse_kl, skew_reverse_kl
from kdkit.teacher.kept import SampledSignal, TopKSignal
from kdkit.teacher.signal import Head, SparseSignal


@dataclass(frozen=True)
class Machine:
    """A backend, and where it runs."""

    backend: str
    device: str

    def on_logits(self, name: str, own: dict[str, float], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """As `passes.on_logits`; from the CPU and back."""
        sides = student.to(self.device), teacher.to(self.device)
        value, gradient = on_logits(name, own, *sides, backend=self.backend)
        return value.cpu(), gradient.cpu()


@pytest.fixture(params=["native", "emulated", pytest.param("cuda", marks=CUDA)])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    if request.param == "native" and not compiled.is_installed():
        pytest.skip("needs numba")
    if request.param == "emulated":
        launcher = request.getfixturevalue("emulated_losses")
        monkeypatch.setitem(blocks.COMPILED, "cuda", partial(emulated.losses_solver, launcher=launcher))
        return Machine("cuda", "cpu")
    return Machine(request.param, "cpu" if request.param == "native" else "cuda")


@pytest.fixture
def scenes(machine: Machine) -> tuple[Scene, Scene]:
    return make_scenes(machine.device)


class TestEqualsTorch:
    @every_form
    def test_over_all_ids(
        self, name: str, own: dict[str, float], machine: Machine, scenes: tuple[Scene, Scene]
    ) -> None:
        term = DivergenceTerm(name, resolve_loss(name, **own), temperature=1.5)
        assert_equal_passes(scenes, (scenes[0].signal, scenes[1].signal), [term], backend=machine.backend, rtol=1e-5)

    @every_form
    def test_over_kept_ids_and_the_rest(
        self, name: str, own: dict[str, float], machine: Machine, scenes: tuple[Scene, Scene]
    ) -> None:
        term = DivergenceTerm(name, resolve_loss(name, **own), temperature=1.5)
        kept = TopKSignal.from_logits(scenes[0].teacher_logits().detach(), 12, [1.5])
        rtol = 1e-4 if own == {"alpha": 0.9} else 1e-5  # its mixture is nearly p itself: little is left of the gradient
        assert_equal_passes(scenes, (kept, kept), [term], backend=machine.backend, rtol=rtol)

    def test_for_several_terms_temperatures_weights_and_extras(
        self, machine: Machine, scenes: tuple[Scene, Scene]
    ) -> None:
        weights = torch.rand(len(scenes[0].hidden), generator=torch.Generator().manual_seed(1))
        terms = [
            DivergenceTerm("kd", skew_reverse_kl, weight=0.7, temperature=2.0, token_weights=weights),
            DivergenceTerm("cover", forward_kl, weight=0.1, temperature=0.5),
            LabelTerm("lm", scenes[0].targets, weight=0.3, token_weights=weights),
            DivergenceTerm("same_temperature", reverse_kl, weight=0.2, temperature=2.0),
            DivergenceTerm("watched", forward_kl, weight=0.0, temperature=2.0),
        ]
        extras = ("teacher_entropy", "label_logprobs")
        assert_equal_passes(
            scenes, (scenes[0].signal, scenes[1].signal), terms, backend=machine.backend, rtol=1e-5, extras=extras
        )

    def test_for_several_terms_over_kept_ids(self, machine: Machine, scenes: tuple[Scene, Scene]) -> None:
        kept = TopKSignal.from_logits(scenes[0].teacher_logits().detach(), 12, [0.5, 2.0])
        terms = [
            DivergenceTerm("kd", skew_reverse_kl, weight=0.7, temperature=2.0),
            DivergenceTerm("same_temperature", reverse_kl, weight=0.2, temperature=2.0),
            DivergenceTerm("cover", forward_kl, weight=0.1, temperature=0.5),
            LabelTerm("first", scenes[0].targets, weight=0.3),
            LabelTerm("second", scenes[0].targets.flip(0), weight=0.2),
        ]
        extras = ("teacher_entropy", "label_logprobs")
        assert_equal_passes(scenes, (kept, kept), terms, backend=machine.backend, rtol=1e-5, extras=extras)

    def test_for_labels_alone(self, machine: Machine, scenes: tuple[Scene, Scene]) -> None:
        terms = [LabelTerm("lm", scenes[0].targets)]
        assert_equal_passes(scenes, (None, None), terms, backend=machine.backend, rtol=1e-5, extras=("label_logprobs",))

    def test_with_a_logit_scale(self, machine: Machine, scenes: tuple[Scene, Scene]) -> None:
        scaled = [
            Scene(scene.hidden, Head(scene.head.weight, scene.head.bias, scale=0.3), scene.signal, scene.targets)
            for scene in scenes
        ]
        terms = [DivergenceTerm("kd", reverse_kl, temperature=2.0), LabelTerm("lm", scenes[0].targets)]
        assert_equal_passes(
            (scaled[0], scaled[1]), (scenes[0].signal, scenes[1].signal), terms, backend=machine.backend, rtol=1e-5
        )

    @pytest.mark.parametrize("k", [5, V])
    def test_for_the_most_likely_ids_of_a_live_teacher(
        self, k: int, machine: Machine, scenes: tuple[Scene, Scene]
    ) -> None:
        signals = tuple(SparseSignal(scene.signal, k) for scene in scenes)
        assert_equal_passes(
            scenes, signals, [DivergenceTerm("kd", skew_reverse_kl)], backend=machine.backend, rtol=1e-5
        )

    def test_for_draws_from_the_teacher(self, machine: Machine, scenes: tuple[Scene, Scene]) -> None:
        uniforms = torch.rand(
            len(scenes[0].hidden), 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        drawn = SampledSignal.from_logits(scenes[0].teacher_logits().detach(), uniforms)
        assert_equal_passes(
            scenes, (drawn, drawn), [DivergenceTerm("kd", forward_kl)], backend=machine.backend, rtol=1e-5
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_for_products_in_half_precision(
        self, dtype: torch.dtype, machine: Machine, scenes: tuple[Scene, Scene]
    ) -> None:
        scene = scenes[0]
        for terms in ([DivergenceTerm("kd", skew_reverse_kl)], [LabelTerm("lm", scene.targets)]):
            with torch.autocast(machine.device, dtype=dtype):
                found, expected = (
                    passed(scene, scene.signal, terms, backend=name) for name in (machine.backend, "torch")
                )
            torch.testing.assert_close(found[0].total, expected[0].total, rtol=1e-5, atol=0)
            assert_same_gradients(found[1], expected[1], rtol=2e-3)  # a rounding to half may fall either way


class TestNumbersAtTheEdge:
    @every_form
    def test_extreme_logits_give_finite_values_and_gradients(
        self, name: str, own: dict[str, float], machine: Machine
    ) -> None:
        if min(own.values(), default=0) < 0:
            pytest.skip("overflows, as it says")
        logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [88.0, -90.0, 0.0]])
        for teacher in (logits, logits.flip(0)):
            value, gradient = machine.on_logits(name, own, logits, teacher)
            assert value.isfinite().all()
            assert gradient.isfinite().all()
            exact, exact_gradient = on_logits(name, own, logits.double(), teacher.double(), backend="torch")
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-5)

    @every_form
    def test_an_id_left_out_on_both_sides_counts_for_nothing(
        self, name: str, own: dict[str, float], machine: Machine
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(4, 40, generator=generator) for _ in range(2))
        value, gradient = machine.on_logits(name, own, student, teacher)
        padding = torch.full((4, 3), -math.inf)
        same, padded = machine.on_logits(name, own, torch.cat([student, padding], 1), torch.cat([teacher, padding], 1))
        torch.testing.assert_close(same, value, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(padded[:, :40], gradient, rtol=1e-5, atol=1e-7)
        assert (padded[:, 40:] == 0).all()

    @every_form
    def test_equal_sides_give_zero(self, name: str, own: dict[str, float], machine: Machine) -> None:
        logits = 5 * torch.randn(8, 2000, generator=torch.Generator().manual_seed(0))
        value, gradient = machine.on_logits(name, own, logits, logits)
        assert value.abs().max() < 5e-5
        assert gradient.abs().max() < 1e-6

    @every_form
    @pytest.mark.parametrize("side", [0, 1])
    @pytest.mark.parametrize("what", [math.nan, math.inf])
    def test_nan_and_infinity_are_never_replaced(
        self, name: str, own: dict[str, float], machine: Machine, side: int, what: float
    ) -> None:
        sides = [torch.randn(3, 700, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        sides[side][1, 650] = what
        value, _ = machine.on_logits(name, own, *sides)
        assert not value[1].isfinite()
        assert value[[0, 2]].isfinite().all()

    def test_a_teacher_that_excludes_what_the_student_gives_is_infinitely_far(self, machine: Machine) -> None:
        teacher = torch.tensor([[0.0, -math.inf]])
        value, _ = machine.on_logits("reverse_kl", {}, torch.zeros(1, 2), teacher)
        assert value.item() == math.inf

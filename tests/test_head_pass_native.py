"""What only the compiled backend of the head pass can get wrong; what holds for all is in test_head_pass.py.

Expected values are those of backend "torch" in float64, which test_head_pass.py holds against the papers' formulas.
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from dense import Scene
from passes import make_scenes, passed

from kdkit import compiled
from kdkit.losses import (
    DivergenceTerm,
    LabelTerm,
    SpanTerm,
    forward_kl,
    head_pass,
    linear_divergence,
    resolve_loss,
    skew_reverse_kl,
)
from kdkit.losses.blocks import _say_once
from kdkit.losses.spans import Spans
from kdkit.teacher.kept import TopKSignal
from kdkit.teacher.signal import DenseSignal, Head

pytestmark = pytest.mark.skipif(not compiled.is_installed(), reason="needs numba")


@pytest.fixture(scope="module")
def scenes() -> tuple[Scene, Scene]:
    return make_scenes()


class TestMemoryAndThreads:
    def test_the_teachers_logits_stay_as_they_are(self, scenes: tuple[Scene, Scene]) -> None:
        given = scenes[0].teacher_logits().detach()
        before = given.clone()
        passed(scenes[0], DenseSignal(given), [DivergenceTerm("kd", forward_kl)], backend="native")
        assert torch.equal(given, before)

    @pytest.mark.parametrize("wrong", [-100, -1, "num_ids"])
    def test_ids_beyond_the_head_are_refused_not_read(self, scenes: tuple[Scene, Scene], wrong: int | str) -> None:
        scene, num_ids = scenes[0], scenes[0].head.num_ids
        targets = scene.targets.clone()
        targets[3] = num_ids if wrong == "num_ids" else wrong
        with pytest.raises(ValueError, match=f"'lm' run from .* allowed: 0 to {num_ids - 1}"):
            passed(scene, None, [LabelTerm("lm", targets)], backend="native")
        kept = TopKSignal.from_logits(scene.teacher_logits().detach(), 4, [1.0])
        kept.ids[3, 1] = targets[3]
        with pytest.raises(ValueError, match="kept ids run from"):
            passed(scene, kept, [DivergenceTerm("kd", forward_kl)], backend="native")

    def test_token_weights_may_be_of_half_precision(self, scenes: tuple[Scene, Scene]) -> None:
        weights = torch.rand(len(scenes[0].hidden)).bfloat16()
        term = DivergenceTerm("kd", forward_kl, token_weights=weights)
        found, expected = (passed(scenes[0], scenes[0].signal, [term], backend=name)[0] for name in ("native", "torch"))
        torch.testing.assert_close(found.total, expected.total)

    def test_torchs_default_dtype_does_not_matter(self, scenes: tuple[Scene, Scene]) -> None:
        scene, term = scenes[0], DivergenceTerm("kd", forward_kl)
        kept = TopKSignal.from_logits(scene.teacher_logits().detach(), 4, [1.0])
        for signal in (None, scene.signal, kept):
            terms = [LabelTerm("lm", scene.targets)] if signal is None else [term]
            expected = passed(scene, signal, terms, backend="native")[0].total
            torch.set_default_dtype(torch.float64)
            try:
                found = passed(scene, signal, terms, backend="native")[0].total
            finally:
                torch.set_default_dtype(torch.float32)
            assert torch.equal(found, expected)

    def test_results_do_not_depend_on_the_number_of_threads(self, scenes: tuple[Scene, Scene]) -> None:
        terms = [DivergenceTerm("kd", skew_reverse_kl, temperature=2.0), LabelTerm("lm", scenes[0].targets)]
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                result = head_pass(scenes[0].hidden, scenes[0].head, scenes[0].signal, terms, backend="native")
                found.append(result.parts)
        finally:
            torch.set_num_threads(before)
        assert found[0] == found[1] == found[2]


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    _say_once.cache_clear()
    yield
    _say_once.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
class TestChoice:
    @pytest.mark.parametrize(("numba", "name"), [(False, "torch"), (True, "native")])
    def test_the_log_says_once_which_backend_runs_and_why(
        self, numba: bool, name: str, scenes: tuple[Scene, Scene], monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        monkeypatch.setattr(compiled, "is_installed", lambda: numba)
        scene, terms = scenes[0], [DivergenceTerm("kd", forward_kl)]
        with caplog.at_level(logging.INFO, logger="kdkit.losses"):
            chosen, named = (passed(scene, scene.signal, terms, backend=backend)[0] for backend in (None, name))
        assert torch.equal(chosen.total, named.total)
        (message,) = caplog.messages
        assert f"{name!r}" in message
        assert "numba" in message

    @pytest.mark.parametrize(
        ("term", "reason"),
        [
            (DivergenceTerm("own", lambda student, teacher: (student - teacher).square().sum(-1)), "'own'"),
            (DivergenceTerm("limit", resolve_loss("alpha_beta", alpha=0.5, beta=0.0)), "'limit'"),
            (SpanTerm("span", torch.zeros(21, dtype=torch.int64), torch.zeros(1)), "'span'"),
        ],
    )
    def test_what_has_no_compiled_form_runs_on_torch_and_says_so(
        self, term: Any, reason: str, scenes: tuple[Scene, Scene], caplog: pytest.LogCaptureFixture
    ) -> None:
        scene, spans = scenes[0], Spans(np.array([0]), 21)
        with caplog.at_level(logging.INFO, logger="kdkit.losses"):
            found, _ = passed(scene, scene.signal, [term], spans=spans)
        assert found.total.isfinite()
        assert "'torch'" in caplog.text
        assert reason in caplog.text
        with pytest.raises(ValueError, match=f"cannot do this pass.*{reason}"):
            passed(scene, scene.signal, [term], spans=spans, backend="native")

    def test_float64_and_a_soft_cap_are_refused_by_name(self, scenes: tuple[Scene, Scene]) -> None:
        with pytest.raises(ValueError, match="float64"):
            passed(scenes[1], scenes[1].signal, [DivergenceTerm("kd", forward_kl)], backend="native")
        capped = Head(scenes[0].head.weight, softcap=3.0)
        with pytest.raises(ValueError, match="soft cap"):
            linear_divergence("tvd", scenes[0].hidden, capped, scenes[0].signal, backend="native")

    def test_without_numba_it_says_what_to_install(
        self, scenes: tuple[Scene, Scene], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compiled, "is_installed", lambda: False)
        with pytest.raises(ValueError, match=r"kdkit\[fast\]"):
            passed(scenes[0], scenes[0].signal, [DivergenceTerm("kd", forward_kl)], backend="native")

    def test_an_unknown_name_is_refused(self, scenes: tuple[Scene, Scene]) -> None:
        with pytest.raises(ValueError, match="allowed: torch, native"):
            passed(scenes[0], scenes[0].signal, [DivergenceTerm("kd", forward_kl)], backend="numba")

    def test_arguments_that_a_loss_refuses_are_refused(self, scenes: tuple[Scene, Scene]) -> None:
        with pytest.raises(ValueError, match="beta=2"):
            linear_divergence("jsd", scenes[0].hidden, scenes[0].head, scenes[0].signal, beta=2.0)

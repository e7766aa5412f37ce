"""The chunked pass against the dense path at the size of a real vocabulary, in float32."""

import pytest
import torch
import torch.nn.functional as F
from dense import Scene, assert_same_gradients, make_scene

from kdkit.losses import LOSSES, DivergenceTerm, LabelTerm, divergence, head_pass

NUM_POSITIONS, NUM_IDS = 1024, 49_152
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(torch.float32, NUM_POSITIONS, num_ids=NUM_IDS)


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss(scene: Scene, name: str) -> None:
    term = DivergenceTerm(name, LOSSES[name])
    result = head_pass(scene.hidden, scene.head, scene.signal, [term], chunk_tokens=200)
    expected = divergence(name, scene.student_logits(), scene.teacher_logits()).double().sum()
    torch.testing.assert_close(result.total.double(), expected, rtol=1e-5, atol=0)
    # The gradient of tvd jumps where p and q cross; where float32 cannot tell them apart, either side is right.
    rtol = 3e-3 if name == "tvd" else 1e-5
    assert_same_gradients(scene.gradients(result.total), scene.gradients(expected), rtol=rtol)


def test_two_terms_of_other_weight_and_temperature(scene: Scene) -> None:
    terms = [
        DivergenceTerm("kd", LOSSES["skew_reverse_kl"], weight=0.7, temperature=2.0),
        LabelTerm("lm", scene.targets, weight=0.3),
    ]
    result = head_pass(scene.hidden, scene.head, scene.signal, terms, chunk_tokens=200)
    logits = scene.student_logits()
    kd = divergence("skew_reverse_kl", logits, scene.teacher_logits(), temperature=2.0).double().sum()
    lm = F.cross_entropy(logits, scene.targets, reduction="none").double().sum()
    expected = 0.7 * kd + 0.3 * lm
    torch.testing.assert_close(result.total.double(), expected, rtol=1e-5, atol=0)
    assert_same_gradients(scene.gradients(result.total), scene.gradients(expected), rtol=1e-5)

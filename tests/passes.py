"""Head passes by a compiled backend in float32 and by torch in float64, on the same numbers."""

from typing import Any

import pytest
import torch
from dense import Scene, assert_same_gradients, make_scene
from torch import Tensor

from kdkit.losses import LOSSES, DivergenceTerm, head_pass, resolve_loss
from kdkit.losses.blocks import solver_for
from kdkit.losses.head_pass import HeadPassResult
from kdkit.losses.terms import Tally, Task
from kdkit.teacher.signal import DenseSignal, Head, LiveSignal, TeacherSignal

V = 1300  # more than two tiles, the last one cut
FORMS: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in LOSSES),
    ("jsd", {"beta": 0.9}),
    ("skew_forward_kl", {"alpha": 0.0}),
    ("skew_forward_kl", {"alpha": 0.9}),
    ("skew_reverse_kl", {"alpha": 0.0}),
    ("skew_reverse_kl", {"alpha": 0.6}),
    ("alpha_beta", {"alpha": 0.5, "beta": -0.2}),
    ("alpha_beta", {"alpha": 1.5, "beta": 0.5}),
]
every_form = pytest.mark.parametrize(("name", "own"), FORMS, ids=[f"{name}-{own}" for name, own in FORMS])


def make_scenes(device: str = "cpu") -> tuple[Scene, Scene]:
    """In float32, and the same numbers in float64: what differs is what the float32 arithmetic does."""
    drawn = make_scene(num_ids=V)

    def with_numbers(*dtypes: torch.dtype) -> Scene:
        def number(tensor: Tensor) -> Tensor:
            for dtype in dtypes:
                tensor = tensor.detach().to(device, dtype)
            return tensor

        assert drawn.head.bias is not None
        head = Head(number(drawn.head.weight).requires_grad_(), number(drawn.head.bias).requires_grad_())
        teacher = LiveSignal(number(drawn.signal.hidden), Head(number(drawn.signal.head.weight)))
        return Scene(number(drawn.hidden).requires_grad_(), head, teacher, drawn.targets.to(device))

    return with_numbers(torch.float32), with_numbers(torch.float32, torch.float64)


def passed(
    scene: Scene, signal: TeacherSignal | None, terms: list[Any], **more: Any
) -> tuple[HeadPassResult, list[Tensor]]:
    """A pass, and its gradients."""
    result = head_pass(scene.hidden, scene.head, signal, terms, chunk_tokens=8, **more)
    return result, scene.gradients(result.total)


def assert_equal_passes(
    scenes: tuple[Scene, Scene],
    signals: tuple[Any, Any],
    terms: list[Any],
    *,
    backend: str,
    rtol: float,
    extras: tuple[str, ...] = (),
) -> None:
    """A backend in float32 finds what "torch" finds in float64."""
    found, gradients = passed(scenes[0], signals[0], terms, extras=extras, backend=backend)
    expected, exact = passed(scenes[1], signals[1], terms, extras=extras, backend="torch")
    for name, part in expected.parts.items():
        torch.testing.assert_close(found.parts[name].double(), part, rtol=rtol, atol=1e-6)
    for name, extra in expected.extras.items():
        torch.testing.assert_close(found.extras[name].double(), extra, rtol=1e-5, atol=1e-6)
    assert_same_gradients([g.double() for g in gradients], exact, rtol=rtol)


def on_logits(
    name: str, own: dict[str, float], student: Tensor, teacher: Tensor, *, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss of each position, and the gradient of their sum by the student's logits."""
    rows, head = slice(0, len(student)), Head(student.new_zeros(student.shape[1], 1))
    task = Task(head, DenseSignal(teacher), (DivergenceTerm("one", resolve_loss(name, **own)),), len(student), (), None)
    tally = Tally.zeros(task, len(student), like=student)
    solver = solver_for(backend, task, like=student)
    gradient = solver.gradient(student.clone(), task.signal, task, rows=rows, tally=tally, form=True)
    assert gradient is not None
    return tally.values[0], gradient

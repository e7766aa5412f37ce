"""The student-aware router against a loop over units, and what keeps it from choosing the easiest target."""

import math
from typing import Any

import pytest
import torch
from dense import on_each_device
from torch import Tensor

from kdkit.losses.routing import RoutingResult, StudentAwareRouter, load_balance

HS, H, E, K = 5, 7, 6, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(n: int = 8, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Units with k different experts each, most likely first."""
    probs, ids = (2 * draw(n, E, seed=seed)).softmax(-1).topk(K)
    return {
        "student": draw(n, HS, seed=seed + 1).to(dtype),
        "projected": draw(n, H, seed=seed + 2).to(dtype),
        "gates": probs.to(dtype),
        "ids": ids,
        "outputs": draw(n, K, H, seed=seed + 3).to(dtype),
    }


def make_router(*, trained: bool = False, kind: str = "cosine") -> StudentAwareRouter:
    """At its start, or with random weights as after training."""
    router = StudentAwareRouter(HS, E, kind=kind).double()
    if trained:
        for seed, parameter in enumerate(router.parameters()):
            parameter.data = draw(*parameter.shape, seed=50 + seed)
    return router


def route(router: StudentAwareRouter, inputs: dict[str, Tensor], **changed: Any) -> RoutingResult:
    options = {"active": float(K), **inputs, **changed}
    return router(options.pop("student"), options.pop("projected"), **options)


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def naive(router: StudentAwareRouter, inputs: dict[str, Tensor], active: float) -> dict[str, list]:
    """Everything the docstring says, unit by unit."""
    weight, bias = router.capacity.weight.tolist(), router.capacity.bias.tolist()
    slope = router.slope.tolist()
    found: dict[str, list] = {"weights": [], "distance": [], "anchor": []}
    for n in range(len(inputs["ids"])):
        s, z = inputs["student"][n].tolist(), inputs["projected"][n].tolist()
        rms = math.sqrt(sum(x * x for x in s) / len(s))
        ours, teachers = [], []
        for j in range(K):
            mask = min(max(active - j, 0.0), 1.0)
            gate, expert = mask * inputs["gates"][n, j].item(), inputs["ids"][n, j].item()
            gap = 1 - cosine(z, inputs["outputs"][n, j].tolist())
            capacity = sum(w * x / rms for w, x in zip(weight[expert], s, strict=True)) + bias[expert]
            teachers.append(gate)
            ours.append(gate * math.exp(capacity + slope[expert] * gap))
        w, p = ([x / sum(side) for x in side] for side in (ours, teachers))
        mixture = [sum(w[j] * inputs["outputs"][n, j, h].item() for j in range(K)) for h in range(H)]
        if router.kind == "cosine":
            distance = 1 - cosine(z, mixture)
        else:
            squares = [sum(x * x for x in side) for side in (z, mixture)]
            distance = sum((a - b) ** 2 for a, b in zip(z, mixture, strict=True)) / max(squares)
        found["weights"].append(w)
        found["distance"].append(distance)
        found["anchor"].append(sum(a * math.log(a / b) for a, b in zip(p, w, strict=True) if a > 0))
    return found


class TestStudentAwareRouter:
    @on_each_device
    @pytest.mark.parametrize("kind", ["cosine", "mse"])
    @pytest.mark.parametrize("active", [1.0, 1.3, 2.0, 3.9, 4.0])
    def test_equals_a_loop_over_units(self, active: float, kind: str, device: str) -> None:
        router, inputs = make_router(trained=True, kind=kind), make_inputs()
        expected = naive(router, inputs, active)
        found = route(router.to(device), {name: x.to(device) for name, x in inputs.items()}, active=active)
        for name, values in expected.items():
            torch.testing.assert_close(getattr(found, name).cpu(), torch.tensor(values, dtype=torch.float64))
        assert found.num_units == 8

    @pytest.mark.parametrize("active", [1.0, 2.5, 4.0])
    def test_starts_as_the_teachers_own_mixture(self, active: float) -> None:
        router, inputs = make_router(), make_inputs()
        found = route(router, inputs, active=active)
        mask = torch.tensor([1.0, *[min(max(active - j, 0.0), 1.0) for j in (1, 2, 3)]])
        own = inputs["gates"] * mask
        torch.testing.assert_close(found.weights, own / own.sum(1, keepdim=True))
        assert (found.anchor == 0).all()

    def test_active_is_continuous_and_experts_join_one_after_the_other(self) -> None:
        router, inputs = make_router(trained=True), make_inputs()
        weights = {a: route(router, inputs, active=a).weights for a in (1.0, 2.0, 2.0 + 1e-9, 2.5, 3.0 - 1e-9, 3.0)}
        assert torch.equal(weights[1.0], torch.eye(4, dtype=torch.float64)[0].expand(8, 4))
        assert ((weights[2.0] > 0).sum(1) == 2).all()
        assert ((weights[2.5] > 0).sum(1) == 3).all()
        for near in ((2.0, 2.0 + 1e-9), (3.0, 3.0 - 1e-9)):
            torch.testing.assert_close(weights[near[0]], weights[near[1]], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("part", ["distance", "anchor", "load_balance"])
    def test_gradcheck_on_the_routers_parameters(self, part: str) -> None:
        router, inputs = make_router(trained=True), make_inputs(4)
        assert torch.autograd.gradcheck(
            lambda *_: getattr(route(router, inputs, active=2.5), part), tuple(router.parameters())
        )

    def test_the_student_is_pulled_to_the_mixture_and_cannot_steer_the_router(self) -> None:
        router, inputs = make_router(trained=True), make_inputs()
        for name in ("student", "projected", "gates", "outputs"):
            inputs[name].requires_grad_()
        found = route(router, inputs)
        (found.distance.sum() + found.anchor.sum() + found.load_balance).backward()
        for name in ("student", "gates", "outputs"):
            assert inputs[name].grad is None
        mixture = torch.einsum("nk,nkh->nh", found.weights, inputs["outputs"].detach())
        alone = inputs["projected"].detach().requires_grad_()
        (1 - torch.cosine_similarity(alone, mixture)).sum().backward()
        torch.testing.assert_close(inputs["projected"].grad, alone.grad)

    def test_the_anchor_keeps_the_router_from_the_easiest_target(self) -> None:
        inputs = make_inputs(64)
        inputs["projected"] = inputs["outputs"][:, 3].clone()  # the least likely expert is what the student is already
        ends = {}
        for coefficient in (0.0, 1.0):
            router = make_router()
            optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
            for _ in range(200):
                optimizer.zero_grad()
                found = route(router, inputs)
                (found.distance.mean() + coefficient * found.anchor.mean()).backward()
                optimizer.step()
            ends[coefficient] = route(router, inputs)
        start = route(make_router(), inputs)
        assert start.weights[:, 3].mean() < 0.1 < 0.6 < ends[0.0].weights[:, 3].mean()
        assert ends[1.0].anchor.mean() < 0.3 < 1.0 < ends[0.0].anchor.mean()
        assert ends[1.0].distance.mean() < start.distance.mean()

    @pytest.mark.parametrize("kind", ["cosine", "mse"])
    def test_value_and_gradient_are_zero_where_the_student_is_the_target(self, kind: str) -> None:
        router, inputs = make_router(kind=kind), make_inputs()
        projected = inputs["outputs"][:, 0].clone().requires_grad_()
        found = route(router, inputs, projected=projected, active=1.0)
        found.distance.sum().backward()
        assert found.distance.abs().max() < 1e-12
        assert projected.grad.abs().max() < 1e-6

    def test_units_do_not_see_each_other(self) -> None:
        router, inputs = make_router(trained=True), make_inputs()
        together = route(router, inputs, active=2.5)
        for n in range(8):
            alone = route(router, {name: x[n : n + 1] for name, x in inputs.items()}, active=2.5)
            for part in ("distance", "anchor", "weights"):
                torch.testing.assert_close(getattr(alone, part)[0], getattr(together, part)[n])

    @pytest.mark.parametrize(
        ("n", "student_size", "size", "num_experts", "k"),
        [(1, 8, 8, 2, 1), (5, 16, 64, 8, 4), (40, 64, 16, 60, 4), (300, 576, 1024, 8, 4), (7, 768, 32, 128, 8)],
    )
    @pytest.mark.parametrize("kind", ["cosine", "mse"])
    def test_is_of_order_one_for_any_pair(
        self, n: int, student_size: int, size: int, num_experts: int, k: int, kind: str
    ) -> None:
        router = StudentAwareRouter(student_size, num_experts, kind=kind)
        gates, ids = draw(n, num_experts).float().softmax(-1).topk(k)
        found = router(
            1e3 * draw(n, student_size, seed=1).float(),
            1e3 * draw(n, size, seed=2).float(),
            gates=gates,
            ids=ids,
            outputs=1e-3 * draw(n, k, size, seed=3).float(),
            active=k,
        )
        for part in (found.distance, found.anchor, found.load_balance):
            assert part.isfinite().all()
            assert (part <= 4).all()

    def test_large_student_states_do_not_throw_the_router(self) -> None:
        # A linear layer on raw states of size 1e3 would saturate the softmax after one step.
        router, inputs = make_router(trained=True), make_inputs()
        small, large = (route(router, inputs, student=scale * inputs["student"]) for scale in (1.0, 1e3))
        torch.testing.assert_close(small.weights, large.weights, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_and_autocast_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        router, inputs = make_router(trained=True).float(), make_inputs(dtype=dtype)
        inputs["projected"].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = route(router, inputs, active=2.5)
        found.distance.sum().backward()
        precise = {name: x.detach().double() if x.is_floating_point() else x for name, x in inputs.items()}
        exact = route(make_router(trained=True), precise, active=2.5)
        assert inputs["projected"].grad.dtype == dtype
        for part in ("distance", "anchor", "load_balance", "weights"):
            assert getattr(found, part).dtype == torch.float32
            torch.testing.assert_close(getattr(found, part).double(), getattr(exact, part), rtol=1e-4, atol=1e-5)

    def test_zero_states_outputs_and_gates_are_finite(self) -> None:
        router, inputs = make_router(trained=True), make_inputs(3)
        inputs["student"][0], inputs["outputs"][0], inputs["gates"][0] = 0, 0, 0
        inputs["projected"][1] = 0
        inputs["projected"].requires_grad_()
        found = route(router, inputs)
        (found.distance.sum() + found.anchor.sum()).backward()
        for tensor in (found.distance, found.anchor, inputs["projected"].grad, *(p.grad for p in router.parameters())):
            assert tensor.isfinite().all()

    def test_no_unit_is_zero_with_a_gradient_of_zero(self) -> None:
        router, inputs = make_router(), make_inputs(3)
        found = route(router, {name: x[:0] for name, x in inputs.items()})
        (found.distance.sum() + found.anchor.sum() + found.load_balance).backward()
        assert found.num_units == 0
        assert found.load_balance == 0
        assert all((p.grad == 0).all() for p in router.parameters())

    @pytest.mark.parametrize("active", [0.5, 4.1])
    def test_refuses_active_out_of_range(self, active: float) -> None:
        with pytest.raises(ValueError, match="1 to 4"):
            route(make_router(), make_inputs(), active=active)

    def test_refuses_shapes_that_do_not_fit(self) -> None:
        inputs = make_inputs()
        with pytest.raises(ValueError, match=r"\(n, k, H\)"):
            route(make_router(), inputs, outputs=inputs["outputs"][:, :, :3])
        with pytest.raises(ValueError, match="'l1'"):
            StudentAwareRouter(HS, E, kind="l1")


class TestLoadBalance:
    def one_hot(self, experts: list[int]) -> tuple[Tensor, Tensor]:
        """Weights (n, 2) all on the first of two experts."""
        first = torch.tensor(experts)
        return torch.tensor([[1.0, 0.0]]).expand(len(experts), 2), torch.stack([first, (first + 1) % 4], 1)

    def test_zero_when_even_one_when_all_go_to_one(self) -> None:
        assert load_balance(*self.one_hot([0, 1, 2, 3]), 4).item() == pytest.approx(0.0)
        assert load_balance(*self.one_hot([2, 2, 2]), 4).item() == pytest.approx(1.0)

    def test_equals_switch_transformers_formula_brought_to_zero_and_one(self) -> None:
        inputs = make_inputs(12)
        weights = inputs["gates"] / inputs["gates"].sum(1, keepdim=True)
        fractions, means = [0.0] * E, [0.0] * E
        for n in range(12):
            row = weights[n].tolist()
            fractions[inputs["ids"][n, row.index(max(row))]] += 1 / 12
            for j in range(K):
                means[inputs["ids"][n, j]] += row[j] / 12
        switch = E * sum(f * p for f, p in zip(fractions, means, strict=True))
        assert load_balance(weights, inputs["ids"], E).item() == pytest.approx((switch - 1) / (E - 1))

    def test_gradient_moves_weight_away_from_the_crowded_expert(self) -> None:
        logits = torch.zeros(4, 2, requires_grad=True)
        ids = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]])
        load_balance(logits.softmax(1) + torch.tensor([1e-3, 0.0]), ids, 4).backward()
        assert (logits.grad[:, 0] > 0).all()

    def test_one_expert_is_always_balanced(self) -> None:
        assert load_balance(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64), 1) == 0

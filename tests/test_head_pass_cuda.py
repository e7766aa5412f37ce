"""Backend "cuda" of the head pass, beside what test_head_pass_compiled.py asks of every compiled one.

Its kernels run on the CPU; only tests marked `gpu` run them on a card.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from dense import make_scene
from passes import make_scenes, passed
from torch import Tensor

from kdkit.cuda import Argument, CudaUnavailable, Module
from kdkit.losses import DivergenceTerm, LabelTerm, autograd, blocks, cuda, forward_kl, head_pass, skew_reverse_kl
from kdkit.losses.compiled_forms import Kind, Plan, plan_of
from kdkit.losses.terms import ScaledGradient, Tally, Task, Term
from kdkit.teacher.kept import TopKSignal
from kdkit.teacher.signal import DenseSignal, Head, TeacherSignal

KD = DivergenceTerm("kd", skew_reverse_kl, temperature=2.0)
CPU = torch.device("cpu")


def task_of(logits: Tensor, terms: tuple[Term, ...], signal: TeacherSignal | None, *extras: str) -> Task:
    return Task(Head(logits.new_zeros(logits.shape[1], 1)), signal, terms, len(logits), extras, None)


def solved(
    logits: Tensor, task: Task, launcher: cuda.Launcher | None, *, form: bool = True
) -> tuple[Tally, Tensor | ScaledGradient | None]:
    """What the kernels find, without a launcher what torch finds; they may write over the logits."""
    tally, plan = Tally.zeros(task, len(logits), like=logits), plan_of(task)
    assert isinstance(plan, Plan)
    gradient = partial(cuda.block_gradient, plan=plan, launcher=launcher) if launcher else autograd.block_gradient
    return tally, gradient(logits, task.signal, task, rows=slice(0, len(logits)), tally=tally, form=form)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestKernel:
    @pytest.mark.parametrize("threads", [1, 2, 7, 33])
    @pytest.mark.parametrize("num_kept", [0, 3])
    def test_any_number_of_threads_finds_the_same(
        self, threads: int, num_kept: int, emulated_losses: cuda.Launcher
    ) -> None:
        logits, teacher = drawn(2, 3, 77)
        signal = TopKSignal.from_logits(teacher, num_kept, [2.0]) if num_kept else DenseSignal(teacher)
        task = task_of(logits, (KD, LabelTerm("lm", torch.tensor([0, 76, 31]))), signal, "teacher_entropy")
        exact, gradient = solved(logits, task, None)
        tally, found = solved(logits.clone(), task, replace(emulated_losses, most_threads=threads))
        torch.testing.assert_close(tally.values, exact.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tally.extras, exact.extras, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)

    def test_the_gradient_takes_the_logits_place(self, emulated_losses: cuda.Launcher) -> None:
        for dtype in cuda.KERNELS:
            logits, teacher = drawn(2, 3, 40).to(dtype)
            before = teacher.clone()
            _, found = solved(logits, task_of(logits, (KD,), DenseSignal(teacher)), emulated_losses)
            assert (found.units if isinstance(found, ScaledGradient) else found) is logits
            assert torch.equal(teacher, before)

    def test_without_a_gradient_the_logits_stay(self, emulated_losses: cuda.Launcher) -> None:
        logits, teacher = drawn(2, 3, 40)
        task, before = task_of(logits, (KD,), DenseSignal(teacher)), logits.clone()
        tally, found = solved(logits, task, emulated_losses, form=False)
        assert found is None
        assert torch.equal(logits, before)
        assert torch.equal(tally.values, solved(logits, task, emulated_losses)[0].values)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_read_as_it_is(self, dtype: torch.dtype, emulated_losses: cuda.Launcher) -> None:
        every = torch.arange(-(2**15), 2**15, 41).to(torch.int16).view(dtype)
        logits = torch.stack([every, torch.zeros_like(every)], 1)
        task = task_of(logits, (LabelTerm("lm", torch.zeros(len(every), dtype=torch.int64)),), None)
        expected, _ = solved(logits, task, None)
        tally, _ = solved(logits.clone(), task, emulated_losses)
        finite = every.isfinite()
        torch.testing.assert_close(tally.values[:, finite], expected.values[:, finite])
        assert not tally.values[:, ~finite].isfinite().any()

    @pytest.mark.parametrize("weight", [1.0, 1e-7, 1e-30])
    @pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133)])
    def test_half_precision_is_written_to_the_nearest(
        self, dtype: torch.dtype, least: float, weight: float, emulated_losses: cuda.Launcher
    ) -> None:
        logits = drawn(5, 300).to(dtype)  # entries down to 1e-9 of the largest
        term = LabelTerm("lm", torch.arange(5), token_weights=torch.full((5,), weight, dtype=torch.float64))
        task = task_of(logits, (term,), None)
        _, exact = solved(logits.double(), task, None)
        _, found = solved(logits, task, emulated_losses)
        assert isinstance(found, ScaledGradient)
        assert isinstance(exact, Tensor)
        units = exact / found.row_scale
        digits = torch.finfo(dtype).eps * units.abs()
        step = digits.where(units.abs() >= torch.finfo(dtype).tiny, 0).clamp_min(least)  # at most
        assert ((found.units.double() - units).abs() <= 0.5 * step + 1e-5 * units.abs()).all()
        if dtype == torch.float16:
            largest = units.abs().amax(-1)
            assert ((largest > 0.999) & (largest < 2.001)).all()

    def test_a_teacher_in_another_dtype_is_compared_in_float32(self, emulated_losses: cuda.Launcher) -> None:
        logits, teacher = drawn(2, 3, 40)
        for ours, theirs in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
            task = task_of(logits.to(ours), (KD,), DenseSignal(teacher.to(theirs)))
            expected, gradient = solved(logits.to(ours), task, None)
            tally, found = solved(logits.to(ours), task, emulated_losses)
            torch.testing.assert_close(tally.values, expected.values, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)

    def test_the_rest_may_have_no_mass(self, emulated_losses: cuda.Launcher) -> None:
        sides = drawn(2, 3, 40)
        sides[:, :, 4:] = -math.inf
        task = task_of(sides[0], (KD,), TopKSignal.from_logits(sides[1], 4, [2.0]))
        expected, gradient = solved(sides[0], task, None)
        tally, found = solved(sides[0].clone(), task, emulated_losses)
        torch.testing.assert_close(tally.values, expected.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("target", [-100, 40])
    def test_a_label_that_is_no_id_is_not_a_number(self, target: int, emulated_losses: cuda.Launcher) -> None:
        task = task_of(drawn(2, 40), (LabelTerm("lm", torch.tensor([0, target])),), None)
        tally, _ = solved(drawn(2, 40), task, emulated_losses)
        assert tally.values.isfinite().tolist() == [[True, False]]

    def test_no_positions_are_no_launch(self, emulated_losses: cuda.Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(blocks.COMPILED, "cuda", partial(emulated.losses_solver, launcher=emulated_losses))
        scene = make_scene(torch.float32, num_positions=0)
        assert head_pass(scene.hidden, scene.head, scene.signal, [KD], backend="cuda").total == 0


class TestCompiled:
    @pytest.mark.parametrize("capability", emulated.CAPABILITIES)
    def test_the_kernels_compile_for_every_card_from_a_p100_on(
        self, capability: tuple[int, int], tmp_path: Path
    ) -> None:
        emulated.check_compiles(cuda.SOURCE, list(cuda.KERNELS.values()), capability=capability, folder=tmp_path)

    def test_source_and_host_have_the_same_kinds(self) -> None:
        source = cuda.SOURCE.read_text(encoding="utf-8")
        assert f"enum Kind {{ {', '.join(kind.name for kind in Kind)} }};" in source
        assert f"MOST_GROUPS = {cuda.MOST_GROUPS}, MOST_TERMS = {cuda.MOST_TERMS};" in source
        assert source.count(f"__launch_bounds__({cuda.MOST_THREADS})") == len(cuda.KERNELS)


class TestAgreesWithTorch:
    @pytest.mark.parametrize("skipped", [None, *cuda.KERNELS.values()])
    def test_kernels_that_do_not_find_what_torch_finds_are_not_used(
        self, skipped: str | None, emulated_losses: cuda.Launcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launch = Module.launch

        def lossy(module: Module, kernel: str, *arguments: Argument, **options: Any) -> None:
            if kernel != skipped:
                launch(module, kernel, *arguments, **options)

        monkeypatch.setattr(Module, "launch", lossy)
        monkeypatch.setattr(cuda, "launcher", lambda device: emulated_losses)
        assert cuda.agrees_with_torch(emulated_losses, CPU) == (skipped is None)
        assert ("do not find" in (cuda.problem(CPU) or "")) == (skipped is not None)

    def test_what_cannot_be_loaded_is_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(device: torch.device) -> cuda.Launcher:
            raise CudaUnavailable("no NVRTC was found")

        monkeypatch.setattr(cuda, "launcher", refuse)
        assert cuda.problem(CPU) == "no NVRTC was found"


@dataclass(frozen=True)
class OnCard:
    """What the choice looks at of a tensor on a card."""

    device = torch.device("cuda", 0)
    dtype: torch.dtype = torch.bfloat16

    def detach(self) -> Tensor:
        return torch.zeros(0)


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    blocks._say_once.cache_clear()
    blocks._problem.cache_clear()
    yield
    blocks._say_once.cache_clear()
    blocks._problem.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
class TestChoice:
    @pytest.mark.parametrize(("problem", "name"), [(None, "cuda"), ("no NVRTC was found", "torch")])
    def test_a_card_gets_the_kernels_where_they_run_and_else_the_log_says_why_not(
        self,
        problem: str | None,
        name: str,
        emulated_losses: cuda.Launcher,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(cuda, "problem", lambda device: problem)
        monkeypatch.setattr(cuda, "launcher", lambda device: emulated_losses)
        task, like = task_of(drawn(2, 40), (KD,), DenseSignal(drawn(2, 40))), OnCard()
        with caplog.at_level(logging.INFO, logger="kdkit.losses"):
            solvers = [blocks.solver_for(None, task, like=like) for _ in range(2)]  # type: ignore[arg-type]
        assert all((solver.gradient is autograd.block_gradient) == (name == "torch") for solver in solvers)
        (message,) = caplog.messages
        assert repr(name) in message
        assert (problem or "compiled for this card") in message
        if problem:
            with pytest.raises(ValueError, match=problem):
                blocks.solver_for("cuda", task, like=like)  # type: ignore[arg-type]

    def test_what_the_kernel_has_no_room_for_is_refused_by_its_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "problem", lambda device: None)
        logits = drawn(2, 40)
        many = tuple(replace(KD, name=f"kd{index}") for index in range(9))
        warm = tuple(replace(KD, name=f"kd{index}", temperature=1.0 + index) for index in range(5))
        wide = torch.zeros(1, 1).expand(400_000, 1)
        kept = TopKSignal(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2, 1), 400_000)
        tasks = {
            "9 terms at 1 temperatures": task_of(logits, many, DenseSignal(logits)),
            "5 terms at 5 temperatures": task_of(logits, warm, DenseSignal(logits)),
            "400000 ids": replace(task_of(logits, (KD,), kept), head=Head(wide)),
        }
        for reason, task in tasks.items():
            with pytest.raises(ValueError, match=reason):
                blocks.solver_for("cuda", task, like=OnCard())  # type: ignore[arg-type]

    def test_the_cpu_and_float64_are_refused_by_name(self) -> None:
        for scene, what in zip(make_scenes(), ("float32 on cpu", "float64 on cpu"), strict=True):
            with pytest.raises(ValueError, match=f'"cuda".*{what}|.cuda. cannot do this pass.*{what}'):
                passed(scene, scene.signal, [KD], backend="cuda")
        task = task_of(drawn(2, 40), (KD,), None)
        with pytest.raises(ValueError, match="float64 on cuda"):
            blocks.solver_for("cuda", task, like=OnCard(torch.float64))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCard:
    @pytest.mark.parametrize("num_kept", [0, 64])
    @pytest.mark.parametrize("dtype", list(cuda.KERNELS))
    def test_a_whole_vocabulary_equals_float64(self, dtype: torch.dtype, num_kept: int) -> None:
        logits, teacher = drawn(2, 9, 151_936).to("cuda", dtype)
        signal = TopKSignal.from_logits(teacher, num_kept, [2.0]) if num_kept else DenseSignal(teacher)
        exact_signal = signal if num_kept else DenseSignal(teacher.double())
        terms = (KD, LabelTerm("lm", torch.arange(9, device="cuda")))
        expected, gradient = solved(logits.double(), task_of(logits, terms, exact_signal), None)
        tally, found = solved(logits.clone(), task_of(logits, terms, signal), cuda.launcher(logits.device))
        torch.testing.assert_close(tally.values.double(), expected.values, rtol=1e-4, atol=1e-5)
        found = found.units * found.row_scale if isinstance(found, ScaledGradient) else found
        assert isinstance(found, Tensor)
        assert isinstance(gradient, Tensor)
        assert (found - gradient).norm() <= max(1e-4, torch.finfo(dtype).eps) * gradient.norm()

    def test_the_host_never_waits(self) -> None:
        scene, _ = make_scenes("cuda")
        terms = [KD, DivergenceTerm("cover", forward_kl), LabelTerm("lm", scene.targets)]
        passed(scene, scene.signal, terms, backend="cuda")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found, _ = passed(scene, scene.signal, terms, backend="cuda")
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert found.total.isfinite()

    def test_runs_on_the_current_stream(self) -> None:
        scene, exact = make_scenes("cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found, _ = passed(scene, scene.signal, [KD], backend="cuda")
        stream.synchronize()
        expected, _ = passed(exact, exact.signal, [KD], backend="torch")
        torch.testing.assert_close(found.total.double(), expected.total, rtol=1e-5, atol=0)

    def test_it_is_what_a_card_gets(self, caplog: pytest.LogCaptureFixture) -> None:
        blocks._say_once.cache_clear()
        scene, _ = make_scenes("cuda")
        with caplog.at_level(logging.INFO, logger="kdkit.losses"):
            passed(scene, scene.signal, [KD])
        assert "'cuda': its kernels are compiled for this card" in caplog.text

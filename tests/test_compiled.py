"""Loops that numba compiles: where their code is kept, that it is the same each time, and how threads share them."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from passes import FORMS
from torch import Tensor

from kdkit import compiled
from kdkit.losses import DivergenceTerm, LabelTerm, head_pass, resolve_loss
from kdkit.losses.cross_native import compare, group_logprobs
from kdkit.softdtw import soft_dtw_and_alignment
from kdkit.teacher.kept import TopKSignal
from kdkit.teacher.signal import DenseSignal, Head

pytestmark = pytest.mark.skipif(not compiled.is_installed(), reason="needs numba")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def passed_losses() -> list[Tensor]:
    """Every loss at once over all ids, and over the teacher's kept ones."""
    targets = torch.arange(40)
    terms = [DivergenceTerm(f"{name}{own}", resolve_loss(name, **own), temperature=1.5) for name, own in FORMS]
    found = []
    for signal in (DenseSignal(drawn(40, 1300)), TopKSignal.from_logits(drawn(40, 1300), 12, [1.0, 1.5])):
        hidden = drawn(40, 32).requires_grad_()
        result = head_pass(hidden, Head(drawn(1300, 32)), signal, [*terms, LabelTerm("lm", targets)], backend="native")
        result.total.backward()
        found += [result.total.detach(), hidden.grad]
    return found


def aligned() -> list[Tensor]:
    cost = drawn(3, 150, 170).abs().requires_grad_()
    value, alignment = soft_dtw_and_alignment(cost, gamma=0.1, band=20, backend="native")
    value.sum().backward()
    return [value.detach(), alignment, cost.grad]


def compared() -> list[Tensor]:
    ids = torch.arange(300), torch.arange(300, 1300)
    given = drawn(6, 1300).requires_grad_()
    student, teacher = (side.log_softmax(-1) for side in (given, drawn(6, 1300, 1)[..., 0]))
    columns, _, distance = compare(
        student, teacher, student_ids=ids, teacher_ids=ids, with_bucket=True, with_distance=True
    )
    (columns.sum() + distance.sum()).backward()
    return [columns.detach(), distance.detach(), given.grad]


def grouped() -> list[Tensor]:
    given = drawn(6, 1300).requires_grad_()
    places = {"members": torch.arange(600), "starts": torch.arange(0, 601, 3), "free": torch.arange(600, 1300)}
    found = group_logprobs(given.log_softmax(-1), **places)
    found.square().sum().backward()
    return [found.detach(), given.grad]


def print_figures(order: int) -> None:
    """A line for each family of loops, in this order or the other: all bytes that it gave."""
    families: list[Callable[[], list[Tensor]]] = [passed_losses, aligned, compared, grouped]
    for family in families[::order]:
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in family()))
        print(family.__name__, digest.hexdigest())


def print_functions() -> None:
    """All functions of the package that the compiled code of another one has a copy of."""
    from numba.core.dispatcher import Dispatcher

    from kdkit.losses import _cross_kernels, _group_kernels, _kernels
    from kdkit.softdtw import _kernels as _dtw_kernels

    for module in (_cross_kernels, _group_kernels, _kernels, _dtw_kernels):
        for function in vars(module).values():
            for code in function.inspect_llvm().values() if isinstance(function, Dispatcher) else ():
                print("code")
                print(*re.findall(r"^define linkonce_odr [^@]*@(_ZN5kdkit[^(]*)", code, re.MULTILINE), sep="\n")


class TestKeptCode:
    def test_what_compiles_finds_the_same_bits_as_what_loads_in_any_order(self, tmp_path: Path) -> None:
        root = Path(__file__).parent
        environment = {
            **os.environ,
            "NUMBA_CACHE_DIR": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(root), str(root.parent), *sys.path]),
        }

        def run(calls: str) -> list[str]:
            code = f"import test_compiled as it; {calls}"
            return subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                timeout=300,
                check=True,
                stdout=subprocess.PIPE,
                encoding="utf-8",
            ).stdout.split("\n")

        compiling = run("it.print_figures(1); it.print_functions()")
        figures, functions = sorted(compiling[:4]), compiling[4:]
        assert functions.count("code") >= 8
        assert [line for line in functions if line not in ("", "code")] == []
        assert [sorted(run(f"it.print_figures({order})")) for order in (1, -1)] == [["", *figures]] * 2

    def test_runs_where_numba_has_no_folder_to_keep_its_code(self) -> None:
        names: dict[str, object] = {}
        exec("def twice(x):\n    return x + x", names)  # without a file there is no place beside it
        assert compiled.compiled()(names["twice"])(21) == 42

    def test_code_is_kept_in_the_first_folder_that_can_be_written_to(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from numba import config

        (tmp_path / "file").touch()
        package, home, named = tmp_path / "package", tmp_path / "home", tmp_path / "named"
        monkeypatch.setattr(config, "CACHE_DIR", "")
        found = []
        for own, cache_home in ((package, home), (tmp_path / "file", home), (tmp_path / "file", tmp_path / "file")):
            monkeypatch.setattr(compiled, "PACKAGE", own)
            monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
            folder = compiled._folder.__wrapped__()
            found.append(None if folder is None else folder.parent)
        assert found == [package / "__pycache__", home / "kdkit", None]
        monkeypatch.setattr(config, "CACHE_DIR", str(named))
        assert compiled._folder.__wrapped__().parent == named
        assert compiled.compiled()(lambda x: x + 1)(1) == 2

    def test_a_change_in_any_file_of_loops_compiles_all_of_them_anew(self, tmp_path: Path) -> None:
        from kdkit.softdtw import _kernels

        assert compiled.digest(compiled.PACKAGE) in _kernels.solve.stats.cache_path
        for name in ("__init__.py", "_loops.py", "inner/_more.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("one")
        before = compiled.digest(tmp_path)
        (tmp_path / "__init__.py").write_text("two")
        assert compiled.digest(tmp_path) == before
        (tmp_path / "inner/_more.py").write_text("two")
        assert compiled.digest(tmp_path) != before


class TestThreads:
    def test_threads_share_any_iterable(self) -> None:
        seen: list[int] = []
        chunks = ((number, number + 1) for number in range(20_000))
        compiled.share_out(lambda begin, end, thread: seen.append(begin), chunks, 4)
        assert sorted(seen) == list(range(20_000))

    def test_every_turn_is_taken_once_by_some_thread(self) -> None:
        from kdkit import _turns as turns

        @compiled.compiled()
        def count(turns_left: "turns.Array", counts: "turns.Array") -> None:
            item = turns.next_turn(turns_left)
            while item < len(counts):
                counts[item] += 1
                turns.finish(turns_left)
                item = turns.next_turn(turns_left)

        for num_items in (0, 1, 3, 100_000):
            counts = np.zeros(num_items, np.int64)
            turns.take_turns(lambda own, _, counts=counts: count(own, counts), num_items, 4)
            assert (counts == 1).all()

    def test_what_fails_in_a_helper_is_raised(self) -> None:
        from kdkit import _turns as turns

        begun = threading.Event()

        def fail(_turns: object, thread: int) -> None:
            if thread > 0:
                begun.set()
                raise MemoryError("no room")
            begun.wait()

        with pytest.raises(MemoryError, match="no room"):
            turns.take_turns(fail, 1, 2)

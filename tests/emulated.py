"""kdkit's CUDA kernels on the CPU: a source of them, compiled by g++ into a driver whose device is this machine."""

import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from kdkit.cuda import CudaUnavailable, nvrtc
from kdkit.losses import blocks, cuda
from kdkit.losses.compiled_forms import plan_of
from kdkit.losses.terms import Task

SOURCE = Path(__file__).parent / "emulated_cuda" / "driver.cpp"
CUBIN = b"emulated"
"""All that this driver takes for machine code."""
CAPABILITIES = [(6, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)]
"""Of the cards that every source has to compile for: P100, P40, V100, T4, A100, A10, L4, H100."""

COMPILER = shutil.which("g++")


def build_driver(folder: Path, source: Path, kernels: Sequence[str], *options: str) -> Path:
    """The shared library of the driver for the kernels of a source, in a folder; skips the test without g++."""
    if COMPILER is None:
        pytest.skip("needs g++")
    library = folder / "libcuda.so"
    own = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread"]
    own += [f'-DSOURCE="{source}"', f"-DKERNELS={' '.join(f'ENTRY({kernel})' for kernel in kernels)}"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [COMPILER, *own, *warnings, *options, str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    return library


def skip_without_compiler(capability: tuple[int, int]) -> None:
    """Skip the test where no NVRTC is installed that knows a card."""
    try:
        nvrtc._library_for(capability)
    except CudaUnavailable as error:
        pytest.skip(str(error))


def check_compiles(source: Path, kernels: Sequence[str], *, capability: tuple[int, int], folder: Path) -> None:
    """NVRTC makes machine code of a source, and all its kernels are there."""
    skip_without_compiler(capability)
    text = source.read_text(encoding="utf-8")
    cubin = nvrtc.compiled(text, capability=capability, name=source.name, folder=folder)
    assert cubin.startswith(b"\x7fELF")
    assert all(b".text." + kernel.encode() + b"\0" in cubin for kernel in kernels)


def losses_solver(task: Task, _like: Tensor, *, launcher: cuda.Launcher) -> blocks.Solver | str:
    """An entry of `blocks.COMPILED` whose device is the CPU."""
    plan = plan_of(task)
    if isinstance(plan, str):
        return plan
    return blocks.Solver(partial(cuda.block_gradient, plan=plan, launcher=launcher), blocks.ALL_ENTRIES)

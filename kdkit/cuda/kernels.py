"""A source file's kernels on a device, compiled and loaded once; the stream that they join."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from kdkit.cuda.driver import Module
from kdkit.cuda.nvrtc import CudaUnavailable, compiled

Launcher = TypeVar("Launcher")
SHARED_BYTES = 48 * 1024
"""What every card lends a block without being asked."""


def load_kernels(source: Path, device: torch.device) -> Module:
    """The kernels of a source, compiled for a CUDA device and loaded there.

    Args:
        source: a file of CUDA C++ that includes nothing.
        device: of type "cuda"; without an index the current one.
    Returns:
        The same for every call of a process.
    Raises:
        CudaUnavailable: they cannot be compiled or loaded.
    """
    return _load(source, torch.cuda.current_device() if device.index is None else device.index)


@cache
def _load(source: Path, index: int) -> Module:
    if torch.version.cuda is None:
        raise CudaUnavailable("this torch was not built for CUDA")
    capability = torch.cuda.get_device_capability(index)
    name = f"{source.parent.name}-{source.name}"
    return Module(compiled(source.read_text(encoding="utf-8"), capability=capability, name=name), device=index)


def why_not(
    launcher: Callable[[torch.device], Launcher], agrees: Callable[[Launcher, torch.device], bool], device: torch.device
) -> str | None:
    """Why kernels are not for a CUDA device, None if they are; compiles and loads them, and tries them once.

    Args:
        launcher: the kernels on a device, or CudaUnavailable.
        agrees: whether they find there what backend "torch" finds.
        device: of type "cuda".
    """
    try:
        found = launcher(device)
    except CudaUnavailable as error:
        return str(error)
    return None if agrees(found, device) else 'its kernels do not find here what backend "torch" finds'


def stream_of(device: torch.device) -> int:
    """The number of the stream that torch's own kernels run on; 0 where there are none, as on a CPU.

    Args:
        device: where the tensors are.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

"""The most memory that a short run takes, measured, to be laid beside its plan."""

import ctypes
import gc
import io
import platform
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kdkit.config import DistillConfig
from kdkit.training.run import run_distillation

_SECONDS_BETWEEN_LOOKS = 0.002
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK_BYTES = 2**17
_STATM = Path("/proc/self/statm")


@dataclass
class Peak:
    """By how much memory grew at most."""

    num_bytes: int = 0
    """On a card the tensors' bytes, on a CPU the process's resident size; beyond what was there before."""


def measured_peaks(configs: Sequence[DistillConfig]) -> list[int]:
    """Make short runs one after another, each in a folder that is deleted, and measure what each adds to memory.

    The first is made twice: what is imported and set up on its way stays, and is no part of a step.

    Args:
        configs: the runs, a few steps each; what they print is not shown.
    Returns:
        Bytes of each at its fullest: tensors on a card, and on a CPU the growth of the process, which has the
        allocator's gaps and the libraries' buffers in it.
    Raises:
        UserError, RunFailed: as `run_distillation`.
    """
    peaks = []
    for config in [*configs[:1], *configs]:
        with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()), watched_memory() as peak:
            run_distillation(config, Path(folder) / "run")
        peaks.append(peak.num_bytes)
    return peaks[1:]


@contextmanager
def watched_memory() -> Iterator[Peak]:
    """Measure the peak of what runs within, on the first card or, without one, of this process.

    Yields:
        `Peak`, filled in at the end.
    """
    gc.collect()
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated() - before
        return
    _give_back()
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, done, _resident_bytes()), daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _watch(peak: Peak, done: threading.Event, before: int) -> None:
    while not done.wait(_SECONDS_BETWEEN_LOOKS):
        peak.num_bytes = max(peak.num_bytes, _resident_bytes() - before)


def _give_back() -> None:
    """Have freed memory returned to the system, large blocks at once: else the process is as large as it ever was."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
        libc.malloc_trim(0)


def _resident_bytes() -> int:
    """What the process holds now; where the system does not say, the most it ever held."""
    if _STATM.is_file():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

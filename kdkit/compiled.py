"""Loops that numba compiles for this CPU: whether they can be had, how they are compiled, who runs them.

numba is the extra "fast" and is imported at the first use alone. All that uses it has a path without. Files of loops
begin with an underscore.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
IN_ORDER = frozenset({"contract", "nsz"})
"""Of the "fast" rules of floating point those that change no value by more than a rounding."""
ANY_ORDER = IN_ORDER | {"reassoc"}
"""Sums may be taken in any order, always the same one. In neither is NaN assumed away."""


def is_installed() -> bool:
    """Whether numba can be found; it is not imported."""
    return find_spec("numba") is not None


def compiled(rules: frozenset[str] = IN_ORDER) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: a function that Python calls as machine code, kept on disk where a folder can be written to.

    Args:
        rules: what the compiler may do to floating point; those of a function hold within it alone.
    Returns:
        The decorator. What it makes runs without the GIL; a division by 0 is inf or NaN.
    """
    from numba import njit

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        if (folder := _folder()) is None:
            return njit(**_options(rules))(function)
        try:
            with _code_kept_in(folder):
                return njit(cache=True, **_options(rules))(function)
        except RuntimeError:  # a function without a file
            return njit(**_options(rules))(function)

    return compile_


def part(rules: frozenset[str] = IN_ORDER) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: a function that other compiled ones call, its code built into theirs.

    Left as a function of its own it would be there once for each that calls it, each with other roundings, and which
    of them ran would depend on what the process had compiled or loaded before.

    Args:
        rules: as in `compiled`.
    Returns:
        The decorator.
    """
    from numba import njit

    return njit(forceinline=True, **_options(rules))


def _options(rules: frozenset[str]) -> dict[str, Any]:
    return {"nogil": True, "error_model": "numpy", "fastmath": set(rules)}


@contextmanager
def _code_kept_in(folder: Path) -> Iterator[None]:
    """numba's own folders go by the one file that a function is written in, and the code of others is built into it."""
    from numba import config

    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


@cache
def _folder() -> Path | None:
    """Where the machine code of these loops is kept; None where no folder can be written to."""
    from numba import config

    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "kdkit"
    for parent in (Path(config.CACHE_DIR),) if config.CACHE_DIR else (PACKAGE / "__pycache__", user):
        try:
            folder = parent / f"kdkit-loops-{digest(PACKAGE)}"
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None


def digest(package: Path) -> str:
    """16 hex digits of all files of loops: their names begin with one underscore."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(package.rglob("_[!_]*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def share_out(task: Callable[[int, int, int], None], chunks: Iterable[tuple[int, int]], num_threads: int) -> None:
    """Run task(begin, end, thread) for every chunk, each thread taking what is next.

    Args:
        task: a compiled loop that runs without the GIL; thread counts from 0.
        chunks: begin and end of each.
        num_threads: at least 1, the caller's own included.
    """
    waiting = iter(list(chunks))  # threads may share the iterator of a list, not a generator

    def work(thread: int) -> None:
        for begin, end in waiting:
            task(begin, end, thread)

    helpers = help_with(work, num_threads)
    work(0)
    for helper in helpers:
        if not helper.cancel():  # one that has not begun finds nothing left to do
            helper.result()


def help_with(task: Callable[..., None], num_threads: int, *arguments: Any) -> list[Future[None]]:
    """Have task(*arguments, thread) begun by all threads but the caller's own, which is thread 0."""
    return [_pool(os.getpid()).submit(task, *arguments, thread) for thread in range(1, num_threads)]


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Threads beside the calling one, begun as they are needed; a forked process has to have its own."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="kdkit")

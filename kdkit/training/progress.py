"""Where a run says how it goes: on stderr, or to whoever listens in its thread."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Hear = Callable[[str], None]


def _on_stderr(text: str) -> None:
    print(text, file=sys.stderr)


_HEARING: ContextVar[Hear] = ContextVar("hearing", default=_on_stderr)


def say(text: str) -> None:
    """Say one or more lines of progress."""
    _HEARING.get()(text)


@contextmanager
def heard_by(hear: Hear) -> Iterator[None]:
    """What is said in this thread inside goes to a function; other threads keep their own."""
    token = _HEARING.set(hear)
    try:
        yield
    finally:
        _HEARING.reset(token)

"""How a long job is asked to stop: by a signal, by a person, by the clock."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Someone asked the run to stop; everything up to the last complete step is saved.

    Args:
        reason: who or what asked.
        signum: the signal, where one did.
    """

    def __init__(self, reason: str, *, signum: int | None = None) -> None:
        super().__init__(f"stopped by {reason}; what is done is saved, and a resumed run (--resume) goes on from there")
        self.reason = reason
        self.signum = signum


class StopRequest:
    """Whether a run is to stop, asked for by a signal, a person or the clock; read between steps and batches.

    Args:
        deadline: time of `time.monotonic()` at which the clock asks; None: never.
    """

    def __init__(self, *, deadline: float | None = None) -> None:
        self.deadline = deadline
        self.signum: int | None = None
        self._asked = ""

    def ask(self, reason: str) -> None:
        """Stop after the step that is under way; callable from any thread."""
        self._asked = reason

    @property
    def reason(self) -> str:
        """Who or what asked; empty where nobody did."""
        if self.signum is not None:
            return signal.Signals(self.signum).name
        is_over = self.deadline is not None and time.monotonic() >= self.deadline
        return self._asked or ("the end of its time" if is_over else "")

    def check(self, *_: object) -> None:
        """Leave a long job that has nothing of its own to save.

        Raises:
            Interrupted: someone asked to stop.
        """
        if reason := self.reason:
            raise Interrupted(reason, signum=self.signum)

    def check_unless_late(self, *_: object) -> None:
        """As `check`, but the clock does not ask: for what its last hour is kept for."""
        if self.signum is not None or self._asked:
            self.check()

    @contextmanager
    def on_signals(self) -> Iterator["StopRequest"]:
        """Turn the first Ctrl-C or SIGTERM into a request; a second one does what it did before."""

        def request(signum: int, frame: FrameType | None) -> None:
            self.signum = signum
            signal.signal(signum, previous[signum])
            print("stopping after this step; again to stop at once", file=sys.stderr)

        previous = {int(number): signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

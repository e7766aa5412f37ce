"""Spans of positions: where two tokenizers meet again in the bytes of a text."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kdkit.teacher.signal import moved


@dataclass(frozen=True, eq=False)
class Spans:
    """N positions laid end to end, cut into S spans; kept on the host, so that nothing waits for the device."""

    starts: np.ndarray
    """(S,) int64, ascending from 0: the first position of each span; a span ends where the next one starts"""
    num_positions: int
    """N, where the last span ends."""

    def __post_init__(self) -> None:
        starts = self.starts
        if starts.dtype != np.int64 or starts.ndim != 1:
            raise ValueError(f"starts of spans of {starts.dtype}, shape {starts.shape}: must be int64 of shape (S,)")
        edges = np.append(starts, self.num_positions)
        if edges[0] != 0 or (np.diff(edges) <= 0).any():
            raise ValueError(
                f"spans over {self.num_positions} positions that start at {_shorten(starts)}: starts must begin with "
                "0, ascend, and stay below the number of positions, so that every position is in exactly one span"
            )

    @property
    def num_spans(self) -> int:
        """S."""
        return len(self.starts)

    def within(self, rows: slice) -> slice:
        """The spans that start within positions `rows`."""
        first, end = self.starts.searchsorted([rows.start, rows.stop])
        return slice(int(first), int(end))

    def end_near(self, limit: int, *, start: int) -> int:
        """The last end of a span up to `limit`, at least that of the span that holds position `start`."""
        up_to_limit, up_to_start = self._ends.searchsorted([limit, start], side="right")
        return int(self._ends[max(up_to_limit - 1, up_to_start)])

    def starts_on(self, device: torch.device) -> Tensor:
        """(S,) int64 on a device."""
        return moved(torch.tensor(self.starts), device)

    @cached_property
    def _ends(self) -> np.ndarray:
        """(S,) int64"""
        return np.append(self.starts, self.num_positions)[1:]


def pieces(rows: slice, size: int, spans: Spans | None) -> Iterator[slice]:
    """Cut positions into pieces of at most `size` that end where a span ends; a longer span is a longer piece.

    Args:
        rows: positions to cut, which end where a span ends.
        size: positions of a piece, 1 or more.
        spans: None where every position is on its own.
    Returns:
        The pieces in order.
    """
    start = rows.start
    while start < rows.stop:
        stop = min(start + size, rows.stop)
        stop = stop if spans is None else spans.end_near(stop, start=start)
        yield slice(start, stop)
        start = stop


def _shorten(starts: np.ndarray) -> str:
    shown = ", ".join(map(str, starts[:8]))
    return f"[{shown}{', ...' if len(starts) > 8 else ''}]"

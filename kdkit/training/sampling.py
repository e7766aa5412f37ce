"""The order in which rows are trained on, as a function of seed and epoch alone: a resume finds its place again."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from kdkit.runtime import generator

SORTED_TOGETHER = 50
"""Batches that are sorted together: more leave less padding, fewer leave more of the chance."""


class LengthGroupedSampler(Sampler[int]):
    """Rows in random order, but batches of rows of nearly the same length, so that little of a batch is padding.

    The rows are shuffled, cut into windows of some batches, sorted by length within each, and the batches of a window
    are shuffled again. transformers' own draws from the global random state, which is another one after a resume.

    Args:
        lengths: tokens of each row.
        group_size: rows that should be alike: a batch of every process.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], *, group_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.group_size = group_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before the first row of a pass over the rows is drawn."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draws = generator(self.seed, "order", self.epoch)
        order = torch.randperm(len(self), generator=draws).numpy()
        size = SORTED_TOGETHER * self.group_size
        for start in range(0, len(order), size):
            yield from self._grouped(order[start : start + size], draws).tolist()

    def _grouped(self, rows: np.ndarray, draws: torch.Generator) -> np.ndarray:
        """The rows of a window, group after group; the group that is not full, if any, comes last."""
        by_length = rows[np.argsort(self.lengths[rows], kind="stable")]
        num_full = len(rows) // self.group_size
        left_out = self._left_out(len(rows) - num_full * self.group_size, len(rows), draws)
        full = np.delete(by_length, left_out).reshape(num_full, self.group_size)
        shuffled = full[torch.randperm(num_full, generator=draws).numpy()]
        return np.concatenate([shuffled.reshape(-1), by_length[left_out]])

    @staticmethod
    def _left_out(num_left: int, num_rows: int, draws: torch.Generator) -> np.ndarray:
        """Neighbours somewhere in the order by length: the short batch at the end is of any length."""
        start = int(torch.randint(num_rows - num_left + 1, (), generator=draws))
        return np.arange(start, start + num_left)

"""Which rows a cache holds, in which order, and where each one lies."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kdkit.data.batch import EncodedRow, row_key
from kdkit.errors import UserError

ROWS = "rows.safetensors"


@dataclass(frozen=True, eq=False)
class RowIndex:
    """The rows of a cache, each once, by `row_key`."""

    keys: np.ndarray
    """(R,) int64"""
    num_tokens: np.ndarray
    """(R,) int64 counted tokens of each."""
    num_units: np.ndarray
    """(R,) int64 units of each."""

    @classmethod
    def of(cls, rows: Iterable[EncodedRow]) -> tuple["RowIndex", list[EncodedRow]]:
        """The index of rows, and those of them that stand in it: the first of equal ones.

        A row without a counted token is left out, as there is nothing to know of it.
        """
        found: dict[int, EncodedRow] = {}
        for row in rows:
            if len(row["input_ids"]) > row["prompt_length"]:
                found.setdefault(row_key(row["input_ids"], row["prompt_length"]), row)
        kept = list(found.values())
        tokens = [len(row["input_ids"]) - row["prompt_length"] for row in kept]
        units = [max(row["unit_ids"]) + 1 for row in kept]
        return cls(*(np.array(numbers, dtype=np.int64) for numbers in (list(found), tokens, units))), kept

    @classmethod
    def read(cls, folder: Path) -> "RowIndex":
        """The index of a cache, whose checksum is known to be right."""
        try:
            tensors = load_file(folder / ROWS)
            return cls(*(tensors[name].numpy() for name in ("keys", "num_tokens", "num_units")))
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{folder / ROWS} is not readable ({error}): make the cache again") from error

    def content(self) -> bytes:
        """The file that `read` reads."""
        arrays = {"keys": self.keys, "num_tokens": self.num_tokens, "num_units": self.num_units}
        return save({name: torch.from_numpy(array) for name, array in arrays.items()})

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def place_of(self) -> Mapping[int, int]:
        """Key -> place of the row."""
        return {key: place for place, key in enumerate(self.keys.tolist())}

    def shards(self, shard_tokens: int) -> list[slice]:
        """Rows of each shard, a function of the rows alone: it ends with the row that fills it.

        Args:
            shard_tokens: counted tokens that fill one.
        """
        full = np.cumsum(self.num_tokens) // shard_tokens
        ends = np.flatnonzero(np.diff(full, append=-1)) + 1
        return [slice(start, end) for start, end in pairwise([0, *ends.tolist()])]


def batches_by_length(rows: Sequence[EncodedRow], batch_tokens: int) -> list[list[int]]:
    """Rows of about one length together, the longest first, so that a pass that does not fit fails at once.

    Args:
        rows: of a shard.
        batch_tokens: padded tokens of a batch at most; a longer row is alone.
    Returns:
        Places in `rows`, each once.
    """
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place]["input_ids"]), place))
    batches: list[list[int]] = []
    for place in order:
        longest = len(rows[batches[-1][0]]["input_ids"]) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches

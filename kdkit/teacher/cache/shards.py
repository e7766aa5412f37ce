"""The files of a cache: written whole or not at all, checked by checksum, read row by row from mapped memory."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from kdkit.errors import UserError
from kdkit.teacher.cache.keeping import Parts
from kdkit.teacher.cache.manifest import Manifest, ShardFacts, shard_name, write_whole
from kdkit.teacher.cache.rows import RowIndex

_READ_BYTES = 2**24


def write_shard(folder: Path, index: int, rows: Sequence[Parts]) -> ShardFacts:
    """Write the rows of a shard, laid end to end.

    Args:
        folder: the cache's.
        index: number of the shard.
        rows: what is kept of each, in order; the same names in all.
    Returns:
        What the manifest says of the file.
    """
    tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return write_whole(folder / shard_name(index), save(tensors))


def check_files(folder: Path, files: Mapping[str, ShardFacts]) -> int:
    """Compare every file with its size and checksum.

    Args:
        folder: the cache's.
        files: what the manifest says.
    Returns:
        Bytes that were read.
    Raises:
        UserError: names the first file that is missing, cut short or changed, and what to do.
    """
    remedy = "make it again: delete it and run kdkit cache with --resume"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"the cache {folder} lacks {name}: copy it again, or run kdkit cache with --resume")
        size = path.stat().st_size
        if size != facts.size_bytes:
            raise UserError(
                f"{path} has {size:,} bytes and was written with {facts.size_bytes:,}: it was cut short or replaced; "
                f"{remedy}"
            )
    for name, facts in files.items():
        if _sha256(folder / name) != facts.sha256:
            raise UserError(f"{folder / name} is not what was written (its checksum differs): {remedy}")
    return sum(facts.size_bytes for facts in files.values())


class ShardReader:
    """Rows of a cache from mapped files: only the pages that are looked at are read.

    Args:
        folder: the cache's.
        manifest: its own.
        index: its rows.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: RowIndex) -> None:
        self.folder = folder
        shards = index.shards(manifest.shard_tokens)
        self._shard_of = np.repeat(np.arange(len(shards)), [rows.stop - rows.start for rows in shards])  # (R,)
        self._tokens, self._units = _offsets(index.num_tokens, shards), _offsets(index.num_units, shards)  # (R, 2)
        self._mapped = cache(self._map)

    def read(self, place: int) -> Parts:
        """What is kept of a row, as views of the file."""
        tensors = self._mapped(int(self._shard_of[place]))
        ranges = {name: self._units if name == "hidden" else self._tokens for name in tensors}
        return {name: values[slice(*ranges[name][place])] for name, values in tensors.items()}

    def _map(self, shard: int) -> dict[str, Tensor]:
        return load_file(self.folder / shard_name(shard))


def _offsets(counts: np.ndarray, shards: Sequence[slice]) -> np.ndarray:
    """(R, 2) where each row begins and ends in its shard."""
    ends = np.concatenate([np.cumsum(counts[rows]) for rows in shards])
    return np.stack([ends - counts, ends], axis=1)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()

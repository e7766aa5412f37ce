"""A teacher that was asked beforehand: opened, checked for damage, and read batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kdkit.data.batch import Batch
from kdkit.errors import UserError
from kdkit.teacher.cache.keeping import Parts
from kdkit.teacher.cache.manifest import Contents, Manifest, read_manifest
from kdkit.teacher.cache.rows import RowIndex
from kdkit.teacher.cache.shards import ShardReader, check_files
from kdkit.teacher.kept import SampledSignal, TopKSignal
from kdkit.teacher.signal import NO_VIEWS, Views, moved

TOKENIZER = "tokenizer"
"""Folder of the teacher's tokenizer within a cache."""


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """An opened cache, whole and unchanged since it was written."""

    folder: Path
    manifest: Manifest
    index: RowIndex

    @property
    def contents(self) -> Contents:
        """What is kept at every counted position."""
        return self.manifest.contents

    @property
    def tokenizer(self) -> Path:
        """Folder of the teacher's tokenizer."""
        return self.folder / TOKENIZER

    def describe(self) -> str:
        """What is kept, in half a sentence."""
        held = self.contents
        kept = f"{held.k} draws" if held.kind == "samples" else f"the {held.k} likeliest of {held.num_ids:,} ids"
        states = "" if held.unit is None else f", hidden states by {held.unit}"
        return f"cached in {self.folder}: {kept} at {self.manifest.num_tokens:,} tokens{states}"

    @cached_property
    def rows(self) -> ShardReader:
        """Reads what is kept."""
        return ShardReader(self.folder, self.manifest, self.index)


def open_cache(folder: Path, *, verify: bool = True) -> TeacherCache:
    """Open a cache.

    Args:
        folder: what `kdkit cache` wrote.
        verify: read every file and compare its checksum, at about a second for 1.5 GB besides the disk's own time.
    Returns:
        The cache.
    Raises:
        UserError: there is none, it is not complete, or one of its files is missing, cut short or changed.
    """
    manifest = read_manifest(folder)
    if not manifest.is_complete:
        done = sum(name.startswith("shard-") for name in manifest.files)
        raise UserError(
            f"the cache {folder} is not complete ({done} of {manifest.num_shards} shards): finish it with kdkit cache "
            "and --resume"
        )
    if verify:
        check_files(folder, manifest.files)
    return TeacherCache(folder, manifest, RowIndex.read(folder))


class CachedTeacher:
    """What a cache says at the counted positions of a batch; no model is in memory.

    Args:
        cache: an opened one that holds the rows of every batch to come.
        top_k: ids to compare where fewer are wanted than are kept; None takes all that are kept.
    """

    def __init__(self, cache: TeacherCache, *, top_k: int | None = None) -> None:
        self.cache = cache
        self.top_k = top_k
        self.shape = cache.manifest.shape.shape()

    def __call__(self, batch: Batch, views: Views = NO_VIEWS) -> TopKSignal | SampledSignal:
        """The signal at the batch's counted positions, on the device of the batch.

        Args:
            batch: what the collator made of cached rows.
            views: nothing; what goes on inside the teacher is not kept.
        Returns:
            A `TopKSignal` or a `SampledSignal`, with hidden states where they are kept.
        Raises:
            UserError: the batch has a row that is not in the cache.
        """
        assert views == NO_VIEWS
        device, contents = batch["positions"].device, self.cache.contents
        rows = [self.cache.rows.read(place) for place in self._places(batch)]
        whole = {name: moved(torch.cat([row[name] for row in rows]), device) for name in rows[0]}
        states = None if contents.unit is None else self._hidden_states(rows, whole["hidden"], batch)
        assert len(whole["ids"]) == batch["positions"].numel()
        if contents.kind == "samples":
            return SampledSignal(whole["ids"], whole["counts"].int(), contents.num_ids, states)
        kept, tails = whole["logprobs"], whole["tails"]
        signal = TopKSignal(whole["ids"].int(), kept, tails, contents.num_ids, contents.temperatures, states)
        return signal if self.top_k is None or self.top_k >= contents.k else signal.narrowed(self.top_k)

    def _places(self, batch: Batch) -> list[int]:
        """Where each row lies in the cache."""
        place_of = self.cache.index.place_of
        keys = batch["row_keys"].tolist()
        missing = [place for place, key in enumerate(keys) if key not in place_of]
        if missing:
            raise UserError(
                f"row {batch['row_ids'][missing[0]].item()} of a batch is not in the cache {self.cache.folder}: cache "
                "again with the rows of this run"
            )
        return [place_of[key] for key in keys]

    def _hidden_states(self, rows: Sequence[Parts], states: Tensor, batch: Batch) -> Tensor:
        """(B, T, H) in which each token of a unit has the unit's mean, so that pooling gives it back; 0 elsewhere."""
        counts = torch.tensor([0, *(len(row["hidden"]) for row in rows[:-1])])
        begins = moved(counts.cumsum(0), states.device)  # (B,)
        unit_ids = batch["unit_ids"]
        places = (unit_ids + begins[:, None]).where(unit_ids >= 0, len(states))  # (B, T)
        return torch.cat([states, states.new_zeros(1, states.shape[1])])[places]

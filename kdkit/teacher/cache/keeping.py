"""From a teacher's signal to what a cache keeps of it, a few positions at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkit.data.batch import Batch
from kdkit.errors import UserError
from kdkit.losses.alignment import pool_units
from kdkit.teacher.cache.manifest import Contents
from kdkit.teacher.kept import SampledSignal, TopKSignal, softenings
from kdkit.teacher.signal import DenseSignal, LiveSignal

CHUNK_TOKENS = 128
"""Positions whose logits exist at a time; draws take several float64 copies of them."""
_ID_BYTES = 2**16
_CPU = torch.device("cpu")

Parts = dict[str, Tensor]
"""What is kept, by the name that it has in a shard."""


def id_dtype(num_ids: int) -> torch.dtype:
    """The narrowest integers for ids of a vocabulary."""
    return torch.uint16 if num_ids <= _ID_BYTES else torch.int32


def bytes_per_token(contents: Contents) -> int:
    """Bytes of one counted token, hidden states apart."""
    ids = id_dtype(contents.num_ids).itemsize
    if contents.kind == "samples":
        return min(contents.k, contents.num_ids) * (ids + id_dtype(contents.k + 1).itemsize)
    stored = getattr(torch, contents.dtype).itemsize
    return contents.k * (ids + stored) + 4 * len(softenings(contents.temperatures))


def bytes_per_unit(contents: Contents, head_size: int) -> int:
    """Bytes of one unit's hidden states."""
    return 0 if contents.unit is None else head_size * getattr(torch, contents.dtype).itemsize


@torch.no_grad()
def keep_rows(
    signal: DenseSignal | LiveSignal, batch: Batch, contents: Contents, *, device: torch.device
) -> list[Parts]:
    """What is kept of each row of a batch.

    Args:
        signal: the teacher at the batch's counted positions.
        batch: what the collator made.
        contents: what to keep.
        device: the teacher's.
    Returns:
        One for each row, on the CPU: `ids` with `logprobs` and `tails`, or with `counts`; `hidden` where it is wanted.
    Raises:
        UserError: hidden states that are beyond the stored dtype.
    """
    keys, lengths = batch["row_keys"].tolist(), (batch["lengths"] - batch["prompt_lengths"]).tolist()
    uniforms = _uniforms(keys, lengths, contents) if contents.kind == "samples" else None
    chunks = []
    for start in range(0, signal.num_positions, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, signal.num_positions)
        logits = signal.rows(start, stop, device).logits  # (n, V)
        chunks.append(_keep(logits, contents, None if uniforms is None else uniforms[start:stop]))
    whole = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    split = {name: values.split(lengths) for name, values in whole.items()}
    rows: list[Parts] = [{name: values[index] for name, values in split.items()} for index in range(len(lengths))]
    if contents.unit is not None:
        assert signal.hidden_states is not None
        for row, states in zip(rows, _units(signal.hidden_states, batch, contents.dtype), strict=True):
            row["hidden"] = states
    return rows


def _keep(logits: Tensor, contents: Contents, uniforms: Tensor | None) -> Parts:
    ids = id_dtype(contents.num_ids)
    if uniforms is not None:
        drawn = SampledSignal.from_logits(logits, uniforms.to(logits.device))
        return {"ids": drawn.ids.to(_CPU, ids), "counts": drawn.counts.to(_CPU, id_dtype(contents.k + 1))}
    kept = TopKSignal.from_logits(logits, contents.k, contents.temperatures)
    dtype = getattr(torch, contents.dtype)
    logprobs = kept.logprobs.clamp_min(torch.finfo(dtype).min).to(_CPU, dtype)
    return {"ids": kept.ids.to(_CPU, ids), "logprobs": logprobs, "tails": kept.tails.to(_CPU, torch.float32)}


def _uniforms(keys: Sequence[int], lengths: Sequence[int], contents: Contents) -> Tensor:
    """(N, D) float64; those of a row are its own, whatever stands beside it."""
    assert contents.seed is not None
    drawn = []
    for key, length in zip(keys, lengths, strict=True):
        generator = torch.Generator().manual_seed((key ^ contents.seed) & (2**63 - 1))
        drawn.append(torch.rand(length, contents.k, generator=generator, dtype=torch.float64))
    return torch.cat(drawn)


def _units(states: Tensor, batch: Batch, dtype: str) -> list[Tensor]:
    """(U, H) mean of each row's states over its units, in the stored dtype."""
    unit_ids = batch["unit_ids"].to(states.device)
    pooled, counts = pool_units(states.float(), unit_ids, batch["max_units"])  # (B, U, H), (B,)
    stored = pooled.to(_CPU, getattr(torch, dtype))
    if not torch.isfinite(stored).all():
        raise UserError(
            f"the teacher's last hidden states reach {pooled.abs().max().item():.3g}, beyond what {dtype} holds: "
            "cache with --dtype float32"
        )
    return [row[:count] for row, count in zip(stored, counts.tolist(), strict=True)]

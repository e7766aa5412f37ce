"""Rows of tokens to batches: every index that a training step needs is made here, from lengths alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch

NOT_COUNTED = -100  # the Trainer's label of a token that is not predicted
NO_UNIT = -1


class EncodedRow(TypedDict):
    """One row of EncodedRows.dataset, or a text that the student wrote in its place."""

    input_ids: Sequence[int]
    prompt_length: int
    unit_ids: Sequence[int]
    row_id: int
    is_gold: NotRequired[bool]
    """False for a text of the student: teacher and student are compared on it, its tokens are never labels to learn."""


class Batch(TypedDict):
    """What `DistillCollator` makes of B rows; tensors int64 unless said."""

    input_ids: torch.Tensor
    """(B, T), right-padded."""
    attention_mask: torch.Tensor
    """(B, T), 1 on tokens."""
    labels: torch.Tensor
    """(B, T), at the token itself; -100 = not counted."""
    positions: torch.Tensor
    """(N,) ascending flat indices b * T + t of the positions that predict a counted token: the one right after."""
    is_gold: torch.Tensor
    """(N,) bool; whether the counted token is one to learn, False in a text that the student wrote."""
    lengths: torch.Tensor
    """(B,) tokens of each row."""
    prompt_lengths: torch.Tensor
    """(B,) tokens of each row's prompt, at its begin."""
    unit_ids: torch.Tensor
    """(B, T), at the token itself; -1 = none."""
    row_ids: torch.Tensor
    """(B,)"""
    max_units: int
    """The most units of a row."""
    num_sequences: int
    """Rows with a unit."""
    num_labels: int
    """Counted tokens of gold rows."""


@dataclass(frozen=True)
class DistillCollator:
    """Encoded rows to one padded batch; what counts is decided by lengths, never by comparing ids.

    pad_token_id may equal the end-of-text id. pad_to_multiple_of rounds T up, None = the longest row.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[EncodedRow]) -> Batch:
        """Right-pads B rows to T tokens.

        Args:
            rows: rows of EncodedRows.dataset.
        Returns:
            The batch; labels.flatten()[positions + 1] are the counted tokens. A prompt-only row gives no positions.
        """
        lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)  # (B,)
        prompt_lengths = np.array([row["prompt_length"] for row in rows], dtype=np.int64)
        assert prompt_lengths.min() >= 1, "the first token has no position that predicts it"
        steps = np.arange(self._padded_length(int(lengths.max())))  # (T,)
        is_token = steps < lengths[:, None]  # (B, T)
        is_counted = is_token & (steps >= prompt_lengths[:, None])  # (B, T)
        input_ids = _scatter([row["input_ids"] for row in rows], is_token, self.pad_token_id)
        unit_ids = _scatter([row["unit_ids"] for row in rows], is_token, NO_UNIT)
        most_units = unit_ids.max(axis=1) + 1  # (B,)
        gold_rows = np.array([row.get("is_gold", True) for row in rows])  # (B,)
        is_gold = np.broadcast_to(gold_rows[:, None], is_counted.shape)[is_counted]  # (N,)
        arrays = {
            "input_ids": input_ids,
            "attention_mask": is_token.astype(np.int64),
            "labels": np.where(is_counted, input_ids, NOT_COUNTED),
            "positions": np.flatnonzero(is_counted) - 1,
            "is_gold": is_gold,
            "lengths": lengths,
            "prompt_lengths": prompt_lengths,
            "unit_ids": unit_ids,
            "row_ids": np.array([row["row_id"] for row in rows], dtype=np.int64),
        }
        return Batch(
            **{name: torch.from_numpy(array) for name, array in arrays.items()},  # type: ignore[typeddict-item]
            max_units=int(most_units.max()),
            num_sequences=int((most_units > 0).sum()),
            num_labels=int(is_gold.sum()),
        )

    def _padded_length(self, longest: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple


def batch_rows(batch: Batch) -> list[EncodedRow]:
    """The gold rows that a batch was made of, unpadded.

    Args:
        batch: of gold rows alone, on any device.
    Returns:
        B rows, from which `DistillCollator` makes the same batch.
    """
    lengths, prompt_lengths = batch["lengths"].tolist(), batch["prompt_lengths"].tolist()
    ids, units, row_ids = (batch[name].tolist() for name in ("input_ids", "unit_ids", "row_ids"))
    return [
        EncodedRow(
            input_ids=ids[b][:length], prompt_length=prompt_lengths[b], unit_ids=units[b][:length], row_id=row_ids[b]
        )
        for b, length in enumerate(lengths)
    ]


def _scatter(rows: Sequence[Sequence[int]], is_token: np.ndarray, fill: int) -> np.ndarray:
    """Ragged rows laid into (B, T), fill elsewhere."""
    padded = np.full(is_token.shape, fill, dtype=np.int64)
    padded[is_token] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return padded

"""Rows of tokens to batches: every index that a training step needs is made here, from lengths alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_COUNTED = -100  # the Trainer's label of a token that is not predicted
NO_UNIT = -1
NO_SPAN = -1


class EncodedRow(TypedDict):
    """One row of EncodedRows.dataset, or a text that the student wrote in its place."""

    input_ids: Sequence[int]
    prompt_length: int
    unit_ids: Sequence[int]
    row_id: int
    is_gold: NotRequired[bool]
    """False for a text of the student: teacher and student are compared on it, its tokens are never labels to learn."""
    span_ids: NotRequired[Sequence[int]]
    """One for each of input_ids, -1 in the prompt; see `shared_spans`. Only where the teacher has another tokenizer."""
    teacher: NotRequired["EncodedRow"]
    """The same text as a teacher with another tokenizer reads it."""


class Batch(TypedDict):
    """What `DistillCollator` makes of B rows; tensors int64 unless said."""

    input_ids: torch.Tensor
    """(B, T), right-padded."""
    attention_mask: torch.Tensor
    """(B, T), 1 on tokens."""
    tokens: torch.Tensor
    """(L,) ascending flat indices b * T + t of all tokens."""
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
    row_keys: np.ndarray
    """(B,) int64 `row_key` of each row, kept on the host: what a cached teacher finds its rows by."""
    unit_counts: np.ndarray
    """(B,) int64 units of each row, kept on the host."""
    max_units: int
    """The most units of a row."""
    num_units: int
    """Units of all rows."""
    num_sequences: int
    """Rows with a unit."""
    num_labels: int
    """Counted tokens of gold rows."""
    span_ids: NotRequired[torch.Tensor]
    """(B, T), at the token itself; -1 = none. This and the rest are there where the teacher has another tokenizer."""
    span_starts: NotRequired[np.ndarray]
    """(S,) indices into `positions` at which a span begins, kept on the host; as many on either side."""
    teacher: NotRequired["Batch"]
    """The same rows as the teacher reads them: span s and unit u are the same bytes on both sides."""


@dataclass(frozen=True)
class DistillCollator:
    """Encoded rows to one padded batch; what counts is decided by lengths, never by comparing ids.

    pad_token_id may equal the end-of-text id. pad_to_multiple_of rounds T up, None = the longest row.
    teacher_pad_token_id pads the teacher's side of rows that have one.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    teacher_pad_token_id: int | None = None

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase", teacher_tokenizer: "PreTrainedTokenizerBase | None" = None
    ) -> "DistillCollator":
        """Pads as the tokenizers do; the teacher's is given where it is another one."""
        theirs = None if teacher_tokenizer is None else teacher_tokenizer.pad_token_id
        return cls(tokenizer.pad_token_id, teacher_pad_token_id=theirs)

    def __call__(self, rows: Sequence[EncodedRow]) -> Batch:
        """Right-pads B rows to T tokens.

        Args:
            rows: rows of EncodedRows.dataset.
        Returns:
            The batch; labels.flatten()[positions + 1] are the counted tokens. A prompt-only row gives no positions.
        """
        batch = self._collate(rows, self.pad_token_id)
        if "teacher" in rows[0]:
            assert self.teacher_pad_token_id is not None
            twin = self._collate([row["teacher"] for row in rows], self.teacher_pad_token_id)
            assert len(twin["span_starts"]) == len(batch["span_starts"]), "a span is missing on one side"
            batch["teacher"] = twin
        return batch

    def _collate(self, rows: Sequence[EncodedRow], pad_token_id: int) -> Batch:
        """One side of the rows."""
        lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)  # (B,)
        prompt_lengths = np.array([row["prompt_length"] for row in rows], dtype=np.int64)
        assert prompt_lengths.min() >= 1, "the first token has no position that predicts it"
        steps = np.arange(self._padded_length(int(lengths.max())))  # (T,)
        is_token = steps < lengths[:, None]  # (B, T)
        is_counted = is_token & (steps >= prompt_lengths[:, None])  # (B, T)
        input_ids = _scatter([row["input_ids"] for row in rows], is_token, pad_token_id)
        unit_ids = _scatter([row["unit_ids"] for row in rows], is_token, NO_UNIT)
        unit_counts = unit_ids.max(axis=1) + 1  # (B,)
        gold_rows = np.array([row.get("is_gold", True) for row in rows])  # (B,)
        is_gold = np.broadcast_to(gold_rows[:, None], is_counted.shape)[is_counted]  # (N,)
        arrays = {
            "input_ids": input_ids,
            "attention_mask": is_token.astype(np.int64),
            "tokens": np.flatnonzero(is_token),
            "labels": np.where(is_counted, input_ids, NOT_COUNTED),
            "positions": np.flatnonzero(is_counted) - 1,
            "is_gold": is_gold,
            "lengths": lengths,
            "prompt_lengths": prompt_lengths,
            "unit_ids": unit_ids,
            "row_ids": np.array([row["row_id"] for row in rows], dtype=np.int64),
        }
        starts = {}
        if "span_ids" in rows[0]:
            arrays["span_ids"] = _scatter([row["span_ids"] for row in rows], is_token, NO_SPAN)
            starts["span_starts"] = _span_starts(arrays["span_ids"], is_counted)
        return Batch(
            **{name: torch.from_numpy(array) for name, array in arrays.items()},  # type: ignore[typeddict-item]
            **starts,
            row_keys=np.array([row_key(row["input_ids"], row["prompt_length"]) for row in rows], dtype=np.int64),
            unit_counts=unit_counts,
            max_units=int(unit_counts.max()),
            num_units=int(unit_counts.sum()),
            num_sequences=int((unit_counts > 0).sum()),
            num_labels=int(is_gold.sum()),
        )

    def _padded_length(self, longest: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple


def row_key(input_ids: Sequence[int], prompt_length: int) -> int:
    """What a row is known by wherever it stands: 64 bits of a digest of its tokens and of where its answer begins."""
    tokens = np.asarray(input_ids, dtype="<i4").tobytes()
    digest = hashlib.blake2b(tokens, digest_size=8, salt=int(prompt_length).to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little", signed=True)


def teacher_view(batch: Batch) -> Batch:
    """The rows of a batch as the teacher reads them; the batch itself where both have one tokenizer."""
    return batch.get("teacher", batch)


def batch_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """The tensors of a batch by name, those of the teacher's reading under `teacher.`."""
    own = {name: value.contiguous() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    theirs = batch_tensors(batch["teacher"]) if "teacher" in batch else {}
    return own | {f"teacher.{name}": value for name, value in theirs.items()}


def batch_rows(batch: Batch) -> list[EncodedRow]:
    """The gold rows that a batch was made of, unpadded.

    Args:
        batch: of gold rows alone, on any device.
    Returns:
        B rows, from which `DistillCollator` makes the same batch.
    """
    lengths, prompt_lengths = batch["lengths"].tolist(), batch["prompt_lengths"].tolist()
    ids, units, row_ids = (batch[name].tolist() for name in ("input_ids", "unit_ids", "row_ids"))
    rows = [
        EncodedRow(
            input_ids=ids[b][:length], prompt_length=prompt_lengths[b], unit_ids=units[b][:length], row_id=row_ids[b]
        )
        for b, length in enumerate(lengths)
    ]
    if "span_ids" in batch:
        for row, spans in zip(rows, batch["span_ids"].tolist(), strict=True):
            row["span_ids"] = spans[: len(row["input_ids"])]
    if "teacher" in batch:
        for row, twin in zip(rows, batch_rows(batch["teacher"]), strict=True):
            row["teacher"] = twin
    return rows


def _scatter(rows: Sequence[Sequence[int]], is_token: np.ndarray, fill: int) -> np.ndarray:
    """Ragged rows laid into (B, T), fill elsewhere."""
    padded = np.full(is_token.shape, fill, dtype=np.int64)
    padded[is_token] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return padded


def _span_starts(span_ids: np.ndarray, is_counted: np.ndarray) -> np.ndarray:
    """(S,) which of the counted tokens, laid end to end, are the first of a span; (B, T) each."""
    is_start = is_counted.copy()
    is_start[:, 1:] &= span_ids[:, 1:] != span_ids[:, :-1]
    return np.flatnonzero(is_start[is_counted])

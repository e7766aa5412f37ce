"""Texts of the student that were good enough, kept for replay."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkit.data.batch import EncodedRow
from kdkit.errors import UserError

TEACHER = "teacher."
"""Before the names of what is packed of the teacher's side."""


@dataclass(frozen=True)
class HeldText:
    """A text of the student as it is trained on, unpadded."""

    row: EncodedRow
    """Prompt and response; `row_id` says whose prompt it answers."""
    born_step: int
    """Completed optimizer steps when it was generated."""
    score: float
    """Teacher's mean log-likelihood in nats a token; NaN where it was not asked for."""


class ReplayBuffer:
    """The newest texts, drawn from uniformly.

    Args:
        capacity: texts that are kept; the oldest make room.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise UserError(f"capacity={capacity}: a replay buffer holds at least 1 text")
        self.capacity = capacity
        self._texts: deque[HeldText] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def is_full(self) -> bool:
        """Whether the next text will push out another."""
        return len(self) == self.capacity

    def push(self, texts: Iterable[HeldText]) -> None:
        """Add texts in their order."""
        self._texts.extend(texts)

    def sample(self, num_texts: int, generator: torch.Generator) -> list[HeldText]:
        """Different texts, each as likely as any other.

        Args:
            num_texts: how many.
            generator: draws; its seed alone decides.
        Returns:
            The texts.
        Raises:
            UserError: more are asked for than there are.
        """
        if num_texts > len(self):
            raise UserError(
                f"{num_texts} texts are asked of a replay buffer that holds {len(self)} (capacity {self.capacity}): "
                "ask for fewer, or wait until it holds more"
            )
        chosen = torch.randperm(len(self), generator=generator)[:num_texts]
        return [self._texts[index] for index in chosen.tolist()]

    def clear(self) -> None:
        """Forget every text."""
        self._texts.clear()

    def texts(self) -> tuple[HeldText, ...]:
        """What it holds, oldest first."""
        return tuple(self._texts)


def pack_texts(texts: Sequence[HeldText]) -> dict[str, Tensor]:
    """Texts as tensors for a safetensors file: ragged columns end to end, with their lengths."""
    rows = [text.row for text in texts]
    tensors = _pack_rows(rows)
    if rows and "teacher" in rows[0]:
        tensors |= {f"{TEACHER}{name}": tensor for name, tensor in _pack_rows([row["teacher"] for row in rows]).items()}
    return tensors | {
        "born_steps": torch.tensor([text.born_step for text in texts], dtype=torch.int64),
        "scores": torch.tensor([text.score for text in texts], dtype=torch.float64),
    }


def unpack_texts(tensors: Mapping[str, Tensor]) -> list[HeldText]:
    """The texts that `pack_texts` packed."""
    rows = [EncodedRow(**row, is_gold=False) for row in _unpack_rows(tensors)]
    theirs = {name.removeprefix(TEACHER): tensor for name, tensor in tensors.items() if name.startswith(TEACHER)}
    if theirs:
        for row, twin in zip(rows, _unpack_rows(theirs), strict=True):
            row["teacher"] = twin
    columns = (tensors[name].tolist() for name in ("born_steps", "scores"))
    return [HeldText(row, born_step, score) for row, born_step, score in zip(rows, *columns, strict=True)]


def _pack_rows(rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
    """One side of the rows."""

    def laid_out(lists: Iterable[Sequence[int]]) -> Tensor:
        return torch.tensor([i for one in lists for i in one], dtype=torch.int32)

    tensors = {
        "input_ids": laid_out(row["input_ids"] for row in rows),
        "unit_ids": laid_out(row["unit_ids"] for row in rows),
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int32),
        "prompt_lengths": torch.tensor([row["prompt_length"] for row in rows], dtype=torch.int32),
        "row_ids": torch.tensor([row["row_id"] for row in rows], dtype=torch.int64),
    }
    if rows and "span_ids" in rows[0]:
        tensors["span_ids"] = laid_out(row["span_ids"] for row in rows)
    return tensors


def _unpack_rows(tensors: Mapping[str, Tensor]) -> list[EncodedRow]:
    """One side of the rows."""
    lengths = tensors["lengths"].tolist()
    ids, units = (tensors[name].split(lengths) for name in ("input_ids", "unit_ids"))
    numbers = (tensors[name].tolist() for name in ("prompt_lengths", "row_ids"))
    rows = [
        EncodedRow(input_ids=own_ids.tolist(), prompt_length=prompt_length, unit_ids=own_units.tolist(), row_id=row_id)
        for own_ids, own_units, prompt_length, row_id in zip(ids, units, *numbers, strict=True)
    ]
    if "span_ids" in tensors:
        for row, spans in zip(rows, tensors["span_ids"].split(lengths), strict=True):
            row["span_ids"] = spans.tolist()
    return rows

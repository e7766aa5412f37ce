"""Texts of the student that were good enough, kept for replay."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkit.data.batch import EncodedRow
from kdkit.errors import UserError


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
    return {
        "input_ids": torch.tensor([i for row in rows for i in row["input_ids"]], dtype=torch.int32),
        "unit_ids": torch.tensor([i for row in rows for i in row["unit_ids"]], dtype=torch.int32),
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int32),
        "prompt_lengths": torch.tensor([row["prompt_length"] for row in rows], dtype=torch.int32),
        "row_ids": torch.tensor([row["row_id"] for row in rows], dtype=torch.int64),
        "born_steps": torch.tensor([text.born_step for text in texts], dtype=torch.int64),
        "scores": torch.tensor([text.score for text in texts], dtype=torch.float64),
    }


def unpack_texts(tensors: Mapping[str, Tensor]) -> list[HeldText]:
    """The texts that `pack_texts` packed."""
    lengths = tensors["lengths"].tolist()
    ids, units = (tensors[name].split(lengths) for name in ("input_ids", "unit_ids"))
    columns = (tensors[name].tolist() for name in ("prompt_lengths", "row_ids", "born_steps", "scores"))
    return [
        HeldText(
            EncodedRow(
                input_ids=own_ids.tolist(),
                prompt_length=prompt_length,
                unit_ids=own_units.tolist(),
                row_id=row_id,
                is_gold=False,
            ),
            born_step,
            score,
        )
        for own_ids, own_units, prompt_length, row_id, born_step, score in zip(ids, units, *columns, strict=True)
    ]

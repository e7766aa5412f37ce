"""Texts written before the step that trains on them, in one go with those of the step before."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kdkit.data.batch import EncodedRow
from kdkit.training.rollout.buffer import HeldText, pack_texts, unpack_texts
from kdkit.training.rollout.generator import StudentText
from kdkit.training.rollout.guard import Verdict


@dataclass(frozen=True)
class Judged:
    """A text, and whether it may be trained on."""

    text: StudentText
    verdict: Verdict
    born_step: int
    """Completed optimizer steps when it was written."""


@dataclass(frozen=True)
class Place:
    """A batch that texts are for."""

    step: int
    """Completed optimizer steps before it."""
    index: int
    """In the accumulation window."""
    process: int


Shelf = dict[Place, tuple[Judged, ...]]
"""Texts by the batch that they are for, one for each of its rows."""


def answers(texts: Sequence[Judged], rows: Sequence[EncodedRow]) -> bool:
    """Whether texts are for these rows: a run that was resumed in another epoch may draw others."""
    return [judged.text.row["row_id"] for judged in texts] == [row["row_id"] for row in rows]


def pack_shelf(shelf: Mapping[Place, Sequence[Judged]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """A shelf as tensors for a safetensors file, and what is JSON of it."""
    every = [judged for texts in shelf.values() for judged in texts]
    tensors = pack_texts([HeldText(one.text.row, one.born_step, one.verdict.score) for one in every])
    numbers = [
        {
            **asdict(place),
            "ended": [one.text.ended for one in texts],
            "reasons": [one.verdict.reason for one in texts],
            "repeat_fractions": [one.verdict.repeat_fraction for one in texts],
        }
        for place, texts in shelf.items()
    ]
    return tensors, numbers


def unpack_shelf(tensors: Mapping[str, Tensor], numbers: Sequence[Mapping[str, Any]]) -> Shelf:
    """What `pack_shelf` packed, the texts' words left out: they have been judged."""
    held = iter(unpack_texts(tensors))
    return {
        Place(entry["step"], entry["index"], entry["process"]): tuple(
            _judged(next(held), ended, reason, fraction)
            for ended, reason, fraction in zip(entry["ended"], entry["reasons"], entry["repeat_fractions"], strict=True)
        )
        for entry in numbers
    }


def _judged(held: HeldText, ended: bool, reason: Any, repeat_fraction: float) -> Judged:
    return Judged(StudentText(held.row, "", ended), Verdict(reason, repeat_fraction, held.score), held.born_step)

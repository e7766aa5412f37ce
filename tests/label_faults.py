"""The two faults of DistiLLM's code in what it counts of the student's text, put back into the collator.

Its labels of generated text stand at the token itself where those of the data stand one before, so that the mask is one
position late; and every id equal to the padding's is dropped, which is the end-of-text's as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from kdkit.data.batch import NOT_COUNTED, Batch, DistillCollator

_collate = DistillCollator.__call__


def faulty_collate(collator: DistillCollator, rows: list, *, learn_labels: bool) -> Batch:
    """A batch whose rows of the student's own text count as DistiLLM's code counts them.

    Args:
        collator: the right one.
        rows: gold rows and the student's.
        learn_labels: let the cross-entropy learn the student's text too, with the labels at the token itself.
    """
    batch = _collate(collator, rows)
    written = torch.tensor([not row.get("is_gold", True) for row in rows])
    if not written.any():
        return batch
    ids, labels = batch["input_ids"], batch["labels"].clone()
    width = ids.shape[1]
    late = labels.roll(1, dims=1)  # late[t + 1] = labels[t]: what `positions + 1` reads is the token at the position
    late[:, 0] = NOT_COUNTED
    end = ids[torch.arange(len(rows)), batch["lengths"] - 1]  # (B,) the end-of-text, where there is one
    late[(late == end[:, None]) & (batch["labels"].roll(1, dims=1) == end[:, None])] = NOT_COUNTED
    labels = torch.where(written[:, None], late, labels)
    positions = (labels[:, 1:] != NOT_COUNTED).nonzero()  # (N, 2)
    rows_of = positions[:, 0]
    is_gold = torch.full((len(positions),), True) if learn_labels else ~written[rows_of]
    return Batch(
        **batch
        | {
            "labels": labels,
            "positions": rows_of * width + positions[:, 1],
            "is_gold": is_gold,
            "num_labels": int(is_gold.sum()),
        }
    )


@contextmanager
def label_faults(*, learn_labels: bool = False) -> Iterator[None]:
    """Both faults in every batch made inside."""

    def collate(self, rows):
        return faulty_collate(self, rows, learn_labels=learn_labels)

    with mock.patch.object(DistillCollator, "__call__", collate):
        yield

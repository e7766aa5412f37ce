"""The two faults of DistiLLM's code in what it counts of the student's text, put back into the batches of training.

Its labels of generated text stand at the token itself where those of the data stand one before, so that the mask is one
position late; and every id equal to the padding's is dropped, which is the end-of-text's as well. The guard sees the
texts as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from kdkit.data.batch import NOT_COUNTED, Batch
from kdkit.training.rollout import Rollout

_mix = Rollout.mix


def faulty_batch(batch: Batch, *, end_id: int, learn_labels: bool) -> Batch:
    """A batch whose rows of the student's own text count as DistiLLM's code counts them.

    Args:
        batch: gold rows and the student's.
        end_id: end-of-text, and there padding.
        learn_labels: let the cross-entropy learn the student's text too, with the labels at the token itself.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    width = ids.shape[1]
    written = torch.zeros(len(ids), dtype=torch.bool)
    written[(batch["positions"] // width)[~batch["is_gold"]]] = True
    late = labels.roll(1, dims=1)  # what `positions + 1` reads is then the token at the position
    late[:, 0] = NOT_COUNTED
    late[late == end_id] = NOT_COUNTED
    labels = torch.where(written[:, None], late, labels)
    rows, columns = (labels[:, 1:] != NOT_COUNTED).nonzero(as_tuple=True)  # (N,) twice
    is_gold = torch.full_like(rows, True, dtype=torch.bool) if learn_labels else ~written[rows]
    counted = {"labels": labels, "positions": rows * width + columns, "is_gold": is_gold}
    return Batch(**batch | counted | {"num_labels": int(is_gold.sum())})


@contextmanager
def label_faults(*, learn_labels: bool = False) -> Iterator[None]:
    """Both faults in every batch trained on inside."""

    def mix(self, batches, student, **kwargs):
        end_id = self.generate.tokenizer.eos_token_id
        mixed, figures = _mix(self, batches, student, **kwargs)
        return [faulty_batch(batch, end_id=end_id, learn_labels=learn_labels) for batch in mixed], figures

    with mock.patch.object(Rollout, "mix", mix):
        yield

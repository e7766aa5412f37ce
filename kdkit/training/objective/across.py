"""How the ids of two vocabularies relate, as far as the comparison of a config needs to know it."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from kdkit.config import KdConfig
from kdkit.data.vocabulary import byte_groups, matching_ids
from kdkit.losses import GroupedIds, VocabularyGroups, VocabularyMatch


@dataclass(frozen=True)
class Across:
    """How the ids of two vocabularies relate; without either where no ids are compared."""

    groups: VocabularyGroups | None = None
    """Ids that may begin the same text."""
    match: VocabularyMatch | None = None
    """Ids that stand for the same bytes."""

    def to(self, device: torch.device) -> "Across":
        """The same on a device."""
        return Across(self.groups and self.groups.to(device), self.match and self.match.to(device))


def relate_vocabularies(
    config: KdConfig,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    widths: tuple[int, int],
) -> Across:
    """What kd needs to know of two vocabularies.

    Args:
        config: says what is compared; a term of weight 0 needs nothing.
        student_tokenizer: a fast one.
        teacher_tokenizer: a fast one.
        widths: of the student's and the teacher's logits, which may have ids that no text makes.
    Returns:
        `Across`.
    Raises:
        UserError: as `token_bytes`; not for `across: uld`, which asks for no bytes.
    """
    if config.weight.largest == 0 or config.across == "uld":
        return Across()
    if config.across == "hybrid":
        own, theirs = (torch.tensor(ids) for ids in matching_ids(student_tokenizer, teacher_tokenizer))
        return Across(match=VocabularyMatch(own, theirs, *widths))
    found = byte_groups(student_tokenizer, teacher_tokenizer)
    student, teacher = (
        GroupedIds(torch.tensor(side + [-1] * (width - len(side))), found.num_groups)
        for side, width in zip((found.student, found.teacher), widths, strict=True)
    )
    return Across(groups=VocabularyGroups(student, teacher))

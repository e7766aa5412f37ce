"""Two tokenizers on the same text: whether their ids can be compared, and the spans of bytes that both agree on."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kdkit.config import DistillConfig
from kdkit.data.encoding import encode_responses
from kdkit.data.spans import Offsets, TokenizerRelation, char_to_byte_offsets, shared_spans, tokenizer_relation
from kdkit.data.vocabulary import matching_ids
from kdkit.errors import UserError
from kdkit.loading import load_tokenizer
from kdkit.plots import SpanView


@dataclass(frozen=True)
class TokenizerPair:
    """How a teacher's tokenizer and a student's cut the same texts."""

    relation: TokenizerRelation
    """Whether ids can be compared one by one, and what shows it."""
    student_ids: int
    """Ids of the student's vocabulary."""
    twin_fraction: float
    """Of them, those that stand for the same bytes as some id of the teacher's."""
    num_spans: int
    """In all texts."""
    student_tokens_per_span: float
    teacher_tokens_per_span: float
    twin_span_fraction: float
    """Spans that are one token of the same bytes on either side."""


def pair_tokenizers(config: DistillConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The student's tokenizer and the teacher's, as a run of the config loads them.

    Args:
        config: of the run.
    Returns:
        Student's, teacher's; the same one twice where a student from scratch takes the teacher's.
    Raises:
        UserError: as `load_tokenizer`.
    """
    student, teacher = config.student, config.teacher
    theirs = load_tokenizer(teacher.path, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    if student.from_scratch and student.tokenizer is None:
        return theirs, theirs
    own = load_tokenizer(
        student.tokenizer or student.path,
        revision=student.revision if student.tokenizer is None else None,
        trust_remote_code=student.trust_remote_code,
    )
    return own, theirs


def read_spans(
    text: str, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> list[SpanView]:
    """The spans of a text, in order; together they are the text, byte for byte.

    Args:
        text: an answer.
        student_tokenizer: a fast one.
        teacher_tokenizer: a fast one.
    Returns:
        Spans with the tokens of both sides.
    Raises:
        UserError: as `matching_ids`; or a side has no token for the text.
    """
    student_ids, teacher_ids = matching_ids(student_tokenizer, teacher_tokenizer)
    twins = set(zip(student_ids, teacher_ids, strict=True))
    return _cut(text, student_tokenizer, teacher_tokenizer, twins)


def compare_tokenizers(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> TokenizerPair:
    """The two tokenizers of a pair in figures.

    Args:
        student_tokenizer: a fast one.
        teacher_tokenizer: a fast one.
        texts: answers to count on.
    Returns:
        Their relation, and counts.
    Raises:
        UserError: as `read_spans`.
    """
    student_ids, teacher_ids = matching_ids(student_tokenizer, teacher_tokenizer)
    twins = set(zip(student_ids, teacher_ids, strict=True))
    spans = [span for text in texts for span in _cut(text, student_tokenizer, teacher_tokenizer, twins)]
    if not spans:
        raise UserError("there is no text to compare the tokenizers on: give at least one answer")
    return TokenizerPair(
        relation=tokenizer_relation(teacher_tokenizer, student_tokenizer),
        student_ids=len(student_tokenizer),
        twin_fraction=len(set(student_ids)) / len(student_tokenizer),
        num_spans=len(spans),
        student_tokens_per_span=sum(len(span.student_tokens) for span in spans) / len(spans),
        teacher_tokens_per_span=sum(len(span.teacher_tokens) for span in spans) / len(spans),
        twin_span_fraction=sum(span.is_twin for span in spans) / len(spans),
    )


def _cut(
    text: str,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    twins: set[tuple[int, int]],
) -> list[SpanView]:
    sides = [
        encode_responses([text], tokenizer, wants_offsets=True)[0]
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    ]
    cut = shared_spans(text, *(offsets for _, offsets in sides))
    if not cut:
        raise UserError(f"a tokenizer has no token for the text {text!r}: give another one")
    edges: Offsets = list(zip([0, *cut.ends[:-1]], cut.ends, strict=True))
    spans = []
    for index, (start, end) in enumerate(char_to_byte_offsets(text, edges).tolist()):
        student, teacher = (_within(text, side, own, index) for side, own in zip(sides, cut.ids, strict=True))
        is_twin = len(student) == len(teacher) == 1 and (student[0][0], teacher[0][0]) in twins
        spans.append(SpanView(start, end, [token for _, token in student], [token for _, token in teacher], is_twin))
    return spans


def _within(text: str, side: tuple[list[int], Offsets], span_ids: Sequence[int], index: int) -> list[tuple[int, str]]:
    """Each id of a side in a span, and what it covers of the text; a piece of a character shows the whole of it."""
    ids, offsets = side
    return [(ids[at], text[slice(*offsets[at])]) for at, span in enumerate(span_ids) if span == index]

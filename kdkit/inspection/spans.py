"""Two tokenizers on the same text: whether their ids can be compared, and the spans of bytes that both agree on."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kdkit.data.encoding import encode_responses
from kdkit.data.spans import Offsets, TokenizerRelation, char_to_byte_offsets, shared_spans, tokenizer_relation
from kdkit.data.vocabulary import matching_ids
from kdkit.errors import UserError


@dataclass(frozen=True)
class Span:
    """The smallest stretch of a text at whose both ends a token of either side ends."""

    text: str
    start_byte: int
    end_byte: int
    student_tokens: list[str]
    teacher_tokens: list[str]
    is_twin: bool
    """One token on either side, of ids that stand for the same bytes: there the two vocabularies meet."""


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


def read_spans(
    text: str, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> list[Span]:
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
) -> list[Span]:
    sides = [
        encode_responses([text], tokenizer, wants_offsets=True)[0]
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    ]
    cut = shared_spans(text, *(offsets for _, offsets in sides))
    if not cut:
        raise UserError(f"a tokenizer has no token for the text {text!r}: give another one")
    edges: Offsets = list(zip([0, *cut.ends[:-1]], cut.ends, strict=True))
    in_bytes = char_to_byte_offsets(text, edges).tolist()
    spans = []
    for index, (start, end) in enumerate(edges):
        ids, tokens = zip(
            *(_within(text, side, own, index) for side, own in zip(sides, cut.ids, strict=True)), strict=True
        )
        is_twin = len(ids[0]) == len(ids[1]) == 1 and (ids[0][0], ids[1][0]) in twins
        spans.append(Span(text[start:end], *in_bytes[index], *tokens, is_twin=is_twin))
    return spans


def _within(
    text: str, side: tuple[list[int], Offsets], span_ids: Sequence[int], index: int
) -> tuple[list[int], list[str]]:
    """Ids of a side in a span, and what each covers of the text; a piece of a character shows the whole of it."""
    own = [at for at, span in enumerate(span_ids) if span == index]
    return [side[0][at] for at in own], [text[slice(*side[1][at])] for at in own]

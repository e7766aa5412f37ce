"""Tokens against the bytes of their text: word units, byte offsets, and whether two tokenizers agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = Sequence[tuple[int, int]]

_IS_WHITESPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # the last one is U+3000
_MAX_EVIDENCE_CHARS = 40

# Where tokenizers differ: case, digits, accents, code, runs of spaces, emoji, scripts, odd spaces.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " leading space",
    "trailing space ",
    "two  spaces,   three    four",
    "tab\tand\ttabs\t\there",
    "line\nbreaks\n\nand\r\nmore\n",
    "0 1 12 123 1234 12345 1234567890",
    "3.14159, -2.5e-10, 1,000,000 and 50%",
    "I'm you're THEY'LL we've don't",
    "naïve café, Straße, Ærøskøbing, Żółć, ñandú",
    "e\u0301 against \u00e9",  # the same letter, decomposed and composed
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }",
    '<html><body class="x">&nbsp;</body></html>',
    '{"key": [1, 2.0, null, true]}',
    "https://example.org/path?q=a+b&c=%20#part",
    "CamelCase snake_case kebab-case SCREAMING_CASE",
    "🙂 👩‍👩‍👧 🏳️‍🌈 ❤️",
    "你好，世界。这是一个测试",
    "日本語のテキスト、カタカナ",
    "한국어 텍스트",
    "Привет, мир! Ёлка",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "no\u00a0break, wide\u3000space, zero\u200bwidth",
    "∑ x² ≤ √y → ∞ — “quotes” … ‘single’",
    "antidisestablishmentarianism pneumonoultramicroscopic",
    "$$ \\frac{a}{b} $$ #hashtag @user",
    "???!!! ... --- ===",
    "### Instruction:\nSay hello.\n\n### Response:\n",
)


@dataclass(frozen=True)
class TokenizerRelation:
    """How the ids of two tokenizers relate, and what shows it.

    kind is "same" (one vocabulary), "padded" (the same ids for all text; one side has further
    reserved ids at its end) or "different". num_shared_ids is the number of first ids that mean the same
    on both sides, 0 when different.
    """

    kind: Literal["same", "padded", "different"]
    evidence: str
    num_shared_ids: int = 0


def word_units(text: str, offsets: Offsets) -> list[int]:
    """The word that each token belongs to: `shared_word_units` for one tokenizer.

    Args:
        text: what was tokenised; tokens cut off its end change no unit before them.
        offsets: (start, end) of each token in characters, as a fast tokenizer gives them.
    Returns:
        One unit id per token, -1 for a token of whitespace only or of nothing.
    """
    return shared_word_units(text, offsets)[0]


def word_units_of(texts: Sequence[str], offsets: Sequence[Offsets]) -> list[list[int]]:
    """`word_units` of each of many texts; one by one, short texts would cost more calls than work.

    Args:
        texts: what was tokenised.
        offsets: of each text, as for `word_units`.
    Returns:
        Unit ids of each text's tokens.
    """
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    counts = np.array([len(own) for own in offsets], dtype=np.int64)
    row = np.repeat(np.arange(len(texts)), counts)  # (tokens of all texts,)
    begins = np.cumsum(sizes + 1) - (sizes + 1)  # a line break parts the texts, and so their words
    flat = np.array(list(chain.from_iterable(offsets)), dtype=np.int64).reshape(-1, 2)
    flat = flat.clip(0, sizes[row, None]) + begins[row, None]
    units = np.array(shared_word_units("\n".join(texts), flat)[0], dtype=np.int64)
    first = np.full(len(texts), np.iinfo(np.int64).max)
    np.minimum.at(first, row[units >= 0], units[units >= 0])
    own_units = np.where(units < 0, -1, units - first[row]).tolist()
    ends = np.cumsum(counts).tolist()
    return [own_units[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]


def shared_word_units(text: str, *sides: Offsets | np.ndarray) -> list[list[int]]:
    """Word units of the same text under several tokenizers: unit u is the same bytes on all of them.

    A unit is a word between whitespace; a token belongs to the word of its first character that is not
    whitespace, so that the space a token begins with costs nothing. Words that one token of any side
    spans are one unit, and a word that some side has no token for (its normaliser dropped it) joins the
    word before it. So every byte of every word is in exactly one unit, each unit has a token on every
    side, and ids run 0, 1, 2, ... in the order of the text. Whitespace between words is in no unit.

    Args:
        text: the common text, cut to what every side covers.
        sides: for each tokenizer the (start, end) of its tokens in characters; pieces of one
            character, such as an emoji in several byte tokens, all carry the offsets of that character.
    Returns:
        For each side one unit id per token, -1 for a token of whitespace only or of nothing; all -1
        where a side has no token in any word.
    """
    starts, continues = _word_edges(text)
    num_words = int(starts.sum())
    touched = [_touched_words((starts, continues), side) for side in sides]
    joined = np.zeros(num_words, dtype=bool)  # (words,); this word continues the unit before it
    for first, last in touched:
        first, end = first[first >= 0], last[first >= 0] + 1
        is_covered = _count_intervals(first, end, num_words) > 0
        if not is_covered.any():
            return [[-1] * len(side) for side in sides]
        joined |= (_count_intervals(first + 1, end, num_words) > 0) | ~is_covered
        joined[: is_covered.argmax() + 1] = True  # words up to the first covered one belong to unit 0
    unit_of_word = np.cumsum(~joined)
    return [np.where(first < 0, -1, unit_of_word[first]).tolist() for first, _ in touched]


@dataclass(frozen=True)
class SharedSpans:
    """A text cut into spans that several tokenizers agree on."""

    ids: tuple[list[int], ...]
    """For each side one span id per token, 0, 1, 2, ... in the order of the text."""
    ends: list[int]
    """Where each span ends, in characters; it begins where the one before it ends."""

    def __len__(self) -> int:
        return len(self.ends)


def shared_spans(text: str, *sides: Offsets) -> SharedSpans:
    """Spans of the same text under several tokenizers: span s is the same bytes on all of them.

    A span is the smallest stretch of text at whose both ends a token ends on every side. What no token of a side
    covers, such as the spaces that WordPiece leaves out, belongs to the token after it, at the very end to the last
    one. So every byte is in exactly one span, every token is in one span, and each span has a token on every side.

    Args:
        text: the common text.
        sides: for each tokenizer the (start, end) of its tokens in characters; pieces of one character all carry its
            range, and are never parted.
    Returns:
        SharedSpans; without a span where a side has no token.
    """
    arrays = [np.asarray(side, dtype=np.int64).reshape(-1, 2).clip(0, len(text)) for side in sides]
    if any(len(spans) == 0 for spans in arrays):
        return SharedSpans(tuple([] for _ in sides), [])
    is_cut = np.logical_and.reduce([_is_cut(spans, len(text)) for spans in arrays])  # (chars + 1,)
    ends = np.flatnonzero(is_cut)
    ids = []
    for spans in arrays:
        has_text = spans[:, 0] < spans[:, 1]
        own = np.where(has_text, np.searchsorted(ends, spans[:, 1]), np.searchsorted(ends, spans[:, 1], side="right"))
        ids.append(np.maximum.accumulate(own.clip(max=len(ends) - 1)).tolist())
    return SharedSpans(tuple(ids), ends.tolist())


def offsets_of_ids(
    sequences: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[str, list[tuple[int, int]]]]:
    """The text of each sequence of ids, special tokens left out, and where in it each id's own part is.

    Mostly the text, tokenised again, gives the same ids, and their offsets are the answer. A model may also write a
    word in other pieces than the tokenizer would; then each id's part is what decoding gains by it.

    Args:
        sequences: ids as a model produced them.
        tokenizer: a fast one.
    Returns:
        For each sequence its text and (start, end) of each id in characters; pieces of one character have its range.
    """
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    again = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    return [
        (text, offsets if ids == list(sequence) else _grown_offsets(text, sequence, tokenizer))
        for text, sequence, ids, offsets in zip(
            texts, sequences, again["input_ids"], again["offset_mapping"], strict=True
        )
    ]


def text_not_given_back(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The first of PROBES whose words are others once it was encoded and decoded; None where all come back.

    A decoder that loses spaces, or a normaliser that rewrites letters, makes other words of what a model writes.
    """
    for text in PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False).split() != text.split():
            return text
    return None


def _grown_offsets(text: str, ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]]:
    """(start, end) of each id, from the length of what the ids up to it decode to."""
    begun = tokenizer.batch_decode(
        [list(ids[: index + 1]) for index in range(len(ids))],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    # A character that is not complete decodes to one or several U+FFFD, and is one character of the text.
    whole = [prefix.rstrip("\ufffd") for prefix in begun]
    lengths = [len(kept) + (kept != prefix) for kept, prefix in zip(whole, begun, strict=True)]
    ends = np.maximum.accumulate(np.minimum(lengths, len(text)))
    starts = np.concatenate([[0], ends[:-1]])
    is_piece = np.array([prefix.endswith("\ufffd") for prefix in [" ", *begun[:-1]]]) & (starts == ends)
    starts = np.where(is_piece, np.maximum(ends - 1, 0), starts)  # it completes the character before it
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def char_to_byte_offsets(text: str, offsets: Offsets) -> np.ndarray:
    """Offsets in UTF-8 bytes from offsets in characters.

    Args:
        text: what was tokenised.
        offsets: (start, end) in characters.
    Returns:
        (n, 2) int64: (start, end) in bytes of `text.encode()`; pieces of one character have its whole range.
    """
    code_points = _code_points(text)
    widths = 1 + sum((code_points >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
    ends = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
    return ends[np.asarray(offsets, dtype=np.int64).reshape(-1, 2)]


def tokenizer_relation(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> TokenizerRelation:
    """Whether a teacher's distribution over ids can be compared with a student's, id by id.

    Proven, not assumed from names: PROBES get the same ids from both, and the maps token -> id are
    equal, or equal up to reserved ids at the end that no text produces.

    Args:
        a: one tokenizer.
        b: the other; the order does not matter for the kind.
    Returns:
        TokenizerRelation with the first difference, or the counts, as evidence.
    """
    difference = _first_difference(a, b, PROBES)
    if difference is not None:
        return TokenizerRelation("different", difference)
    vocabulary_a, vocabulary_b = a.get_vocab(), b.get_vocab()
    odd = vocabulary_a.items() ^ vocabulary_b.items()
    agree = f"the same ids for {len(PROBES)} probe texts"
    if not odd:
        evidence = f"{agree} and one vocabulary of {len(vocabulary_a):,} tokens"
        if a.eos_token_id != b.eos_token_id:
            evidence += f"; but text ends with {a.eos_token!r} here, with {b.eos_token!r} there"
        return TokenizerRelation("same", evidence, 1 + max(vocabulary_a.values()))
    num_shared = min(index for _, index in odd)
    reason = _why_not_padded(a, b, num_shared)
    if reason is not None:
        return TokenizerRelation("different", reason)
    counts = f"{len(vocabulary_a):,} and {len(vocabulary_b):,} tokens"
    evidence = f"{agree}; {counts}, equal up to id {num_shared - 1:,}, the rest reserved"
    return TokenizerRelation("padded", evidence, num_shared)


def _is_cut(spans: np.ndarray, num_chars: int) -> np.ndarray:
    """(chars + 1,) bool: a token ends before this character and none goes on over it; the end of the text is one."""
    starts, ends = spans[spans[:, 0] < spans[:, 1]].T
    is_end = np.zeros(num_chars + 1, dtype=bool)
    is_end[ends[ends < ends.max(initial=0)]] = True
    is_end[num_chars] = True
    return is_end & (_count_intervals(starts + 1, ends, num_chars + 1) == 0)


def _word_edges(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(chars,) bool twice: a word begins at this character; a word goes on at this character."""
    is_word = ~_IS_WHITESPACE[np.minimum(_code_points(text), len(_IS_WHITESPACE) - 1)]
    starts = is_word.copy()
    starts[1:] &= ~is_word[:-1]
    return starts, is_word & ~starts


def _touched_words(
    edges: tuple[np.ndarray, np.ndarray], offsets: Offsets | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens,) int twice: the first and the last word that a token has a character of, or -1."""
    starts, continues = edges
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).clip(0, len(starts))
    words_before = np.concatenate([[0], np.cumsum(starts)])  # (chars + 1,)
    first = words_before[spans[:, 0]] - np.append(continues, False)[spans[:, 0]]
    last = words_before[spans[:, 1]] - 1
    is_outside = (spans[:, 0] >= spans[:, 1]) | (first > last)
    return np.where(is_outside, -1, first), np.where(is_outside, -1, last)


def _count_intervals(first: np.ndarray, end: np.ndarray, size: int) -> np.ndarray:
    """(size,) int: how many of the half-open intervals hold each index."""
    steps = np.bincount(first, minlength=size + 1) - np.bincount(end, minlength=size + 1)
    return np.cumsum(steps)[:size]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _why_not_padded(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase", num_shared: int) -> str | None:
    """Why the ids from num_shared on matter to text; None where they are only reserved."""
    for tokenizer in (a, b):
        eos = tokenizer.eos_token_id
        if eos is not None and eos >= num_shared:
            return (
                f"the end-of-text token {tokenizer.eos_token!r} has id {eos:,}, "
                f"and only the ids below {num_shared:,} mean the same"
            )
        reserved = tokenizer.get_added_vocab()
        ordinary = [
            token for token, index in tokenizer.get_vocab().items() if index >= num_shared and token not in reserved
        ]
        difference = _first_difference(a, b, [tokenizer.convert_tokens_to_string([token]) for token in ordinary])
        if difference is not None:
            return difference
    return None


def _first_difference(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase", texts: Sequence[str]) -> str | None:
    """The first text that gets other ids from b than from a, in words; None where there is none."""
    if not texts:
        return None
    ids_a = a(list(texts), add_special_tokens=False)["input_ids"]
    ids_b = b(list(texts), add_special_tokens=False)["input_ids"]
    for text, left, right in zip(texts, ids_a, ids_b, strict=True):
        if left != right:
            shown = text[:_MAX_EVIDENCE_CHARS]
            return f"{shown!r} becomes ids {_shorten(left)} on one side, {_shorten(right)} on the other"
    return None


def _shorten(ids: list[int]) -> str:
    shown = ", ".join(str(index) for index in ids[:8])
    return f"[{shown}{', ...' if len(ids) > 8 else ''}]"

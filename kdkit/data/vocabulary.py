"""What each id of a tokenizer stands for, in bytes of text, and which ids of two tokenizers stand for the same."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kdkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Read = Callable[[str], bytes | None]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

# Decoder steps that change nothing of what a single token says: they join tokens and trim the ends of a whole text.
_NEUTRAL_STEPS = {"ByteFallback", "Fuse", "Strip"}

# Scripts that write no space between words, and that WordPiece cuts into single characters: CJK and kana, not Hangul.
_UNSPACED = re.compile("[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(frozen=True)
class _Family:
    """How a tokenizer's tokens are read."""

    read: _Read
    """A token's own bytes."""
    read_in_text: _Read
    """The bytes that it adds to a text which goes on before it."""


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> list[bytes | None]:
    """The bytes of text that each id stands for.

    A space belongs to the token that begins with it, however it is written: "Ġthe" of a byte-level BPE and "▁the" of
    a sentencepiece vocabulary are both b" the". So the tokens of an encoding, joined, are its text; where the
    tokenizer puts a space before every text, with that space. A WordPiece vocabulary has no spaces: "the" is b"the",
    as "##the" is, and the tokens, joined, are the text without its spaces. Where a normaliser rewrites the text, as by
    lower case, the bytes are those of the rewritten text.

    Args:
        tokenizer: a fast one.
    Returns:
        For each id its bytes, pieces of a character among them; None for added tokens, special ones or not, for the
        unknown token, and for ids without a token.
    Raises:
        UserError: the tokenizer is not a fast one, or is none of byte-level, sentencepiece or WordPiece.
    """
    parts = _parts_of(tokenizer)
    read = _family_of(parts, tokenizer).read
    found: list[bytes | None] = [None] * (1 + max(tokenizer.get_vocab().values(), default=-1))
    for token, index in _ordinary_tokens(tokenizer, parts).items():
        found[index] = read(token)
    return found


def matching_ids(
    student_tokenizer: "PreTrainedTokenizerBase", teacher_tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """Pairs of ids with which two tokenizers write the same bytes, and their end-of-text ids.

    The bytes are those of `token_bytes`, but for WordPiece, whose "the" stands for "the" and for " the": a word that
    spaces set apart gets the space that mostly precedes it, so that it matches " the" of the others, and "##the"
    matches "the". Punctuation and CJK, which WordPiece cuts off whatever is around them, get none. So a word behind a
    bracket is matched with the wrong one of the two; and so is the first word of a text for any tokenizer that puts a
    space before it.

    Args:
        student_tokenizer: a fast one.
        teacher_tokenizer: a fast one.
    Returns:
        The student's ids, ascending, and for each the teacher's. Where a side has several ids of the same bytes, the
        first one that is not the fallback to a single byte, as the tokenizer itself takes that last.
    Raises:
        UserError: as `token_bytes`.
    """
    student, teacher = _ids_by_bytes(student_tokenizer), _ids_by_bytes(teacher_tokenizer)
    pairs = [(index, teacher[written]) for written, index in student.items() if written in teacher]
    ends = student_tokenizer.eos_token_id, teacher_tokenizer.eos_token_id
    if None not in ends:
        pairs.append(ends)
    pairs.sort()
    return [student_id for student_id, _ in pairs], [teacher_id for _, teacher_id in pairs]


@dataclass(frozen=True)
class ByteGroups:
    """Ids of two vocabularies that may begin the same text, put together."""

    student: list[int]
    """The group of each of the student's ids, -1 where it is in none."""
    teacher: list[int]
    """The group of each of the teacher's ids, likewise."""
    num_groups: int


def byte_groups(
    student_tokenizer: "PreTrainedTokenizerBase", teacher_tokenizer: "PreTrainedTokenizerBase"
) -> ByteGroups:
    """Groups of ids such that the two first tokens of any text are in one group, whatever follows them.

    Ids of equal bytes are in one group. An id that the other vocabulary has not is in the group of the token with which
    the other side begins its bytes: where the teacher writes " and" and the student " a" and "nd", " and" goes with
    " a". So the mass of a group means the same on both sides, which that of " a" alone does not: the teacher gives it
    to texts that go on otherwise, the student to all of them.

    Args:
        student_tokenizer: a fast one.
        teacher_tokenizer: a fast one.
    Returns:
        ByteGroups; a group has ids of both sides. Special tokens are in none but the two ends of text, which are one.
        Context may make a tokenizer begin a text otherwise than its token alone; such a text is the exception.
    Raises:
        UserError: as `token_bytes`.
    """
    sides = (student_tokenizer, teacher_tokenizer)
    canonical = [_ids_by_bytes(tokenizer) for tokenizer in sides]
    written = [_bytes_by_id(tokenizer) for tokenizer in sides]
    parent = {(side, index): (side, index) for side in (0, 1) for index in written[side]}

    def root(node: tuple[int, int]) -> tuple[int, int]:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for side, other in ((0, 1), (1, 0)):
        own = written[side]
        for index, first in zip(own, _first_ids(list(own.values()), sides[other], canonical[other]), strict=True):
            if first is not None and (other, first) in parent:
                parent[root((side, index))] = root((other, first))
    ends = [tokenizer.eos_token_id for tokenizer in sides]
    if None not in ends:
        parent[0, ends[0]] = parent[1, ends[1]] = (0, ends[0])
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for node in parent:
        members.setdefault(root(node), []).append(node)
    groups = [nodes for nodes in members.values() if len({side for side, _ in nodes}) == 2]
    found = [[-1] * (1 + max(tokenizer.get_vocab().values())) for tokenizer in sides]
    for number, nodes in enumerate(groups):
        for side, index in nodes:
            found[side][index] = number
    return ByteGroups(found[0], found[1], len(groups))


def _bytes_by_id(tokenizer: "PreTrainedTokenizerBase") -> dict[int, bytes]:
    """The bytes that each id adds to a text which goes on before it, without ids of none and the end-of-text."""
    parts = _parts_of(tokenizer)
    read = _family_of(parts, tokenizer).read_in_text
    tokens = _ordinary_tokens(tokenizer, parts).items()
    found = {index: read(token) for token, index in tokens if index != tokenizer.eos_token_id}
    return {index: written for index, written in found.items() if written}


def _first_ids(
    texts: list[bytes], tokenizer: "PreTrainedTokenizerBase", canonical: dict[bytes, int]
) -> list[int | None]:
    """The id with which a tokenizer begins some bytes in the midst of a text; None where it has none for them."""
    found = [canonical.get(text) for text in texts]
    unknown = [place for place, index in enumerate(found) if index is None and _is_text(texts[place])]
    known = set(canonical.values())
    for place, (ids, offsets) in zip(unknown, _encode([texts[place] for place in unknown], tokenizer), strict=True):
        after = [index for index, (start, end) in zip(ids, offsets, strict=True) if start >= 1 and end > start]
        if after and after[0] in known:
            found[place] = after[0]
    longest = max(map(len, canonical), default=0)
    for place, index in enumerate(found):
        if index is None:  # pieces of a character, or joined with the line break
            lengths = range(min(len(texts[place]), longest), 0, -1)
            found[place] = next((canonical[texts[place][:n]] for n in lengths if texts[place][:n] in canonical), None)
    return found


def _encode(texts: list[bytes], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and offsets of each text behind a line break: a space that a tokenizer puts before all text comes there."""
    if not texts:
        return []
    encoded = tokenizer(
        ["\n" + text.decode() for text in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=True,
        verbose=False,
    )
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _is_text(written: bytes) -> bool:
    """Whether bytes are whole characters."""
    try:
        written.decode()
    except UnicodeDecodeError:
        return False
    return True


def _ids_by_bytes(tokenizer: "PreTrainedTokenizerBase") -> dict[bytes, int]:
    """The id that a tokenizer writes some bytes with, in the midst of a text; without the end-of-text id."""
    parts = _parts_of(tokenizer)
    read = _family_of(parts, tokenizer).read_in_text
    tokens = _ordinary_tokens(tokenizer, parts).items()
    found: dict[bytes, int] = {}
    for token, index in sorted(tokens, key=lambda item: (_BYTE_TOKEN.fullmatch(item[0]) is not None, item[1])):
        written = read(token)
        if written and index != tokenizer.eos_token_id:
            found.setdefault(written, index)
    return found


def _parts_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What a tokenizer is made of, as in its tokenizer.json."""
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} is not a fast one, so its parts cannot be read: convert it to a"
            " tokenizer.json, or choose a model that has one"
        )
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _ordinary_tokens(tokenizer: "PreTrainedTokenizerBase", parts: dict[str, Any]) -> dict[str, int]:
    """Token -> id of the model's own vocabulary, by id, without added tokens and the unknown token."""
    model = parts["model"]
    left_out = {added["id"] for added in parts["added_tokens"]} | {model.get("unk_id")}
    unordered = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)  # as a hash table has it, each time anew
    vocabulary = dict(sorted(unordered.items(), key=lambda item: item[1]))
    return {
        token: index for token, index in vocabulary.items() if index not in left_out and token != model.get("unk_token")
    }


def _family_of(parts: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> _Family:
    """How the tokens are to be read, from the steps of the decoder."""
    steps = _decoder_steps(parts["decoder"])
    kinds = {step["type"] for step in steps}
    telling = [step for step in steps if step["type"] not in _NEUTRAL_STEPS]
    match telling:
        case [{"type": "ByteLevel"}] if not _has_affixes(parts["model"]):
            return _Family(_read_byte_level, _read_byte_level)
        case [{"type": "Metaspace", "replacement": mark}] | [
            {"type": "Replace", "pattern": {"String": mark}, "content": " "}
        ] if not _has_affixes(parts["model"]):
            read = partial(_read_marked, mark=mark, has_byte_tokens="ByteFallback" in kinds)
            return _Family(read, read)
        case [{"type": "WordPiece", "prefix": prefix}]:
            return _Family(partial(_read_piece, prefix=prefix), partial(_read_piece_in_text, prefix=prefix))
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path} ({parts['model']['type']}) decodes by"
        f" {' + '.join(step['type'] for step in steps) or 'nothing'}: what its tokens stand for is known for ByteLevel,"
        " sentencepiece (Metaspace, or Replace to a space) and WordPiece, without marks of a word's end; use a loss"
        " that compares no ids (uld, span_likelihood), or a model with such a tokenizer"
    )


def _has_affixes(model: dict[str, Any]) -> bool:
    """Whether a BPE marks the ends or insides of words within its tokens, which such a decoder leaves in the text."""
    return bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a decoder in order, those within a sequence one by one."""
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]


def _byte_of_character() -> dict[str, int]:
    """The printable character that a byte-level BPE writes for each byte: itself, or from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _read_byte_level(token: str) -> bytes | None:
    if not _BYTE_OF_CHARACTER.keys() >= set(token):
        return None  # the decoder writes such a token as it is, but no text is ever cut into it
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def _read_marked(token: str, *, mark: str, has_byte_tokens: bool) -> bytes:
    """A sentencepiece token: a mark for each space; a single byte as <0x0A>."""
    byte = _BYTE_TOKEN.fullmatch(token) if has_byte_tokens else None
    return bytes.fromhex(byte[1]) if byte else token.replace(mark, " ").encode()


def _read_piece(token: str, *, prefix: str) -> bytes:
    return token.removeprefix(prefix).encode()


def _read_piece_in_text(token: str, *, prefix: str) -> bytes:
    is_word = not token.startswith(prefix) and token[:1].isalnum() and not _UNSPACED.match(token)
    return (b" " if is_word else b"") + _read_piece(token, prefix=prefix)

"""Bytes of tokens in every family of tokenizers, trained here on a few texts, and pairs of ids between them."""

import copy
import json
import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kdkit.config import demo_folder
from kdkit.data.spans import PROBES
from kdkit.data.vocabulary import _BYTE_OF_CHARACTER, matching_ids, token_bytes
from kdkit.errors import UserError

TEXTS = (
    "The quick brown fox jumps over the lazy dog",
    "naïve café, Straße, Żółć and ñandú",
    "e\u0301 against \u00e9",
    "🙂 👩‍👩‍👧 🏳️‍🌈 ❤️",
    "你好，世界 日本語のテキスト 한국어 텍스트",
    "two  spaces,   three\tand\na line",
    "def f(x): return x**2  # (the end)",
    "the",
    "",
)
TRAINING = [*PROBES, *TEXTS, "the thing in the other house, then the end of the thing"] * 3
SPECIAL = {"unk_token": "<unk>", "eos_token": "</s>"}


def wrap(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def train_byte_level(size: int = 500, **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = special or {"eos_token": "<|endoftext|>"}
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(special.values()),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING, trainer)
    return wrap(backend, **special)


def train_llama() -> PreTrainedTokenizerFast:
    """BPE over "▁words" with a token for every byte, none of them added, as sentencepiece makes it."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=220, limit_alphabet=70, show_progress=False)
    backend.train_from_iterator(TRAINING, trainer)
    parts = json.loads(backend.to_str())
    first = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = sorted(parts["model"]["vocab"], key=parts["model"]["vocab"].get)
    parts["model"] |= {
        "vocab": {piece: index for index, piece in enumerate([*first, *pieces])},
        "unk_token": "<unk>",
        "byte_fallback": True,
        "fuse_unk": True,
    }
    backend = Tokenizer.from_str(json.dumps(parts))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(backend, **SPECIAL)


def train_unigram() -> PreTrainedTokenizerFast:
    """Unigram over "▁words" without byte fallback: a character it has not seen is unknown."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=700, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(TRAINING, trainer)
    return wrap(backend, **SPECIAL)


def train_wordpiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False, clean_text=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(TRAINING, trainer)
    return wrap(backend, unk_token="[UNK]", eos_token="[SEP]")


@pytest.fixture(scope="module")
def families() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "byte-level": train_byte_level(),
        "llama": train_llama(),
        "unigram": train_unigram(),
        "wordpiece": train_wordpiece(),
    }


EVERY = pytest.mark.parametrize("family", ["byte-level", "llama", "unigram", "wordpiece"])


def joined(tokenizer: PreTrainedTokenizerFast, text: str) -> bytes:
    found = token_bytes(tokenizer)
    pieces = [found[index] for index in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert None not in pieces
    return b"".join(pieces)


class TestTokenBytes:
    @pytest.mark.parametrize("text", TEXTS)
    def test_byte_level_tokens_join_to_the_text(self, families: dict, text: str) -> None:
        assert joined(families["byte-level"], text) == text.encode()

    @pytest.mark.parametrize("family", ["llama", "unigram"])
    @pytest.mark.parametrize("text", TEXTS)
    def test_sentencepiece_tokens_join_to_the_text_with_a_space_before_it(
        self, families: dict, family: str, text: str
    ) -> None:
        assert joined(families[family], text) == (b" " + text.encode() if text else b"")

    @pytest.mark.parametrize("text", TEXTS)
    def test_wordpiece_tokens_join_to_the_text_without_its_spaces(self, families: dict, text: str) -> None:
        assert joined(families["wordpiece"], text) == re.sub(r"\s", "", text).encode()

    def test_characters_that_no_training_text_has_come_as_bytes(self, families: dict) -> None:
        for family, prefix in (("byte-level", b""), ("llama", b" ")):
            assert joined(families[family], "ሰላም ༄ 𝄞\x07") == prefix + "ሰላም ༄ 𝄞\x07".encode()
        ids = families["llama"]("𝄞", add_special_tokens=False)["input_ids"]
        assert [token_bytes(families["llama"])[index] for index in ids] == [b" ", b"\xf0", b"\x9d", b"\x84", b"\x9e"]

    @EVERY
    def test_every_id_has_its_place_and_special_ones_none(self, families: dict, family: str) -> None:
        tokenizer = copy.deepcopy(families[family])
        tokenizer.add_tokens([AddedToken("<think>", special=False)])
        found = token_bytes(tokenizer)
        assert len(found) == len(tokenizer)
        added = {index for index, piece in enumerate(found) if piece is None}
        assert added == {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<think>")}

    def test_the_same_word_behind_a_space_is_the_same_bytes(self, families: dict) -> None:
        for family, mark in (("byte-level", "Ġ"), ("llama", "▁"), ("unigram", "▁")):
            tokenizer = families[family]
            assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids(mark + "th")] == b" th"
            assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("th")] == b"th"

    def test_a_word_and_its_continuation_are_the_same_bytes_for_wordpiece(self, families: dict) -> None:
        tokenizer = families["wordpiece"]
        found = token_bytes(tokenizer)
        assert [found[index] for index in tokenizer.convert_tokens_to_ids(["t", "##t"])] == [b"t", b"t"]

    def test_byte_tokens_of_a_decoder_that_writes_them_out_are_text(self) -> None:
        backend = Tokenizer(models.BPE({"<0x41>": 0, "▁a": 1}, []))
        backend.decoder = decoders.Metaspace()
        assert token_bytes(wrap(backend)) == [b"<0x41>", b" a"]

    def test_an_unknown_token_that_was_not_added_stands_for_nothing(self) -> None:
        unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], unk_id=0))
        unigram.decoder = decoders.Metaspace()
        assert token_bytes(wrap(unigram)) == [None, b" a"]

    def test_ids_without_a_token_stand_for_nothing(self) -> None:
        backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 4}, unk_token="[UNK]"))
        backend.decoder = decoders.WordPiece()
        assert token_bytes(wrap(backend)) == [None, b"a", None, None, b"b"]

    def test_a_token_outside_the_byte_alphabet_stands_for_nothing(self) -> None:
        backend = Tokenizer(models.BPE({"a": 0, "日": 1}, []))
        backend.decoder = decoders.ByteLevel()
        assert token_bytes(wrap(backend)) == [b"a", None]

    def test_the_byte_alphabet_is_that_of_gpt2(self) -> None:
        assert {character: byte for byte, character in bytes_to_unicode().items()} == _BYTE_OF_CHARACTER

    def test_the_demos_tokenizer_is_read(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(demo_folder() / "teacher")
        assert joined(tokenizer, "How many days has May?") == b"How many days has May?"


class TestUnknownFamilies:
    def refuse(self, backend: Tokenizer, match: str) -> None:
        with pytest.raises(UserError, match=match):
            token_bytes(wrap(backend, name_or_path="some/model"))

    def test_a_bpe_that_marks_the_ends_of_words(self) -> None:
        backend = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
        self.refuse(backend, r"some/model \(BPE\) decodes by BPEDecoder: .*uld, span_likelihood")
        backend.decoder = decoders.ByteLevel()
        self.refuse(backend, r"decodes by ByteLevel: .*without marks of a word's end")

    def test_no_decoder_at_all(self) -> None:
        self.refuse(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), r"\(WordLevel\) decodes by nothing")

    def test_steps_that_rewrite_the_text_otherwise(self) -> None:
        backend = Tokenizer(models.BPE({"a": 0}, []))
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Replace("a", "b")])
        self.refuse(backend, "decodes by Replace [+] Replace")
        backend.decoder = decoders.Replace("▁", "_")
        self.refuse(backend, "decodes by Replace")

    def test_a_tokenizer_without_its_parts(self) -> None:
        class Slow:
            is_fast = False
            name_or_path = "some/model"

        with pytest.raises(UserError, match=r"some/model is not a fast one.*tokenizer\.json"):
            token_bytes(Slow())


class TestMatchingIds:
    @EVERY
    def test_a_tokenizer_matches_itself_but_for_ids_of_the_same_bytes(self, families: dict, family: str) -> None:
        tokenizer = families[family]
        student, teacher = matching_ids(tokenizer, tokenizer)
        assert student == teacher == sorted(set(student))
        assert tokenizer.eos_token_id in student
        if family == "byte-level":
            readable = {index for index, piece in enumerate(token_bytes(tokenizer)) if piece is not None}
            assert set(student) == readable | {tokenizer.eos_token_id}

    @pytest.mark.parametrize("other", ["llama", "unigram"])
    def test_pairs_have_equal_bytes_each_id_once_and_none_is_missed(self, families: dict, other: str) -> None:
        student, teacher = families["byte-level"], families[other]
        student_ids, teacher_ids = matching_ids(student, teacher)
        assert student_ids == sorted(set(student_ids))
        assert len(set(teacher_ids)) == len(teacher_ids) == len(student_ids)
        ends = (student.eos_token_id, teacher.eos_token_id)
        pairs = set(zip(student_ids, teacher_ids, strict=True))
        assert ends in pairs
        ours, theirs = token_bytes(student), token_bytes(teacher)
        assert all(ours[a] == theirs[b] for a, b in pairs - {ends})
        common = {piece for piece in ours if piece is not None} & {piece for piece in theirs if piece is not None}
        assert len(pairs) == len(common) + 1
        assert len(common) > 60

    def test_the_other_way_round_gives_the_same_pairs(self, families: dict) -> None:
        there = set(zip(*matching_ids(families["llama"], families["byte-level"]), strict=True))
        back = set(zip(*matching_ids(families["byte-level"], families["llama"]), strict=True))
        assert there == {(b, a) for a, b in back}

    def test_a_fallback_to_bytes_gives_way_to_the_piece_that_texts_are_cut_into(self, families: dict) -> None:
        # "<0x65>" has a lower id than "e", but no text is ever cut into it.
        byte_level, llama = families["byte-level"], families["llama"]
        pairs = dict(zip(*matching_ids(byte_level, llama), strict=True))
        found = pairs[byte_level.convert_tokens_to_ids("e")]
        assert llama.convert_ids_to_tokens(found) == "e"
        lone = byte_level.convert_tokens_to_ids(next(c for c, byte in _BYTE_OF_CHARACTER.items() if byte == 0xF0))
        assert llama.convert_ids_to_tokens(pairs[lone]) == "<0xF0>"

    def test_a_word_of_wordpiece_matches_the_one_behind_a_space_and_its_pieces_the_bare_one(
        self, families: dict
    ) -> None:
        byte_level, wordpiece = families["byte-level"], families["wordpiece"]
        teachers = dict(zip(*matching_ids(byte_level, wordpiece), strict=True))

        def partner(token: str) -> str | None:
            index = teachers.get(byte_level.convert_tokens_to_ids(token))
            return None if index is None else wordpiece.convert_ids_to_tokens(index)

        assert partner("Ġthe") == "the"
        assert partner("t") == "##t"
        assert [partner(mark) for mark in (",", "(", "#")] == [",", "(", "#"]
        words = [token for token in byte_level.get_vocab() if re.fullmatch("Ġ[a-z]+", token) and partner(token)]
        assert len(words) > 10
        assert [partner(word) for word in words] == [word.removeprefix("Ġ") for word in words]

    def test_ideographs_of_wordpiece_are_not_behind_a_space(self) -> None:
        backend = Tokenizer(models.WordPiece({"[UNK]": 0, "日": 1, "한": 2}, unk_token="[UNK]"))
        backend.decoder = decoders.WordPiece()
        marked = Tokenizer(models.BPE({"▁日": 0, "日": 1, "▁한": 2, "한": 3}, []))
        marked.decoder = decoders.Metaspace()
        assert matching_ids(wrap(backend), wrap(marked)) == ([1, 2], [1, 2])

    def test_texts_end_with_different_tokens(self) -> None:
        one, other = (
            train_byte_level(300, eos_token="<end>"),
            train_byte_level(400, pad_token="<pad>", eos_token="<|e|>"),
        )
        student_ids, teacher_ids = matching_ids(one, other)
        assert teacher_ids[student_ids.index(one.eos_token_id)] == other.eos_token_id
        assert None not in student_ids
        without = train_byte_level(300, pad_token="<pad>")
        assert len(matching_ids(one, without)[0]) == 256 + 43

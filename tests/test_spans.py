"""Word units and byte offsets against loops written the dumb way; the tokenizer probe against made-up pairs."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdkit.data.spans import (
    PROBES,
    char_to_byte_offsets,
    shared_word_units,
    tokenizer_relation,
    word_units,
    word_units_of,
)

TEXTS = (
    "Hello there, world",
    "  two leading spaces\tand\ta tab",
    "naïve café Żółć e\u0301",
    "🙂 👩‍👩‍👧🏳️‍🌈 end",
    "你好，世界 日本語 text",
    "no\u00a0break wide\u3000space\u200bzero",
    "a\n\n\nb \r\n c   ",
    "word",
    "",
    " \t\n",
)
TRAINING = [*PROBES, *TEXTS, "Hello there, world of words and other worlds."] * 2


def wrap(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def unigram():
    """Unigram over "▁words": no byte fallback, a token may begin with the space before it."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(TRAINING, trainer)
    return wrap(backend, unk_token="<unk>")


@pytest.fixture(scope="module")
def wordpiece():
    """BERT's: lower case, no accents, CJK one by one, control and format characters dropped."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator(TRAINING, trainer)
    return wrap(backend, unk_token="[UNK]")


@pytest.fixture(scope="module")
def phrases():
    """Unigram without word boundaries: tokens such as "▁of▁the" span words."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(["of the people by the people for the people of the land"] * 9, trainer)
    return wrap(backend, unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer, unigram, wordpiece, phrases):
    return {"bytes": byte_tokenizer, "unigram": unigram, "wordpiece": wordpiece, "phrases": phrases}


def offsets_of(tokenizer, text: str) -> list[tuple[int, int]]:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def words_of(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", text)]


def touched_words(text: str, span: tuple[int, int]) -> set[int]:
    """Which words a span has a character of, character by character."""
    words = words_of(text)
    return {w for c in range(*span) for w, (start, end) in enumerate(words) if start <= c < end}


def words_of_units(text: str, offsets: list, units: list[int]) -> dict[int, set[int]]:
    """unit id -> the words its tokens have characters of."""
    found: dict[int, set[int]] = {}
    for span, unit in zip(offsets, units, strict=True):
        if unit >= 0:
            found.setdefault(unit, set()).update(touched_words(text, span))
    return found


class TestWordUnits:
    @pytest.mark.parametrize(
        ("text", "offsets", "expected"),
        [
            ("ab cd", [(0, 2), (2, 5)], [0, 1]),  # a token with its leading space
            ("ab cd", [(0, 1), (1, 2), (2, 3), (3, 5)], [0, 0, -1, 1]),  # the space on its own
            ("\t\tab", [(0, 1), (1, 4)], [-1, 0]),
            ("ab  ", [(0, 2), (2, 4)], [0, -1]),
            ("🙂 b", [(0, 1), (0, 1), (0, 1), (1, 3)], [0, 0, 0, 1]),  # one emoji in three tokens
            ("ab cd", [(0, 0), (0, 2), (1, 1), (3, 5), (5, 5)], [-1, 0, -1, 1, -1]),  # tokens of nothing
            ("ab cd ef", [(0, 2), (2, 4)], [0, 1]),  # tokens cut off the end
            ("ab cd ef", [(0, 1), (1, 4), (4, 5), (5, 8)], [0, 0, 0, 1]),  # a token over two words
            ("ab cd ef", [(0, 8)], [0]),
            ("x ab cd", [(2, 4), (4, 7)], [0, 1]),  # the first word has no token: it joins the second
            ("ab x cd", [(0, 2), (4, 7)], [0, 1]),  # the middle word has none: it joins the first
            ("ab c", [(0, 2), (2, 9)], [0, 1]),  # offsets past a text that was cut
            ("", [], []),
            (" \n", [(0, 1), (1, 2)], [-1, -1]),
            ("ab", [], []),
        ],
    )
    def test_by_hand(self, text, offsets, expected):
        assert word_units(text, offsets) == expected

    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("name", ["bytes", "unigram"])
    def test_a_token_inside_one_word_gets_the_index_of_that_word(self, tokenizers, name, text):
        offsets = offsets_of(tokenizers[name], text)
        touched = [touched_words(text, span) for span in offsets]
        assert all(len(words) <= 1 for words in touched)
        assert word_units(text, offsets) == [min(words, default=-1) for words in touched]

    def test_whitespace_is_what_python_calls_so(self):
        text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))
        units = word_units(text, [(i, i + 1) for i in range(len(text))])
        assert [char.isspace() for char in text] == [unit == -1 for unit in units]

    def test_an_emoji_of_several_tokens_is_one_unit(self, byte_tokenizer):
        offsets = offsets_of(byte_tokenizer, "a 🙂 b")
        pieces = offsets.count((2, 3))
        assert pieces > 1
        units = [unit for unit in word_units("a 🙂 b", offsets) if unit >= 0]
        assert units == [0, *[1] * pieces, 2]


class TestWordUnitsOf:
    @settings(deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.text("ab \n\u3000🙂", max_size=9),
                st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=5),
            ),
            max_size=5,
        )
    )
    def test_many_texts_are_as_each_by_itself(self, rows):
        alone = [word_units(text, offsets) for text, offsets in rows]
        assert word_units_of([text for text, _ in rows], [offsets for _, offsets in rows]) == alone

    def test_no_texts_have_no_units(self):
        assert word_units_of([], []) == []


class TestSharedWordUnits:
    def check(self, text: str, sides: list[list[tuple[int, int]]]) -> None:
        """Every claim of the docstring, by loops over characters."""
        result = shared_word_units(text, *sides)
        found = [words_of_units(text, *pair) for pair in zip(sides, result, strict=True)]
        num_units = 1 + max((unit for units in result for unit in units), default=-1)
        if not num_units:
            assert any(not words_of_units(text, side, [0] * len(side)).get(0) for side in sides)
            return
        words_covered = [set().union(*units.values()) for units in found]
        for side, units in zip(sides, result, strict=True):
            assert len(side) == len(units)
            assert set(units) - {-1} == set(range(num_units))  # dense, with a token on every side
            for span, unit in zip(side, units, strict=True):
                assert (unit == -1) == (not touched_words(text, span))
        for unit in range(num_units):
            words = set().union(*(side[unit] for side in found))
            assert words == set(range(min(words), max(words) + 1)) & set().union(*words_covered)
            for side, covered in zip(found, words_covered, strict=True):
                assert side[unit] == words & covered  # the same words, but for those without a token
        firsts = [min(found[0][unit]) for unit in range(num_units)]
        assert firsts == sorted(firsts)
        all_words = [w for unit in range(num_units) for w in set().union(*(side[unit] for side in found))]
        assert len(all_words) == len(set(all_words))

    @pytest.mark.parametrize("text", TEXTS)
    def test_unit_u_is_the_same_bytes_for_every_tokenizer(self, tokenizers, text):
        self.check(text, [offsets_of(tokenizer, text) for tokenizer in tokenizers.values()])

    @given(text=st.text(st.sampled_from("ab é🙂你\u0301\u00a0\u200b \t\n"), max_size=30))
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    def test_unit_u_is_the_same_bytes_for_any_text(self, tokenizers, text):
        self.check(text, [offsets_of(tokenizer, text) for tokenizer in tokenizers.values()])

    @given(
        text=st.text(st.sampled_from("ab  \n"), max_size=12),
        cuts=st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=3),
        holes=st.lists(st.booleans(), min_size=10, max_size=10),
    )
    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    def test_unit_u_is_the_same_bytes_for_any_cuts(self, text, cuts, holes):
        sides = []
        for points in cuts:
            edges = sorted({0, len(text), *(min(point, len(text)) for point in points)})
            spans = itertools.pairwise(edges)
            sides.append([span for span, hole in zip(spans, holes, strict=False) if not hole])
        self.check(text, sides)

    def test_tokenizers_that_cut_words_differently_agree_on_units(self, byte_tokenizer, wordpiece):
        text = "  Unhappy  naïve 🙂 families\tmulti-word"
        sides = [offsets_of(byte_tokenizer, text), offsets_of(wordpiece, text)]
        assert len(sides[0]) != len(sides[1])
        alone = [words_of_units(text, side, word_units(text, side)) for side in sides]
        assert alone[0] == alone[1] == {unit: {unit} for unit in range(5)}

    def test_words_that_one_side_spans_are_one_unit_on_both(self):
        one, two = shared_word_units("ab cd ef", [(0, 5), (5, 8)], [(0, 2), (2, 5), (5, 8)])
        assert (one, two) == ([0, 1], [0, 0, 1])

    def test_a_side_without_words_leaves_no_unit(self):
        assert shared_word_units("ab cd", [(0, 2), (2, 5)], []) == [[-1, -1], []]

    def test_whole_phrases_do_occur(self, phrases):
        """Else the tests above would not meet a token that spans words."""
        text = "of the people"
        assert any(len(touched_words(text, span)) > 1 for span in offsets_of(phrases, text))


class TestCharToByteOffsets:
    @pytest.mark.parametrize("text", TEXTS)
    def test_every_slice_has_the_same_text(self, text):
        spans = [(i, j) for i in range(len(text) + 1) for j in range(i, len(text) + 1)]
        result = char_to_byte_offsets(text, spans)
        assert result.shape == (len(spans), 2)
        data = text.encode()
        for (start, end), (first, last) in zip(spans, result.tolist(), strict=True):
            assert data[first:last].decode() == text[start:end]

    def test_no_offsets(self):
        assert char_to_byte_offsets("abc", []).shape == (0, 2)
        assert char_to_byte_offsets("", [(0, 0)]).tolist() == [[0, 0]]
        assert char_to_byte_offsets("é", [(0, 1)]).dtype == np.int64


def copy_of(tokenizer) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return wrap(backend, pad_token="<pad>", eos_token="<eos>")


def changed(tokenizer, *, tokens: dict, merges: list | None = None) -> PreTrainedTokenizerFast:
    """A copy with other ids for some tokens, or with more tokens and merges."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"].update(tokens)
    state["model"]["merges"].extend(merges or [])
    return wrap(Tokenizer.from_str(json.dumps(state)), pad_token="<pad>", eos_token="<eos>")


class TestTokenizerRelation:
    def relation(self, a, b):
        """Both ways round, which must agree."""
        result = tokenizer_relation(a, b)
        assert tokenizer_relation(b, a).kind == result.kind
        return result

    def test_a_copy_is_the_same(self, byte_tokenizer):
        relation = self.relation(byte_tokenizer, copy_of(byte_tokenizer))
        assert (relation.kind, relation.num_shared_ids) == ("same", 400)
        assert "one vocabulary of 400 tokens" in relation.evidence
        assert "ends with" not in relation.evidence

    def test_another_end_of_text_is_mentioned(self, byte_tokenizer):
        other = copy_of(byte_tokenizer)
        other.eos_token = "<pad>"
        relation = self.relation(byte_tokenizer, other)
        assert relation.kind == "same"
        assert "text ends with" in relation.evidence

    def test_reserved_ids_at_the_end_are_padding(self, byte_tokenizer):
        larger = copy_of(byte_tokenizer)
        larger.add_tokens([AddedToken("<reserved_0>", special=True), AddedToken("<tool>")])
        relation = self.relation(byte_tokenizer, larger)
        assert (relation.kind, relation.num_shared_ids) == ("padded", 400)
        assert "400 and 402 tokens" in relation.evidence

    def test_each_side_may_have_its_own_reserved_ids(self, byte_tokenizer):
        one, two = copy_of(byte_tokenizer), copy_of(byte_tokenizer)
        one.add_tokens([AddedToken("<a>", special=True)])
        two.add_tokens([AddedToken("<b>", special=True), AddedToken("<a>", special=True)])
        relation = self.relation(one, two)
        assert (relation.kind, relation.num_shared_ids) == ("padded", 400)

    def test_an_end_of_text_that_the_other_side_lacks_is_a_difference(self, byte_tokenizer):
        other = copy_of(byte_tokenizer)
        other.add_special_tokens({"eos_token": "<end>"})
        relation = self.relation(byte_tokenizer, other)
        assert (relation.kind, relation.num_shared_ids) == ("different", 0)
        assert "'<end>' has id 400" in relation.evidence

    def test_a_longer_vocabulary_that_text_reaches_is_a_difference(self, byte_tokenizer):
        """No probe holds the one further merge: all of them get the same ids."""
        longer = changed(byte_tokenizer, tokens={"zQ": 400}, merges=[["z", "Q"]])
        relation = self.relation(byte_tokenizer, longer)
        assert relation.kind == "different"
        assert relation.evidence.startswith("'zQ' becomes ids")

    def test_ordinary_tokens_at_the_end_that_no_text_reaches_are_padding(self, byte_tokenizer):
        longer = changed(byte_tokenizer, tokens={"[unused0]": 400, "[unused1]": 401})
        assert self.relation(byte_tokenizer, longer).kind == "padded"

    def test_swapped_ids_are_a_difference(self, byte_tokenizer):
        """The vocabulary has the same tokens, only two ids are swapped."""
        vocabulary = byte_tokenizer.get_vocab()
        swap = {"a": vocabulary["b"], "b": vocabulary["a"]}
        other = changed(byte_tokenizer, tokens=swap)
        relation = self.relation(byte_tokenizer, other)
        assert relation.kind == "different"
        assert "becomes ids" in relation.evidence

    def test_other_kinds_of_tokenizer_are_different(self, tokenizers):
        for name in ("unigram", "wordpiece", "phrases"):
            assert self.relation(tokenizers["bytes"], tokenizers[name]).kind == "different"

    @pytest.mark.parametrize(
        "change",
        [
            normalizers.NFC(),
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.StripAccents(),
            normalizers.Strip(),
            normalizers.Replace("\t", " "),
            normalizers.Replace("  ", " "),
            normalizers.Replace("\u200b", ""),
            normalizers.Replace("\r\n", "\n"),
        ],
    )
    def test_the_probes_see_every_usual_normaliser(self, byte_tokenizer, change):
        other = copy_of(byte_tokenizer)
        other.backend_tokenizer.normalizer = change
        assert self.relation(byte_tokenizer, other).kind == "different"

    def test_the_probes_see_digits_split_one_by_one_and_a_space_put_in_front(self, byte_tokenizer):
        for pre_tokenizer in (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=True),
        ):
            other = copy_of(byte_tokenizer)
            other.backend_tokenizer.pre_tokenizer = pre_tokenizer
            assert self.relation(byte_tokenizer, other).kind == "different"

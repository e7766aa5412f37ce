"""One text under two tokenizers: every span is the same bytes on both sides, and nothing is lost or counted twice."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from families import FAMILIES, TEXTS

from kdkit.data.batch import DistillCollator, batch_rows
from kdkit.data.encoding import TeacherText, encode_rows
from kdkit.data.pairs import Side, pair_row
from kdkit.data.rows import RowReport, Rows
from kdkit.data.spans import shared_spans
from kdkit.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PAIRS = list(itertools.permutations(FAMILIES, 2))


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in FAMILIES.items()}


def offsets(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def covered_bytes(text, spans, side):
    """Bytes that each span's tokens cover, the dumb way: one set per span."""
    starts = [len(text[:i].encode()) for i in range(len(text) + 1)]
    found = {}
    for (first, last), span in zip(side, spans, strict=True):
        found.setdefault(span, set()).update(range(starts[first], starts[last]))
    return found


def check_spans(text, sides):
    spans = shared_spans(text, *sides)
    ends = [len(text[:end].encode()) for end in spans.ends]
    ranges = list(zip([0, *ends[:-1]], ends, strict=True))
    assert sum(last - first for first, last in ranges) == len(text.encode())  # each byte in exactly one span
    for side, ids in zip(sides, spans.ids, strict=True):
        assert len(ids) == len(side)
        assert sorted(set(ids)) == list(range(len(spans)))  # no span without a token
        assert ids == sorted(ids)
        for span, found in covered_bytes(text, ids, side).items():
            assert found <= set(range(*ranges[span]))  # no token reaches into another span
    return spans


class TestSharedSpans:
    @pytest.mark.parametrize("pair", PAIRS, ids="-".join)
    @pytest.mark.parametrize("text", TEXTS)
    def test_every_byte_is_in_one_span_on_both_sides(self, tokenizers, pair, text):
        sides = [offsets(tokenizers[name], text) for name in pair]
        if all(sides):
            check_spans(text, sides)

    @pytest.mark.skipif(not SHARED.is_dir(), reason="the shared rows are not here")
    @pytest.mark.parametrize("pair", PAIRS[::2], ids="-".join)
    def test_on_a_thousand_rows(self, tokenizers, pair):
        lines = (SHARED / "t0_train.jsonl").read_text(encoding="utf-8").splitlines()
        lines += (SHARED / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["output"] for line in lines]
        texts = [text if isinstance(text, str) else text[0] for text in texts][:1000]
        assert len(texts) == 1000
        num_spans = 0
        for text in texts:
            sides = [offsets(tokenizers[name], text) for name in pair]
            if all(sides):
                num_spans += len(check_spans(text, sides))
        assert num_spans > 10_000

    def test_by_hand(self):
        byte_level = [(0, 5), (5, 6), (6, 12), (12, 13), (13, 14), (13, 14), (14, 15)]
        word_piece = [(0, 2), (2, 5), (7, 9), (9, 12), (13, 14), (14, 15)]
        spans = shared_spans("hello  wörld 🙂!", byte_level, word_piece)
        assert spans.ends == [5, 12, 14, 15]
        assert spans.ids == ([0, 1, 1, 2, 2, 2, 3], [0, 0, 1, 1, 2, 3])

    def test_a_token_of_nothing_goes_with_what_follows_it(self):
        assert shared_spans("ab", [(0, 0), (0, 1), (1, 1), (1, 2)], [(0, 1), (1, 2)]).ids == ([0, 0, 1, 1], [0, 1])

    def test_three_sides_agree_on_what_all_three_cut(self):
        assert shared_spans("abcd", [(0, 1), (1, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 4)]).ends == [4]

    def test_finest_possible(self):
        whole, pieces = [(0, 3), (3, 7)], [(0, 1), (1, 3), (3, 6), (6, 7)]
        assert shared_spans("one two", whole, pieces).ids == ([0, 1], [0, 0, 1, 1])

    def test_a_side_without_tokens_has_no_spans(self):
        assert len(shared_spans("  ", [(0, 2)], [])) == 0


def side(tokenizer, text, prompt=(5, 6)):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Side(list(prompt), encoded["input_ids"], encoded["offset_mapping"], tokenizer.eos_token_id)


class TestPairRow:
    def row(self, tokenizers, text="The naïve café owner sells pies.", **settings):
        sides = [side(tokenizers[name], text) for name in ("byte-level", "meta-space")]
        return pair_row(text, *sides, **({"row_id": 3, "unit": "word"} | settings))

    def test_both_ends_are_one_span_in_no_unit(self, tokenizers):
        row = self.row(tokenizers)
        for one in (row, row["teacher"]):
            assert one["input_ids"][-1] == 1
            assert one["unit_ids"][-1] == -1
            assert one["span_ids"][:2] == [-1, -1]
            assert one["span_ids"][-1] == max(one["span_ids"]) > one["span_ids"][-2]
        assert row["span_ids"][-1] == row["teacher"]["span_ids"][-1]

    def test_units_are_the_same_words_on_both_sides(self, tokenizers):
        row = self.row(tokenizers)
        assert max(row["unit_ids"]) == max(row["teacher"]["unit_ids"]) == 5

    def test_a_unit_may_be_a_span(self, tokenizers):
        row = self.row(tokenizers, unit="token")
        assert row["unit_ids"][2:-1] == row["span_ids"][2:-1]

    @pytest.mark.parametrize("room", [(6, 100), (100, 6), (9, 7), (1, 3)])
    def test_a_cut_leaves_whole_spans_within_the_room_of_both_and_no_end(self, tokenizers, room):
        row = self.row(tokenizers, room=room)
        full = self.row(tokenizers)
        if row is None:
            assert room == (1, 3)
            return
        assert max(row["span_ids"]) == max(row["teacher"]["span_ids"])
        for one, all_of_it, most in zip((row, row["teacher"]), (full, full["teacher"]), room, strict=True):
            assert len(one["input_ids"]) - 2 <= most
            assert one["input_ids"] == all_of_it["input_ids"][: len(one["input_ids"])]
            last = one["span_ids"][-1]
            assert all_of_it["span_ids"].count(last) == one["span_ids"].count(last)
        longer = [
            sum(0 <= span <= row["span_ids"][-1] + 1 for span in one["span_ids"]) for one in (full, full["teacher"])
        ]
        assert any(size > most for size, most in zip(longer, room, strict=True))  # one span more would not fit

    def test_room_for_everything_but_the_end_cuts_the_end_alone(self, tokenizers):
        full = self.row(tokenizers)
        exact = len(full["input_ids"]) - 2 - 1
        row = self.row(tokenizers, room=(exact, 100))
        assert row["input_ids"] == full["input_ids"][:-1]
        assert row["teacher"]["input_ids"] == full["teacher"]["input_ids"][:-1]

    def test_spaces_that_one_side_has_no_token_for_go_with_the_end(self, tokenizers):
        text = " \n "
        sides = [side(tokenizers[name], text) for name in ("byte-level", "WordPiece")]
        row = pair_row(text, *sides, row_id=0, unit="word")
        assert set(row["span_ids"][2:]) == {0}
        assert row["teacher"]["span_ids"][2:] == [0]
        assert pair_row(text, *sides, row_id=0, unit="word", ended=False) is None

    def test_an_empty_answer_is_its_end(self, tokenizers):
        sides = [side(tokenizers[name], "") for name in ("byte-level", "WordPiece")]
        row = pair_row("", *sides, row_id=0, unit="word")
        assert row["input_ids"] == [5, 6, 1]
        assert row["span_ids"] == row["teacher"]["span_ids"] == [-1, -1, 0]


def make_rows(*pairs):
    columns = {"prompt": [prompt for prompt, _ in pairs], "references": [[text] * bool(text) for _, text in pairs]}
    dataset = Dataset.from_dict(columns)
    return Rows(dataset, "rows", RowReport(len(pairs), len(pairs), {}), "0")


class TestEncodeRows:
    def encode(self, tokenizers, *pairs, student="byte-level", teacher="meta-space", **changes):
        rows = make_rows(*pairs)
        text = TeacherText(tokenizers[teacher], [f"<<{prompt}>>" for prompt in rows.dataset["prompt"]])
        settings = {"max_length": 200, "max_prompt_length": 100, "teacher": text} | changes
        return encode_rows(rows, tokenizers[student], **settings)

    @pytest.mark.parametrize("pair", PAIRS, ids="-".join)
    def test_each_side_reads_its_own_prompt_and_the_same_answer(self, tokenizers, pair):
        encoded = self.encode(tokenizers, ("Say", TEXTS[0]), student=pair[0], teacher=pair[1]).dataset[0]
        for name, row, prompt in zip(pair, (encoded, encoded["teacher"]), ("Say", "<<Say>>"), strict=True):
            tokenizer = tokenizers[name]
            own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert row["input_ids"][: row["prompt_length"]] == own
            answer = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
            assert row["input_ids"][row["prompt_length"] :] == [*answer, tokenizer.eos_token_id]

    def test_what_the_teacher_cannot_read_is_dropped_with_its_reason(self, tokenizers):
        encoded = self.encode(tokenizers, ("a", "some words"), ("b" * 90, "some words"), max_prompt_length=92)
        assert encoded.report.dropped == {"prompt longer than 92 tokens (as the teacher reads it)": 1}

    def test_a_cut_is_counted_and_leaves_the_same_spans(self, tokenizers):
        encoded = self.encode(tokenizers, ("Say", TEXTS[0]), max_length=30, max_prompt_length=20)
        assert encoded.report.truncated == {"response truncated": 1}
        row = encoded.dataset[0]
        assert row["span_ids"][-1] == row["teacher"]["span_ids"][-1]

    def test_prompt_only_rows_have_two_prompts_and_no_span(self, tokenizers):
        row = self.encode(tokenizers, ("Say", ""), keep_prompt_only=True).dataset[0]
        assert set(row["span_ids"]) == set(row["teacher"]["span_ids"]) == {-1}

    @pytest.mark.parametrize("who", ["student", "teacher"])
    def test_a_tokenizer_without_offsets_is_refused(self, tokenizers, who, monkeypatch):
        slow = FAMILIES["byte-level" if who == "student" else "meta-space"]()
        monkeypatch.setattr(type(slow), "is_fast", property(lambda self: self is not slow))
        tokenizers = tokenizers | {"byte-level" if who == "student" else "meta-space": slow}
        with pytest.raises(UserError, match="slow one and gives no offsets, so its tokens cannot be laid beside"):
            self.encode(tokenizers, ("Say", "words"), unit="token")


class TestCollate:
    def batch(self, tokenizers):
        pairs = [("Say", text) for text in TEXTS[:4]] + [("Nothing", "")]
        encoded = TestEncodeRows().encode(tokenizers, *pairs, keep_prompt_only=True).dataset
        rows = [encoded[i] for i in range(len(encoded))]
        return rows, DistillCollator(0, teacher_pad_token_id=2)(rows)

    def test_each_side_is_what_it_would_be_alone(self, tokenizers):
        rows, batch = self.batch(tokenizers)
        alone = DistillCollator(2)([{k: v for k, v in row["teacher"].items() if k != "span_ids"} for row in rows])
        for name, value in alone.items():
            assert np.array_equal(batch["teacher"][name], value), name

    def test_span_starts_are_the_first_counted_position_of_each_span(self, tokenizers):
        rows, batch = self.batch(tokenizers)
        for batched, sides in ((batch, rows), (batch["teacher"], [row["teacher"] for row in rows])):
            expected, position = [], 0
            for row in sides:
                spans = row["span_ids"][row["prompt_length"] :]
                expected += [position + spans.index(span) for span in sorted(set(spans))]
                position += len(spans)
            assert batched["span_starts"].tolist() == expected
            assert position == len(batched["positions"])

    def test_rows_come_back(self, tokenizers):
        rows, batch = self.batch(tokenizers)
        assert batch_rows(batch) == rows

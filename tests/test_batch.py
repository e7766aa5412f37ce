"""Batches: every response token and its end-of-text is counted once, where it is predicted; nothing else is."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.utils import find_batch_size, send_to_device
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from kdkit.data.batch import DistillCollator, EncodedRow
from kdkit.data.encoding import encode_prompts, encode_rows
from kdkit.data.rows import RowReport, Rows, load_rows
from kdkit.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PAIRS = (
    ("Say hello:\n", "Hello there, world"),
    ("Q: café?\nA:", " a naïve  answer 🙂 here\n"),
    ("Write:\n", "one"),
)
TRAINING = ("Hello there, world", "a naïve answer here", "Say hello", "one two three")


def make_rows(*pairs: tuple[str, str | None]) -> Rows:
    """Rows of (prompt, answer); None = no answer."""
    table = {
        "prompt": [prompt for prompt, _ in pairs],
        "references": [[] if answer is None else [answer, "another"] for _, answer in pairs],
    }
    features = datasets.Features(prompt=datasets.Value("string"), references=datasets.List(datasets.Value("string")))
    dataset = datasets.Dataset.from_dict(table, features=features)
    return Rows(dataset, "made", RowReport(len(pairs), len(pairs), {}), "0" * 64)


def encode(pairs, tokenizer, **changes):
    lengths = {"max_length": 256, "max_prompt_length": 128}
    return encode_rows(make_rows(*pairs), tokenizer, **(lengths | changes))


def wrap(backend: Tokenizer, **changes: str) -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "eos_token": "<eos>"} | changes
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def metaspace_tokenizer():
    """Another kind of vocabulary, with <bos> put in front and <eos> behind, as T5 and BERT families do."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<pad>", "<bos>", "<eos>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator([*TRAINING, "Q: café?\nA: 🙂"] * 3, trainer)
    ids = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    return wrap(backend, bos_token="<bos>", unk_token="<unk>")


@pytest.fixture(params=["byte_tokenizer", "metaspace_tokenizer"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


class CharacterTokenizer(PreTrainedTokenizer):
    """A slow tokenizer: one id per ASCII character, no offsets."""

    def __init__(self, **kwargs):
        self.characters = {chr(i): i for i in range(128)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.characters)

    def get_vocab(self):
        return self.characters | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.characters[token]


class TestEncodeRows:
    def test_a_row_is_prompt_response_and_end_of_text(self, tokenizer):
        encoded = encode(PAIRS, tokenizer)
        for row, (prompt, answer) in zip(encoded.dataset, PAIRS, strict=True):
            bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            front = bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]
            back = tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert row["input_ids"] == front + back + [tokenizer.eos_token_id]
            assert row["prompt_length"] == len(front)
            assert len(row["unit_ids"]) == len(row["input_ids"])
        assert encoded.dataset["row_id"][:] == [0, 1, 2]
        assert (encoded.report.num_read, encoded.report.num_kept) == (3, 3)
        assert encoded.report.dropped == encoded.report.truncated == {}

    def test_units_are_the_words_of_the_response(self, tokenizer):
        for row, (_, answer) in zip(encode(PAIRS, tokenizer).dataset, PAIRS, strict=True):
            ids, units = np.array(row["input_ids"]), np.array(row["unit_ids"])
            assert (units[: row["prompt_length"]] == -1).all()
            assert units[-1] == -1  # the end-of-text
            words = [tokenizer.decode(ids[units == unit]).strip() for unit in range(units.max() + 1)]
            expected = [tokenizer.decode(tokenizer(w, add_special_tokens=False)["input_ids"]) for w in answer.split()]
            assert words == [word.strip() for word in expected]
            assert len(words) == len(answer.split())

    def test_unit_u_is_the_same_word_for_two_tokenizers(self, byte_tokenizer, metaspace_tokenizer):
        answer = "Hello there, world one two"
        words = []
        for tokenizer in (byte_tokenizer, metaspace_tokenizer):
            row = encode([("Q", answer)], tokenizer).dataset[0]
            ids, units = np.array(row["input_ids"]), np.array(row["unit_ids"])
            words.append([tokenizer.decode(ids[units == u]).strip() for u in range(units.max() + 1)])
        assert words[0] == words[1] == answer.split()

    def test_units_may_be_tokens(self, byte_tokenizer):
        row = encode(PAIRS[:1], byte_tokenizer, unit="token").dataset[0]
        num_tokens = len(row["input_ids"]) - row["prompt_length"] - 1
        assert row["unit_ids"] == [-1] * row["prompt_length"] + list(range(num_tokens)) + [-1]

    def test_the_gold_answer_is_the_first_reference(self, byte_tokenizer):
        row = encode([("Q:", "gold")], byte_tokenizer).dataset[0]
        assert byte_tokenizer.decode(row["input_ids"]) == "Q:gold<eos>"

    def test_a_response_too_long_is_cut_and_does_not_end(self, byte_tokenizer):
        prompt, answer = "Say hello:\n", "Hello there, world of words"
        whole = encode([(prompt, answer)], byte_tokenizer).dataset[0]
        for max_length in range(whole["prompt_length"] + 1, len(whole["input_ids"])):
            encoded = encode(
                [(prompt, answer)],
                byte_tokenizer,
                max_length=max_length,
                max_prompt_length=whole["prompt_length"],
            )
            row = encoded.dataset[0]
            assert row["input_ids"] == whole["input_ids"][:max_length]
            assert row["unit_ids"] == whole["unit_ids"][:max_length]
            assert encoded.report.truncated == {"response truncated": 1}
        room = {"max_length": len(whole["input_ids"]), "max_prompt_length": whole["prompt_length"]}
        fits = encode([(prompt, answer)], byte_tokenizer, **room)
        assert fits.dataset[0] == whole
        assert fits.report.truncated == {}

    def test_a_cut_before_the_first_word_leaves_no_unit(self, byte_tokenizer):
        row = encode([("Q", "\n\n\n\n word")], byte_tokenizer, max_length=3, max_prompt_length=1).dataset[0]
        assert row["unit_ids"] == [-1, -1, -1]

    def test_what_is_dropped_is_counted_by_reason(self, byte_tokenizer):
        pairs = [*PAIRS, ("x" * 40, "long"), ("none", None), ("", "empty")]
        encoded = encode(pairs, byte_tokenizer, max_prompt_length=20)
        assert encoded.report.dropped == {
            "prompt longer than 20 tokens": 1,
            "no answer": 1,
            "prompt has no tokens": 1,
        }
        assert encoded.dataset["row_id"][:] == [0, 1, 2]
        assert str(encoded.report).startswith("3 of 6 rows kept (prompt longer than 20 tokens: 1")

    def test_rows_keep_their_index_when_others_are_dropped(self, byte_tokenizer):
        encoded = encode([("none", None), PAIRS[0], ("none", None), PAIRS[1]], byte_tokenizer)
        assert encoded.dataset["row_id"][:] == [1, 3]

    def test_prompt_only_rows_are_kept_if_asked(self, tokenizer):
        encoded = encode([PAIRS[0], ("Say:", None)], tokenizer, keep_prompt_only=True)
        row = encoded.dataset[1]
        assert row["input_ids"] == encode_prompts(["Say:"], tokenizer)[0]
        assert row["prompt_length"] == len(row["input_ids"])
        assert set(row["unit_ids"]) == {-1}

    def test_special_tokens_written_in_an_answer_are_text(self, byte_tokenizer):
        row = encode([("Q", "the <eos> tag and <pad>")], byte_tokenizer).dataset[0]
        ids = row["input_ids"]
        assert ids.count(byte_tokenizer.eos_token_id) == 1
        assert byte_tokenizer.pad_token_id not in ids
        assert byte_tokenizer.decode(ids) == "Qthe <eos> tag and <pad><eos>"
        assert max(row["unit_ids"]) == 4

    def test_an_end_of_text_inside_an_answer_is_dropped(self):
        tokenizer = CharacterTokenizer(pad_token="\0", eos_token="$")
        encoded = encode([("Q", "a"), ("Q", "a$b")], tokenizer, unit="token")
        assert encoded.report.dropped == {"answer contains the end-of-text token": 1}

    def test_a_slow_tokenizer_can_give_tokens_but_not_words(self):
        tokenizer = CharacterTokenizer(pad_token="\0", eos_token="\1")
        row = encode([("Q", "ab")], tokenizer, unit="token").dataset[0]
        assert row == {"input_ids": [81, 97, 98, 1], "prompt_length": 1, "unit_ids": [-1, 0, 1, -1], "row_id": 0}
        with pytest.raises(UserError, match=r"\(CharacterTokenizer\) is a slow one.*unit 'token'"):
            encode([("Q", "ab")], tokenizer)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"max_length": 8, "max_prompt_length": 8}, "max_prompt_length < max_length"),
            ({"max_length": 8, "max_prompt_length": 0}, "at least 1 token"),
            ({"unit": "words"}, "unit is 'words', expected 'word' or 'token'"),
            ({"max_prompt_length": 1}, "no row of 'made' is left.*prompt longer than 1 tokens: 3"),
        ],
    )
    def test_settings_that_leave_nothing(self, byte_tokenizer, changes, message):
        with pytest.raises(UserError, match=message):
            encode(PAIRS, byte_tokenizer, **changes)

    def test_a_tokenizer_without_end_of_text(self, byte_tokenizer):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
        with pytest.raises(UserError, match="no end-of-text token"):
            encode(PAIRS, tokenizer)

    def test_chunks_of_the_map_change_nothing(self, byte_tokenizer, monkeypatch):
        whole = encode([*PAIRS, ("none", None), *PAIRS], byte_tokenizer)
        monkeypatch.setattr("kdkit.data.encoding.ROWS_PER_BLOCK", 2)
        parts = encode([*PAIRS, ("none", None), *PAIRS], byte_tokenizer)
        assert parts.dataset[:] == whole.dataset[:]
        assert parts.report == whole.report

    def test_leaves_no_cache_and_is_quiet(self, byte_tokenizer, capfd):
        datasets.enable_progress_bars()
        assert encode([("Q", "long " * 500)], byte_tokenizer, max_length=4096).dataset.cache_files == []
        assert capfd.readouterr() == ("", "")

    @pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not here")
    def test_real_rows_come_back_from_their_tokens(self, byte_tokenizer):
        rows = load_rows(SHARED / "t0_validation.jsonl")
        encoded = encode_rows(rows, byte_tokenizer, max_length=4096, max_prompt_length=2048)
        assert len(encoded) + sum(encoded.report.dropped.values()) == len(rows)
        lines = (SHARED / "t0_validation.jsonl").read_text(encoding="utf-8").splitlines()
        for row in encoded.dataset:
            answer = json.loads(lines[row["row_id"]])["output"]
            response = row["input_ids"][row["prompt_length"] : -1]
            assert byte_tokenizer.decode(response) == answer
            assert max(row["unit_ids"]) + 1 == len(answer.split())


class TestEncodePrompts:
    def test_special_tokens_stand_in_front_and_never_behind(self, metaspace_tokenizer):
        ids = encode_prompts(["Say hello"], metaspace_tokenizer)[0]
        full = metaspace_tokenizer("Say hello")["input_ids"]
        assert full[-1] == metaspace_tokenizer.eos_token_id
        assert ids == full[:-1]

    def test_a_begin_of_text_in_writing_is_not_doubled(self, metaspace_tokenizer):
        written, plain = encode_prompts(["<bos>Say hello", "Say hello"], metaspace_tokenizer)
        assert written.count(metaspace_tokenizer.bos_token_id) == 1
        assert written == plain

    def test_without_special_tokens_nothing_is_added(self, byte_tokenizer):
        assert byte_tokenizer.decode(encode_prompts(["Say hello"], byte_tokenizer)[0]) == "Say hello"

    def test_no_prompts(self, byte_tokenizer):
        assert encode_prompts([], byte_tokenizer) == []


# prompt length, response length, ends: ragged rows, one without a response, one of the longest length
RAGGED = ((3, 4, True), (1, 1, True), (5, 0, False), (2, 7, False), (1, 0, True))


def ragged_rows(eos: int, pad: int) -> list[EncodedRow]:
    """Rows whose ids hold pad and end-of-text also inside prompts and responses."""
    generator = np.random.default_rng(0)
    rows: list[EncodedRow] = []
    for row_id, (num_prompt, num_response, ends) in enumerate(RAGGED):
        ids = generator.choice([7, 8, 9, eos, pad], num_prompt + num_response).tolist() + [eos] * ends
        units = [-1] * num_prompt + [t // 2 for t in range(num_response)] + [-1] * ends
        rows.append({"input_ids": ids, "prompt_length": num_prompt, "unit_ids": units, "row_id": 10 + row_id})
    return rows


class TestDistillCollator:
    def batch(self, rows, **settings):
        return DistillCollator(**({"pad_token_id": 0} | settings))(rows)

    @pytest.mark.parametrize(("eos", "pad"), [(1, 0), (0, 0)])
    @pytest.mark.parametrize("multiple", [None, 8])
    def test_every_response_token_is_counted_once_where_it_is_predicted(self, eos, pad, multiple):
        rows = ragged_rows(eos, pad)
        batch = self.batch(rows, pad_token_id=pad, pad_to_multiple_of=multiple)
        num_steps = batch["input_ids"].shape[1]
        expected, labels = [], torch.full_like(batch["labels"], -100)
        for b, row in enumerate(rows):
            for t in range(row["prompt_length"], len(row["input_ids"])):
                expected.append((b, t - 1, row["input_ids"][t]))
                labels[b, t] = row["input_ids"][t]
        positions = batch["positions"]
        predicted = batch["input_ids"].flatten()[positions + 1]
        found = [(p // num_steps, p % num_steps) for p in positions.tolist()]
        assert [(*where, token) for where, token in zip(found, predicted.tolist(), strict=True)] == expected
        assert torch.equal(batch["labels"], labels)
        assert torch.equal(batch["labels"].flatten()[positions + 1], predicted)
        assert len(expected) == sum(response + ends for _, response, ends in RAGGED)

    def test_pad_equal_to_end_of_text_changes_nothing_that_counts(self):
        rows = ragged_rows(eos=1, pad=1)
        apart, equal = self.batch(rows, pad_token_id=0), self.batch(rows, pad_token_id=1)
        for name in ("attention_mask", "labels", "positions", "lengths", "unit_ids", "row_ids"):
            assert torch.equal(apart[name], equal[name]), name
        is_token = apart["attention_mask"].bool()
        assert torch.equal(apart["input_ids"][is_token], equal["input_ids"][is_token])
        assert (equal["input_ids"][~is_token] == 1).all()

    def test_rows_lie_left_and_padding_right(self):
        rows = ragged_rows(eos=1, pad=0)
        batch = self.batch(rows, pad_token_id=99)
        for b, row in enumerate(rows):
            length = len(row["input_ids"])
            assert batch["lengths"][b] == length
            assert batch["input_ids"][b, :length].tolist() == row["input_ids"]
            assert (batch["input_ids"][b, length:] == 99).all()
            assert batch["attention_mask"][b].tolist() == [1] * length + [0] * (9 - length)
            assert batch["unit_ids"][b, :length].tolist() == row["unit_ids"]
            assert (batch["unit_ids"][b, length:] == -1).all()
        assert batch["row_ids"].tolist() == [10, 11, 12, 13, 14]

    def test_units_and_their_sequences_are_counted(self):
        batch = self.batch(ragged_rows(eos=1, pad=0))
        assert (batch["max_units"], batch["num_sequences"]) == (4, 3)
        assert type(batch["max_units"]) is type(batch["num_sequences"]) is int

    @pytest.mark.parametrize(("multiple", "num_steps"), [(None, 9), (1, 9), (8, 16), (9, 9), (64, 64)])
    def test_pads_to_a_multiple(self, multiple, num_steps):
        batch = self.batch(ragged_rows(eos=1, pad=0), pad_to_multiple_of=multiple)
        assert batch["input_ids"].shape == (len(RAGGED), num_steps)

    def test_prompts_alone_give_no_positions(self):
        rows: list[EncodedRow] = [
            {"input_ids": [5] * n, "prompt_length": n, "unit_ids": [-1] * n, "row_id": n} for n in (2, 4)
        ]
        batch = self.batch(rows)
        assert batch["positions"].shape == (0,)
        assert (batch["labels"] == -100).all()
        assert (batch["max_units"], batch["num_sequences"]) == (0, 0)

    def test_batching_changes_no_row(self):
        rows = ragged_rows(eos=1, pad=0)
        together = self.batch(rows)
        alone = [self.batch([row]) for row in rows]
        assert len(together["positions"]) == sum(len(batch["positions"]) for batch in alone)
        for b, batch in enumerate(alone):
            length = int(batch["lengths"][0])
            assert torch.equal(together["labels"][b, :length], batch["labels"][0])

    def test_every_value_is_a_tensor_of_integers_or_an_int_but_for_what_stays_on_the_host(self):
        batch = self.batch(ragged_rows(eos=1, pad=0))
        assert {batch.pop(name).dtype for name in ("row_keys", "unit_counts")} == {np.dtype(np.int64)}
        assert {type(value) for value in batch.values()} == {torch.Tensor, int}
        dtypes = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
        assert dtypes.pop("is_gold") == torch.bool
        assert set(dtypes.values()) == {torch.int64}

    def test_a_rows_key_is_of_its_tokens_and_of_where_its_answer_begins_alone(self):
        rows = ragged_rows(eos=1, pad=0)[:2]
        first = rows[0]
        others = [
            first | {"input_ids": [*first["input_ids"][:-1], 7]},
            first | {"prompt_length": first["prompt_length"] + 1},
        ]
        keys = self.batch([*rows, first | {"row_id": 99}, *others])["row_keys"].tolist()
        assert keys[:2] == self.batch(rows)["row_keys"].tolist()
        assert keys[2] == keys[0]
        assert len(set(keys)) == 4

    def test_goes_through_a_loader_and_to_a_device(self, byte_tokenizer):
        encoded = encode(PAIRS, byte_tokenizer)
        collator = DistillCollator(byte_tokenizer.pad_token_id)
        for dataset in (encoded.dataset, encoded.dataset.with_format("numpy")):
            loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=collator)
            (batch,) = (send_to_device(batch, "cpu") for batch in loader)
            assert find_batch_size(batch) == 3
            counted = [len(r["input_ids"]) - r["prompt_length"] for r in encoded.dataset]
            assert len(batch["positions"]) == sum(counted)
            texts = [byte_tokenizer.decode(row[row != -100]).removesuffix("<eos>") for row in batch["labels"]]
            assert texts == [answer for _, answer in PAIRS]

"""The parts of a rollout: the threshold's trace, the guard's verdicts, the buffer, and texts exact to the token."""

import math
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_faults import faulty_batch
from tiny import make_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.config import CollapseConfig, GuardConfig, demo_folder
from kdkit.data.batch import DistillCollator
from kdkit.data.encoding import encode_prompts
from kdkit.data.spans import offsets_of_ids, word_units
from kdkit.errors import UserError
from kdkit.evaluation import Answer, GenerationSettings
from kdkit.training.rollout import (
    AdaptiveThreshold,
    CollapseRule,
    Guard,
    HeldText,
    ReplayBuffer,
    StudentGenerator,
    StudentText,
    TextCounts,
    Verdict,
    pack_texts,
    repeat_fractions,
    shares,
    unpack_texts,
)
from kdkit.training.rollout import generator as generator_module
from kdkit.training.rollout.ahead import Judged, Place, answers, pack_shelf, unpack_shelf

EOS = 1


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_folder() / "teacher")


def row(response, prompt=(5, 6, 7), row_id=0):
    ids = [*prompt, *response]
    return {
        "input_ids": ids,
        "prompt_length": len(prompt),
        "unit_ids": [-1] * len(ids),
        "row_id": row_id,
        "is_gold": False,
    }


def text(response, *, written="something", ended=None, row_id=0):
    return StudentText(row(response, row_id=row_id), written, response[-1] == EOS if ended is None else ended)


def held(number, born_step=0):
    return HeldText(row([number, EOS], row_id=number), born_step, -0.5)


def ids_of(texts):
    return [text.row["row_id"] for text in texts]


def distillm_trace(losses, *, rule, start=0.0, epsilon=0.1, step=0.1, cap=1.0):
    """φ after each loss, written from the paper's algorithm and the code's, one `if` after the other."""
    phi, reference, trace = start, losses[0], [start]
    for position in range(1, len(losses)):
        loss = losses[position]
        compared = {"initial": losses[0], "previous": losses[position - 1], "best": min(losses[:position])}
        if loss >= (reference if rule == "last_fired" else compared[rule]) + epsilon:
            phi = phi + step if phi + step < cap else cap
            reference = loss
        trace.append(phi)
    return trace


class TestAdaptiveThreshold:
    LOSSES = (3.0, 2.5, 2.65, 2.8, 2.7, 3.2, 3.25, 3.4, 2.9, 3.0)

    @pytest.mark.parametrize(
        ("reference", "expected"),
        [
            # by hand: 3.2, 3.25, 3.4 are 0.1 above 3.0
            ("initial", [0, 0, 0, 0, 0, 0.1, 0.2, 0.3, 0.3, 0.3]),
            # each against the one before it: 2.65, 2.8, 3.2, 3.4, 3.0
            ("previous", [0, 0, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5]),
            # all from the third on are 0.1 above 2.5
            ("best", [0, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
            # 3.2 against 3.0, then 3.4 against 3.2
            ("last_fired", [0, 0, 0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2]),
        ],
    )
    def test_trace_is_distillms_number_for_number(self, reference, expected):
        threshold = AdaptiveThreshold(0.0, reference=reference)
        trace = []
        for loss in self.LOSSES:
            threshold.observe(loss)
            trace.append(threshold.value)
        assert trace == pytest.approx(expected, abs=1e-12)
        assert trace == pytest.approx(distillm_trace(self.LOSSES, rule=reference), abs=1e-12)

    @given(
        losses=st.lists(st.floats(0.0, 5.0), min_size=1, max_size=20),
        rule=st.sampled_from(["initial", "previous", "best", "last_fired"]),
        cap=st.floats(0.3, 1.0),
    )
    def test_trace_on_any_losses(self, losses, rule, cap):
        threshold = AdaptiveThreshold(0.2, epsilon=0.05, cap=cap, reference=rule)
        trace = []
        for loss in losses:
            threshold.observe(loss)
            trace.append(threshold.value)
        assert trace == pytest.approx(distillm_trace(losses, rule=rule, start=0.2, epsilon=0.05, cap=cap), abs=1e-9)

    def test_a_loss_that_is_not_finite_moves_nothing(self):
        threshold = AdaptiveThreshold(0.0, reference="previous", level=2.0)
        assert [threshold.observe(loss) for loss in (math.nan, math.inf)] == [False, False]
        assert (threshold.value, threshold.level) == (0.0, 2.0)

    def test_it_does_not_rise_while_it_is_held_down(self):
        threshold = AdaptiveThreshold(0.2, level=2.0)
        assert not threshold.observe(3.0, may_rise=False)
        assert (threshold.value, threshold.level) == (0.2, 3.0)


class TestShares:
    @pytest.mark.parametrize(
        ("ratio", "fresh"),
        [
            ("none", [0.6, 0.6, 0.6]),
            ("constant", [0.3, 0.3, 0.3]),
            ("decreasing", [0.6, 0.45, 0.0]),
            ("increasing", [0.0, 0.15, 0.6]),
        ],
    )
    def test_fresh_share_over_a_stage_is_distillms(self, ratio, fresh):
        found = [shares(0.6, fraction, ratio) for fraction in (0.0, 0.25, 1.0)]
        assert [share.fresh for share in found] == pytest.approx(fresh)
        assert [share.student for share in found] == [0.6] * 3


class TestCollapseRule:
    def rule(self, **settings):
        return CollapseRule(CollapseConfig(**settings))

    def test_a_fall_of_rouge_l_takes_the_threshold_back_to_where_it_was_best(self):
        rule, trained = self.rule(), TextCounts(100, 100)
        assert [rule.observe(rouge, trained, threshold=phi) for rouge, phi in ((20.0, 0.1), (22.0, 0.2))] == [None] * 2
        assert rule.observe(21.0, trained, threshold=0.5) is None
        assert rule.observe(19.0, trained, threshold=0.6) == "ROUGE-L fell from 22.0 to 19.0"
        assert rule.take_back(0.6, 19.0) == 0.2
        # 19.0 is now the one to fall below: a slow recovery is no further collapse
        assert rule.observe(17.5, trained, threshold=0.2) is None
        assert rule.observe(17.0, trained, threshold=0.2) == "ROUGE-L fell from 19.0 to 17.0"
        assert rule.take_back(0.2, 17.0) == 0.1
        assert rule.take_back(0.015, 17.0) == 0.0

    def test_a_student_that_was_best_before_its_own_text_came_in_is_left_without_it(self):
        rule = self.rule()
        assert rule.observe(22.0, TextCounts(), threshold=0.8) is None
        assert rule.observe(6.0, TextCounts(100, 100), threshold=0.8) == "ROUGE-L fell from 22.0 to 6.0"
        assert rule.take_back(0.8, 6.0) == 0.0

    def test_a_fall_is_a_collapse_only_when_the_next_evaluation_finds_it_too(self):
        """In modes mixed and on_policy one false alarm was final: the threshold stayed at 0 for the rest of a run."""
        rule, trained = self.rule(), TextCounts(100, 100)
        found = []
        for rouge in (22.0, 6.0, 22.0, 6.0, 6.0):
            rule.observe(rouge, trained, threshold=0.5)
            found.append(rule.is_collapse)
        assert found == [False, False, False, False, True]
        rule.take_back(0.5, 6.0)
        assert not rule.is_collapse

    def test_patience_1_takes_the_first_fall_for_one(self):
        rule = self.rule(patience=1)
        rule.observe(22.0, TextCounts(100, 100), threshold=0.5)
        rule.observe(6.0, TextCounts(100, 100), threshold=0.5)
        assert rule.is_collapse

    def test_an_evaluation_that_can_say_nothing_ends_no_row(self):
        rule, refused = self.rule(), TextCounts(100, 10, Counter(repeats=90))
        rule.observe(22.0, TextCounts(100, 100), threshold=0.5)
        rule.observe(6.0, refused, threshold=0.5)
        rule.observe(None, TextCounts(31, 31), threshold=0.5)  # a handful of texts
        rule.observe(6.0, TextCounts(), threshold=0.5)  # low, and none of it the texts' doing
        assert not rule.is_collapse
        rule.observe(None, refused, threshold=0.5)
        assert rule.is_collapse

    def test_a_fall_is_not_blamed_on_texts_that_nobody_trained_on(self):
        rule = self.rule()
        rule.observe(22.0, TextCounts(), threshold=0.2)
        assert rule.observe(6.0, TextCounts(100, 0, Counter(no_end=100)), threshold=0.2) is None

    def test_the_pass_rate_has_to_be_there_before_it_can_fall(self):
        rule, refused = self.rule(), TextCounts(100, 10, Counter(repeats=90))
        assert rule.observe(None, refused, threshold=0.5) is None
        assert rule.observe(None, TextCounts(100, 80, Counter(repeats=20)), threshold=0.5) is None
        assert rule.observe(None, refused, threshold=0.5) == "the guard let only 10% of 100 texts pass"

    def test_a_handful_of_texts_says_nothing(self):
        rule = self.rule(min_texts=32)
        rule.observe(None, TextCounts(100, 100), threshold=0.5)
        assert rule.observe(None, TextCounts(31, 0, Counter(no_end=31)), threshold=0.5) is None


class TestReplayBuffer:
    def test_the_oldest_make_room(self):
        buffer = ReplayBuffer(3)
        buffer.push(held(number) for number in range(5))
        assert ids_of(buffer.texts()) == [2, 3, 4]
        assert buffer.is_full

    def test_a_sample_has_different_texts_and_depends_on_the_seed_alone(self):
        buffer = ReplayBuffer(50)
        buffer.push(held(number) for number in range(50))
        samples = [ids_of(buffer.sample(8, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
        assert len(set(samples[0])) == 8
        assert samples[0] == samples[1] != samples[2]

    def test_samples_are_uniform(self):
        buffer, draw = ReplayBuffer(10), torch.Generator().manual_seed(0)
        buffer.push(held(number) for number in range(10))
        counts = Counter(number for _ in range(2000) for number in ids_of(buffer.sample(3, draw)))
        # 600 expected each, standard deviation sqrt(2000 · 0.3 · 0.7) = 20.5
        assert all(abs(counts[number] - 600) < 5 * 20.5 for number in range(10))

    def test_more_than_it_holds_is_refused(self):
        buffer = ReplayBuffer(10)
        buffer.push([held(1)])
        with pytest.raises(UserError, match=r"2 texts are asked of a replay buffer that holds 1 \(capacity 10\)"):
            buffer.sample(2, torch.Generator())

    def test_capacity_0_is_refused(self):
        with pytest.raises(UserError, match="capacity=0"):
            ReplayBuffer(0)

    def test_texts_come_back_from_tensors_as_they_were(self):
        texts = [
            HeldText({**row([9, 8, EOS], row_id=3), "unit_ids": [-1, -1, -1, 0, 1, -1]}, 7, -0.25),
            HeldText(row([4], prompt=(2,), row_id=2**40), 12, math.nan),
        ]
        back = unpack_texts(pack_texts(texts))
        assert [(text.row, text.born_step) for text in back] == [(text.row, text.born_step) for text in texts]
        assert back[0].score == -0.25
        assert math.isnan(back[1].score)

    def test_an_empty_buffer_comes_back_empty(self):
        assert unpack_texts(pack_texts([])) == []


class TestShelf:
    def test_texts_written_ahead_come_back_as_they_were_judged(self):
        shelf = {
            Place(step, 0, 1): tuple(
                Judged(text(response, row_id=number), Verdict(reason, 0.25, -1.5), 3)
                for number, (response, reason) in enumerate([([9, EOS], None), ([8], "no_end")])
            )
            for step in (4, 6)
        }
        back = unpack_shelf(*pack_shelf(shelf))
        assert back.keys() == shelf.keys()
        for place, texts in shelf.items():
            for ours, theirs in zip(back[place], texts, strict=True):
                assert ours.text.row["input_ids"] == theirs.text.row["input_ids"]
                assert (ours.text.ended, ours.verdict, ours.born_step) == (theirs.text.ended, theirs.verdict, 3)
            assert answers(texts, [row([1], row_id=0), row([2], row_id=1)])
            assert not answers(texts, [row([1], row_id=1), row([2], row_id=0)])


class TestRepeatFractions:
    @given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=6), st.integers(1, 4))
    def test_equals_a_count_with_sets(self, sequences, ngram):
        expected = []
        for sequence in sequences:
            grams = [tuple(sequence[i : i + ngram]) for i in range(len(sequence) - ngram + 1)]
            expected.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        assert repeat_fractions(sequences, ngram).tolist() == pytest.approx(expected)


class TestGuard:
    LOOP = [3, 4] * 8 + [EOS]

    def verdicts(self, texts, *, scores=(), references=None, vocab_size=None, **settings):
        settings.setdefault("min_teacher_logprob", None)
        asked = []

        def score(rows):
            asked.extend(rows)
            return list(scores)

        guard = Guard(GuardConfig(**settings), score=score, references=references, vocab_size=vocab_size)
        return guard(texts), asked

    def test_each_reason_is_found_and_named(self):
        texts = [text([9, 8, 7, EOS]), text([EOS]), text([9, 8, 7, 6]), text(self.LOOP), text([900, EOS])]
        verdicts, _ = self.verdicts(texts, vocab_size=900, scores=[-1.0])
        assert [verdict.reason for verdict in verdicts] == [
            None,
            "too_short",
            "no_end",
            "repeats",
            "outside_vocabulary",
        ]

    def test_the_teacher_reads_what_nothing_cheaper_refuses_and_refuses_the_unlikely(self):
        texts = [text([9, 8, EOS], row_id=0), text([9, 8], row_id=1), text([9, 7, EOS], row_id=2)]
        verdicts, asked = self.verdicts(texts, scores=[-0.5, -9.0], min_teacher_logprob=-4.0)
        assert [verdict.reason for verdict in verdicts] == [None, "no_end", "unlikely"]
        assert [row["row_id"] for row in asked] == [0, 2]
        assert math.isnan(verdicts[1].score)

    @pytest.mark.parametrize("score", [-math.inf, math.nan])
    def test_a_text_that_the_teacher_finds_impossible_is_unlikely(self, score):
        verdicts, _ = self.verdicts([text([9, EOS])], scores=[score], min_teacher_logprob=-4.0)
        assert verdicts[0].reason == "unlikely"

    def test_rouge_l_against_the_rows_own_answers(self):
        references = [["the red house by the river", "a house"], ["the red house"], []]
        texts = [
            text([9, EOS], written="the red house", row_id=0),
            text([9, EOS], written="no such thing", row_id=1),
            text([9, EOS], written="no such thing", row_id=2),
        ]
        verdicts, _ = self.verdicts(texts, scores=[0.0] * 3, references=references, min_rouge_l=30)
        assert [verdict.reason for verdict in verdicts] == [None, "unlike_reference", None]

    def test_without_a_config_only_what_the_teacher_cannot_read_is_refused(self):
        verdicts = Guard(None, vocab_size=900)([text([EOS]), text(self.LOOP, ended=False), text([900])])
        assert [verdict.reason for verdict in verdicts] == [None, None, "outside_vocabulary"]
        assert verdicts[1].repeat_fraction > 0.5


def fake_answers(responses, tokenizer):
    """Stands in for `generate_answers`: responses as lists of ids, ended where they hold the end-of-text token."""

    def answer(student, tokenizer, prompts, settings):
        assert len(prompts) == len(responses)
        return [
            Answer(tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), ids[-1] == EOS) for ids in responses
        ]

    return answer


class TestStudentGenerator:
    PROMPTS = ("Say it:", "A much longer prompt, on which one could think for a while:", "No.")

    def rows(self, tokenizer):
        return [
            {"input_ids": [*ids, 700, EOS], "prompt_length": len(ids), "unit_ids": [-1] * (len(ids) + 2), "row_id": n}
            for n, ids in enumerate(encode_prompts(self.PROMPTS, tokenizer))
        ]

    def test_every_counted_position_predicts_the_next_token_of_the_student_and_the_end_once(
        self, tokenizer, monkeypatch
    ):
        """DistiLLM's code shifts labels by one and drops the end-of-text, which pads as well."""
        words = [
            tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" red house", " yes", " on and on")
        ]
        responses = [[*words[0], EOS], [EOS], words[2]]  # ended, ended at once, cut
        monkeypatch.setattr(generator_module, "generate_answers", fake_answers(responses, tokenizer))
        rows = self.rows(tokenizer)
        texts = StudentGenerator(tokenizer, GenerationSettings())(None, rows, key=(0,))
        batch = DistillCollator(pad_token_id=EOS)([text.row for text in texts])
        positions = batch["positions"]
        width = batch["input_ids"].shape[1]
        predicted = batch["input_ids"].flatten()[positions + 1]
        assert [predicted[positions // width == b].tolist() for b in range(3)] == responses
        first = [positions[positions // width == b].min().item() % width for b in range(3)]
        assert first == [row["prompt_length"] - 1 for row in rows]
        assert torch.equal(batch["labels"].flatten()[positions + 1], predicted)
        assert not batch["is_gold"].any()
        assert batch["num_labels"] == 0

    def test_units_are_the_words_of_the_text_and_none_of_the_end(self, tokenizer, monkeypatch):
        ids = tokenizer("the red house", add_special_tokens=False)["input_ids"]
        monkeypatch.setattr(generator_module, "generate_answers", fake_answers([[*ids, EOS]], tokenizer))
        (made,) = StudentGenerator(tokenizer, GenerationSettings(), "word")(None, self.rows(tokenizer)[:1], key=(0,))
        units = made.row["unit_ids"][made.row["prompt_length"] :]
        assert units[-1] == -1
        assert sorted(set(units[:-1])) == [0, 1, 2]
        assert units[:-1] == sorted(units[:-1])

    def test_draws_depend_on_seed_and_key_alone(self, tmp_path, tokenizer):
        student = AutoModelForCausalLM.from_pretrained(make_pair(tmp_path)["student"])
        generate = StudentGenerator(tokenizer, GenerationSettings(max_new_tokens=6, sampling_temperature=1.0, seed=3))
        rows = self.rows(tokenizer)
        state = torch.random.get_rng_state()
        drawn = [[made.row["input_ids"] for made in generate(student, rows, key=key)] for key in ((1,), (1,), (2,))]
        assert drawn[0] == drawn[1] != drawn[2]
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_the_cache_is_on_under_gradient_checkpointing(self, tmp_path, tokenizer):
        """trl #4568: with checkpointing the cache goes off, and generation reads all over again for every token."""
        student = AutoModelForCausalLM.from_pretrained(make_pair(tmp_path)["student"]).train()
        student.activation_checkpointing_enable({"use_reentrant": False})
        widths = []
        student.model.register_forward_pre_hook(
            lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        generate = StudentGenerator(tokenizer, GenerationSettings(max_new_tokens=4, sampling_temperature=1.0))
        generate(student, self.rows(tokenizer), key=(0,))
        assert widths[1:] == [1] * (len(widths) - 1)
        assert student.training


class TestOffsetsOfIds:
    def test_a_text_in_the_tokenizers_own_pieces_has_the_tokenizers_offsets(self, tokenizer):
        written = "The old baker – naïve, 12 🙂 pears."
        encoded = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)
        ((found, offsets),) = offsets_of_ids([encoded["input_ids"]], tokenizer)
        assert found == written
        assert offsets == encoded["offset_mapping"]

    def test_other_pieces_of_the_same_text_are_in_the_same_words(self, tokenizer):
        """A model may spell a word letter by letter; every letter still belongs to its word."""
        written = "the old 🙂 pears"
        letters = [i for byte in written.encode() for i in tokenizer.convert_tokens_to_ids([byte_token(byte)])]
        ((found, offsets),) = offsets_of_ids([letters], tokenizer)
        assert found == written
        per_byte = np.repeat([-1 if c == " " else written[: n + 1].count(" ") for n, c in enumerate(written)],
                             [len(c.encode()) for c in written])  # fmt: skip
        assert word_units(found, offsets) == per_byte.tolist()

    def test_bytes_of_a_character_that_a_decoder_shows_one_by_one(self):
        """A decoder with byte fallback writes a replacement for each byte of a character that is not complete."""
        decoder = mock.Mock()
        decoder.batch_decode = lambda ids, **_: [by_bytes(bytes(own)) for own in ids]
        decoder.side_effect = lambda texts, **_: {"input_ids": [[]], "offset_mapping": [[]]}
        ((found, offsets),) = offsets_of_ids([list("a🙂 b c".encode())], decoder)
        assert found == "a🙂 b c"
        assert word_units(found, offsets) == [0, 0, 0, 0, 0, -1, 1, -1, 2]

    def test_nothing_written(self, tokenizer):
        assert offsets_of_ids([[]], tokenizer) == [("", [])]


def by_bytes(content):
    """Text with a U+FFFD for each byte of a last character that is not complete."""
    for cut in range(4):
        try:
            return content[: len(content) - cut].decode() + "\ufffd" * cut
        except UnicodeDecodeError:
            continue
    raise AssertionError(content)


def byte_token(byte):
    """A byte as byte-level BPE writes it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()[byte]


class TestLabelFaults:
    """What the story of seed 000 puts back in is what DistiLLM's code does, and only to the student's text."""

    ROWS = (row([8, 9, EOS]), {**row([7, 8, EOS]), "is_gold": True}, row([8, 9]))

    def test_the_mask_is_one_late_and_the_end_is_dropped(self):
        right = DistillCollator(pad_token_id=EOS)(list(self.ROWS))
        wrong = faulty_batch(right, end_id=EOS, learn_labels=True)
        for batch, counted in ((right, [[2, 3, 4], [2, 3, 4], [2, 3]]), (wrong, [[3, 4], [2, 3, 4], [3, 4]])):
            width = batch["input_ids"].shape[1]
            of_row = [batch["positions"][batch["positions"] // width == b] % width for b in range(3)]
            assert [positions.tolist() for positions in of_row] == counted
        learnt = wrong["labels"].flatten()[wrong["positions"] + 1]
        assert learnt.tolist() == [8, 9, 7, 8, EOS, 8, 9]  # of the student's text: the token at the position itself
        assert wrong["num_labels"] == 7

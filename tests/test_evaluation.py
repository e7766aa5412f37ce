"""Scores, intervals, answers and perplexity: against rouge_score, numpy, and loops written the dumb way."""

import json
import math
import random
import string
import warnings
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdkit.data import load_rows
from kdkit.data.batch import DistillCollator
from kdkit.data.encoding import encode_rows
from kdkit.errors import RunFailed, UserError
from kdkit.evaluation import (
    GenerationSettings,
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    evaluate_model,
    evaluate_predictions,
    exact_match,
    generate_answers,
    generation,
    label_losses,
    paired_difference,
    read_predictions,
    rouge_l,
    score_predictions,
)
from kdkit.training import measure

WORDS = [
    "the",
    "cat",
    "sat",
    "sitting",
    "sits",
    "a",
    "running",
    "runs",
    "café",
    "42",
    "3.14",
    "dog's",
    "well-known",
    "sits\u2028running",
    "İstanbul",
]


def random_text(rng: random.Random) -> str:
    return " ".join(rng.choices([*WORDS, "", "!", "\n"], k=rng.randint(0, 30)))


class TestRougeL:
    def test_equals_the_value_worked_out_by_hand(self):
        # LCS of (the cat sat on the mat) and (the dog sat on a mat) is "the sat on mat": 4 of 6 and 4 of 6.
        assert rouge_l("the cat sat on the mat", ["the dog sat on a mat"]) == pytest.approx(100 * 2 / 3)

    def test_weighs_precision_and_recall_alike(self):
        # LCS 2; precision 2/2, recall 2/8: F = 2 * 1 * 0.25 / 1.25.
        assert rouge_l("b d", ["a b c d e f g h"]) == pytest.approx(40.0)

    def test_equals_rouge_score_on_random_texts(self):
        rng, scorer = random.Random(0), RougeScorer(["rougeL"], use_stemmer=True)
        for _ in range(300):
            prediction, references = random_text(rng), [random_text(rng) for _ in range(rng.randint(1, 3))]
            expected = 100 * scorer.score_multi(references, prediction)["rougeL"].fmeasure
            assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-12)

    def test_is_the_best_over_the_references(self):
        assert rouge_l("a cat", ["no match here", "a cat", "the dog"]) == 100.0

    def test_stems_words(self):
        assert rouge_l("running dogs", ["runs dog"]) == 100.0

    def test_empty_text_scores_zero(self):
        assert rouge_l("", ["a cat"]) == 0.0
        assert rouge_l("a cat", [""]) == 0.0

    def test_another_script_scores_with_its_own_tokenizer_only(self):
        class Whitespace:
            def tokenize(self, text):
                return text.split()

        assert rouge_l("кот сидит", ["кот лежит"]) == 0.0
        assert rouge_l("кот сидит", ["кот лежит"], tokenizer=Whitespace()) == pytest.approx(50.0)

    def test_refuses_no_reference_and_a_bare_string(self):
        with pytest.raises(UserError, match="no reference"):
            rouge_l("a", [])
        with pytest.raises(UserError, match="give a list of texts"):
            rouge_l("a", "a cat")


class TestExactMatch:
    @pytest.mark.parametrize(
        ("prediction", "reference", "equal"),
        [
            ("Paris", "paris", True),
            ("Paris.", "paris", True),
            ("  New   York\n", "new york", True),
            ("it's", "its", True),
            ("the cat", "cat", False),  # articles stay
            ("a-b", "a b", False),  # punctuation is dropped, not turned into a space
            ("42", "43", False),
            ("Ещё раз!", "ещё раз", True),
        ],
    )
    def test_rules(self, prediction, reference, equal):
        assert exact_match(prediction, [reference]) is equal

    def test_any_reference_will_do(self):
        assert exact_match("b", ["a", "B!"])
        assert not exact_match("c", ["a", "B!"])


class TestBootstrapMean:
    def test_agrees_with_a_loop_over_resamples(self):
        values = np.random.default_rng(1).gamma(2.0, 10.0, size=60)
        rng = random.Random(2)
        means = []
        for _ in range(4000):
            total = 0.0
            for _ in range(60):
                total += values[rng.randrange(60)]
            means.append(total / 60)
        means.sort()
        interval = bootstrap_mean(values, resamples=4000, seed=3)
        spread = means[3899] - means[99]
        assert interval.value == pytest.approx(values.mean())
        assert interval.low == pytest.approx(means[99], abs=0.06 * spread)
        assert interval.high == pytest.approx(means[3899], abs=0.06 * spread)

    def test_comes_close_to_the_normal_interval_on_many_rows(self):
        values = np.random.default_rng(0).normal(5.0, 2.0, size=2000)
        error = 1.959964 * values.std(ddof=1) / math.sqrt(2000)
        interval = bootstrap_mean(values, resamples=4000)
        assert interval.high - interval.low == pytest.approx(2 * error, rel=0.06)

    def test_a_smaller_confidence_gives_a_narrower_interval(self):
        values = np.arange(50.0)
        wide, narrow = bootstrap_mean(values, confidence=0.99), bootstrap_mean(values, confidence=0.5)
        assert wide.low < narrow.low < narrow.value < narrow.high < wide.high

    @pytest.mark.parametrize("values", [[7.5], [3.0, 3.0, 3.0], [0.0] * 10])
    def test_equal_rows_and_one_row_give_a_point(self, values):
        assert bootstrap_mean(values) == Interval(values[0], values[0], values[0])

    def test_no_resamples_make_no_interval(self):
        assert bootstrap_mean([1.0, 2.0], resamples=0) == Interval(1.5, 1.5, 1.5)

    def test_the_same_seed_gives_the_same_interval(self):
        values = np.random.default_rng(0).random(30)
        assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
        assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)

    def test_asks_scipy_for_nothing_newer_than_1_11(self, monkeypatch):
        """`rng` came with scipy 1.15; pyproject.toml allows 1.11."""
        bootstrap = stats.bootstrap

        def of_1_11(data, statistic, *, n_resamples, batch, vectorized, paired, confidence_level, method, random_state):
            given = {name: value for name, value in locals().items() if name not in ("data", "statistic", "bootstrap")}
            return bootstrap(data, statistic, **given)

        values = np.arange(20.0)
        expected = bootstrap_mean(values, seed=5)
        monkeypatch.setattr(stats, "bootstrap", of_1_11)
        assert bootstrap_mean(values, seed=5) == expected

    def test_refuses_no_rows_and_impossible_settings(self):
        with pytest.raises(UserError, match="at least one"):
            bootstrap_mean([])
        with pytest.raises(UserError, match="between 0 and 1"):
            bootstrap_mean([1.0, 2.0], confidence=95)


class TestBootstrapRatio:
    def test_draws_each_sum_with_its_count(self):
        rng = np.random.default_rng(4)
        counts = rng.integers(1, 50, size=40)
        sums = counts * rng.normal(2.0, 0.3, size=40)
        pick, ratios = random.Random(5), []
        for _ in range(4000):
            rows = [pick.randrange(40) for _ in range(40)]
            ratios.append(sum(sums[row] for row in rows) / sum(counts[row] for row in rows))
        ratios.sort()
        interval = bootstrap_ratio(sums, counts, resamples=4000)
        spread = ratios[3899] - ratios[99]
        assert interval.value == pytest.approx(sums.sum() / counts.sum())
        assert interval.low == pytest.approx(ratios[99], abs=0.06 * spread)
        assert interval.high == pytest.approx(ratios[3899], abs=0.06 * spread)


class TestPairedDifference:
    def test_equals_the_textbook_interval(self):
        # differences 1, 2, 3, 4, 5: mean 3, s = sqrt(2.5), t(0.975, 4) = 2.776445.
        half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
        interval = paired_difference([11, 22, 33, 44, 55], [10, 20, 30, 40, 50])
        assert interval.value == pytest.approx(3.0)
        assert interval.low == pytest.approx(3.0 - half, rel=1e-6)
        assert interval.high == pytest.approx(3.0 + half, rel=1e-6)

    def test_the_other_way_round_changes_the_sign(self):
        a, b = [1.0, 2.5, 2.0], [0.5, 1.0, 3.0]
        forth, back = paired_difference(a, b), paired_difference(b, a)
        assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))

    def test_equal_differences_give_a_point(self):
        assert paired_difference([2.0, 3.0], [1.0, 2.0]) == Interval(1.0, 1.0, 1.0)

    def test_refuses_what_has_no_spread_or_no_pairs(self):
        with pytest.raises(UserError, match="at least two seeds"):
            paired_difference([1.0], [2.0])
        with pytest.raises(UserError, match="pairs need"):
            paired_difference([1.0, 2.0], [2.0])


class TestScorePredictions:
    def test_keeps_rows_in_order_and_averages_them(self):
        scores = score_predictions(["a cat", "nothing", "The Dog!"], [["a cat"], ["a cat"], ["cow", "the dog"]])
        assert scores.rouge_l_rows == (100.0, 0.0, 100.0)
        assert scores.exact_match_rows == (True, False, True)
        assert scores.rouge_l.value == pytest.approx(200 / 3)
        assert scores.exact_match.value == pytest.approx(200 / 3)
        assert scores.rouge_l.low < scores.rouge_l.value < scores.rouge_l.high

    def test_one_row_and_all_wrong_give_points(self):
        assert score_predictions(["a"], [["a"]]).rouge_l == Interval(100.0, 100.0, 100.0)
        assert score_predictions(["a"] * 5, [["b"]] * 5).exact_match == Interval(0.0, 0.0, 0.0)

    def test_warns_once_that_another_script_scores_zero(self):
        with pytest.warns(UserWarning, match=r"outside \[a-z0-9\]") as caught:
            score_predictions(["кот"] * 3, [["кот"], ["чёрный пёс"], ["a cat"]])
        assert len(caught) == 1

    def test_does_not_warn_about_latin_text_or_a_given_tokenizer(self, tokenizer):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            score_predictions(["a cat"], [["a cat, née «Мурка»"]])
            score_predictions(["кот"], [["кот"]], tokenizer=tokenizer)

    def test_names_the_row_without_a_reference(self):
        with pytest.raises(UserError, match="row 1: no reference"):
            score_predictions(["a", "b"], [["a"], []])

    def test_refuses_lists_of_different_lengths(self):
        with pytest.raises(UserError, match="2 predictions for 1 rows"):
            score_predictions(["a", "b"], [["a"]])


class TestReadPredictions:
    def test_reads_rows_in_order(self, tmp_path):
        path = tmp_path / "p.jsonl"
        rows = [
            {"prediction": "a\u2028b", "references": ["a", "b"], "id": 7},
            {"prediction": "", "references": ["ж"]},
        ]
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        assert read_predictions(path) == (["a\u2028b", ""], [["a", "b"], ["ж"]])

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("{not json", "no JSON"),
            ("[1, 2]", "got a list"),
            ("[" * 100_000, "nests too deeply"),
            ('{"prediction": ' + "1" * 5000 + "}", "more than 4,300 digits"),
            ('{"references": ["a"]}', "`prediction` is missing"),
            ('{"prediction": 3, "references": ["a"]}', "`prediction` is '3'"),
            ('{"prediction": "a", "references": "b"}', "`references` is 'b'"),
            ('{"prediction": "a", "references": []}', "empty list"),
        ],
    )
    def test_names_the_file_and_the_line(self, tmp_path, line, complaint):
        path = tmp_path / "p.jsonl"
        path.write_text('{"prediction": "a", "references": ["a"]}\n' + line + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"p\.jsonl', line 2: .*" + complaint.replace("[", r"\[")):
            read_predictions(path)

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        path = tmp_path / "p.jsonl"
        path.write_text('{"prediction": "a", "references": ["b"]}\n', encoding="utf-8-sig")
        assert read_predictions(path) == (["a"], [["b"]])

    def test_refuses_a_missing_and_an_empty_file(self, tmp_path):
        with pytest.raises(UserError, match=r"none\.jsonl"):
            read_predictions(tmp_path / "none.jsonl")
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(UserError, match="holds no prediction"):
            read_predictions(tmp_path / "empty.jsonl")


LETTERS = string.ascii_letters + string.digits
END_ID = 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter; end-of-text is also the padding."""
    vocabulary = {token: id_ for id_, token in enumerate(["<unk>", "<s>", "</s>", "<turn>", *LETTERS, " "])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<turn>"],
    )


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    """Random weights, large enough that greedy answers vary and some of them end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.7,
        eos_token_id=END_ID,
        bos_token_id=1,
        attention_dropout=0.3,
    )
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        model.lm_head.weight[END_ID : END_ID + 2] *= 1.5  # so that some answers end, by either special token
    return model


PROMPTS = ["a", "the quick fox", "bb", "jumps over", "zebra crossing ahead", "q", "lazy dogs sleep", "mmm"]
SHORT = GenerationSettings(max_new_tokens=24, batch_size=3)


def greedy_by_hand(model, tokenizer, prompt, max_new_tokens, end_ids=(END_ID,)):
    """No cache, no batch, no padding: the token ids of the answer, end-of-text included."""
    model.eval()
    ids, new = tokenizer(prompt)["input_ids"], []
    with torch.no_grad():
        while len(new) < max_new_tokens and (not new or new[-1] not in end_ids):
            logits = model(torch.tensor([ids + new]), use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
    return new


class TestGenerateAnswers:
    def test_a_batch_equals_prompts_one_by_one_in_order(self, model, tokenizer):
        answers = generate_answers(model, tokenizer, PROMPTS, SHORT)
        expected = [greedy_by_hand(model, tokenizer, prompt, 24) for prompt in PROMPTS]
        assert [answer.num_tokens for answer in answers] == [len(ids) for ids in expected]
        assert [answer.ended for answer in answers] == [ids[-1] == END_ID for ids in expected]
        assert [answer.text for answer in answers] == [
            tokenizer.decode(ids, skip_special_tokens=True) for ids in expected
        ]
        assert {answer.ended for answer in answers} == {True, False}  # else this test shows little

    def test_end_of_text_in_the_last_place_counts_as_ended(self, model, tokenizer):
        free = generate_answers(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=24))
        row, answer = next((i, a) for i, a in enumerate(free) if a.ended and a.num_tokens > 1)
        exact = GenerationSettings(max_new_tokens=answer.num_tokens)
        assert generate_answers(model, tokenizer, [PROMPTS[row]], exact) == [answer]
        short = GenerationSettings(max_new_tokens=answer.num_tokens - 1)
        (cut,) = generate_answers(model, tokenizer, [PROMPTS[row]], short)
        assert (cut.ended, cut.num_tokens) == (False, answer.num_tokens - 1)

    def test_takes_prompts_already_encoded(self, model, tokenizer):
        ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        assert generate_answers(model, tokenizer, ids, SHORT) == generate_answers(model, tokenizer, PROMPTS, SHORT)

    def test_another_special_token_of_the_checkpoint_ends_too(self, model, tokenizer):
        turn, letter = tokenizer.convert_tokens_to_ids(["<turn>", "f"])
        model.generation_config.eos_token_id = [END_ID, turn, letter]  # a letter ends nothing
        expected = [greedy_by_hand(model, tokenizer, prompt, 24, (END_ID, turn)) for prompt in PROMPTS]
        assert any(ids[-1] == turn for ids in expected)
        assert any(letter in ids[:-1] for ids in expected)
        answers = generate_answers(model, tokenizer, PROMPTS, SHORT)
        assert [answer.num_tokens for answer in answers] == [len(ids) for ids in expected]
        assert [answer.ended for answer in answers] == [ids[-1] in (END_ID, turn) for ids in expected]
        assert all("<turn>" not in answer.text for answer in answers)

    @pytest.mark.parametrize("sampling_temperature", [0.0, 1.0])
    def test_changes_neither_random_state_nor_model(self, model, tokenizer, sampling_temperature):
        model.train()
        model.model.layers[0].eval()  # a part frozen in evaluation mode stays so
        model.generation_config = config = GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=END_ID)
        before = config.to_dict()
        torch.manual_seed(7), np.random.seed(7), random.seed(7)  # noqa: NPY002
        expected = (torch.rand(3).tolist(), np.random.rand(), random.random())  # noqa: NPY002
        torch.manual_seed(7), np.random.seed(7), random.seed(7)  # noqa: NPY002
        settings = GenerationSettings(max_new_tokens=5, sampling_temperature=sampling_temperature)
        generate_answers(model, tokenizer, PROMPTS, settings)
        assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == expected  # noqa: NPY002
        assert model.training
        assert model.model.layers[1].training
        assert not model.model.layers[0].training
        assert model.generation_config is config
        assert config.to_dict() == before

    @pytest.mark.parametrize("sampling_temperature", [0.0, 1.0])
    def test_processes_share_the_batches_and_each_has_the_answers_of_one(
        self, model, tokenizer, monkeypatch, sampling_temperature
    ):
        settings = GenerationSettings(max_new_tokens=5, batch_size=1, sampling_temperature=sampling_temperature)
        alone = generate_answers(model, tokenizer, PROMPTS, settings)
        found = []

        def gather(mine):  # as if all had come: the last one has what the others found before
            found.extend(mine)
            return found

        monkeypatch.setattr(generation, "gather_object", gather)
        ranks = [SimpleNamespace(num_processes=2, process_index=rank) for rank in (0, 1)]
        with pytest.raises(KeyError):  # the first is alone with its half
            generate_answers(model, tokenizer, PROMPTS, settings, processes=ranks[0])
        assert generate_answers(model, tokenizer, PROMPTS, settings, processes=ranks[1]) == alone
        assert {len(share) for share in found} == {len(PROMPTS) // 2, (len(PROMPTS) + 1) // 2}

    def test_restores_the_model_after_an_error(self, model, tokenizer):
        model.train()
        config = model.generation_config

        def stop(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate_answers(model, tokenizer, PROMPTS, SHORT, progress=stop)
        assert model.training
        assert model.generation_config is config

    def test_keeps_the_cache_under_gradient_checkpointing(self, model, tokenizer):
        expected = generate_answers(model, tokenizer, PROMPTS, SHORT)
        model.activation_checkpointing_enable()
        model.config.use_cache = False
        model.train()
        widths = []
        hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        settings = GenerationSettings(max_new_tokens=24, batch_size=len(PROMPTS))
        assert generate_answers(model, tokenizer, PROMPTS, settings) == expected
        hook.remove()
        assert widths[0] > 1
        assert set(widths[1:]) == {1}

    def test_ignores_what_the_checkpoint_wants_of_generation(self, model, tokenizer):
        expected = generate_answers(model, tokenizer, PROMPTS, SHORT)
        model.generation_config = GenerationConfig(
            eos_token_id=END_ID,
            do_sample=True,
            repetition_penalty=3.0,
            min_new_tokens=30,
            suppress_tokens=[5, 6],
        )
        assert generate_answers(model, tokenizer, PROMPTS, SHORT) == expected

    def test_sampling_depends_on_the_seed_alone(self, model, tokenizer):
        def sampled(seed):
            settings = GenerationSettings(max_new_tokens=20, sampling_temperature=1.0, seed=seed)
            return generate_answers(model, tokenizer, PROMPTS, settings)

        first = sampled(1)
        torch.manual_seed(123)
        assert sampled(1) == first
        assert sampled(2) != first

    def test_sampling_draws_from_the_whole_distribution(self, model, tokenizer):
        # Nearly flat logits: all 67 tokens come about equally often, unless only the 50 likeliest may.
        with torch.no_grad():
            model.lm_head.weight.mul_(1e-3)

        def letters(top_p):
            settings = GenerationSettings(max_new_tokens=1, batch_size=1000, sampling_temperature=1.0, top_p=top_p)
            return {answer.text for answer in generate_answers(model, tokenizer, ["a"] * 1000, settings)}

        assert len(letters(1.0)) >= 62
        assert len(letters(0.2)) <= 15

    def test_as_many_beams_as_tokens_find_the_likeliest_text_of_all(self, model, tokenizer):
        def best_text(prompt):
            ids, texts = tokenizer(prompt)["input_ids"], []
            first = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).tolist()
            for a in range(len(tokenizer)):
                second = model(torch.tensor([[*ids, a]])).logits[0, -1].log_softmax(-1).tolist()
                texts += [((first[a] + logprob) / 2, [a, b]) for b, logprob in enumerate(second) if a != END_ID]
            return max([*texts, (first[END_ID], [END_ID])])[1]

        model.eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(0.1)  # so that the likeliest token does not take all
            expected = [best_text(prompt) for prompt in PROMPTS]
        assert expected != [greedy_by_hand(model, tokenizer, prompt, 2) for prompt in PROMPTS]
        settings = GenerationSettings(max_new_tokens=2, num_beams=len(tokenizer))
        texts = [answer.text for answer in generate_answers(model, tokenizer, PROMPTS, settings)]
        assert texts == tokenizer.batch_decode(expected, skip_special_tokens=True)

    def test_reports_progress(self, model, tokenizer):
        seen = []
        settings = GenerationSettings(max_new_tokens=2, batch_size=3)
        generate_answers(model, tokenizer, PROMPTS, settings, progress=lambda *done: seen.append(done))
        assert seen == [(3, 8), (6, 8), (8, 8)]

    def test_no_prompts_give_no_answers(self, model, tokenizer):
        assert generate_answers(model, tokenizer, []) == []

    def test_refuses_a_prompt_that_does_not_fit_or_is_empty(self, model, tokenizer):
        with pytest.raises(UserError, match=r"prompt 1 has 50 tokens.*64 positions.*more than 44 tokens"):
            generate_answers(model, tokenizer, ["a", "b" * 50], GenerationSettings(max_new_tokens=20))
        with pytest.raises(UserError, match="prompt 1 has no tokens"):
            generate_answers(model, tokenizer, ["a", ""], GenerationSettings(max_new_tokens=4))

    def test_refuses_a_module_that_cannot_generate(self, tokenizer):
        with pytest.raises(UserError, match="Linear holds no model"):
            generate_answers(torch.nn.Linear(2, 2), tokenizer, ["a"])

    @pytest.mark.parametrize(
        "wrong",
        [{"max_new_tokens": 0}, {"num_beams": 0}, {"top_p": 0.0}]
        + [{"sampling_temperature": value} for value in (-1.0, math.nan, math.inf)],
    )
    def test_refuses_settings_out_of_range(self, wrong):
        with pytest.raises(UserError, match=next(iter(wrong))):
            GenerationSettings(**wrong)


ROWS = [
    ("say a", ["aa"]),
    ("fox", ["the quick brown fox", "fox"]),
    ("lazy", ["dog"]),
    ("zz", ["a b c d"]),
    ("q", ["u"]),
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    records = [{"prompt": prompt, "references": references} for prompt, references in ROWS]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_rows(path, template="{instruction}")


def nll_by_hand(model, tokenizer, prompt, answer):
    """Sum over answer and end-of-text, token by token, each from a pass of its own; and the number of tokens."""
    model.eval()
    ids = tokenizer(prompt)["input_ids"]
    labels = [*tokenizer(answer)["input_ids"], END_ID]
    total = 0.0
    for label in labels:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        total -= logits.log_softmax(-1)[label].item()
        ids = [*ids, label]
    return total, len(labels)


def batches_of(rows, tokenizer, batch_size):
    encoded = encode_rows(rows, tokenizer, max_length=60, max_prompt_length=30, unit="token").dataset
    collator = DistillCollator(tokenizer.pad_token_id)
    order = [list(range(start, min(start + batch_size, len(encoded)))) for start in range(0, len(encoded), batch_size)]
    return [collator([encoded[i] for i in indices]) for indices in order]


class TestLabelLosses:
    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_sums_what_single_passes_give(self, model, tokenizer, rows, batch_size):
        losses = label_losses(model, batches_of(rows, tokenizer, batch_size))
        expected = [nll_by_hand(model, tokenizer, prompt, references[0]) for prompt, references in ROWS]
        assert losses.row_ids.tolist() == [0, 1, 2, 3, 4]
        assert losses.num_tokens.tolist() == [count for _, count in expected]
        assert losses.sums == pytest.approx([total for total, _ in expected], rel=1e-6)
        everything = sum(total for total, _ in expected) / sum(count for _, count in expected)
        assert losses.cross_entropy == pytest.approx(everything, rel=1e-6)

    def test_is_no_mean_of_row_means(self, model, tokenizer, rows):
        losses = label_losses(model, batches_of(rows, tokenizer, 2))
        assert losses.cross_entropy != pytest.approx((losses.sums / losses.num_tokens).mean(), rel=1e-3)

    def test_takes_the_models_own_logits_where_the_head_cannot_be_had_apart(self, model, tokenizer, rows):
        class Wrapped(torch.nn.Linear):
            """As an adapter wraps a head."""

        expected = label_losses(model, batches_of(rows, tokenizer, 2))
        model.lm_head.__class__ = Wrapped
        assert label_losses(model, batches_of(rows, tokenizer, 2)).sums == pytest.approx(expected.sums, rel=1e-9)

    def test_changes_neither_mode_nor_random_state(self, model, tokenizer, rows):
        model.train()
        torch.manual_seed(3)
        expected = torch.rand(2).tolist()
        torch.manual_seed(3)
        label_losses(model, batches_of(rows, tokenizer, 2))
        assert model.training
        assert torch.rand(2).tolist() == expected
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_stops_at_a_broken_model_and_names_the_row(self, model, tokenizer, rows):
        with torch.no_grad():
            model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("x")] = math.nan
        with pytest.raises(RunFailed, match=r"1 of 5 answers is not finite, the first in row 1"):
            label_losses(model, batches_of(rows, tokenizer, 2))

    def test_refuses_no_rows(self, model):
        with pytest.raises(UserError, match="no row"):
            label_losses(model, [])


class TestEvaluateModel:
    @pytest.fixture
    def settings(self) -> GenerationSettings:
        return GenerationSettings(max_new_tokens=20, batch_size=2)

    def test_puts_scores_and_likelihood_of_the_same_rows_together(self, model, tokenizer, rows, settings):
        evaluation = evaluate_model(model, tokenizer, rows, settings, max_length=40, max_prompt_length=20)
        answers = generate_answers(model, tokenizer, [prompt for prompt, _ in ROWS], settings)
        scores = score_predictions([answer.text for answer in answers], [references for _, references in ROWS])
        nll = [nll_by_hand(model, tokenizer, prompt, references[0]) for prompt, references in ROWS]
        cross_entropy = sum(total for total, _ in nll) / sum(count for _, count in nll)
        assert evaluation.predictions == tuple(answer.text for answer in answers)
        assert (evaluation.rouge_l, evaluation.exact_match) == (scores.rouge_l, scores.exact_match)
        assert evaluation.cross_entropy.value == pytest.approx(cross_entropy, rel=1e-6)
        assert evaluation.perplexity.value == pytest.approx(math.exp(cross_entropy), rel=1e-5)
        assert evaluation.perplexity.low == pytest.approx(math.exp(evaluation.cross_entropy.low))
        assert evaluation.perplexity.low < evaluation.perplexity.value < evaluation.perplexity.high
        assert evaluation.mean_tokens == sum(answer.num_tokens for answer in answers) / 5
        assert evaluation.ended_fraction == sum(answer.ended for answer in answers) / 5

    def test_summary_is_flat_and_survives_json(self, model, tokenizer, rows, settings):
        summary = evaluate_model(model, tokenizer, rows, settings, max_length=40, max_prompt_length=20).summary()
        figures = {
            f"{name}{bound}"
            for name in ("rouge_l", "exact_match", "perplexity", "cross_entropy")
            for bound in ("", "_low", "_high")
        }
        assert set(summary) == figures | {"mean_tokens", "ended_fraction", "num_rows", "num_dropped"}
        assert json.loads(json.dumps(summary)) == summary
        assert (summary["num_rows"], summary["num_dropped"]) == (5, 0)

    def test_leaves_out_long_prompts_everywhere_and_says_so(self, model, tokenizer, rows, settings):
        evaluation = evaluate_model(model, tokenizer, rows, settings, max_length=40, max_prompt_length=4)
        assert evaluation.predictions[0] is None
        assert None not in evaluation.predictions[1:]
        assert evaluation.num_rows == 4
        assert evaluation.dropped == {"prompt longer than 4 tokens": 1}
        assert evaluation.summary()["num_dropped"] == 1

    def test_says_which_right_answers_were_cut(self, model, tokenizer, rows, settings):
        evaluation = evaluate_model(model, tokenizer, rows, settings, max_length=12, max_prompt_length=11)
        assert evaluation.dropped == {"response truncated": 1}
        assert (evaluation.num_rows, evaluation.summary()["num_dropped"]) == (5, 0)

    def test_the_perplexity_of_a_uniform_model_is_its_vocabulary(self, model, tokenizer, rows, settings):
        with torch.no_grad():
            model.lm_head.weight.zero_()
        evaluation = evaluate_model(model, tokenizer, rows, settings, max_length=40, max_prompt_length=20)
        assert evaluation.perplexity.value == pytest.approx(len(tokenizer), rel=1e-5)
        assert evaluation.perplexity.high == pytest.approx(len(tokenizer), rel=1e-5)

    def test_perplexity_is_not_capped(self, model, tokenizer, rows, settings):
        with torch.no_grad():
            model.lm_head.weight.mul_(1e4)
        evaluation = evaluate_model(model, tokenizer, rows, settings, max_length=40, max_prompt_length=20)
        assert evaluation.cross_entropy.value > 1000
        assert evaluation.perplexity.value == math.inf
        summary = evaluation.summary()
        assert (summary["perplexity"], summary["perplexity_high"]) == (None, None)
        json.dumps(summary, allow_nan=False)

    def test_refuses_rows_without_references(self, model, tokenizer, tmp_path, settings):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
        rows = load_rows(path, template="plain", require_references=False)
        with pytest.raises(UserError, match=r"1 of 2 rows.* row 1"):
            evaluate_model(model, tokenizer, rows, settings)


class TestEvaluatePredictions:
    def test_equals_scoring_the_same_texts(self, tmp_path):
        path = tmp_path / "p.jsonl"
        path.write_text('{"prediction": "a cat", "references": ["a cat"]}\n{"prediction": "x", "references": ["y"]}\n')
        figures = evaluate_predictions(path)
        assert (figures["rouge_l"], figures["exact_match"], figures["num_rows"]) == (50.0, 50.0, 2)
        assert figures["rouge_l_low"] == 0.0
        assert figures["rouge_l_high"] == 100.0


class TestMeasureModel:
    @pytest.fixture
    def data(self, model, tokenizer, tmp_path, monkeypatch):
        """Five rows: one has no answer, one too long a prompt, one too long an answer."""
        monkeypatch.setattr(measure, "load_model", lambda path, **kwargs: model)
        monkeypatch.setattr(measure, "load_tokenizer", lambda path: tokenizer)
        monkeypatch.setattr(measure, "preflight", lambda: namedtuple("machine", "device")("cpu"))
        path = tmp_path / "rows.jsonl"
        rows = [("fox", "a fox"), ("no", ""), ("a" * 257, "b"), ("dog", "c" * 600), ("q", "u")]
        path.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows))
        return path

    @pytest.mark.parametrize("seeds", [None, 2])
    def test_says_once_which_rows_were_left_out_or_cut(self, data, seeds, capsys):
        """Rows were dropped without a word."""
        settings = GenerationSettings(max_new_tokens=4)
        figures = measure.measure_model("m", data, settings, template="{instruction}", seeds=seeds)
        err = capsys.readouterr().err
        assert err.count("m: 4 of 5 rows kept (no answer: 1)\n") == 1
        reasons = "prompt longer than 256 tokens: 1, response truncated: 1"
        assert err.count(f"m: 3 of 4 rows measured ({reasons})\n") == 1
        assert (figures["num_rows"], figures["num_dropped"]) == (3, 1)

    def test_a_perplexity_without_end_stays_one_over_seeds(self, model, data):
        with torch.no_grad():
            model.lm_head.weight.mul_(1e5)
        settings = GenerationSettings(max_new_tokens=4)
        figures = measure.measure_model("m", data, settings, template="{instruction}", seeds=2)
        assert figures["perplexity"] is None
        assert figures["cross_entropy"] > 1000
        assert figures["rouge_l_low"] <= figures["rouge_l"] <= figures["rouge_l_high"]

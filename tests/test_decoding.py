"""kdkit's own loop over tokens writes what transformers' `generate` writes."""

import pytest
import torch
from model_families import FAMILIES, tiny
from transformers import AutoTokenizer

from kdkit.config import demo_folder
from kdkit.evaluation import GenerationSettings, generate_answers, generation
from kdkit.evaluation.cache import roomy_cache
from kdkit.evaluation.decoding import can_write, write
from kdkit.loading.heads import allow_packing

PROMPTS = ([3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14, 15, 16], [17, 18])
ENDS = list(range(20, 96, 4))
"""A quarter of what can be written, so that rows end at many places."""


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(own)) + list(own) for own in prompts])
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts])
    return ids, mask


def up_to_the_end(rows, ends):
    """Each row's tokens up to and with its first end."""
    texts = []
    for row in rows.tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        texts.append(row[: end + 1])
    return texts


@pytest.fixture
def batches(monkeypatch):
    """(rows, tokens) of each pass."""
    seen = []
    real = torch.nn.Embedding.forward

    def record(self, ids):
        seen.append(tuple(ids.shape))
        return real(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", record)
    return seen


class TestWrite:
    @pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1] * 3], ids=["uneven", "without padding"])
    @pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Gemma2"])
    def test_the_likeliest_tokens_are_those_of_generate(self, family, prompts):
        model = tiny(family, **{"sliding_window": None} if family == "Mistral" else {})
        assert allow_packing(model)
        ids, mask = padded(prompts)
        for ends in (ENDS, [95]):
            options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
            expected = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
            cache = roomy_cache(model, ids.shape[1] + 12)
            assert can_write(model, cache, ids.shape[1] + 12)
            found = write(model, ids, mask, cache, max_new_tokens=12, end_ids=ends, draw=None)
            assert up_to_the_end(found, ends) == up_to_the_end(expected, ends)

    def test_rows_that_have_ended_are_left_out(self, batches):
        model = tiny("Llama")
        allow_packing(model)
        ids, mask = padded(PROMPTS * 4)
        batches.clear()
        cache = roomy_cache(model, 69)
        found = write(model, ids, mask, cache, max_new_tokens=64, end_ids=ENDS, draw=None)
        sizes = [rows for rows, _ in batches]
        assert batches[0] == (20, 5)
        assert {tokens for _, tokens in batches[1:]} == {1}
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] <= 10
        lengths = sorted(map(len, up_to_the_end(found, ENDS)))
        # No pass has more than twice the rows that still write.
        for place, size in enumerate(sizes):
            assert size < 2 * sum(length > place for length in lengths) or size == 20

    def test_one_token(self):
        model = tiny("Llama")
        allow_packing(model)
        ids, mask = padded(PROMPTS)
        found = write(model, ids, mask, roomy_cache(model, 6), max_new_tokens=1, end_ids=[95], draw=None)
        expected = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        assert found[:, 0].tolist() == expected.argmax(-1).tolist()


class TestWhoWrites:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_answers_are_those_of_generate(self, temperature, monkeypatch):
        model, tokenizer = tiny("Llama"), AutoTokenizer.from_pretrained(demo_folder() / "teacher")
        allow_packing(model)
        settings = GenerationSettings(max_new_tokens=24, batch_size=3, sampling_temperature=temperature, top_p=0.9)
        monkeypatch.setattr(generation, "end_of_text_ids", lambda *_: ENDS)
        found = generate_answers(model, tokenizer, PROMPTS, settings)
        monkeypatch.setattr(generation, "can_write", lambda *_: False)
        expected = generate_answers(model, tokenizer, PROMPTS, settings)
        assert found == expected
        assert len({answer.num_tokens for answer in found}) > 1

    def test_models_that_were_not_tried_or_look_back_less_far_are_generates(self):
        plain = tiny("Llama")
        assert not can_write(plain, roomy_cache(plain, 20), 20)
        narrow = tiny("Mistral", sliding_window=8)
        allow_packing(narrow)
        assert not can_write(narrow, roomy_cache(narrow, 20), 20)

"""kdkit's own loop over tokens writes what transformers' `generate` writes."""

from unittest import mock

import pytest
import torch
from model_families import FAMILIES, tiny
from transformers import AutoTokenizer

from kdkit.config import demo_folder
from kdkit.evaluation import GenerationSettings, decoding, generate_answers, generation
from kdkit.evaluation.cache import roomy_cache
from kdkit.evaluation.decoding import can_write, write
from kdkit.loading.heads import allow_packing

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
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
            found = write(model, ids, attention_mask=mask, cache=cache, max_new_tokens=12, end_ids=ends, draw=None)
            assert up_to_the_end(found, ends) == up_to_the_end(expected, ends)

    @pytest.mark.parametrize("tokens_a_look", [1, 3, 8])
    def test_rows_that_have_ended_are_left_out(self, batches, monkeypatch, tokens_a_look):
        monkeypatch.setitem(decoding.TOKENS_A_LOOK, "cpu", tokens_a_look)
        model = tiny("Llama")
        allow_packing(model)
        draws = torch.Generator().manual_seed(0)
        ids, mask = padded([*torch.randint(3, 96, (20, 5), generator=draws).tolist(), [3], [4, 5]])
        options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": ENDS[0]}
        expected = up_to_the_end(model.generate(ids, attention_mask=mask, **options)[:, 5:], ENDS)
        batches.clear()
        cache = roomy_cache(model, 35)
        found = write(model, ids, attention_mask=mask, cache=cache, max_new_tokens=30, end_ids=ENDS, draw=None)
        assert up_to_the_end(found, ENDS) == expected
        carried, sizes = 22, [(22, 5)]
        for place in range(1, 30):
            if place % tokens_a_look == 0:
                at_work = sum(len(text) > place for text in expected)
                carried = at_work if 2 * at_work <= carried else carried
            if carried:
                sizes.append((carried, 1))
        assert batches == sizes
        assert len(set(sizes)) >= 3

    def test_one_token(self):
        model = tiny("Llama")
        allow_packing(model)
        ids, mask = padded(PROMPTS)
        cache = roomy_cache(model, 6)
        found = write(model, ids, attention_mask=mask, cache=cache, max_new_tokens=1, end_ids=[95], draw=None)
        expected = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        assert found[:, 0].tolist() == expected.argmax(-1).tolist()


class TestWhoWrites:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_answers_are_those_of_generate(self, temperature, monkeypatch):
        model, tokenizer = tiny("Llama"), AutoTokenizer.from_pretrained(demo_folder() / "teacher")
        allow_packing(model)
        settings = GenerationSettings(max_new_tokens=24, batch_size=3, sampling_temperature=temperature, top_p=0.9)
        monkeypatch.setattr(generation, "end_of_text_ids", lambda *_: ENDS)
        with mock.patch.object(generation, "write", side_effect=write) as made:
            found = generate_answers(model, tokenizer, PROMPTS, settings)
        assert made.call_count == 2
        monkeypatch.setattr(generation, "can_write", lambda *_: False)
        expected = generate_answers(model, tokenizer, PROMPTS, settings)
        assert found == expected
        assert len({answer.num_tokens for answer in found}) > 1

    def test_a_model_that_was_not_tried_is_generates(self):
        model = tiny("Llama")
        assert not can_write(model, roomy_cache(model, 20), 20)

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("Mistral", {"sliding_window": 8}),
            ("Mistral", {"sliding_window": 64}),  # its cache has layers of another kind
            ("Llama", {"rope_parameters": DYNAMIC}),
            ("Gemma3Text", {"rope_parameters": {"sliding_attention": ROPE, "full_attention": DYNAMIC}}),
            ("Phi3", {"sliding_window": None}),  # prepares its inputs in a way of its own
        ],
    )
    def test_models_for_which_generate_does_more_are_its(self, family, changes):
        model = tiny(family, **changes)
        allow_packing(model)
        cache = roomy_cache(model, 20)
        assert cache is not None
        assert not can_write(model, cache, 20)

    def test_experts_on_a_card_are_generates_which_runs_them_otherwise(self):
        model = tiny("Mixtral", sliding_window=None)
        allow_packing(model)
        cache = roomy_cache(model, 20)
        with mock.patch.object(type(model), "get_experts_implementation", return_value={"": "grouped_mm"}):
            assert can_write(model, cache, 20)
            with mock.patch.object(type(model), "device", torch.device("cuda")):
                assert not can_write(model, cache, 20)

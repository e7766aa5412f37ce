"""Attention with shared keys on a card without a flash kernel."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kdkit.loading import attention
from kdkit.loading.attention import UNGROUPED, spread_shared_keys


@pytest.fixture
def old_card(monkeypatch):
    """As if no kernel read shared keys."""
    monkeypatch.setattr(attention, "has_flash", lambda query: False)


@pytest.fixture
def asked(monkeypatch):
    """(query's shape, key's shape, enable_gqa) of every call of torch's attention."""
    calls, real = [], F.scaled_dot_product_attention

    def record(query, key, value, **options):
        calls.append((query.shape, key.shape, options.get("enable_gqa", False)))
        return real(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


def model_with(num_kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


class TestSpreadSharedKeys:
    """transformers #48633: on a T4, shared keys without a mask take the kernel that writes down all scores."""

    @pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
    def test_the_logits_and_gradients_are_the_same(self, old_card, asked, num_kv_heads):
        model = model_with(num_kv_heads)
        spread = copy.deepcopy(model)
        spread_shared_keys(spread)
        assert spread.config._attn_implementation == UNGROUPED
        ids = torch.arange(24).reshape(2, 12)
        for one in (model, spread):
            one(input_ids=ids).logits.square().sum().backward()
        torch.testing.assert_close(spread(input_ids=ids).logits, model(input_ids=ids).logits)
        for one, other in zip(spread.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)

    def test_torch_is_never_asked_for_shared_keys(self, old_card, asked):
        model = model_with(2)
        model(input_ids=torch.arange(12)[None])
        assert all(grouped for *_, grouped in asked), "transformers' own attention no longer does: drop this module"
        asked.clear()
        spread_shared_keys(model)
        model(input_ids=torch.arange(12)[None])
        model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False, eos_token_id=63, pad_token_id=0)
        assert asked
        for query, key, grouped in asked:
            assert not grouped
            assert query[1] == key[1]

    def test_generates_the_same_text_one_token_at_a_time(self, old_card):
        model = model_with(2)
        spread = copy.deepcopy(model)
        spread_shared_keys(spread)
        prompts, mask = torch.arange(10).reshape(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        for attention_mask in (torch.ones_like(mask), mask):
            texts = [
                one.generate(
                    prompts,
                    attention_mask=attention_mask,
                    max_new_tokens=12,
                    do_sample=False,
                    eos_token_id=63,
                    pad_token_id=0,
                )
                for one in (model, spread)
            ]
            assert torch.equal(*texts)

    def test_padding_is_left_to_transformers(self, old_card):
        model = model_with(2)
        spread = copy.deepcopy(model)
        spread_shared_keys(spread)
        ids, mask = torch.arange(24).reshape(2, 12), torch.ones(2, 12, dtype=torch.int64)
        mask[0, 8:] = 0
        expected, found = (one(input_ids=ids, attention_mask=mask).logits[0, :8] for one in (model, spread))
        torch.testing.assert_close(found, expected)

    def test_with_a_flash_kernel_nothing_changes(self, asked):
        model = model_with(2)
        spread_shared_keys(model)
        model(input_ids=torch.arange(12)[None])
        assert all(grouped for *_, grouped in asked)

    def test_another_attention_is_left_alone(self):
        model = model_with(2)
        model.set_attn_implementation("eager")
        spread_shared_keys(model)
        assert model.config._attn_implementation == "eager"

    def test_a_saved_model_knows_nothing_of_it(self, tmp_path):
        model = model_with(2)
        spread_shared_keys(model)
        model.save_pretrained(tmp_path)
        assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"

    def test_gpt2_goes_on_as_it_was(self, old_card):
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
        expected = model(input_ids=torch.arange(12)[None]).logits
        spread_shared_keys(model)
        torch.testing.assert_close(model(input_ids=torch.arange(12)[None]).logits, expected)

"""What answers are written with: the cache with room, and the drawing of a token."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kdkit.evaluation.cache import RoomyLayer, roomy_cache
from kdkit.evaluation.drawing import DrawToken

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.tensor([[3, 4, 5, 6], [0, 7, 8, 9]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5)).eval()


class TestRoomyCache:
    def test_writes_what_transformers_own_cache_writes(self) -> None:
        model = llama()
        expected = model.generate(IDS, attention_mask=MASK, **SETTINGS)
        cache = roomy_cache(model, 16)
        assert torch.equal(model.generate(IDS, attention_mask=MASK, past_key_values=cache, **SETTINGS), expected)

    def test_a_layer_holds_what_was_put_in_and_never_moves_it(self) -> None:
        theirs, ours = DynamicLayer(), RoomyLayer(room=8)
        places = set()
        for length in (5, 1, 1, 1):
            new = torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 6)
            for expected, found in zip(theirs.update(*new), ours.update(*new), strict=True):
                assert torch.equal(found, expected)
            places.add((ours.keys.data_ptr(), ours.values.data_ptr()))
        assert len(places) == 1
        assert ours.get_seq_length() == 8

    def test_tokens_beyond_the_room_are_kept_all_the_same(self) -> None:
        theirs, ours = DynamicLayer(), RoomyLayer(room=6)
        for length in (5, 1, 1, 2):
            new = torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 4)
            for expected, found in zip(theirs.update(*new), ours.update(*new), strict=True):
                assert torch.equal(found, expected)

    @pytest.mark.parametrize("lengths", [(5, 1), (5, 3)], ids=["within the room", "beyond it"])
    def test_rows_can_be_left_out(self, lengths) -> None:
        theirs, ours = DynamicLayer(), RoomyLayer(room=6)
        for length in lengths:
            new = torch.randn(4, 3, length, 4), torch.randn(4, 3, length, 4)
            theirs.update(*new)
            ours.update(*new)
        for layer in (theirs, ours):
            layer.batch_select_indices(torch.tensor([0, 3]))
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        new = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4)
        for expected, found in zip(theirs.update(*new), ours.update(*new), strict=True):
            assert torch.equal(found, expected)

    def test_layers_of_another_kind_stay(self) -> None:
        sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **sliding))
        cache = roomy_cache(model, 16)
        assert isinstance(cache, DynamicCache)
        assert [type(layer) for layer in cache.layers] == [RoomyLayer, DynamicSlidingWindowLayer]

    def test_beams_take_transformers_own(self) -> None:
        assert roomy_cache(llama(), 16, num_beams=2) is None


def drawn(scores: torch.Tensor, **settings: float) -> torch.Tensor:
    """Ids that are drawn for each row of scores."""
    draw = DrawToken(**{"temperature": 1.0, "top_p": 1.0, "seed": 3, "device": scores.device} | settings)
    left = draw(torch.zeros(len(scores), 1, dtype=torch.int64), scores)
    assert (left.isfinite().sum(-1) == 1).all()
    return left.argmax(-1)


class TestDrawToken:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_draws_as_often_as_the_tempered_distribution_says(self, temperature: float) -> None:
        probs = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
        rows = 40_000
        counts = drawn(probs.log().expand(rows, -1), temperature=temperature).bincount(minlength=5)
        powers = probs ** (1 / temperature)
        expected = rows * powers / powers.sum()
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_squared < 18.5  # of 4 degrees of freedom, passed by one in 1,000

    @pytest.mark.parametrize("what", [torch.nan, torch.inf])
    def test_scores_that_are_no_numbers_are_noted(self, what: float) -> None:
        draw = DrawToken(temperature=1.0, top_p=1.0, seed=0, device=torch.device("cpu"))
        ids, scores = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 5)
        draw(ids, scores)
        assert not draw.is_lost
        scores[1, 2] = what
        draw(ids, scores)
        draw(ids, torch.zeros(2, 5))
        assert draw.is_lost

    def test_never_draws_what_is_impossible(self) -> None:
        scores = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
        assert set(drawn(scores.expand(5_000, -1)).tolist()) == {1, 3}

    def test_the_nucleus_is_all_there_is(self) -> None:
        scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        assert set(drawn(scores.expand(5_000, -1), top_p=0.7).tolist()) == {0, 1}

    def test_a_seed_draws_the_same_and_leaves_the_global_state(self) -> None:
        scores, before = torch.randn(50, 100), torch.get_rng_state()
        assert torch.equal(drawn(scores), drawn(scores))
        assert not torch.equal(drawn(scores), drawn(scores, seed=4))
        assert torch.equal(torch.get_rng_state(), before)

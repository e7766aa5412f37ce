"""Passes that leave padding out find what those with padding find."""

import copy
import json

import pytest
import torch
from model_families import FAMILIES, tiny
from tiny import build_trainer, make_pair, tiny_config
from torch import nn

from kdkit.data import DistillCollator
from kdkit.loading import attention, backbone, load_model
from kdkit.loading.backbone import backbone_states
from kdkit.loading.heads import allow_packing
from kdkit.teacher.signal import NO_VIEWS, Views
from kdkit.teacher.sources import LiveTeacher

LENGTHS = (5, 12, 1, 7)
LAYERS = Views(layers=True)


@pytest.fixture
def widths(monkeypatch):
    """(rows, places) of each pass of a backbone."""
    seen = []
    real = nn.Embedding.forward

    def record(self, ids):
        seen.append(tuple(ids.shape))
        return real(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", record)
    return seen


def collated(lengths):
    """A batch whose ids are 0 where there is padding and nowhere else."""
    rows = [(list(range(3, 3 + n)), [-1] * n) for n in lengths]
    return DistillCollator(0)(
        [{"input_ids": ids, "prompt_length": 1, "unit_ids": units, "row_id": 0} for ids, units in rows]
    )


def states_and_gradients(model, *, tokens, lengths=LENGTHS):
    """All layers' states at the tokens, and all gradients of something made of the last."""
    batch = collated(lengths)
    ids, places = batch["input_ids"], batch["tokens"]
    states = backbone_states(model, ids, None, views=LAYERS, tokens=places if tokens else None)
    at_tokens = [layer.flatten(0, 1)[places] for layer in (states.last, *states.layers)]
    model.zero_grad()
    at_tokens[0].square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return states, at_tokens, gradients


class TestPackedPass:
    @pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Gemma2"])
    def test_finds_the_same_states_and_gradients(self, family, widths):
        model = tiny(family)
        assert allow_packing(model)
        widths.clear()
        _, expected, exact = states_and_gradients(model, tokens=False)
        assert widths[0] == (4, 12)
        widths.clear()
        _, found, gradients = states_and_gradients(model, tokens=True)
        assert widths[0] == (1, sum(LENGTHS))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert gradients.keys() == exact.keys()
        for name in exact:
            scale = exact[name].abs().max().item()
            torch.testing.assert_close(gradients[name], exact[name], rtol=1e-3, atol=1e-4 * scale + 1e-6)

    def test_states_of_padding_are_0(self):
        model = tiny("Llama")
        allow_packing(model)
        states, _, _ = states_and_gradients(model, tokens=True)
        ids = collated(LENGTHS)["input_ids"]
        for layer in (states.last, *states.layers):
            assert layer.shape[:2] == ids.shape
            assert (layer[ids == 0] == 0).all()

    def test_with_gradient_checkpointing(self):
        model = tiny("Llama")
        allow_packing(model)
        _, _, expected = states_and_gradients(model, tokens=True)
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        _, _, found = states_and_gradients(model, tokens=True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_shared_keys_without_a_flash_kernel(self, monkeypatch):
        model = tiny("Llama")
        allow_packing(model)
        _, expected, _ = states_and_gradients(model, tokens=True)
        monkeypatch.setattr(attention, "has_flash", lambda query: False)
        _, found, _ = states_and_gradients(model, tokens=True)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(
        ("lengths", "changes"),
        [((12, 9, 10, 12), {}), ((12,), {}), (LENGTHS, {"sliding_window": 8})],
        ids=["little padding", "one row", "attention that looks back less far"],
    )
    def test_not_where_it_would_cost_or_be_wrong(self, lengths, changes, widths):
        model = tiny("Mistral", **changes)
        assert allow_packing(model)
        widths.clear()
        states_and_gradients(model, tokens=True, lengths=lengths)
        assert widths[0] == (len(lengths), 12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_in_half_precision(self, dtype, widths):
        model = tiny("Llama").to(dtype)
        assert allow_packing(model)
        expected, found = (states_and_gradients(model, tokens=packed)[1][0].float() for packed in (False, True))
        assert widths[-1] == (1, sum(LENGTHS))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())

    def test_in_mixed_precision(self):
        model = tiny("Llama")
        allow_packing(model)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = (states_and_gradients(model, tokens=packed)[1][0].float() for packed in (False, True))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())

    @pytest.mark.parametrize("views", [NO_VIEWS, LAYERS], ids=["last states", "all layers"])
    @pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
    def test_takes_no_more_memory_than_with_padding(self, views, mixed):
        sizes = {"hidden_size": 144, "intermediate_size": 384, "num_attention_heads": 9, "num_key_value_heads": 3}
        model = tiny("Llama", **sizes, num_hidden_layers=4)  # as SmolLM-135M, smaller
        assert allow_packing(model)
        places = 4 * 100
        most = int(places * (backbone.MOST_WITH_LAYERS if views.layers else backbone.MOST_TOKENS))
        batch = collated((100, 100, most - 250, 50))

        def kept_bytes(tokens):
            kept = {}

            def keep(tensor):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            noting = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with noting, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                states = backbone_states(model, batch["input_ids"] % 96, None, views=views, tokens=tokens)
            for layer in states.layers or ():
                keep(layer)
            return sum(kept.values()) - sum(p.numel() * p.element_size() for p in model.parameters())

        assert kept_bytes(batch["tokens"]) <= kept_bytes(None)

    def test_writes_the_same_text(self):
        plain = tiny("Llama")
        model = copy.deepcopy(plain)
        allow_packing(model)
        prompts, mask = torch.arange(10).reshape(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(prompts, **options), plain.generate(prompts, **options))


class TestProvePacking:
    @pytest.mark.parametrize(
        ("family", "changes"),
        [("Gemma2", {}), ("Lfm2", {"layer_types": ["full_attention", "conv"]}), ("Doge", {}), ("Bloom", {})],
        ids=[
            "eager attention",
            "convolutions",
            "attention that leaves tokens out of long texts",
            "attention of its own",
        ],
    )
    def test_what_it_cannot_serve_stays_as_it_was(self, family, changes):
        model = tiny(family, **changes)
        before = model.config._attn_implementation
        assert not allow_packing(model)
        assert model.config._attn_implementation == before

    def test_a_model_in_which_tokens_see_each_other_elsewhere_is_found_out(self):
        model = tiny("Llama")
        mlp = model.base_model.layers[0].mlp
        mlp.register_forward_hook(lambda _, __, out: out + out.roll(1, dims=1).tril(0))
        assert not allow_packing(model)
        assert model.config._attn_implementation == "sdpa"

    def test_random_draws_and_modes_are_left_alone(self):
        model = tiny("Llama").train()
        before = torch.get_rng_state()
        assert allow_packing(model)
        assert model.training
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_loaded_model_packs_and_a_saved_one_knows_nothing_of_it(self, tmp_path):
        tiny("Llama").save_pretrained(tmp_path / "one")
        model = load_model(tmp_path / "one", dtype=torch.float32, device="cpu")
        assert model.config._attn_implementation == attention.PACKED
        model.save_pretrained(tmp_path / "two")
        assert type(model).from_pretrained(tmp_path / "two").config._attn_implementation == "sdpa"


class TestInARun:
    def test_the_teacher_says_the_same(self, widths):
        model = tiny("Llama")
        batch = collated(LENGTHS)
        expected = LiveTeacher(model)(batch, LAYERS)
        allow_packing(model)
        widths.clear()
        found = LiveTeacher(model)(batch, LAYERS)
        assert widths[0] == (1, sum(LENGTHS))
        torch.testing.assert_close(found.hidden, expected.hidden)
        for one, other in zip(found.features.layers, expected.features.layers, strict=True):
            torch.testing.assert_close(one.flatten(0, 1)[batch["tokens"]], other.flatten(0, 1)[batch["tokens"]])

    def test_a_training_learns_the_same(self, tmp_path, monkeypatch, widths):
        config, losses = tiny_config(make_pair(tmp_path)), []
        for most in (1.0, 0.0):
            for name in ("MOST_TOKENS", "MOST_WITH_LAYERS"):
                monkeypatch.setattr(backbone, name, most)
            trainer = build_trainer(config, tmp_path / str(most))
            widths.clear()
            trainer.train()
            assert (1 in {rows for rows, _ in widths}) == (most > 0)
            logged = [json.loads(line) for line in (tmp_path / str(most) / "metrics.jsonl").read_text().splitlines()]
            losses.append([row["loss"] for row in logged if "loss" in row])
        assert losses[0]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

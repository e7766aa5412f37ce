"""LoRA students: what is trained, what is written, and that a finished one is a plain model."""

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_loading import tiny
from tiny import ALL_TERMS, tiny_config
from transformers import AutoModelForCausalLM, TrainerCallback

from kdkit import loading
from kdkit.config import LoraConfig
from kdkit.errors import UserError
from kdkit.loading import lora
from kdkit.training.run import run_distillation
from kdkit.training.stopping import Interrupted, StopRequest

IDS = torch.tensor([[3, 4, 5, 6, 7]])
ONLY_KD = {"kd": {"weight": 1.0}}
PEFTS_OWN = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
LORA = "student.lora={rank: 4, alpha: 8}"


@torch.no_grad()
def moved(model):
    """A model whose LoRA layers have learnt something."""
    torch.manual_seed(1)
    for weight in lora.lora_weights(model).values():
        weight.normal_(std=0.1)
    return model


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits.float()


def with_lora(family="Llama", seed=0, **settings):
    model = tiny(family)
    loading.add_lora(model, LoraConfig(**{"rank": 4, "alpha": 8} | settings), seed=seed)
    return model


class TestAddLora:
    @pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "Gemma2"])
    def test_class_logits_and_head_stay_what_they_were(self, family):
        model = with_lora(family)
        assert type(model) is type(tiny(family))
        assert torch.equal(logits_of(model), logits_of(tiny(family)))
        assert loading.check_head(moved(model)) is None

    def test_only_the_layers_are_trained_and_those_in_float32(self):
        model = tiny("Llama").to(torch.bfloat16)
        loading.add_lora(model, LoraConfig(rank=4), seed=0)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # two decoder layers of q, k, v, o, gate, up, down, each with two factors; neither head nor embeddings
        assert len(trained) == 2 * 7 * 2
        assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}

    def test_the_start_is_a_function_of_the_seed_alone(self):
        first, again, other = (lora.lora_weights(m) for m in (with_lora(), with_lora(), with_lora(seed=1)))
        assert all(torch.equal(weight, again[name]) for name, weight in first.items())
        assert any(not torch.equal(weight, other[name]) for name, weight in first.items())

    def test_no_draw_outside_is_disturbed(self):
        model = tiny("Llama")
        state = torch.get_rng_state()
        loading.add_lora(model, LoraConfig(), seed=0)
        assert torch.equal(torch.get_rng_state(), state)

    def test_layers_are_chosen_by_the_end_of_their_name(self):
        model = with_lora(target_modules=["q_proj", "layers.1.mlp.up_proj"])
        names = {name.partition(".lora_")[0] for name in lora.lora_weights(model)}
        layers = "base_model.model.model.layers"
        assert names == {f"{layers}.{i}.self_attn.q_proj" for i in (0, 1)} | {f"{layers}.1.mlp.up_proj"}

    def test_an_unknown_layer_is_refused_with_those_there_are(self):
        with pytest.raises(UserError, match=r"names c_attn, .*down_proj, .*q_proj.*or all-linear"):
            with_lora(target_modules=["c_attn"])

    def test_a_head_tied_to_the_embeddings_is_refused(self):
        """Merged, what the head learnt would change the embeddings as well."""
        with pytest.raises(UserError, match="names lm_head, whose weights are the embeddings too"):
            with_lora("GPT2", target_modules=["lm_head"])

    def test_a_head_of_its_own_takes_the_dense_path(self):
        model = with_lora(target_modules=["lm_head"])
        assert loading.check_head(model) == "LoRA layers are trained beside its head"

    def test_a_missing_peft_is_one_message(self, monkeypatch):
        monkeypatch.setattr(lora, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install peft"):
            with_lora()

    def test_gradients_flow_under_gradient_checkpointing(self):
        """With the older kind of checkpointing they would be None: no input of a block wants a gradient."""
        found = {}
        for checkpointing in (False, True):
            model = moved(with_lora()).train()
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            model(input_ids=IDS, labels=IDS).loss.backward()
            found[checkpointing] = {name: w.grad for name, w in lora.lora_weights(model).items()}
        for name, gradient in found[True].items():
            assert gradient.norm() > 0
            torch.testing.assert_close(gradient, found[False][name])


class TestMergeLora:
    @pytest.mark.parametrize("family", ["Llama", "GPT2"])
    def test_a_plain_model_of_the_same_logits_is_left(self, family):
        model = moved(with_lora(family))
        before = logits_of(model)
        assert (before - logits_of(tiny(family))).abs().max() > 0.1
        loading.merge_lora(model)
        assert not loading.has_lora(model)
        assert model.state_dict().keys() == tiny(family).state_dict().keys()
        torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-4)

    def test_half_precision_is_left_behind(self):
        """Added to weights in bfloat16, most of what was learnt would round away."""
        model = tiny("Llama").to(torch.bfloat16)
        base = model.model.layers[0].self_attn.q_proj.weight.float()
        loading.add_lora(model, LoraConfig(rank=4, alpha=8), seed=0)
        with torch.no_grad():
            for weight in lora.lora_weights(model).values():
                weight.fill_(1e-3)
        loading.merge_lora(model)
        weight = model.model.layers[0].self_attn.q_proj.weight
        assert weight.dtype == torch.float32
        # 2 · Σ over 4 ranks of 1e-3 · 1e-3
        torch.testing.assert_close(weight - base, torch.full_like(weight, 8e-6), rtol=0.05, atol=0)


class TestWriteLora:
    @PEFTS_OWN
    def test_is_read_back_bit_for_bit_and_by_peft(self, tmp_path):
        tiny("Llama").save_pretrained(tmp_path / "base")
        model = moved(with_lora())
        loading.write_lora(model, tmp_path / "lora")
        again = with_lora()
        loading.read_lora(again, tmp_path / "lora")
        assert torch.equal(logits_of(again), logits_of(model))
        theirs = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "lora"
        )
        torch.testing.assert_close(logits_of(theirs), logits_of(model))

    def test_of_another_rank_is_refused(self, tmp_path):
        loading.write_lora(with_lora(), tmp_path)
        with pytest.raises(UserError, match=r"of another rank .*student\.lora has to be as it was"):
            loading.read_lora(with_lora(rank=2), tmp_path)


class TestRun:
    @PEFTS_OWN
    def test_checkpoints_hold_lora_alone_and_the_finished_model_is_plain(self, tiny_pair, tmp_path, capsys):
        config = tiny_config(tiny_pair, LORA, "checkpoint.every_steps=1", objective=ALL_TERMS)
        result = run_distillation(config, tmp_path / "run")
        assert "trained: LoRA layers of rank 4, " in capsys.readouterr().err
        stage = tmp_path / "run" / "stages" / "distill"
        files = {file.name for file in (stage / "checkpoint-3").rglob("*")}
        assert "adapter_model.safetensors" in files
        assert "model.safetensors" not in files
        finished = AutoModelForCausalLM.from_pretrained(result.model)
        assert finished.dtype == torch.float32
        start = AutoModelForCausalLM.from_pretrained(tiny_pair["student"], dtype=torch.float32)
        assert finished.state_dict().keys() == start.state_dict().keys()
        assert torch.equal(finished.model.embed_tokens.weight, start.model.embed_tokens.weight)
        theirs = peft.PeftModel.from_pretrained(start, result.model / "lora")
        torch.testing.assert_close(logits_of(theirs), logits_of(finished), rtol=1e-4, atol=1e-4)
        again = AutoModelForCausalLM.from_pretrained(tiny_pair["student"], dtype=torch.float32)
        assert not torch.allclose(logits_of(finished), logits_of(again), atol=1e-3)

    def test_in_bfloat16_beside_checkpointing_it_learns(self, tiny_pair, tmp_path):
        half = ("student.lora={rank: 4, base_dtype: bfloat16}", "student.gradient_checkpointing=true", "optim.ema={}")
        config = tiny_config(tiny_pair, *half, objective=ONLY_KD, learning_rate=0.05, max_steps=8)
        result = run_distillation(config, tmp_path / "run")
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if row["kind"] == "train"]
        assert losses[-1] < 0.95 * losses[0]
        assert math.isfinite(result.evaluations["student"]["cross_entropy"])

    def test_the_next_stage_goes_on_with_the_same_layers(self, tiny_pair, tmp_path):
        """From the merged weights, the LoRA weights left at the end would fit no published model."""
        stages = "stages={one: {optim: {max_steps: 2}}, two: {optim: {learning_rate: 1e-12, max_steps: 1}}}"
        run_distillation(tiny_config(tiny_pair, LORA, stages, objective=ONLY_KD), tmp_path / "run")
        one, two = (
            load_file(tmp_path / "run" / "stages" / name / "model" / "lora" / "adapter_model.safetensors")
            for name in ("one", "two")
        )
        assert all((weight - two[name]).abs().max() < 1e-8 for name, weight in one.items())
        assert any(weight.abs().max() > 0 for name, weight in one.items() if "lora_B" in name)

    def test_resumed_is_uninterrupted(self, tiny_pair, tmp_path):
        config = tiny_config(tiny_pair, "student.lora={rank: 4, dropout: 0.1}", objective=ONLY_KD, max_steps=4)
        whole = run_distillation(config, tmp_path / "whole")
        stop = StopRequest()

        class AfterTwo(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    stop.ask("a test")

        with pytest.raises(Interrupted):
            run_distillation(config, tmp_path / "cut", stop=stop, callbacks=[AfterTwo()])
        resumed = run_distillation(config, tmp_path / "cut", resume=True)
        for name in ("model.safetensors", "lora/adapter_model.safetensors"):
            ours, theirs = load_file(resumed.model / name), load_file(whole.model / name)
            assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())

    def test_from_scratch_is_refused(self, tiny_pair):
        with pytest.raises(UserError, match="from_scratch makes them random"):
            tiny_config(tiny_pair, LORA, "student.from_scratch=true")

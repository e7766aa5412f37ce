"""Loading on tiny random models of many families, written and read back without network or GPU."""

import dataclasses
import json
import logging
import random
import re
import shutil
import socket

import pytest
import torch
import transformers
from huggingface_hub import constants
from model_families import FAMILIES, config_of, tiny
from safetensors.torch import load_file, save_file
from tiny import ALL_TERMS, tiny_config
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kdkit import loading, runtime
from kdkit.config import TeacherConfig
from kdkit.errors import UserError
from kdkit.loading import heads, models, offload, places, teachers
from kdkit.runtime import GIB, Card, Preflight
from kdkit.training.run import run_distillation


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny("Llama").save_pretrained(folder)
    return folder


@pytest.fixture
def writable_llama(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "llama")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_tokenizer(folder, **special):
    vocabulary = {"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}
    backend = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def load_float32(path, **options):
    return loading.load_model(path, dtype=torch.float32, device="cpu", **options)


class TestLoadTokenizer:
    def test_a_complete_one_comes_back_as_it_is(self, tmp_path, caplog):
        folder = write_tokenizer(tmp_path, eos_token="</s>", pad_token="<unk>")
        tokenizer = loading.load_tokenizer(folder)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)
        assert not caplog.records

    def test_without_padding_end_of_text_takes_its_place_and_it_is_said(self, tmp_path, caplog):
        tokenizer = loading.load_tokenizer(write_tokenizer(tmp_path, eos_token="</s>"))
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
        assert len(tokenizer) == 4
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "</s>" in caplog.text

    def test_without_end_of_text_it_is_refused_and_the_likely_token_named(self, tmp_path):
        with pytest.raises(UserError, match=r"no end-of-text token.*tokenizer_config\.json.*</s>"):
            loading.load_tokenizer(write_tokenizer(tmp_path, pad_token="<unk>"))

    def test_a_folder_with_only_a_config_is_refused(self, tmp_path):
        # Bug guarded against: transformers makes a GPT-2 tokenizer of one token there, and "hello" becomes [].
        config_of("GPT2").save_pretrained(tmp_path)
        with pytest.raises(UserError, match="vocabulary"):
            loading.load_tokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "~/no-such-folder"])
    def test_a_missing_folder_is_named(self, name):
        with pytest.raises(UserError, match=f"{name} does not exist"):
            loading.load_tokenizer(name)

    def test_an_empty_folder_is_named(self, tmp_path):
        with pytest.raises(UserError, match=str(tmp_path)):
            loading.load_tokenizer(tmp_path)

    def test_a_broken_file_is_one_message(self, tmp_path):
        folder = write_tokenizer(tmp_path, eos_token="</s>")
        (folder / "tokenizer.json").write_text("{broken")
        with pytest.raises(UserError, match="cannot load the tokenizer") as caught:
            loading.load_tokenizer(folder)
        assert "\n" not in str(caught.value)

    def test_a_hub_name_offline_says_what_to_do(self, offline):
        with pytest.raises(UserError, match=r"not reachable.*give a folder"):
            loading.load_tokenizer("nobody/no-such-model")

    def test_without_network_the_hub_is_not_asked_again_and_again(self, monkeypatch, caplog):
        def no_network(*_):
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        for name in runtime._PROXIES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(socket, "getaddrinfo", no_network)
        assert places.locate("openai/gpt2").local_files_only
        assert "not reachable" in caplog.text

    def test_a_revision_of_a_folder_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="revision"):
            loading.load_tokenizer(tmp_path, revision="main")


class TestLoadModel:
    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
    def test_a_half_precision_checkpoint_loads_as_float32_when_asked(self, tmp_path, stored):
        # Bug guarded against: transformers 5 keeps a bfloat16 checkpoint bfloat16 unless told otherwise.
        saved = tiny("Llama").to(stored)
        saved.save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == stored
        model = load_float32(tmp_path, trainable=True)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.config.dtype == torch.float32
        assert torch.equal(model.lm_head.weight, saved.lm_head.weight.float())

    def test_a_float32_checkpoint_loads_in_half_precision_when_asked(self, llama_folder):
        model = loading.load_model(llama_folder, dtype=torch.float16, device="cpu")
        assert {p.dtype for p in model.parameters()} == {torch.float16}

    def test_a_teacher_is_frozen_and_evaluates(self, llama_folder):
        model = load_float32(llama_folder)
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())

    def test_a_student_can_be_trained(self, llama_folder):
        model = load_float32(llama_folder, trainable=True)
        assert all(p.requires_grad for p in model.parameters())

    def test_a_student_in_half_precision_is_refused(self, llama_folder):
        with pytest.raises(UserError, match="float32"):
            loading.load_model(llama_folder, dtype=torch.float16, device="cpu", trainable=True)

    def test_the_attention_implementation_is_the_one_asked_for(self, llama_folder):
        model = load_float32(llama_folder, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"

    def test_an_attention_implementation_that_is_not_there_is_one_message(self, llama_folder):
        with pytest.raises(UserError, match="cannot load the model"):
            load_float32(llama_folder, attn_implementation="no_such_attention")

    def test_loading_disturbs_no_draw(self, llama_folder):
        states = torch.get_rng_state(), random.getstate()
        load_float32(llama_folder)
        load_float32(llama_folder, from_scratch=True, seed=5)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]

    def test_tied_weights_are_not_missing_weights(self, tmp_path):
        tiny("GPT2").save_pretrained(tmp_path)
        model = load_float32(tmp_path)
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_a_weight_that_is_not_in_the_file_is_refused_by_name(self, writable_llama):
        # Bug guarded against: transformers fills it with random numbers and only logs it.
        file = writable_llama / "model.safetensors"
        weights = load_file(file)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"random numbers") as caught:
            load_float32(writable_llama)
        assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)

    def test_a_config_of_another_width_is_refused(self, writable_llama):
        config_of("Llama", intermediate_size=48).save_pretrained(writable_llama)
        with pytest.raises(UserError, match="another shape"):
            load_float32(writable_llama)

    def test_weights_that_nothing_uses_are_pointed_out(self, writable_llama, caplog):
        config_of("Llama", num_hidden_layers=1).save_pretrained(writable_llama)
        with caplog.at_level(logging.WARNING, logger="kdkit"):
            load_float32(writable_llama)
        assert "model.layers.1." in caplog.text

    def test_a_truncated_file_is_one_message(self, writable_llama):
        file = writable_llama / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(UserError, match="cannot load the model") as caught:
            load_float32(writable_llama)
        assert "\n" not in str(caught.value)

    def test_a_folder_without_weights_is_one_message(self, tmp_path):
        config_of("Llama").save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load_float32(tmp_path)

    def test_a_missing_folder_is_named(self):
        with pytest.raises(UserError, match=r"\./nowhere does not exist"):
            load_float32("./nowhere")

    def test_a_hub_name_offline_says_what_to_do(self, offline):
        with pytest.raises(UserError, match="not reachable"):
            load_float32("nobody/no-such-model")

    def test_an_encoder_decoder_is_refused(self, tmp_path):
        transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"bart.*encoder and a decoder"):
            load_float32(tmp_path)

    def test_a_model_that_reads_images_is_refused(self, tmp_path):
        transformers.Gemma3Config().save_pretrained(tmp_path)
        with pytest.raises(UserError, match="images or sound"):
            load_float32(tmp_path)

    def test_a_model_without_next_token_is_refused(self, tmp_path):
        transformers.ViTConfig().save_pretrained(tmp_path)
        with pytest.raises(UserError, match="vit model, which predicts no next token"):
            load_float32(tmp_path)

    def test_an_encoder_that_sees_the_answer_is_refused(self, tmp_path):
        tiny("Bert").save_pretrained(tmp_path)
        with pytest.raises(UserError, match="see later ones"):
            load_float32(tmp_path)

    def test_code_that_comes_with_a_model_is_not_run_unasked(self, writable_llama):
        config = json.loads((writable_llama / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
        (writable_llama / "config.json").write_text(json.dumps(config))
        (writable_llama / "own.py").write_text("raise SystemExit('ran')")
        with pytest.raises(UserError, match="trust_remote_code"):
            load_float32(writable_llama)

    def test_too_little_memory_names_what_is_needed(self, llama_folder, monkeypatch):
        def out_of_memory(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch.nn.Module, "to", out_of_memory)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))
        with pytest.raises(UserError, match=r"needs 0\.00 GiB.*1\.00 GiB free.*nf4"):
            load_float32(llama_folder)


class TestLoadModelFromScratch:
    def test_is_a_function_of_the_seed_alone(self, llama_folder):
        torch.manual_seed(1)
        first = load_float32(llama_folder, from_scratch=True, seed=3, trainable=True)
        torch.manual_seed(2)
        again = load_float32(llama_folder, from_scratch=True, seed=3, trainable=True)
        other = load_float32(llama_folder, from_scratch=True, seed=4, trainable=True)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        assert not torch.equal(first.lm_head.weight, other.lm_head.weight)

    def test_takes_nothing_from_the_checkpoint(self, llama_folder):
        trained, fresh = load_float32(llama_folder), load_float32(llama_folder, from_scratch=True)
        assert not torch.equal(trained.lm_head.weight, fresh.lm_head.weight)
        assert fresh.lm_head.weight.std() < 0.1  # the family's own initialisation, 0.02; the checkpoint has 0.3

    @pytest.mark.parametrize("name", ["", "config.json"])
    def test_a_config_is_enough_as_folder_or_file(self, tmp_path, name):
        config_of("Llama", dtype="bfloat16").save_pretrained(tmp_path)
        model = load_float32(tmp_path / name, from_scratch=True, trainable=True)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(module.training for module in model.modules())


class TestQuantization:
    def test_a_student_is_refused(self, llama_folder):
        with pytest.raises(UserError, match="frozen teacher"):
            load_float32(llama_folder, quantization="nf4", trainable=True)

    def test_a_missing_library_is_named(self, llama_folder, monkeypatch):
        monkeypatch.setattr("kdkit.loading.models.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            load_float32(llama_folder, quantization="nf4")

    def test_int8_on_an_old_card_is_refused(self, llama_folder, monkeypatch):
        monkeypatch.setattr("kdkit.loading.models.find_spec", lambda name: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
        with pytest.raises(UserError, match=r"7\.5.*P100.*nf4"):
            loading.load_model(llama_folder, dtype=torch.float16, device="cuda", quantization="int8")

    def test_nf4_keeps_the_head_and_half_a_byte_per_weight(self, llama_folder, tmp_path):
        pytest.importorskip("bitsandbytes")
        plain = load_float32(llama_folder)
        model = load_float32(llama_folder, quantization="nf4")
        assert loading.check_head(model) is None
        assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
        assert loading.describe_model(model).num_parameters == loading.describe_model(plain).num_parameters
        assert model.model.layers[0].mlp.up_proj.weight.numel() == 32 * 64 // 2


@pytest.mark.parametrize("family", FAMILIES)
class TestHeadOfFamilies:
    def test_head_and_backbone_make_the_models_logits(self, family):
        model = tiny(family)
        ids = torch.arange(3, 15).view(2, 6)
        hidden = loading.backbone_hidden(model, ids, None)
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(loading.head_of(model).logits(hidden), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_proven_by_the_probe(self, family, dtype):
        assert loading.check_head(tiny(family).to(dtype)) is None

    def test_is_proven_at_random_initialisation_too(self, family):
        torch.manual_seed(0)
        assert loading.check_head(AutoModelForCausalLM.from_config(config_of(family))) is None


class TestHeadOf:
    def test_holds_live_parameters(self):
        model = tiny("Phi")
        head = loading.head_of(model)
        assert head.weight is model.lm_head.weight
        assert head.bias is model.lm_head.bias

    def test_gradient_reaches_head_and_backbone(self):
        model = tiny("Granite", tie_word_embeddings=False)
        hidden = loading.backbone_hidden(model, torch.tensor([[3, 4, 5]]), None)
        loading.head_of(model).logits(hidden).square().sum().backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0 for p in (model.lm_head.weight, model.model.norm.weight)
        )

    @pytest.mark.parametrize(
        ("family", "scale", "softcap"),
        [
            ("Llama", 1.0, None),
            ("Gemma2", 1.0, 5.0),
            ("Cohere", 0.25, None),
            ("Granite", 1 / 8, None),
            ("HyperCLOVAX", 3.0, None),
        ],
    )
    def test_factor_and_softcap_come_from_the_config(self, family, scale, softcap):
        head = loading.head_of(tiny(family))
        assert (head.scale, head.softcap) == (scale, softcap)

    def test_is_cut_to_the_ids_asked_for(self):
        model = tiny("Phi")
        hidden = loading.backbone_hidden(model, torch.tensor([[3, 4, 5]]), None)
        expected = model(input_ids=torch.tensor([[3, 4, 5]])).logits[..., :90]
        torch.testing.assert_close(loading.head_of(model, vocab_size=90).logits(hidden), expected)

    def test_a_wrapped_head_is_refused(self):
        model = tiny("Llama")
        model.lm_head = torch.nn.Sequential(model.lm_head)
        with pytest.raises(ValueError, match="Sequential"):
            loading.head_of(model)


class AddsNothingYet(torch.nn.Module):
    """Like a LoRA layer: the product of two matrices on top, one of which is zero before training."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias, self.linear = linear.weight, linear.bias, linear
        self.down, self.up = torch.nn.Linear(32, 2, bias=False), torch.nn.Linear(2, 96, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, hidden):
        return self.linear(hidden) + self.up(self.down(hidden))


class TestCheckHead:
    def test_an_opt_with_projected_output_passes_because_its_backbone_projects(self):
        assert loading.check_head(tiny("OPT", word_embed_proj_dim=16)) is None

    def test_an_extra_layer_before_the_head_is_found(self):
        config = config_of("Bert", is_decoder=True)
        assert "differ" in loading.check_head(AutoModelForCausalLM.from_config(config))

    def test_a_projection_outside_the_backbone_is_found(self):
        model = tiny("Llama")
        model.lm_head = torch.nn.Linear(16, 96)
        assert "the backbone gives 32" in loading.check_head(model)

    def test_a_wrapped_head_is_found_before_it_has_learnt_anything(self):
        # Bug guarded against: a LoRA head equals the plain one at first, and drifts from it with the first step.
        model = tiny("Llama")
        model.lm_head = AddsNothingYet(model.lm_head)
        assert "AddsNothingYet" in loading.check_head(model)

    @pytest.mark.parametrize("family", ["Cohere", "Granite"])
    def test_a_factor_that_the_table_lacks_is_found(self, family, monkeypatch):
        monkeypatch.setattr(heads, "HEAD_FACTORS", {})
        assert "differ" in loading.check_head(tiny(family))

    def test_a_softcap_that_the_table_lacks_is_found_even_where_logits_are_small(self, monkeypatch):
        # Bug guarded against: with logits near 0 a softcap of 30 changes less than rounding does.
        monkeypatch.setattr(heads, "SOFTCAPS", ())
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of("Gemma2", final_logit_softcapping=30.0))
        with torch.no_grad():
            assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.abs().max() < 1.0
        assert "differ" in loading.check_head(model)

    def test_a_final_norm_outside_the_backbone_is_found(self):
        class NormsAgain(transformers.LlamaForCausalLM):
            def forward(self, input_ids, attention_mask=None, use_cache=None):
                hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
                normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
                return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(normed))

        assert "differ" in loading.check_head(NormsAgain(config_of("Llama")))

    def test_leaves_mode_and_hooks_as_they_were(self):
        model = tiny("GPT2").train()
        model.transformer.h[0].eval()
        before = [module.training for module in model.modules()]
        assert loading.check_head(model) is None
        assert [module.training for module in model.modules()] == before
        assert not model.lm_head._forward_pre_hooks

    def test_dropout_does_not_disturb_the_proof(self):
        model = tiny("GPT2", resid_pdrop=0.5).train()
        assert loading.check_head(model) is None


class TestCheckCausal:
    @pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "OPT", "Qwen3Moe"])
    def test_causal_models_pass(self, family):
        loading.check_causal(tiny(family))

    def test_a_decoder_of_the_bert_family_passes(self):
        loading.check_causal(tiny("Bert", is_decoder=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_an_encoder_is_refused(self, dtype):
        with pytest.raises(UserError, match="see later ones"):
            loading.check_causal(tiny("Bert").to(dtype))


def batch_of(*lengths, length=6):
    mask = torch.tensor([[1] * n + [0] * (length - n) for n in lengths])
    return {"input_ids": torch.arange(3, 3 + mask.numel()).view_as(mask), "attention_mask": mask, "num_sequences": 2}


class TestCheckFiniteLogits:
    def test_finite_logits_pass(self):
        loading.check_finite_logits(tiny("Llama"), batch_of(4, 6))

    def test_overflow_in_float16_names_the_remedy(self):
        model = tiny("Llama")
        with torch.no_grad():
            model.lm_head.weight[7] = 6e4  # finite itself, as a number of float16
        loading.check_finite_logits(model, batch_of(4, 6))
        with pytest.raises(UserError, match=r"float16.*float32.*nf4"):
            loading.check_finite_logits(model.half(), batch_of(4, 6))

    def test_damaged_weights_are_told_apart(self):
        model = tiny("Llama")
        with torch.no_grad():
            model.lm_head.weight[7] = torch.nan
        with pytest.raises(UserError, match=r"damaged"):
            loading.check_finite_logits(model, batch_of(4, 6))

    def test_what_the_head_says_at_padding_does_not_matter(self):
        model = tiny("Llama")
        model.lm_head = InfiniteAfterFourTokens(model.lm_head)
        loading.check_finite_logits(model, batch_of(4, 3))
        with pytest.raises(UserError, match="float32"):
            loading.check_finite_logits(model, batch_of(4, 5))

    @pytest.mark.parametrize("dtype", ["auto", "float16"])
    def test_a_run_takes_float32_by_itself_where_it_was_asked_to_choose(
        self, tiny_pair, tmp_path, monkeypatch, capsys, dtype
    ):
        teacher = AutoModelForCausalLM.from_pretrained(tiny_pair["teacher"], dtype=torch.float32)
        with torch.no_grad():
            teacher.lm_head.weight[7] = 6e4
        folder = shutil.copytree(tiny_pair["teacher"], tmp_path / "teacher")
        teacher.save_pretrained(folder)
        chosen = {"auto": torch.float16, "float16": torch.float16, "float32": torch.float32}
        monkeypatch.setattr(teachers, "teacher_dtype", lambda settings, machine, *, device: chosen[settings.dtype])
        config = tiny_config(tiny_pair | {"teacher": str(folder)}, f"teacher.dtype={dtype}", max_steps=1)
        if dtype == "float16":
            with pytest.raises(UserError, match=r"not finite in float16.*float32"):
                run_distillation(config, tmp_path / "run")
            return
        run_distillation(config, tmp_path / "run")
        assert "logits overflow in float16, so that dtype auto takes float32" in capsys.readouterr().err


class InfiniteAfterFourTokens(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden):
        logits = self.linear(hidden)
        logits[:, 4:] = torch.inf
        return logits


class TestCheckTokenizerFits:
    def test_a_tokenizer_within_the_embeddings_passes(self, tmp_path):
        tokenizer = loading.load_tokenizer(write_tokenizer(tmp_path, eos_token="</s>"))
        loading.check_tokenizer_fits(tiny("Llama"), tokenizer)

    def test_an_added_token_without_embedding_is_named(self, tmp_path):
        tokenizer = loading.load_tokenizer(write_tokenizer(tmp_path, eos_token="</s>"))
        tokenizer.add_special_tokens({"pad_token": "<extra>"})
        with pytest.raises(UserError, match=r"up to 4 \('<extra>'\).*0 to 3"):
            loading.check_tokenizer_fits(tiny("Llama", vocab_size=4), tokenizer)


class TestSharedVocabSize:
    def test_equal_widths_need_no_cut(self):
        assert loading.shared_vocab_size(tiny("Llama"), tiny("GPT2"), 96) is None

    @pytest.mark.parametrize("kind", ["same", "padded"])
    def test_different_padding_is_cut_to_the_narrower_head(self, kind):
        wide, narrow = tiny("Qwen2", vocab_size=128), tiny("Qwen2", vocab_size=96)
        assert loading.shared_vocab_size(wide, narrow, 90, kind=kind) == 96
        assert loading.shared_vocab_size(narrow, wide, 90, kind=kind) == 96

    def test_different_tokenizers_are_refused_even_at_equal_width(self):
        with pytest.raises(UserError, match="different tokenizers"):
            loading.shared_vocab_size(tiny("Llama"), tiny("GPT2"), 96, kind="different")

    def test_a_head_narrower_than_the_tokenizer_is_refused_by_role(self):
        with pytest.raises(UserError, match="97 ids and the student's head knows 96"):
            loading.shared_vocab_size(tiny("Llama", vocab_size=128), tiny("GPT2"), 97)


class TestLoadTeacher:
    @staticmethod
    def machine(device="cpu", capability=None, num_devices=1):
        seen = {
            "num_devices": num_devices,
            "name": "",
            "arch_list": (),
            "total_memory_bytes": 0,
            "problem": "",
            "remedy": "",
        }
        return Preflight(device=device, capability=capability, ok=True, **seen)

    @pytest.mark.parametrize(
        ("machine", "dtype"),
        [(("cpu", None), torch.float32), (("cuda", (7, 5)), torch.float16), (("cuda", (8, 0)), torch.bfloat16)],
    )
    def test_auto_is_what_the_machine_computes_natively(self, llama_folder, machine, dtype):
        teacher = loading.load_teacher(TeacherConfig(path=str(llama_folder)), self.machine(*machine), device="cpu")
        assert teacher.dtype == dtype
        assert not any(parameter.requires_grad for parameter in teacher.parameters())

    def test_auto_on_the_cpu_beside_a_card_is_full_precision(self, llama_folder):
        settings = TeacherConfig(path=str(llama_folder), device="cpu")
        assert loading.load_teacher(settings, self.machine("cuda", (7, 5))).dtype == torch.float32

    def test_what_is_named_is_taken_and_the_device_is_a_default(self, monkeypatch):
        asked = []
        monkeypatch.setattr(teachers, "load_model", lambda path, **arguments: asked.append(arguments))
        named = TeacherConfig(path="p", dtype="bfloat16", device="cuda:1", quantization="nf4", revision="r")
        for settings in (named, TeacherConfig(path="p")):
            loading.load_teacher(settings, self.machine("cuda", (7, 5), num_devices=2), device="cuda:0")
        keys = ("dtype", "device", "quantization", "revision")
        assert [tuple(arguments[key] for key in keys) for arguments in asked] == [
            (torch.bfloat16, "cuda:1", "nf4", "r"),
            (torch.float16, "cuda:0", None, None),
        ]

    def test_a_card_that_is_not_there_is_refused(self):
        with pytest.raises(UserError, match=r"teacher.device is cuda:1, and this machine has 1 cards"):
            loading.load_teacher(TeacherConfig(path="p", device="cuda:1"), self.machine("cuda", (7, 5)))

    @pytest.mark.parametrize(
        ("asked", "student", "num_processes", "free_gib", "device"),
        [
            ("auto", "cuda:0", 1, (15, 15), "cuda:1"),
            ("auto", "cuda", 1, (15, 15), "cuda:1"),
            ("auto", "cuda:0", 2, (15, 15), "cuda:0"),  # each process has its own card
            ("auto", "cuda:0", 1, (15,), "cuda:0"),
            ("auto", "cuda:0", 1, (15, 3, 14, 14), "cuda:2"),
            ("auto", "cpu", 1, (15, 15), "cpu"),
            ("cuda:0", "cuda:0", 1, (15, 15), "cuda:0"),
            ("offload", "cuda:0", 1, (15, 15), "cuda:0"),
        ],
    )
    def test_auto_is_another_card_where_one_process_has_several(self, asked, student, num_processes, free_gib, device):
        cards = tuple(Card(i, "T4", (7, 5), 16 * GIB, free * GIB) for i, free in enumerate(free_gib))
        machine = dataclasses.replace(self.machine("cuda", (7, 5)), cards=cards)
        settings = TeacherConfig(path="p", device=asked)
        assert loading.teacher_device(settings, machine, student=student, num_processes=num_processes) == device

    def test_auto_dtype_is_that_of_the_teachers_own_card(self):
        cards = (Card(0, "T4", (7, 5), GIB, GIB), Card(1, "A10", (8, 6), GIB, GIB))
        machine = dataclasses.replace(self.machine("cuda", (7, 5)), cards=cards)
        settings = TeacherConfig(path="p")
        assert loading.teacher_dtype(settings, machine, device="cuda:1") == torch.bfloat16
        assert loading.teacher_dtype(settings, machine, device="cuda:0") == torch.float16

    def test_no_bar_is_drawn_and_those_of_others_stay(self, llama_folder, capfd, monkeypatch):
        monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
        loading.load_teacher(TeacherConfig(path=str(llama_folder)), self.machine())
        assert capfd.readouterr().err == ""
        assert transformers.utils.logging.is_progress_bar_enabled()


class TestOffloadLayers:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_layers_are_on_no_device_between_passes_and_logits_the_same(self, family):
        model, plain = tiny(family).requires_grad_(False), tiny(family)
        offload.offload_layers(model, torch.device("cpu"))
        ids = torch.tensor([[3, 4, 5, 6]])
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        held = [p for p in model.parameters() if p.device.type != "meta"]
        layers = (module for module in plain.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 2)
        inside = sum(p.numel() for p in next(layers).parameters())
        assert sum(p.numel() for p in held) == plain.num_parameters() - inside
        assert model.device.type == "cpu"
        assert loading.check_head(model) is None

    def test_is_what_a_teacher_gets_that_asks_for_it(self, llama_folder, monkeypatch):
        asked = []
        monkeypatch.setattr(teachers, "offload_layers", lambda model, device: asked.append((model.device, device)))
        settings = TeacherConfig(path=str(llama_folder), device="offload")
        teacher = loading.load_teacher(settings, TestLoadTeacher.machine("cuda", (7, 5)), device="cuda:0")
        assert asked == [(torch.device("cpu"), torch.device("cuda:0"))]
        assert teacher.dtype == torch.float16  # of the card on which it computes

    def test_a_model_without_named_layers_is_refused(self):
        model = tiny("Llama")
        model._no_split_modules = None
        with pytest.raises(UserError, match=r"cannot be offloaded .*teacher\.quantization=nf4"):
            offload.offload_layers(model, torch.device("cpu"))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("teacher.quantization=nf4", "packs them for one card: set quantization=null"),
            ("objective.routing.weight=1", r"set objective\.routing\.weight=0"),
        ],
    )
    def test_what_does_not_go_with_it_is_refused_by_name(self, tiny_pair, setting, message):
        with pytest.raises(UserError, match=message):
            tiny_config(tiny_pair, "teacher.device=offload", setting)

    def test_a_run_with_it_is_the_run_without(self, tiny_pair, tmp_path):
        rows = {}
        for device in ("offload", "auto"):
            config = tiny_config(tiny_pair, f"teacher.device={device}", "evaluation.teacher=true", objective=ALL_TERMS)
            result = run_distillation(config, tmp_path / device)
            log = [json.loads(line) for line in (tmp_path / device / "metrics.jsonl").read_text().splitlines()]
            rows[device] = [row["loss"] for row in log], result.evaluations["teacher"]["rouge_l"]
        assert rows["offload"] == rows["auto"]


class TestWhatStaysUnpacked:
    def test_experts_in_one_parameter_are_named_where_they_are_most(self, caplog):
        """transformers 5 keeps experts stacked, and bitsandbytes looks for linear layers: 4 bits were 15 for such."""
        model = tiny("Qwen3Moe", hidden_size=64, num_experts=16).half()
        pack_linear(model)
        models._say_what_stays_unpacked(model, "some/moe")
        assert re.search(r"some/moe: quantization packs .* leaves .*experts\.", caplog.text)

    def test_nothing_is_said_where_most_is_packed(self, caplog):
        model = tiny("Llama", hidden_size=64, vocab_size=8).half()
        pack_linear(model)
        models._say_what_stays_unpacked(model, "some/llama")
        assert not caplog.records


def pack_linear(model):
    """What 8 bits leave: the weights of linear layers, the head's apart, as int8."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight = torch.nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)


class TestDescribeModel:
    def test_counts_shared_weights_once(self):
        model = tiny("GPT2")  # embeddings and head are one matrix
        layer = 12 * 32 * 32 + 13 * 32  # attention 4 h², feed-forward 8 h², biases 9 h, two norms 4 h
        num_parameters = 96 * 32 + 64 * 32 + 2 * layer + 2 * 32
        found = loading.describe_model(model)
        assert found.architecture == "GPT2LMHeadModel"
        assert found.num_parameters == found.num_trainable_parameters == num_parameters
        assert (found.dtype, found.device) == ("float32", "cpu")
        assert found.size_bytes >= 4 * num_parameters

    def test_half_precision_takes_half_the_bytes_and_frozen_is_not_trainable(self, llama_folder):
        full = loading.describe_model(load_float32(llama_folder, trainable=True))
        half = loading.describe_model(loading.load_model(llama_folder, dtype=torch.bfloat16, device="cpu"))
        assert half.dtype == "bfloat16"
        assert half.num_trainable_parameters == 0
        assert half.size_bytes == pytest.approx(full.size_bytes / 2, rel=0.01)

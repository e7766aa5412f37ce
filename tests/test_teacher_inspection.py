"""A teacher before any run: its weights by dtype, its experts, where its tokenizer meets a student's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, Qwen2MoeConfig

from kdkit.config import demo_folder, load_config
from kdkit.errors import UserError
from kdkit.inspection import (
    compare_tokenizers,
    expert_shares,
    gated_sum_errors,
    nf4_obstacle,
    pair_tokenizers,
    precision_rows,
    read_config,
    read_spans,
    sample_batch,
    sample_rows,
    weight_rows,
    weights,
    word_experts,
)
from kdkit.inspection import experts as experts_module
from kdkit.inspection.weights import PARTS, nf4_bytes
from kdkit.loading import load_model
from kdkit.runtime import Preflight
from kdkit.teacher.experts import find_moe_blocks

CARD = Preflight("cuda", 1, "Tesla T4", (7, 5), ("sm_75",), 15 * 2**30, ok=True, problem="", remedy="")
ON_CPU = replace(CARD, device="cpu", capability=None)


@pytest.fixture(scope="module")
def config():
    return load_config({"preset": ["demo-moe", "fkl"]})


@pytest.fixture(scope="module")
def tokenizers(config):
    """Student's, teacher's."""
    return pair_tokenizers(config)


@pytest.fixture(scope="module")
def teacher(config):
    return load_model(config.teacher.path, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def batch(config, tokenizers):
    return sample_batch(config, tokenizers[1], num_rows=6)


class TestWeightRows:
    def test_nf4_of_the_embedded_teacher_is_what_bitsandbytes_made_of_it(self):
        """Its packed parameters and their scales, summed with bitsandbytes 0.50.2 and transformers 5.23: 3,369,504."""
        (row,) = [row for row in weight_rows(read_config(demo_folder() / "moe_teacher")) if row["dtype"] == "nf4"]
        assert sum(row[part] for part in PARTS) == 3_369_504

    def test_half_precision_is_what_the_file_holds(self):
        """Two bytes for each of the parameters that training.json counted."""
        rows = {row["dtype"]: row for row in weight_rows(read_config(demo_folder() / "moe_teacher"))}
        for dtype, size in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
            assert sum(rows[dtype][part] for part in PARTS) == size * 2_120_832
        assert rows["float16"]["experts"] == 2 * 4 * 8 * (2 * 112 * 128 + 128 * 112) == rows["nf4"]["experts"]
        assert rows["float16"]["embeddings"] == 2 * 1024 * 128

    def test_a_dense_model_has_no_experts_and_its_linear_layers_are_packed(self):
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        rows = weight_rows(
            LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
        )
        (nf4,) = [row for row in rows if row["dtype"] == "nf4"]
        in_a_layer = 4 * nf4_bytes(16 * 16) + 3 * nf4_bytes(16 * 32) + 2 * 16 * 2  # two norms in half precision
        assert nf4 == {"dtype": "nf4", "embeddings": 2 * 2 * 64 * 16, "experts": 0, "other": 2 * in_a_layer + 2 * 16}

    def test_layers_of_gpt2_are_packed_as_well(self):
        rows = {row["dtype"]: row for row in weight_rows(GPT2Config(n_embd=16, n_layer=1, n_head=2))}
        assert rows["nf4"]["other"] < rows["float16"]["other"]

    def test_no_weight_is_made(self):
        billions = Qwen2MoeConfig(hidden_size=8192, num_hidden_layers=2, num_experts=64, moe_intermediate_size=8192)
        assert weight_rows(billions)[0]["experts"] == 4 * 2 * 64 * 3 * 8192 * 8192

    @pytest.mark.parametrize(("count", "size"), [(64, 32 + 4), (65, 33 + 8), (1, 1 + 4)])
    def test_a_block_has_half_a_byte_a_weight_and_one_scale(self, count, size):
        assert nf4_bytes(count) == size

    def test_a_folder_without_a_config_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="cannot load the config"):
            read_config(tmp_path)


class TestNf4Obstacle:
    def test_a_card_with_bitsandbytes_can(self, monkeypatch):
        monkeypatch.setattr(weights, "find_spec", lambda name: object())
        assert nf4_obstacle(CARD) is None
        assert "6.0" in (nf4_obstacle(replace(CARD, capability=(5, 2))) or "")

    def test_else_it_says_what_is_missing(self, monkeypatch):
        monkeypatch.setattr(weights, "find_spec", lambda name: None)
        assert "pip install bitsandbytes" in (nf4_obstacle(CARD) or "")
        assert "no GPU" in (nf4_obstacle(ON_CPU) or "")


class TestPrecisionRows:
    def test_errors_are_those_of_a_loop_over_rows(self, config, batch, teacher):
        exact, half = precision_rows(config.teacher.path, batch, ON_CPU, dtypes=("float32", "bfloat16"))
        assert (exact["largest_error"], exact["mean_kl"], exact["same_top_fraction"]) == (0, 0, 1)
        rough = load_model(config.teacher.path, dtype=torch.bfloat16, device="cpu")
        logits = []
        for model in (teacher, rough):
            with torch.no_grad():
                seen = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logits.append(seen[:, :-1][batch["labels"][:, 1:] != -100].double())
        p, q = (values.log_softmax(-1) for values in logits)
        assert half["mean_kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=0.5)
        assert half["largest_error"] == pytest.approx((logits[0] - logits[1]).abs().max().item(), rel=0.5)
        assert half["gib"] * 2**30 == pytest.approx(2 * 2_120_832, rel=0.01)

    def test_an_overflow_is_a_finding_with_its_remedy(self, config, batch, tmp_path):
        folder = tmp_path / "loud"
        loud = load_model(config.teacher.path, dtype=torch.float32, device="cpu")
        loud.model.norm.weight.mul_(1e4)
        loud.save_pretrained(folder)
        exact, half = precision_rows(folder, batch, ON_CPU, dtypes=("float32", "float16"))
        assert exact["finite"]
        assert not half["finite"]
        assert "Load it in float32" in half["problem"]

    def test_float32_has_to_be_first(self, config, batch):
        with pytest.raises(UserError, match="float32 has to be the first"):
            precision_rows(config.teacher.path, batch, ON_CPU, dtypes=("float16",))


class TestExpertShares:
    def test_are_those_recorded_when_the_teacher_was_trained(self, config, tokenizers, teacher):
        shares = expert_shares(teacher, sample_batch(config, tokenizers[1], num_rows=400))
        record = json.loads((demo_folder() / "moe_teacher" / "training.json").read_text(encoding="utf-8"))
        recorded = np.array(list(record["expert shares on validation rows"].values()))
        assert list(shares) == [0, 1, 2, 3]
        np.testing.assert_allclose(np.stack(list(shares.values())), recorded, atol=0.002)

    def test_batches_change_nothing(self, batch, teacher, monkeypatch):
        whole = expert_shares(teacher, batch)
        monkeypatch.setattr(experts_module, "_ROWS_AT_A_TIME", 4)
        for layer, shares in expert_shares(teacher, batch).items():
            np.testing.assert_allclose(shares, whole[layer], atol=1e-6)


class TestWordExperts:
    def test_a_word_is_the_mean_of_its_tokens_gates(self, tokenizers, teacher):
        text = "The gardener feeds  Ada."
        found = word_experts(teacher, tokenizers[1], text, layers=[2])
        assert found.words == ["The", "gardener", "feeds", "Ada."]
        encoded = tokenizers[1](text, return_offsets_mapping=True)
        routed = []
        handle = teacher.model.layers[2].mlp.gate.register_forward_hook(lambda _, __, out: routed.append(out))
        with torch.no_grad():
            teacher(input_ids=torch.tensor([encoded["input_ids"]]))
        handle.remove()
        ((_, gates, ids),) = routed
        expected = np.zeros((4, 8))
        for token, (start, end) in enumerate(encoded["offset_mapping"]):
            if text[start:end].isspace():  # is in no word
                continue
            for gate, expert in zip(gates[token], ids[token], strict=True):
                expected[len(text[:end].split()) - 1, expert] += gate.item()
        np.testing.assert_allclose(found.gates[0], expected / expected.sum(1, keepdims=True), atol=1e-5)

    def test_a_text_without_words_is_refused(self, tokenizers, teacher):
        with pytest.raises(UserError, match="has no words"):
            word_experts(teacher, tokenizers[1], " \n")


class TestGatedSumErrors:
    def test_real_outputs_add_up_and_others_do_not(self, batch, teacher, monkeypatch):
        assert max(gated_sum_errors(teacher, batch).values()) < 1e-5
        real = experts_module.expert_outputs
        monkeypatch.setattr(
            experts_module,
            "expert_outputs",
            lambda block, hidden: replace(made := real(block, hidden), outputs=made.outputs.flip(1)),
        )
        assert min(gated_sum_errors(teacher, batch).values()) > 0.01

    def test_a_dense_teacher_is_refused(self, batch):
        dense = load_model(demo_folder() / "teacher", dtype=torch.float32, device="cpu")
        with pytest.raises(UserError, match="needs an MoE teacher"):
            gated_sum_errors(dense, batch)
        with pytest.raises(UserError, match="needs an MoE teacher"):
            find_moe_blocks(dense)


class TestSpans:
    TEXT = "Ada’s café is by the river, 🙂 she said."

    def test_are_the_text_byte_for_byte_on_both_sides(self, tokenizers):
        spans = read_spans(self.TEXT, *tokenizers)
        written = self.TEXT.encode()
        assert [span.start_byte for span in spans] == [0, *(span.end_byte for span in spans[:-1])]
        assert spans[-1].end_byte == len(written)
        for side, tokenizer in zip(("student_tokens", "teacher_tokens"), tokenizers, strict=True):
            assert sum(len(getattr(span, side)) for span in spans) == len(tokenizer(self.TEXT)["input_ids"])

    def test_twins_are_one_token_of_the_same_text(self, tokenizers):
        spans = read_spans("the boat is by the river.", *tokenizers)
        twins = [span for span in spans if span.is_twin]
        assert twins
        assert all(span.student_tokens == span.teacher_tokens and len(span.student_tokens) == 1 for span in twins)
        assert any(not span.is_twin for span in spans)

    def test_with_one_tokenizer_every_token_is_a_span_and_a_twin(self, tokenizers):
        pair = compare_tokenizers(tokenizers[1], tokenizers[1], ["hello there", "a boat"])
        assert (pair.relation.kind, pair.twin_span_fraction) == ("same", 1.0)
        assert pair.num_spans == sum(len(tokenizers[1](text)["input_ids"]) for text in ("hello there", "a boat"))

    def test_the_embedded_pair_is_what_its_readme_and_its_runs_say(self, config, tokenizers):
        """22 and 30 tokens of an answer with its end, 509 ids in common, the end of text among them."""
        texts = [row["references"][0] for row in sample_rows(config, tokenizers[1], num_rows=400).dataset]
        pair = compare_tokenizers(*tokenizers, texts)
        assert pair.relation.kind == "different"
        assert round(pair.twin_fraction * 768) == 509
        assert pair.num_spans * pair.teacher_tokens_per_span / 400 == pytest.approx(21, abs=1)
        assert pair.num_spans * pair.student_tokens_per_span / 400 == pytest.approx(29, abs=1)

    def test_nothing_to_compare_is_refused(self, tokenizers):
        with pytest.raises(UserError, match="no text to compare"):
            compare_tokenizers(*tokenizers, [])
        with pytest.raises(UserError, match="no token for the text"):
            read_spans("", *tokenizers)


class TestPairTokenizers:
    def test_a_student_from_scratch_takes_the_teachers(self):
        student, teacher = pair_tokenizers(load_config({"preset": ["demo", "fkl"]}))
        assert student is teacher

    def test_a_student_with_its_own_keeps_it(self, tokenizers):
        expected = AutoTokenizer.from_pretrained(demo_folder() / "deep_student")
        assert tokenizers[0].get_vocab() == expected.get_vocab()
        assert tokenizers[1].get_vocab() != expected.get_vocab()

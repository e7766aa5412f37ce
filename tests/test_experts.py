"""Each expert's own output against the blocks' forward passes and a loop over tokens."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from dense import LargestTensor
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kdkit.errors import UserError
from kdkit.teacher.experts import BLOCKS, capture_block_inputs, expert_outputs, find_moe_blocks, unit_experts

H, E, TOP_K = 16, 6, 2
SHAPE = {
    "vocab_size": 50,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# widths are multiples of 8: torch's grouped product takes no others in half precision
QWEN = {**SHAPE, "num_experts": E, "moe_intermediate_size": 16}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=E)),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=24)),
    "qwen2-moe, normed": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=24, norm_topk_prob=True)
    ),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN, norm_topk_prob=False)),
    "qwen3-moe, normed": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN, norm_topk_prob=True)),
}
EVERY_FAMILY = pytest.mark.parametrize("family", list(MODELS))


def make_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[family]().to(dtype).eval()


def make_block(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return find_moe_blocks(make_model(family, dtype))[1]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def own_output(block: nn.Module, hidden: Tensor) -> Tensor:
    """(N, H), the block's forward pass."""
    with torch.no_grad():
        return block(hidden[None])[0]


def naive_expert(block: nn.Module, expert: int, vector: Tensor) -> Tensor:
    """One expert on one token, by its slices."""
    gate_up = block.experts.gate_up_proj[expert] @ vector
    half = len(gate_up) // 2
    return block.experts.down_proj[expert] @ (F.silu(gate_up[:half]) * gate_up[half:])


class TestFindMoeBlocks:
    @EVERY_FAMILY
    def test_finds_the_block_of_every_layer(self, family: str) -> None:
        model = make_model(family)
        blocks = find_moe_blocks(model)
        assert list(blocks) == [0, 1]
        assert blocks[1] is model.model.layers[1].mlp

    def test_layers_with_a_dense_mlp_are_left_out(self) -> None:
        config = Qwen2MoeConfig(**{**QWEN, "num_hidden_layers": 4}, decoder_sparse_step=2)
        assert list(find_moe_blocks(Qwen2MoeForCausalLM(config))) == [1, 3]

    def test_every_known_class_is_tried_here(self) -> None:
        assert {type(make_block(family)) for family in MODELS} == set(BLOCKS)

    @pytest.mark.parametrize(
        ("model", "kind"),
        [
            (lambda: LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SHAPE.items() if "experts" not in k})), "llama"),
            (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)), "gpt2"),
        ],
    )
    def test_a_dense_model_is_refused_by_its_type_and_with_what_to_do(self, model, kind: str) -> None:
        with pytest.raises(UserError, match=rf"needs an MoE teacher.*Qwen3Moe.*'{kind}'.*choose an MoE teacher"):
            find_moe_blocks(model())


class TestCaptureBlockInputs:
    @EVERY_FAMILY
    def test_what_is_caught_gives_the_blocks_output_in_place(self, family: str) -> None:
        model, outputs = make_model(family), []
        blocks = find_moe_blocks(model)
        handle = blocks[1].register_forward_hook(lambda _, __, output: outputs.append(output))
        with torch.no_grad(), capture_block_inputs(model, [1]) as inputs:
            model.base_model(input_ids=torch.tensor([[3, 1, 4], [1, 5, 9]]), use_cache=False)
            assert list(inputs) == [1]
            assert inputs[1].shape == (2, 3, H)
            torch.testing.assert_close(own_output(blocks[1], inputs[1].flatten(0, 1)), outputs[0].flatten(0, 1))
        handle.remove()

    def test_nothing_is_kept_alive_and_no_hook_stays(self) -> None:
        model, ids = make_model("mixtral"), torch.tensor([[3, 1, 4]])
        with capture_block_inputs(model, [0, 1]) as inputs:
            model.base_model(input_ids=ids, use_cache=False)
            assert not inputs[0].requires_grad
            caught = weakref.ref(inputs[0])
        gc.collect()
        assert inputs == {}
        assert caught() is None
        model.base_model(input_ids=ids, use_cache=False)
        assert inputs == {}
        assert all(not block._forward_pre_hooks for block in find_moe_blocks(model).values())

    def test_hooks_go_when_the_pass_fails(self) -> None:
        model = make_model("mixtral")
        with pytest.raises(IndexError), capture_block_inputs(model, [0]):
            model.base_model(input_ids=torch.tensor([[999]]), use_cache=False)
        assert not find_moe_blocks(model)[0]._forward_pre_hooks

    def test_refuses_a_layer_without_experts_and_leaves_no_hook(self) -> None:
        model = make_model("mixtral")
        with pytest.raises(UserError, match=r"layer 7 .* 0, 1"), capture_block_inputs(model, [0, 7]):
            pass
        assert not find_moe_blocks(model)[0]._forward_pre_hooks


class TestExpertOutputs:
    @EVERY_FAMILY
    @pytest.mark.parametrize("num_experts", [None, 4, E])
    def test_gated_sum_is_the_blocks_own_output(self, family: str, num_experts: int | None) -> None:
        block, hidden = make_block(family), draw(40, H)
        found = expert_outputs(block, hidden, num_experts=num_experts)
        total = (found.gates[..., None] * found.outputs).sum(1)
        total = total if found.shared is None else total + found.shared
        expected = own_output(block, hidden)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)

    @EVERY_FAMILY
    @pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
    def test_gated_sum_holds_in_half_precision_within_rounding(
        self, family: str, dtype: torch.dtype, rounding: float
    ) -> None:
        block, hidden = make_block(family, dtype), draw(40, H, dtype=dtype)
        found = expert_outputs(block, hidden)
        assert found.outputs.dtype == dtype
        assert found.router_probs.dtype == torch.float32
        total = (found.gates[..., None].float() * found.outputs.float()).sum(1)
        total = total if found.shared is None else total + found.shared.float()
        expected = own_output(block, hidden).float()
        assert (total - expected).abs().max() <= rounding * expected.abs().max()

    @EVERY_FAMILY
    def test_equals_a_loop_over_tokens_and_experts(self, family: str) -> None:
        # Experts that are copies of one tensor satisfy every shape; these are compared with the slices one by one.
        block, hidden = make_block(family), draw(7, H)
        found = expert_outputs(block, hidden, num_experts=4)
        for n in range(7):
            probs = torch.softmax(block.gate.weight @ hidden[n], 0)
            torch.testing.assert_close(found.router_probs[n], probs)
            order = sorted(range(E), key=lambda e: -probs[e].item())[:4]
            assert found.ids[n].tolist() == order
            for j, expert in enumerate(order):
                torch.testing.assert_close(found.outputs[n, j], naive_expert(block, expert, hidden[n]))

    @EVERY_FAMILY
    def test_gates_are_the_blocks_own_and_zero_beyond_its_top_k(self, family: str) -> None:
        block, hidden = make_block(family), draw(9, H)
        found = expert_outputs(block, hidden, num_experts=5)
        _, gates, ids = block.gate(hidden)
        assert torch.equal(found.gates[:, :TOP_K], gates)
        assert torch.equal(found.ids[:, :TOP_K], ids)
        assert (found.gates[:, TOP_K:] == 0).all()
        own = found.router_probs.gather(1, ids)
        normed = "normed" in family or family == "mixtral"
        torch.testing.assert_close(gates, own / own.sum(1, keepdim=True) if normed else own)

    def test_fewer_experts_than_the_block_uses(self) -> None:
        block, hidden = make_block("mixtral"), draw(9, H)
        one, two = (expert_outputs(block, hidden, num_experts=k) for k in (1, 2))
        for name in ("ids", "gates", "outputs"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name)[:, :1])

    def test_a_router_without_preference_still_gives_different_experts_and_the_same_sum(self) -> None:
        block, hidden = make_block("qwen3-moe"), draw(9, H)
        nn.init.zeros_(block.gate.weight)
        found = expert_outputs(block, hidden, num_experts=E)
        assert all(sorted(row) == list(range(E)) for row in found.ids.tolist())
        total = (found.gates[..., None] * found.outputs).sum(1)
        torch.testing.assert_close(total, own_output(block, hidden), rtol=1e-5, atol=1e-5)

    def test_only_qwen2_has_a_shared_expert(self) -> None:
        assert {family for family in MODELS if expert_outputs(make_block(family), draw(2, H)).shared is not None} == {
            "qwen2-moe",
            "qwen2-moe, normed",
        }

    def test_no_tensor_of_tokens_by_all_experts_by_width(self) -> None:
        block, hidden = make_block("mixtral"), draw(64, H)
        with LargestTensor() as seen:
            expert_outputs(block, hidden, num_experts=2)
        assert seen.num_entries < 64 * E * H
        assert "one_hot" not in seen.calls

    def test_is_without_gradient_and_takes_no_tokens(self) -> None:
        block = make_block("qwen2-moe")
        assert not expert_outputs(block, draw(3, H).requires_grad_()).outputs.requires_grad
        assert expert_outputs(block, draw(0, H)).outputs.shape == (0, TOP_K, H)

    @pytest.mark.parametrize("k", [0, E + 1])
    def test_refuses_more_experts_than_there_are(self, k: int) -> None:
        with pytest.raises(ValueError, match=f"1 to {E}"):
            expert_outputs(make_block("mixtral"), draw(2, H), num_experts=k)


class TestUnitExperts:
    UNIT_IDS = torch.tensor([[-1, 0, 0, 1, -1], [0, 1, 1, 1, 2]])

    @EVERY_FAMILY
    def test_equals_a_loop_over_units(self, family: str) -> None:
        block, hidden = make_block(family), draw(2, 5, H)
        found = unit_experts(block, hidden, self.UNIT_IDS, max_units=3, num_experts=3)
        assert found.num_experts == E
        for b in range(2):
            for u in range(3):
                tokens = [hidden[b, t] for t in range(5) if self.UNIT_IDS[b, t] == u]
                if not tokens:
                    assert (found.probs[b, u] == 0).all()
                    assert (found.outputs[b, u] == 0).all()
                    continue
                probs = sum(torch.softmax(block.gate.weight @ x, 0) for x in tokens) / len(tokens)
                order = sorted(range(E), key=lambda e, probs=probs: -probs[e].item())[:3]
                assert found.ids[b, u].tolist() == order
                torch.testing.assert_close(found.probs[b, u], probs[order])
                for j, expert in enumerate(order):
                    mean = sum(naive_expert(block, expert, x) for x in tokens) / len(tokens)
                    torch.testing.assert_close(found.outputs[b, u, j], mean)

    def test_a_unit_of_one_token_is_that_token(self) -> None:
        block, hidden = make_block("mixtral"), draw(1, 4, H)
        found = unit_experts(block, hidden, torch.arange(4)[None], max_units=4, num_experts=3)
        single = expert_outputs(block, hidden[0], num_experts=3)
        assert torch.equal(found.ids[0], single.ids)
        torch.testing.assert_close(found.outputs[0], single.outputs)

    def test_tokens_outside_are_never_read_and_padding_changes_nothing(self) -> None:
        block, hidden = make_block("qwen2-moe"), draw(2, 5, H)
        hidden[self.UNIT_IDS < 0] = torch.nan
        found = unit_experts(block, hidden, self.UNIT_IDS, max_units=3, num_experts=2)
        assert found.outputs.isfinite().all()
        alone = unit_experts(block, hidden[:1, 1:4], self.UNIT_IDS[:1, 1:4], max_units=2, num_experts=2)
        assert torch.equal(found.ids[0, :2], alone.ids[0])
        torch.testing.assert_close(found.outputs[0, :2], alone.outputs[0])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_averaged_in_float32(self, dtype: torch.dtype) -> None:
        block, hidden = make_block("mixtral", dtype), draw(1, 1, H, dtype=dtype).expand(1, 4096, H)
        found = unit_experts(block, hidden, torch.zeros(1, 4096, dtype=torch.int64), max_units=1, num_experts=2)
        single = expert_outputs(block, hidden[0, :1], num_experts=2)
        assert found.outputs.dtype == found.probs.dtype == torch.float32
        torch.testing.assert_close(found.outputs[0], single.outputs.float(), rtol=1e-3, atol=1e-3)

    def test_a_batch_without_units(self) -> None:
        found = unit_experts(make_block("mixtral"), draw(2, 3, H), torch.full((2, 3), -1), max_units=0, num_experts=2)
        assert found.outputs.shape == (2, 0, 2, H)

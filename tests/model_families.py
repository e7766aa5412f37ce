"""Tiny random models of many families."""

import torch
import transformers
from transformers import AutoModelForCausalLM

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Llama": GROUPED,
    "GPT2": GPT2,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Mistral": GROUPED,
    "Phi": GROUPED,  # a head with bias
    "GPTNeoX": SMALL,
    "OPT": {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Gemma2": GROUPED | {"head_dim": 8, "final_logit_softcapping": 5.0},
    "Cohere": GROUPED | {"logit_scale": 0.25},
    "Granite": GROUPED | {"logits_scaling": 8.0},
    "HyperCLOVAX": GROUPED | {"logits_scaling": 3.0},
    "Mixtral": GROUPED | {"num_local_experts": 4},
    "Qwen2Moe": GROUPED
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": GROUPED | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def config_of(family, **changes):
    return getattr(transformers, f"{family}Config")(**(FAMILIES.get(family, SMALL) | changes))


def tiny(family, **changes):
    """A model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model

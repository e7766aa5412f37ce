"""Pairs of models by the shapes of their published config.json, for counting and estimating; no weights."""

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3MoeConfig

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def gpt2(**sizes: int) -> GPT2Config:
    return GPT2Config(vocab_size=50_257, n_positions=1024, **sizes)


def qwen(*, intermediate: int, layers: int, hidden: int, heads: int, kv: int, width: int, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=width,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=32_768,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
    )


def llama(**sizes: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256,
        intermediate_size=8192,
        num_key_value_heads=8,
        head_dim=128 if sizes["hidden_size"] == 3072 else 64,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        rope_parameters=LLAMA_3_ROPE,
        **sizes,
    )


SMOLLM_135M = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
HUIHUI_MOE_1B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}
QWEN_05B = {"intermediate": 4864, "layers": 24, "hidden": 896, "heads": 14, "kv": 2, "width": 151_936, "tied": True}
QWEN_15B = {"intermediate": 8960, "layers": 28, "hidden": 1536, "heads": 12, "kv": 2, "width": 151_936, "tied": True}
QWEN_7B = {"intermediate": 18_944, "layers": 28, "hidden": 3584, "heads": 28, "kv": 4, "width": 152_064, "tied": False}

NUM_PARAMETERS = {
    "gpt2-xl": 1_557_611_200,
    "gpt2": 124_439_808,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-0.5b": 494_032_768,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.2-1b": 1_235_814_400,
    "smollm-135m": 134_515_008,
}
"""As their model cards or checkpoints say."""


def config_of(name: str) -> PreTrainedConfig:
    """A new config of a published model."""
    makers = {
        "gpt2-xl": lambda: gpt2(n_embd=1600, n_layer=48, n_head=25),
        "gpt2": lambda: gpt2(n_embd=768, n_layer=12, n_head=12),
        "qwen2.5-7b": lambda: qwen(**QWEN_7B),
        "qwen2.5-1.5b": lambda: qwen(**QWEN_15B),
        "qwen2.5-0.5b": lambda: qwen(**QWEN_05B),
        "llama-3.2-3b": lambda: llama(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24),
        "llama-3.2-1b": lambda: llama(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32),
        "smollm-135m": lambda: LlamaConfig(**SMOLLM_135M),
        "huihui-moe-1b": lambda: Qwen3MoeConfig(**HUIHUI_MOE_1B),
    }
    return makers[name]()


PAIRS = {
    "GPT-2 XL -> GPT-2": ("gpt2-xl", "gpt2", {}),
    "Qwen2.5-1.5B -> 0.5B": ("qwen2.5-1.5b", "qwen2.5-0.5b", {}),
    "Qwen2.5-7B NF4 -> 0.5B": ("qwen2.5-7b", "qwen2.5-0.5b", {"quantization": "nf4"}),
    "Huihui-MoE-1B -> SmolLM-135M": ("huihui-moe-1b", "smollm-135m", {}),
    "Llama-3.2-3B -> 1B": ("llama-3.2-3b", "llama-3.2-1b", {}),
}
"""Teacher, student and what the teacher is told besides."""
SETTINGS = {
    "4 x 512": {"batch": (4, 512), "gradient_checkpointing": False},
    "8 x 256, checkpointing": {"batch": (8, 256), "gradient_checkpointing": True},
}
"""Rows, tokens, and whether activations are recomputed."""

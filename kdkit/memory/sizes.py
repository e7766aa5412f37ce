"""The sizes of a model from its config.json alone: parameters by part, layers, heads, vocabulary.

Read without torch and transformers, whose import takes longer than the answer. A family whose keys are not known here
is read through transformers, which knows all of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kdkit.attached import find_model
from kdkit.errors import UserError
from kdkit.runtime import hub_answers

Json = Mapping[str, object]


@dataclass(frozen=True)
class ModelSizes:
    """What the memory of a decoder depends on. Widths are in numbers per token."""

    family: str
    """`model_type` of its config."""
    vocab_size: int
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    """Width within the feed-forward block; of one expert in an MoE."""
    is_gated: bool = True
    """Whether the feed-forward block has a gate beside its two products."""
    is_tied: bool = False
    """Whether head and embeddings are one matrix."""
    num_positions: int = 0
    """Learnt position embeddings; 0 where positions are rotations."""
    num_biases: int = 0
    """Biases of one layer's products."""
    num_norms: int = 0
    """Parameters of one layer's norms."""
    num_final_norms: int = 0
    """Parameters of the norms outside the layers."""
    num_experts: int = 0
    """Experts of a layer; 0 in a dense model."""
    experts_per_token: int = 0
    shared_intermediate: int = 0
    """Width of an expert that every token passes; 0: none."""
    dropout: float = 0.0
    """Rate while training, on the residual stream."""
    num_others: int = 0
    """Parameters that the other fields do not tell of, or fewer where negative; counted on the model itself."""

    @property
    def query_width(self) -> int:
        """All heads' queries side by side."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """All heads' keys side by side."""
        return self.num_kv_heads * self.head_dim

    @property
    def is_grouped(self) -> bool:
        """Whether several heads share keys and values."""
        return self.num_kv_heads < self.num_heads

    @property
    def attention_params(self) -> int:
        """Of the products of one layer's attention."""
        return self.hidden * (2 * self.query_width + 2 * self.kv_width)

    @property
    def expert_params(self) -> int:
        """Of one feed-forward block, or of one expert."""
        return (3 if self.is_gated else 2) * self.hidden * self.intermediate

    @property
    def feed_forward_params(self) -> int:
        """Of the products of one layer outside attention, router included."""
        if not self.num_experts:
            return self.expert_params
        shared = 3 * self.hidden * self.shared_intermediate + (self.hidden if self.shared_intermediate else 0)
        return self.num_experts * (self.expert_params + self.hidden) + shared

    @property
    def product_params(self) -> int:
        """Of all matrix products in the layers: what autocast copies and quantization packs."""
        return self.num_layers * (self.attention_params + self.feed_forward_params)

    @property
    def stacked_params(self) -> int:
        """Of experts that transformers keeps as one stacked parameter, which bitsandbytes leaves as it is."""
        return self.num_layers * self.num_experts * self.expert_params

    @property
    def embedding_params(self) -> int:
        """Of the input embeddings, positions included."""
        return (self.vocab_size + self.num_positions) * self.hidden

    @property
    def head_params(self) -> int:
        """Of the head, 0 where it is the embeddings' matrix."""
        return 0 if self.is_tied else self.vocab_size * self.hidden

    @property
    def num_params(self) -> int:
        """All of them."""
        small = self.num_layers * (self.num_biases + self.num_norms) + self.num_final_norms
        return self.embedding_params + self.product_params + small + self.head_params + self.num_others

    @property
    def active_params(self) -> int:
        """Those that one token is multiplied with, head included."""
        idle = 0
        if self.num_experts:
            idle = self.num_layers * (self.num_experts - self.experts_per_token) * self.expert_params
        return self.product_params - idle + self.vocab_size * self.hidden


def lora_params(sizes: ModelSizes, *, rank: int, target_modules: str | list[str]) -> int:
    """Parameters of LoRA layers: two factors for each product that gets one; stacked experts get none.

    Args:
        sizes: the student.
        rank: width of the factors.
        target_modules: "all-linear", or the names of layers as Llama and its kin have them; a name that is not
            among these counts as a product from the hidden width to itself.
    """
    hidden, inner = sizes.hidden, sizes.intermediate
    products = {
        "q_proj": hidden + sizes.query_width,
        "k_proj": hidden + sizes.kv_width,
        "v_proj": hidden + sizes.kv_width,
        "o_proj": sizes.query_width + hidden,
    }
    if not sizes.num_experts:
        products |= {"up_proj": hidden + inner, "down_proj": inner + hidden}
        products |= {"gate_proj": hidden + inner} if sizes.is_gated else {}
    if isinstance(target_modules, str):
        widths = sum(products.values())
    else:
        widths = sum(products.get(name, 2 * hidden) for name in target_modules)
    return sizes.num_layers * rank * widths


def read_sizes(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSizes:
    """The sizes of a model in a folder, attached to the notebook, or on the hub; of its weights nothing is read.

    Args:
        path: folder with a config.json, or hub name.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with it, where only that code knows its config.
    Raises:
        UserError: there is no config.json, it is not one, or it is of no decoder.
    """
    file = find_config(path, revision=revision)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no config.json that can be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{file} says no model_type: it is not the config of a transformers model")
    reader = FAMILIES.get(str(config["model_type"]))
    try:
        if reader is None:
            return _read_unknown(file, trust_remote_code=trust_remote_code)
        return reader(config)
    except KeyError as error:
        raise UserError(
            f"{file} ({config['model_type']}) says nothing of {error}, which the plan needs; plans are for text-only "
            f"decoders such as {', '.join(FAMILIES)}"
        ) from error


def sizes_of(config: Json, *, num_params: int) -> ModelSizes | None:
    """The sizes of a model that is loaded already.

    Args:
        config: its config as a mapping, defaults included.
        num_params: of the model itself.
    Returns:
        The sizes; None where the config says nothing of what a plan needs.
    """
    try:
        sizes = FAMILIES.get(str(config["model_type"]), _llama)(config)
    except KeyError:
        return None
    return replace(sizes, num_others=num_params - sizes.num_params)


def find_config(path: str, *, revision: str | None = None) -> Path:
    """The config.json of a model, fetched where the hub answers.

    Raises:
        UserError: there is none.
    """
    local = Path(path).expanduser()
    if local.exists():
        file = local / "config.json" if local.is_dir() else local
        if not file.is_file():
            raise UserError(f"{local} has no config.json: give the folder of a model, or a hub name")
        return file
    attached = find_model(path)
    if attached is not None:
        return attached / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision, local_files_only=not hub_answers()))
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no config of {path}: {reason} (a plan needs config.json alone: put it into a folder and name that)"
        ) from error


def _read_unknown(file: Path, *, trust_remote_code: bool) -> ModelSizes:
    """A family that transformers knows: sizes under its usual names, parameters counted on a model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(file.parent, trust_remote_code=trust_remote_code, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{file} is not understood: {reason}") from error
    text = config.get_text_config()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    usual = {name: value for name in names if (value := getattr(text, name, None)) is not None}
    usual["intermediate_size"] = usual.get("intermediate_size", 4 * usual["hidden_size"])
    sizes = _llama(text.to_dict() | usual)
    return replace(sizes, num_others=sum(parameter.numel() for parameter in model.parameters()) - sizes.num_params)


def _int(config: Json, *names: str, default: int | None = None) -> int:
    """The first of these keys that is there and not null."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None and default is None:
        raise KeyError(names[0])
    value = default if name is None else config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < (1 if default is None else 0):
        raise UserError(
            f"config.json of a {config['model_type']}: {name} is {value!r}; a whole number above 0 is needed"
        )
    return value


def _llama(
    config: Json, *, query_biases: bool = False, head_norms: bool = False, is_tied: bool = False, norms: int = 2
) -> ModelSizes:
    """Llama and its kin: root-mean-square norms, rotations, a gated feed-forward block."""
    hidden, heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    kv_heads = _int(config, "num_key_value_heads", default=heads)
    head_dim = _int(config, "head_dim", default=hidden // heads)
    inner = _int(config, "intermediate_size")
    has_biases = bool(config.get("attention_bias", False))
    biases = (heads + 2 * kv_heads) * head_dim if has_biases or query_biases else 0
    biases += hidden if has_biases and not query_biases else 0
    biases += 2 * inner + hidden if config.get("mlp_bias", False) else 0
    return ModelSizes(
        family=str(config["model_type"]),
        vocab_size=_int(config, "vocab_size"),
        hidden=hidden,
        num_layers=_int(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        is_tied=bool(config.get("tie_word_embeddings", is_tied)),
        num_biases=biases,
        num_norms=norms * hidden + (2 * head_dim if head_norms else 0),
        num_final_norms=hidden,
    )


def _qwen2(config: Json) -> ModelSizes:
    return _llama(config, query_biases=bool(config.get("qkv_bias", True)))


def _qwen3(config: Json) -> ModelSizes:
    return _llama({"head_dim": 128, **config}, head_norms=True)


def _gemma(config: Json) -> ModelSizes:
    return _llama({"head_dim": 256, **config}, is_tied=True)


def _gemma2(config: Json) -> ModelSizes:
    return _llama({"head_dim": 256, **config}, is_tied=True, norms=4)


def _with_experts(dense: ModelSizes, config: Json, *, inner: int, num_experts: int, shared: int = 0) -> ModelSizes:
    return replace(
        dense,
        intermediate=inner,
        num_experts=num_experts,
        experts_per_token=_int(config, "num_experts_per_tok", default=2),
        shared_intermediate=shared,
    )


def _mixtral(config: Json) -> ModelSizes:
    num_experts = _int(config, "num_local_experts", default=8)
    return _with_experts(_llama(config), config, inner=_int(config, "intermediate_size"), num_experts=num_experts)


def _qwen2_moe(config: Json) -> ModelSizes:
    return _with_experts(
        _qwen2({"intermediate_size": 1, **config}),
        config,
        inner=_int(config, "moe_intermediate_size", default=1408),
        num_experts=_int(config, "num_experts", default=60),
        shared=_int(config, "shared_expert_intermediate_size", default=5632),
    )


def _qwen3_moe(config: Json) -> ModelSizes:
    dense = _llama({"intermediate_size": 1, **config}, head_norms=True)
    inner = _int(config, "moe_intermediate_size", default=768)
    return _with_experts(dense, config, inner=inner, num_experts=_int(config, "num_experts", "num_local_experts"))


def _gpt2(config: Json) -> ModelSizes:
    """GPT-2: learnt positions, layer norms and biases everywhere, one product after another."""
    hidden, heads = _int(config, "n_embd", "hidden_size", default=768), _int(config, "n_head", default=12)
    inner = _int(config, "n_inner", default=4 * hidden)
    rate = config.get("resid_pdrop", 0.1)
    return ModelSizes(
        family="gpt2",
        vocab_size=_int(config, "vocab_size", default=50257),
        hidden=hidden,
        num_layers=_int(config, "n_layer", default=12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=inner,
        is_gated=False,
        is_tied=bool(config.get("tie_word_embeddings", True)),
        num_positions=_int(config, "n_positions", default=1024),
        num_biases=4 * hidden + inner + hidden,
        num_norms=4 * hidden,
        num_final_norms=2 * hidden,
        dropout=float(rate) if isinstance(rate, int | float) else 0.1,
    )


def _gpt_neox(config: Json) -> ModelSizes:
    """GPT-NeoX and Pythia: attention and feed-forward block side by side."""
    hidden, heads = _int(config, "hidden_size", default=6144), _int(config, "num_attention_heads", default=64)
    inner = _int(config, "intermediate_size", default=24576)
    return ModelSizes(
        family="gpt_neox",
        vocab_size=_int(config, "vocab_size", default=50432),
        hidden=hidden,
        num_layers=_int(config, "num_hidden_layers", default=44),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=inner,
        is_gated=False,
        is_tied=bool(config.get("tie_word_embeddings", False)),
        num_biases=(4 * hidden if config.get("attention_bias", True) else 0) + inner + hidden,
        num_norms=4 * hidden,
        num_final_norms=2 * hidden,
    )


FAMILIES = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}
"""How the config of each family says its sizes; every other one is completed by transformers and read as Llama's."""

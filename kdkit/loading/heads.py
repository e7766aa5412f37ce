"""The head of a model apart from its backbone, and the proofs by numbers that the two are what they seem."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdkit.errors import UserError
from kdkit.loading.attention import PACKED, UNGROUPED, PackedRows, use
from kdkit.loading.backbone import ModelShape, backbone_hidden, packed_states
from kdkit.loading.lora import has_lora
from kdkit.teacher.signal import NO_VIEWS, Head


class LogitsOverflow(UserError):
    """Weights are finite and logits are not: the dtype is too narrow for this model."""


TokenizerKind = Literal["same", "padded", "different"]
"""How two tokenizers compare: padded have the same vocabulary, but models of different widths."""

# What families do to logits beside the matrix product: config attribute -> exponent of the factor on the logits.
HEAD_FACTORS: dict[str, int] = {
    "logit_scale": 1,  # Cohere, Cohere2
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_scaling": -1,  # Granite (divides the logits), MiniCPM3 (divides the head's input)
    "logits_mup_width_multiplier": -1,  # Inkling
}
# (model type, attribute) whose meaning differs from the family that introduced the name.
HEAD_FACTOR_EXCEPTIONS: dict[tuple[str, str], int] = {
    ("hyperclovax", "logits_scaling"): 1,
    ("mpt", "logit_scale"): 0,  # read from the config, used nowhere
}
SOFTCAPS = (
    "final_logit_softcapping",  # Gemma 2 and later, NanoChat
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)

# Attributes of configs whose attention leaves tokens out in long texts alone, where no probe of a few tokens looks.
SPARSE = (
    "attention_chunk_size",  # Llama 4
    "index_topk",  # DeepSeek V3.2
    "index_topk_blocks",  # MiniMax M3
    "keep_window_size",  # Doge
)

# Largest difference by rounding between two ways to the same logits, as a fraction of the largest logit.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Probed logits are brought to this size, at which a forgotten softcap or factor cannot hide in rounding.
_PROBE_LOGIT = 60.0
_PROBE_LENGTH = 8


def head_of(model: PreTrainedModel, *, vocab_size: int | None = None) -> Head:
    """The language-model head: live views of its parameters, factor and softcap from the config.

    What the config says is believed here; `check_head` proves it.

    Args:
        model: a causal language model whose output embeddings are a plain linear layer.
        vocab_size: keep only this many leading ids; None for all.
    Returns:
        `Head`; the gradient of its logits reaches the model's parameters.
    Raises:
        ValueError: the head is not a plain `torch.nn.Linear` (wrapped by LoRA, quantized, or absent).
    """
    obstacle = _head_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"{type(model).__name__} has no head to take apart: {obstacle}; use its own logits")
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    return Head(linear.weight, linear.bias, _factor(config), _softcap(config), vocab_size)


def shape_of(model: PreTrainedModel, *, dense: bool = False) -> ModelShape:
    """The sizes that adapters depend on.

    Args:
        model: a causal language model.
        dense: its head cannot be had apart, so that its last layer's states stand for what the head sees.
    Returns:
        `ModelShape`.
    """
    config = model.config.get_text_config()
    head_size = config.hidden_size if dense else head_of(model).weight.shape[1]
    return ModelShape(head_size, config.hidden_size, config.num_hidden_layers, num_experts(config))


def num_experts(config: PreTrainedConfig) -> int | None:
    """Experts of a layer as the families of MoE name them; None in a dense model."""
    text = config.get_text_config()
    return getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> str | None:
    """Prove on a probe batch that `head_of(model).logits(backbone_hidden(...))` are the model's logits.

    Compared once as it is, and once with the head's input enlarged so that logits reach the size at which a softcap
    bends them: on a small random model all logits are near 0, where any softcap looks like none.

    Returns:
        None when proven; else the reason, as half a sentence, why the model's own logits must be used.
    """
    if obstacle := _head_obstacle(model):
        return obstacle
    with _evaluation_mode(model):
        input_ids, mask = _probe_batch(model)
        hidden = backbone_hidden(model, input_ids, mask)
        head = head_of(model)
        if hidden.shape[-1] != head.weight.shape[1]:
            return f"the backbone gives {hidden.shape[-1]} numbers per token, the head takes {head.weight.shape[1]}"
        product = (hidden[mask.bool()] @ head.weight.T.to(hidden.dtype)).abs().max().item()
        enlarge = max(1.0, _PROBE_LOGIT / (product * abs(head.scale) + 1e-30))
        reasons = [_logits_differ(model, head, hidden, factor=f) for f in (1.0, enlarge)]
    return next((reason for reason in reasons if reason is not None), None)


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Prove on a probe that no token sees a later one.

    Encoders such as BERT load as causal language models without complaint and then read the answer in advance.

    Raises:
        UserError: changing the second half of a text changes logits in the first.
    """
    with _evaluation_mode(model):
        input_ids, _ = _probe_batch(model)
        text, half = input_ids[:1], _PROBE_LENGTH // 2
        changed = text.clone()
        changed[:, half:] = (text[:, half:] + 1) % _num_embeddings(model)
        before, after = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :half].float()
            for ids in (text, changed)
        )
    # Not finite is another finding, made by check_finite_logits.
    if (before - after).abs().max() > _TOLERANCE[model.dtype] * before.abs().max():
        raise UserError(
            f"{model.config.name_or_path or type(model).__name__} lets a token see later ones, so it is no causal"
            " language model (an encoder such as BERT?): choose one that was trained to predict the next token"
        )


@torch.no_grad()
def allow_packing(model: PreTrainedModel) -> bool:
    """Let a model take packed rows (`kdkit.loading.backbone`) if it finds the same for them on a probe.

    Args:
        model: on its device; changed if it may.
    Returns:
        Whether it may: its attention is torch's, and nothing but the attention lets tokens see each other.
    """
    attention = model.config._attn_implementation
    if attention not in ("sdpa", UNGROUPED) or not _hands_rows_to_attention(model):
        return False
    use(model, PACKED)
    allowed = False
    try:
        with _evaluation_mode(model):
            input_ids, mask = _probe_batch(model)
            input_ids, mask = input_ids.flip(0), mask.flip(0)  # the row that another one follows is the shorter one
            expected = backbone_hidden(model, input_ids, mask)
            rows = PackedRows(mask.flatten().nonzero()[:, 0], *mask.shape)
            found = packed_states(model, input_ids, rows, views=NO_VIEWS).last
        gap = (found - expected)[mask.bool()].abs().max()
        allowed = bool(gap <= _TOLERANCE[model.dtype] * expected.abs().max())
    finally:
        if not allowed:
            use(model, attention)
    return allowed


@torch.no_grad()
def check_finite_logits(model: PreTrainedModel, batch: Mapping[str, object]) -> None:
    """Refuse a teacher whose logits on real rows are not finite numbers.

    Models trained in bfloat16 can overflow in float16, whose largest number is 65,504.

    Args:
        model: the teacher, in the dtype in which it will be asked.
        batch: what the collator made; `input_ids` and `attention_mask` (B, T) are read.
    Raises:
        LogitsOverflow: some logit is infinite or NaN, although all weights are finite; the message names the remedy.
        UserError: some weight is not finite.
    """
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    assert isinstance(input_ids, Tensor)
    assert isinstance(mask, Tensor)
    for ids, kept in zip(input_ids.to(model.device), mask.to(model.device), strict=True):
        # one row at a time: (T, V) logits of a large vocabulary, and only once in a run
        logits = model(input_ids=ids[None], attention_mask=kept[None], use_cache=False).logits[0]
        if not torch.isfinite(logits[kept.bool()]).all():
            raise _not_finite(model)


def check_tokenizer_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that can make ids for which the model has no embedding.

    Raises:
        UserError: the largest id of the tokenizer is beyond the input embeddings.
    """
    num_embeddings = _num_embeddings(model)
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_embeddings:
        raise UserError(
            f"the tokenizer makes ids up to {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the model"
            f" has embeddings for 0 to {num_embeddings - 1}: use the tokenizer the model was trained with"
        )


def shared_vocab_size(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer_len: int,
    *,
    kind: TokenizerKind = "same",
) -> int | None:
    """The number of leading ids to compare, where teacher and student pad the same vocabulary to other widths.

    Families round the head up by different amounts (Qwen2.5: 151,936 and 152,064 rows); no text makes the ids beyond.

    Args:
        teacher: with a head of any width.
        student: likewise.
        tokenizer_len: number of ids that the tokenizer of the batch can make.
        kind: how the two tokenizers relate, as `tokenizer_relation` proved.
    Returns:
        The smaller width, or None when both are equal and nothing is to be cut.
    Raises:
        UserError: the tokenizers differ, or one head is narrower than the tokenizer.
    """
    widths = {"teacher": head_width(teacher), "student": head_width(student)}
    if kind == "different":
        raise UserError(
            "teacher and student have different tokenizers, so that one id means different text on each side;"
            " distilling across tokenizers is not there yet: choose a pair with one tokenizer"
        )
    for role, width in widths.items():
        if width < tokenizer_len:
            raise UserError(
                f"the tokenizer makes {tokenizer_len} ids and the {role}'s head knows {width}: this is not the"
                f" {role}'s tokenizer, or tokens were added without resizing the {role}"
            )
    return None if len(set(widths.values())) == 1 else min(widths.values())


def _head_obstacle(model: PreTrainedModel) -> str | None:
    linear = model.get_output_embeddings()
    if linear is None:
        return "it names no output embeddings"
    # Exactly Linear: a LoRA wrapper adds nothing at first, so no probe would notice it before training does.
    if type(linear) is not torch.nn.Linear:
        if has_lora(linear):
            return "LoRA layers are trained beside its head"
        return f"its head is a {type(linear).__name__}, not a plain linear layer"
    if model.base_model is model:
        return "its backbone cannot be called apart from its head"
    return None


def _hands_rows_to_attention(model: PreTrainedModel) -> bool:
    """Whether a model takes positions, hands what it does not know down to its attention, and has no other layers."""
    config, takes = model.config.get_text_config(), signature(model.base_model.forward).parameters
    layers = getattr(config, "layer_types", None) or ()
    return (
        model._supports_attention_backend
        and type(model).__module__.startswith("transformers.")  # what others do in long texts nobody has looked at
        and model.base_model is not model
        and not any(getattr(config, name, None) for name in SPARSE)
        and {"full_attention", "sliding_attention"}.issuperset(layers)
        and "position_ids" in takes
        and any(parameter.kind is Parameter.VAR_KEYWORD for parameter in takes.values())
    )


def _factor(config: PreTrainedConfig) -> float:
    factor = 1.0
    for name, usual_exponent in HEAD_FACTORS.items():
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            factor *= value ** HEAD_FACTOR_EXCEPTIONS.get((config.model_type, name), usual_exponent)
    return factor


def _softcap(config: PreTrainedConfig) -> float | None:
    return next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)


def head_width(model: PreTrainedModel) -> int:
    """The number of ids that a model's logits are over, those that no text makes included."""
    linear = model.get_output_embeddings()
    if isinstance(linear, torch.nn.Linear):
        return linear.out_features
    return int(model.config.get_text_config().vocab_size)


def _num_embeddings(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        return embedding.num_embeddings
    return int(model.config.get_text_config().vocab_size)


def _probe_batch(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Two rows of fixed random ids, the second with padding, and their mask; (2, T) each."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(_num_embeddings(model), (2, _PROBE_LENGTH), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, _PROBE_LENGTH // 2 :] = 0
    return input_ids.to(model.device), mask.to(model.device)


def _logits_differ(model: PreTrainedModel, head: Head, hidden: Tensor, *, factor: float) -> str | None:
    """Compare both ways to the logits with the head's input multiplied by `factor`."""
    input_ids, mask = _probe_batch(model)
    linear = model.get_output_embeddings()
    handle = linear.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor,))
    try:
        theirs = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
    finally:
        handle.remove()
    ours = head.logits(hidden[mask.bool()] * factor).float()
    if theirs.shape != ours.shape:
        return f"its logits have {theirs.shape[-1]} columns and its head has {ours.shape[-1]} rows"
    largest, difference = theirs.abs().max().item(), (theirs - ours).abs().max().item()
    if difference <= max(_TOLERANCE[hidden.dtype], _TOLERANCE[head.weight.dtype]) * largest:
        return None
    return f"its logits differ from head(backbone) by {difference:.2g} where the largest is {largest:.2g}"


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout inside; every module is back in its own mode after."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def _not_finite(model: PreTrainedModel) -> UserError:
    name = model.config.name_or_path or type(model).__name__
    broken = [n for n, p in model.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
    if broken:
        return UserError(
            f"{name} has weights that are not finite ({broken[0]}): the checkpoint is damaged, get it again"
        )
    return LogitsOverflow(
        f"the logits of {name} are not finite in {str(model.dtype).removeprefix('torch.')}: it overflows. Load it in"
        " float32, or quantized to nf4 where memory does not allow that (bfloat16 on cards from capability 8.0)"
    )

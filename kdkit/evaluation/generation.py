"""A model's answers to prompts, batched; nothing else of the model or the process changes."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from kdkit.data.encoding import encode_prompts
from kdkit.errors import UserError
from kdkit.evaluation.cache import roomy_cache
from kdkit.evaluation.decoding import can_write, write
from kdkit.evaluation.drawing import DrawToken
from kdkit.runtime import generator, preserved_rng_state

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all) after each batch."""


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are drawn."""

    max_new_tokens: int = 128
    """Tokens of an answer at most, its end-of-text token included."""
    batch_size: int = 32
    """Prompts answered together."""
    num_beams: int = 1
    """Beams; 1 with sampling_temperature 0 is greedy decoding."""
    sampling_temperature: float = 0.0
    """0 takes the likeliest token; above 0 draws from the tempered distribution."""
    top_p: float = 1.0
    """Nucleus of the sampling: the likeliest tokens that together hold this share."""
    seed: int = 0
    """Of the sampling; the same seed, prompts and batch size draw the same answers."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "num_beams"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: at least 1 is allowed")
        if not 0 <= self.sampling_temperature < math.inf:
            raise UserError(f"sampling_temperature={self.sampling_temperature}: 0 (greedy) or more is allowed")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: above 0 and at most 1 is allowed")


@dataclass(frozen=True)
class Answer:
    """One generated text."""

    text: str
    """Without special tokens."""
    token_ids: tuple[int, ...]
    """As they were produced, the end-of-text token included."""
    ended: bool
    """Whether the model produced an end-of-text token; False: it was cut at max_new_tokens."""

    @property
    def num_tokens(self) -> int:
        """Tokens produced, the end-of-text token included."""
        return len(self.token_ids)


def texts_digest(answers: Sequence[Answer]) -> str:
    """16 hex digits that two lists of answers share where every token of every answer is the same, in order."""
    said = json.dumps([answer.token_ids for answer in answers])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    settings: GenerationSettings | None = None,
    *,
    progress: Progress | None = None,
    processes: PartialState | None = None,
) -> list[Answer]:
    """Continue each prompt until the model ends it or max_new_tokens is reached.

    The model answers in evaluation mode with the KV cache on (gradient checkpointing, which would
    turn the cache off, only acts in training mode) and under these settings alone: what the
    checkpoint's generation_config.json asks for (temperature, repetition penalty) does not count,
    so that two models are compared alike. Mode, generation config and every random state are as
    before when it returns.

    Args:
        model: a causal language model, or a module that holds one.
        tokenizer: the model's own; puts its special tokens before a text, none after it.
        prompts: texts in the form the model was trained on, or their token ids.
        settings: None takes the defaults: greedy, 128 new tokens.
        progress: called after each batch.
        processes: share the batches, and each gets all answers; all of them call with the same. Batches are those of
            one process, and so are the answers. None: this process alone.
    Returns:
        One Answer a prompt, in the order of the prompts.
    Raises:
        UserError: the module holds no model that generates, the tokenizer has no end-of-text token,
            a prompt has no tokens, or prompt and answer do not fit the model's positions.
    """
    settings = settings or GenerationSettings()
    language_model = _generating_part(model)
    end_ids = end_of_text_ids(tokenizer, language_model)
    prompt_ids = _encoded(prompts, tokenizer)
    _check_lengths(prompt_ids, language_model, settings.max_new_tokens)
    # Longest first: a batch that does not fit the memory fails at once, and padding stays small.
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompt_ids[row]), row))
    answers: dict[int, Answer] = {}
    with evaluating(language_model), _generating_with(language_model, settings, end_ids):
        for start in _share(range(0, len(order), settings.batch_size), processes):
            rows = order[start : start + settings.batch_size]
            batch = [prompt_ids[row] for row in rows]
            with _keyed_draws(settings, start):
                draw = _draw_of(settings, start, language_model.device)
                written = _answer(language_model, tokenizer, batch, end_ids, draw=draw)
            answers |= dict(zip(rows, written, strict=True))
            if progress is not None:
                progress(len(answers), len(prompts))
    if processes is not None and processes.num_processes > 1:
        answers = {row: answer for found in gather_object([answers]) for row, answer in found.items()}
    return [answers[row] for row in range(len(prompts))]


def _share(starts: range, processes: PartialState | None) -> range:
    """The batches of this process."""
    return starts if processes is None else starts[processes.process_index :: processes.num_processes]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, each back in its own mode after.

    `model.train()` would not do: it would also wake parts that had been frozen in evaluation mode.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def end_of_text_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """The ids that end an answer: the tokenizer's own and the checkpoint's further special ones.

    A chat model names several in its generation config (end of turn, end of text). An id there that
    is an ordinary word of this tokenizer (a config left at its defaults) does not count.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text token, so no answer could ever end: set its "
            "eos_token, or load it with kdkit.loading.load_tokenizer"
        )
    named = model.generation_config.eos_token_id
    candidates = [] if named is None else named if isinstance(named, list) else [named]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted({tokenizer.eos_token_id, *(id_ for id_ in candidates if id_ in special)})


@contextmanager
def _generating_with(model: PreTrainedModel, settings: GenerationSettings, end_ids: list[int]) -> Iterator[None]:
    """Swap the whole generation config: `generate` fills what a passed one leaves open from it."""
    kept = model.generation_config
    sampling = (
        {
            "do_sample": True,
            "temperature": settings.sampling_temperature,
            "top_p": settings.top_p,
            "top_k": 0,  # `generate` would cut to the 50 likeliest by default
        }
        if settings.sampling_temperature > 0 and settings.num_beams > 1
        else {"do_sample": False}
    )
    model.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        use_cache=True,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],
        **sampling,
    )
    try:
        yield
    finally:
        model.generation_config = kept


def _encoded(
    prompts: Sequence[str] | Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[Sequence[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [prompt for prompt in prompts if not isinstance(prompt, str)]
    return list(encode_prompts(texts, tokenizer))


def _generating_part(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin):
            return module
    raise UserError(f"{type(model).__name__} holds no model that generates text: give a causal language model")


def _check_lengths(prompt_ids: Sequence[Sequence[int]], model: PreTrainedModel, max_new_tokens: int) -> None:
    for row, ids in enumerate(prompt_ids):
        if not ids:
            raise UserError(f"prompt {row} has no tokens: there is nothing to continue")
    # Not every architecture bounds its positions.
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]), default=None)
    if limit is None or longest is None or limit <= 0:
        return
    longest_tokens = len(prompt_ids[longest])
    if longest_tokens + max_new_tokens > limit:
        raise UserError(
            f"prompt {longest} has {longest_tokens} tokens; with max_new_tokens={max_new_tokens} that "
            f"exceeds the model's {limit} positions: lower max_new_tokens, or drop prompts of more than "
            f"{max(limit - max_new_tokens, 0)} tokens"
        )


def _draw_seed(settings: GenerationSettings, start: int) -> int:
    """What the draws of a batch are keyed by."""
    return generator(settings.seed, "answers", start).initial_seed()


@contextmanager
def _keyed_draws(settings: GenerationSettings, start: int) -> Iterator[None]:
    """Beams draw from the global state only: keyed inside, put back after; nothing else draws from it."""
    if settings.num_beams == 1 or settings.sampling_temperature == 0:
        yield
        return
    with preserved_rng_state():
        torch.manual_seed(_draw_seed(settings, start))
        yield


def _draw_of(settings: GenerationSettings, start: int, device: torch.device) -> DrawToken | None:
    """What draws the tokens of a batch; None where `generate` finds them by itself."""
    if settings.num_beams > 1 or settings.sampling_temperature == 0:
        return None
    return DrawToken(
        temperature=settings.sampling_temperature,
        top_p=settings.top_p,
        seed=_draw_seed(settings, start),
        device=device,
    )


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    end_ids: list[int],
    *,
    draw: DrawToken | None,
) -> list[Answer]:
    input_ids, attention_mask = _left_padded(prompt_ids, end_ids[0])
    settings = model.generation_config
    room = input_ids.shape[1] + settings.max_new_tokens
    cache = roomy_cache(model, room, num_beams=settings.num_beams)
    prompts = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    if cache is not None and can_write(model, cache, room):
        most = settings.max_new_tokens
        output = write(model, **prompts, cache=cache, max_new_tokens=most, end_ids=end_ids, draw=draw)
    else:
        generate = cast(Callable[..., Tensor], model.generate)
        processors = None if draw is None else [draw]
        output = generate(**prompts, past_key_values=cache, logits_processor=processors)[:, input_ids.shape[1] :]
    if draw is not None and draw.is_lost:
        raise RuntimeError("a model's scores of the next token are NaN or infinite: look for such weights")
    new_ids = output.cpu()  # (B, new)
    is_end = torch.isin(new_ids, torch.tensor(end_ids))
    ended = is_end.any(dim=1)  # (B,)
    first_end = is_end.int().argmax(dim=1)
    # By position, never by id: padding is itself an end-of-text token.
    lengths = torch.where(ended, first_end + 1, new_ids.shape[1]).tolist()
    token_ids = [row[:length] for row, length in zip(new_ids.tolist(), lengths, strict=True)]
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [Answer(text, tuple(ids), end) for text, ids, end in zip(texts, token_ids, ended.tolist(), strict=True)]


def _left_padded(prompt_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids in prompt_ids)
    input_ids = [[pad_id] * (width - len(ids)) + list(ids) for ids in prompt_ids]
    attention_mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    return torch.tensor(input_ids), torch.tensor(attention_mask)

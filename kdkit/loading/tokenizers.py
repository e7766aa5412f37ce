"""A tokenizer that has what training and generation need, or one clear message."""

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdkit.errors import UserError
from kdkit.loading.places import locate, one_message

logger = logging.getLogger(__name__)

# Names under which well-known families keep their end-of-text token; only used to make the message helpful.
_USUAL_END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "[EOS]")


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with an end-of-text and a padding token.

    Without a padding token, end-of-text takes its place, with one warning: nothing in kdkit decides by comparing
    with the padding id, so that an answer's own end-of-text still counts.

    Args:
        path: folder of a model or tokenizer, or a hub name.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with it.
    Returns:
        The tokenizer; `eos_token_id` and `pad_token_id` are set.
    Raises:
        UserError: there is no such folder or hub name, the hub is out of reach, the folder holds no tokenizer, or
            the tokenizer has no end-of-text token.
    """
    place = locate(path, revision=revision)
    with one_message("tokenizer", place):
        tokenizer = AutoTokenizer.from_pretrained(
            place.name, trust_remote_code=trust_remote_code, **place.read_arguments()
        )
    _check_vocabulary(tokenizer, place.name)
    _check_end_token(tokenizer, place.name)
    if tokenizer.pad_token_id is None:
        logger.warning(
            "the tokenizer %s has no padding token; its end-of-text token %s pads instead",
            place.name,
            tokenizer.eos_token,
        )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    # From a folder with config.json alone, transformers makes a tokenizer that knows special tokens only and
    # turns every text into no token at all, without a word.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"{name} holds no vocabulary (tokenizer.json or the like): copy the tokenizer's files there, or name the"
            " folder that has them"
        )


def _check_end_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.eos_token_id is not None:
        return
    known = tokenizer.get_vocab()
    found = [token for token in _USUAL_END_TOKENS if token in known]
    hint = f"its vocabulary has {', '.join(found)}" if found else "add one to its vocabulary"
    raise UserError(
        f"the tokenizer {name} has no end-of-text token, so a student could never learn to stop: set eos_token in"
        f" tokenizer_config.json ({hint})"
    )

"""A few of a run's rows, as its config reads them, before anything was trained."""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from kdkit.config import DistillConfig
from kdkit.data.batch import Batch, DistillCollator
from kdkit.data.encoding import encode_rows
from kdkit.data.rows import Rows, load_rows


def sample_rows(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int,
    kind: Literal["train", "validation"] = "validation",
) -> Rows:
    """The first rows of a kind, with prompts in the config's template.

    Args:
        config: of the run.
        tokenizer: whose chat template is used where the config asks for one.
        num_rows: most rows.
        kind: which rows.
    Returns:
        Rows with an answer.
    Raises:
        UserError: as `load_rows`.
    """
    data = config.data
    source = data.train if kind == "train" else data.validation
    return load_rows(source, columns=data.columns, template=data.template, limit=num_rows, tokenizer=tokenizer)


def sample_batch(config: DistillConfig, tokenizer: PreTrainedTokenizerBase, *, num_rows: int) -> Batch:
    """The first validation rows as one batch, as one model alone reads them.

    Args:
        config: of the run.
        tokenizer: that model's.
        num_rows: most rows; those with too long a prompt are left out.
    Returns:
        The batch.
    Raises:
        UserError: as `load_rows` and `encode_rows`.
    """
    encoded = encode_rows(
        sample_rows(config, tokenizer, num_rows=num_rows),
        tokenizer,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
    )
    assert tokenizer.pad_token_id is not None
    return DistillCollator(tokenizer.pad_token_id)(list(encoded.dataset))

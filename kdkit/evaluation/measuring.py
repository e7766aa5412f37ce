"""A model on rows with answers: what it writes, and how likely it finds the right answer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkit.data.batch import DistillCollator
from kdkit.data.encoding import EncodedRows, encode_rows
from kdkit.data.rows import Rows
from kdkit.errors import RunFailed, UserError
from kdkit.evaluation.generation import (
    GenerationSettings,
    Progress,
    evaluating,
    generate_answers,
)
from kdkit.evaluation.scoring import (
    Interval,
    RougeTokenizer,
    bootstrap_ratio,
    read_predictions,
    score_predictions,
)
from kdkit.loading import backbone_hidden, check_head, head_of
from kdkit.losses import LabelTerm, head_pass, logits_pass

_LABEL_LOGPROBS = "label_logprobs"


@dataclass(frozen=True)
class LabelLosses:
    """Negative log-likelihood of the right answers, in nats, summed row by row."""

    row_ids: np.ndarray
    """(R,) int64; which row."""
    sums: np.ndarray
    """(R,) float64; over the row's counted tokens."""
    num_tokens: np.ndarray
    """(R,) int64, at least 1."""

    @property
    def cross_entropy(self) -> float:
        """Nats a token over all counted tokens: never a mean of means."""
        return float(self.sums.sum() / self.num_tokens.sum())

    def cross_entropy_interval(self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Interval:
        """Nats a token, with a bootstrap interval over rows; each row keeps its weight in tokens."""
        return bootstrap_ratio(self.sums, self.num_tokens, resamples=resamples, confidence=confidence, seed=seed)


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on a set of rows; intervals are over rows."""

    rouge_l: Interval
    """Percent."""
    exact_match: Interval
    """Percent."""
    cross_entropy: Interval
    """Nats a token of the right answers, end-of-text included."""
    perplexity: Interval
    """exp(cross_entropy), never capped."""
    mean_tokens: float
    """Tokens of an answer, end-of-text included."""
    ended_fraction: float
    """Share of the answers that the model ended itself."""
    num_rows: int
    """Rows measured."""
    dropped: Mapping[str, int]
    """Rows left out, or with a right answer cut for the likelihood, by reason."""
    predictions: tuple[str | None, ...]
    """One a row given, in order; None where the row was left out."""

    def summary(self) -> dict[str, float | None]:
        """The figures as a flat, JSON-ready dict, bounds as `*_low` and `*_high`; None: infinite (a perplexity)."""
        figures: dict[str, float | None] = {}
        for name in ("rouge_l", "exact_match", "perplexity", "cross_entropy"):
            figures |= _flat(name, getattr(self, name))
        return figures | {
            "mean_tokens": self.mean_tokens,
            "ended_fraction": self.ended_fraction,
            "num_rows": self.num_rows,
            "num_dropped": self.predictions.count(None),
        }


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    settings: GenerationSettings | None = None,
    *,
    max_length: int = 512,
    max_prompt_length: int = 256,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    rouge_tokenizer: RougeTokenizer | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer every row, score the answers, and measure how likely the right ones are.

    Changes neither the model nor any random state; see `generate_answers`.

    Args:
        model: causal language model.
        tokenizer: the model's own.
        rows: with at least one reference each; the first is the one whose likelihood is measured.
        settings: of the generation; its batch_size also holds for the likelihood.
        max_length: tokens of prompt and right answer; longer answers are cut for the likelihood.
        max_prompt_length: rows with a longer prompt are left out, and counted.
        resamples: bootstrap resamples of the intervals.
        confidence: of the intervals.
        seed: of the resampling.
        rouge_tokenizer: what counts as a word; see `rouge_l`.
        progress: called with (answers done, in all).
    Returns:
        Evaluation.
    Raises:
        UserError: rows without references, none that fits, or prompts that leave no room for answers.
        RunFailed: a likelihood is not finite.
    """
    settings = settings or GenerationSettings()
    sure = {"resamples": resamples, "seed": seed}
    _check_references(rows)
    encoded = encode_rows(rows, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, unit="token")
    kept_ids: Sequence[int] = encoded.dataset["row_id"]
    kept = rows.dataset.select(kept_ids)
    losses = label_losses(model, _batches(encoded, tokenizer, settings.batch_size))
    answers = generate_answers(model, tokenizer, _prompt_ids(encoded), settings, progress=progress)
    scores = score_predictions(
        [answer.text for answer in answers],
        kept["references"],
        confidence=confidence,
        tokenizer=rouge_tokenizer,
        **sure,
    )
    cross_entropy = losses.cross_entropy_interval(confidence=confidence, **sure)
    predictions: list[str | None] = [None] * len(rows)
    for row_id, answer in zip(kept_ids, answers, strict=True):
        predictions[row_id] = answer.text
    return Evaluation(
        rouge_l=scores.rouge_l,
        exact_match=scores.exact_match,
        cross_entropy=cross_entropy,
        perplexity=_exp(cross_entropy),
        mean_tokens=sum(answer.num_tokens for answer in answers) / len(answers),
        ended_fraction=sum(answer.ended for answer in answers) / len(answers),
        num_rows=len(answers),
        dropped=encoded.report.dropped | encoded.report.truncated,
        predictions=tuple(predictions),
    )


def evaluate_predictions(path: str | Path) -> dict[str, float | None]:
    """Figures of answers that something else wrote, in the form of `Evaluation.summary`.

    Args:
        path: a file for `read_predictions`.
    Returns:
        rouge_l and exact_match in percent with their bounds, and num_rows.
    Raises:
        UserError: as `read_predictions`.
    """
    predictions, references = read_predictions(path)
    scores = score_predictions(predictions, references)
    return {
        **_flat("rouge_l", scores.rouge_l),
        **_flat("exact_match", scores.exact_match),
        "num_rows": len(predictions),
    }


@torch.no_grad()
def label_losses(
    model: PreTrainedModel, batches: Iterable[Mapping[str, object]], *, finite: bool = True
) -> LabelLosses:
    """Sum of −log q(label) over the counted tokens of each row.

    The same for any batch size; the logits of all positions never exist at once where the model's
    head can be applied apart.

    Args:
        model: causal language model; measured in evaluation mode and left as it was.
        batches: from `DistillCollator`; rows without a counted token are left out.
        finite: refuse a sum that is not; False for texts that the model may find impossible.
    Returns:
        LabelLosses, in the order of the batches.
    Raises:
        RunFailed: a sum is not finite (where `finite`), as from weights that training has broken.
        UserError: no row has a counted token.
    """
    dense = check_head(model) is not None
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(model):
        for batch in batches:
            tensors = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
            logprobs = _label_logprobs(model, tensors, dense=dense)  # (N,)
            num_rows, width = tensors["input_ids"].shape
            row = tensors["positions"] // width  # (N,)
            sums = torch.zeros(num_rows, dtype=torch.float64, device=row.device)
            sums.index_add_(0, row, -logprobs.double())
            found.append((tensors["row_ids"], sums, torch.bincount(row, minlength=num_rows)))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*found, strict=True)]
    if not columns or not columns[2].any():
        raise UserError("no row has an answer whose likelihood could be measured")
    counted = columns[2] > 0
    losses = LabelLosses(*(column[counted] for column in columns))
    if finite:
        _check_finite(losses)
    return losses


def _label_logprobs(model: PreTrainedModel, batch: Mapping[str, Tensor], *, dense: bool) -> Tensor:
    positions = batch["positions"]  # (N,)
    term = LabelTerm("lm", batch["labels"].flatten()[positions + 1])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if dense:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, T, V)
        result = logits_pass(logits.flatten(0, 1)[positions], None, [term], extras=(_LABEL_LOGPROBS,))
    else:
        hidden = backbone_hidden(model, ids, mask, tokens=batch["tokens"]).flatten(0, 1)[positions]  # (N, H)
        result = head_pass(hidden, head_of(model), None, [term], extras=(_LABEL_LOGPROBS,))
    return result.extras[_LABEL_LOGPROBS]


def _batches(encoded: EncodedRows, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> DataLoader:
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return DataLoader(encoded.dataset, batch_size=batch_size, collate_fn=DistillCollator(pad_id))


def _prompt_ids(encoded: EncodedRows) -> list[list[int]]:
    lengths, ids = encoded.dataset["prompt_length"], encoded.dataset["input_ids"]
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def _check_references(rows: Rows) -> None:
    without = [row for row, references in enumerate(rows.dataset["references"]) if not references]
    if without:
        raise UserError(
            f"{len(without)} of {len(rows)} rows of '{rows.name}' have no reference answer, the first is row "
            f"{without[0]}: there is nothing to score against; load them with require_references=True"
        )


def _check_finite(losses: LabelLosses) -> None:
    broken = np.flatnonzero(~np.isfinite(losses.sums))
    if len(broken):
        raise RunFailed(
            f"the likelihood of {len(broken)} of {len(losses.sums)} answers is not finite, the first in row "
            f"{losses.row_ids[broken[0]]}: the model's weights or its dtype are broken"
        )


def _exp(interval: Interval) -> Interval:
    with np.errstate(over="ignore"):  # beyond 709 nats: infinite, and said so
        return Interval(*(float(np.exp(x)) for x in (interval.value, interval.low, interval.high)))


def _flat(name: str, interval: Interval) -> dict[str, float | None]:
    named = {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: value if math.isfinite(value) else None for key, value in named.items()}  # JSON has no infinity

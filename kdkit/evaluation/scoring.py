"""How good a text is against its references: ROUGE-L, exact match, and how sure the mean is."""

import math
import string
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from scipy import stats

from kdkit.data.sources import Record, read_json_lines
from kdkit.errors import UserError

NON_LATIN_WARNING_FRACTION = 0.5
"""Share of reference letters outside [a-z0-9] above which ROUGE's own tokenizer misleads."""

_RESAMPLE_CELLS = 2**22
"""Bootstrap resamples are drawn in blocks of about this many numbers (32 MiB)."""

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


class RougeTokenizer(Protocol):
    """What ROUGE-L counts as words; a `transformers` tokenizer satisfies it too."""

    def tokenize(self, text: str, /) -> list[str]:
        """The words of `text`, in order."""


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its confidence interval, all in the value's own unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Scores of a list of predictions; both intervals in percent, over the rows."""

    rouge_l: Interval
    exact_match: Interval
    rouge_l_rows: tuple[float, ...]
    """0..100 for each row, in input order."""
    exact_match_rows: tuple[bool, ...]


def rouge_l(prediction: str, references: Sequence[str], *, tokenizer: RougeTokenizer | None = None) -> float:
    """The best ROUGE-L F-measure over the references, in percent.

    F = 2 P R / (P + R), P = LCS / words of the prediction, R = LCS / words of the reference, LCS the
    longest common subsequence of words.

    Args:
        prediction: the text to score.
        references: one or more right answers.
        tokenizer: None takes rouge_score's: lower case, Porter stems, only [a-z0-9] kept. Text in
            another script has no words there and scores 0: pass a tokenizer that knows it.
    Returns:
        0..100; 0 where the prediction or every reference has no words.
    Raises:
        UserError: there is no reference.
    Source: Lin 2004, "ROUGE", section 3.1, by rouge_score's rougeL with use_stemmer=True. Differs: none.
    """
    _check_references(references)
    scorer = _default_scorer() if tokenizer is None else RougeScorer(["rougeL"], tokenizer=tokenizer)
    return 100.0 * float(scorer.score_multi(references, prediction)["rougeL"].fmeasure)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals any reference, case, punctuation and spacing aside.

    Both sides are lower-cased, lose `string.punctuation` and have their spaces collapsed; articles
    stay.

    Args:
        prediction: the text to score.
        references: one or more right answers.
    Returns:
        True at equality with at least one reference.
    Raises:
        UserError: there is no reference.
    """
    _check_references(references)
    predicted = _plain(prediction)
    return any(predicted == _plain(reference) for reference in references)


def score_predictions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    tokenizer: RougeTokenizer | None = None,
) -> Scores:
    """ROUGE-L and exact match of each row and of their mean, in percent.

    The interval says what other rows of the same kind would give, not what another training seed
    would: for that, see `paired_difference`.

    Args:
        predictions: one text a row.
        references: the right answers of each row, at least one.
        resamples: bootstrap resamples of the rows; 0 makes no interval (low = value = high).
        confidence: share of the bootstrap means inside the interval.
        seed: of the resampling.
        tokenizer: what counts as a word for ROUGE-L; see `rouge_l`.
    Returns:
        Scores; low = value = high where all rows score alike, as for one row.
    Raises:
        UserError: no row, lists of different lengths, or a row without a reference.
    """
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} rows of references: give one prediction for each row"
        )
    if not predictions:
        raise UserError("no predictions to score: give at least one row")
    for row, answers in enumerate(references):
        _check_references(answers, row)
    if tokenizer is None:
        _warn_if_not_latin(answer for answers in references for answer in answers)
    pairs = list(zip(predictions, references, strict=True))
    rouge_rows = tuple(rouge_l(text, answers, tokenizer=tokenizer) for text, answers in pairs)
    match_rows = tuple(exact_match(text, answers) for text, answers in pairs)
    interval_of = partial(bootstrap_mean, resamples=resamples, confidence=confidence, seed=seed)
    return Scores(
        rouge_l=interval_of(rouge_rows),
        exact_match=interval_of([100.0 * match for match in match_rows]),
        rouge_l_rows=rouge_rows,
        exact_match_rows=match_rows,
    )


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of `values` with its percentile bootstrap interval, in the unit of the values.

    Args:
        values: (n,) one number a row, n >= 1.
        resamples: how many times the rows are drawn again, with replacement; 0 makes no interval.
        confidence: share of the bootstrap means inside the interval, in (0, 1).
        seed: of the drawing.
    Returns:
        Interval; low = value = high where all values are equal.
    Raises:
        UserError: no value, or confidence or resamples out of range.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    sums = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(sums, np.ones_like(sums), resamples=resamples, confidence=confidence, seed=seed)


def bootstrap_ratio(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """sum(sums) / sum(counts) with its percentile bootstrap interval over rows.

    A row is drawn with its sum and its count together, so that long rows weigh as they do in the
    value. The interval of a monotone function of the ratio (perplexity = exp) is that function of
    the bounds.

    Args:
        sums: (n,) float; what each row adds to the numerator, n >= 1.
        counts: (n,) float or int > 0; what it adds to the denominator.
        resamples: how many times the rows are drawn again, with replacement; 0 makes no interval.
        confidence: share of the bootstrap ratios inside the interval, in (0, 1).
        seed: of the drawing.
    Returns:
        Interval; low = value = high where every row has the same ratio, as for one row.
    Raises:
        UserError: no row, or confidence or resamples out of range.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    if len(sums) == 0:
        raise UserError("no rows to take a mean over: give at least one")
    if not 0 < confidence < 1 or resamples < 0:
        raise UserError(
            f"confidence={confidence}, resamples={resamples}: confidence lies between 0 and 1, resamples is 0 or more"
        )
    value = float(np.sum(sums) / np.sum(counts))
    if resamples == 0 or np.ptp(sums / counts) == 0:
        return Interval(value, value, value)
    drawn = stats.bootstrap(
        (sums, counts),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _RESAMPLE_CELLS // len(sums)),
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),  # `rng` came with scipy 1.15
    ).confidence_interval
    return Interval(value, float(drawn.low), float(drawn.high))


def paired_difference(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of a − b over paired runs with Student's t interval, in the unit of the values.

    The pairs are runs that share all but the thing compared: the same seed on both sides. A claim
    about one ROUGE-L point wants five pairs or more.

    Args:
        a: one number for each seed.
        b: the other side's, in the same order.
        confidence: coverage of the interval, in (0, 1).
    Returns:
        Interval; a difference is shown where it leaves out 0.
    Raises:
        UserError: lists of different lengths, fewer than two pairs, or confidence out of range.
    Source: Student 1908, paired t test.
    """
    if len(a) != len(b):
        raise UserError(f"{len(a)} values against {len(b)}: pairs need one of each for every seed")
    if len(a) < 2:
        raise UserError(f"{len(a)} pair has no spread to judge a difference by: run at least two seeds, better five")
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence}: it lies between 0 and 1")
    return _t_interval(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), confidence)


def mean_over_seeds(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of one figure over runs that differ in the seed alone, with Student's t interval.

    Args:
        values: one number for each seed.
        confidence: coverage of the interval, in (0, 1).
    Returns:
        Interval; of a single seed its value alone, with NaN for the bounds.
    Raises:
        UserError: there is no value.
    """
    if not values:
        raise UserError("no value to take the mean of: run at least one seed")
    if len(values) == 1:
        return Interval(values[0], math.nan, math.nan)
    return _t_interval(np.asarray(values, dtype=np.float64), confidence)


def _t_interval(values: np.ndarray, confidence: float) -> Interval:
    """Mean with Student's t interval; of equal values the interval has no width."""
    value = float(values.mean())
    if np.ptp(values) == 0:
        return Interval(value, value, value)
    bounds = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    return Interval(value, float(bounds.low), float(bounds.high))


def read_predictions(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """The predictions and references of a JSONL file, for `score_predictions`.

    Args:
        path: one object a line: {"prediction": "text", "references": ["text", ...]}; further keys
            are ignored, empty lines are skipped.
    Returns:
        (predictions, references), one of each a line, in file order.
    Raises:
        UserError: the file is missing, not UTF-8 text or empty, or a line is not such an object;
            names the file and the line.
    """
    rows = [_read_prediction(row, f"'{path}', line {number}") for number, row in read_json_lines(Path(path))]
    if not rows:
        raise UserError(f"'{path}' holds no prediction; expected one JSON object a line")
    return [prediction for prediction, _ in rows], [references for _, references in rows]


def _read_prediction(row: Record, place: str) -> tuple[str, list[str]]:
    expected = 'expected {"prediction": "text", "references": ["text", ...]}'
    prediction, references = row.get("prediction"), row.get("references")
    if not isinstance(prediction, str):
        raise UserError(f"{place}: `prediction` is {_got(prediction)}; {expected}")
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise UserError(f"{place}: `references` is {_got(references)}; {expected}")
    if not references:
        raise UserError(f"{place}: `references` is an empty list; {expected}")
    return prediction, references


def _got(value: object) -> str:
    return "missing" if value is None else f"{str(value)[:40]!r}"


def _check_references(references: Sequence[str], row: int | None = None) -> None:
    place = "" if row is None else f"row {row}: "
    if isinstance(references, str):
        raise UserError(f"{place}references is one text; give a list of texts")
    if not references:
        raise UserError(f"{place}no reference to score against; give at least one, or drop the row")


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_DROP_PUNCTUATION).split())


class _CachingTokenizer(DefaultTokenizer):
    """rouge_score's own with its stems, asked once for each word: stemming is most of its time."""

    def __init__(self) -> None:
        super().__init__(use_stemmer=True)
        self._tokens_of = lru_cache(maxsize=2**17)(super().tokenize)

    def tokenize(self, text: str) -> list[str]:
        return [token for word in text.split() for token in self._tokens_of(word)]


@cache
def _default_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=_CachingTokenizer())


def _warn_if_not_latin(texts: Iterable[str]) -> None:
    letters = [letter for text in texts for letter in text.lower() if letter.isalnum()]
    if not letters:
        return
    dropped_fraction = sum(letter not in _LATIN for letter in letters) / len(letters)
    if dropped_fraction > NON_LATIN_WARNING_FRACTION:
        warnings.warn(
            f"{dropped_fraction:.0%} of the references' letters lie outside [a-z0-9], and ROUGE's "
            "tokenizer drops those: such text scores 0. Pass a tokenizer that splits it, for "
            "example the model's own",
            stacklevel=3,
        )


_LATIN = frozenset(string.ascii_lowercase + string.digits)


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis=axis) / counts.sum(axis=axis)

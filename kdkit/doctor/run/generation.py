"""What the student writes: quality, length, ends, repetition, and how much of it is trained on."""

from collections.abc import Iterator

import numpy as np

from kdkit.doctor.findings import Check, NotApplicable, Observation, fail, warn
from kdkit.doctor.sources import DISTILLM, POST_MORTEMS
from kdkit.doctor.trace import Series, Trace

ROUGE_FRACTION = 0.8
"""Of the best ROUGE-L so far; two evaluations in a row below it are a fall."""
ROUGE_LOST_FRACTION = 0.5
"""Below this one evaluation is enough."""
ROUGE_DEVIATION = 30.0
"""Points of ROUGE-L by which answers differ from each other: a mean of n moves by this over the root of n."""
LEAST_ROUGE = 5.0
"""Points of ROUGE-L below which a fall says nothing."""
WORSE_FRACTION = 0.9
"""Of the best ROUGE-L, below which quality counts as falling where something else speaks for it."""
THRESHOLD_RISE = 0.05
"""Of the share of the student's own text; trainers raise it by 0.1 at a time."""
SURE_MATCHES = 5.0
"""Percent of exact matches: with fewer, two evaluations of 100 answers may have none by chance."""
LENGTH_RATIO = 1.5
"""Of the answers' length to that at the best ROUGE-L."""
ENDED_FALL = 0.25
"""Of the share of answers that end by themselves: more than the noise of 20 answers."""
REPEATED_RISE = 0.3
"""Of the share of repeated n-grams, above its lowest level."""
REPEATED_ROWS = 8
"""Of the log, over which a share of repetition is a level."""


def check_rouge(trace: Trace) -> Iterator[Observation]:
    """ROUGE-L falls and stays down."""
    rouge = trace.evaluated("rouge_l", at_least=2).finite
    best = np.maximum.accumulate(rouge.values) if len(rouge) else rouge.values
    low = (rouge.values < ROUGE_FRACTION * best) & (best >= LEAST_ROUGE)
    lost = (rouge.values < ROUGE_LOST_FRACTION * best) & (best >= LEAST_ROUGE)
    is_more_than_noise = best - rouge.values > _noise(trace, rouge.steps)
    low, lost = low & is_more_than_noise, lost & is_more_than_noise
    fallen = lost | (low & np.roll(low, 1) & (np.arange(len(low)) > 0))
    if fallen.any():
        at = int(np.argmax(fallen))
        top = int(np.argmax(rouge.values[: at + 1]))
        yield fail(
            f"ROUGE-L {rouge.values[top]:.4g} at step {rouge.steps[top]}, {rouge.values[at]:.4g} at step "
            f"{rouge.steps[at]}{_threshold_rise(trace, int(rouge.steps[top]), int(rouge.steps[at]))}"
        )


def _noise(trace: Trace, steps: np.ndarray) -> np.ndarray:
    """What chance may move a mean by, in points; 0 where nobody says of how many answers it is."""
    answers = trace.evals.get("num_answers")
    if answers is None:
        return np.zeros(len(steps))
    return ROUGE_DEVIATION / np.sqrt(np.maximum(np.interp(steps, answers.steps, answers.values), 1))


def _threshold_rise(trace: Trace, since: int, until: int) -> str:
    """What the share of the student's own text did meanwhile."""
    threshold = trace.evals.get("rollout/threshold") or trace.train.get("rollout/threshold")
    if threshold is None:
        return ""
    start, end = (np.interp(step, threshold.steps, threshold.values) for step in (since, until))
    return f", while the share of the student's own text rose from {start:.2g} to {end:.2g}" if end > start else ""


ROUGE = Check(
    "KD214",
    "ROUGE-L collapses",
    "ROUGE-L falls below 80 % of its best and stays there, or below half of it",
    "Where the student trains on its own text, that text is bad: a threshold is the share of it, no filter, and rises "
    "sooner with a smaller epsilon. Where it does not, the divergence takes it away from what it had learnt on the "
    "labels, or the learning rate is too high: see whether the cross-entropy of the labels rises with it.",
    "Warm the student up first, guard its text, take the threshold back, or train without it; give the labels a "
    "weight, or lower the learning rate.",
    f"{POST_MORTEMS}; {DISTILLM}",
    check_rouge,
)


def check_exact_match(trace: Trace) -> Iterator[Observation]:
    """Exact matches that were there are gone."""
    matches = trace.evaluated("exact_match", at_least=3).finite
    if len(matches) >= 3 and matches.values.max() > 1 and not matches.values[-2:].any():
        at = int(np.argmax(matches.values))
        rouge = trace.evals.get("rouge_l")
        is_sure = matches.values[at] > SURE_MATCHES or (rouge is not None and len(_worse(rouge.finite)) > 0)
        yield (fail if is_sure else warn)(
            f"exact match {matches.values[at]:.3g} % at step {matches.steps[at]}, 0 at the last two evaluations, to "
            f"step {matches.steps[-1]}"
        )


EXACT_MATCH = Check(
    "KD215",
    "no exact match left",
    "exact match falls to 0 and stays there",
    "As KD214; or the answers no longer end.",
    "As KD214; look at the length of the answers and at how many end by themselves.",
    POST_MORTEMS,
    check_exact_match,
)


def check_own_text(trace: Trace) -> Iterator[Observation]:
    """Quality falls while more of the student's own text is trained on."""
    threshold = _figure(trace, "rollout/threshold").finite
    rouge = trace.evaluated("rouge_l", at_least=3).finite
    if not len(threshold):
        raise NotApplicable("the share of the student's own text")
    share = np.interp(rouge.steps, threshold.steps, threshold.values)
    for at in _worse(rouge):
        top = int(np.argmax(rouge.values[: at + 1]))
        if share[at] >= share[top] + THRESHOLD_RISE:
            yield warn(
                f"share of the student's own text {share[top]:.2g} at step {rouge.steps[top]}, {share[at]:.2g} at step "
                f"{rouge.steps[at]}; meanwhile ROUGE-L fell from {rouge.values[top]:.4g} to {rouge.values[at]:.4g}"
            )
            return


OWN_TEXT = Check(
    "KD227",
    "own text does harm",
    "the threshold rises while ROUGE-L falls",
    "An adaptive threshold rises when the validation loss does, whatever the reason; bad text then raises the loss, "
    "and the loss the share of bad text.",
    "Warm the student up first; guard its text; let a fall of ROUGE-L take the threshold back.",
    f"{POST_MORTEMS}; {DISTILLM}",
    check_own_text,
)


def check_length(trace: Trace) -> Iterator[Observation]:
    """Answers grow longer while they grow worse."""
    rouge, length = trace.evaluated("rouge_l", at_least=3).finite, trace.evaluated("mean_tokens", at_least=3).finite
    if not len(rouge) or not len(length):
        raise NotApplicable("ROUGE-L and the length of the answers")
    tokens = np.interp(rouge.steps, length.steps, length.values)
    for at in _worse(rouge):
        top = int(np.argmax(rouge.values[: at + 1]))
        if min(tokens[at - 1 : at + 1]) > LENGTH_RATIO * tokens[top] > 0:
            yield warn(
                f"answers of {tokens[top]:.3g} tokens at step {rouge.steps[top]} (ROUGE-L {rouge.values[top]:.4g}), of "
                f"{tokens[at]:.3g} at step {rouge.steps[at]} (ROUGE-L {rouge.values[at]:.4g})"
            )
            return


LENGTH = Check(
    "KD228",
    "answers grow longer",
    "answers are half as long again as at the best ROUGE-L, and worse",
    "The student forgets to stop: end of text is masked as padding in the labels, teacher and student end with "
    "different tokens, or its own cut text is trained on as if it were whole.",
    "Count the end-of-text token as a label; set it in tokenizer and generation; refuse own text that did not end.",
    "github.com/modelscope/ms-swift issue 9526; arXiv:2402.03898, its code",
    check_length,
)


def check_ended(trace: Trace) -> Iterator[Observation]:
    """Fewer answers end by themselves."""
    ended = trace.evaluated("ended_fraction", at_least=3).finite
    fallen = ended.values < np.maximum.accumulate(ended.values) - ENDED_FALL if len(ended) else np.zeros(0, dtype=bool)
    twice = np.flatnonzero(fallen[1:] & fallen[:-1]) + 1
    if len(twice):
        at = int(twice[0])
        top = int(np.argmax(ended.values[: at + 1]))
        yield warn(
            f"{ended.values[top]:.0%} of the answers ended by themselves at step {ended.steps[top]}, "
            f"{ended.values[at]:.0%} at step {ended.steps[at]}"
        )


ENDED = Check(
    "KD229",
    "answers stop ending",
    "the share of answers that end by themselves falls",
    "As KD228: the end-of-text token is no longer learnt, or texts that were cut teach that there is none.",
    "As KD228; see that the longest answer allowed is long enough for the references.",
    "github.com/modelscope/ms-swift issue 9526",
    check_ended,
)


def check_repetition(trace: Trace) -> Iterator[Observation]:
    """The student's text repeats itself more and more."""
    repeated = trace.series("rollout/repeat_fraction", at_least=2 * REPEATED_ROWS).finite
    if len(repeated) < 2 * REPEATED_ROWS:
        raise NotApplicable(f"{2 * REPEATED_ROWS} shares of repetition")
    windows = np.lib.stride_tricks.sliding_window_view(repeated.values, REPEATED_ROWS)
    levels = np.median(windows, axis=1)
    lowest = int(np.argmin(levels))
    if levels[-1] > levels[lowest] + REPEATED_RISE:
        yield warn(
            f"repeated share of the student's text {levels[lowest]:.2g} at step {repeated.steps[lowest]}, "
            f"{levels[-1]:.2g} in the last {REPEATED_ROWS} rows, to step {repeated.steps[-1]}"
        )


REPETITION = Check(
    "KD230",
    "student repeats itself",
    "the share of repeated n-grams in the student's text rises",
    "Reverse divergences favour few, safe continuations; text that repeats and is trained on again makes it worse.",
    "Guard own text against repetition; sample at temperature 1; keep labelled rows in the mix.",
    "arXiv:2306.08543, section 2.2; arXiv:1904.09751",
    check_repetition,
)


def _worse(rouge: Series) -> np.ndarray:
    """Evaluations that are the second in a row well below the best so far."""
    best = np.maximum.accumulate(rouge.values) if len(rouge) else rouge.values
    low = (rouge.values < WORSE_FRACTION * best) & (best >= LEAST_ROUGE)
    return np.flatnonzero(low[1:] & low[:-1]) + 1


def _figure(trace: Trace, name: str) -> Series:
    """Of the evaluations, or else of training."""
    return trace.evaluated(name) if name in trace.evals else trace.series(name)

"""What can be wrong with a run, seen from its log alone. Thresholds stand on top."""

import math
from collections.abc import Iterator

import numpy as np

from kdkit.doctor.findings import Check, NotApplicable, Observation, fail, warn
from kdkit.doctor.trace import Series, Trace

PERPLEXITY_CAPS = (20, 50)
"""Losses at which trainers are known to cut the exponential."""
LARGEST_PART = 12.0
"""Of a term per counted item: a uniform guess among 150,000 tokens costs 11.9 nats."""
DIVERGED_RATIO = 2.0
"""Of the loss at the end to its lowest level before."""
LEAST_STEPS = 100
"""Before which a loss may go anywhere."""
STILL_FRACTION = 0.02
"""By how much a loss has to fall from its first quarter to its last."""
ROUGE_FRACTION = 0.8
"""Of the best ROUGE-L so far; two evaluations in a row below it are a fall."""
ROUGE_LOST_FRACTION = 0.5
"""Below this one evaluation is enough."""
LEAST_ROUGE = 5.0
"""Points of ROUGE-L below which a fall says nothing."""
FULL_FRACTION = 0.9
"""Of a card's memory."""
UNFINISHED_FRACTION = 0.5
"""Of the peak: what a decaying learning rate must have left behind at the end of a run."""
LINES_PER_STEP = 5.0
LEAST_LINES = 10_000
EVALUATION_RATIO = 1.5
"""Of the evaluation's loss to training's at the same point."""


def check_learning_rate_zero(trace: Trace) -> Iterator[Observation]:
    """Every value is 0."""
    rate = trace.series("learning_rate", at_least=3)
    if not rate.values.any():
        yield fail(f"learning rate 0 at all {len(rate)} log rows, steps {rate.steps[0]} to {rate.steps[-1]}")


def check_schedule_length(trace: Trace) -> Iterator[Observation]:
    """At the planned end a decaying learning rate is still high."""
    planned, rate = trace.planned, trace.series("learning_rate", at_least=3).finite
    if planned.scheduler not in ("cosine", "linear"):
        raise NotApplicable("which decaying schedule was asked for")
    total = planned.num_batches or planned.num_steps
    if total is None or not len(rate) or rate.steps[-1] < 0.98 * total:
        raise NotApplicable("a run that reached its planned end")
    peak, last = float(rate.values.max()), float(rate.values[-1])
    if peak > 0 and last > UNFINISHED_FRACTION * peak:
        factor = f"; gradients were accumulated over {planned.accumulation}" if planned.accumulation else ""
        yield fail(
            f"{planned.scheduler} schedule at {last / peak:.0%} of its peak {peak:.3g} at step {rate.steps[-1]}, the "
            f"last of {total}{factor}"
        )


def check_frozen_evaluation(trace: Trace) -> Iterator[Observation]:
    """Evaluations at different steps agree to the last digit."""
    name = next((name for name in ("loss", "cross_entropy") if len(trace.evals.get(name, ())) >= 2), None)
    if name is None:
        raise NotApplicable("two evaluations with a loss")
    losses = trace.evals[name].finite
    same = (np.diff(losses.values) == 0) & (np.diff(losses.steps) > 0)
    if not same.any():
        return
    at = int(np.argmax(same))
    evidence = f"evaluation {name} {losses.values[at]:.6g} at steps {losses.steps[at]} and {losses.steps[at + 1]} alike"
    yield fail(f"{evidence}: {_what_froze(trace)}")


def _what_froze(trace: Trace) -> str:
    """Nothing learnt, or one result shown again."""
    for name, what in (("update_norm", "the weights' change"), ("learning_rate", "the learning rate")):
        figure = trace.train.get(name)
        if figure is not None and len(figure) >= 3:
            if figure.values.any():
                return f"{what} is not 0, so that the evaluation does not see the trained weights, or is a kept result"
            return f"{what} is 0 all along, so that nothing was learnt"
    return "either nothing is learnt, or the same result is shown again"


def check_perplexity_cap(trace: Trace) -> Iterator[Observation]:
    """A perplexity of e^20 or e^50 exactly."""
    perplexity = trace.evaluated("perplexity").finite
    for cap in PERPLEXITY_CAPS:
        at = np.flatnonzero(np.isclose(perplexity.values, math.exp(cap), rtol=1e-5))
        if len(at):
            yield fail(
                f"perplexity {perplexity.values[at[0]]:.2f} = e^{cap} at {len(at)} of {len(perplexity)} evaluations, "
                f"first at step {perplexity.steps[at[0]]}"
            )


def check_perplexity(trace: Trace) -> Iterator[Observation]:
    """Perplexity and cross-entropy disagree."""
    perplexity, entropy = trace.evaluated("perplexity"), trace.evaluated("cross_entropy")
    if len(perplexity) != len(entropy):
        raise NotApplicable("a perplexity for each cross-entropy")
    known = np.isfinite(perplexity.values) & (perplexity.values > 0) & np.isfinite(entropy.values)
    given, due = np.log(perplexity.values[known]), entropy.values[known]
    wrong = np.flatnonzero(np.abs(given - due) > 0.01 * np.maximum(due, 1))
    if len(wrong):
        step = entropy.steps[known][wrong[0]]
        yield fail(
            f"step {step}: log of the perplexity {given[wrong[0]]:.4g}, cross-entropy {due[wrong[0]]:.4g}; they "
            f"differ at {len(wrong)} of {len(due)} evaluations"
        )


def check_nonfinite(trace: Trace) -> Iterator[Observation]:
    """A NaN or an infinity, in a figure or in words."""
    for event in trace.events_of("nonfinite")[:1]:
        replaced = ", and was replaced by 0" if "clamp" in event.text else ""
        yield fail(f"{event}{replaced}{_before(trace, event.step)}")
    for name, series in trace.train.items():
        broken = np.flatnonzero(~np.isfinite(series.values))
        if len(broken) and (name == "loss" or name.startswith("part/")):
            step = int(series.steps[broken[0]])
            yield fail(f"{name} is no number at {len(broken)} log rows, first at step {step}{_before(trace, step)}")


def _before(trace: Trace, step: int | None) -> str:
    """The last figures ahead of a step."""
    said = []
    for name in ("loss", "grad_norm", "learning_rate"):
        series = trace.train.get(name)
        if series is None or step is None:
            continue
        ahead = series.finite.values[series.finite.steps < step]
        if len(ahead):
            said.append(f"{name} {ahead[-1]:.4g}")
    return f"; before it {', '.join(said)}" if said else ""


def check_scale(trace: Trace) -> Iterator[Observation]:
    """A term is larger than a mean over tokens can well be."""
    parts = {
        name: series.finite
        for figures in (trace.evals, trace.train)
        for name, series in figures.items()
        if name.startswith("part/")
    }
    if not parts:
        raise NotApplicable("the terms of the loss one by one")
    for name, series in parts.items():
        if len(series) and np.median(series.values) > LARGEST_PART:
            low, high = series.values.min(), series.values.max()
            yield fail(
                f"{name.removeprefix('part/')}: {low:.4g} to {high:.4g}, median {np.median(series.values):.4g}, steps "
                f"{series.steps[0]} to {series.steps[-1]}; a mean over tokens stays below {LARGEST_PART:g}"
            )


def _comparable_losses(trace: Trace) -> Series:
    """The training loss, where its values over the run can be compared.

    Raises:
        NotApplicable: there are too few, or the weights of its terms changed.
    """
    loss = trace.series("loss", at_least=4).finite
    if len(loss) < 4 or loss.steps[-1] < LEAST_STEPS:
        raise NotApplicable(f"four losses over {LEAST_STEPS} steps")
    if any(name.startswith("weight/") and np.ptp(series.values) > 0 for name, series in trace.train.items()):
        raise NotApplicable("a loss whose terms keep their weights")
    return loss


def _quarters(series: Series) -> tuple[float, float]:
    """Medians of the first and of the last quarter."""
    size = max(len(series) // 4, 1)
    return float(np.median(series.values[:size])), float(np.median(series.values[-size:]))


def check_divergence(trace: Trace) -> Iterator[Observation]:
    """The loss ends far above where it had been."""
    loss = _comparable_losses(trace)
    size = max(len(loss) // 4, 1)
    end = float(np.median(loss.values[-size:]))
    lowest = int(np.argmin(loss.values[: len(loss) - size]))
    if end > DIVERGED_RATIO * loss.values[lowest] and end > loss.values[lowest] + 1:
        yield fail(
            f"loss {loss.values[lowest]:.4g} at step {loss.steps[lowest]}, {end:.4g} in the last quarter, to step "
            f"{loss.steps[-1]}"
        )


def check_learning(trace: Trace) -> Iterator[Observation]:
    """The loss stays where it began."""
    loss = _comparable_losses(trace)
    start, end = _quarters(loss)
    if start > 1 and abs(end - start) < STILL_FRACTION * start:
        yield warn(f"loss {start:.5g} in the first quarter of the log, {end:.5g} in the last, step {loss.steps[-1]}")


def check_same_objective(trace: Trace) -> Iterator[Observation]:
    """The evaluation's total counts terms that training has at weight 0."""
    off = [name.removeprefix("weight/") for name, series in trace.train.items() if _is_off(name, series)]
    if not off:
        raise NotApplicable("a term whose weight is 0")
    train, evals = trace.series("loss").finite, trace.evaluated("loss", at_least=2).finite
    if not len(evals) or not len(train) or trace.last_step < LEAST_STEPS:
        raise NotApplicable(f"losses over {LEAST_STEPS} steps")
    nearest = int(np.argmin(np.abs(train.steps - evals.steps[0])))
    seen, due = float(evals.values[0]), float(train.values[nearest])
    if due > 0 and seen > EVALUATION_RATIO * due:
        yield fail(
            f"evaluation loss {seen:.5g} at step {evals.steps[0]}, training's {due:.5g} at step "
            f"{train.steps[nearest]}, where {', '.join(off)} have the weight 0"
        )


def _is_off(name: str, series: Series) -> bool:
    return name.startswith("weight/") and not series.values.any()


def check_memory(trace: Trace) -> Iterator[Observation]:
    """The card is nearly full."""
    used = trace.series("memory/used_fraction").finite
    if len(used) and used.values.max() > FULL_FRACTION:
        at = int(np.argmax(used.values))
        yield warn(f"{used.values[at]:.0%} of the memory in use at step {used.steps[at]}")


def check_dtypes(trace: Trace) -> Iterator[Observation]:
    """A crash between two dtypes."""
    yield from (fail(str(event)) for event in trace.events_of("dtype")[:1])


def check_out_of_memory(trace: Trace) -> Iterator[Observation]:
    """A crash for lack of memory."""
    yield from (fail(str(event)) for event in trace.events_of("out_of_memory")[:1])


def check_rouge(trace: Trace) -> Iterator[Observation]:
    """ROUGE-L falls and stays down."""
    rouge = trace.evaluated("rouge_l", at_least=2).finite
    best = np.maximum.accumulate(rouge.values) if len(rouge) else rouge.values
    low = (rouge.values < ROUGE_FRACTION * best) & (best >= LEAST_ROUGE)
    lost = (rouge.values < ROUGE_LOST_FRACTION * best) & (best >= LEAST_ROUGE)
    fallen = lost | (low & np.roll(low, 1) & (np.arange(len(low)) > 0))
    if fallen.any():
        at = int(np.argmax(fallen))
        top = int(np.argmax(rouge.values[: at + 1]))
        yield fail(
            f"ROUGE-L {rouge.values[top]:.4g} at step {rouge.steps[top]}, {rouge.values[at]:.4g} at step "
            f"{rouge.steps[at]}{_threshold_rise(trace, int(rouge.steps[top]), int(rouge.steps[at]))}"
        )


def _threshold_rise(trace: Trace, since: int, until: int) -> str:
    """What the share of the student's own text did meanwhile."""
    threshold = trace.evals.get("rollout/threshold") or trace.train.get("rollout/threshold")
    if threshold is None:
        return ""
    start, end = (np.interp(step, threshold.steps, threshold.values) for step in (since, until))
    return f", while the share of the student's own text rose from {start:.2g} to {end:.2g}" if end > start else ""


def check_exact_match(trace: Trace) -> Iterator[Observation]:
    """Exact matches that were there are gone."""
    matches = trace.evaluated("exact_match", at_least=3).finite
    if len(matches) >= 3 and matches.values.max() > 1 and not matches.values[-2:].any():
        at = int(np.argmax(matches.values))
        yield fail(
            f"exact match {matches.values[at]:.3g} % at step {matches.steps[at]}, 0 at the last two evaluations, to "
            f"step {matches.steps[-1]}"
        )


def check_log_volume(trace: Trace) -> Iterator[Observation]:
    """Many lines a step."""
    if trace.num_lines is None or trace.last_step == 0:
        raise NotApplicable("a text log with steps")
    lines = trace.num_lines / trace.last_step
    if trace.num_lines > LEAST_LINES and lines > LINES_PER_STEP:
        yield warn(f"{trace.num_lines:,} lines for {trace.last_step:,} steps, {lines:.0f} a step")


def check_early_stop(trace: Trace) -> Iterator[Observation]:
    """Stopped ahead of its end by a rule."""
    total = trace.planned.num_batches or trace.planned.num_steps
    for event in trace.events_of("early_stop")[:1]:
        share = f", {event.step / total:.0%} of what was planned" if event.step and total else ""
        yield warn(f"{event}{share}")


_POST_MORTEMS = "post-mortems of two research projects"

RUN_CHECKS = (
    Check(
        "KD201",
        "learning rate is 0",
        "lr=0.00e+00 at every row, and no figure moves",
        "The optimizer never steps, or the scheduler never does: a format such as .3e shows 2.01e-5 as 2.010e-05, "
        "never as 0.",
        "Step the scheduler once for each optimizer step; see whether a loss scaler skips every step.",
        _POST_MORTEMS,
        check_learning_rate_zero,
    ),
    Check(
        "KD202",
        "schedule longer than the run",
        "the learning rate is still high at the last step",
        "The schedule was made for forward passes, and only every accumulated one is an optimizer step.",
        "Give the scheduler the number of optimizer steps: forward passes divided by the accumulation.",
        _POST_MORTEMS,
        check_schedule_length,
    ),
    Check(
        "KD203",
        "evaluation stands still",
        "evaluations at different steps agree to every digit",
        "Nothing is learnt, or the evaluation shows a kept result or other weights than the trained ones.",
        "See whether the learning rate and the change of the weights are above 0, then what the evaluation reads.",
        _POST_MORTEMS,
        check_frozen_evaluation,
    ),
    Check(
        "KD204",
        "perplexity is capped",
        "a perplexity of 485165195.41, which is e^20",
        "The trainer cuts the exponent, so that the figure no longer says anything.",
        "Take the perplexity from the plain cross-entropy of the labels, and do not cut it.",
        _POST_MORTEMS,
        check_perplexity_cap,
    ),
    Check(
        "KD205",
        "perplexity is not of the cross-entropy",
        "the log of the perplexity differs from the cross-entropy beside it",
        "It was taken from the total loss, which counts other terms too.",
        "Take the exponential of the labels' mean cross-entropy in nats.",
        "definition of perplexity",
        check_perplexity,
    ),
    Check(
        "KD206",
        "no number",
        "NaN or infinity in the loss, or a warning that one was replaced",
        "Most often a batch without counted labels (a mean over nothing), or float16 weights or activations that "
        "overflow. A temperature above 1 makes logits smaller, and softmax takes off the largest: neither overflows. A "
        "replaced NaN leaves its gradient behind.",
        "Stop at the first one and look at its batch; count labels before dividing; keep trained weights in float32.",
        _POST_MORTEMS,
        check_nonfinite,
    ),
    Check(
        "KD207",
        "scale of a term",
        "a divergence of 30 to 40, or feature terms of 40 to 200",
        "A sum over tokens is divided by rows (batchmean), an error is not normalised, or logits of two tokenizers are "
        "compared id by id. The factor temperature squared belongs there (Hinton et al. 2015) and explains no such "
        "size.",
        "Average over counted tokens, compare features by cosine or relative to their variance, align vocabularies.",
        _POST_MORTEMS,
        check_scale,
    ),
    Check(
        "KD208",
        "loss diverges",
        "the loss ends far above its lowest level",
        "The learning rate is too high, or the data changed: the student's own bad text took the place of the rows.",
        "Lower the learning rate; guard the student's text, or train without it.",
        _POST_MORTEMS,
        check_divergence,
    ),
    Check(
        "KD209",
        "loss does not fall",
        "the loss ends where it began",
        "The weights do not move (see KD201), or what falls is too small beside what cannot.",
        "Look at the change of the weights, and at each term alone.",
        _POST_MORTEMS,
        check_learning,
    ),
    Check(
        "KD210",
        "another objective at evaluation",
        "the evaluation's loss is far above training's",
        "Evaluation takes the weights of the end of a curriculum, training those of its step.",
        "Give the evaluation the same step as training.",
        _POST_MORTEMS,
        check_same_objective,
    ),
    Check(
        "KD211",
        "memory nearly full",
        "more than 90 % of the card in use",
        "A longer batch or a fragmented allocator ends the run.",
        "Lower the batch or the length, or see what kdkit plan proposes.",
        _POST_MORTEMS,
        check_memory,
    ),
    Check(
        "KD212",
        "two dtypes",
        "mat1 and mat2 must have the same dtype",
        "Autocast hides the difference while training; outside it, at evaluation, float16 meets float32.",
        "Compute the objective inside the module that is under autocast, in training and in evaluation.",
        _POST_MORTEMS,
        check_dtypes,
    ),
    Check(
        "KD213",
        "out of memory",
        "CUDA out of memory",
        "Logits of two models at full vocabulary, or generation, need most.",
        "See what kdkit plan says of the settings.",
        "github.com/huggingface/trl issue 2255",
        check_out_of_memory,
    ),
    Check(
        "KD214",
        "ROUGE-L collapses",
        "ROUGE-L falls below 80 % of its best and stays there, or below half of it",
        "The student trains on its own bad text: a threshold is the share of that text, no filter, and rises sooner "
        "with a smaller epsilon.",
        "Warm the student up first, guard its text, take the threshold back; or train without it.",
        _POST_MORTEMS + "; arXiv:2402.03898",
        check_rouge,
    ),
    Check(
        "KD215",
        "no exact match left",
        "exact match falls to 0 and stays there",
        "As KD214; or the answers no longer end.",
        "As KD214; look at the length of the answers and at how many end by themselves.",
        _POST_MORTEMS,
        check_exact_match,
    ),
    Check(
        "KD216",
        "log volume",
        "more than 5 lines a step",
        "Writing takes time, a notebook cuts its output, and nobody finds the figure that matters.",
        "Write a row every 10 to 100 steps.",
        _POST_MORTEMS,
        check_log_volume,
    ),
    Check(
        "KD217",
        "stopped early",
        "early stopping ended the run",
        "A total loss whose weights change along a curriculum is no metric; and a metric that stands still says "
        "nothing of the student.",
        "Watch ROUGE-L or cross-entropy; see KD203 first.",
        _POST_MORTEMS,
        check_early_stop,
    ),
)
"""Every check of a log, by code."""

"""Losses and perplexities of the evaluations: whether they move, are what they are called, and fit training's."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from kdkit.doctor.findings import Check, NotApplicable, Observation, fail, warn
from kdkit.doctor.sources import POST_MORTEMS
from kdkit.doctor.trace import Series, Trace

PERPLEXITY_CAPS = (20, 50)
"""Losses at which trainers are known to cut the exponential."""
EVALUATION_RATIO = 1.5
"""Of the evaluation's loss to training's at the same point."""
LEAST_STEPS = 100
"""Before which a loss may go anywhere."""
COARSE_FRACTION = 1e-3
"""Of a loss: the last digit that its log prints; two that agree in so few digits may do so by chance."""
ENDED_FRACTION = 0.05
"""Of the peak of the learning rate: below it a loss may well stand still."""


def check_frozen_evaluation(trace: Trace) -> Iterator[Observation]:
    """Evaluations at different steps agree to the last digit."""
    name = next((name for name in ("loss", "cross_entropy") if len(trace.evals.get(name, ())) >= 2), None)
    if name is None:
        raise NotApplicable("two evaluations with a loss")
    losses = trace.evals[name].finite
    same = (np.diff(losses.values) == 0) & (np.diff(losses.steps) > 0) & _is_training(trace, losses.steps[1:])
    rows = trace.digests.get("rows_digest", {})
    same &= np.array([rows.get(a) == rows.get(b) for a, b in pairwise(losses.steps.tolist())], dtype=bool)
    if not same.any() or _last_digit(losses.values) > COARSE_FRACTION * np.abs(losses.values).max():
        return
    at = int(np.argmax(same))
    first, second = losses.steps[at : at + 2].tolist()
    evidence = f"evaluation {name} {losses.values[at]:.6g} at steps {first} and {second} alike"
    yield fail(f"{evidence}: {_what_froze(trace, first, second)}")


def _is_training(trace: Trace, steps: np.ndarray) -> np.ndarray:
    """Whether the learning rate is not at its end yet; yes where there is none, or it is 0 all along."""
    rate = trace.train.get("learning_rate")
    if rate is None or not len(rate.finite) or not rate.finite.values.any():
        return np.ones(len(steps), dtype=bool)
    rate = rate.finite
    return np.interp(steps, rate.steps, rate.values) > ENDED_FRACTION * rate.values.max()


def _last_digit(values: np.ndarray) -> float:
    """The place of the last digit that any value has, at least 1e-6."""
    return next((10.0**-digits for digits in range(6) if np.allclose(values, values.round(digits), 0, 1e-9)), 1e-6)


def _what_froze(trace: Trace, first: int, second: int) -> str:
    """Nothing learnt, or one result shown again; by the answers of two evaluations, else by what moves in training."""
    texts = trace.digests.get("texts_digest", {})
    if first in texts and second in texts and texts[first] != texts[second]:
        return "the student's answers differ, so that the loss is a kept result"
    for name, what in (("update_norm", "the weights' change"), ("learning_rate", "the learning rate")):
        figure = trace.train.get(name)
        if figure is not None and len(figure) >= 3:
            if figure.values.any():
                return f"{what} is not 0, so that the evaluation does not see the trained weights, or is a kept result"
            return f"{what} is 0 all along, so that nothing was learnt"
    return "either nothing is learnt, or the same result is shown again"


FROZEN_EVALUATION = Check(
    "KD203",
    "evaluation stands still",
    "evaluations at different steps agree to every digit",
    "Nothing is learnt, or the evaluation shows a kept result or other weights than the trained ones. Another "
    "objective at evaluation (KD210) moves its level, and cannot make it stand still.",
    "See whether the learning rate and the change of the weights are above 0, then what the evaluation reads.",
    POST_MORTEMS,
    check_frozen_evaluation,
)


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


PERPLEXITY_CAP = Check(
    "KD204",
    "perplexity is capped",
    "a perplexity of 485165195.41, which is e^20",
    "The trainer cuts the exponent, so that the figure no longer says anything; a cap at e^50 says no more.",
    "Take the perplexity from the plain cross-entropy of the labels, and do not cut it.",
    POST_MORTEMS,
    check_perplexity_cap,
)


def check_perplexity(trace: Trace) -> Iterator[Observation]:
    """Perplexity and cross-entropy disagree."""
    perplexity, entropy = trace.evaluated("perplexity"), trace.evaluated("cross_entropy")
    steps, of_perplexity, of_entropy = np.intersect1d(perplexity.steps, entropy.steps, return_indices=True)
    given, due = perplexity.values[of_perplexity], entropy.values[of_entropy]
    known = np.isfinite(given) & (given > 0) & np.isfinite(due)
    given, due = np.log(given[known]), due[known]
    wrong = np.flatnonzero(np.abs(given - due) > 0.01 * np.maximum(due, 1))
    if len(wrong):
        step = steps[known][wrong[0]]
        yield fail(
            f"step {step}: log of the perplexity {given[wrong[0]]:.4g}, cross-entropy {due[wrong[0]]:.4g}; they "
            f"differ at {len(wrong)} of {len(due)} evaluations"
        )


PERPLEXITY = Check(
    "KD205",
    "perplexity is not of the cross-entropy",
    "the log of the perplexity differs from the cross-entropy beside it",
    "It was taken from the total loss, which counts other terms too.",
    "Take the exponential of the labels' mean cross-entropy in nats.",
    "definition of perplexity",
    check_perplexity,
)


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
        yield warn(
            f"evaluation loss {seen:.5g} at step {evals.steps[0]}, training's {due:.5g} at step "
            f"{train.steps[nearest]}, where {', '.join(off)} have the weight 0"
        )


def _is_off(name: str, series: Series) -> bool:
    return name.startswith("weight/") and not series.values.any()


SAME_OBJECTIVE = Check(
    "KD210",
    "another objective at evaluation",
    "the evaluation's loss is far above training's",
    "Evaluation takes the weights of the end of a curriculum, training those of its step.",
    "Give the evaluation the same step as training.",
    POST_MORTEMS,
    check_same_objective,
)

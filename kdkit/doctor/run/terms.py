"""The terms of a loss, one by one: their scale, their share, their sum, and whether they are there."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kdkit.doctor.findings import Check, NotApplicable, Observation, fail, warn
from kdkit.doctor.sources import POST_MORTEMS
from kdkit.doctor.trace import Series, Trace

LARGEST_PART = 12.0
"""Of a term per counted item: a uniform guess among 150,000 tokens costs 11.9 nats."""
DOMINANT_SHARE = 0.5
"""Of the weighted total, from which on a term leads."""
DOMINANT_RATIO = 3.0
"""Of a term's share in the total to its share in the weights."""
LEAST_STEPS = 100
"""Before which terms have not found their sizes, and weights may move much from step to step."""
LEAST_ROWS = 4
"""Of a log, so that one batch says nothing."""
SUM_FRACTION = 0.2
"""Of the total: by how much its terms may miss it, since weights may move between two rows."""
MOST_SUMS = 200
"""Rows that are looked at, evenly over the log."""
VANISHED_FRACTION = 1e-6
"""Of a term's first values: below it the term has no gradient left to speak of."""
LEAST_ABSENT_ROWS = 10
"""Of other terms, logged after the last of one that is gone."""
COLLAPSED_BALANCE = 0.9
"""Of the load balance that is 0 where experts are used evenly and 1 where one takes all."""


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
        began_right = len(series) and series.values[0] <= LARGEST_PART  # what then grows is the training (KD208)
        if len(series) and not began_right and np.median(series.values) > LARGEST_PART:
            low, high = series.values.min(), series.values.max()
            yield fail(
                f"{name.removeprefix('part/')}: {low:.4g} to {high:.4g}, median {np.median(series.values):.4g}, steps "
                f"{series.steps[0]} to {series.steps[-1]}; a mean over tokens stays below {LARGEST_PART:g}"
            )


SCALE = Check(
    "KD207",
    "scale of a term",
    "a divergence of 30 to 40, or feature terms of 40 to 200",
    "A sum over tokens is divided by rows (batchmean), an error is not normalised, or logits of two tokenizers are "
    "compared id by id. The factor temperature squared belongs there (Hinton et al. 2015) and explains no such "
    "size.",
    "Average over counted tokens, compare features by cosine or relative to their variance, align vocabularies.",
    POST_MORTEMS,
    check_scale,
)


class Summed(NamedTuple):
    """A total beside the sum of its terms, at the last row that has all."""

    step: int
    total: float
    due: float
    miss: float
    """The least that any reading of the terms misses the totals by: median over rows, as a share."""


def check_dominance(trace: Trace) -> Iterator[Observation]:
    """A term makes far more of the total than its weight asks for."""
    weighted, weights = _weighted(trace), _weights(trace)
    if trace.last_step < LEAST_STEPS:
        raise NotApplicable(f"{LEAST_STEPS} steps")
    if len(weighted) < 2 or any(len(series) < LEAST_ROWS for series in weighted.values()):
        raise NotApplicable(f"{LEAST_ROWS} rows of two terms with their weights")
    late = {name: float(np.median(series.values[-(len(series) // 2) :])) for name, series in weighted.items()}
    given = {name: float(weights[name].values[-1]) for name in weighted}
    total, all_weights = sum(map(abs, late.values())), sum(given.values())
    if not total > 0 or not all_weights > 0:
        return
    for name, value in late.items():
        share = abs(value) / total
        if share >= DOMINANT_SHARE and share >= DOMINANT_RATIO * given[name] / all_weights > 0:
            yield warn(
                f"{name}: {share:.0%} of the weighted total in the second half of the log, {given[name]:g} of the "
                f"weights' {all_weights:g} ({given[name] / all_weights:.0%})"
            )


DOMINANCE = Check(
    "KD219",
    "one term dominates",
    "a term with a tenth of the weights makes more than half of the loss",
    "Its scale is not that of the others: a sum where they are means, or squared distances of states that are not "
    "normalised. The student then learns that term, whatever the weights say. A large raw value alone is no such "
    "thing: 40 times a weight of 0.1 are 4 % of a total of 101.",
    "Bring the terms to one scale (means over counted items, cosine distances), then choose weights.",
    POST_MORTEMS,
    check_dominance,
)


def check_sum(trace: Trace) -> Iterator[Observation]:
    """The terms, times their weights, are not the total beside them."""
    if trace.last_step < LEAST_STEPS:
        raise NotApplicable(f"{LEAST_STEPS} steps")
    sums = {
        when: found
        for when, figures in (("training", trace.train), ("evaluation", _with_temperature(trace)))
        if (found := _sums(figures, _weights(trace))) is not None
    }
    if not sums:
        raise NotApplicable("a total beside terms and their weights")
    for when, found in sums.items():
        if found.miss > SUM_FRACTION:
            evidence = f"{when} loss {found.total:.5g} at step {found.step}"
            yield fail(f"{evidence}, its terms times their weights make {found.due:.5g}")


def _with_temperature(trace: Trace) -> Mapping[str, Series]:
    """The figures of the evaluations, and the temperature that is logged beside those of training."""
    return {name: trace.train[name] for name in ("kd_temperature",) if name in trace.train} | dict(trace.evals)


def _sums(figures: Mapping[str, Series], weights: Mapping[str, Series]) -> Summed | None:
    """Of the rows that hold a total and every term that has a weight; None where there are none."""
    parts = {name.removeprefix("part/"): series.finite for name, series in figures.items() if name.startswith("part/")}
    needed = {name for name, series in weights.items() if series.values.any()}
    if "loss" not in figures or not needed or not needed <= set(parts):
        return None
    loss = figures["loss"].finite
    steps = np.unique(loss.steps)
    for name in needed:
        steps = steps[_has(parts[name], steps)]
    if not len(steps):
        return None
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, MOST_SUMS).astype(int))]
    total = _at(loss, steps)
    readings = _readings(figures, parts, weights, steps)
    misses = [np.abs(total - due) / np.maximum(np.abs(total), 1e-12) for due in readings]
    plain = sum(_at(parts[name], steps[-1:])[0] * _at(weights[name], steps[-1:])[0] for name in needed)
    return Summed(int(steps[-1]), float(total[-1]), float(plain), float(min(np.median(miss) for miss in misses)))


def _readings(
    figures: Mapping[str, Series], parts: Mapping[str, Series], weights: Mapping[str, Series], steps: np.ndarray
) -> Iterator[np.ndarray]:
    """What the total may be: by weights, with temperature squared, of terms logged as weighted, or one term."""
    zero = np.zeros(len(steps))
    found = {name: _at(parts[name], steps) for name in parts if len(parts[name])}
    weighted = {name: found[name] * _at(weights[name], steps) for name in found if name in weights}
    yield sum(weighted.values(), zero)
    yield sum(found.values(), zero)
    yield from found.values()
    if "kd_temperature" in figures:
        factor = _at(figures["kd_temperature"], steps) ** 2
        yield sum((value * (factor if name == "kd" else 1.0) for name, value in weighted.items()), zero)
    logged = [series.finite for name, series in figures.items() if name.startswith("weighted/")]
    if logged and all(len(series) for series in logged):
        yield sum((_at(series, steps) for series in logged), zero)


PARTS_SUM = Check(
    "KD220",
    "terms do not make the total",
    "a total of 101.4 where the terms times their weights make 18.9",
    "A term is counted that is not logged, a weight is applied twice or not at all, or the total is summed over "
    "micro-batches and the terms are not.",
    "Log every term that is in the total, and compute the total from what is logged.",
    POST_MORTEMS,
    check_sum,
)


def check_vanished(trace: Trace) -> Iterator[Observation]:
    """A term that has a weight is 0, or no longer logged."""
    parts = {name.removeprefix("part/"): series for name, series in trace.train.items() if name.startswith("part/")}
    if not parts:
        raise NotApplicable("the terms of the loss one by one")
    weights = _weights(trace)
    if "rollout/gold_fraction" in trace.train:
        parts = _labelled(parts, trace.train["rollout/gold_fraction"])
    for name, series in parts.items():
        if not len(series):
            continue
        if name not in weights or weights[name].values[-1] > 0:
            yield from _zeros(name, series.finite, is_weighted=name in weights)
            yield from _absence(name, series, parts)


def _labelled(parts: Mapping[str, Series], gold: Series) -> dict[str, Series]:
    """Where there are rows of the data, or else without the term that only they have: labels are not in own text."""
    kept = {name: _where(series, gold) for name, series in parts.items()}
    return kept if any(map(len, kept.values())) else {name: part for name, part in parts.items() if name != "lm"}


def _zeros(name: str, part: Series, *, is_weighted: bool) -> Iterator[Observation]:
    """The second half of the log lies at 0."""
    if len(part) < LEAST_ROWS:
        return
    first, late = np.abs(part.values[: len(part) // 4 or 1]).max(), np.abs(part.values[len(part) // 2 :]).max()
    if first > 0 and late < VANISHED_FRACTION * first:
        at = part.steps[len(part) // 2]
        yield fail(f"{name}: {first:.4g} at first, at most {late:.2g} from step {at} to {part.steps[-1]}")
    elif first == late == 0 and is_weighted:
        yield warn(f"{name}: 0 at all {len(part)} log rows, though its weight is not 0")


def _absence(name: str, part: Series, parts: Mapping[str, Series]) -> Iterator[Observation]:
    """Other terms go on being logged."""
    later = {other: int((series.steps > part.steps[-1]).sum()) for other, series in parts.items()}
    other = max(later, key=later.__getitem__)
    if later[other] >= max(LEAST_ABSENT_ROWS, len(part)):
        yield warn(
            f"{name}: last logged at step {part.steps[-1]} ({part.values[-1]:.4g}), while {other} is logged at "
            f"{later[other]} rows after it"
        )


VANISHED = Check(
    "KD224",
    "a term has vanished",
    "a term that has a weight is 0, or its figure ends while others go on",
    "It is no longer computed, or its inputs no longer hang on the student: batches without labels, a mask that leaves "
    "nothing, a detached tensor.",
    "Compute and log it at every step; count what it averages over; see whether its gradient reaches the student.",
    POST_MORTEMS,
    check_vanished,
)


def check_load_balance(trace: Trace) -> Iterator[Observation]:
    """Nearly all units go to one expert."""
    balance = trace.series("routing/load_balance", at_least=LEAST_ROWS).finite
    if len(balance) < LEAST_ROWS:
        raise NotApplicable(f"{LEAST_ROWS} load balances that are finite")
    late = float(np.median(balance.values[-(len(balance) // 2) :]))
    if late > COLLAPSED_BALANCE:
        yield warn(f"load balance {balance.values[0]:.3g} at step {balance.steps[0]}, {late:.3g} in the second half")


LOAD_BALANCE = Check(
    "KD225",
    "one expert takes all",
    "a load balance of nearly 1, where 0 is even",
    "The router picks one expert whatever the unit, so that the mixture is that expert alone. A small load balance is "
    "the good case: 0.0001 is the figure times its weight, or above its lowest value, and tells of no collapse.",
    "Raise the weight of the load balance, and let more experts take part; see whether the teacher itself uses one.",
    "Switch Transformers, arXiv:2101.03961, eq. 4; " + POST_MORTEMS,
    check_load_balance,
)


def _weights(trace: Trace) -> dict[str, Series]:
    """Term -> its weight over the run."""
    weights = {name: series.finite for name, series in trace.train.items() if name.startswith("weight/")}
    return {name.removeprefix("weight/"): series for name, series in weights.items() if len(series)}


def _weighted(trace: Trace) -> dict[str, Series]:
    """Term -> what it adds to the total: as logged, or the part times its weight."""
    found = {}
    for term, weight in _weights(trace).items():
        logged, part = trace.train.get(f"weighted/{term}"), trace.train.get(f"part/{term}")
        if not weight.values.any() or part is None:
            continue
        part = part.finite
        found[term] = (
            logged.finite if logged is not None else replace(part, values=part.values * _at(weight, part.steps))
        )
    return found


def _has(series: Series, steps: np.ndarray) -> np.ndarray:
    """Whether there is a value at each step."""
    if not len(series):
        return np.zeros(len(steps), dtype=bool)
    return series.steps[np.minimum(np.searchsorted(series.steps, steps), len(series) - 1)] == steps


def _at(series: Series, steps: np.ndarray) -> np.ndarray:
    """The last value up to each step, or the first one."""
    return series.values[np.maximum(np.searchsorted(series.steps, steps, side="right") - 1, 0)]


def _where(series: Series, share: Series) -> Series:
    """Where another figure is above 0."""
    kept = _at(share, series.steps) > 0 if len(share) else np.ones(len(series), dtype=bool)
    return Series(series.name, series.steps[kept], series.values[kept])

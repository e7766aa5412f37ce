"""The loops of backend "native" of the head pass, compiled by numba. Imported at the first call.

A row is one position: logits of the student z, of the teacher too. For each temperature, with q and p the two
distributions, every term adds to the row's g its weight times the derivative of its value by log q, and

    gradient by z = (g - q · Σ g) / temperature.

Three to four passes over a row that stays in the cache: largest logit, exponentials and their sum, the terms, the
gradient, which takes the logits' place. A row costs one exponential for each of its q and p and at most two logarithms.

LLVM vectorises these loops as they are written: one-dimensional slices from 0, few arrays at a time, sums in float32
over a tile that may be taken in any order, and in float64 over tiles.
"""

import math

import numpy as np

from kdkit.compiled import ANY_ORDER, compiled, part
from kdkit.losses._numerics import HALF, ONE, TILE, ZERO, exp, exponentials, log, sum_of, top_of
from kdkit.losses.compiled_forms import Kind

Array = np.ndarray
Terms = tuple[Array, Array, Array, Array, Array, Array]
"""Of t terms: kind, number of the temperature, its own two numbers, weight (t,); and weights by position (t, n)."""
Side = tuple[Array, Array, np.float32, np.float32, float]
"""Logits of a row; e^(logits · factor - top); factor, top, and the sum of the exponentials."""
Into = tuple[Array, Array, Array]
"""g; what takes the derivatives of a term without weight; the values of all terms (t,)."""
Sums = tuple[np.float32, np.float32]
"""Of the values, and of what was added to g."""

FORWARD_KL, REVERSE_KL, JSD, TVD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, ALPHA_BETA, LABELS = map(int, Kind)
"""The kinds of terms as plain numbers, which the compiler knows."""

LEAST_MASS = np.float32(1e-37)
"""A mixture below it belongs to an id to which neither side gives anything that float32 can tell."""


@part()
def _share(e: Array, z: Array, inverse: np.float32, top: np.float32, total: float, q: Array, log_q: Array) -> None:
    """Probabilities of a tile and their logarithms."""
    factor, log_total = np.float32(1 / total), np.float32(math.log(total))
    for k in range(len(e)):
        q[k] = e[k] * factor
        log_q[k] = (z[k] * inverse - top) - log_total


# Each takes a tile's q, p and their logarithms, its own two numbers and the weight of its derivative; adds that to g
# and returns the sums of the values and of what it added. An id that is -inf on both sides adds nothing.


@part(ANY_ORDER)
def _forward_kl(q: Array, p: Array, log_q: Array, log_p: Array, weight: np.float32, g: Array) -> Sums:
    value = added = ZERO
    for k in range(len(q)):
        ratio = ZERO if log_q[k] == log_p[k] else log_p[k] - log_q[k]
        value += p[k] * ratio
        derivative = -weight * p[k]
        g[k] += derivative
        added += derivative
    return value, added


@part(ANY_ORDER)
def _reverse_kl(q: Array, p: Array, log_q: Array, log_p: Array, weight: np.float32, g: Array) -> Sums:
    value = added = ZERO
    for k in range(len(q)):
        ratio = ZERO if log_q[k] == log_p[k] else log_q[k] - log_p[k]
        own = q[k] * ratio
        value += own
        derivative = weight * (own + q[k])
        g[k] += derivative
        added += derivative
    return value, added


@part(ANY_ORDER)
def _jsd(q: Array, p: Array, beta: np.float32, weight: np.float32, g: Array) -> Sums:
    value = added = ZERO
    rest = ONE - beta
    for k in range(len(q)):
        mix = beta * p[k] + rest * q[k]
        inverse = ZERO if mix < LEAST_MASS else ONE / mix
        of_teacher = beta * p[k] * log(p[k] * inverse)
        of_student = rest * q[k] * log(q[k] * inverse)
        value += of_teacher + of_student
        derivative = weight * of_student
        g[k] += derivative
        added += derivative
    return value, added


@part(ANY_ORDER)
def _tvd(q: Array, p: Array, weight: np.float32, g: Array) -> Sums:
    value = added = ZERO
    for k in range(len(q)):
        gap = q[k] - p[k]
        value += HALF * abs(gap)
        sign = HALF if gap > ZERO else (-HALF if gap < ZERO else ZERO)
        derivative = weight * sign * q[k]
        g[k] += derivative
        added += derivative
    return value, added


@part(ANY_ORDER)
def _skew_forward_kl(q: Array, p: Array, alpha: np.float32, weight: np.float32, g: Array) -> Sums:
    value = added = ZERO
    rest = ONE - alpha
    for k in range(len(q)):
        mix = alpha * p[k] + rest * q[k]
        over = ZERO if mix < LEAST_MASS else p[k] / mix
        value += p[k] * log(over)
        derivative = -weight * rest * q[k] * over
        g[k] += derivative
        added += derivative
    return value, added


@part(ANY_ORDER)
def _skew_reverse_kl(q: Array, p: Array, alpha: np.float32, weight: np.float32, g: Array) -> Sums:
    value = added = ZERO
    rest = ONE - alpha
    for k in range(len(q)):
        mix = rest * p[k] + alpha * q[k]
        over = ZERO if mix < LEAST_MASS else q[k] / mix
        log_over = log(over)
        value += q[k] * log_over
        derivative = weight * q[k] * (log_over + ONE - alpha * over)
        g[k] += derivative
        added += derivative
    return value, added


@part(ANY_ORDER)
def _alpha_beta(log_q: Array, log_p: Array, alpha: np.float32, beta: np.float32, weight: np.float32, g: Array) -> Sums:
    value = added = ZERO
    total = alpha + beta
    for k in range(len(log_q)):
        ratio = ZERO if log_q[k] == log_p[k] else log_q[k] - log_p[k]
        cross = exp(total * log_p[k] + beta * ratio)  # p^alpha q^beta
        of_teacher, of_student = exp(total * log_p[k]), exp(total * log_q[k])
        value += (alpha / total * of_teacher + beta / total * of_student - cross) / (alpha * beta)
        derivative = weight * (of_student - cross) / alpha
        g[k] += derivative
        added += derivative
    return value, added


@part(ANY_ORDER)
def _entropy(p: Array, log_p: Array) -> np.float32:
    """Of a tile; an id without mass adds nothing."""
    value = ZERO
    for k in range(len(p)):
        value += ZERO if p[k] == ZERO else -p[k] * log_p[k]
    return value


@part()
def _tile_of(
    kind: int, own: tuple[np.float32, np.float32], pair: tuple[Array, Array, Array, Array], weight: np.float32, g: Array
) -> Sums:
    """A divergence over a tile."""
    q, p, log_q, log_p = pair
    if kind == FORWARD_KL:
        return _forward_kl(q, p, log_q, log_p, weight, g)
    if kind == REVERSE_KL:
        return _reverse_kl(q, p, log_q, log_p, weight, g)
    if kind == JSD:
        return _jsd(q, p, own[0], weight, g)
    if kind == TVD:
        return _tvd(q, p, weight, g)
    if kind == SKEW_FORWARD_KL:
        return _skew_forward_kl(q, p, own[0], weight, g)
    if kind == SKEW_REVERSE_KL:
        return _skew_reverse_kl(q, p, own[0], weight, g)
    return _alpha_beta(log_q, log_p, own[0], own[1], weight, g)


@part()
def _gradient(g: Array, e: Array, share: np.float32, inverse: np.float32, is_first: bool, out: Array) -> None:
    """(g - e · share) · inverse, into `out` or on top of it."""
    if is_first:
        for k in range(len(g)):
            out[k] = (g[k] - e[k] * share) * inverse
    else:
        for k in range(len(g)):
            out[k] += (g[k] - e[k] * share) * inverse


@part()
def _spread(z: Array, inverse: np.float32, e: Array) -> tuple[np.float32, float]:
    """e^(z · inverse - top) into e; top and the sum."""
    top = top_of(z, inverse)
    return top, exponentials(z, inverse, top, e)


@part()
def _columns_of_kept(
    e: Array, z: Array, factor: np.float32, top: np.float32, total: float, ids: Array, q: Array, log_q: Array
) -> float:
    """The student over the teacher's kept ids and the rest as the last column; sum of the rest's exponentials."""
    log_total = math.log(total)
    for k in range(len(ids)):
        q[k], log_q[k] = np.float32(e[ids[k]] / total), np.float32(z[ids[k]] * factor - top) - np.float32(log_total)
    for k in range(len(ids)):
        e[ids[k]] = ZERO  # the rest is summed by itself: a difference from the total would lose it
    rest = sum_of(e)
    for k in range(len(ids)):
        e[ids[k]] = np.float32(q[k] * total)
    q[len(ids)] = np.float32(rest / total)
    log_q[len(ids)] = np.float32(math.log(rest) - log_total) if rest > 0 else np.float32(-np.inf)
    return rest


@part()
def _give_to_all(e: Array, ids: Array, of_columns: Array, rest: float, g: Array) -> None:
    """Each kept id gets its column's derivative, every other id its share of the last one's."""
    share = np.float32(of_columns[len(ids)] / rest) if rest > 0 else ZERO
    for k in range(len(e)):
        g[k] = e[k] * share
    for k in range(len(ids)):
        g[ids[k]] = of_columns[k]


@part()
def _weigh(terms: Terms, where: tuple[int, int], pair: tuple[Array, Array, Array, Array], into: Into) -> float:
    """All divergences of a temperature over some columns; the sum of what was added to g."""
    kinds, group_of, firsts, seconds, weights, token_weights = terms
    group, n = where
    added = np.float64(0)
    for t in range(len(kinds)):
        if group_of[t] != group or kinds[t] == LABELS:
            continue
        counts = weights[t] != ZERO
        own, weight = (firsts[t], seconds[t]), weights[t] * token_weights[t, n]
        value, more = _tile_of(kinds[t], own, pair, weight, into[0] if counts else into[1])
        into[2][t] += value
        added += more if counts else ZERO
    return added


@part()
def _compare_all(
    sides: tuple[Side, Side], tables: tuple[Array, Array], terms: Terms, where: tuple[int, int], into: Into
) -> tuple[float, float]:
    """All divergences of a temperature over all ids; what was added to g, and the teacher's entropy."""
    (z, e, factor, top, total), (z_teacher, e_teacher, teacher_factor, teacher_top, teacher_total) = sides
    probs, logs = tables
    g, unused, found = into
    added, entropy = np.float64(0), np.float64(0)
    for start in range(0, len(z), TILE):
        end = min(start + TILE, len(z))
        size = end - start
        q, p, log_q, log_p = probs[0][:size], probs[1][:size], logs[0][:size], logs[1][:size]
        _share(e[start:end], z[start:end], factor, top, total, q, log_q)
        _share(e_teacher[start:end], z_teacher[start:end], teacher_factor, teacher_top, teacher_total, p, log_p)
        added += _weigh(terms, where, (q, p, log_q, log_p), (g[start:end], unused[start:end], found))
        entropy += _entropy(p, log_p) if where[0] == 0 else ZERO
    return added, entropy


@part()
def _compare_kept(
    student: Side,
    known: tuple[Array, Array],
    tables: tuple[Array, Array],
    terms: Terms,
    where: tuple[int, int],
    into: Into,
) -> tuple[float, float, float]:
    """The same over the teacher's kept ids and the rest; also the sum of its probabilities, NaN if any is."""
    z, e, factor, top, total = student
    ids, log_probs = known
    g, unused, found = into
    size = len(ids) + 1
    q, p, log_q, of_columns = tables[0][0][:size], tables[0][1][:size], tables[1][0][:size], tables[1][1][:size]
    teacher_total = exponentials(log_probs, ONE, ZERO, p)
    rest = _columns_of_kept(e, z, factor, top, total, ids, q, log_q)
    of_columns[:] = ZERO
    added = _weigh(terms, where, (q, p, log_q, log_probs), (of_columns, unused[:size], found))
    _give_to_all(e, ids, of_columns, rest, g)
    return added, _entropy(p, log_probs), teacher_total


@part()
def _count_labels(student: Side, terms: Terms, where: tuple[int, int], targets: Array, into: Into) -> float:
    """All terms of labels of a temperature; what was added to g."""
    z, _, factor, top, total = student
    group, n = where
    kinds, group_of, _, _, weights, token_weights = terms
    added = 0.0
    for t in range(len(kinds)):
        if group_of[t] != group or kinds[t] != LABELS:
            continue
        target = targets[t, n]
        into[2][t] = math.log(total) - np.float64(np.float32(z[target] * factor - top))
        if weights[t] != ZERO:
            into[0][target] -= weights[t] * token_weights[t, n]
            added -= weights[t] * token_weights[t, n]
    return added


@compiled()
def solve(
    logits: Array,
    rows: tuple[int, int],
    teacher: tuple[Array, Array, Array],
    temperatures: tuple[Array, Array],
    terms: Terms,
    targets: Array,
    scratch: Array,
    values: Array,
    entropies: Array,
) -> None:
    """Values of all terms, and their gradient in the logits' place, for rows[0] to rows[1] - 1.

    Args:
        logits: (n, V) float32, the student's; written to where any weight is not 0.
        rows: first, and one past the last.
        teacher: logits (1, n, V) float32, or for each of G temperatures the log-probabilities of the kept ids and the
            rest (G, n, K + 1); factors on the logits (G,); and the kept ids (n, K), (n, 0) where all are.
        temperatures: for each the factor on the student's logits, and whether the teacher is looked at.
        terms: see `Terms`.
        targets: (t, n) int64, the ids of each term of labels.
        scratch: (5, V) float32, of the calling thread.
        values: (t, n) float32, written to: not yet weighted.
        entropies: (n,) float32, the teacher's entropy at the first temperature, written to where it was looked at.
    """
    known, teacher_factors, kept = teacher
    factors, needs_teacher = temperatures
    kinds, group_of, weights, num_kept = terms[0], terms[1], terms[4], kept.shape[1]
    e, e_teacher, g, unused, gradient = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    width = max(TILE, num_kept + 1)
    tables, found = (np.empty((2, width), np.float32), np.empty((2, width), np.float32)), np.empty(len(kinds))
    has_weight = np.any(weights != ZERO)
    for n in range(rows[0], rows[1]):
        z = logits[n]
        out = z if len(factors) == 1 else gradient
        for group in range(len(factors)):
            where, into = (group, n), (g, unused, found)
            top, total = _spread(z, factors[group], e)
            student = z, e, factors[group], top, total
            g[:] = ZERO
            found[:] = added = entropy = 0.0
            teacher_total = 1.0
            if needs_teacher[group] and num_kept > 0:
                own = kept[n], known[group, n]
                added, entropy, teacher_total = _compare_kept(student, own, tables, terms, where, into)
            elif needs_teacher[group]:
                teacher_top, teacher_total = _spread(known[0, n], teacher_factors[group], e_teacher)
                other = known[0, n], e_teacher, teacher_factors[group], teacher_top, teacher_total
                added, entropy = _compare_all((student, other), tables, terms, where, into)
            added += _count_labels(student, terms, where, targets, into)
            doubt = 0.0 * (total + teacher_total)  # NaN where nothing found can be right
            for t in range(len(kinds)):
                if group_of[t] == group:
                    values[t, n] = np.float32(found[t] + doubt)
            if group == 0 and needs_teacher[0]:
                entropies[n] = np.float32(entropy + doubt)
            if has_weight:
                _gradient(g, e, np.float32(added / total), factors[group], group == 0, out)
        if has_weight and len(factors) > 1:
            z[:] = gradient

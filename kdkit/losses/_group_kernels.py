"""The loops that put ids into groups, compiled by numba. Imported at the first call.

The members lie in the order of their groups, so that a group's mass is the sum of a stretch. A group of one is the
id's own log-probability to the last bit.
"""

import math

import numpy as np

from kdkit.compiled import compiled, part
from kdkit.losses._cross_kernels import SMALL_MASS, _probabilities, _take

Array = np.ndarray


@part()
def _log_sum(logprobs: Array, probabilities: Array) -> float:
    """Logarithm of the sum of a group's probabilities."""
    total = 0.0
    for k in range(len(probabilities)):
        total += np.float64(probabilities[k])
    if not total <= SMALL_MASS:  # NaN too
        return math.log(total)
    top = -np.inf
    for k in range(len(logprobs)):
        top = max(top, np.float64(logprobs[k]))
    if top == -np.inf:
        return top
    total = 0.0
    for k in range(len(logprobs)):
        total += math.exp(logprobs[k] - top)
    return top + math.log(total)


@part()
def _share(logprobs: Array, probabilities: Array) -> None:
    """Each id's share of its group's mass, in place of its probability; 0 where there is none."""
    total, top = 0.0, -np.inf
    for k in range(len(logprobs)):
        total += np.float64(probabilities[k])
        top = max(top, np.float64(logprobs[k]))
    if total <= SMALL_MASS and top > -np.inf:
        total = 0.0
        for k in range(len(logprobs)):
            probabilities[k] = np.float32(math.exp(logprobs[k] - top))
            total += np.float64(probabilities[k])
    for k in range(len(logprobs)):
        probabilities[k] = np.float32(probabilities[k] / total) if top > -np.inf else np.float32(0.0)


@compiled()
def group(
    rows: tuple[int, int],
    logprobs: Array,
    ids: tuple[Array, Array, Array],
    scratch: Array,
    out: Array,
) -> None:
    """Log mass of each group, then the free ids' own, for rows[0] to rows[1] - 1.

    Args:
        rows: first, and one past the last.
        logprobs: (N, V) float32.
        ids: members (M,) in the order of their groups, where each group begins (G + 1,), and the free ids (R,).
        scratch: (2, M) float32, of the calling thread.
        out: (N, G + R) float32, written to.
    """
    members, starts, free = ids
    num_groups = len(starts) - 1
    own, probabilities = scratch[0], scratch[1]
    for n in range(rows[0], rows[1]):
        row, to = logprobs[n], out[n]
        _take(row, members, own)
        _, is_valid = _probabilities(own, probabilities)
        for g in range(num_groups):
            start, end = starts[g], starts[g + 1]
            if end - start == 1:
                to[g] = own[start]
            elif is_valid:
                to[g] = np.float32(_log_sum(own[start:end], probabilities[start:end]))
            else:
                to[g] = np.float32(np.nan)
        _take(row, free, to[num_groups:])


@compiled()
def ungroup(
    rows: tuple[int, int],
    logprobs: Array,
    above: Array,
    ids: tuple[Array, Array, Array],
    scratch: Array,
    out: Array,
) -> None:
    """Gradient by the log-probabilities, (N, V), of what `group` wrote.

    Args:
        rows: first, and one past the last.
        logprobs: as in `group`.
        above: (N, G + R) float32, what comes from above.
        ids: as in `group`.
        scratch: (2, M) float32, of the calling thread.
        out: (N, V) float32, written to.
    """
    members, starts, free = ids
    num_groups = len(starts) - 1
    own, shares = scratch[0], scratch[1]
    for n in range(rows[0], rows[1]):
        row, to = logprobs[n], out[n]
        _take(row, members, own)
        _probabilities(own, shares)
        for g in range(num_groups):
            start, end = starts[g], starts[g + 1]
            if end - start == 1:
                to[members[start]] = above[n, g]
                continue
            _share(own[start:end], shares[start:end])
            for k in range(start, end):
                to[members[k]] = shares[k] * above[n, g]
        for k in range(len(free)):
            to[free[k]] = above[n, num_groups + k]

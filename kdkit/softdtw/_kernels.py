"""The loops of backend "native", compiled by numba. Imported at the first call: numba takes its time to load.

For one sample, with Z = exp(-R / gamma) the recursion of `kdkit.softdtw.reference` is

    Z[i, j] = 2^(-C[i, j] log2(e) / gamma) (Z[i-1, j] + Z[i, j-1] + Z[i-1, j-1]),  value = -gamma log Z[n-1, m-1].

Z is held as mantissa (float32 in [1, 2)) and exponent (int32): one polynomial a cell, neither log nor a
range to run out of. The shares of two of the predecessors in the sum are stored, and the way back is three
multiply-adds a cell, as in `kdkit.softdtw.anti_diagonal`.

Layout: the cells of an anti-diagonal do not need each other, so loops run along it, LANES at a time. Costs are
copied into that order for DEPTH anti-diagonals, few enough to stay in the first cache, and the alignment is
copied back likewise. A stored share has one slot for each admissible cell, an anti-diagonal being filled up
to whole lanes. The alignment leaves as the admissible cells row after row: "packed".

LLVM vectorises these loops as they are written: flat arrays, no slices, unsigned indices (a signed one might
count from the end), whole lanes, at most one reduction. `tests/benchmarks/test_bench_softdtw.py` tells if not.
"""

import math

import numpy as np
from numba import njit
from numpy.polynomial import Chebyshev, Polynomial

from kdkit.compiled import compiled

Array = np.ndarray
Plan = tuple[Array, Array, Array]
"""Of each row or anti-diagonal: first and last admissible index, and a slot."""

LANES = 8
DEPTH = 16
GUARD = 4 * LANES
"""Slots before and after the stored shares that the way back may read; they hold 0."""

# |costs| of a path must sum to less than 2^28 in units of gamma log 2; what nothing reaches lies far below.
MAX_TOTAL = 2.0**28
UNREACHED = np.int32(-(2**29))
NOTHING = np.int32(-(2**30))

_fit = Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1])
EXP2 = tuple(np.float32(c) for c in _fit.coef)
"""2^x on [-0.5, 0.5], lowest power first; relative error 3e-9."""
ROUNDING = np.float32(1.5 * 2**23)
"""x + ROUNDING has the whole number next to x in its lowest bits, for |x| < 2^22."""
ROUNDING_BITS = np.int32(0x4B400000)
MANTISSA_BITS = np.int32(0x7FFFFF)
ONE_BITS = np.int32(0x3F800000)
LEAST_SHARE = np.int32(127 - 32)
"""Predecessors 2^-32 below the largest count as 0: float32 cannot tell, and no product becomes denormal."""
LEAST_MASS = np.float32(1e-24)


@njit(inline="always")
def _diagonal_limits(a: int, n: int, m: int, band: int) -> tuple[int, int]:
    """First and last admissible row of anti-diagonal a: `kdkit.softdtw.band.band_limits`; band 0 = none."""
    first, last = max(0, a - m + 1), min(n - 1, a)
    if band > 0 and n + m > 2:
        slack, steps, centre = band * (max(n, m) - 1), n + m - 2, a * (n - 1)
        first = max(first, -((slack - centre) // steps))
        last = min(last, (slack + centre) // steps)
    return first, last


@njit(inline="always")
def _row_limits(i: int, n: int, m: int, band: int) -> tuple[int, int]:
    """First and last admissible column of row i."""
    first, last = 0, m - 1
    if band > 0 and n > 1:
        slack, centre = band * (max(n, m) - 1), i * (m - 1)
        first = max(first, -((slack - centre) // (n - 1)))
        last = min(last, (slack + centre) // (n - 1))
    return first, last


@njit(inline="always")
def _power_of_two(exponent: np.int32) -> np.float32:
    """2^exponent for a whole number <= 0, 0 below 2^-32."""
    biased = np.int32(exponent + np.int32(127))
    biased = biased if biased > LEAST_SHARE else np.int32(0)
    return np.int32(biased << np.int32(23)).view(np.float32)


@compiled()
def count_cells(lengths_n: Array, lengths_m: Array, band: int, starts: Array) -> None:
    """Into starts (B + 1,): where each sample's packed cells begin."""
    starts[0] = 0
    for b in range(len(lengths_n)):
        n, m = lengths_n[b], lengths_m[b]
        if b > 0 and n == lengths_n[b - 1] and m == lengths_m[b - 1]:
            starts[b + 1] = 2 * starts[b] - starts[b - 1]
            continue
        count = 0
        if m > 0:
            for i in range(n):
                first, last = _row_limits(i, n, m, band)
                count += last - first + 1
        starts[b + 1] = starts[b] + count


def num_slots(lengths_n: Array, lengths_m: Array, counts: Array, keep: bool) -> int:
    """Slots that each of the two shares needs for the largest sample, `counts` being the samples' cells."""
    needed = counts + LANES * (lengths_n + lengths_m) if keep else lengths_n + LANES
    return 2 * GUARD + int(needed.max(initial=0))


@compiled()
def _plan_rows(n: int, m: int, band: int) -> Plan:
    """Of each row: first and last admissible column, and the packed slot that column 0 has or would have."""
    first, last, slot = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    count = 0
    for i in range(n):
        first[i], last[i] = _row_limits(i, n, m, band)
        slot[i] = count - first[i]
        count += last[i] - first[i] + 1
    return first, last, slot


@compiled()
def _plan_diagonals(n: int, m: int, band: int, keep: bool) -> Plan:
    """Of each anti-diagonal: first and last admissible row, and the share slot of the first; all share one
    if they need not be kept."""
    count = n + m - 1
    first, last, slot = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    total = GUARD
    for a in range(count):
        first[a], last[a] = _diagonal_limits(a, n, m, band)
        slot[a] = total
        if keep:
            total += (last[a] - first[a] + LANES) // LANES * LANES
    return first, last, slot


@compiled()
def _skew(cost: Array, rows: Plan, a: int, limits: tuple[int, int], block: Array) -> None:
    """The costs of rows limits[0] to limits[1] on anti-diagonals a to a + DEPTH - 1, one of them a row of block."""
    first, last, _ = rows
    for i in range(limits[0], limits[1] + 1):
        j = a - i
        if first[i] <= j and j + DEPTH - 1 <= last[i]:
            row = cost[i, j : j + DEPTH]
            for d in range(DEPTH):
                block[d, i] = row[d]
        else:
            for column in range(max(first[i], j), min(last[i], j + DEPTH - 1) + 1):
                block[column - j, i] = cost[i, column]


@compiled()
def _unskew(block: Array, rows: Plan, a: int, limits: tuple[int, int], cells: Array) -> None:
    """The way back from block to the packed cells."""
    first, last, slot = rows
    for i in range(limits[0], limits[1] + 1):
        j = a - i
        if first[i] <= j and j + DEPTH - 1 <= last[i]:
            row = cells[slot[i] + j : slot[i] + j + DEPTH]
            for d in range(DEPTH):
                row[d] = block[d, i]
        else:
            for column in range(max(first[i], j), min(last[i], j + DEPTH - 1) + 1):
                cells[slot[i] + column] = block[column - j, i]


@compiled()
def _forward(
    cost: Array, rows: Plan, diagonals: Plan, scale: float, share_up: Array, share_left: Array
) -> tuple[np.float32, np.int32, bool]:
    """Mantissa and exponent of the last cell's Z, and whether a cost did not fit the format.

    `scale` is log2(e) / gamma.
    """
    first, last, slot = diagonals
    n, num_diagonals = len(rows[0]), len(first)
    zero, one, lanes = np.uint64(0), np.uint64(1), np.uint64(LANES)
    size, width = np.uint64(n + 2 * LANES), np.uint64((n + 2 * LANES) // 16 * 16 + 32)
    block = np.empty((DEPTH, np.int64(width)), np.float32)
    costs = block.reshape(block.size)
    # Three anti-diagonals, each with row i in slot i + 1. The virtual origin (-1, -1) has Z = 1.
    mantissas, exponents = np.ones(3 * size, np.float32), np.full(3 * size, NOTHING, np.int32)
    before, last_one, current = zero, size, size + size
    exponents[0] = 0
    exact = np.float32(scale)
    # The whole part may come from a slightly other product: written twice the same, it would be rounded
    # before the subtraction, where a fused multiply-add keeps the fraction exact.
    rough = np.float32(exact * np.float32(1 + 2**-22))
    limit = np.float32(min(2.0**22, MAX_TOTAL / num_diagonals))
    misfit = np.int32(0)
    for a in range(num_diagonals):
        if a % DEPTH == 0:
            _skew(cost, rows, a, (first[a], last[min(a + DEPTH, num_diagonals) - 1]), block)
        row, end = np.uint64(first[a]), np.uint64(last[a]) + one
        here, fill = np.uint64(a % DEPTH) * width + row, np.uint64(a % DEPTH) * width + end
        for k in range(lanes):
            costs[fill + k] = np.float32(np.inf)
        diagonal, up, left, own = before + row, last_one + row, last_one + row + one, current + row + one
        out = np.uint64(slot[a])
        misfits = np.int32(0)
        for k in range((end - row + lanes - one) & np.uint64(-LANES & 0xFFFFFFFF)):
            e_diagonal, e_up, e_left = exponents[diagonal + k], exponents[up + k], exponents[left + k]
            e_most = max(max(e_diagonal, e_up), e_left)
            z_diagonal = mantissas[diagonal + k] * _power_of_two(e_diagonal - e_most)
            z_up = mantissas[up + k] * _power_of_two(e_up - e_most)
            z_left = mantissas[left + k] * _power_of_two(e_left - e_most)
            total = z_diagonal + z_up + z_left
            to_up, to_left = z_up / total, z_left / total
            share_up[out + k] = to_up
            # Where nothing comes from the third, the two must leave exactly nothing for it.
            share_left[out + k] = to_left if z_diagonal > np.float32(0.0) else np.float32(1.0) - to_up

            c = costs[here + k]
            power = c * rough
            fits = abs(power) < limit
            misfits = np.int32(misfits | np.int32((not fits) & (c != np.float32(np.inf))))
            rounded = (power if fits else np.float32(0.0)) + ROUNDING
            x = (rounded - ROUNDING) - c * exact
            x = x if fits else np.float32(0.0)
            p = ((EXP2[6] * x + EXP2[5]) * x + EXP2[4]) * x + EXP2[3]
            p = ((p * x + EXP2[2]) * x + EXP2[1]) * x + EXP2[0]
            bits = np.float32(total * p).view(np.int32)
            whole = np.int32(np.float32(rounded).view(np.int32) - ROUNDING_BITS)
            exponent = np.int32(np.int32(e_most - whole) + np.int32(np.int32(bits >> np.int32(23)) - np.int32(127)))
            mantissas[own + k] = np.int32((bits & MANTISSA_BITS) | ONE_BITS).view(np.float32)
            exponents[own + k] = exponent if fits else NOTHING
        misfit = np.int32(misfit | misfits)
        exponents[current + row] = NOTHING
        before, last_one, current = last_one, current, before
    end = last_one + np.uint64(n)
    return mantissas[end], exponents[end], misfit != 0


@compiled()
def _backward(rows: Plan, diagonals: Plan, share_up: Array, share_left: Array, cells: Array) -> None:
    """Expected alignment of a sample that some path crosses, packed."""
    first, last, slot = diagonals
    n, num_diagonals = len(rows[0]), len(first)
    one, lanes = np.uint64(1), np.uint64(LANES)
    width = np.uint64((n + 2 * LANES) // 16 * 16 + 32)
    # Two rows more, for the two anti-diagonals that follow those of the block.
    block = np.zeros((DEPTH + 2, np.int64(width)), np.float32)
    mass = block.reshape(block.size)
    spare = np.uint64(DEPTH) * width
    after, second = spare, spare + width
    for start in range((num_diagonals - 1) // DEPTH * DEPTH, -1, -DEPTH):
        stop = min(start + DEPTH, num_diagonals)
        for a in range(stop - 1, start - 1, -1):
            current = np.uint64(a - start) * width
            row, end = np.uint64(first[a]), np.uint64(last[a]) + one
            if a == num_diagonals - 1:
                mass[current + row] = np.float32(1.0)
            else:
                b, c = a + 1, min(a + 2, num_diagonals - 1)
                to_left = np.uint64(slot[b] + first[a] - first[b])
                to_up, to_diagonal = to_left + one, np.uint64(slot[c] + first[a] - first[c] + 1)
                right, below = after + row, after + row + one
                across, own = second + row + one, current + row
                for k in range((end - row + lanes - one) & np.uint64(-LANES & 0xFFFFFFFF)):
                    kept = np.float32(1.0) - share_up[to_diagonal + k] - share_left[to_diagonal + k]
                    e = mass[across + k] * max(kept, np.float32(0.0))
                    e += mass[below + k] * share_up[to_up + k] + mass[right + k] * share_left[to_left + k]
                    mass[own + k] = e if e > LEAST_MASS else np.float32(0.0)
            for k in range(lanes):
                mass[current + end + k] = np.float32(0.0)
            second, after = after, current
        _unskew(block, rows, start, (first[start], last[stop - 1]), cells)
        for k in range(width):
            newest, older = mass[after + k], mass[second + k]
            mass[spare + k], mass[spare + width + k] = newest, older
        after, second = spare, spare + width


@compiled()
def _solve_sample(
    cost: Array, n: int, m: int, band: int, gamma: float, shares: Array, cells: Array
) -> tuple[float, bool]:
    """Value of one sample, and whether a cost did not fit; writes the packed alignment if there is room for it."""
    rows, diagonals = _plan_rows(n, m, band), _plan_diagonals(n, m, band, len(cells) > 0)
    half = len(shares) // 2
    share_up, share_left = shares[:half], shares[half:]
    for k in range(GUARD):
        share_up[k] = share_left[k] = np.float32(0.0)
    mantissa, exponent, misfit = _forward(cost, rows, diagonals, math.log2(math.e) / gamma, share_up, share_left)
    if exponent < UNREACHED:
        cells[:] = np.float32(0.0)
        return np.inf, misfit
    if len(cells) > 0 and not misfit:
        end = diagonals[2][n + m - 2] + LANES
        for k in range(end, end + GUARD):
            share_up[k] = share_left[k] = np.float32(0.0)
        _backward(rows, diagonals, share_up, share_left, cells)
    return -gamma * math.log(2.0) * (exponent + math.log2(np.float64(mantissa))), misfit


@compiled()
def solve(
    cost: Array,
    lengths_n: Array,
    lengths_m: Array,
    band: int,
    gamma: float,
    starts: Array,
    begin: int,
    end: int,
    shares: Array,
    values: Array,
    misfits: Array,
    cells: Array,
) -> None:
    """Values and packed alignments of samples begin to end - 1.

    Args:
        cost: (B, N, M) float32.
        band: 0 = none.
        starts: of `count_cells`.
        shares: float32 workspace, twice `num_slots` long.
        values: (B,) float64, written to; 0 for an empty sample.
        misfits: (B,) bool, written to: a cost was NaN, -inf or too large for the number format, and what
            was found is nothing to go by.
        cells: written to; length 0 if the alignment is not wanted.
    """
    for b in range(begin, end):
        own = cells[starts[b] : starts[b + 1]] if len(cells) > 0 else cells
        values[b], misfits[b] = 0.0, False
        if starts[b + 1] > starts[b]:
            values[b], misfits[b] = _solve_sample(cost[b], lengths_n[b], lengths_m[b], band, gamma, shares, own)


@compiled()
def pack_sample(alignment: Array, n: int, m: int, band: int, cells: Array) -> None:
    """The admissible cells of a (N, M) alignment, packed."""
    first, last, slot = _plan_rows(n, m, band)
    for i in range(n):
        for j in range(first[i], last[i] + 1):
            cells[slot[i] + j] = alignment[i, j]


@compiled()
def _spread_sample(cells: Array, n: int, m: int, band: int, factor: np.float32, out: Array) -> None:
    """One sample of `spread`."""
    first, last, slot = _plan_rows(n, m, band)
    zero = np.float32(0.0)
    for i in range(n):
        row, inside = out[i], cells[slot[i] + first[i] : slot[i] + last[i] + 1]
        row[: first[i]] = zero
        row[last[i] + 1 :] = zero
        target = row[first[i] : last[i] + 1]
        for k in range(len(inside)):
            cell = inside[k]
            target[k] = zero if cell == zero else cell * factor
    out[n:] = zero


@compiled()
def spread(
    cells: Array,
    lengths_n: Array,
    lengths_m: Array,
    band: int,
    factors: Array,
    starts: Array,
    begin: int,
    end: int,
    out: Array,
) -> None:
    """Packed cells of samples begin to end - 1 times their factor into out (B, N, M); exactly 0 where a cell is 0."""
    for b in range(begin, end):
        if starts[b + 1] > starts[b]:
            _spread_sample(cells[starts[b] : starts[b + 1]], lengths_n[b], lengths_m[b], band, factors[b], out[b])
        else:
            out[b] = np.float32(0.0)

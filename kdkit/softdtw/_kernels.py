"""The loops of backend "native", compiled by numba. Imported at the first call: numba takes its time to load.

For one sample, with Z = exp(-R / gamma) the recursion of `kdkit.softdtw.reference` is

    Z[i, j] = 2^(-C[i, j] log2(e) / gamma) (Z[i-1, j] + Z[i, j-1] + Z[i-1, j-1]),  value = -gamma log Z[n-1, m-1].

Z is held as mantissa (float32 in [1, 2)) and exponent (int32): one polynomial a cell, neither log nor a
range to run out of. The shares of two of the predecessors in the sum are stored, and the way back is three
multiply-adds a cell, as in `kdkit.softdtw.anti_diagonal`.

Layout: a sample is taken in strips of HEIGHT rows, one after the other; what passes between two of them is a row.
The cells of an anti-diagonal of a strip do not need each other, so loops run along it, LANES at a time. Costs are
copied into that order for DEPTH anti-diagonals, few enough to stay in the first cache, and the alignment is
copied back likewise. A stored share has one slot for each admissible cell, an anti-diagonal being filled up to whole
lanes. The shares of a long sample are stored for one strip alone, and computed a second time on the way back. The
alignment leaves as the admissible cells row after row: "packed".

Arrays are flat and indices unsigned: numba asks of a signed one whether it counts from the end.
"""

import math

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from kdkit._turns import finish, next_turn
from kdkit.compiled import compiled, part
from kdkit.softdtw._lanes import LANES, Lanes, any_of, bits_of, constant, every, floats_of, load, store, where
from kdkit.softdtw._tiles import TILE, fetch_to_read, fetch_to_write, put_part, put_tile, take_part, take_tile

Array = np.ndarray
Rows = tuple[Array, Array, Array]
"""Of each row: first and last admissible column, and the packed slot that column 0 has or would have."""
Edge = tuple[Array, Array]
"""Mantissas and exponents of Z along a row, those of column j at j + 1; exponent NOTHING where no path comes from."""
Strip = tuple[int, int, int, Array, Array, Array, Array, Array]
"""Its first row, its height and the column of its first anti-diagonal's one cell; of each anti-diagonal: first and
last admissible row, counted from the first, and the slot of the first one's shares; and of each row, and TILE more: its
first anti-diagonal and the one past its last."""

DEPTH = 16
HEIGHT = 128
WIDTH = HEIGHT + 4 * LANES
"""Of a line of costs or masses, with room for whole lanes."""
GUARD = 4 * LANES
"""Slots after the stored shares that the way back may read; they hold 0."""

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
SIGNLESS_BITS, MANTISSA_BITS, ONE_BITS = np.int32(0x7FFFFFFF), np.int32(0x7FFFFF), np.int32(0x3F800000)
BIAS, EXPONENT_SHIFT = np.int32(127), np.int32(23)
LEAST_SHARE = np.int32(BIAS - 32)
"""Predecessors 2^-32 below the largest count as 0: float32 cannot tell, and no product becomes denormal."""
LEAST_MASS = np.float32(1e-24)
ZERO, ONE, INFINITY, NO_BITS = np.float32(0), np.float32(1), np.float32(np.inf), np.int32(0)


@part()
def _larger(x: Lanes, y: Lanes) -> Lanes:
    return where(x > y, x, y)


@part()
def _power_of_two(biased: Lanes, least: Lanes, shift: Lanes, zero: Lanes) -> Lanes:
    """The float32 of this biased exponent; 0 where it is not above the least."""
    return floats_of(where(biased > least, biased << shift, zero))


@part()
def _plan_rows(n: int, m: int, band: int) -> Rows:
    first, last, slot = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    count = 0
    for i in range(n):
        last[i] = m - 1
        if band > 0 and n > 1:
            last[i] = min(m - 1, (band * (max(n, m) - 1) + i * (m - 1)) // (n - 1))
    for i in range(n):
        first[i] = m - 1 - last[n - 1 - i]  # the band looks the same from its other end
        slot[i] = count - first[i]
        count += last[i] - first[i] + 1
    return first, last, slot


@part()
def _count_slots(rows: Rows) -> tuple[int, int]:
    """Slots that the shares of all strips need, and those of the largest, at most."""
    first, last, slot = rows
    total, largest = 0, 0
    for top in range(0, len(first), HEIGHT):
        bottom = min(top + HEIGHT, len(first)) - 1
        cells = slot[bottom] + last[bottom] + 1 - slot[top] - first[top]
        needed = cells + LANES * (bottom - top + last[bottom] - first[top] + 1)
        total, largest = total + needed, max(largest, needed)
    return total, largest


@compiled()
def plan_batch(lengths_n: Array, lengths_m: Array, band: int, most: int, starts: Array) -> int:
    """Into starts (B + 1,): where each sample's packed cells begin; the slots that any of them needs for a share, a
    sample that needs more than `most` being stored strip by strip."""
    starts[0] = 0
    needed = 0
    for b in range(len(lengths_n)):
        n, m = lengths_n[b], lengths_m[b]
        if b > 0 and n == lengths_n[b - 1] and m == lengths_m[b - 1]:
            starts[b + 1] = 2 * starts[b] - starts[b - 1]
            continue
        starts[b + 1] = starts[b]
        if n > 0 and m > 0:
            rows = _plan_rows(n, m, band)
            starts[b + 1] += rows[2][n - 1] + rows[1][n - 1] + 1
            total, largest = _count_slots(rows)
            needed = max(needed, total if total <= most else largest)
    return needed + GUARD


@part()
def _plan_diagonals(m: int, rows: Rows) -> tuple[Array, Array]:
    """First and last admissible row of each anti-diagonal."""
    of_row_first, of_row_last, _ = rows
    n = len(of_row_first)
    count = n + m - 1
    first, last = np.empty(count, np.int64), np.empty(count, np.int64)
    top = bottom = 0
    for a in range(count):
        while top + of_row_last[top] < a:
            top += 1
        while bottom + 1 < n and bottom + 1 + of_row_first[bottom + 1] <= a:
            bottom += 1
        first[a], last[a] = top, bottom
    return first, last


@part()
def _plan_strip(top: int, rows: Rows, diagonals: tuple[Array, Array], start: int, keep: bool) -> Strip:
    """The strip that begins with row `top`, its shares from slot `start` on; all share one unless they are kept."""
    height = min(HEIGHT, len(rows[0]) - top)
    column, bottom = rows[0][top], top + height - 1
    count = bottom + rows[1][bottom] - top - column + 1
    first, last, slot = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count + 1, np.int64)
    slot[0] = start
    for d in range(count):
        a = top + column + d
        first[d], last[d] = max(diagonals[0][a], top) - top, min(diagonals[1][a], bottom) - top
        slot[d + 1] = slot[d] + ((last[d] - first[d] + LANES) // LANES * LANES if keep else 0)
    begins, ends = np.full(height + TILE, count, np.int64), np.full(height + TILE, count, np.int64)
    for r in range(height):
        begins[r], ends[r] = rows[0][top + r] - column + r, rows[1][top + r] - column + r + 1
    return top, height, column, first, last, slot, begins, ends


@part()
def _turn(array: Array, bases: Array, strip: Strip, begin: int, end: int, block: Array, back: bool) -> None:
    """The strip's anti-diagonals begin to end - 1, at most DEPTH, from its rows into lines of block, or back.

    `bases` say where in `array` the strip's rows, and TILE more, would have their cell of its first anti-diagonal. A
    line has WIDTH numbers.
    """
    _, _, _, first, last, _, begins, ends = strip
    for r in range(first[begin], last[end - 1] + 1, TILE):
        for d in range(0, DEPTH, TILE):
            shift, at = begin + d, d * WIDTH + r
            whole = begins[r + TILE - 1] <= shift and shift + TILE <= ends[r]
            if whole and back:
                put_tile(array, bases, begins, ends, r, shift, block, at, WIDTH)
            elif whole:
                take_tile(array, bases, begins, ends, r, shift, block, at, WIDTH)
            elif back:
                put_part(array, bases, begins, ends, r, shift, block, at, WIDTH)
            else:
                take_part(array, bases, begins, ends, r, shift, block, at, WIDTH)


@part()
def _forward(
    cost: Array,
    rows: Rows,
    strip: Strip,
    scales: tuple[float, float],
    above: Edge,
    below: Edge,
    share_up: Array,
    share_left: Array,
) -> bool:
    """Z along the strip's last row from that along the row above it, and the shares; whether a cost did not fit.

    `scales` are log2(e) / gamma and the largest cost in units of gamma log 2.
    """
    top, height, column, first, last, slot, _, _ = strip
    bases, given = np.empty(height + TILE, np.int64), cost.reshape(cost.size)
    for r in range(height):
        bases[r] = (top + r) * cost.shape[1] + column - r
    zero, one, lanes = np.uint64(0), np.uint64(1), np.uint64(LANES)
    size, width = np.uint64(HEIGHT + 2 * LANES), np.uint64(WIDTH)
    costs = np.empty(DEPTH * WIDTH, np.float32)
    # Three anti-diagonals, each with row i in slot i + 1; in slot 0 the row above.
    mantissas, exponents = np.ones(3 * size, np.float32), np.full(3 * size, NOTHING, np.int32)
    before, last_one, current = zero, size, size + size
    mantissas[before], exponents[before] = above[0][column], above[1][column]
    mantissas[last_one], exponents[last_one] = above[0][column + 1], above[1][column + 1]
    # The whole part may come from a slightly other product: written twice the same, it would be rounded
    # before the subtraction, where a fused multiply-add keeps the fraction exact.
    exact = np.float32(scales[0])
    to_powers, to_rough_powers = every(exact), every(np.float32(exact * np.float32(1 + 2**-22)))
    limit, infinite, rounding = every(np.float32(scales[1])), constant(INFINITY), constant(ROUNDING)
    zeros, ones, nothing = every(ZERO), constant(ONE), constant(NOTHING)
    bias, least, shift, no_bits = constant(BIAS), constant(LEAST_SHARE), every(EXPONENT_SHIFT), every(NO_BITS)
    rounding_bits, signless_bits = constant(ROUNDING_BITS), constant(SIGNLESS_BITS)
    mantissa_bits, one_bits = constant(MANTISSA_BITS), constant(ONE_BITS)
    c6, c5, c4 = constant(EXP2[6]), constant(EXP2[5]), constant(EXP2[4])
    c3, c2, c1, c0 = constant(EXP2[3]), constant(EXP2[2]), constant(EXP2[1]), constant(EXP2[0])
    none = zeros > zeros
    misfits = none
    for d in range(len(first)):
        if d % DEPTH == 0:
            stop = min(d + DEPTH, len(first))
            _turn(given, bases, strip, d, stop, costs, False)
            for r in range(first[stop - 1], last[stop - 1] + 1):
                fetch_to_read(given, bases[r] + stop + DEPTH - 1)
        row, end = np.uint64(first[d]), np.uint64(last[d]) + one
        line = np.uint64(d % DEPTH) * width
        here, out = line + row, np.uint64(slot[d])
        store(costs, line + end, infinite)
        diagonal, up, left, own = before + row, last_one + row, last_one + row + one, current + row + one
        for k in range(zero, end - row, lanes):
            e_diagonal, e_up, e_left = load(exponents, diagonal + k), load(exponents, up + k), load(exponents, left + k)
            base = _larger(_larger(e_diagonal, e_up), e_left) - bias
            z_diagonal = load(mantissas, diagonal + k) * _power_of_two(e_diagonal - base, least, shift, no_bits)
            z_up = load(mantissas, up + k) * _power_of_two(e_up - base, least, shift, no_bits)
            z_left = load(mantissas, left + k) * _power_of_two(e_left - base, least, shift, no_bits)
            total = z_diagonal + z_up + z_left
            inverse = ones / total
            # Where nothing comes from one of the three, the other two must leave exactly nothing for it.
            to_up = where(z_left + z_diagonal > zeros, z_up * inverse, ones)
            store(share_up, out + k, to_up)
            store(share_left, out + k, where(z_diagonal > zeros, z_left * inverse, ones - to_up))

            c = load(costs, here + k)
            power = c * to_rough_powers
            fits = limit > floats_of(bits_of(power) & signless_bits)
            misfits = misfits | where(fits, none, c != infinite)
            rounded = where(fits, power, zeros) + rounding
            x = where(fits, (rounded - rounding) - c * to_powers, zeros)
            p = ((c6 * x + c5) * x + c4) * x + c3
            p = ((p * x + c2) * x + c1) * x + c0
            bits = bits_of(total * p)
            exponent = (base + rounding_bits - bits_of(rounded)) + (bits >> shift)
            store(mantissas, own + k, floats_of((bits & mantissa_bits) | one_bits))
            store(exponents, own + k, where(fits, exponent, nothing))
        if first[d] == 0:
            mantissas[current], exponents[current] = above[0][column + d + 2], above[1][column + d + 2]
        else:
            exponents[current + row] = NOTHING
        if last[d] == height - 1:
            bottom, there = current + np.uint64(height), column + d - height + 2
            below[0][there], below[1][there] = mantissas[bottom], exponents[bottom]
        before, last_one, current = last_one, current, before
    for k in range(slot[len(first)], slot[len(first)] + GUARD):
        share_up[k] = share_left[k] = ZERO
    return any_of(misfits)


@part()
def _backward(
    rows: Rows, strip: Strip, below: Array, above: Array, share_up: Array, share_left: Array, cells: Array
) -> None:
    """Expected alignment of a strip, packed, from the mass that its last row's cells get from below; and that which
    those above it get. Both have column j at j + 1; `above` holds zeros."""
    top, height, column, first, last, slot, _, _ = strip
    bases = np.empty(height + TILE, np.int64)
    for r in range(height):
        bases[r] = rows[2][top + r] + column - r
    count = len(first)
    zero, one, lanes, width = np.uint64(0), np.uint64(1), np.uint64(LANES), np.uint64(WIDTH)
    zeros, ones, least = every(ZERO), constant(ONE), constant(LEAST_MASS)
    # Two rows more, for the two anti-diagonals that follow those of the block.
    mass = np.zeros((DEPTH + 2) * WIDTH, np.float32)
    spare = np.uint64(DEPTH) * width
    after, second = spare, spare + width
    for start in range((count - 1) // DEPTH * DEPTH, -1, -DEPTH):
        stop = min(start + DEPTH, count)
        # To wait for these cache lines later, two for a row, would double the time of 1,024 x 1,024.
        for r in range(first[start], last[stop - 1] + 1):
            fetch_to_write(cells, bases[r] + start)
            fetch_to_write(cells, bases[r] + start + DEPTH - 1)
        for d in range(stop - 1, start - 1, -1):
            current = np.uint64(d - start) * width
            row, end = np.uint64(first[d]), np.uint64(last[d]) + one
            # Beyond the strip there is no mass; the shares read there count for nothing, and are numbers: all slots of
            # a strip are written before any is read.
            b, c = min(d + 1, count - 1), min(d + 2, count - 1)
            to_left = np.uint64(slot[b] + first[d] - first[b])
            to_up, to_diagonal = to_left + one, np.uint64(slot[c] + first[d] - first[c] + 1)
            right, below_it = after + row, after + row + one
            across, own = second + row + one, current + row
            for k in range(zero, end - row, lanes):
                kept = ones - load(share_up, to_diagonal + k) - load(share_left, to_diagonal + k)
                e = load(mass, across + k) * _larger(kept, zeros)
                e = e + load(mass, below_it + k) * load(share_up, to_up + k)
                e = e + load(mass, right + k) * load(share_left, to_left + k)
                store(mass, own + k, where(e > least, e, zeros))
            store(mass, current + end, zeros)
            if last[d] == height - 1:
                e = mass[current + end - one] + below[column + d - height + 2]
                mass[current + end - one] = e if e > LEAST_MASS else ZERO
            if first[d] == 0:
                e, up, left = mass[current], share_up[slot[d]], share_left[slot[d]]
                above[column + d + 1] += e * up
                above[column + d] += e * max(ONE - up - left, ZERO)
            second, after = after, current
        _turn(cells, bases, strip, start, stop, mass, True)
        for k in range(width):
            newest, older = mass[after + k], mass[second + k]
            mass[spare + k], mass[spare + width + k] = newest, older
        after, second = spare, spare + width


@part()
def _solve_sample(
    cost: Array, n: int, m: int, band: int, most: int, gamma: float, shares: Array, cells: Array
) -> tuple[float, bool]:
    """Value of one sample, and whether a cost did not fit; writes the packed alignment if there is room for it."""
    rows, wanted = _plan_rows(n, m, band), len(cells) > 0
    diagonals = _plan_diagonals(m, rows)
    num_strips, store_all = (n + HEIGHT - 1) // HEIGHT, _count_slots(rows)[0] <= most
    half = len(shares) // 2
    share_up, share_left = shares[:half], shares[half:]
    # The virtual origin (-1, -1) has Z = 1.
    mantissas, exponents = (
        np.ones((num_strips + 1, m + 2), np.float32),
        np.full((num_strips + 1, m + 2), NOTHING, np.int32),
    )
    exponents[0, 0] = 0
    scales = math.log2(math.e) / gamma, min(2.0**22, MAX_TOTAL / (n + m - 1))
    slots = np.zeros(num_strips + 1, np.int64)
    misfit = False
    for s in range(num_strips):
        strip = _plan_strip(s * HEIGHT, rows, diagonals, slots[s], wanted)
        above, below = (mantissas[s], exponents[s]), (mantissas[s + 1], exponents[s + 1])
        misfit = _forward(cost, rows, strip, scales, above, below, share_up, share_left) or misfit
        if store_all:
            slots[s + 1] = strip[5][-1]
    mantissa, exponent = mantissas[num_strips, m], exponents[num_strips, m]
    if exponent < UNREACHED:
        cells[:] = ZERO
        return np.inf, misfit
    if wanted and not misfit:
        masses = np.zeros((num_strips + 1, m + 2), np.float32)
        masses[num_strips, m] = ONE
        for s in range(num_strips - 1, -1, -1):
            strip = _plan_strip(s * HEIGHT, rows, diagonals, slots[s], wanted)
            if not store_all and s < num_strips - 1:
                above, below = (mantissas[s], exponents[s]), (mantissas[s + 1], exponents[s + 1])
                _forward(cost, rows, strip, scales, above, below, share_up, share_left)
            _backward(rows, strip, masses[s + 1], masses[s], share_up, share_left, cells)
    return -gamma * math.log(2.0) * (exponent + math.log2(np.float64(mantissa))), misfit


@compiled()
def solve(
    cost: Array,
    lengths_n: Array,
    lengths_m: Array,
    band: int,
    most: int,
    gamma: float,
    starts: Array,
    turns: Array,
    shares: Array,
    values: Array,
    misfits: Array,
    cells: Array,
) -> None:
    """Values and packed alignments of the samples whose turn comes to this thread.

    Args:
        cost: (B, N, M) float32.
        band: 0 = none.
        most, starts: of `plan_batch`.
        turns: of `kdkit._turns`, shared by the threads.
        shares: float32 workspace, twice as long as `plan_batch` says.
        values: (B,) float32, written to; 0 for an empty sample.
        misfits: (B,) bool, written to: a cost was NaN, -inf or too large for the number format, and what
            was found is nothing to go by.
        cells: written to; length 0 if the alignment is not wanted.
    """
    b = next_turn(turns)
    while b < len(values):
        own = cells[starts[b] : starts[b + 1]] if len(cells) > 0 else cells
        values[b], misfits[b] = 0.0, False
        if starts[b + 1] > starts[b]:
            values[b], misfits[b] = _solve_sample(cost[b], lengths_n[b], lengths_m[b], band, most, gamma, shares, own)
        finish(turns)
        b = next_turn(turns)


@compiled()
def pack_sample(alignment: Array, n: int, m: int, band: int, cells: Array) -> None:
    """The admissible cells of a (N, M) alignment, packed."""
    first, last, slot = _plan_rows(n, m, band)
    for i in range(n):
        for j in range(first[i], last[i] + 1):
            cells[slot[i] + j] = alignment[i, j]


@part()
def _spread_sample(cells: Array, n: int, m: int, band: int, factor: np.float32, out: Array) -> None:
    """One sample of `spread`."""
    first, last, slot = _plan_rows(n, m, band)
    for i in range(n):
        row, inside = out[i], cells[slot[i] + first[i] : slot[i] + last[i] + 1]
        row[: first[i]] = ZERO
        row[last[i] + 1 :] = ZERO
        target = row[first[i] : last[i] + 1]
        for k in range(len(inside)):
            cell = inside[k]
            target[k] = ZERO if cell == ZERO else cell * factor
    out[n:] = ZERO


@compiled()
def spread(
    cells: Array,
    lengths_n: Array,
    lengths_m: Array,
    band: int,
    factors: Array,
    starts: Array,
    turns: Array,
    out: Array,
) -> None:
    """Packed cells, of samples whose turn comes, times their factor into out (B, N, M); exactly 0 where a cell is 0."""
    b = next_turn(turns)
    while b < len(out):
        if starts[b + 1] > starts[b]:
            _spread_sample(cells[starts[b] : starts[b + 1]], lengths_n[b], lengths_m[b], band, factors[b], out[b])
        else:
            out[b] = ZERO
        finish(turns)
        b = next_turn(turns)

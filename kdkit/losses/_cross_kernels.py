"""The loops of `kdkit.losses.cross_native`, compiled by numba. Imported at the first call.

The distance of the sorted probabilities, Σ_r |q_(r) - p_(r)|, needs hardly any sorting. Let a be how many of the
student's probabilities lie above some value, less the teacher's. Where a > 0 the ranks that pass through this value
have q_(r) > p_(r), where a < 0 the other way round. So probabilities are counted in bins, the upper 16 bits of the
float32, and bins are gone through from the top:

    a ≥ the teacher's number in the bin        every rank through it has q > p
    -a ≥ the student's number in the bin       every rank through it has q < p
    else                                       the bin is open: it is sorted, and ranked one by one

A probability counts with its sign, +q and -p where q > p. That is the sum over ranks, exactly, and in time linear in
the number of ids: of two models' distributions a few hundred of 150,000 ids lie in open bins, and no bin holds many.
"""

import math

import numpy as np

from kdkit.compiled import compiled, part
from kdkit.losses._numerics import exp, sum_of

Array = np.ndarray

MOST = np.float32(1.0)
"""A log-probability above it is none."""
ZERO = np.float32(0.0)
SMALL_MASS = 1e-30
"""A mass whose logarithm has to be taken apart from the probabilities, as they have lost digits."""

BIN_SHIFT = np.int32(16)
NUM_BINS = 0x4030
"""Of all values up to e."""
OPEN = np.int8(2)
"""A bin whose ranks differ in sign; -1, 0 and 1 are signs."""
FEW = 24
"""As many are sorted by insertion."""


@part()
def _take(row: Array, ids: Array, out: Array) -> None:
    """row[ids] into out."""
    for k in range(len(ids)):
        out[k] = row[np.uint64(ids[k])]


@part()
def _exponentials(logprobs: Array, out: Array) -> np.int32:
    """e^x of each; how many are NaN or above MOST."""
    strangers = np.int32(0)
    for k in range(len(logprobs)):
        x = logprobs[k]
        strangers += np.int32(not x <= MOST)
        out[k] = exp(x)
    return strangers


@part()
def _probabilities(logprobs: Array, out: Array) -> tuple[float, bool]:
    """Their exponentials, which may take their place; the sum, and whether all were log-probabilities."""
    strangers = _exponentials(logprobs, out)
    return sum_of(out), strangers == 0


@part()
def _log_mass(row: Array, ids: Array, mass: float) -> float:
    """Logarithm of the sum of the ids' probabilities."""
    if mass > SMALL_MASS:
        return math.log(mass)
    top = -np.inf
    for k in range(len(ids)):
        top = max(top, row[ids[k]])
    if top == -np.inf:
        return top
    total = 0.0
    for k in range(len(ids)):
        total += math.exp(row[ids[k]] - top)
    return top + math.log(total)


@part()
def _count(bits: Array, counts: Array) -> None:
    """How many values are in each bin."""
    counts[:] = 0
    for k in range(len(bits)):
        counts[np.uint64(bits[k] >> BIN_SHIFT)] += 1


@part()
def _settle(counts: tuple[Array, Array], signs: Array, aheads: Array) -> None:
    """The sign of each bin's ranks, and by how many the student is ahead above it.

    The counts become the places in which the members of open bins are to be put, and past the last of them.
    """
    of_student, of_teacher = counts
    ahead, student_end, teacher_end = np.int32(0), np.int32(0), np.int32(0)
    signs[0] = 0  # the bin of 0, which adds nothing
    for b in range(NUM_BINS - 1, 0, -1):
        a, c = of_student[b], of_teacher[b]
        aheads[b] = ahead
        of_student[b], of_teacher[b] = student_end, teacher_end
        if ahead >= c:
            signs[b] = 1
        elif -ahead >= a:
            signs[b] = -1
        else:
            signs[b] = OPEN
            student_end += a
            teacher_end += c
        ahead += a - c


@part()
def _sum_settled(values: Array, bits: Array, signs: Array, places: Array, members: Array) -> float:
    """Sum of the values in settled bins, each with its sign; members of open ones are put in place, bit by bit."""
    total = 0.0
    for k in range(len(values)):
        b = np.uint64(bits[k] >> BIN_SHIFT)
        sign = signs[b]
        if sign == OPEN:
            place = places[b]
            members[place] = np.int64(np.int64(bits[k]) << np.int64(32)) | np.int64(k)
            places[b] = place + 1
        else:
            total += np.float64(values[k] * np.float32(sign))
    return total


@part()
def _sort(members: Array) -> None:
    """In rising order, in place."""
    if len(members) > FEW:
        members[:] = np.sort(members)
        return
    for i in range(1, len(members)):
        own, j = members[i], i
        while j > 0 and members[j - 1] > own:
            members[j] = members[j - 1]
            j -= 1
        members[j] = own


@part()
def _run(members: Array, end: int, bits: int) -> int:
    """How many of members[:end] from the end have these bits."""
    count = 0
    while count < end and members[end - 1 - count] >> np.int64(32) == bits:
        count += 1
    return count


@part()
def _rank(student: Array, teacher: Array, ahead: int, bits: Array, signs: Array) -> float:
    """The members of an open bin ranked one by one: their sum with signs; `signs` of the student's are written."""
    _sort(student)
    _sort(teacher)
    i, j, total = len(student), len(teacher), 0.0
    while i > 0 or j > 0:
        most = max(student[i - 1] if i > 0 else 0, teacher[j - 1] if j > 0 else 0) >> np.int64(32)
        a, c = _run(student, i, most), _run(teacher, j, most)  # of this very value
        for m in range(1, a + 1):
            sign = -1 if ahead + m <= 0 else (1 if ahead + m > c else 0)
            signs[student[i - m] & np.int64(0xFFFFFFFF)] = sign
            total += sign * np.float64(np.int32(most).view(np.float32))
        for m in range(1, c + 1):
            sign = 1 if m <= ahead else (-1 if m > ahead + a else 0)
            total -= sign * np.float64(np.int32(most).view(np.float32))
        i, j, ahead = i - a, j - c, ahead + a - c
    return total


@part()
def _write_signs(bits: Array, of_bins: Array, out: Array) -> None:
    """Of each value the sign of its bin."""
    for k in range(len(bits)):
        out[k] = of_bins[np.uint64(bits[k] >> BIN_SHIFT)]


@part()
def _distance(student: Array, teacher: Array, bins: Array, members: Array, signs: Array) -> float:
    """Distance of the sorted probabilities of one position; the student's signs, unless there is no room."""
    student_bits, teacher_bits = student.view(np.int32), teacher.view(np.int32)
    counts, aheads, of_bins = (bins[0], bins[1]), bins[2], bins[3]
    _count(student_bits, counts[0])
    _count(teacher_bits, counts[1])
    _settle(counts, of_bins, aheads)
    mine, theirs = members[: len(student)], members[len(student) :]
    if len(signs) > 0:
        _write_signs(student_bits, of_bins, signs)
    total = _sum_settled(student, student_bits, of_bins, counts[0], mine)
    total -= _sum_settled(teacher, teacher_bits, of_bins, counts[1], theirs)
    scratch = signs if len(signs) > 0 else np.empty(len(student), np.int8)
    student_start = teacher_start = 0
    for b in range(NUM_BINS - 1, 0, -1):
        if of_bins[b] == OPEN:
            student_end, teacher_end = counts[0][b], counts[1][b]
            own, other = mine[student_start:student_end], theirs[teacher_start:teacher_end]
            total += _rank(own, other, aheads[b], student_bits, scratch)
            student_start, teacher_start = student_end, teacher_end
    return total


@compiled()
def compare(
    rows: tuple[int, int],
    student: tuple[Array, Array, Array],
    teacher: tuple[Array, Array, Array],
    probabilities: Array,
    bins: Array,
    members: Array,
    columns: tuple[Array, Array],
    signs: Array,
    distances: Array,
) -> None:
    """Both sides' columns and the distance of the others' sorted probabilities, for rows[0] to rows[1] - 1.

    Args:
        rows: first, and one past the last.
        student: log-probabilities (N, V) float32, matched ids (C,) and the rest (R,).
        teacher: log-probabilities (N, W) float32, matched ids (C,) and the rest (S,).
        probabilities: (R + S,) float32, scratch of the calling thread.
        bins: (4, NUM_BINS) int32, the same.
        members: (R + S,) int64, the same.
        columns: of student and teacher, (N, C + 1) float32 with the log mass of the rest, or (N, C); written to.
        signs: (N, R) int8 of q - p at the rank of each of the student's rest, or (N, 0); written to.
        distances: (N,) float32, written to; or (0,).
    """
    for n in range(rows[0], rows[1]):
        used, valid = 0, True
        num_student = len(student[2])
        for side in range(2):
            logprobs, matched, rest = student if side == 0 else teacher
            row, out = logprobs[n], columns[side][n]
            _take(row, matched, out)
            own = probabilities[used : used + len(rest)]
            used += len(rest)
            _take(row, rest, own)
            mass, is_valid = _probabilities(own, own)
            valid = valid and is_valid
            if len(out) > len(matched):
                out[len(matched)] = np.float32(_log_mass(row, rest, mass)) if is_valid else np.float32(np.nan)
        if len(distances) == 0:
            continue
        if valid:
            mine, theirs = probabilities[:num_student], probabilities[num_student:used]
            distances[n] = np.float32(_distance(mine, theirs, bins, members, signs[n]))
        else:
            distances[n] = np.float32(np.nan)
            signs[n] = 0


@compiled()
def spread(
    rows: tuple[int, int],
    student: tuple[Array, Array, Array],
    signs: Array,
    by_columns: Array,
    by_distances: Array,
    scratch: Array,
    out: Array,
) -> None:
    """Gradient by the student's log-probabilities, (N, V), of what `compare` wrote.

    Args:
        rows: first, and one past the last.
        student: as in `compare`.
        signs: as in `compare`; (N, 0) where there were no distances.
        by_columns: (N, C + 1) or (N, C) float32, what comes from above.
        by_distances: (N,) float32, the same.
        scratch: (2, R) float32, of the calling thread.
        out: (N, V) float32, written to.
    """
    logprobs, matched, rest = student
    for n in range(rows[0], rows[1]):
        row, above, to = logprobs[n], by_columns[n], out[n]
        for c in range(len(matched)):
            to[np.uint64(matched[c])] = above[c]
        q, g = scratch[0], scratch[1]
        _take(row, rest, g)
        mass, _ = _probabilities(g, q)
        of_bucket = np.float32(0.0)
        g[:] = ZERO
        if len(above) > len(matched):
            log_mass = _log_mass(row, rest, mass)
            of_bucket = above[len(matched)]
            if mass > SMALL_MASS:
                for k in range(len(rest)):
                    g[k] = q[k] * np.float32(of_bucket / mass)
            elif log_mass > -np.inf:
                for k in range(len(rest)):
                    g[k] = of_bucket * np.float32(math.exp(row[rest[k]] - log_mass))
        if signs.shape[1] > 0:
            own, factor = signs[n], by_distances[n]
            for k in range(len(rest)):
                g[k] += q[k] * np.float32(own[k]) * factor
        for k in range(len(rest)):
            to[np.uint64(rest[k])] = g[k]

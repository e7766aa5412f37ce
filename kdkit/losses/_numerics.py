"""Exponentials, logarithms and sums of a row, compiled by numba: what the loops of several modules are made of.

`exp` and `log` are polynomials, for numba has no vector of either; they keep their order of operations, on which they
depend.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from kdkit.compiled import ANY_ORDER, part

Array = np.ndarray
TILE = 512
"""Columns whose sum is taken in float32."""


def _fitted(function: Callable[[Array], Array], degree: int, low: float, high: float) -> tuple[np.float32, ...]:
    """Coefficients of a polynomial that stands for a function on an interval, lowest power first."""
    near = Chebyshev.interpolate(function, degree, domain=[low, high])
    return tuple(np.float32(c) for c in near.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef)


EXP2 = _fitted(np.exp2, 6, -0.5, 0.5)
"""2^x; relative error 3e-9."""
LOG1P = _fitted(lambda x: np.log1p(x) / np.where(x == 0, 1, x) + (x == 0), 10, math.sqrt(0.5) - 1, math.sqrt(2) - 1)
"""log(1 + x) / x; relative error 1e-8."""
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
# The whole part may come from a slightly other product: written twice the same, it would be rounded before the
# subtraction, where a fused multiply-add keeps the fraction exact.
ROUGH_LOG2_E = np.float32(LOG2_E * np.float32(1 + 2**-22))
ROUNDING, ROUNDING_BITS = np.float32(1.5 * 2**23), np.int32(0x4B400000)
"""x + ROUNDING has the whole number next to x in its lowest bits, for |x| < 2^22."""
SQRT_HALF_BITS, EXPONENT_BITS = np.int32(0x3F3504F3), np.int32(23)
LOWEST_KEY = np.int32(-(2**31))
LEAST, MOST = np.float32(-127), np.float32(128)
"""Exponents of what counts as 0 and of what is infinite."""
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)


@part()
def exp(x: np.float32) -> np.float32:
    """e^x; 0 below 2^-127, NaN for NaN."""
    power = x * ROUGH_LOG2_E
    is_small, is_large = power < LEAST, power > MOST
    rounded = (LEAST if is_small else (MOST if is_large else power)) + ROUNDING
    whole = np.int32(np.float32(rounded).view(np.int32) - ROUNDING_BITS)
    f = x * LOG2_E - (rounded - ROUNDING)
    f = ZERO if is_small or is_large else f
    value = ((EXP2[6] * f + EXP2[5]) * f + EXP2[4]) * f + EXP2[3]
    value = ((value * f + EXP2[2]) * f + EXP2[1]) * f + EXP2[0]
    return value * np.int32(np.int32(whole + np.int32(127)) << EXPONENT_BITS).view(np.float32)


@part()
def log(x: np.float32) -> np.float32:
    """Natural logarithm of x > 0 to 1e-7 of itself; something finite for 0 and NaN."""
    bits = np.float32(x).view(np.int32)
    exponent = np.int32(np.int32(bits - SQRT_HALF_BITS) >> EXPONENT_BITS)
    f = np.int32(bits - np.int32(exponent << EXPONENT_BITS)).view(np.float32) - ONE
    value = ((LOG1P[10] * f + LOG1P[9]) * f + LOG1P[8]) * f + LOG1P[7]
    value = (((value * f + LOG1P[6]) * f + LOG1P[5]) * f + LOG1P[4]) * f + LOG1P[3]
    value = ((value * f + LOG1P[2]) * f + LOG1P[1]) * f + LOG1P[0]
    return value * f + np.float32(exponent) * LN_2


@part()
def _key(bits: np.int32) -> np.int32:
    """A whole number that is in order as the float32 of these bits is, and the way back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@part()
def top_of(z: Array, inverse: np.float32) -> np.float32:
    """Largest of z · inverse; NaN where one is NaN, unless its sign is set."""
    top = LOWEST_KEY
    for k in range(len(z)):
        top = max(top, _key(np.float32(z[k] * inverse).view(np.int32)))
    return np.int32(_key(top)).view(np.float32)


@part(ANY_ORDER)
def exponentials(z: Array, inverse: np.float32, top: np.float32, e: Array) -> float:
    """e^(z · inverse - top) into e; their sum."""
    total = np.float64(0)
    for start in range(0, len(z), TILE):
        own, out = z[start : start + TILE], e[start : start + TILE]
        part = ZERO
        for k in range(len(own)):
            value = exp(own[k] * inverse - top)
            out[k] = value
            part += value
        total += part
    return total


@part(ANY_ORDER)
def sum_of(values: Array) -> float:
    """Of a row."""
    total = np.float64(0)
    for start in range(0, len(values), TILE):
        tile, part = values[start : start + TILE], ZERO
        for k in range(len(tile)):
            part += tile[k]
        total += part
    return total

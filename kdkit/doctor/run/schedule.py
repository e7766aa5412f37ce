"""The learning rate: whether it is there, ends with the run, and has the shape that was asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kdkit.doctor.findings import Check, NotApplicable, Observation, fail, warn
from kdkit.doctor.sources import POST_MORTEMS
from kdkit.doctor.trace import Series, Trace

UNFINISHED_FRACTION = 0.5
"""Of the peak: what a decaying learning rate must have left behind at the end of a run."""
OVER_FRACTION = 0.98
"""Of the planned steps: the last log row may come before the last step."""
STRETCHED_RATIO = 1.5
"""Of a schedule's own end to the run's: accumulation stretches by 2 at least, a few epochs' rounding by far less."""
FITS_FRACTION = 0.005
"""Of the peak: what a curve may miss by and still be the one; a log may print three digits."""
MISSES_FRACTION = 0.02
"""Of the peak: what a curve misses by that is another one."""
LEAST_DECLINE_FRACTION = 0.1
"""Of the peak: before that much is gone, printed digits and warm-up's end do not tell where a curve leads."""
LEAST_DECLINE_AT_END_FRACTION = 0.01
"""Of the peak, in a run that is over: accumulation over 16 leaves 94 % or more of the peak."""
FITS_DECLINE_FRACTION = 0.05
"""Of the decline: what a curve may miss by and still tell where it ends."""
LEAST_POINTS = 6
"""Of a curve, so that one with two free numbers can miss."""
MOST_POINTS = 200
"""Of a curve that are looked at, evenly over it."""
OTHER_ENDS = ("restart", "min", "floor", "polynomial", "inverse", "wsd", "stable", "plateau")
"""In a scheduler's name: it does not go to 0 along one curve."""


@dataclass(frozen=True)
class Curve:
    """A decay that was fitted to a learning rate."""

    family: str
    end: float
    """Step at which it reaches 0; infinite where it does not."""
    miss: float
    """Largest distance to the learning rate, as a share of its peak."""
    decline: float
    """Of the learning rate from its peak on, as a share of it."""

    @property
    def fits(self) -> bool:
        """Whether it is the one."""
        return self.miss <= min(FITS_FRACTION, FITS_DECLINE_FRACTION * self.decline)


def check_learning_rate_zero(trace: Trace) -> Iterator[Observation]:
    """Every value is 0."""
    rate = trace.series("learning_rate", at_least=3)
    if not rate.values.any():
        yield fail(f"learning rate 0 at all {len(rate)} log rows, steps {rate.steps[0]} to {rate.steps[-1]}")


LEARNING_RATE_ZERO = Check(
    "KD201",
    "learning rate is 0",
    "lr=0.00e+00 at every row, and no figure moves",
    "The optimizer never steps, or the scheduler never does: a format such as .3e shows 2.01e-5 as 2.010e-05, "
    "never as 0. A schedule that accumulation stretches is a fault of its own (KD202): it is small, not 0.",
    "Step the scheduler once for each optimizer step; see whether a loss scaler skips every step.",
    POST_MORTEMS,
    check_learning_rate_zero,
)


def check_schedule_length(trace: Trace) -> Iterator[Observation]:
    """A decaying learning rate that ends long after the run does."""
    rate, total = trace.series("learning_rate", at_least=3).finite, trace.planned_end
    named, decay = _family(trace.planned.scheduler), _decay(rate)
    is_unknown = named is None and trace.planned.scheduler is not None
    if total is None or named == "constant" or is_unknown:
        raise NotApplicable("how long the run was to be, with a learning rate that goes to 0")
    is_over = bool(len(rate)) and rate.steps[-1] >= OVER_FRACTION * total
    least = LEAST_DECLINE_AT_END_FRACTION if is_over else LEAST_DECLINE_FRACTION
    end = min((curve.end for curve in _curves(decay, least_decline=least) if curve.fits), default=0.0)
    factor = f"; gradients were accumulated over {trace.planned.accumulation}" if trace.planned.accumulation else ""
    if np.isfinite(end) and end > STRETCHED_RATIO * total:
        evidence = f"learning rate {_from_peak(decay)} heads for 0 at step {end:,.0f}, {end / total:.1f} times the run"
        yield fail(f"{evidence} of {total:,}{factor}") if named else warn(f"{evidence} of {total:,}{factor}")
    elif named and is_over and rate.values[-1] > UNFINISHED_FRACTION * rate.values.max():
        yield fail(
            f"{named} schedule at {rate.values[-1] / rate.values.max():.0%} of its peak {rate.values.max():.3g} at "
            f"step {rate.steps[-1]:,}, the last of {total:,}{factor}"
        )


SCHEDULE_LENGTH = Check(
    "KD202",
    "schedule longer than the run",
    "the learning rate is still high at the last step",
    "The schedule was made for forward passes, and only every accumulated one is an optimizer step.",
    "Give the scheduler the number of optimizer steps: forward passes divided by the accumulation.",
    POST_MORTEMS,
    check_schedule_length,
    live=False,
)


def check_scheduler(trace: Trace) -> Iterator[Observation]:
    """The learning rate follows another curve than the one named."""
    named, rate = _family(trace.planned.scheduler), trace.series("learning_rate", at_least=LEAST_POINTS).finite
    if named is None:
        raise NotApplicable("a scheduler that is named: constant, linear or cosine")
    decay = _decay(rate)
    curves = {curve.family: curve for curve in _curves(decay)}
    seen = min(curves.values(), key=lambda curve: curve.miss, default=None)
    if seen is None or not seen.fits:
        raise NotApplicable("a learning rate that has left its peak behind along one curve")
    if named not in curves or curves[named].miss > MISSES_FRACTION:
        missed = f"; a {named} one misses by {curves[named].miss:.1%}" if named in curves else ""
        yield warn(f"scheduler {named} is named, the learning rate {_from_peak(decay)} is {seen.family}{missed}")


SCHEDULER = Check(
    "KD218",
    "another scheduler than the one named",
    "cosine stands in the config, and the learning rate falls along a straight line, or the reverse",
    "The code makes one scheduler whatever the config says. It mostly costs little, but what is reported is not what "
    "was run.",
    "Make the scheduler from the name that the config gives, or give the name of the one that is made.",
    POST_MORTEMS,
    check_scheduler,
)


def _family(scheduler: str | None) -> str | None:
    """Of a scheduler's name: constant, linear or cosine, where it goes to 0 along one curve or not at all."""
    name = (scheduler or "").lower()
    if any(word in name for word in OTHER_ENDS):
        return None
    return next((family for family in ("cosine", "linear", "constant") if family in name), None)


def _decay(rate: Series) -> Series:
    """From the last row at the peak on, thinned, without what lies at 0 after the end."""
    values = rate.values
    if not len(values) or values.max() <= 0:
        return Series(rate.name, rate.steps[:0], values[:0])
    start = len(values) - 1 - int(np.argmax(values[::-1]))
    above = np.flatnonzero(values > 0)[-1] + 1
    chosen = np.unique(np.linspace(start, above - 1, MOST_POINTS).astype(int))
    return Series(rate.name, rate.steps[chosen], values[chosen])


def _curves(decay: Series, *, least_decline: float = LEAST_DECLINE_FRACTION) -> list[Curve]:
    """The decays through a learning rate's points; none where they are too few or have hardly fallen."""
    values, steps = decay.values, decay.steps.astype(float)
    is_short = len(values) < LEAST_POINTS or values[-1] > (1 - least_decline) * values[0]
    if is_short or (np.diff(values) > 0).any() or np.ptp(steps) == 0:
        return []
    return [_line(steps, values / values[0]), _half_cosine(steps, values / values[0])]


def _line(steps: np.ndarray, shares: np.ndarray) -> Curve:
    slope, start = _straight(steps, shares)
    end = float(-start / slope) if slope < 0 else np.inf
    return Curve("linear", end, float(np.abs(start + slope * steps - shares).max()), float(1 - shares[-1]))


def _straight(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and value at step 0 of the line of least squares through each column."""
    middle = steps.mean()
    slope = (steps - middle) @ (values - values.mean(axis=0)) / ((steps - middle) ** 2).sum()
    return slope, values.mean(axis=0) - slope * middle


def _half_cosine(steps: np.ndarray, shares: np.ndarray) -> Curve:
    """share = peak (1 + cos(angle)) / 2; the first point may lie past the peak, by up to a quarter of it."""
    peaks = np.linspace(1, 1.25, 51)
    angles = np.arccos(np.clip(2 * shares[:, None] / peaks - 1, -1, 1))  # (points, peaks)
    slopes, starts = _straight(steps, angles)
    curves = peaks * (1 + np.cos(starts + slopes * steps[:, None])) / 2
    misses = np.abs(curves - shares[:, None]).max(axis=0)
    best = int(np.argmin(np.where(slopes > 0, misses, np.inf)))
    if slopes[best] <= 0:
        return Curve("cosine", np.inf, np.inf, 0.0)
    end = (np.pi - starts[best]) / slopes[best]
    return Curve("cosine", float(end), float(misses[best]), float(1 - shares[-1]))


def _from_peak(decay: Series) -> str:
    first, last = decay.values[[0, -1]]
    return f"{first:.3g} at step {decay.steps[0]:,} to {last:.3g} at step {decay.steps[-1]:,}"

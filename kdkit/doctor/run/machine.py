"""Memory, crashes, time and log lines."""

from collections.abc import Iterator

import numpy as np

from kdkit.doctor.findings import Check, NotApplicable, Observation, fail, warn
from kdkit.doctor.sources import POST_MORTEMS
from kdkit.doctor.trace import Trace

FULL_FRACTION = 0.9
"""Of a card's memory."""
LINES_PER_STEP = 5.0
LEAST_LINES = 10_000
SESSION_HOURS = 12.0
"""After which Kaggle ends a session, and others do so sooner."""
LEAST_TIMED_ROWS = 4
LEAST_TIMED_SECONDS = 60.0
"""A start says nothing: the first steps load, compile and fill caches."""


def check_memory(trace: Trace) -> Iterator[Observation]:
    """The card is nearly full."""
    used = trace.series("memory/used_fraction").finite
    if len(used) and used.values.max() > FULL_FRACTION:
        at = int(np.argmax(used.values))
        yield warn(f"{used.values[at]:.0%} of the memory in use at step {used.steps[at]}")


MEMORY = Check(
    "KD211",
    "memory nearly full",
    "more than 90 % of the card in use",
    "A longer batch or a fragmented allocator ends the run.",
    "Lower the batch or the length, or see what kdkit plan proposes.",
    POST_MORTEMS,
    check_memory,
)


def check_dtypes(trace: Trace) -> Iterator[Observation]:
    """A crash between two dtypes."""
    yield from (fail(str(event)) for event in trace.events_of("dtype")[:1])


DTYPES = Check(
    "KD212",
    "two dtypes",
    "mat1 and mat2 must have the same dtype",
    "Autocast hides the difference while training; outside it, at evaluation, float16 meets float32.",
    "Compute the objective inside the module that is under autocast, in training and in evaluation.",
    POST_MORTEMS,
    check_dtypes,
    live=False,
)


def check_out_of_memory(trace: Trace) -> Iterator[Observation]:
    """A crash for lack of memory."""
    yield from (fail(str(event)) for event in trace.events_of("out_of_memory")[:1])


OUT_OF_MEMORY = Check(
    "KD213",
    "out of memory",
    "CUDA out of memory",
    "Logits of two models at full vocabulary, or generation, need most.",
    "See what kdkit plan says of the settings.",
    "github.com/huggingface/trl issue 2255",
    check_out_of_memory,
    live=False,
)


def check_log_volume(trace: Trace) -> Iterator[Observation]:
    """Many lines a step."""
    if trace.num_lines is None or trace.last_step == 0:
        raise NotApplicable("a text log with steps")
    lines = trace.num_lines / trace.last_step
    if trace.num_lines > LEAST_LINES and lines > LINES_PER_STEP:
        yield warn(f"{trace.num_lines:,} lines for {trace.last_step:,} steps, {lines:.0f} a step")


LOG_VOLUME = Check(
    "KD216",
    "log volume",
    "more than 5 lines a step",
    "Writing takes time, a notebook cuts its output, and nobody finds the figure that matters.",
    "Write a row every 10 to 100 steps.",
    POST_MORTEMS,
    check_log_volume,
    live=False,
)


def check_early_stop(trace: Trace) -> Iterator[Observation]:
    """Stopped ahead of its end by a rule."""
    total = trace.planned.num_batches or trace.planned.num_steps
    for event in trace.events_of("early_stop")[:1]:
        share = f", {event.step / total:.0%} of what was planned" if event.step and total else ""
        yield warn(f"{event}{share}")


EARLY_STOP = Check(
    "KD217",
    "stopped early",
    "early stopping ended the run",
    "A total loss whose weights change along a curriculum is no metric; and a metric that stands still says "
    "nothing of the student.",
    "Watch ROUGE-L or cross-entropy; see KD203 first.",
    POST_MORTEMS,
    check_early_stop,
    live=False,
)


def check_time_left(trace: Trace) -> Iterator[Observation]:
    """At its speed the run does not end within a session."""
    seconds, total = trace.series("seconds", at_least=LEAST_TIMED_ROWS).finite, trace.planned_end
    if total is None or len(seconds) < LEAST_TIMED_ROWS:
        raise NotApplicable("the time of each row, and how long the run was to be")
    last, timed = int(seconds.steps[-1]), float(seconds.values[1:].sum())
    steps = last - int(seconds.steps[0])
    if last >= total or steps <= 0 or timed < LEAST_TIMED_SECONDS:
        return
    pace = timed / steps
    hours, left = total * pace / 3600, (total - last) * pace / 3600
    if hours > SESSION_HOURS:
        yield warn(
            f"{pace:.3g} seconds a step, steps {seconds.steps[0]} to {last}: all {total:,} steps take {hours:.1f} "
            f"hours, {left:.1f} of them are left",
        )


TIME_LEFT = Check(
    "KD226",
    "longer than a session",
    "at its speed the run needs more than 12 hours",
    "A free session ends after 12 hours at most (Kaggle), and takes with it what was not saved.",
    "Save checkpoints and go on in the next session, or lower steps, length, evaluations or generation.",
    "kaggle.com/docs/notebooks",
    check_time_left,
)

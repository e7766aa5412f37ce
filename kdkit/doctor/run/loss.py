"""The total loss and the gradient: no number, rising, standing still, unsteady."""

from collections.abc import Iterator

import numpy as np

from kdkit.doctor.findings import Check, NotApplicable, Observation, fail, warn
from kdkit.doctor.sources import POST_MORTEMS
from kdkit.doctor.trace import Series, Trace

DIVERGED_RATIO = 2.0
"""Of the loss at the end to its lowest level before."""
LEVEL_PARTS = 8
LEAST_LEVEL_ROWS = 3
"""A level is the median of an eighth of the rows, and of three at least where there are as many in a quarter: of single
micro-batches one may be very easy."""
LEAST_STEPS = 100
"""Before which a loss may go anywhere."""
STILL_FRACTION = 0.02
"""By how much a loss has to fall from its first quarter to its last."""
LEAST_TURNS = 1 / 3
"""Of the rows: those above or below both their neighbours; pure noise has two thirds."""
UNSTEADY_FRACTION = 0.12
"""Of the loss: how far such a row typically lies off its neighbours' middle. Measured: at most 0.07 in runs of kdkit on
one kind of rows, 0.19 in a log of single micro-batches."""
LEAST_UNSTEADY_ROWS = 7
SPIKE_RATIO = 2.0
"""Of a row to the largest of the rows before and after it."""
SPIKE_ROWS = 5
"""Before and after."""
GRADIENT_RATIO = 100.0
"""Of the gradient norm at the end to its level before: more than any change of the weights of terms brings."""
CLIPPED_RATIO = 10.0
"""Of the gradient norm to the limit: where nine tenths of every step are cut, the learning rate means nothing."""
LEAST_NORMS = 8
LEAST_BROKEN_ROWS = 3
"""At the end of a log: a loss scaler skips single steps of infinite gradients, and goes on."""
LEAST_LOSS_BEFORE = 0.1
"""Of a row, that no next one falls from to 0 by learning."""


def check_nonfinite(trace: Trace) -> Iterator[Observation]:
    """A NaN or an infinity, in a figure or in words."""
    for event in trace.events_of("nonfinite")[:1]:
        replaced = ", and was replaced by 0" if "clamp" in event.text else ""
        yield fail(f"{event}{replaced}{_after(trace, event.step) if replaced else ''}{_before(trace, event.step)}")
    for name, series in trace.train.items():
        broken = np.flatnonzero(~np.isfinite(series.values))
        if len(broken) and (name == "loss" or name.startswith("part/")):
            step = int(series.steps[broken[0]])
            alone = _beside(trace, name, step)
            yield fail(
                f"{name} is no number at {len(broken)} log rows, first at step {step}{alone}{_before(trace, step)}"
            )
    if "loss" in trace.train and np.isfinite(trace.train["loss"].values).all():
        yield from _hidden_nonfinite(trace)


def _hidden_nonfinite(trace: Trace) -> Iterator[Observation]:
    """What a trainer shows that leaves NaN out of its mean: a loss of 0, and gradients that stay no number."""
    for name in ("loss", "grad_norm"):
        series = trace.train.get(name)
        values = np.empty(0) if series is None else series.values
        sound = np.flatnonzero(values != 0 if name == "loss" else np.isfinite(values))
        first = int(sound[-1]) + 1 if len(sound) else 0
        if series is None or not first or len(values) - first < LEAST_BROKEN_ROWS:
            continue
        if name == "loss" and values[first - 1] <= LEAST_LOSS_BEFORE:
            continue
        step, what = int(series.steps[first]), "exactly 0" if name == "loss" else "no number"
        rows = f"at each of the last {len(values) - first} log rows, from step {step} on"
        yield fail(f"{name} is {what} {rows}{_before(trace, step)}")


def _after(trace: Trace, step: int | None) -> str:
    """The loss of the same logits went on without the part that was replaced."""
    loss = trace.train["loss"].finite if "loss" in trace.train else None
    if loss is None or step is None or not len(loss) or loss.steps[-1] < step:
        return ""
    at = int(np.searchsorted(loss.steps, step))
    return (
        f"; the rest of the loss stayed finite ({loss.values[at]:.4g} at step {loss.steps[at]}), so that the logits "
        "did not overflow: most likely that batch had no labels"
    )


def _beside(trace: Trace, name: str, step: int) -> str:
    """Other terms of the same step that are finite, where one is not."""
    others = {other: series for other, series in trace.train.items() if other.startswith("part/") and other != name}
    finite = [other for other, series in others.items() if step in series.finite.steps]
    if name == "loss" or not finite:
        return ""
    return f", where {', '.join(finite)} is finite: most likely a batch without what this term counts, such as labels"


def _before(trace: Trace, step: int | None) -> str:
    """The last figures ahead of a step."""
    said = []
    for name in ("loss", "grad_norm", "learning_rate"):
        series = trace.train.get(name)
        if series is None or step is None:
            continue
        ahead = series.finite.values[series.finite.steps < step]
        if len(ahead):
            said.append(f"{name} {ahead[-1]:.4g}")
    return f"; before it {', '.join(said)}" if said else ""


NOT_FINITE = Check(
    "KD206",
    "no number",
    "NaN or infinity in the loss, or a warning that one was replaced",
    "Most often a batch without counted labels (a mean over nothing), or float16 weights or activations that "
    "overflow. A temperature above 1 makes logits smaller, and softmax takes off the largest: neither overflows. A "
    "replaced NaN leaves its gradient behind.",
    "Stop at the first one and look at its batch; count labels before dividing; keep trained weights in float32.",
    POST_MORTEMS,
    check_nonfinite,
)


def _comparable_losses(trace: Trace) -> Series:
    """The training loss, where its values over the run can be compared.

    Raises:
        NotApplicable: there are too few, or what it counts changed.
    """
    loss = trace.series("loss", at_least=4).finite
    if len(loss) < 4 or loss.steps[-1] < LEAST_STEPS:
        raise NotApplicable(f"four losses over {LEAST_STEPS} steps")
    if any(name.startswith("weight/") and np.ptp(series.values) > 0 for name, series in trace.train.items()):
        raise NotApplicable("a loss whose terms keep their weights")
    gold = trace.train.get("rollout/gold_fraction")
    if gold is not None and np.ptp(gold.values) > 0:
        raise NotApplicable("a loss over the same share of labelled rows throughout")
    return loss


def _quarters(series: Series) -> tuple[float, float]:
    """Medians of the first and of the last quarter."""
    size = max(len(series) // 4, 1)
    return float(np.median(series.values[:size])), float(np.median(series.values[-size:]))


def check_divergence(trace: Trace) -> Iterator[Observation]:
    """The loss ends far above where it had been."""
    loss = _comparable_losses(trace)
    size = len(loss) // 4
    end = float(np.median(loss.values[-size:]))
    width = max(len(loss) // LEVEL_PARTS, LEAST_LEVEL_ROWS if size >= LEAST_LEVEL_ROWS else 1)
    levels = np.median(np.lib.stride_tricks.sliding_window_view(loss.values[:-size], width), axis=1)
    lowest = int(np.argmin(levels))
    if end > DIVERGED_RATIO * levels[lowest] and end > levels[lowest] + 1:
        until = f" to {loss.steps[lowest + width - 1]}" if width > 1 else ""
        yield fail(
            f"loss {levels[lowest]:.4g} at step {loss.steps[lowest]}{until}, {end:.4g} in the last quarter, to step "
            f"{loss.steps[-1]}"
        )


DIVERGENCE = Check(
    "KD208",
    "loss diverges",
    "the loss ends far above its lowest level",
    "The learning rate is too high, or the data changed: the student's own bad text took the place of the rows.",
    "Lower the learning rate; guard the student's text, or train without it.",
    POST_MORTEMS,
    check_divergence,
)


def check_learning(trace: Trace) -> Iterator[Observation]:
    """The loss stays where it began."""
    loss = _comparable_losses(trace)
    start, end = _quarters(loss)
    first = float(loss.values[0])
    level = min(start, first)  # a spike at the start is no level to fall from
    if level > 1 and (1 - STILL_FRACTION) * level < end < (1 + STILL_FRACTION) * start:
        yield warn(
            f"loss {first:.5g} at first, {start:.5g} in the first quarter of the log, {end:.5g} in the last, step "
            f"{loss.steps[-1]}"
        )


LEARNING = Check(
    "KD209",
    "loss does not fall",
    "the loss ends where it began",
    "The weights do not move (see KD201), or what falls is too small beside what cannot.",
    "Look at the change of the weights, and at each term alone.",
    POST_MORTEMS,
    check_learning,
    live=False,
)


def check_oscillation(trace: Trace) -> Iterator[Observation]:
    """The loss jumps up and down from row to row."""
    loss = _comparable_losses(trace)
    if len(loss) < LEAST_UNSTEADY_ROWS:
        raise NotApplicable(f"{LEAST_UNSTEADY_ROWS} rows of the loss")
    values = loss.values[len(loss) // 4 :] if len(loss) >= 4 * LEAST_UNSTEADY_ROWS else loss.values
    turns = np.diff(values)[1:] * np.diff(values)[:-1] < 0
    if turns.mean() < LEAST_TURNS:
        return
    level = float(np.median(values))
    jump = float(np.median(np.abs(values[1:-1] - (values[:-2] + values[2:]) / 2)[turns]))
    if level > 0 and jump > UNSTEADY_FRACTION * level:
        at = int(np.argmax(np.abs(np.diff(loss.values))))
        (step, later), (here, there) = loss.steps[at : at + 2], loss.values[at : at + 2]
        yield warn(
            f"{turns.sum()} of {len(turns)} rows turn back, by {jump / level:.0%} of the loss; {here:.4g} at step "
            f"{step}, {there:.4g} at step {later}"
        )


OSCILLATION = Check(
    "KD221",
    "loss oscillates",
    "28, 22, 28, 28, 22, 20, 28 at rows 100 steps apart",
    "Rows that show one micro-batch each, not the mean since the last row, show the rows of the data: by itself that "
    "says nothing of the training. Where rows are means, as kdkit's are, the learning rate is too high. A temperature "
    "of 3 does not bring it about.",
    "Log the mean over all micro-batches since the last row; if it is one, lower the learning rate. See KD209 too.",
    POST_MORTEMS,
    check_oscillation,
)


def check_spikes(trace: Trace) -> Iterator[Observation]:
    """Single losses far above those around them."""
    loss = _comparable_losses(trace)
    if len(loss) < 2 * SPIKE_ROWS + 1:
        raise NotApplicable(f"{2 * SPIKE_ROWS + 1} rows of the loss")
    windows = np.lib.stride_tricks.sliding_window_view(loss.values, 2 * SPIKE_ROWS + 1)
    around = np.delete(windows, SPIKE_ROWS, axis=1).max(axis=1)
    middle = windows[:, SPIKE_ROWS]
    spikes = np.flatnonzero((middle > SPIKE_RATIO * around) & (middle > around + 1))
    if len(spikes):
        at = int(spikes[0]) + SPIKE_ROWS
        yield warn(
            f"loss {loss.values[at]:.4g} at step {loss.steps[at]}, at most {around[spikes[0]]:.4g} in the "
            f"{SPIKE_ROWS} rows before and after; {len(spikes)} such rows"
        )


SPIKES = Check(
    "KD222",
    "loss spikes",
    "single rows at more than twice the loss around them",
    "A batch with rows unlike the others (very long, or in another language), or a learning rate at the edge of what "
    "the student stands.",
    "Look at the rows of that step; clip gradients at 1; lower the learning rate if spikes grow.",
    "practice of large-model training, such as arXiv:2204.02311, section 5.1",
    check_spikes,
)


def check_gradient(trace: Trace) -> Iterator[Observation]:
    """The gradient norm is 0, explodes, or is cut to a small share at every step."""
    norm = trace.series("grad_norm", at_least=LEAST_NORMS).finite
    if len(norm) < LEAST_NORMS:
        raise NotApplicable(f"{LEAST_NORMS} gradient norms that are finite")
    if not norm.values.any():
        yield fail(f"gradient norm 0 at all {len(norm)} log rows, steps {norm.steps[0]} to {norm.steps[-1]}")
        return
    size = len(norm) // 4
    before, end = float(np.median(norm.values[:-size])), float(np.median(norm.values[-size:]))
    if end > GRADIENT_RATIO * before > 0:
        yield fail(f"gradient norm {before:.3g} up to step {norm.steps[-size - 1]}, {end:.3g} after it")
    limit, level = trace.planned.max_grad_norm, float(np.median(norm.values))
    if limit and level > CLIPPED_RATIO * limit:
        yield warn(f"gradient norm {level:.3g} (median of {len(norm)} rows), clipped at {limit:g} at every step")


GRADIENT = Check(
    "KD223",
    "gradient norm",
    "a gradient norm of 0, a hundred times its level before, or ten times the limit at every step",
    "0: the loss hangs on nothing that is trained. Growing: the learning rate is too high. Always clipped: the loss is "
    "summed where it should be averaged, and every step has the same length whatever the learning rate was meant for.",
    "0: see what requires a gradient. Else average the loss over counted tokens, and lower the learning rate.",
    "Pascanu et al. 2013, arXiv:1211.5063",
    check_gradient,
)

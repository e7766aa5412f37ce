"""How long a run takes: from a measured run, or from what the card's maker states."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kdkit.config import DistillConfig
from kdkit.errors import UserError
from kdkit.memory.activations import HALF, SINGLE
from kdkit.memory.cards import Card
from kdkit.memory.estimate import OFFLOAD
from kdkit.memory.sizes import ModelSizes

WEEK_HOURS = 30.0
"""GPU hours that Kaggle gives in a week."""
EFFICIENCY = 0.3
"""Share of the stated rate that matrix products of a training step reach; an assumption, not a measurement."""
HALF_FULL_TOKENS = 512
"""Tokens of a pass at which small products reach half of that share; likewise assumed."""
HOST_BANDWIDTH = 8.0
"""From host to card, in 10^9 bytes a second, over PCIe 3.0 as clouds have it; assumed."""
LAUNCH_SECONDS = 0.0004
"""Host's time for one layer's kernels, forward and back: small batches wait for it."""


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step, and where the number comes from."""

    step_seconds: float
    source: str
    """In words, for the reader."""


def looked_up_speed(config: DistillConfig, *, teacher: ModelSizes, student: ModelSizes, card: Card) -> Speed:
    """An optimizer step by the operations it takes, the card's stated rate and an assumed share of it.

    Args:
        config: the run, or one stage of it.
        teacher: the teacher's sizes.
        student: the student's sizes.
        card: on which it is to run.
    Returns:
        The speed; wrong by a factor of two or so, and right in what is faster than what.
    """
    optim, length = config.optim, config.data.max_length
    num_tokens = optim.batch_size * length
    stated = card.single_tflops if optim.precision == "float32" else card.half_tflops
    rate = EFFICIENCY * 1e12 * stated * num_tokens / (num_tokens + HALF_FULL_TOKENS)
    passes = 4 if config.student.gradient_checkpointing else 3  # of 2 operations a parameter
    work = 2 * passes * _operations(student, length)
    layers = student.num_layers * (passes / 3)
    if config.objective.needs_teacher and config.teacher.cache is None:
        # NF4 is unpacked for every product: about a third more
        work += 2 * _operations(teacher, length) * (1.35 if config.teacher.quantization else 1.0)
        layers += teacher.num_layers / 3
    micro = work * num_tokens / rate + layers * LAUNCH_SECONDS + _head_seconds(config, student, card)
    if config.teacher.device == OFFLOAD:
        micro += HALF * teacher.num_params / (1e9 * HOST_BANDWIDTH)
    step = optim.accumulation * micro + 20 * student.num_params / (1e9 * card.bandwidth)
    step += _writing_seconds(config, student, card)
    return Speed(step, f"looked up: {EFFICIENCY:.0%} of {stated:g} TFLOP/s, what its maker states")


def measured_speed(run: Path) -> Speed:
    """The median optimizer step of a run that was made.

    Args:
        run: its folder, with metrics.jsonl.
    Raises:
        UserError: it has logged fewer than two intervals.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{run} has no metrics.jsonl: give the folder of a run")
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        train = [row for row in rows if row.get("kind") == "train"]
        intervals = [
            row["seconds"] / (row["step"] - before["step"])
            for before, row in itertools.pairwise(train)
            if row["stage"] == before["stage"] and row["step"] > before["step"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no log of a run ({type(error).__name__}: {error}): give the folder of one"
        ) from error
    if not intervals:
        raise UserError(f"{file} has {len(train)} rows of training: two of one stage are needed to tell its speed")
    return Speed(median(intervals), f"measured: median of {len(intervals)} intervals of {run}")


def _operations(sizes: ModelSizes, length: int) -> float:
    """Multiply-adds of one token's forward pass; causal attention reads half of the row on average."""
    return sizes.active_params + sizes.num_layers * sizes.query_width * length


def _head_seconds(config: DistillConfig, student: ModelSizes, card: Card) -> float:
    """The head's weight gradient is read and written once a chunk."""
    chunks = config.optim.batch_size * config.data.max_length / config.objective.chunk_tokens
    touched = chunks * student.vocab_size * student.hidden * (2 * SINGLE + 2 * HALF)
    return touched / (1e9 * card.bandwidth)


def _writing_seconds(config: DistillConfig, student: ModelSizes, card: Card) -> float:
    """The student's own text: each token of it reads all weights once for all prompts answered together."""
    rollout = config.rollout
    if not rollout.is_on:
        return 0.0
    share = 1.0 if rollout.mode == "on_policy" else 0.5
    token = SINGLE * student.num_params / (1e9 * card.bandwidth) + student.num_layers * LAUNCH_SECONDS / 3
    return share * config.optim.accumulation * rollout.max_new_tokens * token

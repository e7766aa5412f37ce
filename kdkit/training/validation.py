"""The training objective over the validation rows: by sums and counts, every row once whatever the batches.

The Trainer's own evaluation averages the means of batches, so that the last, shorter batch weighs too much, and rows
that a distributed sampler repeats count twice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from kdkit.data.batch import Batch
from kdkit.training.metrics import RunningSums
from kdkit.training.objective import Moment, Objective, count_items

Feed = Callable[[Batch], tuple[Batch, object]]
"""A batch on its device, with the teacher's signal for it."""


def noted_rows(batches: Iterable[Batch], note: Callable[[bytes], object]) -> Iterator[Batch]:
    """The batches as they are; the keys of their rows are noted as they come by."""
    for batch in batches:
        note(batch["row_keys"].tobytes())
        yield batch


def shared_batches(batches: Iterable[Batch], accelerator: Accelerator) -> Iterator[tuple[Batch, bool]]:
    """This process's batches; each process gets as many, so a repeated one is marked as not counted.

    Args:
        batches: all of them, the same in every process.
        accelerator: knows the processes.
    Yields:
        A batch and whether it counts.
    """
    num, rank = accelerator.num_processes, accelerator.process_index
    if num == 1:
        yield from ((batch, True) for batch in batches)
        return
    every = list(batches)
    for start in range(0, len(every), num):
        mine = start + rank
        yield every[min(mine, len(every) - 1)], mine < len(every)


@torch.no_grad()
def measure_objective(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[tuple[Batch, bool]],
    *,
    feed: Feed,
    moment: Moment,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Objective and cross-entropy over the rows of all processes.

    Args:
        model: a `DistillModel`, wrapped or not; left in evaluation mode.
        objective: the model's.
        batches: from `shared_batches`.
        feed: moves a batch and asks the teacher.
        moment: the step whose weights and temperature hold.
        accelerator: adds up over processes.
    Returns:
        `loss`, `part/<term>`, `cross_entropy` in nats a token and `perplexity`, which is never capped.
    """
    model.eval()
    totals = RunningSums()
    for batch, counted in batches:
        inputs, signal = feed(batch)
        outputs = model(inputs, signal=signal, moment=moment, extras=("label_logprobs",))
        _add(totals, outputs, inputs, share=float(counted), device=accelerator.device)
    totals.complete_step()
    values, _ = totals.take_over_processes(accelerator)
    sums = {name: value[0] for name, value in values.items()}
    figures: dict[str, float] = {"loss": 0.0}
    for term in objective.terms:
        if term.name in sums:
            part = sums[term.name] / max(sums[term.counts], 1.0)
            figures[f"part/{term.name}"] = part
            figures["loss"] += part * term.weight(moment) * term.scale(moment)
    figures["cross_entropy"] = sums["nll"] / max(sums["tokens"], 1.0)
    with np.errstate(over="ignore"):  # never capped: infinite is what it is
        figures["perplexity"] = float(np.exp(figures["cross_entropy"]))
    return figures


def _add(totals: RunningSums, outputs: Mapping[str, Any], inputs: Batch, *, share: float, device: torch.device) -> None:
    """Add a batch, or nothing under the same names, so that all processes have as many figures to add up."""
    figures = {name: torch.tensor(float(number), device=device) for name, number in count_items(inputs).items()}
    figures |= outputs["sums"] | {"nll": -outputs["extras"]["label_logprobs"].double().sum()}
    for name, value in figures.items():
        totals.add(name, share * value)

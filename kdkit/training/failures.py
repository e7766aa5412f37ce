"""How a stage breaks off: one message each, with what is to be done, and the batch that did it on disk."""

from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save_file

from kdkit.data.batch import Batch, batch_tensors
from kdkit.errors import RunFailed
from kdkit.memory.blame import blame
from kdkit.memory.estimate import MemoryPlan


def stop_at_nonfinite(what: str, *, stage: str, step: int, batch: Batch | None, folder: Path) -> NoReturn:
    """Save the batch and end the run; weights, and so the last checkpoint, are those of the last good step.

    Args:
        what: is not finite.
        stage: name of the stage.
        step: that failed.
        batch: last seen.
        folder: of the stage.
    Raises:
        RunFailed: always.
    """
    file = folder / f"nonfinite-batch-{step}.safetensors"
    save_file({} if batch is None else batch_tensors(batch), file)
    raise RunFailed(
        f"stage {stage}, step {step}: {what}. The batch is saved as {file}. "
        "Usual causes: a learning rate too high, fp16 overflow in the student or teacher (try "
        "optim.precision=float32, teacher.dtype=float32), a temperature far from 1."
    )


def out_of_memory(error: torch.OutOfMemoryError, *, stage: str, step: int, plan: MemoryPlan | None = None) -> RunFailed:
    """What to raise where the card has no room for a step.

    Args:
        error: as torch raised it.
        stage: name of the stage.
        step: that failed.
        plan: what was planned for the stage, if anything was.
    """
    said = "" if plan is None else blame(plan.parts)
    blamed = f"{said[0].upper()}{said[1:]}. " if said else ""
    return RunFailed(
        f"stage {stage}, step {step}: the card's memory is used up ({error}). {blamed}Lower "
        "optim.batch_size (and raise optim.accumulation), data.max_length, objective.chunk_tokens or "
        "rollout.batch_size (prompts that the student answers together), or set "
        "student.gradient_checkpointing=true, and run again with another --output; kdkit plan CONFIG --fit proposes "
        "settings that fit"
    )

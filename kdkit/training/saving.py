"""What a stage writes beside the Trainer's own files, and how it gets to its place: staged, sealed, renamed.

`checkpoint` knows folders alone; here is what lies in them, and that several processes come along while one writes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdkit.errors import RunFailed
from kdkit.loading import LORA_FOLDER, has_lora, merge_lora, read_lora, write_lora
from kdkit.runtime import preserved_rng_state
from kdkit.training import checkpoint
from kdkit.training.model import DistillModel

ADAPTERS_FILE = "adapters.safetensors"
AVERAGE_FOLDER = "ema"
"""Inside a checkpoint: student and adapters with the average of their weights."""


class StageWriter:
    """Writes folders of a stage, whole or not at all.

    Args:
        folder: the stage's.
        stage: its name, for messages.
        accelerator: knows the processes; all of them come to every method.
        is_writing: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, *, stage: str, accelerator: Accelerator, is_writing: bool) -> None:
        self.folder = folder
        self.stage = stage
        self.accelerator = accelerator
        self.is_writing = is_writing
        self._is_staging = False
        self._written_bytes: dict[str, int] = {}

    @property
    def target(self) -> Path:
        """Where the Trainer may write now: the staging folder inside `staged`, so that nothing half-written counts."""
        return self.folder / checkpoint.STAGING if self._is_staging else self.folder

    @contextmanager
    def staged(self, prefix: str, step: int, *, estimated_bytes: int) -> Iterator[Path]:
        """A folder to be filled; what is not published inside is gone afterwards.

        Args:
            prefix: what comes before the step in the folder's name.
            step: completed optimizer steps.
            estimated_bytes: room to ask for until one of this prefix has been written.
        Yields:
            The folder; the process that writes makes it.
        Raises:
            RunFailed: there is no room for it, or it could not be written.
        """
        if self.is_writing:
            checkpoint.check_room(self.folder, self._written_bytes.get(prefix, estimated_bytes))
        try:
            with self._into_staging() as staging:
                yield staging / f"{prefix}{step}"
                self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise RunFailed(
                f"stage {self.stage}, step {step}: the checkpoint could not be written ({error}). "
                "Nothing half-written is left and the previous checkpoint is kept."
            ) from error
        self.accelerator.wait_for_everyone()

    def publish(self, staged: Path) -> None:
        """Move a filled folder to its place, once every process has written its part."""
        self.accelerator.wait_for_everyone()
        if self.is_writing:
            self._measure(staged)
            checkpoint.publish(staged, self.folder / staged.name)

    def discard(self, staged: Path) -> None:
        """Leave a filled folder unpublished: it only showed that it can be written."""
        self.accelerator.wait_for_everyone()
        if self.is_writing:
            self._measure(staged)

    def _measure(self, staged: Path) -> None:
        """Remember how much room such a folder needs."""
        sizes = [file.stat().st_size for file in staged.rglob("*") if file.is_file()]
        self._written_bytes[staged.name.rstrip("0123456789")] = sum(sizes)

    @contextmanager
    def _into_staging(self) -> Iterator[Path]:
        staging = self.folder / checkpoint.STAGING
        if self.is_writing:
            checkpoint.clear_staging(self.folder)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._is_staging = True
        try:
            yield staging
        finally:
            self._is_staging = False
            if self.is_writing:
                checkpoint.clear_staging(self.folder)


def write_student(
    model: DistillModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    gathered: Mapping[str, Tensor] | None = None,
) -> None:
    """Student and tokenizer as `from_pretrained` reads them, adapters beside them; of a frozen student its LoRA alone.

    Args:
        model: holds the weights, unless FSDP has cut them into shards.
        folder: made where it is not there.
        tokenizer: the student's.
        gathered: whole weights of a sharded model, under its names; None: the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student = adapters = None  # None: the module's own, which FSDP has cut into shards
    if gathered is not None:
        student, adapters = _below(gathered, "student."), _below(gathered, "adapters.")
        for tied in model.student.all_tied_weights_keys:  # gathered one by one, they no longer share memory
            student.pop(tied, None)
    if has_lora(model.student):
        write_lora(model.student, folder / LORA_FOLDER)
    else:
        model.student.save_pretrained(folder, state_dict=student, max_shard_size="1000GB")
    adapters = model.adapters.state_dict() if adapters is None else adapters
    if adapters:
        save_file({name: value.contiguous() for name, value in adapters.items()}, folder / ADAPTERS_FILE)
    tokenizer.save_pretrained(folder)


def read_student(model: DistillModel, folder: Path) -> None:
    """Put what `write_student` wrote into a model, every key accounted for."""
    if has_lora(model.student):
        read_lora(model.student, folder / LORA_FOLDER)
    else:
        with preserved_rng_state():  # from_pretrained knows how the weights of each architecture are stored
            saved = type(model.student).from_pretrained(folder, dtype=torch.float32)
        model.student.load_state_dict(saved.state_dict())
    if len(model.adapters):
        model.adapters.load_state_dict(load_file(folder / ADAPTERS_FILE))


def merge_student(model: DistillModel, folder: Path) -> None:
    """Put the whole student beside its LoRA weights in a folder, as `from_pretrained` reads it; nothing for others.

    Args:
        model: what was trained; of no use for training afterwards.
        folder: holds what `write_student` wrote.
    """
    if has_lora(model.student):
        read_lora(model.student, folder / LORA_FOLDER)
        merge_lora(model.student)
        model.student.save_pretrained(folder, max_shard_size="1000GB")


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state dict under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

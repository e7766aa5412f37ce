"""What a finished run wrote: the student's texts in its replay buffer, and a prediction that shows much."""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from kdkit.config import load_config
from kdkit.errors import UserError
from kdkit.loading import load_tokenizer
from kdkit.training.checkpoint import PREFIX, newest_checkpoint
from kdkit.training.folder import CONFIG_FILE, RunFolder
from kdkit.training.rollout import TEXTS_FILE, unpack_texts

MOST_WORDS_OF_AN_EXAMPLE = 30
"""A picture of the alignment still has room to name that many."""


def replayed_texts(folder: str | Path) -> list[dict[str, Any]]:
    """What a run's replay buffer held at its last checkpoint, newest first.

    Args:
        folder: of a run whose last stage trained on the student's own text.
    Returns:
        One row a text: `prompt`, `text`, `age_steps` and `teacher_logprob` (nats a token; NaN: not asked for).
    Raises:
        UserError: the folder holds no run, or none with a replay buffer.
    """
    run = RunFolder(Path(folder))
    if not (run.path / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds no run")
    config = load_config(run.path / CONFIG_FILE)
    newest = newest_checkpoint(run.stage(list(config.stages)[-1]))
    if newest is None or not (newest / TEXTS_FILE).is_file():
        raise UserError(
            f"the last stage of {folder} has no replay buffer: its rollout.mode is off, or it saved nothing"
        )
    tokenizer, step = load_tokenizer(newest), int(newest.name.removeprefix(PREFIX))
    return [
        {
            "prompt": tokenizer.decode(held.row["input_ids"][: held.row["prompt_length"]]),
            "text": tokenizer.decode(held.row["input_ids"][held.row["prompt_length"] :], skip_special_tokens=True),
            "age_steps": step - held.born_step,
            "teacher_logprob": held.score,
        }
        for held in reversed(unpack_texts(load_file(newest / TEXTS_FILE)))
    ]


def choose_example(predictions: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row whose alignment shows most: the teacher's answer has the reference's words at other places.

    Args:
        predictions: of a run that measured its teacher; at least one.
    Returns:
        Of the rows with words few enough to be read, the one with the most that are shifted; the first where several
        are as good.
    """

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, int]:
        own, reference = (row["teacher"] or "").split(), row["references"][0].split()
        blocks = SequenceMatcher(None, reference, own, autojunk=False).get_matching_blocks()
        num_shifted = sum(block.size for block in blocks if block.a != block.b)
        return bool(own), max(len(own), len(reference)) <= MOST_WORDS_OF_AN_EXAMPLE, num_shifted

    return max(predictions, key=rank)

"""The teacher's own answers as training text: sequence-level distillation, and a use for prompts without answers."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdkit.config import DistillConfig
from kdkit.data.rows import Rows, load_rows
from kdkit.errors import UserError
from kdkit.evaluation import Answer, GenerationSettings, generate_answers
from kdkit.loading import load_teacher, load_tokenizer
from kdkit.runtime import preflight

PORTION_ROWS = 256
"""Rows answered between two writes; what is lost when the machine dies."""


def write_teacher_answers(
    config: DistillConfig,
    output: Path,
    *,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Have the teacher answer every training prompt, rows without an answer included.

    The file has one `{"prompt", "completion", "ended"}` a line, in the order of the rows; train on it
    with `data.train=FILE` and `data.train_template="{instruction}"`. Answers that were cut at
    `evaluation.max_new_tokens` are left out, since they would teach the student not to stop.

    Args:
        config: names teacher, rows and how to decode (`evaluation`).
        output: JSONL file to make; `output` + ".partial" holds the portions until all are there.
        resume: keep the portions of an earlier, stopped call; its prompts are compared, its teacher and decoding are
            taken on trust.
        progress: called after each batch; may raise to stop.
    Returns:
        Number of answers written.
    Raises:
        UserError: the file is there already; or a stopped call's portions are and `resume` is off, or they answer
            other prompts.
    """
    partial = output.with_name(output.name + ".partial")
    if output.exists():
        raise UserError(f"--output {output} exists; give another file")
    if partial.exists() and not resume:
        raise UserError(f"{partial} is there from a stopped call: add --resume to continue it, or delete it")
    rows = _load_prompts(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    _answer_portions(config, rows, partial, progress)
    answers = [json.loads(line) for line in partial.read_text(encoding="utf-8").splitlines()]
    kept = [answer for answer in answers if answer["ended"] and answer["completion"].strip()]
    print(f"{len(answers) - len(kept)} answers without an end or without text left out", file=sys.stderr)
    finished = output.with_name(output.name + ".finished")
    finished.write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in kept), encoding="utf-8")
    os.replace(finished, output)
    partial.unlink()
    return len(kept)


def _load_prompts(config: DistillConfig) -> Rows:
    """The training prompts, whether or not they have an answer."""
    data = config.data
    return load_rows(
        data.train,
        columns=data.columns,
        template=data.template,
        limit=data.train_rows,
        require_references=False,
        tokenizer=_load_tokenizer(config),
    )


def _load_tokenizer(config: DistillConfig) -> PreTrainedTokenizerBase:
    teacher = config.teacher
    return load_tokenizer(teacher.path, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)


def _answer_portions(
    config: DistillConfig, rows: Rows, partial: Path, progress: Callable[[int, int], None] | None
) -> None:
    """Append answers portion by portion, after those that are there already."""
    held = _keep_whole_lines(partial)
    done = len(held)
    if [record["prompt"] for record in held] != rows.dataset["prompt"][:done]:
        raise UserError(f"{partial} holds answers to other prompts than these: delete it, or give another --output")
    machine = preflight()
    if not machine.ok:
        raise UserError(f"{machine.problem}\n  {machine.remedy}")
    settings, evaluation = config.teacher, config.evaluation
    model, tokenizer = load_teacher(settings, machine), _load_tokenizer(config)
    for start in range(done, len(rows), PORTION_ROWS):
        portion = rows.dataset.select(range(start, min(start + PORTION_ROWS, len(rows))))
        decoding = GenerationSettings(
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            num_beams=evaluation.num_beams,
            sampling_temperature=evaluation.sampling_temperature,
            top_p=evaluation.top_p,
            seed=config.seed + start,
        )
        answers = generate_answers(model, tokenizer, portion["prompt"], decoding, progress=progress)
        _append(partial, portion["prompt"], answers)
        print(f"{start + len(portion)}/{len(rows)} prompts answered", file=sys.stderr)


def _append(partial: Path, prompts: list[str], answers: list[Answer]) -> None:
    """Write a portion."""
    with partial.open("a", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            record = {"prompt": prompt, "completion": answer.text, "ended": answer.ended}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _keep_whole_lines(partial: Path) -> list[dict]:
    """Cut a last line that was not finished; returns the whole ones."""
    if not partial.is_file():
        return []
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    with partial.open("r+b") as file:
        file.truncate(len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]

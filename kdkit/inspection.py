"""A finished run looked at closely: its models beside each other on one prompt, and how soft-DTW aligns two of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkit.config import DistillConfig, load_config
from kdkit.config.reading import stage_config
from kdkit.data.batch import DistillCollator, encode_rows
from kdkit.data.rows import RowReport, Rows
from kdkit.data.templates import Question, prompt_renderer
from kdkit.errors import UserError
from kdkit.evaluation import GenerationSettings, generate_answers
from kdkit.loading import backbone_hidden, check_head, load_model, load_teacher, load_tokenizer
from kdkit.losses.alignment import alignment_loss, pool_units
from kdkit.runtime import preflight, preserved_rng_state, seed_everything
from kdkit.softdtw import expected_alignment, pairwise_cost
from kdkit.training.checkpoint import PREFIX, newest_checkpoint
from kdkit.training.folder import CONFIG_FILE, RunFolder
from kdkit.training.objective import PROJECTOR, Objective
from kdkit.training.rollout import TEXTS_FILE, unpack_texts
from kdkit.training.run import STAGE_SEED_STRIDE
from kdkit.training.trainer import ADAPTERS_FILE

MOST_WORDS_OF_AN_EXAMPLE = 30
"""A picture of the alignment still has room to name that many."""

StudentName = Literal["before", "student"]


@dataclass(frozen=True, eq=False)
class RunModels:
    """The models of a finished run, loaded to be asked."""

    config: DistillConfig
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    students: Mapping[StudentName, PreTrainedModel]
    """`before` as the run found it, `student` as the run left it."""
    projectors: Mapping[StudentName, nn.Module]
    """From each student's hidden states into the teacher's space; empty where the run aligned nothing."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """How soft-DTW aligns a student's reading of an answer with the teacher's; costs are means per unit."""

    matrix: np.ndarray
    """(n, m) probability that the alignment passes through a pair of units."""
    student_units: list[str]
    """n texts."""
    teacher_units: list[str]
    """m texts."""
    cost: float
    """Of an alignment drawn by soft-DTW."""
    diagonal_cost: float
    """Of the alignment that does not warp."""
    off_diagonal_fraction: float
    """Share of the alignment that lies off the one that does not warp, 0..1."""

    @property
    def finding(self) -> str:
        """Soft-DTW beside the diagonal, in one sentence."""
        return (
            f"soft-DTW costs {self.cost:.2f} a unit, the diagonal {self.diagonal_cost:.2f}; "
            f"{100 * self.off_diagonal_fraction:.0f} % of the alignment is off the diagonal"
        )


def load_run_models(folder: str | Path) -> RunModels:
    """Load teacher, student and the student's start of a finished run.

    Args:
        folder: of the run.
    Returns:
        The models in evaluation mode on this machine's device, students in float32.
    Raises:
        UserError: the folder holds no finished run, or a model cannot be loaded.
    """
    run = RunFolder(Path(folder))
    if not (run.path / CONFIG_FILE).is_file() or not run.model.is_dir():
        raise UserError(f"{folder} holds no finished run: let the run end first")
    config, machine = load_config(run.path / CONFIG_FILE), preflight()
    load_student = partial(
        load_model,
        dtype=torch.float32,
        device=machine.device,
        attn_implementation=config.student.attention,
        trust_remote_code=config.student.trust_remote_code,
    )
    before = load_student(
        config.student.path,
        revision=config.student.revision,
        from_scratch=config.student.from_scratch,
        seed=config.seed,
    )
    students: dict[StudentName, PreTrainedModel] = {"before": before, "student": load_student(run.model)}
    projectors = _load_projectors(run, config, machine.device)
    return RunModels(config, load_tokenizer(run.model), load_teacher(config.teacher, machine), students, projectors)


def compare_answers(models: RunModels, prompt: str) -> dict[str, str]:
    """What each model of a run answers to one prompt, decoded as the run's evaluation does.

    Args:
        models: of the run.
        prompt: as a person types it; the run's template is put around it.
    Returns:
        `prompt` and the answers of `before`, `student` and `teacher`, the form of a run's predictions.
    Raises:
        UserError: the prompt is empty or leaves no room for an answer.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty: type a question or a task")
    written = prompt_renderer(models.config.data.template, models.tokenizer)(Question(prompt.strip()))
    evaluation = models.config.evaluation
    settings = GenerationSettings(
        max_new_tokens=evaluation.max_new_tokens,
        num_beams=evaluation.num_beams,
        sampling_temperature=evaluation.sampling_temperature,
        top_p=evaluation.top_p,
        seed=models.config.seed,
    )
    asked = [*models.students.items(), ("teacher", models.teacher)]
    answers = {name: generate_answers(model, models.tokenizer, [written], settings)[0].text for name, model in asked}
    return {"prompt": prompt.strip(), **answers}


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


@torch.no_grad()
def alignment_of(
    models: RunModels,
    prompt: str,
    answer: str,
    *,
    student: StudentName = "student",
    teacher_answer: str | None = None,
) -> Alignment:
    """The expected alignment of one answer, with the run's gamma, band, metric and unit.

    Importance weights and an adaptive band are left out: costs of different runs can be compared.

    Args:
        models: of a run with a dtw term.
        prompt: as the models read it, template included.
        answer: the text whose hidden states are aligned.
        student: whose: at the start of training (with the projector training began with) or at its end.
        teacher_answer: what the teacher reads instead of `answer`; training always gives both the same.
    Returns:
        The alignment of the answer's units.
    Raises:
        UserError: the run aligned nothing, or an answer has no units.
    """
    aligning = _aligning_stage(models.config)
    if aligning is None or student not in models.projectors:
        raise UserError("the run aligned nothing, so that there is no projector: give objective.dtw a weight")
    dtw = aligning[1].objective.dtw
    x, student_units = _read(models, models.students[student], prompt, answer)  # (1, N, H)
    y, teacher_units = _read(models, models.teacher, prompt, answer if teacher_answer is None else teacher_answer)
    x, y = models.projectors[student](x), y.to(x.device)  # (1, N, D), (1, M, D)
    gamma = dtw.gamma.at(int(student == "student"), 1)
    matrix = expected_alignment(pairwise_cost(x, y, dtw.metric), None, None, gamma=gamma, band=dtw.band)  # (1, N, M)
    # The run's own normaliser is put aside: costs are per unit.
    compared = alignment_loss(x, y, None, None, gamma=gamma, band=dtw.band, metric=dtw.metric, normalize="max_length")
    return Alignment(
        matrix[0].cpu().numpy(),
        student_units,
        teacher_units,
        cost=compared.expected.item(),
        diagonal_cost=compared.diagonal.item(),
        off_diagonal_fraction=compared.off_diagonal_fraction.item(),
    )


def _aligning_stage(config: DistillConfig) -> tuple[int, DistillConfig] | None:
    """Index and config of the first stage with a dtw term."""
    stages = [stage_config(config, name) for name in config.stages]
    return next(((i, s) for i, s in enumerate(stages) if s.objective.dtw.weight.largest > 0), None)


def _load_projectors(run: RunFolder, config: DistillConfig, device: str) -> dict[StudentName, nn.Module]:
    """The trained projector, and the one that training began with: its seed makes it again."""
    aligning, file = _aligning_stage(config), run.model / ADAPTERS_FILE
    if aligning is None or not file.is_file():
        return {}
    index, stage = aligning
    trained = load_file(file)
    teacher_size, student_size = trained[f"{PROJECTOR}.weight"].shape
    with preserved_rng_state():
        seed_everything(config.seed + STAGE_SEED_STRIDE * index)
        before, after = (Objective(stage.objective).build_adapters(student_size, teacher_size) for _ in range(2))
    after.load_state_dict(trained)
    return {"before": before[PROJECTOR].to(device), "student": after[PROJECTOR].to(device)}


def _read(models: RunModels, model: PreTrainedModel, prompt: str, answer: str) -> tuple[Tensor, list[str]]:
    """Pooled hidden states (1, U, H) of an answer's units, float32, and the units' texts."""
    data, tokenizer = models.config.data, models.tokenizer
    aligning = _aligning_stage(models.config)
    unit = aligning[1].objective.dtw.unit if aligning else "word"
    row = Rows(Dataset.from_dict({"prompt": [prompt], "references": [[answer]]}), "answer", RowReport(1, 1, {}), "")
    encoded = encode_rows(
        row, tokenizer, max_length=data.max_length, max_prompt_length=data.max_prompt_length, unit=unit
    )
    batch = DistillCollator(tokenizer.pad_token_id)([encoded.dataset[0]])
    if batch["max_units"] == 0:
        raise UserError(f"the answer {answer!r} has no words to align")
    ids, unit_ids = batch["input_ids"], batch["unit_ids"]
    hidden = _hidden_states(model, ids.to(model.device), batch["attention_mask"].to(model.device))
    units, _ = pool_units(hidden.float(), unit_ids.to(model.device), batch["max_units"])
    return units, [tokenizer.decode(ids[unit_ids == u]).strip() for u in range(batch["max_units"])]


def _hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(1, T, H) as training sees them."""
    if check_head(model) is None:
        return backbone_hidden(model, input_ids, attention_mask)
    seen = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True)
    return seen.hidden_states[-1]

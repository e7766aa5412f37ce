"""The models of a finished run: loaded, and asked the same question."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkit.config import DistillConfig, load_config
from kdkit.config.reading import stage_config
from kdkit.data.batch import Batch, DistillCollator
from kdkit.data.encoding import encode_rows
from kdkit.data.rows import RowReport, Rows
from kdkit.data.spans import tokenizer_relation
from kdkit.data.templates import Question, prompt_renderer
from kdkit.errors import UserError
from kdkit.evaluation import GenerationSettings, generate_answers
from kdkit.loading import load_model, load_teacher, load_tokenizer
from kdkit.runtime import preflight, preserved_rng_state, seed_everything
from kdkit.training.folder import CONFIG_FILE, RunFolder
from kdkit.training.objective import PROJECTOR, build_projector
from kdkit.training.run import STAGE_SEED_STRIDE
from kdkit.training.saving import ADAPTERS_FILE

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
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    """The teacher's, where it reads text in another way."""

    def tokenizer_of(self, model: PreTrainedModel) -> PreTrainedTokenizerBase:
        """What one of the models reads and writes by."""
        return self.teacher_tokenizer or self.tokenizer if model is self.teacher else self.tokenizer


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
    teacher, own = config.teacher, load_tokenizer(run.model)
    theirs = load_tokenizer(teacher.path, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    other = theirs if tokenizer_relation(own, theirs).kind == "different" else None
    return RunModels(config, own, load_teacher(config.teacher, machine), students, projectors, other)


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
    template, question = models.config.data.template, Question(prompt.strip())
    evaluation = models.config.evaluation
    settings = GenerationSettings(
        max_new_tokens=evaluation.max_new_tokens,
        num_beams=evaluation.num_beams,
        sampling_temperature=evaluation.sampling_temperature,
        top_p=evaluation.top_p,
        seed=models.config.seed,
    )
    answers = {}
    for name, model in [*models.students.items(), ("teacher", models.teacher)]:
        tokenizer = models.tokenizer_of(model)
        written = prompt_renderer(template, tokenizer)(question)
        answers[name] = generate_answers(model, tokenizer, [written], settings)[0].text
    return {"prompt": prompt.strip(), **answers}


def encode_answer(models: RunModels, prompt: str, answer: str, *, model: PreTrainedModel | None = None) -> Batch:
    """One answer to one prompt as a batch of training would hold it.

    Args:
        models: of the run, whose tokenizer, lengths and unit are taken.
        prompt: as the models read it, template included.
        answer: of the row.
        model: which of the models reads it; None: a student.
    Returns:
        The batch of one row.
    Raises:
        UserError: nothing is left of the row after tokenising.
    """
    data, tokenizer = models.config.data, models.tokenizer if model is None else models.tokenizer_of(model)
    aligning = aligning_stage(models.config)
    unit = aligning[1].objective.unit if aligning else "word"
    row = Rows(Dataset.from_dict({"prompt": [prompt], "references": [[answer]]}), "answer", RowReport(1, 1, {}), "")
    encoded = encode_rows(
        row, tokenizer, max_length=data.max_length, max_prompt_length=data.max_prompt_length, unit=unit
    )
    assert tokenizer.pad_token_id is not None
    return DistillCollator(tokenizer.pad_token_id)([encoded.dataset[0]])


def aligning_stage(config: DistillConfig) -> tuple[int, DistillConfig] | None:
    """Index and config of the first stage with a dtw term."""
    stages = [stage_config(config, name) for name in config.stages]
    return next(((i, s) for i, s in enumerate(stages) if s.objective.dtw.weight.largest > 0), None)


def _load_projectors(run: RunFolder, config: DistillConfig, device: str) -> dict[StudentName, nn.Module]:
    """The trained projector, and the one that training began with: its seed makes it again."""
    aligning, file = aligning_stage(config), run.model / ADAPTERS_FILE
    if aligning is None or not file.is_file():
        return {}
    index, _ = aligning
    trained = load_file(file)[f"{PROJECTOR}.weight"]
    teacher_size, student_size = trained.shape
    with preserved_rng_state():
        seed_everything(config.seed + STAGE_SEED_STRIDE * index)
        before, after = (build_projector(student_size, teacher_size) for _ in range(2))
    after.load_state_dict({"weight": trained})
    return {"before": before.to(device), "student": after.to(device)}

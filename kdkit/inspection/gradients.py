"""Whose gradient moves the student: each term's by itself, on one batch, at the checkpoints of a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file
from torch import Tensor

from kdkit.config import DistillConfig, load_config
from kdkit.config.reading import stage_config
from kdkit.data.batch import Batch, DistillCollator
from kdkit.data.spans import tokenizer_relation
from kdkit.errors import UserError
from kdkit.loading import check_head, head_width, load_model, load_teacher, load_tokenizer, shared_vocab_size
from kdkit.runtime import Preflight, preflight, preserved_rng_state
from kdkit.teacher.cross import CrossSignal
from kdkit.teacher.signal import TeacherSignal
from kdkit.teacher.sources import LiveTeacher
from kdkit.training import checkpoint
from kdkit.training.folder import CONFIG_FILE, RunFolder
from kdkit.training.model import DistillModel
from kdkit.training.objective import Across, Moment, Objective, count_items, relate_vocabularies
from kdkit.training.rows import RunRows
from kdkit.training.saving import ADAPTERS_FILE

NUM_ROWS = 8
"""Validation rows of the batch."""


@dataclass(frozen=True)
class TermGradient:
    """What one term alone would do to the student's weights."""

    norm: float
    """Of the gradient of the weighted term."""
    cosine: float
    """With the gradient of all terms; below 0 it pulls against them. 0 where either vanishes."""


@dataclass(frozen=True)
class BatchGradients:
    """The gradients of one batch with respect to the student; adapters are left out."""

    loss: float
    norm: float
    """Of the gradient of all terms together."""
    terms: dict[str, TermGradient]
    """Of the terms that have a weight at that moment."""

    @property
    def shares(self) -> dict[str, float]:
        """Each term's norm in percent of the sum of all norms; norms do not add up to the norm of the whole."""
        total = sum(term.norm for term in self.terms.values())
        return {name: 100 * term.norm / total if total else 0.0 for name, term in self.terms.items()}


def term_gradients(
    model: DistillModel, batch: Batch, *, signal: TeacherSignal | CrossSignal | None, moment: Moment
) -> BatchGradients:
    """The gradient of each term by itself, after one pass of the student.

    Args:
        model: student, adapters and objective; nothing of it is changed.
        batch: what the collator made, on the student's device.
        signal: the teacher's, with what `model.objective.views_at(moment)` asks for.
        moment: decides on weights and temperature; its counts are those of the batch.
    Returns:
        BatchGradients.
    """
    weights = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
    active = [term for term in model.objective.terms if term.weight(moment) > 0]
    seen = model.see(batch, model.objective.views_at(moment))
    gradients, loss = {}, 0.0
    for term in active:
        alone = model.objective.only(term.name)(seen, batch, signal=signal, moment=moment, adapters=model.adapters)
        assert isinstance(alone["loss"], Tensor)
        loss += alone["loss"].item()
        gradients[term.name] = _flat_gradient(alone["loss"], weights)
    whole = torch.stack(list(gradients.values())).sum(0)
    norm = whole.norm().item()
    terms = {name: TermGradient(own.norm().item(), _cosine(own, whole)) for name, own in gradients.items()}
    return BatchGradients(loss, norm, terms)


def gradient_rows(folder: str | Path, *, stage: str | None = None, num_rows: int = NUM_ROWS) -> list[dict[str, object]]:
    """Whose gradient moved the student of a run, at each checkpoint that it kept (`checkpoint.keep`).

    All are measured on the same validation rows, with the weights and the temperature of the checkpoint's step.

    Args:
        folder: of a run; one that has ended.
        stage: which; None: the last one.
        num_rows: validation rows in the batch.
    Returns:
        One row a checkpoint, of kind "gradient": `step`, `loss`, `gradient_norm`, and for each term
        `gradient_share/<term>` in percent and `gradient_cosine/<term>`.
    Raises:
        UserError: the folder holds no finished run, or a model cannot be loaded.
    """
    run = RunFolder(Path(folder))
    if not (run.path / CONFIG_FILE).is_file() or not run.model.is_dir():
        raise UserError(f"{folder} holds no finished run: let the run end first")
    config = load_config(run.path / CONFIG_FILE)
    name = stage or list(config.stages)[-1]
    config = stage_config(config, name)
    with preserved_rng_state():
        scene = _load_scene(config, run, num_rows=num_rows)
        return [
            {"kind": "gradient", "stage": name, "step": step, **_row_of(gradients)}
            for step, gradients in scene.measure(run.stage(name))
        ]


@dataclass(frozen=True)
class _Scene:
    """What is the same at all checkpoints of a stage."""

    config: DistillConfig
    machine: Preflight
    teacher: LiveTeacher | None
    across: Across | None
    vocab_size: int | None
    batch: Batch

    def measure(self, stage: Path) -> Iterator[tuple[int, BatchGradients]]:
        places = sorted((int(place.name.removeprefix(checkpoint.PREFIX)), place) for place in _checkpoints(stage))
        num_steps = max((step for step, _ in places), default=0)
        for step, place in places:
            model = self._model_at(place)
            moment = Moment(step, num_steps, {name: float(count) for name, count in count_items(self.batch).items()})
            views = model.objective.views_at(moment)
            signal = None if self.teacher is None else self.teacher(self.batch, views)
            yield step, term_gradients(model, self.batch, signal=signal, moment=moment)

    def _model_at(self, place: Path) -> DistillModel:
        """Student and adapters as a checkpoint has them."""
        settings = self.config.student
        student = load_model(
            place,
            dtype=torch.float32,
            device=self.machine.device,
            trainable=True,
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        ).eval()
        model = DistillModel(
            student,
            Objective(self.config.objective, across=self.across),
            teacher=None if self.teacher is None else self.teacher.shape,
            vocab_size=self.vocab_size,
            dense=check_head(student) is not None,
        )
        if (place / ADAPTERS_FILE).is_file():
            model.adapters.load_state_dict(load_file(place / ADAPTERS_FILE))
        model.adapters.to(self.machine.device)
        return model


def _load_scene(config: DistillConfig, run: RunFolder, *, num_rows: int) -> _Scene:
    """Tokenizers, teacher and one batch of a stage, put together as the run did."""
    machine, tokenizer = preflight(), load_tokenizer(run.model)
    revision = config.teacher.revision
    theirs = load_tokenizer(config.teacher.path, revision=revision, trust_remote_code=config.teacher.trust_remote_code)
    kind = tokenizer_relation(tokenizer, theirs).kind
    other = theirs if kind == "different" else None
    rows = RunRows(tokenizer, other).encoded("validation", config).dataset
    collator = DistillCollator.of(tokenizer, other)
    batch = collator([rows[index] for index in range(min(num_rows, len(rows)))])
    batch = send_to_device(batch, machine.device)
    if not config.objective.needs_teacher:
        return _Scene(config, machine, None, None, None, batch)
    model = load_teacher(config.teacher, machine)
    student = load_model(run.model, dtype=torch.float32, device=machine.device)
    across = vocab_size = None
    if other is None:
        vocab_size = shared_vocab_size(model, student, len(tokenizer), kind=kind)
    else:
        widths = head_width(student), head_width(model)
        across = relate_vocabularies(config.objective.kd, tokenizer, other, widths=widths)
    teacher = LiveTeacher(
        model,
        vocab_size=vocab_size,
        dense=check_head(model) is not None,
        chunk_tokens=config.objective.chunk_tokens,
    )
    return _Scene(config, machine, teacher, across, vocab_size, batch)


def _checkpoints(stage: Path) -> list[Path]:
    return [place for place in stage.glob(f"{checkpoint.PREFIX}*") if checkpoint.is_whole(place)]


def _flat_gradient(loss: Tensor, weights: list[torch.nn.Parameter]) -> Tensor:
    """Of all weights laid end to end; the graph of the student's pass stays for the next term."""
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(weight).flatten() for weight in weights])
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    pairs = zip(weights, found, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in pairs])


def _cosine(a: Tensor, b: Tensor) -> float:
    scale = a.norm() * b.norm()
    return (a @ b / scale).item() if scale > 0 else 0.0


def _row_of(gradients: BatchGradients) -> dict[str, float]:
    shares = {f"gradient_share/{name}": share for name, share in gradients.shares.items()}
    cosines = {f"gradient_cosine/{name}": term.cosine for name, term in gradients.terms.items()}
    return {"loss": gradients.loss, "gradient_norm": gradients.norm, **shares, **cosines}

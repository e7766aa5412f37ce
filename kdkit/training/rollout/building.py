"""From a stage's config to its rollout: what can be refused is refused here, before step 1."""

from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkit.config import DistillConfig
from kdkit.data.batch import DistillCollator, EncodedRow, teacher_view
from kdkit.data.encoding import Unit
from kdkit.data.spans import text_not_given_back
from kdkit.errors import UserError
from kdkit.evaluation import GenerationSettings, label_losses
from kdkit.teacher.sources import LiveTeacher, TeacherSource
from kdkit.training.rollout.generator import StudentGenerator
from kdkit.training.rollout.guard import Guard
from kdkit.training.rollout.mixing import Rollout


def build_rollout(
    config: DistillConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    teacher: TeacherSource | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    collator: DistillCollator,
    num_steps: int,
    num_warmup_steps: int,
    references: Callable[[], Sequence[Sequence[str]]],
) -> Rollout | None:
    """The rollout of a stage, or None where its mode is off.

    Args:
        config: the stage's.
        tokenizer: the student's.
        teacher: where the signal comes from.
        teacher_tokenizer: the teacher's, where it is another one.
        collator: makes batches.
        num_steps: optimizer steps of the stage.
        num_warmup_steps: of them, those of the learning rate's warm-up.
        references: right answers of the training rows by row id; asked for only where the guard compares with them.
    Returns:
        Rollout or None.
    Raises:
        UserError: the teacher's signal was written down beforehand, so that it cannot read new text; or words are to be
            aligned and the tokenizer does not give back what it encoded.
    """
    settings, guard = config.rollout, config.rollout.guard
    if not settings.is_on:
        return None
    if not isinstance(teacher, LiveTeacher):
        raise UserError(
            f"rollout.mode {settings.mode} lets the student write new text, and a cached teacher knows only the text "
            "it was cached on: use a live teacher, or set rollout.mode=off"
        )
    drawing = GenerationSettings(
        max_new_tokens=settings.max_new_tokens,
        batch_size=config.rows_written_together,
        num_beams=settings.num_beams,
        sampling_temperature=settings.sampling_temperature,
        top_p=settings.top_p,
        seed=config.seed,
    )
    unit: Unit | None = config.objective.unit if config.objective.compares_units else None
    is_read_again = unit == "word" or teacher_tokenizer is not None
    if is_read_again and (lost := text_not_given_back(tokenizer)) is not None:
        raise UserError(
            f"the words of what the student writes (rollout.mode {settings.mode}) are to be aligned, and its tokenizer "
            f"does not give back {lost!r}: set objective.unit=token, or rollout.mode=off"
        )
    score = partial(teacher_scores, teacher.model, collator, batch_size=config.optim.batch_size)
    begin = settings.gate.begin_fraction if settings.gate is not None else 0.0
    return Rollout(
        settings,
        generate=StudentGenerator(tokenizer, drawing, unit, teacher_tokenizer),
        guard=Guard(
            guard,
            score=score if guard is not None and guard.min_teacher_logprob is not None else None,
            references=references() if guard is not None and guard.min_rouge_l is not None else None,
            vocab_size=teacher.vocab_size,
        ),
        collator=collator,
        seed=config.seed,
        num_steps=num_steps,
        begin_step=num_warmup_steps if begin is None else round(begin * num_steps),
    )


def teacher_scores(
    teacher: PreTrainedModel, collator: DistillCollator, rows: Sequence[EncodedRow], *, batch_size: int
) -> list[float]:
    """The teacher's mean log-likelihood of each row's response, in nats a token; −inf where it finds it impossible."""
    portions = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    batches = (teacher_view(collator(portion)) for portion in portions)
    losses = label_losses(teacher, batches, finite=False)
    return (-losses.sums / losses.num_tokens).tolist()

"""The tokenizers of a run: the student's, and the teacher's where it reads text in another way."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdkit.config import DistillConfig
from kdkit.data.spans import tokenizer_relation
from kdkit.errors import UserError
from kdkit.loading import TokenizerKind, load_tokenizer
from kdkit.training.progress import say


@dataclass(frozen=True)
class Tokenizers:
    """What a run reads text with."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase | None
    """None where it is the student's, or the student's with other reserved ids at the end."""
    kind: TokenizerKind
    """How the two compare."""


def load_tokenizers(config: DistillConfig, *, cached: Path | None = None, must_agree: bool = False) -> Tokenizers:
    """Load both tokenizers and compare them.

    Args:
        config: the run.
        cached: folder of the teacher's tokenizer where the teacher is cached; the two must then agree.
        must_agree: whether to refuse two that differ.
    Returns:
        Tokenizers.
    Raises:
        UserError: one cannot be read; they end text differently; or they differ and must not.
    """
    student, teacher = config.student, config.teacher
    other = load_tokenizer(
        cached or teacher.path,
        revision=None if cached else teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
    )
    if student.from_scratch and student.tokenizer is None:
        return Tokenizers(other, None, "same")
    tokenizer = load_tokenizer(
        student.tokenizer or student.path,
        revision=student.revision if student.tokenizer is None else None,
        trust_remote_code=student.trust_remote_code,
    )
    relation = tokenizer_relation(tokenizer, other)
    if relation.kind == "different":
        if cached is not None or must_agree:
            raise UserError(
                f"a cached teacher and its student need one tokenizer, and these differ: {relation.evidence}. Train on "
                "the teacher's answers instead (kdkit cache CONFIG --generate), ask the teacher itself "
                "(teacher.cache=null), or name a cache that was made with this student"
            )
        say(f"teacher and student have different tokenizers: {relation.evidence}; text is compared by its bytes")
        return Tokenizers(tokenizer, other, "different")
    if tokenizer.eos_token_id != other.eos_token_id:
        raise UserError(
            f"the teacher ends its text with {other.eos_token!r} and the student with {tokenizer.eos_token!r}: "
            "the student would learn an end that does not stop it. Pair a base model with a base model, a chat "
            "model with a chat model"
        )
    return Tokenizers(tokenizer, None, relation.kind)

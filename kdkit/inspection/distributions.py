"""What teacher and student expect at each position of an answer, and what a loss makes of it as temperature moves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkit.config.reading import stage_config
from kdkit.errors import UserError
from kdkit.inspection.runs import RunModels, StudentName, encode_answer
from kdkit.loading import shared_vocab_size
from kdkit.losses import LOSSES, divergence
from kdkit.plots import TokenView

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
"""At which curves over temperature are measured."""
_NUM_TOKENS_SHOWN = 12
_NOT_TEXT = "\ufffd"  # what a piece of a character decodes to
_WORD_BEGINS = ("Ġ", "▁")  # a space in front, as byte-level and sentencepiece vocabularies write it


@dataclass(frozen=True, eq=False)
class AnswerPositions:
    """The logits of a student and the teacher wherever a token of an answer is predicted."""

    student: Tensor
    """(N, V) float32, on the CPU."""
    teacher: Tensor
    """(N, V) likewise; V is the vocabulary that both share."""
    tokens: list[str]
    """N names of the tokens that the answer has there, a leading space written as ␣."""
    contexts: list[str]
    """N texts that both have read by then."""
    loss: str
    """The run's own, in its last stage."""
    loss_arguments: Mapping[str, float]
    """Of the run's own loss, such as alpha."""
    temperature: float
    """The run's own, where this student stands."""
    tokenizer: PreTrainedTokenizerBase

    def view(self, position: int, *, loss: str, temperatures: Sequence[float] = TEMPERATURES) -> TokenView:
        """One position over temperatures: both distributions, every loss, and what one of them asks of the student.

        Args:
            position: 0 to N - 1.
            loss: a name in `LOSSES`; its gradient with respect to the student's logits is taken.
            temperatures: M of them, each > 0.
        Returns:
            TokenView of the tokens that either model finds likeliest at temperature 1.
        Raises:
            UserError: the loss is unknown.
        """
        if loss not in LOSSES:
            raise UserError(f"unknown loss {loss!r}: known are {', '.join(LOSSES)}")
        student, teacher = self.student[position : position + 1], self.teacher[position : position + 1]  # (1, V)
        shown = _likeliest(student, teacher)  # (K,)
        push = -torch.cat([self._gradient(loss, student, teacher, t) for t in temperatures])  # (M, V)
        values = {name: [self._value(name, student, teacher, t) for t in temperatures] for name in LOSSES}
        return TokenView(
            context=self.contexts[position],
            label=self.tokens[position],
            tokens=[token_name(self.tokenizer, token) for token in shown.tolist()],
            num_others=student.shape[1] - len(shown),
            temperatures=np.array(temperatures, dtype=np.float64),
            student=_softened(student, temperatures)[:, shown].numpy(),
            teacher=_softened(teacher, temperatures)[:, shown].numpy(),
            losses={name: np.array(figures) for name, figures in values.items()},
            loss=loss,
            push=push[:, shown].numpy(),
            gradient_norm=push.norm(dim=1).numpy(),
        )

    def _arguments(self, loss: str) -> Mapping[str, float]:
        return self.loss_arguments if loss == self.loss else {}

    def _value(self, loss: str, student: Tensor, teacher: Tensor, temperature: float) -> float:
        return divergence(loss, student, teacher, temperature=temperature, **self._arguments(loss)).item()

    def _gradient(self, loss: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """(1, V) derivative of the loss by the student's logits, without T²."""
        with torch.enable_grad():
            logits = student.clone().requires_grad_()
            value = divergence(loss, logits, teacher, temperature=temperature, **self._arguments(loss))
        return torch.autograd.grad(value.sum(), logits)[0]


def read_positions(models: RunModels, prompt: str, answer: str, *, student: StudentName = "student") -> AnswerPositions:
    """An answer read by a student and by the teacher, each predicting its next token.

    Args:
        models: of the run.
        prompt: as the models read it, template included.
        answer: of a row; its end-of-text is predicted too.
        student: at the start of training or at its end.
    Returns:
        The logits of both at every position of the answer.
    Raises:
        UserError: nothing is left of the row after tokenising, or the two vocabularies do not fit.
    """
    if models.teacher_tokenizer is not None:
        raise UserError(
            "teacher and student have different tokenizers, so that their next tokens cannot be laid side by side: "
            "take a run of a pair with one tokenizer, or look at notebook 02, which shows the spans that both agree on"
        )
    batch = encode_answer(models, prompt, answer)
    ids, positions = batch["input_ids"], batch["positions"]  # (1, T), (N,)
    own, tokenizer = models.students[student], models.tokenizer
    kd = stage_config(models.config, list(models.config.stages)[-1]).objective.kd
    num_shared = shared_vocab_size(models.teacher, own, len(tokenizer))
    return AnswerPositions(
        student=_logits(own, ids, positions)[:, :num_shared],
        teacher=_logits(models.teacher, ids, positions)[:, :num_shared],
        tokens=[token_name(tokenizer, token) for token in ids[0, positions + 1].tolist()],
        contexts=[tokenizer.decode(ids[0, : position + 1]) for position in positions.tolist()],
        loss=kd.loss,
        loss_arguments=kd.loss_arguments,
        temperature=kd.temperature.at(int(student == "student"), 1),
        tokenizer=tokenizer,
    )


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token for people: its text with what cannot be seen written out, or its own name where it is no text."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    text = tokenizer.decode([token])
    if not text or _NOT_TEXT in text:
        return name
    if name.startswith(_WORD_BEGINS) and not text.startswith(" "):
        text = f" {text}"
    written = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace(" ", "␣"))
    return "".join(written)


def _likeliest(student: Tensor, teacher: Tensor) -> Tensor:
    """(K,) ids that either finds likeliest, the teacher's first choice first, which temperature never changes."""
    best = torch.maximum(student.softmax(-1), teacher.softmax(-1))[0]  # (V,)
    ids = best.topk(min(_NUM_TOKENS_SHOWN, len(best))).indices
    return ids[teacher[0, ids].argsort(descending=True)]


@torch.no_grad()
def _logits(model: PreTrainedModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """(N, V) float32 at the positions of a row without padding."""
    every = model(input_ids=input_ids.to(model.device), use_cache=False).logits[0]  # (T, V)
    return every[positions.to(every.device)].float().cpu()


def _softened(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """(M, V) probabilities of one position at each temperature."""
    return torch.cat([(logits / temperature).softmax(-1) for temperature in temperatures])

"""The student answers prompts of the training rows; each answer becomes a row that counts exact to the token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn
from transformers import PreTrainedTokenizerBase

from kdkit.data.batch import NO_UNIT, EncodedRow
from kdkit.data.encoding import Unit, encode_responses
from kdkit.data.pairs import Side, pair_row
from kdkit.data.spans import offsets_of_ids, word_units
from kdkit.evaluation import Answer, GenerationSettings, generate_answers
from kdkit.runtime import generator


@dataclass(frozen=True)
class StudentText:
    """A prompt with what the student wrote after it."""

    row: EncodedRow
    """As it is trained on; its end-of-text token counts, padding is not there."""
    text: str
    """The answer without special tokens."""
    ended: bool
    """Whether the student ended it; False: it was cut."""

    @property
    def response_ids(self) -> Sequence[int]:
        """What the student produced, its end-of-text token included."""
        return self.row["input_ids"][self.row["prompt_length"] :]


@dataclass(frozen=True)
class StudentGenerator:
    """Draws texts from a student as it is now.

    Args:
        tokenizer: the student's.
        settings: how to draw; `seed` is the run's.
        unit: what `unit_ids` of the rows number; None: nothing looks at them.
    teacher_tokenizer: the teacher's, where it is another one: it reads the text anew.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    unit: Unit | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(self, student: nn.Module, rows: Sequence[EncodedRow], *, key: Sequence[int]) -> list[StudentText]:
        """One text for the prompt of each row, drawn in evaluation mode with the KV cache on.

        Args:
            student: a causal language model, or a module that holds one; left as it was, as every random state.
            rows: whose prompts to answer, `settings.batch_size` of them at a time.
            key: what makes this call's draws its own, such as (step, process).
        Returns:
            One text a row, in order; the same for the same weights, seed, key and rows.
        Raises:
            UserError: prompt and text do not fit the student's positions.
        """
        seed = generator(self.settings.seed, "rollout", *key).initial_seed() % 2**31
        prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
        answers = generate_answers(student, self.tokenizer, prompts, replace(self.settings, seed=seed))
        if self.teacher_tokenizer is not None:
            written = self._pair(rows, answers, self.teacher_tokenizer)
        else:
            written = [
                EncodedRow(
                    input_ids=[*prompt, *answer.token_ids],
                    prompt_length=len(prompt),
                    unit_ids=[NO_UNIT] * len(prompt) + own,
                    row_id=row["row_id"],
                )
                for row, prompt, answer, own in zip(rows, prompts, answers, self._units(answers), strict=True)
            ]
        return [
            StudentText(EncodedRow(**row, is_gold=False), answer.text, answer.ended)
            for row, answer in zip(written, answers, strict=True)
        ]

    def _pair(
        self, rows: Sequence[EncodedRow], answers: Sequence[Answer], teacher_tokenizer: PreTrainedTokenizerBase
    ) -> list[EncodedRow]:
        """Each answer as both sides read it; the prompt alone where nothing of it is text for both."""
        ids = [answer.token_ids[: -1 if answer.ended else None] for answer in answers]
        texts = offsets_of_ids(ids, self.tokenizer)
        theirs = encode_responses([text for text, _ in texts], teacher_tokenizer, wants_offsets=True)
        paired = []
        for row, answer, own, (text, offsets), (their_ids, their_offsets) in zip(
            rows, answers, ids, texts, theirs, strict=True
        ):
            teacher = row["teacher"]
            prompts = [side["input_ids"][: side["prompt_length"]] for side in (row, teacher)]
            student_side = Side(prompts[0], own, offsets, self.tokenizer.eos_token_id)
            teacher_side = Side(prompts[1], their_ids, their_offsets, teacher_tokenizer.eos_token_id)
            pair = partial(pair_row, row_id=row["row_id"], unit=self.unit)
            nothing = [Side(side.prompt, [], [], side.end) for side in (student_side, teacher_side)]
            made = pair(text, student_side, teacher_side, ended=answer.ended) or pair("", *nothing, ended=False)
            assert made is not None
            paired.append(made)
        return paired

    def _units(self, answers: Sequence[Answer]) -> list[list[int]]:
        """Unit ids of each answer, none for its end-of-text."""
        written = [answer.token_ids[: -1 if answer.ended else None] for answer in answers]
        if self.unit is None:
            units = [[NO_UNIT] * len(ids) for ids in written]
        elif self.unit == "token":
            units = [list(range(len(ids))) for ids in written]
        else:
            units = [word_units(text, offsets) for text, offsets in offsets_of_ids(written, self.tokenizer)]
        return [own + [NO_UNIT] * answer.ended for own, answer in zip(units, answers, strict=True)]

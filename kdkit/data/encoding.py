"""Rows to tokens: prompts and answers, once, with the word that each token belongs to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kdkit.data.batch import NO_UNIT, EncodedRow
from kdkit.data.mapped import ROWS_PER_BLOCK, mapped_rows
from kdkit.data.pairs import Side, pair_row
from kdkit.data.rows import Rows
from kdkit.data.spans import Offsets, word_units_of
from kdkit.errors import UserError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Unit = Literal["word", "token"]


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows given: counts of rows, by reason where dropped or cut short."""

    num_read: int
    num_kept: int
    dropped: dict[str, int]
    truncated: dict[str, int]

    def __str__(self) -> str:
        reasons = [f"{why}: {count}" for why, count in (self.dropped | self.truncated).items()]
        detail = f" ({', '.join(reasons)})" if reasons else ""
        return f"{self.num_kept} of {self.num_read} rows kept{detail}"


@dataclass(frozen=True)
class EncodedRows:
    """Tokenised rows.

    dataset has the columns `input_ids` (prompt, response, end-of-text), `prompt_length` in tokens,
    `unit_ids` (one for each of input_ids, -1 outside response words) and `row_id`, the index into the
    rows it was made from; for a teacher with another tokenizer also `span_ids` and `teacher`, the
    same columns of its side.
    """

    dataset: "datasets.Dataset"
    report: EncodeReport

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass(frozen=True)
class TeacherText:
    """How a teacher with another tokenizer reads the same rows."""

    tokenizer: "PreTrainedTokenizerBase"
    """A fast one, with an end-of-text token."""
    prompts: Sequence[str]
    """The prompt of each row, written with the teacher's own chat template where there is one."""


def encode_rows(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    max_prompt_length: int,
    unit: Unit = "word",
    keep_prompt_only: bool = False,
    teacher: TeacherText | None = None,
) -> EncodedRows:
    """Tokenises prompts and gold answers once, separately as generation meets them, and joins them.

    A row becomes prompt + response + end-of-text. A response that does not fit with its end-of-text is
    cut to max_length and gets none, so that a cut never teaches to stop. The gold answer is the first
    reference. Special tokens written out in an answer are read as ordinary text.

    Args:
        rows: what to tokenise.
        tokenizer: with an end-of-text token; a fast one where unit is "word".
        max_length: most tokens of a whole row; longer responses are cut.
        max_prompt_length: most tokens of a prompt, below max_length; rows with longer ones are dropped.
        unit: what unit_ids number: the words of the response or its tokens.
        keep_prompt_only: keeps rows without an answer as their prompt alone.
        teacher: of another tokenizer; the lengths then hold for its tokens too, and a response is cut on
            both sides at the same byte.
    Returns:
        EncodedRows, in the order of rows and in a mapped file, with the count of rows dropped or cut.
    Raises:
        UserError: lengths that leave no room, an unknown unit, a tokenizer without end-of-text or
            (for words, or beside a teacher's) without offsets, or no row left.
    """
    _check_lengths(max_length, max_prompt_length)
    _check_tokenizer(tokenizer, unit, needs_offsets=teacher is not None)
    if teacher is not None:
        _check_tokenizer(teacher.tokenizer, unit, needs_offsets=True)
    encoder = _Encoder(tokenizer, max_length, max_prompt_length, unit, keep_prompt_only, teacher)
    with mapped_rows(_features(is_pair=teacher is not None)) as kept:
        for start in range(0, len(rows), ROWS_PER_BLOCK):
            indices = range(start, min(start + ROWS_PER_BLOCK, len(rows)))
            kept.write(encoder.encode(rows.dataset[start : indices.stop], indices))
        dataset = kept.dataset()
    report = encoder.report(len(rows), len(dataset))
    if len(dataset) == 0:
        raise UserError(f"no row of '{rows.name}' is left after tokenising: {report}")
    return EncodedRows(dataset, report)


def encode_prompts(prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Prompt ids as training and generation both use them.

    The special tokens that the tokenizer puts in front (begin-of-text), none behind (end-of-text,
    separator); none twice where the prompt, such as a chat template's, begins with them in writing.

    Args:
        prompts: rendered prompts.
        tokenizer: slow or fast.
    Returns:
        One list of ids per prompt, unpadded.
    """
    if not prompts:
        return []
    front = _front_tokens(tokenizer)
    encoded = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    return [ids if ids[: len(front)] == front else front + ids for ids in encoded]


@dataclass(frozen=True)
class _Text:
    """Prompt and response of a row as one tokenizer reads them."""

    prompt: list[int]
    response: list[int]
    offsets: Offsets
    units: list[int]
    """The word of each token of the response; empty where they were not asked for."""


@dataclass
class _Encoder:
    """Encodes one chunk of rows at a time and counts what it drops or cuts."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    max_prompt_length: int
    unit: Unit
    keep_prompt_only: bool
    teacher: TeacherText | None

    def __post_init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()

    def encode(self, chunk: Mapping[str, list], indices: range) -> dict[str, list[object]]:
        """Rows that follow one another, by column, as columns of EncodedRows.dataset without the rows dropped."""
        gold = [references[0] if references else "" for references in chunk["references"]]
        wants_units = self.unit == "word" and self.teacher is None
        own = _read(self.tokenizer, chunk["prompt"], gold, wants_offsets=self.wants_offsets, wants_units=wants_units)
        theirs: list[_Text | None] = [None] * len(own)
        if self.teacher is not None:
            prompts = self.teacher.prompts[indices.start : indices.stop]
            theirs = list(_read(self.teacher.tokenizer, prompts, gold, wants_offsets=True))
        rows: list[Mapping[str, object]] = []
        for row_id, text, student, teacher in zip(indices, gold, own, theirs, strict=True):
            reason = self._why_dropped(text, student, teacher)
            row = None if reason is not None else self._row(row_id, text, student, teacher)
            if row is None:
                self.dropped[reason or "answer has no text that both tokenizers cover"] += 1
            else:
                rows.append(row)
        return {name: [row[name] for row in rows] for name in _features(is_pair=self.teacher is not None)}

    @property
    def wants_offsets(self) -> bool:
        """Whether anything looks at where the student's tokens are in the text."""
        return self.unit == "word" or self.teacher is not None

    def report(self, num_read: int, num_kept: int) -> EncodeReport:
        return EncodeReport(
            num_read,
            num_kept,
            dict(self.dropped.most_common()),
            dict(self.truncated.most_common()),
        )

    def _why_dropped(self, text: str, student: _Text, teacher: _Text | None) -> str | None:
        if not text and not self.keep_prompt_only:
            return "no answer"
        reason = self._why_not(text, student, self.tokenizer)
        if reason is None and teacher is not None and self.teacher is not None:
            reason = self._why_not(text, teacher, self.teacher.tokenizer)
            return None if reason is None else f"{reason} (as the teacher reads it)"
        return reason

    def _why_not(self, text: str, side: _Text, tokenizer: "PreTrainedTokenizerBase") -> str | None:
        if not side.prompt:
            return "prompt has no tokens"
        if len(side.prompt) > self.max_prompt_length:
            return f"prompt longer than {self.max_prompt_length} tokens"
        if text and not side.response:
            return "answer has no tokens"
        if tokenizer.eos_token_id in side.response:
            return "answer contains the end-of-text token"
        return None

    def _row(self, row_id: int, text: str, student: _Text, teacher: _Text | None) -> EncodedRow | None:
        """The row of a text; None where its two sides have nothing in common."""
        if teacher is None:
            ids, units = self._join(student) if text else (student.prompt, [])
            unit_ids = [NO_UNIT] * len(student.prompt) + units
            return EncodedRow(input_ids=ids, prompt_length=len(student.prompt), unit_ids=unit_ids, row_id=row_id)
        assert self.teacher is not None
        row = pair_row(
            text,
            Side(student.prompt, student.response, student.offsets, self.tokenizer.eos_token_id),
            Side(teacher.prompt, teacher.response, teacher.offsets, self.teacher.tokenizer.eos_token_id),
            row_id=row_id,
            unit=self.unit,
            room=(self.max_length - len(student.prompt), self.max_length - len(teacher.prompt)) if text else None,
            ended=bool(text),
        )
        if text and row is not None and row["input_ids"][-1] != self.tokenizer.eos_token_id:
            self.truncated["response truncated"] += 1
        return row

    def _join(self, side: _Text) -> tuple[list[int], list[int]]:
        """Ids of the whole row; unit ids of its response and its end-of-text."""
        ids = side.response
        room = self.max_length - len(side.prompt)
        fits = len(ids) < room
        if not fits:
            self.truncated["response truncated"] += 1
            ids = ids[:room]
        end = [self.tokenizer.eos_token_id] if fits else []
        units = list(range(len(ids))) if self.unit == "token" else side.units[: len(ids)]
        return side.prompt + ids + end, units + [NO_UNIT] * len(end)


def encode_responses(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, wants_offsets: bool
) -> list[tuple[list[int], Offsets]]:
    """Ids of responses, with (start, end) of each in characters; special tokens written out are ordinary text.

    Args:
        texts: responses.
        tokenizer: a fast one where offsets are wanted.
        wants_offsets: False gives empty lists of them.
    Returns:
        Ids and offsets of each, without special tokens.
    """
    if not texts:
        return []
    # Without it "</s>" in an answer about HTML would be an end-of-text; slow tokenizers may refuse it.
    as_text = {"split_special_tokens": True} if tokenizer.is_fast else {}
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=wants_offsets,
        verbose=False,
        **as_text,
    )
    offsets = encoded["offset_mapping"] if wants_offsets else [[]] * len(texts)
    return list(zip(encoded["input_ids"], offsets, strict=True))


def _read(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    wants_offsets: bool,
    wants_units: bool = False,
) -> list[_Text]:
    """Prompts and responses under one tokenizer."""
    encoded = encode_responses(responses, tokenizer, wants_offsets=wants_offsets)
    offsets = [own for _, own in encoded]
    units = word_units_of(responses, offsets) if wants_units else [[] for _ in encoded]
    prompt_ids = encode_prompts(prompts, tokenizer)
    return [_Text(prompt, *pair, own) for prompt, pair, own in zip(prompt_ids, encoded, units, strict=True)]


def _front_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    if not starts:
        raise UserError(
            f"tokenizer '{tokenizer.name_or_path}' changes a text's own tokens when it adds its "
            "special tokens: prompts cannot be told from their end; choose another tokenizer"
        )
    return full[: starts[0]]


def _check_lengths(max_length: int, max_prompt_length: int) -> None:
    if not 1 <= max_prompt_length < max_length:
        raise UserError(
            f"max_prompt_length is {max_prompt_length} and max_length {max_length}: expected at least "
            "1 token of prompt and room for a response, max_prompt_length < max_length"
        )


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", unit: str, *, needs_offsets: bool) -> None:
    name = f"tokenizer '{tokenizer.name_or_path}' ({type(tokenizer).__name__})"
    if unit not in ("word", "token"):
        raise UserError(f"unit is '{unit}', expected 'word' or 'token'")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name} has no end-of-text token: set its eos_token")
    if needs_offsets and not tokenizer.is_fast:
        raise UserError(
            f"{name} is a slow one and gives no offsets, so its tokens cannot be laid beside those of another: use its "
            "fast version (a folder with tokenizer.json), or a teacher and a student with one tokenizer"
        )
    if unit == "word" and not tokenizer.is_fast:
        raise UserError(
            f"{name} is a slow one and gives no offsets, so its tokens cannot be put into words: "
            "use its fast version, or unit 'token'"
        )


def _features(*, is_pair: bool) -> "datasets.Features":
    import datasets

    number = datasets.Value("int32")
    side = {
        "input_ids": datasets.List(number),
        "prompt_length": number,
        "unit_ids": datasets.List(number),
        "row_id": number,
    }
    if is_pair:
        side["span_ids"] = datasets.List(number)
        return datasets.Features(**side, teacher=dict(side))
    return datasets.Features(**side)

"""Rows to tokens: prompts and answers, once, with the word that each token belongs to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kdkit.data.batch import NO_UNIT
from kdkit.data.rows import Rows
from kdkit.data.sources import quiet_datasets
from kdkit.data.spans import Offsets, word_units
from kdkit.errors import UserError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Unit = Literal["word", "token"]
_ROWS_PER_MAP_STEP = 1000


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
    rows it was made from.
    """

    dataset: "datasets.Dataset"
    report: EncodeReport

    def __len__(self) -> int:
        return len(self.dataset)


COLUMNS = ("input_ids", "prompt_length", "unit_ids", "row_id")
"""Of EncodedRows.dataset."""


def encode_rows(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    max_prompt_length: int,
    unit: Unit = "word",
    keep_prompt_only: bool = False,
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
    Returns:
        EncodedRows, in the order of rows and held in memory, with the count of rows dropped or cut.
    Raises:
        UserError: lengths that leave no room, an unknown unit, a tokenizer without end-of-text or
            (for words) without offsets, or no row left.
    """
    _check_lengths(max_length, max_prompt_length)
    _check_tokenizer(tokenizer, unit)
    encoder = _Encoder(tokenizer, max_length, max_prompt_length, unit, keep_prompt_only)
    from datasets.fingerprint import generate_random_fingerprint

    with quiet_datasets():
        dataset = rows.dataset.map(
            encoder.encode,
            batched=True,
            batch_size=_ROWS_PER_MAP_STEP,
            with_indices=True,
            remove_columns=rows.dataset.column_names,
            features=_features(),
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=generate_random_fingerprint(),  # else the tokenizer is pickled for one
        )
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


@dataclass
class _Encoder:
    """Encodes one chunk of rows at a time and counts what it drops or cuts."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    max_prompt_length: int
    unit: Unit
    keep_prompt_only: bool

    def __post_init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()

    def encode(self, chunk: Mapping[str, list], indices: Sequence[int]) -> dict[str, list[object]]:
        """One chunk of rows, by column, as columns of EncodedRows.dataset without the rows dropped."""
        gold = [references[0] if references else "" for references in chunk["references"]]
        prompts = encode_prompts(chunk["prompt"], self.tokenizer)
        responses = self._encode_responses(gold)
        encoded: dict[str, list[object]] = {name: [] for name in COLUMNS}
        for row_id, text, prompt, response in zip(indices, gold, prompts, responses, strict=True):
            reason = self._why_dropped(text, prompt, response[0])
            if reason is not None:
                self.dropped[reason] += 1
                continue
            ids, units = self._join(text, prompt, response) if text else (prompt, [])
            encoded["input_ids"].append(ids)
            encoded["prompt_length"].append(len(prompt))
            encoded["unit_ids"].append([NO_UNIT] * len(prompt) + units)
            encoded["row_id"].append(row_id)
        return encoded

    def report(self, num_read: int, num_kept: int) -> EncodeReport:
        return EncodeReport(
            num_read,
            num_kept,
            dict(self.dropped.most_common()),
            dict(self.truncated.most_common()),
        )

    def _encode_responses(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        wants_offsets = self.unit == "word"
        # Without it "</s>" in an answer about HTML would be an end-of-text; slow tokenizers may refuse it.
        as_text = {"split_special_tokens": True} if self.tokenizer.is_fast else {}
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=wants_offsets,
            verbose=False,
            **as_text,
        )
        offsets = encoded["offset_mapping"] if wants_offsets else [[]] * len(texts)
        return list(zip(encoded["input_ids"], offsets, strict=True))

    def _why_dropped(self, text: str, prompt: list[int], response: list[int]) -> str | None:
        if not text and not self.keep_prompt_only:
            return "no answer"
        if not prompt:
            return "prompt has no tokens"
        if len(prompt) > self.max_prompt_length:
            return f"prompt longer than {self.max_prompt_length} tokens"
        if text and not response:
            return "answer has no tokens"
        if self.tokenizer.eos_token_id in response:
            return "answer contains the end-of-text token"
        return None

    def _join(self, text: str, prompt: list[int], response: tuple[list[int], Offsets]) -> tuple[list[int], list[int]]:
        """Ids of the whole row; unit ids of its response and its end-of-text."""
        ids, offsets = response
        room = self.max_length - len(prompt)
        fits = len(ids) < room
        if not fits:
            self.truncated["response truncated"] += 1
            ids, offsets = ids[:room], offsets[:room]
        end = [self.tokenizer.eos_token_id] if fits else []
        units = list(range(len(ids))) if self.unit == "token" else word_units(text, offsets)
        return prompt + ids + end, units + [NO_UNIT] * len(end)


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


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", unit: str) -> None:
    name = f"tokenizer '{tokenizer.name_or_path}' ({type(tokenizer).__name__})"
    if unit not in ("word", "token"):
        raise UserError(f"unit is '{unit}', expected 'word' or 'token'")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name} has no end-of-text token: set its eos_token")
    if unit == "word" and not tokenizer.is_fast:
        raise UserError(
            f"{name} is a slow one and gives no offsets, so its tokens cannot be put into words: "
            "use its fast version, or unit 'token'"
        )


def _features() -> "datasets.Features":
    import datasets

    number = datasets.Value("int32")
    numbers = datasets.List(number)
    return datasets.Features(input_ids=numbers, prompt_length=number, unit_ids=numbers, row_id=number)

"""Records to rows: which columns are read, how the prompt is written, what was dropped and why."""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdkit.data.mapped import ROWS_PER_BLOCK, MappedRows, mapped_rows
from kdkit.data.sources import Record, Source, open_source, quiet_datasets
from kdkit.data.templates import TEMPLATES, Message, Question, UnusableRow, prompt_renderer
from kdkit.errors import UserError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["TEMPLATES", "RowReport", "Rows", "find_columns", "load_rows"]

# What a row may call its parts, most telling name first.
_NAMES = {
    "messages": ("messages",),
    "instruction": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer", "references"),
}
_EXPECTED = (
    "instruction, input, output (Alpaca); instruction, context, response (Dolly); messages (chat); "
    "prompt, completion; prompt, response; question, answer"
)


@dataclass(frozen=True)
class RowReport:
    """What became of the rows read: counts of rows, by reason where dropped."""

    num_read: int
    num_kept: int
    dropped: dict[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
        return f"{self.num_kept} of {self.num_read} rows kept" + (f" ({reasons})" if reasons else "")


@dataclass(frozen=True)
class Rows:
    """Rows ready for tokenising.

    dataset has the columns `prompt` (str, as the model reads it) and `references` (list of str, the
    gold answer first, empty in a prompt-only row). sha256 is taken over both in order: the same rows
    from another file, format or folder have the same one.
    """

    dataset: "datasets.Dataset"
    name: str
    report: RowReport
    sha256: str

    def __len__(self) -> int:
        return len(self.dataset)


def load_rows(
    source: str | Path,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    template: str = "alpaca",
    limit: int | None = None,
    require_references: bool = True,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Rows:
    """Reads rows of instructions and answers into a temporary file that is mapped; writes no cache.

    Text is kept as it is. An answer may be a list of texts (the first is the gold one); numbers are
    written as text. In a chat row the last assistant message is the answer, all before it the prompt.
    Memory holds a block of rows at a time; a .json file alone is parsed as a whole.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, a `save_to_disk` folder, or a hub name.
        split: which split of a folder or hub name, where it has several.
        columns: which column is the `instruction`, `input`, `output` or `messages`, for those that
            have unusual names; the others are found by name.
        template: a name in TEMPLATES or a format string with {instruction} and optionally {input}.
        limit: at most this many rows are kept, the first ones; None = all.
        require_references: False keeps rows without an answer as prompt-only rows.
        tokenizer: needed by the template "chat".
    Returns:
        Rows with at least one row, in the order of the source.
    Raises:
        UserError: nothing there, not what its ending says, a broken line, unknown columns, or no usable
            row; the message names the file, the line and what was expected.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, expected at least 1 row (or none for all rows)")
    render, roles = prompt_renderer(template, tokenizer), _check_roles(columns or {})
    with quiet_datasets(), mapped_rows(_features()) as kept:
        opened = open_source(source, split)
        reading = _Reading(kept, render=render, columns=roles, require_references=require_references)
        reading.read(opened.records, limit)
        reading.check_usable(str(source))
        return reading.rows(opened)


def find_columns(names: Iterable[str], columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Which column plays which role (`instruction`, `input`, `output`, `messages`).

    Args:
        names: the columns there are.
        columns: role -> column, taken before any found by name; a column that is not there is left out.
    Returns:
        role -> column, without the roles that no column plays; empty where nothing holds a prompt.
    """
    chosen, present = dict(columns or {}), set(names)
    found = {role: column for role, column in chosen.items() if column in present}
    for role, candidates in _NAMES.items():
        name = next((c for c in candidates if c in present and c not in chosen.values()), None)
        if role not in chosen and name is not None:
            found[role] = name
    if "messages" in found and "instruction" not in chosen:
        return {"messages": found["messages"]}
    found.pop("messages", None)
    return found if "instruction" in found else {}


def _check_roles(columns: Mapping[str, str]) -> Mapping[str, str]:
    for role in columns:
        if role not in _NAMES:
            near = difflib.get_close_matches(role, _NAMES, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise UserError(f"data.columns: unknown '{role}'{hint}; expected {', '.join(_NAMES)}")
    if "messages" in columns and len(columns) > 1:
        raise UserError("data.columns: 'messages' holds prompt and answer; give it alone")
    return columns


@dataclass
class _Reading:
    """The rows kept so far and the count of those that were not."""

    kept: MappedRows
    _: KW_ONLY
    render: Callable[[Question], str]
    columns: Mapping[str, str]
    require_references: bool
    block: list[tuple[str, list[str]]] = field(default_factory=list)
    """The last of the rows kept, not yet written."""
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    """Over the rows kept so far."""
    dropped: Counter[str] = field(default_factory=Counter)
    num_read: int = 0
    # A JSON lines file may name its columns anew in each line: the roles are found once per set of names.
    roles: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)

    def read(self, records: Iterable[Record], limit: int | None) -> None:
        for record in records:
            self.num_read += 1
            try:
                self._keep(self._row(record))
            except UnusableRow as unusable:
                self.dropped[str(unusable)] += 1
                continue
            if self.num_kept == limit:
                return

    @property
    def num_kept(self) -> int:
        return self.kept.num_rows + len(self.block)

    def check_usable(self, source: str) -> None:
        """UserError where columns are unknown or no row is left."""
        names = sorted({name for known in self.roles for name in known})
        unknown = [column for column in self.columns.values() if column not in names]
        if self.num_read and (unknown or not any(self.roles.values())):
            what = f"no column {', '.join(map(repr, unknown))}" if unknown else "unknown columns"
            raise UserError(
                f"'{source}': {what}; found {', '.join(names) or 'none'}; expected {_EXPECTED}. Say "
                "which is which in data.columns, such as {instruction: ..., input: ..., output: ...}"
            )
        if not self.num_kept:
            raise UserError(f"'{source}' has no usable row: {self._report()}{self._advice()}")

    def rows(self, source: Source) -> Rows:
        self._write_block()
        return Rows(self.kept.dataset(), source.name, self._report(), self.digest.hexdigest())

    def _keep(self, row: tuple[str, list[str]]) -> None:
        self.digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.block.append(row)
        if len(self.block) == ROWS_PER_BLOCK:
            self._write_block()

    def _write_block(self) -> None:
        prompts, references = zip(*self.block, strict=True) if self.block else ((), ())
        self.kept.write({"prompt": prompts, "references": references})
        self.block = []

    def _row(self, record: Record) -> tuple[str, list[str]]:
        names = tuple(record)
        if names not in self.roles:
            self.roles[names] = find_columns(names, self.columns)
        roles = self.roles[names]
        if not roles:
            raise UnusableRow("no prompt column")
        question, references = _split_record({role: record[roles[role]] for role in roles})
        if self.require_references and not references:
            raise UnusableRow("no answer")
        prompt = self.render(question)
        _check_unicode([prompt, *references])
        return prompt, references

    def _report(self) -> RowReport:
        return RowReport(self.num_read, self.num_kept, dict(self.dropped.most_common()))

    def _advice(self) -> str:
        if self.dropped["no answer"]:
            return "; name the column that holds the answers in data.columns (output)"
        return ""


def _features() -> "datasets.Features":
    import datasets

    text = datasets.Value("string")
    return datasets.Features({"prompt": text, "references": datasets.List(text)})


def _split_record(parts: Record) -> tuple[Question, list[str]]:
    """Question and reference answers of one record, whose keys are roles."""
    if "messages" in parts:
        return _split_messages(parts["messages"])
    instruction = _text(parts["instruction"], "prompt")
    context = _text(parts.get("input"), "input")
    if not context.strip():
        context = ""
    if not instruction.strip():
        instruction, context = context, ""
    if not instruction:
        raise UnusableRow("empty prompt")
    return Question(instruction, context), _references(parts.get("output"))


def _split_messages(value: object) -> tuple[Question, list[str]]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise UnusableRow("messages are not a list of role and content")
    messages = [_message(item) for item in value]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    last = answers[-1] if answers else len(messages)
    before = tuple(messages[:last])
    if not any(message["content"].strip() for message in before):
        raise UnusableRow("empty prompt")
    return Question(messages=before), _references(messages[last]["content"]) if answers else []


def _message(item: Mapping[str, object]) -> Message:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UnusableRow("message without a role and a text")
    return {"role": role, "content": content}


def _references(value: object) -> list[str]:
    items = value if isinstance(value, list | tuple) else [value]
    texts = [_text(item, "answer") for item in items]
    return [text for text in texts if text.strip()]


def _text(value: object, what: str) -> str:
    """The value as text; missing (None, NaN) is the empty text."""
    if isinstance(value, str):
        return value
    if value is None or value != value:  # NaN, by which some tools write a missing value
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise UnusableRow(f"{what} is not text")


def _check_unicode(texts: list[str]) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("text is not valid Unicode") from error

"""Where rows come from: files, saved folders and hub names, read into plain records.

JSON and CSV are parsed here, not by the builders of `datasets`: those guess types, and turn the answer
"2020-01-01" into a timestamp, "None" into a missing value and "007" into 7.0.
"""

import codecs
import csv
import difflib
import glob
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from kdkit.attached import find_rows
from kdkit.errors import UserError
from kdkit.runtime import hub_answers

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Record = dict[str, object]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\])?")
_MAX_CSV_FIELD_CHARS = 2**31 - 1  # the csv module stops at 131,072, less than a long context
_EXCERPT_CHARS = 60
_SIGNATURES = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "a gzip archive (unpack it first)",
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"\xff\xfe": "UTF-16 text (save it as UTF-8)",
    b"\xfe\xff": "UTF-16 text (save it as UTF-8)",
    b"version https://git-lfs": "a Git LFS pointer (fetch the file itself)",
}


@dataclass(frozen=True)
class Source:
    """An opened source: its short name and its records, each a dict from column name to value."""

    name: str
    records: Iterator[Record]


def open_source(source: str | Path, split: str | None = None) -> Source:
    """Opens a file, a folder written by `datasets`, or a hub name; records are read while iterated.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, a `save_to_disk` folder, or a hub name
            ("owner/name", with ":config" where the hub asks for one; where the hub is out of reach, attached rows of
            that name). Any of them may end in "#" and a split.
        split: which split of a folder or a hub name; a file has only "train". With "[start:stop]" only those rows
            of it, counted as Python counts: "train[:500]", "train[500:]", "train[-100:]".
    Returns:
        Source, whose records may still raise UserError while they are read.
    Raises:
        UserError: nothing there, not what its ending says, or no such split.
    """
    path = Path(source).expanduser()
    with _readable(path):
        exists, is_folder, is_file = path.exists(), path.is_dir(), path.is_file()
    if split is None and "#" in str(source) and not exists:
        place, _, split = str(source).rpartition("#")
        return open_source(place, split)
    name, rows = _read_split(split)
    if is_folder:
        return Source(path.resolve().name, _records(_load_folder(path, name), rows))
    if is_file:
        return Source(path.stem, _cut(_read_file(path, name), rows))
    if isinstance(source, str) and _is_hub_name(source):
        attached = None if hub_answers() else find_rows(source)
        if attached is not None:
            logger.warning("the hub is not reachable: %s is read from %s", source, attached)
            return open_source(attached, split)
        return Source(source, _records(_load_from_hub(source, name), rows))
    raise UserError(_say_missing(path))


def read_json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """The objects of a JSON lines file; empty lines and a byte order mark are skipped.

    Args:
        path: UTF-8, one object a line.
    Returns:
        (number of its line from 1 on, object) of each, read while iterated.
    Raises:
        UserError: the file cannot be opened or is not UTF-8, or a line is not an object.
    """
    with _readable(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(path, number, line).strip()
            if text:
                yield number, _parse_line(path, number, text)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silences the progress bars and the log of `datasets` inside the block, and restores both."""
    import datasets

    bars_were_on = not datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars_were_on:
            datasets.enable_progress_bars()


def _read_split(split: str | None) -> tuple[str | None, slice]:
    """A split's name, and which of its rows."""
    if split is None:
        return None, slice(None)
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise UserError(f"split '{split}': expected a name, or a name and rows such as train[:500] or train[500:]")
    start, stop = (None if bound is None else int(bound) for bound in match.group("start", "stop"))
    return match["name"], slice(start, stop)


def _cut(records: Iterator[Record], rows: slice) -> Iterator[Record]:
    """Those rows; all are in memory where they are counted from the end."""
    is_from_end = any(bound is not None and bound < 0 for bound in (rows.start, rows.stop))
    yield from list(records)[rows] if is_from_end else islice(records, rows.start, rows.stop)


def _read_file(path: Path, split: str | None) -> Iterator[Record]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"'{path}': cannot tell its format from the ending '{path.suffix}'; expected one of {', '.join(READERS)}"
        )
    _check_only_split(path, split)
    _check_content(path)
    return reader(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """UserError where the system refuses."""
    try:
        yield
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}") from error


def _check_only_split(path: Path, split: str | None) -> None:
    if split not in (None, "train"):
        raise UserError(f"'{path}' has no splits, but split '{split}' was asked for: leave it out")


def _check_content(path: Path) -> None:
    """Refuses a file whose first bytes contradict its ending."""
    with _readable(path), path.open("rb") as file:
        head = file.read(512).removeprefix(codecs.BOM_UTF8)
    if not head.strip():
        raise UserError(f"'{path}' is empty")
    found = _sniff(head)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        found = None if found == _SIGNATURES[b"PAR1"] else found or "text or unknown data"
    if found:
        raise UserError(f"'{path}' ends in {suffix} but is {found}")


def _sniff(head: bytes) -> str | None:
    """What the first bytes give away; None for ordinary text."""
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML or XML page (a download that failed?)"
    return "binary data" if b"\0" in head else None


def _read_json_lines(path: Path) -> Iterator[Record]:
    return (record for _, record in read_json_lines(path))


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}', line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8"
        ) from error


def _parse_line(path: Path, number: int, text: str) -> Record:
    expected = "expected one JSON object per line"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{path}', line {number}: {expected}, but this is no JSON ({error.msg}, column "
            f"{error.colno}): {text[:_EXCERPT_CHARS]}"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = _say_beyond_python(error)
        raise UserError(f"'{path}', line {number}: {expected}, but this {reason}: {text[:_EXCERPT_CHARS]}") from error
    if isinstance(value, list):
        raise UserError(f"'{path}', line {number}: {expected}, got a list; a JSON array belongs in a .json file")
    if not isinstance(value, dict):
        raise UserError(f"'{path}', line {number}: {expected}, got {text[:_EXCERPT_CHARS]}")
    return value


def _read_json(path: Path) -> Iterator[Record]:
    """An array of objects, one object that holds such an array, or JSON lines after all."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}': not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_json_lines(path)
            return
        raise UserError(f"'{path}', line {error.lineno}: not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' {_say_beyond_python(error)}") from error
    yield from _objects(path, value)


def _say_beyond_python(error: ValueError | RecursionError) -> str:
    """Of JSON that is valid and yet not read."""
    if isinstance(error, RecursionError):
        return "nests too deeply to be read"
    return f"holds a number of more than {sys.get_int_max_str_digits():,} digits; write it as text"


def _objects(path: Path, value: object) -> list[Record]:
    if isinstance(value, dict):
        arrays = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        is_wrapper = len(arrays) == 1 and len(value) == 1
        value = arrays[0] if is_wrapper and "messages" not in value else [value]
    if not isinstance(value, list):
        raise UserError(f"'{path}': expected a JSON array of objects, got {type(value).__name__}")
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            raise UserError(f"'{path}', item {number}: expected an object, got {str(item)[:60]}")
    return value


def _read_csv(path: Path) -> Iterator[Record]:
    field_limit = csv.field_size_limit(_MAX_CSV_FIELD_CHARS)
    number = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = _check_header(path, next(lines))
            for values in lines:
                number = lines.line_num
                if values:
                    _check_width(path, number, (len(values), len(header)))
                    yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"'{path}', line {number} or after it: not valid CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}', after line {number}: not UTF-8; save the file as UTF-8") from error
    finally:
        csv.field_size_limit(field_limit)


def _check_header(path: Path, header: list[str]) -> list[str]:
    names = [name.strip() or f"column {i}" for i, name in enumerate(header, start=1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"'{path}', line 1: column {', '.join(twice)} appears more than once")
    return names


def _check_width(path: Path, number: int, widths: tuple[int, int]) -> None:
    found, expected = widths
    if found != expected:
        raise UserError(
            f"'{path}', line {number}: {found} fields where the header has {expected}; "
            "a field that holds a comma or a line break needs double quotes around it"
        )


def _read_parquet(path: Path) -> Iterator[Record]:
    import datasets

    with tempfile.TemporaryDirectory() as cache_dir:  # only lock files: streaming copies nothing
        try:
            yield from datasets.load_dataset(
                "parquet",
                data_files=glob.escape(str(path.resolve())),
                split="train",
                streaming=True,
                cache_dir=cache_dir,
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"'{path}' cannot be read as Parquet: {error}") from error


def _load_folder(path: Path, split: str | None) -> "datasets.Dataset":
    import datasets

    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in READERS)
        hint = f"; it holds {', '.join(inside[:5])}: name that file" if inside else ""
        raise UserError(f"folder '{path}' was not written by datasets' save_to_disk{hint}")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"folder '{path}' is a damaged dataset: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        return _pick_split(loaded, split, str(path))
    _check_only_split(path, split)
    return loaded


def _load_from_hub(name: str, split: str | None) -> "datasets.Dataset":
    import datasets

    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{_say_missing(Path(name))}; as a name on the hub it could not be loaded: {error}") from error
    return _pick_split(loaded, split, name) if split is None else loaded


def _pick_split(splits: "datasets.DatasetDict", split: str | None, name: str) -> "datasets.Dataset":
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None:
        first = next(iter(splits))
        raise UserError(f"'{name}' has the splits {', '.join(splits)}: say which one, such as '{name}#{first}'")
    if split not in splits:
        raise UserError(f"'{name}' has no split '{split}', only {', '.join(splits)}")
    return splits[split]


def _records(dataset: "datasets.Dataset", rows: slice) -> Iterator[Record]:
    if rows != slice(None):
        dataset = dataset.select(range(*rows.indices(len(dataset))))
    for batch in dataset.with_format(None).iter(batch_size=1000):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _is_hub_name(source: str) -> bool:
    is_file_name = Path(source).suffix.lower() in READERS
    return not is_file_name and _HUB_NAME.fullmatch(source) is not None


def _say_missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"'{path}' not found: there is no folder '{folder}'"
    near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=3)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    return f"'{path}' not found in '{folder.resolve()}'{hint}"


READERS = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

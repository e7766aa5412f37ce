"""From a file of any size to blocks of its text: plain or gzipped, UTF-8 or UTF-16, whole or cut off."""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from kdkit.errors import UserError

BLOCK_BYTES = 2**22
LONGEST_BYTES = 2**20
"""Of a line; what is longer is cut into pieces of about this length."""
_GZIP = b"\x1f\x8b"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LOOKED_AT_BYTES = 1024


def read_blocks(file: Path) -> Iterator[bytes]:
    """The text of a file as UTF-8, block by block.

    Args:
        file: a text; a gzipped one may end in the middle, as that of a run that goes on does.
    Yields:
        Whole lines, but for lines of more than a MiB.
    Raises:
        UserError: the file cannot be read, or is no text.
    """
    try:
        with file.open("rb") as raw:
            yield from _whole_lines(_chunks(file, raw))
    except (OSError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}. Give a text file, plain or gzipped") from error


def _chunks(file: Path, raw: io.BufferedReader) -> Iterator[bytes]:
    """UTF-8, cut anywhere."""
    stream = gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(_GZIP) else raw
    try:
        head = stream.peek(_LOOKED_AT_BYTES)[:_LOOKED_AT_BYTES]
        if head.startswith(_UTF16):
            yield from _recoded(stream)
            return
        if b"\0" in head:
            raise UserError(f"{file} is no text: it holds NUL bytes. Give a log, a trainer_state.json or a CSV file")
        stream.read(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        while chunk := stream.read1(BLOCK_BYTES):
            yield chunk
    except EOFError:  # the gzipped file is cut off
        return


def _recoded(stream: gzip.GzipFile | io.BufferedReader) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-16")(errors="replace")
    while chunk := stream.read1(BLOCK_BYTES):
        yield decoder.decode(chunk).encode("utf-8", errors="replace")


def _whole_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, cut at ends of lines, of which a carriage return that redraws a line is one."""
    rest = b""
    for chunk in chunks:
        block = rest + chunk
        end = max(block.rfind(b"\n"), block.rfind(b"\r")) + 1
        if not end and len(block) > LONGEST_BYTES:
            end = len(block)
        if end:
            yield block[:end]
        rest = block[end:]
    if rest:
        yield rest

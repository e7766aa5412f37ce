"""Rows in a mapped file: written block by block and read where they are asked for, so that memory holds a block."""

import mmap
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from kdkit.errors import UserError

if TYPE_CHECKING:
    import datasets

ROWS_PER_BLOCK = 1000


class MappedRows:
    """Takes rows in blocks and gives them back as a dataset; see `mapped_rows`."""

    def __init__(self, file: IO[bytes], features: "datasets.Features") -> None:
        import pyarrow as pa

        self._file, self._schema = file, features.arrow_schema
        self._writer = pa.ipc.new_stream(file, self._schema)
        self.num_rows = 0

    def write(self, block: Mapping[str, Sequence[object]]) -> None:
        """Some rows, by column.

        Raises:
            UserError: there is no room for them on the disk.
        """
        import pyarrow as pa

        table = pa.Table.from_pydict(dict(block), schema=self._schema)
        self.num_rows += len(table)
        with _room():
            self._writer.write_table(table)

    def dataset(self) -> "datasets.Dataset":
        """All rows written; none can be added.

        Raises:
            UserError: there is no room for them on the disk.
        """
        import datasets
        import pyarrow as pa
        from datasets.fingerprint import generate_random_fingerprint

        with _room():
            self._writer.close()
            self._file.flush()
            pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)  # stays when the file is closed
        table = pa.ipc.open_stream(pa.py_buffer(pages)).read_all()
        return datasets.Dataset(table, fingerprint=generate_random_fingerprint())  # else all is pickled for one


@contextmanager
def mapped_rows(features: "datasets.Features") -> Iterator[MappedRows]:
    """A file for rows, in the temporary folder (TMPDIR) but without a name there.

    It goes with the last dataset that reads it, however the process ends. Its pages are the system's, which takes them
    back when memory runs short.

    Args:
        features: columns of the rows.
    Yields:
        What takes the rows; no longer than the block, its dataset for as long as one likes.
    Raises:
        UserError: there is no temporary folder that can be written.
    """
    with _room():
        file = tempfile.TemporaryFile()  # noqa: SIM115  (its closing may fail again where a write has failed)
    try:
        yield MappedRows(file, features)
    finally:
        with suppress(OSError):
            file.close()


@contextmanager
def _room() -> Iterator[None]:
    """UserError where the temporary folder takes no more."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"rows cannot be written to a temporary file: {error.strerror or error}; make room, or name another folder "
            "in the environment variable TMPDIR"
        ) from error

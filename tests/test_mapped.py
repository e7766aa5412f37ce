"""Rows in mapped files: what is written comes back, memory does not grow with it, and nothing stays behind."""

import json
import pickle
import tempfile
import tracemalloc

import datasets
import pyarrow as pa
import pytest

from kdkit.data.encoding import encode_rows
from kdkit.data.mapped import ROWS_PER_BLOCK, mapped_rows
from kdkit.data.rows import load_rows
from kdkit.errors import UserError

FEATURES = datasets.Features(name=datasets.Value("string"), ids=datasets.List(datasets.Value("int32")))
BLOCKS = ({"name": ["a", "b"], "ids": [[1, 2], []]}, {"name": [], "ids": []}, {"name": ["c"], "ids": [[3]]})
ANSWER = "word " * 400


def stored(*blocks):
    with mapped_rows(FEATURES) as kept:
        for block in blocks:
            kept.write(block)
        return kept.dataset()


@pytest.fixture
def long_file(tmp_path):
    """Three blocks of long rows, 6 MB."""
    path, count = tmp_path / "long.jsonl", 3 * ROWS_PER_BLOCK + 1
    lines = [json.dumps({"instruction": f"Write {number}.", "output": f"{number} {ANSWER}"}) for number in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class TestMappedRows:
    def test_blocks_come_back_in_order(self):
        dataset = stored(*BLOCKS)
        assert dataset[:] == {"name": ["a", "b", "c"], "ids": [[1, 2], [], [3]]}
        assert dataset.features == FEATURES
        assert dataset.select([2, 0])[:] == {"name": ["c", "a"], "ids": [[3], [1, 2]]}

    def test_no_rows_are_a_dataset_too(self):
        assert len(stored()) == 0

    def test_a_process_that_is_started_anew_gets_the_rows(self):
        assert pickle.loads(pickle.dumps(stored(*BLOCKS)))[:] == stored(*BLOCKS)[:]

    def test_a_file_has_no_name_in_the_temporary_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        dataset = stored(*BLOCKS)
        assert list(tmp_path.iterdir()) == []
        assert dataset.cache_files == []

    def test_the_rows_are_not_in_memory(self):
        allocated = pa.total_allocated_bytes()
        dataset = stored({"name": ["x" * 2**20], "ids": [[1]]})
        assert pa.total_allocated_bytes() - allocated < 2**16
        assert len(dataset["name"][0]) == 2**20

    def test_a_full_disk_is_said_in_words(self, monkeypatch):
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "wb+"))  # noqa: SIM115
        with pytest.raises(UserError, match=r"No space left on device; make room, or name another folder .* TMPDIR"):
            stored({"name": ["x" * 2**20], "ids": [[1]]})

    def test_no_temporary_folder_is_said_in_words(self, monkeypatch):
        def refuse():
            raise FileNotFoundError(2, "No usable temporary directory found")

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        with pytest.raises(UserError, match="No usable temporary directory"):
            stored()


class TestRowsOfARun:
    """Rows were Python texts, then a table, then a second one of their tokens: 1.4 GB for a million short ones."""

    def test_reading_holds_a_block_at_a_time(self, long_file):
        load_rows(long_file, limit=1)  # imports
        allocated = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            rows = load_rows(long_file)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        block_bytes = ROWS_PER_BLOCK * len(ANSWER)
        assert (len(rows), rows.report.num_read) == (3 * ROWS_PER_BLOCK + 1, 3 * ROWS_PER_BLOCK + 1)
        assert peak < 2 * block_bytes
        assert pa.total_allocated_bytes() - allocated < block_bytes

    def test_the_last_block_has_the_last_rows(self, long_file):
        last = load_rows(long_file).dataset[-1]
        assert last["references"] == [f"{3 * ROWS_PER_BLOCK} {ANSWER}"]

    def test_tokens_are_not_in_memory(self, long_file, byte_tokenizer):
        rows = load_rows(long_file, limit=ROWS_PER_BLOCK)
        allocated = pa.total_allocated_bytes()
        encoded = encode_rows(rows, byte_tokenizer, max_length=256, max_prompt_length=128)
        assert len(encoded) == ROWS_PER_BLOCK
        assert pa.total_allocated_bytes() - allocated < ROWS_PER_BLOCK * 256
        assert encoded.dataset[-1]["row_id"] == ROWS_PER_BLOCK - 1

"""The table of speed and memory in README.md, written anew from a run of the benchmarks: `make bench`.

A benchmark hands in its rows by `show`; `python tests/benchmarks/readme_table.py RESULTS.json README.md` puts those of
a pytest-benchmark file between the two marks of the README. Rows of benchmarks that did not run stay as they are.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

BEGIN, END = "<!-- benchmarks: `make bench` writes these rows -->", "<!-- end of benchmarks -->"
HEADER = "| what | at | against | measured |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    at: str
    """Sizes, threads, clock."""
    against: str
    measured: str
    """A ratio and what it is of, such as "9.7 x as fast"."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What a newer measurement takes the place of."""
        return self.what, self.at, self.against

    def __str__(self) -> str:
        return f"| {self.what} | {self.at} | {self.against} | {self.measured} |"


def show(benchmark: BenchmarkFixture, *rows: Row) -> None:
    """Hand in rows of a benchmark that holds.

    Args:
        benchmark: the fixture of pytest-benchmark.
        *rows: in the order of the table.
    """
    benchmark.extra_info["rows"] = [asdict(row) for row in rows]


def rows_of(results: Path) -> list[Row]:
    """All rows of a pytest-benchmark file, in its order."""
    runs = json.loads(results.read_text(encoding="utf-8"))["benchmarks"]
    return [Row(**row) for run in runs for row in run["extra_info"].get("rows", ())]


def updated(text: str, rows: list[Row]) -> str:
    """A README with newer rows.

    Raises:
        ValueError: the marks are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN} ... {END}: put both lines where the table is to stand")
    known = {row.key: row for row in map(_parsed, inside.strip().splitlines()[2:])}
    lines = {**known, **{row.key: row for row in rows}}.values()
    return f"{before}{begin}\n{HEADER}" + "".join(f"{row}\n" for row in lines) + end + after


def _parsed(line: str) -> Row:
    return Row(*(cell.strip() for cell in line.strip().strip("|").split("|")))


if __name__ == "__main__":
    results, readme = map(Path, sys.argv[1:])
    found = rows_of(results)
    readme.write_text(updated(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"{len(found)} rows written to {readme}")

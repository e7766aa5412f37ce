"""The table of the README is written from a run, and the README has a place for it."""

import json
from pathlib import Path

import pytest
from readme_table import BEGIN, END, HEADER, Row, rows_of, updated

README = Path(__file__).parents[2] / "README.md"
OLD, NEW = Row("a step", "V 10", "trl", "2.0 x as fast"), Row("a step", "V 10", "trl", "3.0 x as fast")
OTHER = Row("memory", "V 10; peak", "trl", "1/4 of its")


def page(*rows: Row) -> str:
    return f"before\n{BEGIN}\n{HEADER}{''.join(f'{row}{chr(10)}' for row in rows)}{END}\nafter\n"


class TestUpdated:
    def test_a_newer_row_takes_the_place_of_the_older_one_and_others_stay(self) -> None:
        assert updated(page(OLD, OTHER), [NEW]) == page(NEW, OTHER)

    def test_a_row_that_was_not_there_comes_last(self) -> None:
        assert updated(page(OLD), [OTHER]) == page(OLD, OTHER)
        assert updated(f"{BEGIN}{END}", [OTHER]).count("|") == page(OTHER).count("|")

    def test_without_marks_it_says_where_they_belong(self) -> None:
        with pytest.raises(ValueError, match="put both lines"):
            updated("no table here", [NEW])

    def test_writing_what_is_there_changes_nothing(self) -> None:
        text = README.read_text(encoding="utf-8")
        assert updated(text, []) == text


def test_rows_of_a_run_come_in_its_order(tmp_path: Path) -> None:
    fields = [{"what": r.what, "at": r.at, "against": r.against, "measured": r.measured} for r in (OLD, OTHER)]
    runs = [{"extra_info": {"rows": fields[:1]}}, {"extra_info": {}}, {"extra_info": {"rows": fields[1:]}}]
    (tmp_path / "run.json").write_text(json.dumps({"benchmarks": runs}))
    assert rows_of(tmp_path / "run.json") == [OLD, OTHER]

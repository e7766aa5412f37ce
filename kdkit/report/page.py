"""One HTML page that holds all it was given."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from kdkit.doctor import Diagnosis
from kdkit.doctor.page import diagnosis_html, diagnosis_style
from kdkit.errors import UserError
from kdkit.plots import Row, comparison_finding, figure_bytes, intervals_over
from kdkit.report.tables import html_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Illustration:
    """A figure and what it shows."""

    figure: "Figure"
    caption: str


@dataclass(frozen=True)
class Example:
    """One row with the answers of several models."""

    prompt: str
    references: Sequence[str]
    answers: Mapping[str, str | None]
    """Model -> its answer; None where it was not asked."""


@dataclass(frozen=True)
class RowsUsed:
    """Which rows a run read, by content."""

    name: str
    sha256: str
    num_read: int | None = None
    num_kept: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> rows left out or cut."""


def write_report(
    path: str | Path,
    comparison: Sequence[Row],
    *,
    title: str,
    finding: str | None = None,
    doctor: Mapping[str, Diagnosis | str] | None = None,
    figures: Sequence[Illustration] = (),
    examples: Sequence[Example] = (),
    settings: Mapping[str, str] | None = None,
    environment: Mapping[str, object] | None = None,
    rows: Sequence[RowsUsed] = (),
) -> Path:
    """Write one HTML page that holds everything: figures inside, no script, nothing to fetch.

    The page appears complete or not at all.

    Args:
        path: the file to write or replace; its folder is made.
        comparison: one model a row, as `plots.plot_comparison` takes them, optionally with `steps`, `mean_tokens`,
            `ended_fraction`, `num_rows` and `seeds`; a perplexity of None beside a cross_entropy is infinite.
        title: what was run.
        finding: what came out, one sentence without full stop; None takes `plots.comparison_finding`.
        doctor: name of a run, empty where there is but one -> what is wrong with it, or why nobody knows.
        figures: in the order in which they are shown.
        examples: answers side by side.
        settings: name -> text of a config.
        environment: name -> version or value.
        rows: which data went in.
    Returns:
        The path.
    Raises:
        UserError: the comparison is empty.
    """
    if not comparison:
        raise UserError("a report needs at least one measured model: the comparison is empty")
    page = _template().render(
        title=title,
        finding=(finding or comparison_finding(comparison)).rstrip("."),
        comparison=html_table(comparison),
        intervals_over=intervals_over(comparison),
        doctor=doctor or {},
        diagnosis_html=diagnosis_html,
        diagnosis_style=diagnosis_style(),
        figures=[{"uri": _data_uri(shown.figure), "caption": shown.caption} for shown in figures],
        examples=examples,
        settings=settings or {},
        environment=environment or {},
        rows=rows,
    )
    return _write_whole(Path(path), page)


def _template() -> jinja2.Template:
    source = files("kdkit.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source)


def _data_uri(figure: "Figure") -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(figure_bytes(figure, "svg")).decode()


def _write_whole(path: Path, text: str) -> Path:
    """To a file beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path

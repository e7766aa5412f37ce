"""A diagnosis as HTML, for a report and for a notebook: text and boxes, no script, nothing to fetch."""

from functools import lru_cache
from importlib.resources import files
from typing import Literal

import jinja2
from markupsafe import Markup

from kdkit.doctor.findings import Diagnosis
from kdkit.doctor.showing import by_check, by_reason, patch_lines, plain_text, seen

Part = Literal["all", "fail", "warn", "good", "skipped"]
"""Of a diagnosis; good are the checks that saw nothing wrong."""


def diagnosis_html(diagnosis: Diagnosis, *, only: Part = "all", is_folded: bool = False) -> Markup:
    """A diagnosis as a piece of a page that has `diagnosis_style` in it.

    Args:
        diagnosis: of a run or a config; all its text is escaped.
        only: leave out the other parts, and unfold the checks that passed or were skipped.
        is_folded: show of each finding its name alone until the reader unfolds it, and no counts, which stand on the
            buttons above.
    Returns:
        A div of class `diagnosis`.
    """
    groups = [group for group in by_check(diagnosis.findings) if only in ("all", group[0].severity)]
    page = _template().render(
        diagnosis=diagnosis,
        groups=groups,
        skipped=by_reason(diagnosis.skipped),
        only=only,
        is_folded=is_folded,
        seen=seen,
        patch_lines=patch_lines,
    )
    return Markup(page)


@lru_cache(maxsize=1)
def diagnosis_style() -> Markup:
    """What goes between <style> and </style>; it takes its colours from the page around it, dark or light."""
    return Markup(files("kdkit.doctor").joinpath("diagnosis.css").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    return environment.from_string(files("kdkit.doctor").joinpath("diagnosis.html.j2").read_text(encoding="utf-8"))


def _shown(value: object) -> object:
    """Logs are quoted, and hold what no file takes."""
    return plain_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value

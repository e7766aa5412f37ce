"""The end of docs/doctor.md: every check of the doctor, and what the post-mortems said beside what is true."""

import re
from collections.abc import Iterator, Mapping, Sequence

from sphinx.application import Sphinx

from kdkit.doctor import RUN_CHECKS, Check
from kdkit.doctor.config import CONFIG_CHECKS
from kdkit.doctor.lessons import LESSONS, RUNS, Lesson

PAGE = "docs/doctor"
CHECKS: Mapping[str, Sequence[Check]] = {"Checks of a config": CONFIG_CHECKS, "Checks of a log": RUN_CHECKS}
_BEGIN = """The five post-mortems that kdkit grew out of, statement by statement. They contradict each other here and
there, and err. Logs with their numbers are the tests of the checks."""
_MARKUP = re.compile(r"[\\*_<\[\]$]")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("env-get-outdated", lambda *_: [PAGE])  # the checks may have changed and the file not
    app.connect("source-read", _append)
    return {"parallel_read_safe": True}


def _append(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == PAGE:
        source[0] += "\n" + "\n".join(written())


def written() -> Iterator[str]:
    """The page after its introduction, as Markdown."""
    for title, checks in CHECKS.items():
        yield from (f"## {title}", "")
        for check in checks:
            yield from _check(check)
    yield from ("## What the post-mortems said", "", _BEGIN, "")
    for run, what in RUNS.items():
        yield from (f"### Post-mortem {run}", "", f"{_marked(what[0].upper() + what[1:])}.", "")
        yield from _lessons([lesson for lesson in LESSONS if lesson.run == run])


def _check(check: Check) -> Iterator[str]:
    when = _when(check)
    yield from (f"({check.code.lower()})=", f"### {check.code}: {_marked(check.name)}", "")
    parts = {"Symptom": check.symptom, "Cause": check.cause, "Fix": check.fix, "Source": check.source, "Asked": when}
    yield from ("```{container} check", "")
    yield from (f":{name}: {_marked(text)}" for name, text in parts.items())
    yield from ("```", "")


def _when(check: Check) -> str:
    if check in CONFIG_CHECKS:
        return "before a run"
    return "afterwards, and while a run trains" if check.live else "afterwards"


def _lessons(lessons: Sequence[Lesson]) -> Iterator[str]:
    yield from ("```{list-table}", ":class: lessons", ":header-rows: 1", ":widths: 42 46 12", "")
    yield from ("* - It said, or showed", "  - What is true", "  - Check")
    for lesson in lessons:
        codes = ", ".join(f"[{code}](#{code.lower()})" for code in lesson.codes) or "–"
        yield from (f"* - {_marked(lesson.said)}", f"  - {_marked(lesson.true)}", f"  - {codes}")
    yield from ("```", "")


def _marked(text: str) -> str:
    """Plain text as Markdown: between backticks it is code, elsewhere nothing is markup but a paper is a link."""
    parts = text.split("`")
    parts[::2] = [
        _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", _MARKUP.sub(r"\\\g<0>", part)) for part in parts[::2]
    ]
    return "`".join(parts)

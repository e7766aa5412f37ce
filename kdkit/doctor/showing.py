"""A diagnosis for people, as text; `kdkit.doctor.page` makes HTML of it."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby

import click
import yaml

from kdkit.doctor.findings import Diagnosis, Finding, Severity, Value

WIDTH = 100
"""Most columns of the text: longer lines are hard to read."""
_LEAST_WIDTH = 40
_INDENT = 6
_LABEL = 6
_COLOURS = {Severity.FAIL: "red", Severity.WARN: "yellow", Severity.GOOD: "green"}
_SPACE_OR_CONTROL = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")

Pen = Callable[..., str]
"""Takes a text and click's names of styles."""


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """Print it on stdout: as wide as the terminal and in colour; plain where it goes elsewhere or NO_COLOR is set."""
    is_terminal = sys.stdout.isatty()
    width = min(shutil.get_terminal_size().columns, WIDTH) if is_terminal else WIDTH
    is_coloured = is_terminal and not os.environ.get("NO_COLOR")
    click.echo("\n".join(diagnosis_lines(diagnosis, width=width, is_coloured=is_coloured)))


def diagnosis_lines(diagnosis: Diagnosis, *, width: int = WIDTH, is_coloured: bool = False) -> Iterator[str]:
    """Each check that found something with what it saw, why and what to do; then the others, and the counts.

    Args:
        diagnosis: of a run or a config.
        width: most columns of a line; a word that is longer is cut.
        is_coloured: with the escape sequences of a terminal.
    Returns:
        Lines without their ends.
    """
    pen = click.style if is_coloured else _plain_pen
    width = max(width, _LEAST_WIDTH)
    for findings in by_check(diagnosis.findings):
        yield from _finding_lines(findings, width, pen)
        yield ""
    yield from _rest_lines("read", "", [diagnosis.read] if diagnosis.read else [], width, pen)
    passed = [f"{diagnosis.names.get(code, '')} ({code})".strip() for code in diagnosis.passed]
    yield from _rest_lines("good", "looked for and not seen: ", passed, width, pen)
    missing = [f"{reason} ({', '.join(codes)})" for reason, codes in by_reason(diagnosis.skipped).items()]
    yield from _rest_lines("skip", "not asked, as these are missing: ", missing, width, pen)
    yield ", ".join(_counts(diagnosis, pen))


def by_check(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings that differ in stage and evidence alone, together: cause, fix and source are the same."""
    return [list(group) for _, group in groupby(findings, key=lambda finding: (finding.severity, finding.code))]


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """What was missing -> codes of the checks that need it."""
    codes: dict[str, list[str]] = {}
    for code, reason in skipped.items():
        codes.setdefault(reason, []).append(code)
    return codes


def patch_lines(findings: Iterable[Finding]) -> list[str]:
    """What to set in the config, `optim.warmup_steps: 468`, as YAML."""
    merged: dict[str, Value] = {}
    for finding in findings:
        merged |= finding.patch
    return [f"{field}: {_as_yaml(value)}" for field, value in merged.items()]


def _as_yaml(value: Value) -> str:
    """In one line."""
    text = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")


def seen(finding: Finding) -> str:
    """The evidence, and where."""
    return f"stage {finding.stage}: {finding.evidence}" if finding.stage is not None else finding.evidence


def plain_text(text: str) -> str:
    """One line that a terminal and a file take: what is quoted may hold colours, bells and halves of characters."""
    return _SPACE_OR_CONTROL.sub(" ", click.unstyle(text)).encode("utf-8", errors="replace").decode()


def _plain_pen(text: str, **_: object) -> str:
    return text


def _finding_lines(findings: list[Finding], width: int, pen: Pen) -> Iterator[str]:
    """All that one check found."""
    first = findings[0]
    times = f" ×{len(findings)}" if len(findings) > 1 else ""
    severity = pen(f"{first.severity:<5}", fg=_COLOURS[first.severity], bold=True)
    yield f"{severity} {pen(f'{first.code} {plain_text(first.name)}{times}', bold=True)}"
    entries = [("seen", seen(finding)) for finding in findings]
    entries += [("why", first.cause), ("do", first.fix), *(("set", line) for line in patch_lines(findings))]
    entries.append(("from", first.source))
    for label, text in entries:
        head = f"{' ' * _INDENT}{label:<{_LABEL}}"
        for number, line in enumerate(_wrapped(text, width - len(head))):
            yield (pen(head, dim=True) if number == 0 else " " * len(head)) + line


def _rest_lines(label: str, lead: str, entries: list[str], width: int, pen: Pen) -> Iterator[str]:
    """One paragraph of what needs no more."""
    for number, line in enumerate(_wrapped(lead + "; ".join(entries), width - _INDENT) if entries else ()):
        head = f"{label if number == 0 else '':<{_INDENT}}"
        yield pen(head, fg="green" if label == Severity.GOOD else None) + pen(line, dim=True)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(plain_text(text), width, break_on_hyphens=False)


def _counts(diagnosis: Diagnosis, pen: Pen) -> Iterator[str]:
    """In the colour of what there is any of."""
    counts = {
        Severity.FAIL: diagnosis.num_failures,
        Severity.WARN: diagnosis.num_warnings,
        Severity.GOOD: len(diagnosis.passed),
    }
    for severity, count in counts.items():
        yield pen(f"{count} {severity}", fg=_COLOURS[severity] if count else None, bold=bool(count))
    yield f"{len(diagnosis.skipped)} skipped"

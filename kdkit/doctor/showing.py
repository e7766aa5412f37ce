"""A diagnosis for people."""

import textwrap
from collections.abc import Iterator

from kdkit.doctor.findings import Diagnosis, Finding

WIDTH = 110
"""Columns of the text."""


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Each finding with its evidence, cause and fix; then what was not asked, and the counts."""
    for finding in diagnosis.findings:
        yield from _finding_lines(finding)
    by_reason: dict[str, list[str]] = {}
    for code, reason in diagnosis.skipped.items():
        by_reason.setdefault(reason, []).append(code)
    for reason, codes in by_reason.items():
        yield f"skipped {', '.join(codes)}: {reason}"
    yield (
        f"{diagnosis.num_failures} fail, {diagnosis.num_warnings} warn, {len(diagnosis.passed)} good, "
        f"{len(diagnosis.skipped)} skipped"
    )


def _finding_lines(finding: Finding) -> Iterator[str]:
    stage = f" (stage {finding.stage})" if finding.stage is not None else ""
    yield f"{finding.severity:<5} {finding.code} {finding.name}{stage}"
    for label, text in (("seen", finding.evidence), ("why", finding.cause), ("do", finding.fix)):
        yield from textwrap.wrap(text, WIDTH, initial_indent=f"      {label:<5}", subsequent_indent=" " * 11)
    yield ""

"""What a check is, what it finds, and all findings of one subject."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

Value = str | int | float | bool | None | Sequence["Value"] | Mapping[str, "Value"]
"""What a config field can be set to."""


Subject = TypeVar("Subject")


class Severity(StrEnum):
    """How bad it is."""

    GOOD = "good"
    WARN = "warn"
    FAIL = "fail"


class NotApplicable(Exception):
    """A check lacks what it looks at; its text names that, such as `two evaluations with a loss`."""


@dataclass(frozen=True)
class Observation:
    """What a check saw."""

    severity: Severity
    evidence: str
    """With steps and numbers of the subject."""
    patch: Mapping[str, Value] = field(default_factory=dict)
    """Field of the config -> the value that mends it."""


def warn(evidence: str, **patch: Value) -> Observation:
    """Something that is worth a look."""
    return Observation(Severity.WARN, evidence, patch)


def fail(evidence: str, **patch: Value) -> Observation:
    """Something that spoils the run."""
    return Observation(Severity.FAIL, evidence, patch)


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """One question to a subject, and what its answer means."""

    code: str
    name: str
    symptom: str
    """What is seen."""
    cause: str
    """What brings it about, and what it does to the run."""
    fix: str
    """What to do."""
    source: str
    """Where that is known from."""
    look: Callable[[Subject], Iterable[Observation]]
    """Yields what it saw, nothing where all is well.

    Raises:
        NotApplicable: the subject does not hold what is asked for; what was seen before that counts.
    """
    live: bool = True
    """Whether what it sees in an unfinished run can be relied on."""


@dataclass(frozen=True)
class Finding:
    """An observation with all that its check knows."""

    code: str
    name: str
    severity: Severity
    stage: str | None
    evidence: str
    cause: str
    fix: str
    source: str
    patch: Mapping[str, Value]


@dataclass(frozen=True)
class Diagnosis:
    """What all checks said of one subject."""

    subject: str
    findings: Sequence[Finding]
    passed: Sequence[str]
    """Codes of the checks that saw nothing wrong."""
    skipped: Mapping[str, str]
    """Code -> what it would have needed."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Code -> name, of all that was asked."""
    read: str = ""
    """What of the subject was understood, for who wonders why something was not seen."""

    @property
    def num_failures(self) -> int:
        """Findings that spoil the run."""
        return self._counts[Severity.FAIL]

    @property
    def num_warnings(self) -> int:
        """Findings that are worth a look."""
        return self._counts[Severity.WARN]

    @property
    def codes(self) -> set[str]:
        """Of what was found."""
        return {finding.code for finding in self.findings}

    @property
    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "subject": self.subject,
            "read": self.read,
            "counts": {"fail": self.num_failures, "warn": self.num_warnings, "good": len(self.passed)},
            "findings": [asdict(finding) for finding in self.findings],
            "passed": list(self.passed),
            "skipped": dict(self.skipped),
        }

    @property
    def _counts(self) -> Counter[Severity]:
        return Counter(finding.severity for finding in self.findings)


def examine(subject: str, parts: Mapping[str | None, Subject], checks: Iterable[Check[Subject]]) -> Diagnosis:
    """Ask every check about every part of a subject.

    Args:
        subject: what it is called.
        parts: stage, or None where there is but one -> what the checks look at.
        checks: in the order of their codes.
    Returns:
        `Diagnosis`, failures first. A check that no part can answer counts as skipped.
    """
    findings: list[Finding] = []
    passed, skipped, names = [], {}, {}
    for check in checks:
        names[check.code] = check.name
        seen, reasons = [], []
        for stage, part in parts.items():
            try:
                for observation in check.look(part):
                    seen.append(_finding(check, stage, observation))  # stays, should the check end here
            except NotApplicable as reason:
                reasons.append(str(reason))
        findings += seen
        if len(reasons) == len(parts) and not seen:
            skipped[check.code] = reasons[0] if reasons else "something to look at"
        elif not seen:
            passed.append(check.code)
    findings.sort(key=lambda finding: (finding.severity != Severity.FAIL, finding.code))
    return Diagnosis(subject, findings, passed, skipped, names)


def _finding(check: Check[Subject], stage: str | None, observation: Observation) -> Finding:
    return Finding(
        code=check.code,
        name=check.name,
        severity=observation.severity,
        stage=stage,
        evidence=observation.evidence,
        cause=check.cause,
        fix=check.fix,
        source=check.source,
        patch=observation.patch,
    )

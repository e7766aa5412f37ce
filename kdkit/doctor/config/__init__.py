"""Names what is wrong with a config before anything is loaded, and mends it: `diagnose_config`, `fix_config`."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter

from kdkit.config import DistillConfig
from kdkit.config.reading import STAGE_PARTS
from kdkit.doctor.config import evaluation, generation, machine, models, objective, rows, schedule
from kdkit.doctor.config.documents import Document, read_document
from kdkit.doctor.config.subject import Readings, Stage, Surroundings, stages_in
from kdkit.doctor.config.values import CHECKS as VALUE_CHECKS
from kdkit.doctor.findings import Check, Diagnosis, Finding, Value, examine
from kdkit.errors import UserError
from kdkit.memory.cards import CARDS, Card

MOST_ROUNDS = 10
"""Of a fix: one change can bring out what another check then sees."""

CONFIG_CHECKS: tuple[Check[Stage], ...] = tuple(
    sorted(
        (
            *VALUE_CHECKS,
            *schedule.CHECKS,
            *objective.CHECKS,
            *rows.CHECKS,
            *machine.CHECKS,
            *models.CHECKS,
            *generation.CHECKS,
            *evaluation.CHECKS,
        ),
        key=lambda check: check.code,
    )
)
"""Every check of a config, by code."""


@dataclass(frozen=True)
class Fixed:
    """A config that was mended."""

    text: str
    """The corrected file."""
    difference: str
    """To the given one, as a unified diff; empty where nothing was changed."""
    mended: Sequence[Finding]
    """What was wrong, and no longer is."""
    diagnosis: Diagnosis
    """Of the corrected file."""

    @property
    def as_json(self) -> dict[str, object]:
        """For programs, beside the diagnosis."""
        return {"mended": [asdict(finding) for finding in self.mended], "difference": self.difference}

    @property
    def text_of_changes(self) -> str:
        """For people: the diff, and what each change is for."""
        if not self.difference:
            return "nothing to change"
        reasons = "".join(f"fixed {finding.code} {finding.name}: {finding.evidence}\n" for finding in self.mended)
        return f"{self.difference}\n{reasons}"


def diagnose_config(
    source: str, overrides: Iterable[str] = (), *, card: Card | None = None, num_rows: int | None = None
) -> Diagnosis:
    """What a config gets wrong.

    Args:
        source: as `read_document`.
        overrides: as `read_document`.
        card: on which it is to run; None takes a T4, and asks other trainers' files nothing of a card.
        num_rows: training rows, where they are not to be counted here.
    Returns:
        `Diagnosis`, failures first; the patches hold whole paths, as `--set` takes them, or another trainer's names.
    Raises:
        UserError: as `read_document` and `load_config`.
    """
    document = read_document(source, overrides)
    return _in_its_words(_diagnose(document, card, num_rows, Readings()), document)


def fix_config(
    source: str, overrides: Iterable[str] = (), *, card: Card | None = None, num_rows: int | None = None
) -> Fixed:
    """The config with every patch applied, and those that it then needs.

    Args, raises: as `diagnose_config`.
    Returns:
        `Fixed`, in the format of the given file.
    """
    document = given = read_document(source, overrides)
    readings = Readings()
    found: dict[tuple[str, str | None], Finding] = {}
    for _ in range(MOST_ROUNDS):
        diagnosis = _diagnose(document, card, num_rows, readings)
        found = {(finding.code, finding.stage): finding for finding in diagnosis.findings} | found
        patched = document.patched(_merged(diagnosis.findings))
        if patched.text == document.text or not any(finding.patch for finding in diagnosis.findings):
            mended = [finding for (code, _), finding in found.items() if code not in diagnosis.codes]
            return Fixed(document.text, _difference(given, document), mended, _in_its_words(diagnosis, document))
        document = patched
    raise UserError(f"the fixes of {source} undo each other: {', '.join(sorted(diagnosis.codes))}; change it by hand")


def _merged(findings: Iterable[Finding]) -> dict[str, Value]:
    """All patches; of two for one field the first one."""
    patch: dict[str, Value] = {}
    for finding in findings:
        if not patch.keys() & finding.patch.keys():
            patch |= finding.patch
    return patch


def _difference(given: Document, fixed: Document) -> str:
    before, after = (document.text.splitlines(keepends=True) for document in (given, fixed))
    return "".join(difflib.unified_diff(before, after, fromfile=given.source, tofile="fixed"))


def _diagnose(document: Document, card: Card | None, num_rows: int | None, readings: Readings) -> Diagnosis:
    translation = document.translation
    around = Surroundings(document.config, card or CARDS["t4"], card is None, num_rows, readings)
    stages = stages_in(around, translation)
    diagnosis = examine(document.source, stages, CONFIG_CHECKS)
    if translation is not None:
        return replace(diagnosis, read=translation.as_read)
    return replace(diagnosis, findings=_once(_located(diagnosis.findings, document.config)))


def _located(findings: Sequence[Finding], config: DistillConfig) -> list[Finding]:
    """With the paths at which a file has to set the fields of a stage, so that no stage changes that is well."""
    wanted: dict[tuple[str, str], set[str]] = {}
    for finding in findings:
        for field in finding.patch:
            wanted.setdefault((finding.code, field), set()).add(_stage_of(finding, config))
    return [
        replace(
            finding,
            patch={
                f"stages.{stage}.{field}"
                if _is_own(field, stage, wanted[finding.code, field], config)
                else field: value
                for field, value in finding.patch.items()
            },
        )
        for finding in findings
        for stage in (_stage_of(finding, config),)
    ]


def _stage_of(finding: Finding, config: DistillConfig) -> str:
    """Its stage, or the only one."""
    return finding.stage if finding.stage is not None else next(iter(config.stages))


def _is_own(field: str, stage: str, wanting: set[str], config: DistillConfig) -> bool:
    """Whether a stage has to set a field itself: it does so already, or a stage that is well takes it from the base."""
    path = field.split(".")
    if path[0] not in STAGE_PARTS:
        return False
    overrides = config.stages[stage]
    has_part = _sets(overrides, path[:-1]) and attrgetter(".".join(path[:-1]))(config) is None
    inheriting = {name for name, tree in config.stages.items() if not _sets(tree, path)}
    return has_part or stage not in inheriting or not inheriting <= wanting


def _in_its_words(diagnosis: Diagnosis, document: Document) -> Diagnosis:
    """With patches that name what the file names."""
    findings = [replace(finding, patch=document.in_its_words(finding.patch)) for finding in diagnosis.findings]
    return replace(diagnosis, findings=findings)


def _sets(tree: Mapping[str, object], path: list[str]) -> bool:
    """Whether a tree has its own value at a path."""
    below = tree.get(path[0])
    if len(path) == 1 or path[0] not in tree:
        return path[0] in tree
    return isinstance(below, Mapping) and _sets(below, path[1:])


def _once(findings: list[Finding]) -> list[Finding]:
    """What several stages have in common is said once, of all."""
    kept: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = finding.code, finding.evidence
        first = kept.get(key)
        kept[key] = finding if first is None else replace(first, stage=None, patch={**first.patch, **finding.patch})
    return list(kept.values())

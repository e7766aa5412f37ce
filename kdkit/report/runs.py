"""From the folders of finished runs to pages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkit.doctor import Diagnosis, diagnose_run
from kdkit.errors import UserError
from kdkit.plots import (
    Row,
    intervals_over,
    plot_comparison,
    plot_evaluations,
    plot_live,
    plot_rollout,
    plot_training,
)
from kdkit.report.page import Example, Illustration, RowsUsed, write_report

NUM_EXAMPLES = 8
"""Rows whose answers a run's page shows, from the first on."""


def write_run_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a finished run, from the files in it.

    Args:
        folder: of a run; evaluation.json is needed, config.yaml, metrics.jsonl, environment.json and rows.json are used
            where they are there.
    Returns:
        Path of the page.
    Raises:
        UserError: the folder holds no finished run.
    """
    run = _Run.read(Path(folder))
    comparison: list[Row] = []
    for name, figures in run.models.items():
        steps = {"steps": run.num_steps} if name == "student" and run.num_steps else {}
        comparison.append({"model": name, **steps, **figures})
    return write_report(
        run.folder / "report.html",
        comparison,
        title=f"Distillation run {run.folder.resolve().name}",
        doctor={"": _diagnosed(run.folder)},
        figures=[_comparison_illustration(comparison), *run.illustrations()],
        examples=run.examples[:NUM_EXAMPLES],
        settings={"config.yaml": run.config} if run.config else {},
        environment=run.facts,
        rows=run.rows,
    )


def write_comparison_report(output: str | Path, folders: Mapping[str, Path], comparison: Sequence[Row]) -> Path:
    """Write `report.html` on several finished runs that measured the same rows.

    Args:
        output: folder of the page.
        folders: name of a run -> its folder; the first one's teacher is the one shown in the examples.
        comparison: as in `write_report`.
    Returns:
        Path of the page.
    Raises:
        UserError: there is no folder, one holds no finished run, or two measured different rows.
    """
    if not folders:
        raise UserError("a comparison needs the folder of at least one finished run")
    runs = {name: _Run.read(Path(folder)) for name, folder in folders.items()}
    _check_same_rows(runs)
    figures = [_comparison_illustration(comparison)]
    for name, run in runs.items():
        figures += run.illustrations(name)
    return write_report(
        Path(output) / "report.html",
        comparison,
        title=f"Comparison of {len(runs)} runs",
        doctor={name: _diagnosed(run.folder) for name, run in runs.items()},
        figures=figures,
        examples=_side_by_side(runs),
        settings={f"{name}: config.yaml": run.config for name, run in runs.items() if run.config},
        environment=next(iter(runs.values())).facts,
        rows=[
            RowsUsed(f"{name}: {part.name}", part.sha256, part.num_read, part.num_kept, part.dropped)
            for name, run in runs.items()
            for part in run.rows
        ],
    )


@dataclass(frozen=True)
class _Run:
    """What the files of a finished run say."""

    folder: Path
    models: Mapping[str, Mapping[str, object]]
    examples: Sequence[Example]
    """All rows that were measured."""
    measured_sha256: str
    metrics: Sequence[Row]
    config: str
    environment: Mapping[str, object]
    rows: Sequence[RowsUsed]

    @classmethod
    def read(cls, folder: Path) -> "_Run":
        measured = folder / "evaluation.json"
        if not measured.is_file():
            raise UserError(f"{folder} holds no finished run: {measured.name} is missing; let the run end first")
        evaluation = json.loads(measured.read_text(encoding="utf-8"))
        rows = json.loads(_text(folder / "rows.json") or "{}")
        return cls(
            folder=folder,
            models=evaluation["models"],
            examples=[_example(row) for row in evaluation["predictions"]],
            measured_sha256=evaluation["rows"],
            metrics=_logged(_text(folder / "metrics.jsonl")),
            config=_text(folder / "config.yaml"),
            environment=json.loads(_text(folder / "environment.json") or "{}"),
            rows=[RowsUsed(name, **part) for name, part in rows.items()] or [RowsUsed("measured", evaluation["rows"])],
        )

    @property
    def facts(self) -> dict[str, object]:
        """Where it ran, and how full the device got."""
        measured = [row for row in self.metrics if "memory/peak_gib" in row]
        if not measured:
            return dict(self.environment)
        fullest = max(measured, key=lambda row: float(str(row["memory/peak_gib"])))
        peak = f"{fullest['memory/peak_gib']:.2f} GiB, {fullest['memory/used_fraction']:.0%} of what there is"
        if "memory/planned_gib" in fullest:
            peak += f"; {fullest['memory/planned_gib']:.2f} GiB were planned"
        return {**self.environment, "peak memory while training": peak}

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all stages."""
        last: dict[object, int] = {}
        for row in self.metrics:
            last[row.get("stage")] = max(last.get(row.get("stage"), 0), int(str(row["step"])))
        return sum(last.values())

    def illustrations(self, name: str = "") -> list[Illustration]:
        """The curves that its metrics allow; `name` where several runs are shown."""
        of_run = f" ({name})" if name else ""
        shown = []
        if any(row.get("kind") == "train" for row in self.metrics):
            caption = f"Loss, its parts before their weights, weights and learning rate while training{of_run}."
            shown.append(Illustration(plot_training(self.metrics), caption))
        if any(row.get("kind") == "change" for row in self.metrics):
            caption = f"What was changed by hand while it trained{of_run}; the log repeats it: --replay metrics.jsonl."
            shown.append(Illustration(plot_live(self.metrics), caption))
        measured = [row for row in self.metrics if row.get("kind") == "eval" and {"rouge_l", "perplexity"} & set(row)]
        if len(measured) > 1:  # one point is no curve
            shown.append(Illustration(plot_evaluations(self.metrics), f"Validation rows while training{of_run}."))
        if any("rollout/threshold" in row for row in self.metrics):
            caption = f"The student's own text: how much of it was trained on, and what the guard refused{of_run}."
            caption += "".join(f" Step {row['step']}: {row['note']}." for row in self.metrics if "note" in row)
            shown.append(Illustration(plot_rollout(self.metrics), caption))
        return shown


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _logged(text: str) -> list[Row]:
    """The rows of metrics.jsonl; a crash cuts a line, a full disk leaves junk."""
    rows: list[Row] = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"kind", "stage", "step"} <= row.keys():
            rows.append(row)
    return rows


def _diagnosed(folder: Path) -> Diagnosis | str:
    """What is wrong with a run, or why its log does not say."""
    try:
        return diagnose_run(folder)
    except UserError as error:
        return f"The doctor could not look at this run: {error}."


def _comparison_illustration(comparison: Sequence[Row]) -> Illustration:
    over = intervals_over(comparison)
    caption = f"Each model on the same rows: the value and its 95 % interval over {over}."
    return Illustration(plot_comparison(comparison), caption)


def _check_same_rows(runs: Mapping[str, _Run]) -> None:
    first, *others = runs
    for name in others:
        if runs[name].measured_sha256 != runs[first].measured_sha256:
            raise UserError(
                f"the runs {first} and {name} measured different rows: their figures cannot be compared; "
                "give them the same test rows"
            )


def _example(row: Mapping[str, Any]) -> Example:
    """One of the predictions of evaluation.json; whatever is not prompt or references is a model's answer."""
    answers = {name: answer for name, answer in row.items() if name not in ("prompt", "references")}
    shown = {name: answers.pop(name) for name in ("teacher", "before", "student") if name in answers}
    return Example(row["prompt"], row["references"], shown | answers)


def _side_by_side(runs: Mapping[str, _Run]) -> list[Example]:
    """The first rows with a teacher's answer and each run's student."""
    examples = []
    for row in range(min(NUM_EXAMPLES, *(len(run.examples) for run in runs.values()))):
        of_runs = {name: run.examples[row] for name, run in runs.items()}
        answers: dict[str, str | None] = {}
        for name, example in of_runs.items():
            if "teacher" in example.answers:
                answers.setdefault("teacher", example.answers["teacher"])
            answers[name] = example.answers.get("student")
        any_run = next(iter(of_runs.values()))
        examples.append(Example(any_run.prompt, any_run.references, answers))
    return examples

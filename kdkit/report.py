"""What a run found, for people: one HTML page that needs no other file, and the same table for the terminal."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from kdkit.doctor import Diagnosis, diagnose_run
from kdkit.doctor.page import diagnosis_html, diagnosis_style
from kdkit.errors import UserError
from kdkit.evaluation import mean_over_seeds, paired_difference
from kdkit.plots import (
    METRICS,
    Row,
    comparison_finding,
    figure_bytes,
    intervals_over,
    plot_comparison,
    plot_evaluations,
    plot_live,
    plot_rollout,
    plot_sweep,
    plot_training,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

NUM_EXAMPLES = 8
"""Rows whose answers a run's page shows, from the first on."""

_NOT_MEASURED = "–"


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
        comparison=_html_table(comparison),
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


def comparison_table(rows: Sequence[Row]) -> "Table":
    """The comparison for a terminal, readable at 80 columns: model, steps, and each metric with its 95 % interval.

    Args:
        rows: as in `write_report`.
    Returns:
        A table for `rich.console.Console().print`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    note = f"second line: 95 % interval over {intervals_over(rows)}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=note, caption_justify="left")
    columns = _columns(rows, _TERMINAL_COLUMNS)
    for name in columns:
        table.add_column(_COLUMNS[name], justify="left" if name == "model" else "right", overflow="fold")
    for row in rows:
        cells = [_cell(row, name) for name in columns]
        # Text, because a name in square brackets would be taken for markup.
        table.add_row(*(Text.assemble(cell.value, "\n", (cell.interval, "dim")) for cell in cells))
    return table


def sweep_table(cells: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> "Table":
    """A sweep for a terminal: one line a combination, means over seeds, and the difference to the first one.

    Args:
        cells: one a combination: the swept fields' values, `seeds`, and each metric as one figure a seed.
        fields: names of the swept fields.
    Returns:
        A table for `rich.console.Console().print`; ± is half of the 95 % t interval over seeds. The last column is the
        mean difference in ROUGE-L to the first line, paired by seed.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    note = "± half of the 95 % t interval over seeds; the difference in ROUGE-L to the first line is paired by seed"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=note, caption_justify="left")
    short = [name.rsplit(".", 1)[-1] for name in fields]
    for name in (*(short if len(set(short)) == len(short) else fields), "seeds"):
        table.add_column(name, overflow="fold")
    for name in (*METRICS, "difference"):
        table.add_column(_COLUMNS.get(name, name), justify="right")
    for cell in cells:
        values = [*(_plain(cell[name]) for name in fields), str(len(cell["seeds"]))]
        figures = [_over_seeds(cell[name], name) for name in METRICS]
        table.add_row(*map(Text, [*values, *figures, _difference(cell, cells[0])]))
    return table


def write_sweep_figure(cells: Sequence[Mapping[str, Any]], fields: Sequence[str], path: str | Path) -> Path:
    """ROUGE-L over the first field, a line for each value of the others, as a PNG.

    Args:
        cells: as in `sweep_table`.
        fields: names of the swept fields.
        path: file to write or replace.
    Returns:
        The path.
    """
    others = list(fields[1:])
    if len(others) > 1:  # one legend for all of them
        cells = [{**cell, ", ".join(others): ", ".join(_plain(cell[name]) for name in others)} for cell in cells]
    figure = plot_sweep(cells, x=fields[0], lines=", ".join(others) or None)
    Path(path).write_bytes(figure_bytes(figure, "png"))
    return Path(path)


def _plain(value: object) -> str:
    return "null" if value is None else str(value)


def _over_seeds(values: Sequence[float], name: str) -> str:
    """Mean and half interval over seeds."""
    if not values:
        return _NOT_MEASURED
    mean = mean_over_seeds(values)
    half = "" if math.isnan(mean.low) else f" ±{_written((mean.high - mean.low) / 2, name)}"
    return _written(mean.value, name) + half


def _difference(cell: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """ROUGE-L less that of the first combination, over the seeds that both have."""
    ours, theirs = (dict(zip(c["seeds"], c["rouge_l"], strict=True)) for c in (cell, first))
    both = [seed for seed in ours if seed in theirs]
    if cell is first or not both:
        return ""
    if len(both) == 1:
        return f"{ours[both[0]] - theirs[both[0]]:+.1f}"
    difference = paired_difference([ours[seed] for seed in both], [theirs[seed] for seed in both])
    return f"{difference.value:+.1f} ±{(difference.high - difference.low) / 2:.1f}"


# --- cells -----------------------------------------------------------------------------------------------------------

_COLUMNS = {
    "model": "model",
    "steps": "steps",
    "num_rows": "rows",
    "rouge_l": "ROUGE-L (%)",
    "exact_match": "exact match (%)",
    "perplexity": "perplexity",
    "mean_tokens": "tokens per answer",
    "ended_fraction": "ended by itself",
}
_TERMINAL_COLUMNS = ("model", "steps", "num_rows", "rouge_l", "exact_match", "perplexity")


@dataclass(frozen=True)
class _Cell:
    value: str
    interval: str = ""


def _columns(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """The model, and of the others those that some row has; the number of rows where models differ in it."""
    found = [name for name in names if name == "model" or any(_value(row, name) is not None for row in rows)]
    differ = len({row.get("num_rows") for row in rows}) > 1
    return [name for name in found if name != "num_rows" or differ]


def _html_table(rows: Sequence[Row]) -> dict[str, list]:
    columns = _columns(rows, list(_COLUMNS))
    return {
        "columns": [_COLUMNS[name] for name in columns],
        "rows": [[_cell(row, name) for name in columns] for row in rows],
    }


def _cell(row: Row, name: str) -> _Cell:
    value, low, high = (_value(row, name, end) for end in ("", "_low", "_high"))
    if isinstance(value, str):
        return _Cell(value)
    if not isinstance(value, int | float):
        return _Cell(_NOT_MEASURED)
    if not isinstance(low, int | float) or not isinstance(high, int | float) or low == high:
        return _Cell(_written(value, name))
    return _Cell(_written(value, name), f"({_written(low, name)}–{_written(high, name)})")


def _value(row: Row, name: str, end: str = "") -> object:
    """As the row has it; JSON has no infinity, so that a perplexity beyond all numbers is missing there."""
    value = row.get(name + end)
    if value is None and name == "perplexity" and row.get("cross_entropy" + end) is not None:
        return math.inf
    return value


def _written(value: float, name: str) -> str:
    if name in ("steps", "num_rows"):
        return f"{value:.0f}"
    if name == "ended_fraction":
        return f"{100 * value:.0f} %"
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if name == "perplexity":
        return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"
    return f"{value:.1f}"


# --- the page --------------------------------------------------------------------------------------------------------


def _template() -> jinja2.Template:
    source = files("kdkit").joinpath("report.html.j2").read_text(encoding="utf-8")
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


# --- folders of runs -------------------------------------------------------------------------------------------------


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

"""One config over lists of values and over seeds: each run in its own folder, what is finished is not run again."""

import hashlib
import itertools
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from decimal import Decimal
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import yaml
from pydantic import JsonValue

from kdkit.config import DistillConfig, dump_config, load_config
from kdkit.errors import RunFailed, UserError
from kdkit.runtime import thread_count
from kdkit.training.checkpoint import write_text
from kdkit.training.folder import CONFIG_FILE, RunFolder
from kdkit.training.run import run_distillation
from kdkit.training.stopping import Interrupted, StopRequest

SEED_STRIDE = 10
"""Between the seeds of a sweep; DistiLLM's are 10, 20, ..., 50."""
_SECONDS_BETWEEN_LOOKS = 0.2
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Axis:
    """A field and the values it takes."""

    field: str
    values: tuple[JsonValue, ...]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    values: Mapping[str, JsonValue]
    """Field -> value."""
    seed: int
    config: DistillConfig
    folder: Path

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join([*(f"{name}={written(value)}" for name, value in self.values.items()), f"seed {self.seed}"])


@dataclass
class SweepResult:
    """What a sweep found."""

    axes: Sequence[Axis]
    seeds: Sequence[int]
    figures: dict[Path, dict[str, float | None]] = field(default_factory=dict)
    """Folder of a finished run -> its student's figures on the test rows."""
    failures: dict[Path, str] = field(default_factory=dict)
    """Folder of a run that broke off -> why."""
    runs: Sequence[SweepRun] = ()

    def cells(self, metrics: Sequence[str] = ("rouge_l", "exact_match", "perplexity")) -> list[dict[str, object]]:
        """One row for each combination of values: the values, `seeds` that finished, and each metric's figures."""
        found: list[dict[str, object]] = []
        for values in _combinations(self.axes):
            own = [run for run in self.runs if run.values == values and run.folder in self.figures]
            cell: dict[str, object] = {**values, "seeds": [run.seed for run in own]}
            for metric in metrics:
                cell[metric] = [x for run in own if (x := self.figures[run.folder].get(metric)) is not None]
            found.append(cell)
        return found


def parse_axis(text: str) -> Axis:
    """`field=v1,v2,...` as an axis; values are read as YAML, and `a,b,...,c` counts on from a by b − a to c.

    Args:
        text: as given to `--over`.
    Returns:
        The axis.
    Raises:
        UserError: no field, no value, a value given twice, or dots that count on from nothing.
    """
    name, equals, given = text.partition("=")
    if not equals or not name.strip() or not given.strip():
        raise UserError(f"--over expects field.path=value,value,..., got {text!r}")
    try:
        plain, typed = (yaml.load(f"[{given}]", Loader=loader) for loader in (yaml.BaseLoader, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UserError(f"--over {text}: the values are not readable as YAML: {error}") from error
    values: list[JsonValue] = []
    for index, value in enumerate(typed):
        if value == "...":
            values += _counted_on(plain, index, text)
        else:
            values.append(value)
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise UserError(f"--over {text}: {written(twice[0])} is given twice")
    return Axis(name.strip(), tuple(values))


def _counted_on(plain: Sequence[str], index: int, text: str) -> list[JsonValue]:
    """The numbers between the two before the dots and the one after them."""
    try:
        first, second, last = (Decimal(plain[place]) for place in (index - 2, index - 1, index + 1))
        step = second - first
        count = (last - second) / step
    except (ArithmeticError, IndexError, TypeError, ValueError):
        count = step = last = Decimal("nan")
    if index < 2 or not count.is_finite():
        raise UserError(f"--over {text}: `...` counts on from two numbers to a third, as in 0,0.1,...,0.8")
    if count != count.to_integral_value() or count < 1:
        raise UserError(f"--over {text}: counting on by {step} does not arrive at {last}")
    between = (second + step * number for number in range(1, int(count)))
    return [int(x) if x == x.to_integral_value() else float(x) for x in between]


def plan_sweep(
    source: str | Path,
    axes: Sequence[Axis],
    output: Path,
    *,
    num_seeds: int = 1,
    overrides: Sequence[str] = (),
) -> list[SweepRun]:
    """Every run of a sweep, each with its validated config: a wrong value is found before the first one starts.

    Args:
        source: as `load_config` takes it.
        axes: their combinations are run.
        output: folder of the sweep.
        num_seeds: seeds for each combination: the config's own, and on by 10.
        overrides: `field=value`, laid over every run.
    Returns:
        The runs, seed by seed, so that an interrupted sweep has whole comparisons.
    Raises:
        UserError: a field or a value is wrong, a field is swept twice, or there is nothing to sweep.
    """
    names = [axis.field for axis in axes]
    if not axes:
        raise UserError("a sweep needs at least one --over field.path=value,value,...")
    if len(set(names)) < len(names) or "seed" in names:
        raise UserError(f"--over {', '.join(names)}: each field once; seeds are set by --seeds")
    runs = []
    for index, values in itertools.product(range(num_seeds), _combinations(axes)):
        given = [*overrides, *(f"{name}={json.dumps(value)}" for name, value in values.items())]
        base = load_config(source, given)
        seed = base.seed + SEED_STRIDE * index
        config = base.model_copy(update={"seed": seed})
        runs.append(SweepRun(values, seed, config, output / _folder_name(values) / f"seed-{seed}"))
    return runs


def run_sweep(
    runs: Sequence[SweepRun], axes: Sequence[Axis], output: Path, *, jobs: int = 1, stop: StopRequest | None = None
) -> SweepResult:
    """Run what is not finished, and gather the figures of all.

    A run that fails is named and the others go on.

    Args:
        runs: from `plan_sweep`.
        axes: the same as there.
        output: folder of the sweep; `sweep.json` in it holds the figures.
        jobs: runs at a time, each a process of its own with its share of the CPU's threads.
        stop: asked meanwhile whether to stop.
    Returns:
        SweepResult.
    Raises:
        UserError: a folder holds another run.
        Interrupted: someone asked to stop; what is done is kept, and the same sweep goes on from there.
    """
    stop = stop or StopRequest()
    result = SweepResult(axes, list(dict.fromkeys(run.seed for run in runs)), runs=runs)
    missing = [run for run in runs if not _is_finished(run)]
    progress = _Progress(len(runs), len(runs) - len(missing))
    if jobs == 1:
        for run in missing:
            try:
                _run_one(run, stop)
            except (RunFailed, UserError) as error:
                result.failures[run.folder] = str(error)
            progress.say(run, result)
    else:
        _run_side_by_side(missing, result, jobs=jobs, stop=stop, progress=progress)
    for run in runs:
        if _is_finished(run):
            document = json.loads(RunFolder(run.folder).evaluation.read_text(encoding="utf-8"))
            result.figures[run.folder] = document["models"]["student"]
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "sweep.json", json.dumps(_document(result, output), indent=1))
    return result


def _run_one(run: SweepRun, stop: StopRequest) -> None:
    """A run from its start or from where it was stopped."""
    run_distillation(run.config, run.folder, resume=(run.folder / CONFIG_FILE).is_file(), stop=stop)


def _is_finished(run: SweepRun) -> bool:
    """Whether a run's figures are there, and are this run's."""
    folder = RunFolder(run.folder)
    if not folder.evaluation.is_file():
        return False
    folder.check_settings(run.config)
    return True


@dataclass
class _Progress:
    """Says after each run how far the sweep is."""

    num_runs: int
    num_done: int
    began: float = field(default_factory=time.monotonic)
    num_run: int = 0

    def say(self, run: SweepRun, result: SweepResult) -> None:
        self.num_run += 1
        self.num_done += 1
        left = (self.num_runs - self.num_done) * (time.monotonic() - self.began) / self.num_run
        what = "failed" if run.folder in result.failures else "done"
        print(f"{self.num_done}/{self.num_runs} {what}: {run.name}; about {left / 60:.0f} min left", file=sys.stderr)


def _run_side_by_side(
    missing: Sequence[SweepRun], result: SweepResult, *, jobs: int, stop: StopRequest, progress: _Progress
) -> None:
    """Several runs at a time, each in its own process with its log beside its folder."""
    threads = max(thread_count() // jobs, 1)
    context = multiprocessing.get_context("spawn")
    waiting, alive = list(missing), dict[SpawnProcess, SweepRun]()
    try:
        while waiting or alive:
            stop.check()
            while waiting and len(alive) < jobs:
                run = waiting.pop(0)
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                process = context.Process(target=_worker, args=(dump_config(run.config), run.folder, threads))
                process.start()
                alive[process] = run
            wait([process.sentinel for process in alive], timeout=_SECONDS_BETWEEN_LOOKS)
            for process in [process for process in alive if not process.is_alive()]:
                run = alive.pop(process)
                if process.exitcode:
                    result.failures[run.folder] = f"see {_log_file(run.folder)}"
                progress.say(run, result)
    finally:
        for process in alive:
            process.terminate()  # as SIGTERM: each saves its last step
        for process in alive:
            process.join()


def _worker(config: str, folder: Path, threads: int) -> None:
    """One run in a process of its own."""
    import torch

    settings = load_config(yaml.safe_load(config))
    if settings.threads is None:
        torch.set_num_threads(threads)
    log = _log_file(folder).open("a", encoding="utf-8")
    with log, redirect_stdout(log), redirect_stderr(log), StopRequest().on_signals() as stop:
        try:
            _run_one(SweepRun({}, settings.seed, settings, folder), stop)
        except (UserError, RunFailed, Interrupted) as error:
            print(f"error: {error}", file=log)
            sys.exit(1)


def _log_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _combinations(axes: Sequence[Axis]) -> Iterator[dict[str, JsonValue]]:
    """Every combination of the values, the last axis fastest."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.field for axis in axes), values, strict=True))


def _folder_name(values: Mapping[str, JsonValue]) -> str:
    """Readable where the values are short; a digest keeps apart what would look the same."""
    said = ",".join(f"{name}={written(value)}" for name, value in values.items())
    plain = re.sub(r"[^A-Za-z0-9.,=_-]+", "-", said)
    if plain == said and len(plain) <= _LONGEST_NAME:
        return plain
    return f"{plain[:_LONGEST_NAME].rstrip('-')}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def written(value: JsonValue) -> str:
    """A value as one would write it after --over."""
    return value if isinstance(value, str) else json.dumps(value)


def _document(result: SweepResult, output: Path) -> dict[str, JsonValue]:
    """The sweep for machines."""
    runs: list[JsonValue] = [
        {
            "values": dict(run.values),
            "seed": run.seed,
            "folder": str(run.folder.relative_to(output)),
            "figures": dict(result.figures[run.folder]) if run.folder in result.figures else None,
            "failure": result.failures.get(run.folder),
        }
        for run in result.runs
    ]
    return {"over": {axis.field: list(axis.values) for axis in result.axes}, "runs": runs}

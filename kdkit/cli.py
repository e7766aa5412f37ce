"""The command line: reads arguments, calls the library, prints results on stdout and everything else on stderr.

Exit codes: 0 done; 1 the run failed; 2 bad usage or input; 130 / 143 stopped by Ctrl-C / SIGTERM with everything saved.
"""

import json
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from kdkit import __version__
from kdkit.errors import RunFailed, UserError
from kdkit.kaggle.commands import kaggle

if TYPE_CHECKING:
    from kdkit.config import DistillConfig
    from kdkit.training.stopping import StopRequest


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kdkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Distil a large language model into a small one on one modest GPU, or on a CPU."""


@cli.command()
@click.option("--output", type=click.Path(path_type=Path), help="Folder.  [default: runs/demo or runs/demo-cross]")
@click.option(
    "--cross-tokenizer",
    is_flag=True,
    help="An MoE teacher, and a deeper student with another tokenizer: about ten minutes.",
)
@click.option("--resume", is_flag=True, help="Continue a demo that was stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")
def demo(output: Path | None, cross_tokenizer: bool, resume: bool, as_json: bool) -> None:
    """Distil the embedded teacher into a small student: no network, no GPU, a few minutes."""
    from kdkit.demo import run_demo
    from kdkit.training.stopping import StopRequest

    with StopRequest().on_signals() as stop:
        folder = output or Path("runs/demo-cross" if cross_tokenizer else "runs/demo")
        result = run_demo(folder, cross_tokenizer=cross_tokenizer, resume=resume, stop=stop)
    if as_json:
        click.echo(json.dumps(result.comparison, indent=1))
    else:
        _print_comparison(result.comparison)
    click.echo(f"report: {result.report}", err=True)


@cli.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field; repeatable.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/CONFIG]")
@click.option("--resume", is_flag=True, help="Continue the run in --output.")
@click.option("--replay", type=click.Path(path_type=Path), help="metrics.jsonl of a run: repeat its changes.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")
def distill(
    config: str, overrides: tuple[str, ...], output: Path | None, resume: bool, replay: Path | None, as_json: bool
) -> None:
    """Run CONFIG: a YAML file, or the name of a preset with teacher, student and rows given by --set."""
    from kdkit.config import load_config

    settings = load_config(config, overrides)
    folder = output or Path("runs") / Path(config).stem
    from accelerate import PartialState

    from kdkit.report import write_run_report
    from kdkit.training.controls import Controls, read_changes
    from kdkit.training.run import run_distillation
    from kdkit.training.stopping import StopRequest

    controls = None if replay is None else Controls(read_changes(replay))
    with StopRequest().on_signals() as stop:
        result = run_distillation(settings, folder, resume=resume, stop=stop, controls=controls)
        PartialState().destroy_process_group()  # a process that ends while its group's threads run may abort
    if not result.evaluations:  # another process of the same run prints
        return
    rows = [{"model": name, **figures} for name, figures in result.evaluations.items()]
    report = write_run_report(result.folder)
    if as_json:
        click.echo(json.dumps({"model": str(result.model), "evaluations": result.evaluations}, indent=1))
    else:
        _print_comparison(rows)
    click.echo(f"student: {result.model}\nreport: {report}", err=True)


@cli.command()
@click.argument("model", required=False)
@click.option("--data", help="Rows with reference answers: a file, a folder or a hub name.")
@click.option("--teacher", help="Measure this model on the same rows too.")
@click.option("--predictions", type=click.Path(path_type=Path), help="Score a JSONL of prediction and references.")
@click.option("--template", default="alpaca", show_default=True, help="How prompts are written.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first so many rows.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="Sample answers at temperature 1 this many times, as DistiLLM evaluates, instead of greedy decoding.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")
def evaluate(
    model: str | None,
    data: str | None,
    teacher: str | None,
    predictions: Path | None,
    template: str,
    limit: int | None,
    max_new_tokens: int,
    batch_size: int,
    seeds: int | None,
    as_json: bool,
) -> None:
    """Measure MODEL on rows with answers, or score a file of predictions that something else made."""
    if (predictions is None) == (model is None):
        raise click.UsageError("give either MODEL with --data, or --predictions FILE")
    if predictions is not None:
        from kdkit.evaluation import evaluate_predictions

        _print_evaluation([{"model": str(predictions), **evaluate_predictions(predictions)}], as_json)
        return
    if data is None:
        raise click.UsageError("MODEL needs --data FILE with rows that have answers")
    from kdkit.evaluation import GenerationSettings
    from kdkit.training.measure import measure_model

    settings = GenerationSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
    rows = [
        {"model": path, **measure_model(path, data, settings, template=template, limit=limit, seeds=seeds)}
        for path in (model, teacher)
        if path is not None
    ]
    _print_evaluation(rows, as_json)


@cli.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field; repeatable.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to make, or the JSONL file of --generate.")
@click.option("--generate", is_flag=True, help="Write the teacher's own answers to the training prompts instead.")
@click.option("--samples", type=click.IntRange(min=1), help="Keep so many draws a token, not the likeliest ids.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="Of log-probabilities and hidden states.",
)
@click.option("--resume", is_flag=True, help="Continue what was stopped.")
def cache(
    config: str,
    overrides: tuple[str, ...],
    output: Path | None,
    generate: bool,
    samples: int | None,
    dtype: Literal["float16", "float32"],
    resume: bool,
) -> None:
    """Write down what the teacher says, so that later runs can train without it.

    For every token that CONFIG trains or evaluates on: the objective.kd.top_k likeliest ids (64 where that is unset)
    with the mass of the rest, and the last hidden states where a term compares them. Without --output the folder is
    teacher.cache of CONFIG.
    """
    from kdkit.config import load_config

    settings = load_config(config, overrides)
    if output is None and (generate or settings.teacher.cache is None):
        raise click.UsageError("say where to write: --output, or teacher.cache in CONFIG for a folder")
    from kdkit.training.stopping import StopRequest

    with StopRequest().on_signals() as stop:
        if generate:
            assert output is not None
            _write_answers(settings, output, resume=resume, stop=stop)
            return
        from kdkit.training.caching import write_teacher_cache

        folder = output or Path(str(settings.teacher.cache))
        done = write_teacher_cache(settings, folder, resume=resume, samples=samples, dtype=dtype, stop=stop)
    click.echo(
        f"{done.num_tokens:,} tokens of {done.num_rows:,} rows in {folder}: {done.size_bytes / 2**20:,.1f} MiB, "
        f"{done.bytes_per_token:,.0f} bytes a token; train on them with\n  --set teacher.cache={folder}",
        err=True,
    )


@cli.command()
@click.argument("target", metavar="CONFIG|RUN")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field; repeatable.")
@click.option("--gpu", help="A card, as for plan.  [default: this machine's, else t4]")
@click.option("--budget-gib", type=float, metavar="GIB", help="A card of this memory, whatever it is.")
@click.option("--rows", type=click.IntRange(min=1), help="Training rows, where they are not here to be counted.")
@click.option("--fix", is_flag=True, help="Write the corrected config to --output and show the difference.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File of --fix.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
def doctor(
    target: str,
    overrides: tuple[str, ...],
    gpu: str | None,
    budget_gib: float | None,
    rows: int | None,
    fix: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Say what is wrong with a config before it is run, or with a run by what it logged.

    A config is a YAML file of kdkit, the name of a preset, or another trainer's JSON, YAML or shell script (HF, TRL,
    DistiLLM). A run is its folder, a metrics.jsonl, a trainer_state.json or a text log of any trainer.
    """
    from kdkit.doctor.showing import show_diagnosis
    from kdkit.doctor.targets import is_config

    if fix != (output is not None):
        raise click.UsageError("--fix writes the corrected config to --output FILE: give both")
    if gpu is not None and budget_gib is not None:
        raise click.UsageError("give either --gpu or --budget-gib")
    if is_config(target):
        from kdkit.doctor.config.command import ConfigRequest, answer_config

        diagnosis, fixed = answer_config(target, ConfigRequest(overrides, gpu, budget_gib, rows, output))
    elif overrides or gpu or budget_gib or rows or fix:
        raise click.UsageError(f"{target} is a run: --set, --gpu, --budget-gib, --rows and --fix are for configs")
    else:
        from kdkit.doctor import diagnose_run

        diagnosis, fixed = diagnose_run(Path(target)), None
    if as_json:
        click.echo(json.dumps(diagnosis.as_json | ({} if fixed is None else fixed.as_json), indent=1))
    else:
        if fixed is not None:
            click.echo(fixed.text_of_changes)
        show_diagnosis(diagnosis)
    if diagnosis.num_failures:
        sys.exit(1)


@cli.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field; repeatable.")
@click.option("--gpu", help="A card: t4, t4x2, p100, l4, a10, ...  [default: this machine's, else t4]")
@click.option("--budget-gib", type=float, metavar="GIB", help="A card of this memory, whatever it is.")
@click.option("--fit", is_flag=True, help="Propose the fastest settings that fit.")
@click.option("--exact", is_flag=True, help="Count the peak on a step without values: up to a minute.")
@click.option("--measured", type=click.Path(path_type=Path), metavar="RUN", help="Take the speed of this run's folder.")
@click.option("--figure", type=click.Path(path_type=Path, dir_okay=False), help="Write the stacked bars as PNG or SVG.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the proposal of --fit as YAML.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on stdout.")
def plan(
    config: str,
    overrides: tuple[str, ...],
    gpu: str | None,
    budget_gib: float | None,
    fit: bool,
    exact: bool,
    measured: Path | None,
    figure: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Will CONFIG fit on a card, what takes the room, and how long will it take? No weights are loaded."""
    from kdkit.config import load_config
    from kdkit.memory.command import PlanRequest, answer_plan

    if gpu is not None and budget_gib is not None:
        raise click.UsageError("give either --gpu or --budget-gib")
    if output is not None and not fit:
        raise click.UsageError("--output writes what --fit proposes: add --fit")
    request = PlanRequest(gpu, budget_gib, fit=fit, exact=exact, measured=measured, figure=figure, output=output)
    answer = answer_plan(load_config(config, overrides), request)
    if as_json:
        click.echo(json.dumps(answer.as_json, indent=1))
    else:
        answer.show()
    if not answer.fits:
        raise RunFailed("it does not fit" + ("" if fit else "; --fit proposes what does"))


@cli.command()
@click.argument("config")
@click.option("--over", "axes", multiple=True, required=True, metavar="FIELD=V1,V2,...", help="Values; repeatable.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Seeds for each combination.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field; repeatable.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the sweep.  [default: runs/CONFIG-sweep]")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")
def sweep(
    config: str,
    axes: tuple[str, ...],
    seeds: int,
    overrides: tuple[str, ...],
    output: Path | None,
    jobs: int,
    as_json: bool,
) -> None:
    """Run CONFIG over lists of values and seeds; run again, it goes on with what is missing.

    `--over rollout.threshold=0,0.1,...,0.8` counts on; several --over give every combination.
    """
    from kdkit.training.sweep import parse_axis, plan_sweep, run_sweep

    parsed = [parse_axis(axis) for axis in axes]
    folder = output or Path("runs") / f"{Path(config).stem}-sweep"
    runs = plan_sweep(config, parsed, folder, num_seeds=seeds, overrides=overrides)
    from kdkit.report import sweep_table, write_sweep_figure
    from kdkit.training.stopping import StopRequest

    with StopRequest().on_signals() as stop:
        result = run_sweep(runs, parsed, folder, jobs=jobs, stop=stop)
    if as_json:
        click.echo((folder / "sweep.json").read_text(encoding="utf-8"))
    elif result.figures:
        from rich.console import Console

        Console().print(sweep_table(result.cells(), [axis.field for axis in parsed]))
    if result.figures:
        figure = write_sweep_figure(result.cells(), [axis.field for axis in parsed], folder / "sweep.png")
        click.echo(f"figure: {figure}", err=True)
    if result.failures:
        named = "\n  ".join(
            f"{run.name}: {result.failures[run.folder]}" for run in runs if run.folder in result.failures
        )
        raise RunFailed(f"{len(result.failures)} of {len(runs)} runs failed:\n  {named}")


@cli.command("launch-config")
@click.argument("name", required=False)
def launch_config(name: str | None) -> None:
    """Print the file NAME for `accelerate launch --config_file`, to be kept and changed; without NAME, say which."""
    from kdkit.config import list_launch_configs, read_launch_config

    click.echo("\n".join(list_launch_configs()) if name is None else read_launch_config(name).rstrip())


cli.add_command(kaggle)


def main() -> None:
    """Run the command line and map what stopped it to an exit code."""
    debug = "--debug" in sys.argv[1:]
    try:
        cli.main(standalone_mode=False)
        return
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (UserError, RunFailed) as error:
        click.echo(f"error: {error}", err=True)
        code = 2 if isinstance(error, UserError) else 1
        if debug:
            traceback.print_exc()
    except OSError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        code = 1
    except click.Abort as abort:  # what click makes of a KeyboardInterrupt, and so of Interrupted
        click.echo(str(abort.__cause__) or "stopped", err=True)
        code = 128 + (getattr(abort.__cause__, "signum", None) or signal.SIGINT)
    sys.exit(code)


def _write_answers(settings: "DistillConfig", output: Path, *, resume: bool, stop: "StopRequest") -> None:
    """The teacher's answers, and how to train on them."""
    from kdkit.training.answers import write_teacher_answers

    count = write_teacher_answers(settings, output, resume=resume, progress=stop.check)
    click.echo(f"{count} answers in {output}; train on them with", err=True)
    click.echo(f"  --set data.train={output} --set 'data.train_template=\"{{instruction}}\"'", err=True)


def _print_comparison(rows: list[dict]) -> None:
    """The table of models on stdout."""
    from rich.console import Console

    from kdkit.report import comparison_table

    Console().print(comparison_table(rows))


def _print_evaluation(rows: list[dict], as_json: bool) -> None:
    """One model's figures as an object, several as a list, or a table."""
    if as_json:
        click.echo(json.dumps(rows[0] if len(rows) == 1 else rows, indent=1))
    else:
        _print_comparison(rows)

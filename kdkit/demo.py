"""The embedded default from start to end: a teacher, and three students of the same start and number of steps.

    sft       learns from 500 labels, all there are
    kd        learns from the teacher's distributions, on the teacher's own answers to 4,500 prompts
    kd_dtw    learns from its last hidden states too, aligned word by word

Labels are scarce and prompts are not: that is where a teacher has something to give. Every student takes the same
number of optimizer steps of the same size.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from kdkit.config import load_config
from kdkit.report import write_comparison_report
from kdkit.training.folder import CONFIG_FILE
from kdkit.training.run import RunResult, run_distillation
from kdkit.training.stopping import StopRequest

NAMES = {"sft": "SFT student", "kd": "KD student", "kd_dtw": "KD + DTW student"}


@dataclass(frozen=True)
class DemoPair:
    """A teacher and a student of the embedded default."""

    preset: str
    """Of models and rows."""
    answers: str
    """The teacher's own, to all prompts."""
    num_steps: int
    """Optimizer steps of each student; a deeper one that compares bytes takes more to get anywhere."""


ONE_TOKENIZER = DemoPair("demo", "${demo}/teacher_answers.jsonl", 250)
TWO_TOKENIZERS = DemoPair("demo-moe", "${demo}/moe_teacher_answers.jsonl", 400)


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed."""

    comparison: list[dict[str, float | str | None]]
    """One row per model: its name, steps, and figures with 95 % intervals."""
    report: Path


def run_demo(
    output: Path, *, cross_tokenizer: bool = False, resume: bool = False, stop: StopRequest | None = None
) -> DemoResult:
    """Distil the embedded teacher and compare.

    Args:
        output: folder of the three runs and the report; new, or with `resume` one that holds a stopped demo.
        cross_tokenizer: distil the MoE teacher into a deeper student that reads by another tokenizer.
        resume: continue where a demo was stopped.
        stop: asked between steps whether to stop.
    Returns:
        The comparison and the report's path.
    Raises:
        UserError, RunFailed, Interrupted: as `run_distillation`.
    """
    pair = TWO_TOKENIZERS if cross_tokenizer else ONE_TOKENIZER
    results = {name: _run(name, tree, output, resume=resume, stop=stop) for name, tree in _plan(pair).items()}
    comparison: list[dict[str, float | str | None]] = [{"model": "teacher", **results["sft"].evaluations["teacher"]}]
    comparison += [
        {"model": label, "steps": pair.num_steps, **results[name].evaluations["student"]}
        for name, label in NAMES.items()
    ]
    report = write_comparison_report(output, {name: results[name].folder for name in NAMES}, comparison)
    return DemoResult(comparison, report)


def _plan(pair: DemoPair) -> dict[str, dict[str, JsonValue]]:
    """The runs, in order, each as what it lays over the preset `demo`."""
    optim: dict[str, JsonValue] = {"max_steps": pair.num_steps}
    answers: dict[str, JsonValue] = {
        "train": pair.answers,
        "train_rows": None,
        "train_template": "{instruction}",
    }
    return {
        "sft": {"preset": [pair.preset, "sft"], "optim": optim, "evaluation": {"teacher": True}},
        "kd": {"preset": [pair.preset, "fkl"], "optim": optim, "data": answers},
        "kd_dtw": {"preset": [pair.preset, "fkl-dtw"], "optim": optim, "data": answers},
    }


def _run(name: str, tree: dict[str, JsonValue], output: Path, *, resume: bool, stop: StopRequest | None) -> RunResult:
    """One of the runs; with `resume` it goes on if it had begun."""
    folder = output / name
    return run_distillation(load_config(tree), folder, resume=resume and (folder / CONFIG_FILE).is_file(), stop=stop)

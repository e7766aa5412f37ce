"""The table of the README: SFT against distillation at equal training steps, paired by seed.

    kdkit cache demo --generate --set data.train_rows=null --output runs/answers.jsonl
    python data/demo/compare_seeds.py runs/seeds --answers runs/answers.jsonl [--seeds 5] [--steps 400]

Every student starts from the same random weights for a seed and sees the same rows in the same number of optimizer
steps, warm start included. SFT is run at three learning rates; the best by mean validation ROUGE-L is the baseline.
With `--answers`, further students distil on the teacher's own answers to all training prompts, labelled or not. For the
pair with two tokenizers give `--base` a file that says `preset: demo-moe`, and `data/demo/moe_teacher_answers.jsonl`.
A run that is already in OUTPUT is not run again.
"""

import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click
import yaml
from rich.console import Console
from rich.table import Table

SFT_RATES = (1e-3, 3e-3, 6e-3)
KD_RATE = ("optim.learning_rate=6e-3",)  # SFT's best; distillation is not tuned further
WARM_SHARE = 1 / 3
START_SHARE = 1 / 4
"""Of the steps, on labelled rows before the student writes itself."""


@dataclass(frozen=True)
class Variant:
    """A student to train: the presets it is made of, and what it lays over them."""

    name: str
    presets: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    is_warm: bool = True
    """Whether the first third of the steps is supervised, from the labels alone."""
    on_answers: bool = False
    """Whether it distils on what the teacher wrote."""
    on_prompts: bool = False
    """Whether it goes on with what it writes itself to all prompts, after the labelled rows."""


VARIANTS = (
    *(Variant(f"SFT, lr {rate:g}", ("sft",), (f"optim.learning_rate={rate}",), is_warm=False) for rate in SFT_RATES),
    Variant("forward KL", ("fkl",), KD_RATE, is_warm=False),
    Variant("forward KL + DTW", ("fkl-dtw",), KD_RATE, is_warm=False),
    Variant("forward KL, teacher's answers", ("fkl",), KD_RATE, is_warm=False, on_answers=True),
    Variant("forward KL + DTW, teacher's answers", ("fkl-dtw",), KD_RATE, is_warm=False, on_answers=True),
    *(
        Variant(f"{label}, teacher's answers", presets, (*KD_RATE, *own), is_warm=False, on_answers=True)
        for label, presets, own in (
            ("labels alone", ("sft",), ()),
            ("ULD and labels", ("uld",), ("objective.lm.weight=1", "objective.span.weight=0")),
            ("spans and labels", ("span",), ()),
            ("forward KL by equal bytes", ("fkl",), ("objective.kd.across=hybrid",)),
            ("curriculum", ("student-aware",), ()),
        )
    ),
    Variant("forward KL + DTW, own text", ("on-policy-fkl-dtw",), KD_RATE, is_warm=False, on_prompts=True),
    Variant("skew reverse KL", ("srkl",), KD_RATE),
    Variant("skew reverse KL + DTW", ("srkl-dtw",), KD_RATE),
)


def plan(variant: Variant, *, base: dict, seed: int, steps: int, files: dict[str, str]) -> dict:
    """The config of one run; `files` has the teacher's answers and all prompts."""
    tree = base | {"preset": [*_presets(base), *variant.presets]}
    tree |= {"seed": seed, "threads": 1, "optim": base.get("optim", {}) | {"max_steps": steps}}
    if variant.is_warm:
        warm = round(WARM_SHARE * steps)
        supervised = {"kd": {"weight": 0}, "lm": {"weight": 1}, "dtw": {"weight": 0}}
        tree["stages"] = {
            "warm_start": {"objective": supervised, "optim": {"max_steps": warm}},
            "distill": {"optim": {"max_steps": steps - warm}},
        }
    if variant.on_answers:
        own = {"train": files["answers"], "train_rows": None, "train_template": "{instruction}"}
        tree["data"] = base.get("data", {}) | own
    if variant.on_prompts:
        start = round(START_SHARE * steps)
        tree["stages"] = {
            "start": {"optim": {"max_steps": start}},
            "own": {"optim": {"max_steps": steps - start}, "data": {"train": files["prompts"], "train_rows": None}},
        }
    return tree


def write_prompts(base: dict, path: Path) -> Path:
    """Every training row of the base, the answers of all but the labelled ones taken out."""
    from kdkit.config import load_config

    data = load_config(base | {"preset": [*_presets(base), "fkl"]}).data
    assert data.train_rows is not None
    lines = Path(data.train).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    kept = rows[: data.train_rows] + [row | {"output": ""} for row in rows[data.train_rows :]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    return path


def _presets(base: dict) -> list[str]:
    below = base.get("preset", [])
    return [below] if isinstance(below, str) else list(below)


def run(variant: Variant, output: Path, tree: dict, overrides: tuple[str, ...]) -> dict[str, float]:
    """One student's figures on the test rows, with its last ROUGE-L on the validation rows."""
    from kdkit.config import load_config
    from kdkit.training.run import run_distillation

    name = re.sub(r"[^a-z0-9.]+", "-", variant.name.lower())
    folder = output / f"{name}-seed-{tree['seed']}"
    config = load_config(tree, (*overrides, *variant.overrides))
    result = run_distillation(config, folder, resume=(folder / "config.yaml").is_file())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validation = next(row["rouge_l"] for row in reversed(rows) if row["kind"] == "eval")
    return {**result.evaluations["student"], "validation_rouge_l": validation}


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seeds", default=5, show_default=True, help="How many, counted 10, 20, ...")
@click.option("--steps", default=400, show_default=True, help="Optimizer steps of every student.")
@click.option("--jobs", default=2, show_default=True, help="Runs at a time, one thread each.")
@click.option("--base", type=click.Path(path_type=Path, exists=True), help="YAML of the models and rows; else demo.")
@click.option("--answers", type=click.Path(path_type=Path, exists=True), help="What `kdkit cache --generate` wrote.")
@click.option("--only", multiple=True, help="Names of variants to run; default: all.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Laid over every run.")
def main(
    output: Path,
    seeds: int,
    steps: int,
    jobs: int,
    base: Path | None,
    answers: Path | None,
    only: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    """Run what is missing and print the table."""
    possible = [variant for variant in VARIANTS if answers is not None or not variant.on_answers]
    chosen = [variant for variant in possible if not only or variant.name in only]
    below = {"preset": "demo"} if base is None else yaml.safe_load(base.read_text(encoding="utf-8"))
    files = {"prompts": str(write_prompts(below, output / "prompts.jsonl")), "answers": str(answers)}
    planned = partial(plan, base=below, steps=steps, files=files)
    numbers = [10 * (index + 1) for index in range(seeds)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {
            (variant.name, seed): pool.submit(run, variant, output, planned(variant, seed=seed), overrides)
            for seed in numbers
            for variant in chosen
        }
        figures = {key: future.result() for key, future in pending.items()}
    table = {variant.name: [figures[variant.name, seed] for seed in numbers] for variant in chosen}
    (output / "table.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    show(table)


def show(table: dict[str, list[dict[str, float]]]) -> None:
    """Means over seeds, and the paired difference to the best SFT."""
    from kdkit.evaluation import paired_difference

    def mean(name: str, figure: str) -> float:
        return sum(row[figure] for row in table[name]) / len(table[name])

    baselines = [name for name in table if name.startswith("SFT")]
    best = max(baselines, key=lambda name: mean(name, "validation_rouge_l"))
    shown = Table(caption=f"{len(table[best])} seeds; difference to {best!r}, paired by seed, 95 % t interval")
    for heading in ("student", "ROUGE-L", "exact match", "perplexity", "ROUGE-L − SFT"):
        shown.add_column(heading)
    for name, rows in table.items():
        ours, theirs = ([row["rouge_l"] for row in table[key]] for key in (name, best))
        difference = "" if name == best or len(rows) < 2 else _written(paired_difference(ours, theirs))
        means = [f"{mean(name, figure):.2f}" for figure in ("rouge_l", "exact_match", "perplexity")]
        shown.add_row(name, *means, difference)
    Console(width=100).print(shown)


def _written(interval) -> str:
    return f"{interval.value:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"


if __name__ == "__main__":
    main()

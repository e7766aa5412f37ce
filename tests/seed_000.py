"""The story of seed 000 on the embedded task, over seeds: what collapses, what keeps it from collapsing.

    python tests/seed_000.py runs/seed_000 [--seeds 8] [--steps 100] [--jobs 2]

For each seed one supervised start, then skew reverse KL on the same 500 labelled rows, as in the seed: adaptive from
0.0, ε 0.1, capacity 1,000, drawing at temperature 1, no guard. Then the threshold that the seed ended with and
DistiLLM's two label faults; the same with 0.3 of the weight on the cross-entropy, which with the faults learns the
student's text as labels too; and both under guard and collapse rule. A run that is in OUTPUT is not run again.
"""

import json
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click
from label_faults import label_faults
from rich.console import Console
from rich.table import Table

UNGUARDED = {"guard": None, "collapse": None}
MOST = {"mode": "mixed", "threshold": 0.8}
GUARDED = {**MOST, "collapse": {"patience": 1}}
"""As measured: the rule acted at once."""
START_STEPS = 150


@dataclass(frozen=True)
class Variant:
    """A way to use the student's text."""

    name: str
    rollout: dict
    faults: bool = False
    learns_labels: bool = False
    """Whether the cross-entropy has 0.3 of the weight, and with faults learns the student's text too."""


NONE, NONE_LM = "no generation", "no generation, lm 0.3"
VARIANTS = (
    Variant(NONE, {"mode": "off"}),
    Variant("adaptive from 0, no guard", {"mode": "adaptive", **UNGUARDED}),
    Variant("adaptive from 0, no guard, label faults", {"mode": "adaptive", **UNGUARDED}, faults=True),
    Variant("mixed 0.8, no guard", {**MOST, **UNGUARDED}),
    Variant("mixed 0.8, no guard, label faults", {**MOST, **UNGUARDED}, faults=True),
    Variant("mixed 0.8, guard and rule, label faults", GUARDED, faults=True),
    Variant(NONE_LM, {"mode": "off"}, learns_labels=True),
    Variant("mixed 0.8, no guard, label faults, lm 0.3", {**MOST, **UNGUARDED}, faults=True, learns_labels=True),
    Variant("mixed 0.8, guard and rule, label faults, lm 0.3", GUARDED, faults=True, learns_labels=True),
)


def plan_start(seed: int) -> dict:
    """The supervised start that all variants of a seed share."""
    return {
        "preset": ["demo", "sft"],
        "seed": seed,
        "threads": 1,
        "optim": {"learning_rate": 6e-3, "max_steps": START_STEPS},
        "evaluation": {"every_steps": 0, "generate_rows": 0},
        "data": {"test_rows": 100},
    }


def plan(variant: Variant, start: Path, *, seed: int, steps: int) -> dict:
    """The config of one run."""
    lm = {"weight": 0.3 if variant.learns_labels else 0.0}
    return {
        "preset": "demo",
        "student": {"path": str(start), "from_scratch": False},
        "seed": seed,
        "threads": 1,
        "optim": {"learning_rate": 3e-3, "max_steps": steps},
        "objective": {"kd": {"loss": "skew_reverse_kl", "weight": 0.7 if variant.learns_labels else 1.0}, "lm": lm},
        "rollout": variant.rollout,
        "evaluation": {"every_steps": steps // 10, "generate_rows": 100, "before": False},
        "data": {"test_rows": 300},
    }


def run_start(output: Path, seed: int) -> Path:
    """The start of a seed; returns its student."""
    from kdkit.config import load_config
    from kdkit.training.run import run_distillation

    folder = output / f"start-seed-{seed}"
    resume = (folder / "config.yaml").is_file()
    return run_distillation(load_config(plan_start(seed)), folder, resume=resume).model


def run(variant: Variant, output: Path, tree: dict) -> dict:
    """One student's figures on the test rows, and the lowest ROUGE-L of its distillation stage."""
    from kdkit.config import load_config
    from kdkit.training.run import run_distillation

    name = re.sub(r"[^a-z0-9.]+", "-", variant.name.lower())
    folder = output / f"{name}-seed-{tree['seed']}"
    with label_faults(learn_labels=variant.learns_labels) if variant.faults else nullcontext():
        result = run_distillation(load_config(tree), folder, resume=(folder / "config.yaml").is_file())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        **result.evaluations["student"],
        "threshold": rows[-1].get("rollout/threshold"),
        "notes": [row["note"] for row in rows if "note" in row],
    }


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seeds", default=8, show_default=True, help="How many, counted 10, 20, ...")
@click.option("--steps", default=100, show_default=True, help="Optimizer steps after the start.")
@click.option("--jobs", default=2, show_default=True, help="Runs at a time, one thread each.")
@click.option("--only", multiple=True, help="Names of variants to run; default: all.")
def main(output: Path, seeds: int, steps: int, jobs: int, only: tuple[str, ...]) -> None:
    """Run what is missing and print the table."""
    chosen = [variant for variant in VARIANTS if not only or variant.name in only]
    numbers = [10 * (index + 1) for index in range(seeds)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        starts = dict(zip(numbers, pool.map(partial(run_start, output), numbers), strict=True))
        pending = {
            (variant.name, seed): pool.submit(run, variant, output, plan(variant, starts[seed], seed=seed, steps=steps))
            for seed in numbers
            for variant in chosen
        }
        figures = {key: future.result() for key, future in pending.items()}
    table = {variant.name: [figures[variant.name, seed] for seed in numbers] for variant in chosen}
    (output / "table.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    show(table)


def show(table: dict[str, list[dict]]) -> None:
    """Means over seeds, and the paired difference to the run without generation of the same objective."""
    from kdkit.evaluation import paired_difference

    shown = Table()
    for heading in ("student", "ROUGE-L", "perplexity", "ended", "tokens", "last φ", "ROUGE-L − no generation"):
        shown.add_column(heading)
    for name, rows in table.items():
        baseline = NONE_LM if "lm 0.3" in name else NONE
        means = [sum(row[key] for row in rows) / len(rows) for key in ("rouge_l", "perplexity")]
        lengths = [sum(row[key] for row in rows) / len(rows) for key in ("ended_fraction", "mean_tokens")]
        thresholds = [row["threshold"] for row in rows if row["threshold"] is not None]
        difference = ""
        if name != baseline and baseline in table and len(rows) > 1:
            pair = ([row["rouge_l"] for row in table[key]] for key in (name, baseline))
            found = paired_difference(*pair)
            difference = f"{found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
        last = f"{sum(thresholds) / len(thresholds):.2f}" if thresholds else ""
        numbers = [f"{x:.2f}" for x in (*means, lengths[0])] + [f"{lengths[1]:.1f}"]
        shown.add_row(name, *numbers, last, difference)
    Console(width=130).print(shown)


if __name__ == "__main__":
    main()

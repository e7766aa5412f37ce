"""The story of seed 000 on the embedded task, over seeds: what collapses, what keeps it from collapsing.

    python tests/seed_000.py runs/seed_000 [--seeds 8] [--steps 400] [--jobs 2]

Skew reverse KL and soft-DTW on 500 labelled rows after a supervised third of the steps, as in the seed: adaptive from
0.0, ε 0.1, capacity 1,000, drawing at temperature 1, no guard. Then the same with DistiLLM's two label faults, at the
threshold that the seed ended with, and with the student's text learnt as labels; and the worst of it under guard and
collapse rule. A run that is already in OUTPUT is not run again.
"""

import json
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
from label_faults import label_faults
from rich.console import Console
from rich.table import Table

UNGUARDED = {"guard": None, "collapse": None}
WARM_SHARE = 1 / 3


@dataclass(frozen=True)
class Variant:
    """A way to use the student's text."""

    name: str
    rollout: dict
    faults: bool = False
    learns_labels: bool = False
    """Whether the cross-entropy has a third of the weight, and with faults learns the student's text too."""


VARIANTS = (
    Variant("no generation", {"mode": "off"}),
    Variant("adaptive from 0, no guard", {"mode": "adaptive", **UNGUARDED}),
    Variant("adaptive from 0, no guard, label faults", {"mode": "adaptive", **UNGUARDED}, faults=True),
    Variant("mixed 0.8, no guard", {"mode": "mixed", "threshold": 0.8, **UNGUARDED}),
    Variant("mixed 0.8, no guard, label faults", {"mode": "mixed", "threshold": 0.8, **UNGUARDED}, faults=True),
    Variant("mixed 0.8, label faults, guard and rule", {"mode": "mixed", "threshold": 0.8}, faults=True),
    Variant("no generation, lm 0.3", {"mode": "off"}, learns_labels=True),
    Variant(
        "mixed 0.8, no guard, label faults, lm 0.3",
        {"mode": "mixed", "threshold": 0.8, **UNGUARDED},
        faults=True,
        learns_labels=True,
    ),
    Variant(
        "mixed 0.8, label faults, lm 0.3, guard and rule",
        {"mode": "mixed", "threshold": 0.8},
        faults=True,
        learns_labels=True,
    ),
)


def plan(variant: Variant, *, seed: int, steps: int) -> dict:
    """The config of one run."""
    warm = round(WARM_SHARE * steps)
    lm = {"kd": {"weight": 0.7}, "lm": {"weight": 0.3}} if variant.learns_labels else {}
    supervised = {"kd": {"weight": 0}, "lm": {"weight": 1}, "dtw": {"weight": 0}}
    return {
        "preset": ["demo", "srkl-dtw"],
        "seed": seed,
        "threads": 1,
        "optim": {"learning_rate": 6e-3},
        "objective": lm,
        "evaluation": {"every_steps": 40, "generate_rows": 50},
        "data": {"test_rows": 300},
        "stages": {
            "warm_start": {"objective": supervised, "optim": {"max_steps": warm}},
            "distill": {"optim": {"max_steps": steps - warm}, "rollout": variant.rollout},
        },
    }


def run(variant: Variant, output: Path, tree: dict) -> dict:
    """One student's figures on the test rows, and the lowest ROUGE-L of its distillation stage."""
    from kdkit.config import load_config
    from kdkit.training.run import run_distillation

    name = re.sub(r"[^a-z0-9.]+", "-", variant.name.lower())
    folder = output / f"{name}-seed-{tree['seed']}"
    with label_faults(learn_labels=variant.learns_labels) if variant.faults else nullcontext():
        result = run_distillation(load_config(tree), folder, resume=(folder / "config.yaml").is_file())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    own = [row for row in rows if row["stage"] == "distill"]
    return {
        **result.evaluations["student"],
        "threshold": own[-1].get("rollout/threshold"),
        "notes": [row["note"] for row in own if "note" in row],
    }


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seeds", default=8, show_default=True, help="How many, counted 10, 20, ...")
@click.option("--steps", default=240, show_default=True, help="Optimizer steps of every student.")
@click.option("--jobs", default=2, show_default=True, help="Runs at a time, one thread each.")
@click.option("--only", multiple=True, help="Names of variants to run; default: all.")
def main(output: Path, seeds: int, steps: int, jobs: int, only: tuple[str, ...]) -> None:
    """Run what is missing and print the table."""
    chosen = [variant for variant in VARIANTS if not only or variant.name in only]
    numbers = [10 * (index + 1) for index in range(seeds)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {
            (variant.name, seed): pool.submit(run, variant, output, plan(variant, seed=seed, steps=steps))
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
        baseline = "no generation, lm 0.3" if "lm 0.3" in name else "no generation"
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

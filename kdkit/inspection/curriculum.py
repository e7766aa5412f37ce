"""A curriculum before it is trained, and what leaving out its terms did."""

from collections.abc import Mapping

from kdkit.config import DistillConfig
from kdkit.errors import UserError
from kdkit.evaluation import mean_over_seeds
from kdkit.plots.curriculum import DIFFERENCES

SeedFigures = Mapping[int, Mapping[str, float | None]]
"""Seed -> figures of the student that was trained with it."""


def planned_rows(config: DistillConfig, *, num_steps: int) -> list[dict[str, float]]:
    """Weights and temperature of every step of a run, from its config alone.

    Args:
        config: of a run or a stage.
        num_steps: optimizer steps.
    Returns:
        One row for each number of completed steps, under the names of metrics.jsonl; `kd_scale` is the factor that
        kd's loss is multiplied by.
    """
    kd, rows = config.objective.kd, []
    used = {name: schedule for name, schedule in config.objective.weights.items() if schedule.largest > 0}
    for done in range(num_steps + 1):
        temperature = kd.temperature.at(done, num_steps)
        weights = {f"weight/{name}": schedule.at(done, num_steps) for name, schedule in used.items()}
        scale = temperature**2 if kd.temperature_scaling == "square" else 1.0
        rows.append({"step": float(done), **weights, "kd_temperature": temperature, "kd_scale": scale})
    return rows


def ablation_rows(arms: Mapping[str, SeedFigures], *, full: str = "full") -> list[dict[str, object]]:
    """Differences between runs that lack a term and runs that lack none, paired by seed.

    Args:
        arms: what a run lacks -> its figures by seed; `full` among them.
        full: name of the runs that lack nothing.
    Returns:
        One row for each other arm: `without`, `num_seeds`, and for each of DIFFERENCES the mean of without − full, with
        `_low` and `_high` of its 95 % t interval, NaN where there is one seed.
    Raises:
        UserError: there is no full run, or one arm shares no seed with it.
    """
    if full not in arms:
        raise UserError(f"the ablation has no runs named {full!r} to compare with; it has {', '.join(arms) or 'none'}")
    return [_difference_row(name, arms[name], arms[full]) for name in arms if name != full]


def _difference_row(name: str, arm: SeedFigures, full: SeedFigures) -> dict[str, object]:
    seeds = [seed for seed in arm if seed in full]
    if not seeds:
        raise UserError(f"the runs without {name} share no seed with the full ones: run both with the same seeds")
    row: dict[str, object] = {"without": name, "num_seeds": len(seeds)}
    for metric in DIFFERENCES:
        pairs = [(arm[seed].get(metric), full[seed].get(metric)) for seed in seeds]
        differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        if differences:
            found = mean_over_seeds(differences)
            row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
    return row

"""A plan as people and programs read it: a table, a figure's bars, plain numbers."""

from typing import TYPE_CHECKING

from kdkit.memory.estimate import MemoryPlan
from kdkit.memory.hours import WEEK_HOURS
from kdkit.memory.planning import RunPlan
from kdkit.plots.memory import CardBars
from kdkit.runtime import GIB

if TYPE_CHECKING:
    from rich.table import Table


def plan_bars(plan: MemoryPlan) -> list[CardBars]:
    """What `plot_memory` draws of a plan: the student's card, and the teacher's own where it has one."""
    budget = plan.card.memory_bytes
    if not plan.beside:
        return [CardBars(plan.card.name, plan.phases, budget)]
    return [
        CardBars(f"{plan.card.name}, student's card", plan.phases, budget),
        CardBars(f"{plan.card.name}, teacher's card", plan.beside, budget),
    ]


def plan_table(plan: MemoryPlan) -> "Table":
    """GiB by part and phase for a terminal, the fullest phase in bold.

    Args:
        plan: of one stage.
    Returns:
        A table for `rich.console.Console().print`.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    phases = {**plan.phases, **{f"{name} (own card)": parts for name, parts in plan.beside.items()}}
    table.add_column("GiB", footer="total")
    for name, parts in phases.items():
        style = "bold" if name == plan.peak_phase else None
        table.add_column(name, footer=_gib(sum(parts.values())), justify="right", style=style, footer_style=style or "")
    for part in dict.fromkeys(part for parts in phases.values() for part in parts):
        table.add_row(part, *(_gib(parts.get(part, 0)) for parts in phases.values()))
    return table


def plan_lines(plan: RunPlan) -> list[str]:
    """The verdict, the hours and what is to be known, in sentences."""
    worst, card = plan.worst, plan.worst.card
    verdict = "fits" if worst.fits else "too tight to promise" if worst.used_fraction <= 1 else "does not fit"
    lines = [
        f"{verdict}: {worst.peak_bytes / GIB:.1f} of {card.memory_gib:.1f} GiB on the {card.name} "
        f"({worst.peak_bytes / card.memory_bytes:.0%}), in phase {worst.peak_phase}"
        + (f" of stage {plan.stage}" if len(plan.stages) > 1 else "")
    ]
    if worst.beside:
        share = worst.beside_bytes / card.memory_bytes
        lines.append(
            f"  and {worst.beside_bytes / GIB:.1f} GiB ({share:.0%}) on the teacher's own, in {worst.fullest[1]}"
        )
    lines += [f"note: {note}" for note in worst.notes]
    return [*lines, *_hours(plan)]


def _hours(plan: RunPlan) -> list[str]:
    speeds = list(plan.speeds.values())
    if plan.seconds is None:
        return [
            f"{speeds[0].step_seconds:.2g} s an optimizer step ({speeds[0].source}); steps unknown: set optim.max_steps"
        ]
    hours = plan.seconds / 3600
    taken = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    each = ", ".join(
        f"{steps} steps of {speed.step_seconds:.2g} s" for steps, speed in zip(plan.steps.values(), speeds, strict=True)
    )
    return [
        f"training: {taken}, {hours / WEEK_HOURS:.0%} of a week's {WEEK_HOURS:g} h on Kaggle: {each} "
        f"({speeds[0].source}; evaluations not counted)"
    ]


def plan_json(plan: RunPlan) -> dict[str, object]:
    """Everything of a plan as plain numbers, bytes and seconds."""
    card = plan.worst.card
    return {
        "card": {"name": card.name, "memory_bytes": card.memory_bytes, "num_cards": card.num_cards},
        "fits": plan.fits,
        "stage": plan.stage,
        "peak_bytes": plan.worst.peak_bytes,
        "peak_phase": plan.worst.peak_phase,
        "used_fraction": plan.worst.used_fraction,
        "seconds": plan.seconds,
        "stages": {
            name: {
                "phases": stage.phases,
                "beside": stage.beside,
                "precision": stage.precision,
                "steps": plan.steps[name],
                "step_seconds": plan.speeds[name].step_seconds,
                "speed": plan.speeds[name].source,
                "notes": list(stage.notes),
            }
            for name, stage in plan.stages.items()
        },
    }


def _gib(size: float) -> str:
    return "" if not size else f"{size / GIB:.2f}" if size >= 0.005 * GIB else "<0.01"

"""Settings of a run against what they fill of a card: every move plans the run again."""

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

from kdkit.config import DistillConfig, load_config
from kdkit.memory.cards import CARDS, Card
from kdkit.memory.planning import Pair, RunPlan, plan_stages, stages_of
from kdkit.memory.showing import plan_bars
from kdkit.plots import plot_memory
from kdkit.plots.axes import wrapped
from kdkit.widgets.explorer import Control, Explorer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pydantic import JsonValue

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 2048)
KEPT_IDS = (16, 64, 256, 1024)
ALL_IDS = "all"
"""Its value on the slider, which cannot hold None."""
CHUNKS = (64, 128, 256, 512, 1024, 4096)
WEIGHTS = {"float32": "float32", "auto": "half", "int8": "int8", "nf4": "nf4"}
"""Dtype of the teacher's weights, or how they are packed -> what the reader sees."""
PACKED = ("int8", "nf4")


def memory_explorer(config: DistillConfig, cards: Sequence[Card] = (CARDS["p100"], CARDS["t4x2"])) -> Explorer:
    """Sliders for what a step's memory depends on; the figure is the plan's bars on the chosen card.

    Nothing is loaded: a move costs some milliseconds of planning and a drawing. Where a machine has several cards, the
    teacher is on the second one.

    Args:
        config: the run, where the controls start; of several stages the one that needs most on the first card.
        cards: to choose among, the first one to start with.
    Returns:
        The explorer; its controls are `batch`, `length`, `k`, `chunk`, `recompute`, `weights` and `card`.
    Raises:
        UserError: as `kdkit.memory.sizes.read_sizes`.
    """
    pair, stages, by_name = Pair.of(config), stages_of(config), {card.name: card for card in cards}
    name = plan_stages(stages, cards[0], pair=pair).stage
    stage = stages[name]

    def draw(batch: int, length: int, k: int | str, chunk: int, recompute: bool, weights: str, card: str) -> "Figure":
        changes: dict[str, JsonValue] = {
            "optim.batch_size": batch,
            "data.max_length": length,
            "data.max_prompt_length": min(stage.data.max_prompt_length, length // 2),
            "objective.kd.top_k": None if k == ALL_IDS else k,
            "objective.chunk_tokens": chunk,
            "student.gradient_checkpointing": recompute,
            **_teacher_on(by_name[card], weights),
        }
        settings = [f"{field}={json.dumps(value)}" for field, value in changes.items()]
        changed = load_config(stage.model_dump(mode="json"), settings)
        said = f"{batch} × {length} tokens, K {k}, chunks of {chunk}{', checkpointing' if recompute else ''}, "
        said += f"teacher {WEIGHTS.get(weights, weights)}"
        return _figure(plan_stages({name: changed}, by_name[card], pair=pair), said)

    return Explorer(draw, _controls(stage, list(by_name)))


def _controls(config: DistillConfig, cards: Sequence[str]) -> Iterable[Control]:
    """Each with the config's own value among its options."""
    batch, length, chunk = config.optim.batch_size, config.data.max_length, config.objective.chunk_tokens
    yield Control("batch", "rows at a time", _numbers(BATCHES, batch), batch)
    yield Control("length", "tokens a row", _numbers(LENGTHS, length), length)
    k = config.objective.kd.top_k
    yield Control("k", "teacher's ids K", [*_numbers(KEPT_IDS, k), (ALL_IDS, ALL_IDS)], k or ALL_IDS)
    yield Control("chunk", "chunk (tokens)", _numbers(CHUNKS, chunk), chunk)
    recompute = config.student.gradient_checkpointing
    yield Control("recompute", "checkpointing", [("off", False), ("on", True)], recompute, kind="buttons")
    weights = config.teacher.quantization or config.teacher.dtype
    kinds = WEIGHTS | {weights: WEIGHTS.get(weights, weights)}
    yield Control("weights", "teacher weights", [(seen, kind) for kind, seen in kinds.items()], weights, kind="buttons")
    yield Control("card", "card", [(card, card) for card in cards], cards[0], kind="buttons")


def _numbers(usual: Iterable[int], own: int | None) -> list[tuple[str, Hashable]]:
    return [(f"{number:,}", number) for number in sorted({*usual, *filter(None, [own])})]


def _teacher_on(card: Card, weights: str) -> "dict[str, JsonValue]":
    """How the teacher is held and where."""
    return {
        "teacher.dtype": "auto" if weights in PACKED else weights,
        "teacher.quantization": weights if weights in PACKED else None,
        "teacher.device": "cuda:1" if card.num_cards > 1 else "auto",
    }


def _figure(plan: RunPlan, settings: str) -> "Figure":
    """The bars of a stage under its settings, and below them what else is to be known."""
    figure = plot_memory(plan_bars(plan.worst))
    figure.suptitle(f"{wrapped(settings)}:\n{figure.get_suptitle()}")
    notes = [f"{plan.speeds[plan.stage].step_seconds:.2g} s an optimizer step, looked up", *plan.worst.notes]
    figure.axes[-1].set_xlabel("\n".join(["GiB", *(wrapped(note, 90) for note in notes)]), fontsize="small")
    return figure

"""What fills a card, phase by phase of a training step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdkit.errors import UserError
from kdkit.plots.axes import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, RED, SKY, wrapped
from kdkit.runtime import FULL_FRACTION, GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "teacher weights": (BLUE, "", ("teacher weights",)),
    "teacher's pass": (BLUE, "////", ("teacher's pass", "teacher's signal")),
    "student weights": (SKY, "", ("student weights", "adapters", "average of the weights", "weights set aside")),
    "optimizer": (GREEN, "", ("optimizer states",)),
    "gradients": (PURPLE, "", ("gradients",)),
    "activations": (ORANGE, "", ("student's activations", "half-precision copies", "backward")),
    "divergence": (RED, "", ("divergence",)),
    "other terms": (RED, "////", ("dtw", "feature terms")),
    "generation": (ORANGE, "////", ("KV cache", "generation")),
    "measured, unnamed": (FAINT, "xxxx", ("measured, unnamed",)),
    "CUDA and slack": (FAINT, "", ("CUDA context", "allocator slack")),
}
"""What is drawn as one -> colour, hatching, and the parts of a plan that are in it."""


@dataclass(frozen=True)
class CardBars:
    """One card: what is on it in each phase, and how much there is room for."""

    title: str
    phases: Mapping[str, Mapping[str, float]]
    """Phase -> part -> bytes."""
    budget_bytes: float


def plot_memory(cards: Sequence[CardBars]) -> "Figure":
    """Does it fit, and what takes the room? A stacked bar for each phase, a panel for each card.

    Args:
        cards: the student's card first; cards without a phase are left out.
    Returns:
        Figure; parts of less than half a percent of the budget are drawn, but not named.
    Raises:
        UserError: there is no phase at all.
    """
    cards = [card for card in cards if card.phases]
    if not cards:
        raise UserError("a memory plan of no phases: there is nothing to draw")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    counts = [len(card.phases) for card in cards]
    figure = Figure(figsize=(7.2, 1.9 + 0.42 * sum(counts) + 0.5 * len(cards)), layout="constrained")
    panels = figure.subplots(len(cards), 1, sharex=True, squeeze=False, height_ratios=[n + 0.6 for n in counts])[:, 0]
    for axes, card in zip(panels, cards, strict=True):
        _draw_card(axes, card)
    panels[-1].set_xlabel("GiB")
    right = max(max([card.budget_bytes, *map(_total, card.phases.values())]) for card in cards) / GIB
    panels[-1].set_xlim(0, 1.08 * right)
    present = [name for name in GROUPS if any(_of_group(name, p) for card in cards for p in card.phases.values())]
    patches = [Patch(facecolor=GROUPS[n][0], hatch=GROUPS[n][1], edgecolor="white", label=n) for n in present]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.suptitle(wrapped(memory_finding(cards)))
    return figure


def memory_finding(cards: Sequence[CardBars]) -> str:
    """The verdict in a sentence: how full the fuller card gets, when, and of what."""
    card = max((card for card in cards if card.phases), key=lambda card: _peak(card)[1] / card.budget_bytes)
    phase, peak = _peak(card)
    largest = max(GROUPS, key=lambda name: _of_group(name, card.phases[phase]))
    share = peak / card.budget_bytes
    verdict = "Does not fit" if share > 1 else "Too tight to promise" if share > FULL_FRACTION else "Fits"
    room = f"{peak / GIB:.1f} of {card.budget_bytes / GIB:.1f} GiB on the {card.title}"
    most = f"{largest}, {_of_group(largest, card.phases[phase]) / GIB:.1f} GiB"
    return f"{verdict}: {room}, in phase {phase}; most of it {most}"


def _draw_card(axes: "Axes", card: CardBars) -> None:
    """The phases of a card from top to bottom, and its edge."""
    names = list(card.phases)
    for row, name in enumerate(names):
        left = 0.0
        for group, (colour, hatch, _) in GROUPS.items():
            size = _of_group(group, card.phases[name]) / GIB
            axes.barh(row, size, left=left, height=0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
            left += size
        weight = "bold" if name == _peak(card)[0] else "normal"
        total = axes.annotate(f"{left:.1f}", (left, row), xytext=(4, 0), textcoords="offset points", va="center")
        total.set(fontsize="small", color=INK, fontweight=weight)
        total.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # the budget may pass behind it
    budget = card.budget_bytes / GIB
    axes.axvline(budget, color=INK, linewidth=1.5)
    axes.axvline(FULL_FRACTION * budget, color=INK, linewidth=1, linestyle=":")
    axes.annotate(
        f"{budget:.1f} ", (budget, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize="small"
    )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(card.title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=FAINT, alpha=0.3)
    axes.set_axisbelow(True)


def _of_group(group: str, parts: Mapping[str, float]) -> float:
    """Bytes of the parts that are drawn as one."""
    return sum(parts.get(name, 0.0) for name in GROUPS[group][2])


def _total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())


def _peak(card: CardBars) -> tuple[str, float]:
    """The fullest phase of a card, and its bytes."""
    return max(((name, _total(parts)) for name, parts in card.phases.items()), key=lambda found: found[1])

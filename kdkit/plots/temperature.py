"""What temperature does at one position: to both distributions, to every loss, and to what reaches the student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdkit.errors import UserError
from kdkit.plots.axes import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, RED, SKY, choose_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOSS_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, FAINT)
_BAR = 0.38
_NUM_CHARACTERS_OF_A_TOKEN = 14
_NUM_CHARACTERS_OF_THE_CONTEXT = 60


@dataclass(frozen=True, eq=False)
class TokenView:
    """One position of an answer, over M temperatures, with the K tokens that are shown of the vocabulary."""

    context: str
    """What both models have read."""
    label: str
    """The token that the answer has here."""
    tokens: Sequence[str]
    """K names."""
    num_others: int
    """Tokens of the vocabulary that are not shown."""
    temperatures: np.ndarray
    """(M,)"""
    student: np.ndarray
    """(M, K) probabilities."""
    teacher: np.ndarray
    """(M, K) probabilities."""
    losses: Mapping[str, np.ndarray]
    """Name -> (M,) value, without T²."""
    loss: str
    """The one whose gradient was taken."""
    push: np.ndarray
    """(M, K) its negative derivative by the student's logits, without T²: up is where the student is sent."""
    gradient_norm: np.ndarray
    """(M,) of the derivative by all logits, without T²."""


def plot_temperature(view: TokenView, *, temperature: float) -> "Figure":
    """What does temperature change for the student? Distributions and pushes at T; losses and gradient over all T.

    Args:
        view: of one position.
        temperature: one of the view's.
    Returns:
        Figure of four panels.
    Raises:
        UserError: the view was not measured at that temperature.
    """
    at = np.flatnonzero(np.isclose(view.temperatures, temperature))
    if not len(at):
        known = ", ".join(f"{value:g}" for value in view.temperatures)
        raise UserError(f"temperature {temperature:g} was not measured; known are {known}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 7.6), layout="constrained")
    (share_axes, push_axes), (loss_axes, norm_axes) = figure.subplots(2, 2, height_ratios=(1.7, 1.0))
    for axes in (share_axes, push_axes, loss_axes, norm_axes):
        axes.grid(color=FAINT, alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_shares(share_axes, view, at[0])
    _draw_push(push_axes, view, at[0])
    _draw_losses(loss_axes, view, at[0])
    _draw_norm(norm_axes, view, at[0])
    push_axes.set_ylim(share_axes.get_ylim())
    figure.suptitle(f"{_finding(view, at[0])}\n{_read_so_far(view)}", parse_math=False)
    return figure


def _draw_shares(axes: "Axes", view: TokenView, at: int) -> None:
    rows = np.arange(len(view.tokens) + 1)
    for name, shares, colour, shift in (("teacher", view.teacher, ORANGE, -1), ("student", view.student, BLUE, 1)):
        others = max(0.0, 1.0 - shares[at].sum())
        axes.barh(rows + shift * _BAR / 2, [*shares[at], others], height=_BAR, color=colour, label=name)
    names = [*(_shortened(token) for token in view.tokens), f"{view.num_others:,} others"]
    axes.set_yticks(rows, names, parse_math=False)
    for label, token in zip(axes.get_yticklabels(), view.tokens, strict=False):
        label.set_fontweight("bold" if token == view.label else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"probability at T = {view.temperatures[at]:g} (bold: the answer's)")
    axes.legend(loc="center right", frameon=False)


def _draw_push(axes: "Axes", view: TokenView, at: int) -> None:
    push = view.temperatures[at] ** 2 * view.push[at]
    axes.barh(np.arange(len(push)), push, height=2 * _BAR, color=[GREEN if x > 0 else RED for x in push])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks([])
    reach = max(1.15 * np.abs(push).max(), 1e-6)
    axes.set_xlim(-reach, reach)
    axes.set_xticks([-reach / 1.15, 0, reach / 1.15], [f"{-reach / 1.15:.2g}", "0", f"{reach / 1.15:.2g}"])
    axes.set_xlabel(f"what {view.loss} asks of the logit, × T²\n(left: down, right: up)")


def _draw_losses(axes: "Axes", view: TokenView, at: int) -> None:
    for (name, values), colour in zip(view.losses.items(), _LOSS_COLOURS, strict=False):
        is_chosen = name == view.loss
        axes.plot(view.temperatures, values, color=colour, linewidth=2.8 if is_chosen else 1.2, label=name)
        axes.plot(view.temperatures[at], values[at], "o", color=colour, markersize=7 if is_chosen else 3)
    _over_temperature(axes, view, at)
    choose_scale(axes, list(view.losses.values()))
    axes.set_ylabel("value of the loss")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _draw_norm(axes: "Axes", view: TokenView, at: int) -> None:
    scaled = view.temperatures**2 * view.gradient_norm
    for values, colour, name in ((view.gradient_norm, PURPLE, "as it is"), (scaled, INK, "× T²")):
        axes.plot(view.temperatures, values, color=colour, linewidth=2)
        axes.plot(view.temperatures[at], values[at], "o", color=colour, markersize=6)
        axes.annotate(
            name,
            (view.temperatures[-1], values[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            color=colour,
            verticalalignment="center",
        )
    _over_temperature(axes, view, at)
    choose_scale(axes, [view.gradient_norm, scaled])
    axes.set_ylabel(f"gradient of {view.loss}\nby the student's logits")


def _over_temperature(axes: "Axes", view: TokenView, at: int) -> None:
    """The horizontal axis, with the chosen temperature marked."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.axvline(view.temperatures[at], color=INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4, 8]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("temperature T")


def _finding(view: TokenView, at: int) -> str:
    """How sure both are; below it, how much of the gradient at T = 1 is left. Two lines, so that panels never jump."""
    t, norms = view.temperatures[at], view.gradient_norm
    best = int(np.argmax(view.teacher[at]))
    sure = (
        f"At T = {t:g} the teacher gives “{_shortened(view.tokens[best])}” {view.teacher[at, best]:.0%}, "
        f"the student {view.student[at, best]:.0%}"
    )
    one = np.flatnonzero(np.isclose(view.temperatures, 1.0) & (norms > 0))
    if not len(one) or one[0] == at:
        return f"{sure};\n{view.loss} is {view.losses[view.loss][at]:.3g}"
    left = norms[at] / norms[one[0]]
    return f"{sure};\nthe gradient of {view.loss} is {left:.2g} of that at T = 1, with T² {left * t**2:.2g} of it"


def _read_so_far(view: TokenView) -> str:
    """The end of what both have read, and the answer's token."""
    context = " ".join(view.context.split())
    if len(context) > _NUM_CHARACTERS_OF_THE_CONTEXT:
        context = "…" + context[1 - _NUM_CHARACTERS_OF_THE_CONTEXT :]
    return f"“{context}” → “{_shortened(view.label)}”"


def _shortened(token: str) -> str:
    return token if len(token) <= _NUM_CHARACTERS_OF_A_TOKEN else token[: _NUM_CHARACTERS_OF_A_TOKEN - 1] + "…"

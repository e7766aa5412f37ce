"""Where an MoE teacher sends tokens: over many rows, and word by word of one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdkit.errors import UserError
from kdkit.plots.axes import wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_WORDS = 30
_NUM_CHARACTERS_SHOWN = 14


def plot_expert_shares(shares: Mapping[int, np.ndarray]) -> "Figure":
    """Are all experts used? The share of tokens' choices that each expert of each layer gets.

    Args:
        shares: layer -> (E,), sum 1, as of `kdkit.inspection.experts.expert_shares`.
    Returns:
        Figure with a row for each layer; 1 is an even share.
    Raises:
        UserError: there is no layer.
    """
    if not shares:
        raise UserError("there are no shares of experts to draw: give at least one layer")
    from matplotlib.figure import Figure

    table = np.stack(list(shares.values())) * len(next(iter(shares.values())))  # (L, E) in even shares
    num_layers, num_experts = table.shape
    figure = Figure(figsize=(7.2, 1.4 + 0.42 * num_layers), layout="constrained")
    axes = figure.subplots()
    reach = max(2.0, float(table.max()))
    image = axes.imshow(table, cmap="Blues", vmin=0.0, vmax=reach, aspect="auto")
    figure.colorbar(image, ax=axes, label="share, even = 1")
    if num_layers * num_experts <= 8 * _MAX_WORDS:
        for (layer, expert), value in np.ndenumerate(table):
            colour = "white" if value > 0.6 * reach else "black"
            axes.text(expert, layer, f"{value / num_experts:.0%}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_xticks(range(num_experts))
    axes.set_yticks(range(num_layers), [str(layer) for layer in shares])
    figure.suptitle(wrapped(_share_finding(shares)))
    return figure


def plot_word_experts(words: Sequence[str], gates: np.ndarray, *, layers: Sequence[int]) -> "Figure":
    """Which expert reads which word? A panel for each layer, a column for each word.

    Args:
        words: W of them; the first 30 are drawn.
        gates: (L, W, E) share of each word that goes to each expert.
        layers: L indices, for the titles of the panels.
    Returns:
        Figure.
    Raises:
        UserError: the gates do not fit the words and layers.
    """
    if gates.ndim != 3 or gates.shape[:2] != (len(layers), len(words)) or not gates.size:
        raise UserError(
            f"the gates are {gates.shape} for {len(layers)} layers and {len(words)} words: "
            "give (layers, words, experts)"
        )
    from matplotlib.figure import Figure

    words, gates = words[:_MAX_WORDS], gates[:, :_MAX_WORDS]
    num_experts = gates.shape[2]
    height = 1.9 + len(layers) * (0.35 + 0.13 * num_experts)
    figure = Figure(figsize=(max(7.2, 0.32 * len(words) + 1.6), height), layout="constrained")
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for axes, layer, shares in zip(panels, layers, gates, strict=True):
        image = axes.imshow(shares.T, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_ylabel(f"layer {layer}\nexpert")
        axes.set_yticks(range(0, num_experts, max(num_experts // 4, 1)))
    panels[-1].set_xticks(
        range(len(words)), [_shown(word) for word in words], rotation=60, ha="right", parse_math=False
    )
    figure.colorbar(image, ax=list(panels), label="share of the word")
    figure.suptitle(wrapped(_word_finding(words, gates), int(9 * figure.get_figwidth())))
    return figure


def _share_finding(shares: Mapping[int, np.ndarray]) -> str:
    """The least and the most used expert."""
    most = max(shares, key=lambda layer: shares[layer].max())
    least = min(shares, key=lambda layer: shares[layer].min())
    return (
        f"An even share is {1 / len(shares[most]):.1%}; expert {shares[most].argmax()} of layer {most} gets "
        f"{shares[most].max():.0%}, expert {shares[least].argmin()} of layer {least} gets {shares[least].min():.0%}"
    )


def _word_finding(words: Sequence[str], gates: np.ndarray) -> str:
    """How many experts a word meets, and how often words next to each other share their first."""
    first = gates.argmax(2)  # (L, W)
    used = np.mean([len(np.unique(row)) for row in first])
    title = f"In a layer, {len(words)} words have {used:.1f} of {gates.shape[2]} experts as their first on average"
    if len(words) == 1:
        return title
    return f"{title}; {(first[:, 1:] == first[:, :-1]).mean():.0%} of neighbours have the same one"


def _shown(word: str) -> str:
    return word if len(word) <= _NUM_CHARACTERS_SHOWN else word[: _NUM_CHARACTERS_SHOWN - 1] + "…"

"""The spans of a text that two tokenizers agree on, with the tokens of both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdkit.errors import UserError
from kdkit.plots.axes import BLUE, FAINT, INK, ORANGE, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE_CHARACTERS = 62
_MAX_LINES = 8
_LANES = {"teacher": 0.0, "bytes": 1.0, "student": 2.0}
_LINE_HEIGHT = 3.9
_GAP = 0.3


@dataclass(frozen=True)
class SpanView:
    """The smallest stretch of a text at whose both ends a token of either side ends."""

    start_byte: int
    end_byte: int
    student_tokens: list[str]
    teacher_tokens: list[str]
    is_twin: bool
    """One token on either side, of ids that stand for the same bytes: there the two vocabularies meet."""


def plot_spans(spans: Sequence[SpanView]) -> "Figure":
    """Where do two tokenizers meet? The text in lines; above each span the teacher's tokens, below the student's.

    Args:
        spans: of one text, in order; long texts are cut after a few lines.
    Returns:
        Figure; spans of one token of the same bytes on either side are blue, others orange.
    Raises:
        UserError: there is no span.
    """
    if not spans:
        raise UserError("there are no spans to draw: give a text that both tokenizers have tokens for")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines = _lines(spans)
    shown = lines[:_MAX_LINES]
    figure = Figure(figsize=(8.4, 1.0 + 0.72 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for index, line in enumerate(shown):
        _draw_line(axes, line, index * _LINE_HEIGHT)
    axes.set_xlim(-6.5, _LINE_CHARACTERS + 1)
    axes.set_ylim(len(shown) * _LINE_HEIGHT - 0.6, -0.3)
    axes.axis("off")
    meanings = {"the same bytes, one token on either side": BLUE, "several tokens, or no common id": ORANGE}
    handles = [Patch(facecolor=colour, alpha=0.35, label=label) for label, colour in meanings.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(wrapped(_finding(spans, num_hidden=len(lines) - len(shown)), 92))
    return figure


def _lines(spans: Sequence[SpanView]) -> list[list[SpanView]]:
    """Spans broken into lines that fit."""
    lines: list[list[SpanView]] = [[]]
    for span in spans:
        if lines[-1] and sum(map(_span_width, lines[-1])) + _span_width(span) > _LINE_CHARACTERS:
            lines.append([])
        lines[-1].append(span)
    return lines


def _draw_line(axes: "Axes", line: Sequence[SpanView], top: float) -> None:
    """One line of the text: the teacher's tokens, the byte at which each span begins, the student's tokens."""
    for name, lane in _LANES.items():
        axes.text(-0.6, top + lane + 0.5, name, ha="right", va="center", fontsize=8, color="#555555")
    x = 0.0
    for span in line:
        _draw_tokens(axes, span.teacher_tokens, (x, top), span)
        _draw_tokens(axes, span.student_tokens, (x, top + _LANES["student"]), span)
        axes.text(x + 0.1, top + _LANES["bytes"] + 0.5, str(span.start_byte), va="center", fontsize=6.5, color=INK)
        axes.plot([x, x], [top, top + 3.0], color=FAINT, linewidth=0.8)
        x += _span_width(span)
    axes.plot([x, x], [top, top + 3.0], color=FAINT, linewidth=0.8)


def _draw_tokens(axes: "Axes", tokens: Sequence[str], corner: tuple[float, float], span: SpanView) -> None:
    """Boxes side by side over the width of the span, as wide as their text."""
    from matplotlib.patches import Rectangle

    x, y = corner
    stretch = (_span_width(span) - _GAP) / max(_width(tokens), 1)
    for token in tokens:
        width = _width([token]) * stretch
        colour = BLUE if span.is_twin else ORANGE
        axes.add_patch(Rectangle((x + 0.1, y + 0.08), width - 0.1, 0.84, facecolor=colour, alpha=0.35))
        text = axes.text(x + width / 2 + 0.05, y + 0.5, _visible(token), ha="center", va="center", fontsize=8)
        text.set(family="monospace", parse_math=False)
        x += width


def _finding(spans: Sequence[SpanView], *, num_hidden: int) -> str:
    """How many tokens and spans there are, and how many spans are one token on either side."""
    student, teacher = (
        sum(len(tokens) for tokens in side)
        for side in ([span.student_tokens for span in spans], [span.teacher_tokens for span in spans])
    )
    title = (
        f"{student} tokens of the student's and {teacher} of the teacher's meet in {len(spans)} spans; "
        f"{sum(span.is_twin for span in spans) / len(spans):.0%} are one token of the same bytes on either side"
    )
    return f"{title} ({num_hidden} more lines not shown)" if num_hidden else title


def _span_width(span: SpanView) -> float:
    """In characters: room for the tokens of the side that needs more."""
    return max(_width(span.teacher_tokens), _width(span.student_tokens)) + _GAP


def _width(tokens: Sequence[str]) -> float:
    """Characters that the tokens take, one and a half at least for each."""
    return sum(max(len(_visible(token)), 1.5) for token in tokens)


def _visible(token: str) -> str:
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")

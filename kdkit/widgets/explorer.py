"""The one mechanism of all sliders: controls beside the picture that a function draws for their values."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from kdkit.errors import UserError
from kdkit.runtime import is_batch
from kdkit.widgets.picture import Bundle, Picture, drawn

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure

_KEPT_PICTURES = 64
"""Of the last values chosen, about 10 MB."""
_WIDGETS = {"slider": "SelectionSlider", "buttons": "ToggleButtons"}  # JupyterLab takes the keys of a Dropdown


@dataclass(frozen=True)
class Control:
    """A value that the reader chooses among several."""

    name: str
    """Of the drawing function's argument."""
    label: str
    options: Sequence[tuple[str, Hashable]]
    """What the reader sees, and the value; in order. None is no value: a slider cannot hold it."""
    start: Hashable
    """One of the values."""
    kind: Literal["slider", "buttons"] = "slider"

    def widget(self) -> "ipywidgets.Widget":
        """The ipywidget; a slider reports when it is let go, as a picture takes longer than a drag's next step."""
        import ipywidgets

        style = {"description_width": "110px"} | ({"button_width": "auto"} if self.kind == "buttons" else {})
        return getattr(ipywidgets, _WIDGETS[self.kind])(
            options=list(self.options),
            value=self.start,
            description=self.label,
            style=style,
            layout=ipywidgets.Layout(width="560px"),
            **({"continuous_update": False} if self.kind == "slider" else {}),
        )


class Explorer:
    """A figure and the controls that choose what it shows; the last line of a cell shows it.

    Args:
        draw: a pure function from the controls' values, by name, to a figure with a title.
        controls: in the order in which they are shown.
        width_pixels: of the picture.
    Raises:
        UserError: a control starts at none of its values, or the start itself cannot be drawn.
    """

    def __init__(self, draw: Callable[..., "Figure"], controls: Iterable[Control], *, width_pixels: int = 720) -> None:
        self.controls = {control.name: control for control in controls}
        self._draw = draw
        self._kept = lru_cache(maxsize=_KEPT_PICTURES)(self._drawn)
        self.start = {name: control.start for name, control in self.controls.items()}
        for control in self.controls.values():
            _check_start(control)
        self.picture = Picture(width_pixels)
        self.picture.put(*self._kept(*self.start.values()))
        self.widgets: dict[str, ipywidgets.Widget] = {}
        self.box: ipywidgets.VBox | None = self._build() if has_front_end() else None

    @property
    def values(self) -> dict[str, Hashable]:
        """What is chosen now."""
        return {name: widget.value for name, widget in self.widgets.items()} or dict(self.start)

    @property
    def png(self) -> bytes:
        """The picture of these values, or of the last ones that could be drawn."""
        return self.picture.png

    @property
    def alt(self) -> str:
        """The text that stands for the picture: its title."""
        return self.picture.alt

    def _drawn(self, *values: Hashable) -> tuple[bytes, str]:
        """PNG and its text for these values."""
        return drawn(self._draw(**dict(zip(self.controls, values, strict=True))))

    def _build(self) -> "ipywidgets.VBox":
        import ipywidgets

        self.widgets = {name: control.widget() for name, control in self.controls.items()}
        self.message = ipywidgets.HTML()
        for widget in self.widgets.values():
            widget.observe(self._redraw, names="value")
        return ipywidgets.VBox([*self.widgets.values(), self.picture.widget(), self.message])

    def _redraw(self, _change: object) -> None:
        """The picture of the values chosen; what cannot be drawn is said below the last one that could."""
        try:
            png, alt = self._kept(*self.values.values())
        except UserError as error:
            self.message.value = f'<b role="alert">{escape(str(error))}</b>'
            return
        self.message.value = ""
        self.picture.put(png, alt)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Bundle:
        return self.picture.bundle(self.box)


def has_front_end() -> bool:
    """Whether someone could move a slider: no in a batch session, and without ipywidgets."""
    return not is_batch() and find_spec("ipywidgets") is not None


def _check_start(control: Control) -> None:
    values = [value for _, value in control.options]
    if control.start not in values:
        shown = ", ".join(str(name) for name, _ in control.options)
        raise UserError(f"{control.label} cannot start at {control.start!r}: allowed are {shown}")

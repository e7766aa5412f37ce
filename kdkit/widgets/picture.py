"""A figure that is the value of a widget, not the output of a cell: it changes from any thread, nothing accumulates.

What a notebook keeps carries both the widgets and the picture, so that where nobody can move a slider (GitHub,
nbconvert, a batch run, no ipywidgets) a figure is seen.
"""

from base64 import b64encode
from html import escape
from typing import TYPE_CHECKING

from kdkit.plots import figure_bytes

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure

_VIEW = "application/vnd.jupyter.widget-view+json"
Bundle = tuple[dict[str, object], dict[str, object]]
"""What a cell shows, by MIME type, and what goes with it."""


class Picture:
    """The figure drawn last, as PNG, as a widget, and beside a box of widgets.

    Args:
        width_pixels: of the picture.
    """

    def __init__(self, width_pixels: int = 720) -> None:
        self.width_pixels = width_pixels
        self.png = b""
        self.alt = ""
        self._widget: ipywidgets.HTML | None = None

    def draw(self, figure: "Figure") -> None:
        """Take a figure with a title, which is the text that stands for it."""
        self.put(*drawn(figure))

    def put(self, png: bytes, alt: str) -> None:
        """Take a figure that was drawn before."""
        self.png, self.alt = png, alt
        if self._widget is not None:
            self._widget.value = self._html()

    def widget(self) -> "ipywidgets.HTML":
        """An HTML widget with an img, since an Image widget has no place for the text; it follows every draw."""
        import ipywidgets

        if self._widget is None:
            self._widget = ipywidgets.HTML(self._html())
        return self._widget

    def bundle(self, box: "ipywidgets.Widget | None" = None) -> Bundle:
        """The picture, and the box where a front end has widgets: a saved notebook shows the one, a live one the other.

        Args:
            box: of widgets; None: the picture alone.
        Returns:
            Data and metadata as `IPython.display.display(..., raw=True)` takes them.
        """
        data: dict[str, object] = {"text/plain": self.alt}
        if self.png:
            data["image/png"] = b64encode(self.png).decode()
        return data | view_of(box), {"image/png": {"width": self.width_pixels, "alt": self.alt}}

    def _html(self) -> str:
        if not self.png:
            return ""
        data = b64encode(self.png).decode()
        return f'<img src="data:image/png;base64,{data}" width="{self.width_pixels}" alt="{escape(self.alt)}">'


def view_of(box: "ipywidgets.Widget | None") -> dict[str, object]:
    """What makes a front end show a box beside the other data of a bundle; nothing where there is none."""
    return {} if box is None else {_VIEW: {"version_major": 2, "version_minor": 0, "model_id": box.model_id}}


def drawn(figure: "Figure") -> tuple[bytes, str]:
    """A figure as PNG, and its title as the text that stands for it."""
    return figure_bytes(figure, "png"), " ".join(figure.get_suptitle().split())

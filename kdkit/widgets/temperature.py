"""Temperature against what teacher and student expect at real positions, and against what a loss makes of it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kdkit.errors import UserError
from kdkit.inspection import RunModels, read_positions
from kdkit.inspection.distributions import TEMPERATURES
from kdkit.losses import LOSSES
from kdkit.plots import TokenView, plot_temperature
from kdkit.widgets.explorer import Control, Explorer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEPT_VIEWS = 64


def temperature_explorer(models: RunModels, rows: Sequence[Mapping[str, Any]]) -> Explorer:
    """Sliders for temperature and position and buttons for losses, at the first references of some rows.

    Each row is read once by both models, so that a slider costs the losses at one position and a drawing.

    Args:
        models: of the run; temperature and loss start at the run's.
        rows: as in a run's predictions: `prompt` as the models read it, and `references`.
    Returns:
        The explorer; its controls are `temperature`, `position` and `loss`.
    Raises:
        UserError: there is no row, or as `kdkit.inspection.read_positions`.
    """
    if not rows:
        raise UserError("there is no row to look at: give at least one of a run's predictions")
    read = [read_positions(models, row["prompt"], row["references"][0]) for row in rows]
    temperatures = sorted({*TEMPERATURES, read[0].temperature})

    @lru_cache(maxsize=_KEPT_VIEWS)
    def view(place: tuple[int, int], loss: str) -> TokenView:
        return read[place[0]].view(place[1], loss=loss, temperatures=temperatures)

    def draw(temperature: float, position: tuple[int, int], loss: str) -> "Figure":
        return plot_temperature(view(position, loss), temperature=temperature)

    places = [
        (f"{f'row {number + 1}, ' if len(read) > 1 else ''}{position + 1}: {token}", (number, position))
        for number, answer in enumerate(read)
        for position, token in enumerate(answer.tokens)
    ]
    controls = (
        Control("temperature", "temperature T", [(f"{t:g}", t) for t in temperatures], read[0].temperature),
        Control("position", "position", places, (0, 0)),
        Control("loss", "loss", [(name, name) for name in LOSSES], read[0].loss, kind="buttons"),
    )
    return Explorer(draw, controls)

"""What the notebooks call beside the package: pictures, answers side by side, the student handed over."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import create_repo, upload_folder
from IPython.display import FileLink, Image, display

from kdkit.errors import UserError
from kdkit.inspection import RunModels, compare_answers
from kdkit.plots import figure_bytes
from kdkit.runtime import GIB
from kdkit.widgets import has_front_end

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure

LABELS = {"before": "before", "student": "after", "teacher": "teacher"}
"""The models of a run, in the order in which they are shown, and what a reader calls them."""

_NOT_ASKED = "–"
_WIDTH_PIXELS = {"wide": 720, "narrow": 480}
_CELL_STYLE = "text-align:left; vertical-align:top; white-space:pre-wrap; padding:2px 12px 2px 4px"


def hand_over(model: Path, *, hub: str | None = None) -> None:
    """Give the finished student out of the notebook: a zip to download, and a private repository on the hub.

    Args:
        model: folder of the student, as `RunResult.model`.
        hub: repository, such as "you/student"; it needs the variable or secret HF_TOKEN. None: download only.
    Raises:
        UserError: no room for the zip, or the hub did not take it.
    """
    size, free = sum(file.stat().st_size for file in model.rglob("*")), shutil.disk_usage(model).free
    if size > free:
        raise UserError(
            f"the student has {size / GIB:.1f} GiB and {model.parent} has room for {free / GIB:.1f}: free some"
        )
    archive = Path(shutil.make_archive(str(model.parent / "student"), "zip", model))
    display(FileLink(os.path.relpath(archive), result_html_prefix=f"The student, {size / 1e6:.0f} MB before packing: "))
    if hub is None:
        return
    try:
        address = create_repo(hub, private=True, exist_ok=True)
        upload_folder(repo_id=hub, folder_path=model)
    except (OSError, ValueError) as error:  # what huggingface_hub raises for network, login and name
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the hub did not take {hub}: {reason}. It wants a name such as you/student, the internet, and a token "
            "that may write, as the variable or Kaggle secret HF_TOKEN"
        ) from error
    print(f"pushed to {address} (private)")


def show(figure: "Figure", *, size: str = "wide") -> None:
    """Show a figure of `kdkit.plots` below the cell.

    Args:
        figure: made without pyplot, which is why a notebook would not show it by itself.
        size: "wide" or "narrow".
    """
    display(Image(figure_bytes(figure, "png"), width=_WIDTH_PIXELS[size], alt=figure.get_suptitle()))


@dataclass(frozen=True)
class AnswersTable:
    """Answers of several models to the same prompts; a notebook shows it as a table, anything else as text."""

    rows: Sequence[Mapping[str, object]]
    """As in a run's predictions: `prompt`, `references` where there are any, and the answer of each model."""

    def _entries(self, row: Mapping[str, object]) -> list[tuple[str, str]]:
        """Who says what."""
        references = row.get("references")
        expected = [("reference", str(references[0]))] if isinstance(references, Sequence) and references else []
        said = [
            (label, _NOT_ASKED if row[name] is None else str(row[name]))
            for name, label in LABELS.items()
            if name in row
        ]
        return [(who, text.strip()) for who, text in expected + said]

    def _repr_html_(self) -> str:
        lines = []
        for row in self.rows:
            prompt = escape(str(row["prompt"]).strip())
            lines.append(f'<tr><th colspan="2" style="{_CELL_STYLE}">{prompt}</th></tr>')
            for who, text in self._entries(row):
                cells = "".join(f'<td style="{_CELL_STYLE}">{escape(cell)}</td>' for cell in (who, text))
                lines.append(f"<tr>{cells}</tr>")
        return f"<table>{''.join(lines)}</table>"

    def __repr__(self) -> str:
        blocks = [
            "\n".join([str(row["prompt"]).strip(), *(f"  {who:<10} {text}" for who, text in self._entries(row))])
            for row in self.rows
        ]
        return "\n\n".join(blocks)


def ask_models(models: RunModels, prompt: str) -> "ipywidgets.VBox | None":
    """Show what the models of a run answer, and below it a box in which the reader types the next prompt.

    Args:
        models: of the run.
        prompt: answered at once, so that a notebook without a front end has answers in it too.
    Returns:
        The box, already shown; None where nobody could type: a Kaggle batch run, or ipywidgets is missing.
    Raises:
        UserError: as `compare_answers`; one that the box causes is shown in it instead.
    """
    display(AnswersTable([compare_answers(models, prompt)]))
    if not has_front_end():
        return None
    import ipywidgets

    text = ipywidgets.Textarea(value=prompt, rows=4, layout=ipywidgets.Layout(width="720px"))
    button = ipywidgets.Button(description="Answer", button_style="primary")
    answers = ipywidgets.HTML()

    def answer(_: object) -> None:
        button.disabled, button.description = True, "Answering…"
        try:
            answers.value = AnswersTable([compare_answers(models, text.value)])._repr_html_()
        except UserError as error:
            answers.value = f"<b>{escape(str(error))}</b>"
        finally:
            button.disabled, button.description = False, "Answer"

    button.on_click(answer)
    box = ipywidgets.VBox([text, button, answers])
    display(box)
    return box

"""What the notebooks call beside the package: runs that go on where a session ended, pictures, answers side by side."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from IPython.display import Image, display

from kdkit.config import DistillConfig
from kdkit.errors import UserError
from kdkit.inspection import RunModels, compare_answers
from kdkit.plots import figure_bytes
from kdkit.training.flow import StopRequest
from kdkit.training.folder import CONFIG_FILE
from kdkit.training.run import RunResult, run_distillation
from kdkit.widgets import has_front_end

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure

LABELS = {"before": "before", "student": "after", "teacher": "teacher"}
"""The models of a run, in the order in which they are shown, and what a reader calls them."""

_NOT_ASKED = "–"
_WIDTH_PIXELS = {"wide": 720, "narrow": 480}
_CELL_STYLE = "text-align:left; vertical-align:top; white-space:pre-wrap; padding:2px 12px 2px 4px"


def start_or_resume(
    config: DistillConfig,
    folder: str | Path,
    *,
    resume: bool = True,
    inputs: str | Path = "/kaggle/input",
) -> RunResult:
    """Run a config in a notebook; run again, it goes on where it stopped.

    Stopping the cell saves the last complete step. On Kaggle a new session begins with an empty disk: attach the output
    of the earlier version, and the run in it is copied here first. Progress goes to stdout, where it is not red.

    Args:
        config: the run.
        folder: of the run.
        resume: continue the run that is there, if there is one; False refuses a folder that holds something.
        inputs: where attached outputs of earlier versions lie.
    Returns:
        As `run_distillation`.
    Raises:
        UserError, RunFailed, Interrupted: as `run_distillation`; or several attached outputs hold this run.
    """
    folder = Path(folder)
    if resume and not (folder / CONFIG_FILE).is_file():
        _bring_back(folder, Path(inputs))
    begun = resume and (folder / CONFIG_FILE).is_file()
    with redirect_stderr(sys.stdout), StopRequest().on_signals() as stop:
        return run_distillation(config, folder, resume=begun, stop=stop)


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


def _bring_back(folder: Path, inputs: Path) -> None:
    """Copy the run of an earlier session to where it was; the copy is whole or not there."""
    marker = Path(*folder.parts[-2:]) / CONFIG_FILE
    found = sorted(inputs.rglob(str(marker))) if inputs.is_dir() else []
    if len(found) > 1:
        places = ", ".join(str(file.parent) for file in found)
        raise UserError(f"{len(found)} attached outputs hold {folder} ({places}): attach only the one to continue")
    if found:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(found[0].parent, partial)
        partial.rename(folder)
        print(f"continuing {found[0].parent}")

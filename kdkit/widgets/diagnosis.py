"""What the doctor found, to be filtered and unfolded in a notebook."""

from typing import TYPE_CHECKING

from kdkit.doctor.findings import Diagnosis
from kdkit.doctor.page import Part, diagnosis_html, diagnosis_style
from kdkit.doctor.showing import diagnosis_lines
from kdkit.widgets.explorer import has_front_end
from kdkit.widgets.picture import Bundle, view_of

if TYPE_CHECKING:
    import ipywidgets


class DiagnosisBox:
    """Buttons that choose a severity, and the findings below; the last line of a cell shows it.

    Where nobody can press a button there are all findings, unfolded, as HTML and as text.

    Args:
        diagnosis: of a run or a config.
    """

    def __init__(self, diagnosis: Diagnosis) -> None:
        self.diagnosis = diagnosis
        self.box: ipywidgets.VBox | None = self._build() if has_front_end() else None

    def _build(self) -> "ipywidgets.VBox":
        import ipywidgets

        self.findings = ipywidgets.HTML()
        self.buttons = ipywidgets.ToggleButtons(options=self._options(), style={"button_width": "auto"})
        self.buttons.observe(lambda change: self._show(change["new"]), names="value")
        self._show("all")
        return ipywidgets.VBox([self.buttons, self.findings])

    def _options(self) -> list[tuple[str, Part]]:
        """What there is any of."""
        counts: dict[Part, int] = {
            "fail": self.diagnosis.num_failures,
            "warn": self.diagnosis.num_warnings,
            "good": len(self.diagnosis.passed),
            "skipped": len(self.diagnosis.skipped),
        }
        return [("all", "all"), *((f"{count} {part}", part) for part, count in counts.items() if count)]

    def _show(self, part: Part) -> None:
        self.findings.value = self._html(part, is_folded=True)

    def _html(self, part: Part = "all", *, is_folded: bool = False) -> str:
        return f"<style>{diagnosis_style()}</style>{diagnosis_html(self.diagnosis, only=part, is_folded=is_folded)}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Bundle:
        data: dict[str, object] = {"text/plain": "\n".join(diagnosis_lines(self.diagnosis)), "text/html": self._html()}
        return data | view_of(self.box), {}

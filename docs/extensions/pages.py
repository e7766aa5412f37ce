"""A page for every public module of kdkit, written before Sphinx looks for its sources.

autosummary's own pages would take `kdkit.losses.head_pass` for the function of that name.
"""

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from sphinx.application import Sphinx

from extensions.docstrings import restructured
from extensions.names import exports, modules, submodules

FOLDER = Path("docs", "api")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True}


def _write(app: Sphinx) -> None:
    """Write what is new or has changed, and remove pages of modules that are gone."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(exist_ok=True)
    pages = {folder / f"{module}.rst": page(module) for module in modules("kdkit")}
    for path in set(folder.iterdir()) - set(pages):
        path.unlink()
    for path, text in pages.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def page(module: str) -> str:
    """The page of a module: its docstring and members, what it exports of others, the modules below it."""
    elsewhere = [place for name, place in exports(module).items() if place != f"{module}.{name}"]
    lines = [module, "=" * len(module), "", f".. automodule:: {module}", ""]
    if elsewhere:
        lines += _exported(elsewhere)
    if submodules(module):
        lines += _below(submodules(module))
    return "\n".join(lines) + "\n"


def _exported(places: Sequence[str]) -> Iterator[str]:
    yield from ("Names", "-----", "", "To be imported from here; each is described where it is defined.", "")
    yield from (".. py:currentmodule:: None", "")  # the names are full ones
    yield from (".. autosummary::", "   :nosignatures:", "", *(f"   ~{place}" for place in places), "")


def _below(below: Sequence[str]) -> Iterator[str]:
    yield from ("Modules", "-------", "")
    yield from (".. toctree::", "   :hidden:", "", *(f"   {module}" for module in below), "")
    yield from (".. list-table::", "   :class: autosummary", "")
    for module in below:
        summary = " ".join(restructured(_summary(module)))
        yield from (f"   * - :py:mod:`{module}`", f"     - {summary}")


def _summary(module: str) -> list[str]:
    """The first paragraph of a module's docstring."""
    return (import_module(module).__doc__ or "").strip().split("\n\n")[0].splitlines()

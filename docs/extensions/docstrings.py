"""The docstrings of kdkit as reStructuredText.

They are plain text with Google's sections and Markdown's backticks and indented blocks; `*` and `|` mean themselves.
Sphinx's napoleon reads the sections. What it, or reStructuredText, would take for something else is written out here.
"""

import re
from collections.abc import Iterator
from itertools import groupby

from docutils import nodes
from sphinx.application import Sphinx

_BEFORE_NAPOLEON = 400
_OF_VALUES = {"attribute", "data", "property"}
_SECTION = re.compile(r"(Args|Returns|Yields|Raises):$")
_RESULT = re.compile(r"^((?:Returns|Yields):\n +)", re.MULTILINE)
_SOURCE = re.compile(r"^Source: (.*)", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")
_MARKUP = re.compile(r"[\\*|]|_(?!\w)")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _rewrite, priority=_BEFORE_NAPOLEON)
    app.connect("doctree-read", _set_dashes)
    return {"parallel_read_safe": True}


def _rewrite(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = restructured(lines)
    if lines and what in _OF_VALUES:
        lines[0] = f": {lines[0]}"  # else what stands before the first colon becomes the type


def _set_dashes(app: Sphinx, doctree: nodes.document) -> None:
    """After the name of a parameter or an exception; smartquotes would set them in `--set` too."""
    for text in list(doctree.findall(nodes.Text)):
        if text.startswith(" -- "):
            text.parent.replace(text, nodes.Text(text.replace(" -- ", " – ", 1)))


def restructured(lines: list[str]) -> list[str]:
    """A docstring for napoleon.

    Args:
        lines: of the docstring, without its common indentation.
    Returns:
        Lines of reStructuredText; the sections are still Google's.
    """
    written: list[str] = []
    for verbatim, block in groupby(_marked(lines), key=lambda marked: marked[0]):
        content = [line for _, line in block]
        written += [".. code-block:: text", "", *content, ""] if verbatim else _prose("\n".join(content)).split("\n")
    return written


def _marked(lines: list[str]) -> Iterator[tuple[bool, str]]:
    """Each line, and whether it belongs to an indented block outside the sections."""
    in_section = verbatim = False
    for before, line in zip(["", *lines], lines, strict=False):
        if line and not line.startswith(" "):
            in_section, verbatim = _SECTION.match(line) is not None, False
        elif line and not before and not in_section:
            verbatim = True
        yield verbatim, line


def _prose(text: str) -> str:
    text = "".join(_code(part) if odd else _plain(part) for odd, part in _parts(text))
    text = _RESULT.sub(r"\1: ", text)  # for the same reason
    return _SOURCE.sub(lambda found: "\n:Source: " + found[1].replace("\n", "\n    "), text)


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """What lies between backticks, and what does not."""
    for index, part in enumerate(text.split("`")):
        yield index % 2 == 1, part


def _plain(text: str) -> str:
    return _ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", _MARKUP.sub(r"\\\g<0>", text))


def _code(text: str) -> str:
    """A name may become a link by the default role; anything else is code to the letter."""
    return f"`{text}`" if _NAME.fullmatch(text) else f"``{text}``"

"""The README is the start page; what lies beside it in the docs is not written in it."""

from sphinx.application import Sphinx

CONTENTS = """
```{toctree}
:hidden:
:glob:

docs/gallery
docs/commands
docs/doctor
**/README
API <docs/api/kdkit>
```
"""


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)
    return {"parallel_read_safe": True}


def _add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == app.config.root_doc:
        source[0] += CONTENTS

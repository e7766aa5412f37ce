"""Sphinx's settings. The source folder is the repository itself, so that links between READMEs and notebooks hold."""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

from sphinx.application import Sphinx  # noqa: E402

import kdkit  # noqa: E402

project = "kdkit"
version = release = kdkit.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "extensions.docstrings",
    "extensions.doctor",
    "extensions.fields",
    "extensions.gallery",
    "extensions.names",
    "extensions.pages",
    "extensions.start",
]
root_doc = "README"
include_patterns = ["README.md", "docs/*.md", "docs/api/*.rst", "notebooks/*"]
include_patterns += ["data/demo/*.md", "kaggle/*.md", "kdkit/presets/*.md"]
exclude_patterns = [".*", "build", "dist", "runs", "**/runs", "**/.*"]
smartquotes = False

templates_path = ["templates"]

# API: every module, each name where it is defined.
autosummary_generate = False  # extensions/pages.py writes the pages
autodoc_default_options = {"members": True, "ignore-module-all": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of torch and transformers speak of other things
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"
default_role = "py:obj"  # `name` is a link where kdkit has it, and code where not
napoleon_numpy_docstring = False
napoleon_use_param = False  # one entry for "a, b: as for ..."; types stand in the signature

# Gallery: run once for each size, then taken from the cache until a notebook changes.
# After a change to kdkit that should show in them, delete build/docs/notebooks.
os.environ["KDKIT_BATCH"] = "1"  # pictures instead of sliders, which would need a kernel
SIZE = os.environ.get("KDKIT_SIZE", "default")
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "docs" / "notebooks" / SIZE.replace(" ", "-"))
nb_execution_in_temp = True
nb_execution_timeout = -1  # how long is the size's business
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "fieldlist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"kdkit {release}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_additional_pages = {"index": "index.html"}  # README.html is the start page; index.html leads to it
html_copy_source = False
html_show_copyright = False


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("sphinx-click-process-options", _plain_paths)


def _plain_paths(app: Sphinx, context: object, lines: list[str]) -> None:
    """Defaults that are paths, as they are typed."""
    lines[:] = [re.sub(r"PosixPath\('(.*?)'\)", r"\1", line) for line in lines]

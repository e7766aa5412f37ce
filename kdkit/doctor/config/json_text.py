"""JSON that is changed and stays as it is laid out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def is_json(source: str) -> bool:
    """Whether a file is JSON by its name."""
    return Path(source).suffix == ".json"


def indent_of(text: str) -> int | None:
    """Columns of the first line that stands in; None where none does."""
    found = re.search(r"^( +)[^\s#-]", text, re.MULTILINE)
    return len(found[1]) if found else None


def edited_json(text: str, edit: Callable[[Any], None]) -> str:
    """JSON after a change of its tree; order and indentation stay."""
    tree = json.loads(text)
    edit(tree)
    return json.dumps(tree, indent=indent_of(text), ensure_ascii=False) + "\n" * text.endswith("\n")

"""Fields of kdkit's pydantic models, which autodoc shows without their defaults and with pydantic's inner types."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import get_type_hints

from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

from extensions.docstrings import restructured
from extensions.names import modules

_AFTER_NAPOLEON = 600
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("autodoc-process-signature", _leave_out_signature)
    app.connect("autodoc-process-docstring", _append_fields, priority=_AFTER_NAPOLEON)
    return {"parallel_read_safe": True}


@cache
def models() -> dict[str, type[BaseModel]]:
    """Every model of kdkit by its full name."""
    return {
        f"{module.__name__}.{name}": value
        for module in map(import_module, modules("kdkit"))
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module.__name__
    }


def described(model: type[BaseModel]) -> Iterator[str]:
    """Each field of a model as reStructuredText: type, docstring, default and bounds."""
    types = get_type_hints(model)  # without what Annotated adds
    schema = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        part = types[name] if isinstance(types[name], type) and issubclass(types[name], BaseModel) else None
        meaning = field.description or (part.__doc__ if part else "") or ""
        shown = stringify_annotation(types[name], "smart", short_literals=True)
        yield from ("", f".. py:attribute:: {name}", f"   :type: {shown}", "")
        yield from (f"   {line}" for line in restructured([*meaning.splitlines(), "", _limits(schema[name])]))


def _limits(schema: Mapping[str, object]) -> str:
    """A field's default and bounds in words."""
    default = schema.get("default")
    if "default" not in schema:
        said = ["Required"]
    elif isinstance(default, Mapping) and default:
        said = ["Default: its own defaults"]
    else:
        said = [f"Default: `{default!r}`"]
    ranges = [schema, *schema.get("anyOf", [])]
    said += [f"{words} {bounds[key]:g}" for bounds in ranges for key, words in _BOUNDS.items() if key in bounds]
    return f"{'; '.join(said)}."


def _skip_fields(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    document = app.env.current_document
    model = models().get(f"{document.autodoc_module}.{document.autodoc_class}") if what == "class" else None
    return True if model is not None and name in model.model_fields else None


def _leave_out_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returned: str | None
) -> tuple[str, None] | None:
    return ("", None) if name in models() else None  # all fields again, in one line


def _append_fields(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if name in models():
        lines.extend(described(models()[name]))

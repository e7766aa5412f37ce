"""Fields of kdkit's pydantic models, which autodoc shows without their defaults and with pydantic's inner types."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any, Protocol, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
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
    """Each field of a model as reStructuredText: type, default, docstring, bounds."""
    types = get_type_hints(model)  # without what Annotated adds
    schemas = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        shown = stringify_annotation(types[name], "smart", short_literals=True)
        yield from ("", f".. py:attribute:: {name}", f"   :type: {shown}")
        if not field.is_required():
            yield f"   :value: {_default(field, schemas[name])}"
        meaning = f"{field.description or types[name].__doc__ or ''}{_bounds(schemas[name])}"
        yield from ("", *(f"   {line}" for line in restructured(meaning.splitlines())))


def _default(field: FieldInfo, schema: Mapping[str, object]) -> str:
    """As it would stand in a config file; a part of the config has its own."""
    value = schema.get("default", field.get_default(call_default_factory=True))
    return "{...}" if "$ref" in str(schema) and isinstance(value, Mapping) else repr(value)


def _bounds(schema: Mapping[str, Any]) -> str:
    """What the numbers of a field may be, in words."""
    ranges = [schema, *schema.get("anyOf", [])]
    said = [f"{words} {bounds[key]:g}" for bounds in ranges for key, words in _BOUNDS.items() if key in bounds]
    return f" Allowed: {', '.join(said)}." if said else ""


def _skip_fields(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    document = app.env.current_document
    model = models().get(f"{document.autodoc_module}.{document.autodoc_class}") if what == "class" else None
    return True if model is not None and name in model.model_fields else None


def _leave_out_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returned: str | None
) -> tuple[str, None] | None:
    """Of a model, which would be all its fields in one line; of a protocol, which nobody makes."""
    return ("", None) if name in models() or Protocol in getattr(obj, "__bases__", ()) else None


def _append_fields(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if name in models():
        lines.extend(described(models()[name]))

"""Where a name is documented: in the module that defines it. Packages that export it link there."""

import ast
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True}


def submodules(package: str) -> list[str]:
    """The public modules right below a module, by name; `__main__`, which would run when imported, is none."""
    places = vars(import_module(package)).get("__path__", [])
    return [f"{package}.{found.name}" for found in pkgutil.iter_modules(places) if not found.name.startswith("_")]


def modules(package: str) -> Iterator[str]:
    """Every public module of a package, itself first."""
    yield package
    for module in submodules(package):
        yield from modules(module)


@cache
def exports(module: str) -> dict[str, str]:
    """What a module exports by its `__all__` -> the full name of its definition; empty where there is none."""
    exporting = import_module(module)
    if "__all__" not in vars(exporting):
        return {}
    return {name: _definition(module, name) for name in exporting.__all__ if not name.startswith("__")}


def _definition(package: str, name: str) -> str:
    wanted = getattr(import_module(package), name)
    for module in (*modules(package), *modules("kdkit")):
        if name in _defined(module) and getattr(import_module(module), name) is wanted:
            return f"{module}.{name}"
    raise LookupError(f"{package}.__all__ has {name!r}, which no module defines")


@cache
def _defined(module: str) -> frozenset[str]:
    """Names that a module defines itself."""
    found = set()
    for node in ast.parse(inspect.getsource(import_module(module))).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                found.add(name)
    return frozenset(found)


@cache
def _aliases() -> dict[str, str]:
    """Exported names, bare and by the path they are imported from -> the full name of their definition."""
    found = {}
    for module in modules("kdkit"):
        for name, definition in exports(module).items():
            found |= {name: definition, f"{module}.{name}": definition}
    return found


def _resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element) -> nodes.Node | None:
    """Follow an exported name to its definition."""
    definition = _aliases().get(node["reftarget"].removesuffix("()"))
    if node["refdomain"] != "py" or definition is None:
        return None
    found = env.domains.python_domain.objects.get(definition)
    if found is None:
        return None
    target = nodes.reference("", "", shown, internal=True)
    target["refuri"] = f"{app.builder.get_relative_uri(node['refdoc'], found.docname)}#{found.node_id}"
    return target

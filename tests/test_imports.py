"""Who may import whom: downward, never in a circle, and nothing heavy where a command must start at once."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kdkit"

# Top to bottom. A name stands for the module and all below it; a package in SPLIT for its __init__ only.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("memory.command",),
    ("demo", "inspection", "kaggle", "notebook", "session", "widgets"),
    (
        "training",
        "training.answers",
        "training.caching",
        "training.card",
        "training.flow",
        "training.measure",
        "training.run",
        "training.stage",
        "training.sweep",
        "training.watching",
    ),
    ("memory.exact", "report", "training.trainer"),
    (
        "doctor",
        "evaluation",
        "training.arguments",
        "training.averaging",
        "training.cache_plan",
        "training.checkpoint",
        "training.controls",
        "training.early_stopping",
        "training.failures",
        "training.figures",
        "training.folder",
        "training.memory",
        "training.metrics",
        "training.model",
        "training.optimizer",
        "training.rollout",
        "training.progress",
        "training.rows",
        "training.sampling",
        "training.saving",
        "training.sharding",
        "training.state",
        "training.stopping",
        "training.tokenizers",
        "training.validation",
        "training.windows",
    ),
    ("memory", "teacher", "teacher.cache", "teacher.cross", "teacher.experts", "teacher.sources", "training.objective"),
    ("data", "data.batch", "data.encoding", "data.pairs", "loading", "losses"),
    (
        "attached",
        "config",
        "data.mapped",
        "data.rows",
        "data.sources",
        "data.spans",
        "data.templates",
        "data.vocabulary",
        "plots",
        "runtime",
        "schedules",
        "softdtw",
        "teacher.kept",
        "teacher.signal",
    ),
    ("_turns",),
    ("compiled", "cuda", "errors", "files"),
)
SPLIT = {"data", "teacher", "training"}

HEAVY = {"accelerate", "bitsandbytes", "datasets", "ipywidgets", "matplotlib", "pandas", "scipy", "torch"}
HEAVY |= {"numba", "transformers"}
LIGHT = ("attached", "errors", "schedules", "config", "runtime", "plots", "memory", "doctor", "cli")
LIGHT += ("session.packages", "session.place")  # a notebook calls them before anything is installed
COUNTING = ("memory.counting", "memory.exact", "memory.generation", "memory.stand_ins")  # run the step itself
TORCH_ONLY = ("compiled", "cuda", "losses", "softdtw", "teacher.kept", "teacher.signal", "_turns")
COMPILER = {"compiled": {"numba"}, "softdtw._kernels": {"numba"}}
COMPILER |= {module: {"llvmlite", "numba"} for module in ("softdtw._lanes", "softdtw._tiles", "_turns")}
PRESENTATION = {"inspection", "notebook", "plots", "widgets", "report"}


def module_name(path: Path) -> str:
    """kdkit/losses/__init__.py -> losses; the package itself -> the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def is_within(module: str, names: set[str] | tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def floor_of(module: str) -> int | None:
    """Index into FLOORS, None for a module that has no place there."""
    for floor, names in enumerate(FLOORS):
        if module in names or is_within(module, set(names) - SPLIT):
            return floor
    return None


def all_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    return ast.walk(tree)


def nodes_run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """All but bodies of functions and of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from nodes_run_at_import(node)


def imported_names(nodes: Iterator[ast.AST]) -> set[str]:
    """Absolute dotted names, `from a import b` as a.b."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def third_party(names: set[str]) -> set[str]:
    """Top-level packages that are neither kdkit's nor Python's."""
    return {name.partition(".")[0] for name in names} - {"kdkit"} - sys.stdlib_module_names


def own_modules(names: set[str], known: set[str]) -> set[str]:
    """The kdkit modules that the names lie in; the package itself, which holds only the map, is left out."""
    found = set()
    for name in names:
        top, _, inner = name.partition(".")
        if top == "kdkit":
            found.add(inner if inner in known else inner.rpartition(".")[0])
    return found - {""}


def imports_within_kdkit() -> dict[str, set[str]]:
    known = set(TREES)
    graph = {module: own_modules(imported_names(all_nodes(tree)), known) for module, tree in TREES.items()}
    return {module: targets - {module} for module, targets in graph.items() if module}


GRAPH = imports_within_kdkit()


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a module on a higher floor, as text."""
    return [
        f"{module} imports {target}, which stands above it"
        for module, targets in graph.items()
        for target in targets
        if (floor_of(target) or 0) < (floor_of(module) or 0)
    ]


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph.get(module, set())
    return seen - {start}


def modules_in(names: tuple[str, ...]) -> list[str]:
    return [module for module in TREES if is_within(module, names)]


def loaded_after_importing(modules: list[str]) -> dict[str, list[str]]:
    """For each module, imported in turn in a fresh process: which heavy packages are loaded by then."""
    code = (
        "import importlib, json, sys\n"
        f"heavy = {sorted(HEAVY)!r}\n"
        "found = {}\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    found[name] = [package for package in heavy if package in sys.modules]\n"
        "print(json.dumps(found))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


class TestFloors:
    def test_every_module_has_its_place(self):
        homeless = [module for module in GRAPH if floor_of(module) is None]
        assert not homeless, f"say on which floor of FLOORS these stand: {homeless}"

    def test_imports_go_downward(self):
        assert upward(GRAPH) == []

    def test_there_is_no_circle(self):
        try:
            graphlib.TopologicalSorter(GRAPH).prepare()
        except graphlib.CycleError as error:
            pytest.fail(f"import circle: {' <- '.join(error.args[1])}")

    def test_training_never_reaches_what_presents_it(self):
        reached = {m: reachable(GRAPH, m) for m in modules_in(("training",))}
        found = {module: {n for n in names if is_within(n, PRESENTATION)} for module, names in reached.items()}
        assert {module: names for module, names in found.items() if names} == {}

    def test_the_doctor_never_reaches_training(self):
        for module in modules_in(("doctor",)):
            assert not {name for name in reachable(GRAPH, module) if is_within(name, ("training",))}

    def test_kaggle_does_not_shadow_the_client_of_that_name(self):
        assert not (PACKAGE.parent / "kaggle" / "__init__.py").exists()


class TestThirdParty:
    @pytest.mark.parametrize("module", [module for module in modules_in(LIGHT) if module not in COUNTING])
    def test_light_modules_name_nothing_heavy_at_module_level(self, module):
        assert not third_party(imported_names(nodes_run_at_import(TREES[module]))) & HEAVY

    @pytest.mark.parametrize("module", modules_in(TORCH_ONLY))
    def test_losses_and_softdtw_know_torch_and_each_other_only(self, module):
        allowed = {"numpy", "torch"} | COMPILER.get(module, set())
        assert third_party(imported_names(all_nodes(TREES[module]))) <= allowed
        assert [target for target in GRAPH[module] if not is_within(target, TORCH_ONLY)] == []

    def test_softdtw_knows_no_losses_and_no_teacher(self):
        allowed = ("_turns", "compiled", "cuda", "softdtw")
        for module in modules_in(("softdtw",)):
            assert [target for target in GRAPH[module] if not is_within(target, allowed)] == []

    def test_importing_light_modules_loads_nothing_heavy(self):
        present = [f"kdkit.{name}" for name in LIGHT if name in TREES]
        assert loaded_after_importing(["kdkit", *present]) == {name: [] for name in ("kdkit", *present)}

    def test_importing_losses_and_softdtw_loads_torch_alone(self):
        found = loaded_after_importing(["kdkit.softdtw", "kdkit.losses"])
        assert found == {"kdkit.softdtw": ["torch"], "kdkit.losses": ["torch"]}


class TestReading:
    """The checks above can fail: each is shown a fault."""

    def test_an_upward_import_is_seen(self):
        assert upward({"losses.divergences": {"training.run"}}) != []
        assert upward({"training.run": {"losses.divergences"}}) == []

    def test_a_module_below_a_name_stands_on_its_floor(self):
        assert floor_of("losses.head_pass") == floor_of("losses")
        assert floor_of("data.rows") > floor_of("data.batch")
        assert floor_of("training.unheard_of") is None

    def test_imports_inside_functions_count_for_floors_but_not_for_weight(self):
        tree = ast.parse("def f():\n    import torch\n    from kdkit.training.run import x\n")
        assert imported_names(nodes_run_at_import(tree)) == set()
        assert imported_names(all_nodes(tree)) == {"torch", "kdkit.training.run.x"}

    @pytest.mark.parametrize(
        "source",
        ["import torch", "class A:\n    import torch.nn", "try:\n    from torch import nn\nexcept E:\n    pass"],
    )
    def test_what_runs_at_import_counts(self, source):
        assert third_party(imported_names(nodes_run_at_import(ast.parse(source)))) == {"torch"}

    def test_imports_for_type_checkers_weigh_nothing(self):
        tree = ast.parse("if TYPE_CHECKING:\n    import torch\n")
        assert imported_names(nodes_run_at_import(tree)) == set()

    def test_names_are_traced_to_their_module(self):
        known = {"losses", "losses.divergences", "errors"}
        names = {"kdkit.losses.LOSSES", "kdkit.losses.divergences", "kdkit.errors.UserError", "kdkit.__version__", "re"}
        assert own_modules(names, known) == {"losses", "losses.divergences", "errors"}

    def test_a_way_over_several_modules_is_found(self):
        assert reachable({"a": {"b"}, "b": {"c"}}, "a") == {"b", "c"}

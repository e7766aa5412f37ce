"""The docs: what is public says what it is, and the pages show it, with the notebooks and their pictures."""

import ast
import html
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kdkit.doctor import RUN_CHECKS
from kdkit.doctor.lessons import LESSONS

ROOT = Path(__file__).resolve().parent.parent
SPHINX = ("furo", "myst_nb", "sphinx", "sphinx_click")
needs_sphinx = pytest.mark.skipif(
    any(find_spec(name) is None for name in SPHINX),
    reason="docs/requirements.txt is not installed; `make docs` does that",
)
SECONDS_OF_A_BUILD = 1200


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "kdkit").rglob("*.py"))
    if path.stem != "__main__"
}


def exported(tree):
    """`__all__`, or nothing; the package's own is made of _HOMES."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List()):
                return [item.value for item in node.value.elts if isinstance(item, ast.Constant)]
    return []


def imported_from(tree, name):
    """The module that a module takes a name from, or None where it defines the name."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return node.module
    return None


def docstring_of(module, name):
    """Of a function, a class or a value, wherever the module has it from."""
    tree = TREES[module]
    home = imported_from(tree, name)
    if home is not None:
        return docstring_of(home, name)
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        match node:
            case ast.FunctionDef() | ast.ClassDef() if node.name == name:
                return ast.get_docstring(node)
            case ast.Assign(targets=[ast.Name(id=found)]) | ast.AnnAssign(target=ast.Name(id=found)) if found == name:
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                return after.value.value if is_text else None
    raise LookupError(f"{module} has no {name}")


PUBLIC = [(module, name) for module, tree in TREES.items() for name in exported(tree) if not name.startswith("__")]


class TestDocstrings:
    @pytest.mark.parametrize("module", TREES)
    def test_every_module_has_one(self, module):
        assert (ast.get_docstring(TREES[module]) or "").strip()

    @pytest.mark.parametrize(("module", "name"), PUBLIC)
    def test_every_exported_name_has_one_that_opens_with_a_summary(self, module, name):
        """LOSSES had none: its line in the reference was the docstring of dict."""
        summary = (docstring_of(module, name) or "").split("\n\n")[0]
        assert re.search(r"\S.*[.:]$", summary, re.DOTALL), f"{module}.{name}: {summary!r}"

    def test_a_value_without_one_is_seen(self, monkeypatch):
        monkeypatch.setitem(TREES, "here", ast.parse('A = 1\nB = 2\n"""Two."""\nfrom kdkit.losses import jsd'))
        assert docstring_of("here", "A") is None
        assert docstring_of("here", "B") == "Two."
        assert docstring_of("here", "jsd").startswith("Generalised")


class TestLinks:
    def test_every_page_that_the_readme_links_is_built(self):
        """kaggle/README.md was not: the docs failed at their last step."""
        lines = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8").splitlines()
        patterns = " ".join(line for line in lines if line.startswith("include_patterns"))
        linked = re.findall(r"\]\(([\w./]+\.(?:md|ipynb))\)", (ROOT / "README.md").read_text(encoding="utf-8"))
        assert "kaggle/README.md" in linked
        for page in linked:
            assert any(Path(page).match(pattern) for pattern in re.findall(r'"([^"]+)"', patterns)), page


@pytest.fixture
def restructured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from extensions.docstrings import restructured

    return lambda text: "\n".join(restructured(text.split("\n")))


@needs_sphinx
class TestRestructured:
    """Docstrings are plain text: nothing in them is reStructuredText by accident."""

    def test_a_name_is_in_the_default_role_and_other_code_is_literal(self, restructured):
        assert restructured("`soft_dtw` with `{start: 0}`, `--set a_=*`") == (
            "`soft_dtw` with ``{start: 0}``, ``--set a_=*``"
        )

    def test_what_would_be_markup_is_escaped(self, restructured):
        assert restructured("|p - q| * b, a_ and a_b, 2**3") == r"\|p - q\| \* b, a\_ and a_b, 2\*\*3"

    def test_an_indented_block_keeps_its_lines(self, restructured):
        made = restructured("Cells:\n\n    a = *b*\n      `c`\n\nThen more.")
        assert made == "Cells:\n\n.. code-block:: text\n\n    a = *b*\n      `c`\n\n\nThen more."

    def test_sections_are_left_to_napoleon_and_a_result_has_no_type_before_its_colon(self, restructured):
        made = restructured("Sum.\n\nArgs:\n    x: (B, T) float.\nReturns:\n    units: (B, U); lengths: (B,).")
        assert made == "Sum.\n\nArgs:\n    x: (B, T) float.\nReturns:\n    : units: (B, U); lengths: (B,)."

    def test_a_source_is_a_field_with_a_link(self, restructured):
        made = restructured("Sum.\n\nSource: Blondel 2021, arXiv:2010.08354. Differs: in\none thing.")
        link = "`arXiv:2010.08354 <https://arxiv.org/abs/2010.08354>`__"
        assert made == f"Sum.\n\n\n:Source: Blondel 2021, {link}. Differs: in\n    one thing."


@needs_sphinx
class TestDoctorPage:
    """The end of docs/doctor.md."""

    @pytest.fixture
    def page(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "docs")
        from extensions import doctor

        return doctor

    def test_every_check_has_a_place_that_the_lessons_link_to(self, page):
        text = "\n".join(page.written())
        for check in (check for checks in page.CHECKS.values() for check in checks):
            assert text.count(f"({check.code.lower()})=\n### {check.code}: ") == 1
        assert set(re.findall(r"\]\(#(\w+)\)", text)) <= set(re.findall(r"^\((\w+)\)=$", text, re.MULTILINE))

    def test_plain_text_is_no_markup_but_code_is_code_and_a_paper_is_a_link(self, page, monkeypatch):
        look = page.RUN_CHECKS[0].look
        made_up = page.Check("KD299", "a_*b*", "`a_b` < [c]", "cause", "fix", "X 2024, arXiv:2402.03898", look)
        monkeypatch.setattr(page, "CHECKS", {"Made up": [made_up]})
        text = "\n".join(page.written())
        assert r"### KD299: a\_\*b\*" in text
        assert r":Symptom: `a_b` \< \[c\]" in text
        assert ":Source: X 2024, [arXiv:2402.03898](https://arxiv.org/abs/2402.03898)" in text


def build(root):
    """Build the docs of a copy; returns the process."""
    home = root.parent / "home"
    home.mkdir(exist_ok=True)
    places = {name: str(home) for name in ("HOME", "IPYTHONDIR", "MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME")}
    environment = {**os.environ, **places, "KDKIT_SIZE": "smoke", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--conf-dir", "docs"]
    return subprocess.run(
        [*command, "--doctree-dir", "build/docs/doctrees", ".", "build/docs/html"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS_OF_A_BUILD,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a copy whose docs are built, so that nothing is left here."""
    root = tmp_path_factory.mktemp("docs") / "kdkit"
    leftovers = shutil.ignore_patterns("__pycache__", "runs", "api", ".*")
    for name in ("docs", "kaggle", "kdkit", "notebooks", "data"):
        shutil.copytree(ROOT / name, root / name, ignore=leftovers)
    shutil.copy(ROOT / "README.md", root)
    done = build(root)
    assert done.returncode == 0, done.stderr[-4000:]
    yield root
    shutil.rmtree(root.parent)


def text_of(page):
    """What a reader sees of a page, on one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


@needs_sphinx
@pytest.mark.slow
class TestPages:
    def test_every_public_module_has_one(self, built):
        pages = {path.stem for path in (built / "build/docs/html/docs/api").glob("*.html")}
        assert pages == set(TREES)

    @pytest.mark.parametrize(
        ("module", "name", "said"),
        [
            ("losses.divergences", "forward_kl", "Forward Kullback-Leibler divergence KL(p‖q), in nats."),
            ("losses.divergences", "LOSSES", "Every divergence by its name in a config."),
            ("losses.head_pass", "head_pass", "Sum of all terms over the vocabulary"),
            ("softdtw.api", "soft_dtw", "cost – (B, N, M) float; gradient flows"),
            ("losses.alignment", "AlignmentResult.counted", "(B,) bool: both sides have at least one unit."),
            ("config.objective", "DtwConfig.gamma", "gamma: Schedule = 0.1"),
            ("config.fields", "DataConfig.max_length", "DistiLLM: 512. Allowed: at least 1."),
            ("config.fields", "DistillConfig.teacher", "teacher: TeacherConfig"),
        ],
    )
    def test_they_show_what_the_docstrings_say(self, built, module, name, said):
        page = built / f"build/docs/html/docs/api/kdkit.{module}.html"
        assert f'id="kdkit.{module}.{name}"' in page.read_text(encoding="utf-8")
        assert said in text_of(page)

    def test_a_name_links_to_where_it_is_defined(self, built):
        page = (built / "build/docs/html/docs/api/kdkit.html").read_text(encoding="utf-8")
        assert 'href="kdkit.losses.head_pass.html#kdkit.losses.head_pass.head_pass"' in page

    def test_every_command_is_there(self, built):
        commands = text_of(built / "build/docs/html/docs/commands.html")
        assert all(f"kdkit {name}" in commands for name in ("demo", "distill", "evaluate", "cache", "sweep"))

    def test_every_check_and_lesson_of_the_doctor_is_there(self, built):
        page = text_of(built / "build/docs/html/docs/doctor.html")
        assert all(f"{check.code}: {check.name}" in page for check in RUN_CHECKS)
        assert all(html.escape(lesson.said) in page for lesson in LESSONS)

    def test_index_leads_to_the_readme(self, built):
        pages = built / "build/docs/html"
        (target,) = re.findall(r"url=([\w.]+)", (pages / "index.html").read_text(encoding="utf-8"))
        assert "Two commands" in text_of(pages / target)


@needs_sphinx
@pytest.mark.slow
class TestGallery:
    def test_every_notebook_is_there_with_a_picture(self, built):
        gallery = built / "build/docs/html/docs/gallery.html"
        shown = dict(re.findall(r'href="\.\./(notebooks/\w+)\.html"><img[^>]* src="([^"]+)"', gallery.read_text()))
        assert set(shown) == {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
        assert all((gallery.parent / picture).read_bytes().startswith(b"\x89PNG") for picture in shown.values())

    def test_running_them_leaves_nothing_beside_them(self, built):
        there = {path.name for path in (ROOT / "notebooks").glob("*.*") if not path.name.startswith(".")}
        assert {path.name for path in (built / "notebooks").iterdir()} == there

    def test_a_notebook_that_fails_fails_the_build_and_the_others_do_not_run_again(self, built):
        notebooks = sorted((built / "notebooks").glob("*.ipynb"))
        for path in notebooks:
            path.touch()
        failing = built / "notebooks" / "99_fails.ipynb"
        text = re.sub(r'"import importlib\\n"', '"raise RuntimeError(1)\\\\n"', notebooks[0].read_text(), count=1)
        failing.write_text(text)
        done = build(built)
        failing.unlink()
        assert done.returncode != 0
        assert "RuntimeError" in done.stderr + done.stdout
        assert all(f"{path}: Using cached notebook" in done.stdout for path in notebooks)

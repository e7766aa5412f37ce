"""What the README claims to be there is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_linked_file_exists():
    linked = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert linked
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_its_tree_is_the_repository():
    tree = TEXT[TEXT.index("## The tree") :].split("```")[1]
    folders = re.findall(r"^(?:  )?([a-z_]+/)", tree, flags=re.MULTILINE)
    places = [folder for folder in folders if folder not in {"data/"}]
    missing = [p for p in places if not (ROOT / p).is_dir() and not (ROOT / "kdkit" / p).is_dir()]
    assert missing == []


def test_the_three_lines_name_what_there_is():
    from kdkit import load_config, run_distillation

    code = re.search(r"```python\n(.*?)```", TEXT, flags=re.DOTALL).group(1)
    names = {"load_config": load_config, "run_distillation": lambda config, folder: RESULT}
    lines = [line for line in code.splitlines() if not line.startswith("from")]
    exec("\n".join(lines), names)
    assert names["config"].objective.dtw.weight.start > 0
    assert run_distillation.__name__ == "run_distillation"


class RESULT:
    evaluations = {"student": {"rouge_l": 1.0}}  # noqa: RUF012


def test_no_placeholder_is_left():
    assert not re.search(r"^[A-Z]{4,}$", TEXT, flags=re.MULTILINE)

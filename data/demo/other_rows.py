"""The comparison of `compare_seeds.py` on rows that are not the demo's: a tokenizer, a teacher to train, a student.

    python data/demo/other_rows.py ROWS runs/other
    kdkit distill runs/other/teacher.yaml --output runs/other/teacher
    kdkit cache runs/other/base.yaml --generate --set data.train_rows=null --output runs/other/answers.jsonl
    python data/demo/compare_seeds.py runs/other/seeds --base runs/other/base.yaml --answers runs/other/answers.jsonl

ROWS is what the names of three JSONL files with Alpaca columns begin with: rows/t0_ stands for rows/t0_train.jsonl,
rows/t0_validation.jsonl and rows/t0_test.jsonl. The models are the demo's with a vocabulary of their own, trained from
nothing: what they learn of natural text is little.
"""

from pathlib import Path

import click
import yaml
from make_tokenizer import train_bpe
from transformers import AutoConfig

from kdkit.config import load_config

HERE = Path(__file__).parent
STUDENT_ROWS = 500


@click.command(help=__doc__)
@click.argument("rows")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--vocabulary", default=2048, show_default=True, help="Entries of the tokenizer.")
@click.option("--teacher-steps", default=1200, show_default=True, help="Optimizer steps of the teacher.")
def main(rows: str, output: Path, vocabulary: int, teacher_steps: int) -> None:
    """Write the tokenizer, both models' configs and the two runs."""
    splits = {split: _file_of(rows, split) for split in ("train", "validation", "test")}
    tokenizer = train_bpe(Path(splits["train"]), vocabulary)
    for name in ("teacher", "student"):
        config = AutoConfig.from_pretrained(HERE / name, vocab_size=len(tokenizer))
        folder = output / "models" / name
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    data = {**splits, "max_length": 256, "max_prompt_length": 192}
    student = {"path": str(output / "models" / "student"), "from_scratch": True}
    base = {
        "preset": "demo",
        "teacher": {"path": str(output / "teacher" / "model")},
        "student": student,
        "data": {**data, "train_rows": STUDENT_ROWS},
    }
    teacher = load_config(HERE / "teacher.yaml").model_dump(mode="json")
    teacher["teacher"]["path"] = teacher["student"]["path"] = str(output / "models" / "teacher")
    teacher["data"] |= data
    teacher["optim"]["max_steps"] = teacher_steps
    for name, tree in {"base": base, "teacher": teacher}.items():
        (output / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def _file_of(rows: str, split: str) -> str:
    """The file of a split."""
    path = Path(f"{rows}{split}.jsonl")
    if not path.is_file():
        raise click.UsageError(f"there is no {path}; ROWS is what the three names begin with, for instance rows/t0_")
    return str(path.resolve())


if __name__ == "__main__":
    main()

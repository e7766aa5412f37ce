"""Train the embedded teacher and put it in its place, in half precision, with a record of how well it does.

    python data/demo/train_teacher.py [--output runs/teacher] [--resume]

About ten minutes on two cores. `teacher.yaml` says how; `teacher/training.json` what came out.
"""

import json
from importlib.metadata import version
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM

from kdkit.config import load_config
from kdkit.training.run import run_distillation

HERE = Path(__file__).parent
FIGURES = ("rouge_l", "exact_match", "perplexity", "mean_tokens", "ended_fraction", "num_rows")


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/teacher"), show_default=True)
@click.option("--resume", is_flag=True)
def main(output: Path, resume: bool) -> None:
    """Train, round, save, record."""
    config = load_config(HERE / "teacher.yaml")
    result = run_distillation(config, output, resume=resume)
    model = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float16)
    model.save_pretrained(HERE / "teacher")
    figures = result.evaluations["student"]
    record = {
        "command": "python data/demo/train_teacher.py",
        "test rows": {name: round(figures[name], 3) for name in FIGURES},
        "optimizer steps": config.optim.max_steps,
        "parameters": model.num_parameters(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    (HERE / "teacher" / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

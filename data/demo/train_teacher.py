"""Train an embedded teacher and put it in its place, in half precision, with a record of how well it does.

    python data/demo/train_teacher.py [teacher | moe_teacher] [--output runs/teacher] [--resume]

About ten minutes on two cores. `teacher.yaml` and `moe_teacher.yaml` say how; `training.json` beside the weights what
came out, for an MoE with the share of the tokens' choices that each expert of a layer got.
"""

import json
from importlib.metadata import version
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM

from kdkit.config import load_config
from kdkit.data.rows import load_rows
from kdkit.loading import load_model, load_tokenizer
from kdkit.training.run import run_distillation

HERE = Path(__file__).parent
FIGURES = ("rouge_l", "exact_match", "perplexity", "mean_tokens", "ended_fraction", "num_rows")


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(["teacher", "moe_teacher"]), default="teacher")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run; default: runs/NAME.")
@click.option("--resume", is_flag=True)
def main(name: str, output: Path | None, resume: bool) -> None:
    """Train, round, save, record."""
    config = load_config(HERE / f"{name}.yaml")
    result = run_distillation(config, output or Path("runs") / name, resume=resume)
    model = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float16)
    model.save_pretrained(HERE / name)
    figures = result.evaluations["student"]
    record = {
        "command": f"python data/demo/train_teacher.py {name}",
        "test rows": {figure: round(figures[figure], 3) for figure in FIGURES},
        "optimizer steps": config.optim.max_steps,
        "parameters": model.num_parameters(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    if name == "moe_teacher":
        shares = expert_shares(HERE / name, HERE / "validation.jsonl")
        record["expert shares on validation rows"] = {f"layer {index}": layer for index, layer in enumerate(shares)}
    (HERE / name / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(record, indent=1))


def expert_shares(folder: Path, rows: Path) -> list[list[float]]:
    """Per layer, the share of the tokens' choices that each expert gets; over prompts and first answers."""
    model = load_model(folder, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(folder)
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for row in load_rows(rows, template="plain").dataset:
        ids = tokenizer(row["prompt"] + row["references"][0], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            layers = model(ids, output_router_logits=True).router_logits  # of each layer (tokens, experts)
        chosen = torch.stack(layers).topk(config.num_experts_per_tok).indices  # (layers, tokens, experts per token)
        counts += torch.stack([layer.flatten().bincount(minlength=config.num_experts) for layer in chosen])
    return [[round(share, 3) for share in layer] for layer in (counts / counts.sum(1, keepdim=True)).tolist()]


if __name__ == "__main__":
    main()

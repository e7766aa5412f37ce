"""The model card of a finished student: where it comes from and what was measured, in the hub's own form."""

from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kdkit import __version__
from kdkit.config import DistillConfig

METRICS = {"rouge_l": "ROUGE-L", "exact_match": "exact match", "perplexity": "perplexity"}


def model_card(config: DistillConfig, models: Mapping[str, Mapping[str, float | None]], *, rows_sha256: str) -> str:
    """The card as text, with front matter that the hub reads.

    Args:
        config: the run.
        models: figures of `student` and of what it was measured beside.
        rows_sha256: which rows they were measured on, by content.
    Returns:
        Markdown.
    """
    rows = config.data.test or config.data.validation
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=rows,
            dataset_name=rows,
            metric_type=name,
            metric_name=label,
            metric_value=models["student"][name],
        )
        for name, label in METRICS.items()
    ]
    data = ModelCardData(
        model_name="student", library_name="transformers", tags=["kdkit", "distillation"], eval_results=results
    )
    table = ["| model | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for model, figures in models.items():
        table.append(f"| {model} | " + " | ".join(_with_interval(figures, name) for name in METRICS) + " |")
    start = f"random weights of the architecture in {config.student.path}" if config.student.from_scratch else ""
    lines = [
        f"# Student of {config.teacher.path}",
        f"Distilled by kdkit {__version__} from {config.teacher.path} into {start or config.student.path}, in the "
        f"stages {', '.join(config.stages)}, with seed {config.seed}.",
        "\n".join(table),
        f"In brackets the 95 % interval over rows. Measured on {rows} (sha256 {rows_sha256[:12]}). Every setting is in "
        "config.yaml of the run.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"))


def _with_interval(figures: Mapping[str, float | None], name: str) -> str:
    """A figure with its interval where it has both."""
    value, low, high = (figures.get(name + end) for end in ("", "_low", "_high"))
    if value is None:
        return "not finite"
    return f"{value:.2f}" + ("" if low is None or high is None else f" ({low:.2f}–{high:.2f})")

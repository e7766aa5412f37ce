"""Measuring a model on rows, as `kdkit evaluate` does."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from kdkit.data.rows import load_rows
from kdkit.evaluation import GenerationSettings, evaluate_model, paired_difference
from kdkit.loading import load_model, load_tokenizer
from kdkit.runtime import preflight


def measure_model(
    path: str,
    data: str | Path,
    settings: GenerationSettings,
    *,
    template: str = "alpaca",
    limit: int | None = None,
    seeds: int | None = None,
) -> dict[str, float]:
    """Figures of one model on rows with answers.

    Args:
        path: folder or hub name of the model.
        data: rows, for `load_rows`.
        settings: of the generation.
        template: how prompts are written.
        limit: rows to use; None: all.
        seeds: sample at temperature 1 this often, with seeds 10, 20, ... as DistiLLM does, and average; intervals are
            then over seeds. None: one measurement with `settings`.
    Returns:
        As `Evaluation.summary`; with seeds also their number, `seeds`.
    """
    tokenizer = load_tokenizer(path)
    rows = load_rows(data, template=template, limit=limit, tokenizer=tokenizer)
    model = load_model(path, dtype=torch.float32, device=preflight().device)
    if seeds is None:
        return evaluate_model(model, tokenizer, rows, settings).summary()
    summaries = []
    for seed in range(10, 10 * (seeds + 1), 10):
        print(f"{path}: sampling with seed {seed}", file=sys.stderr)
        sampled = replace(settings, sampling_temperature=1.0, seed=seed)
        summaries.append(evaluate_model(model, tokenizer, rows, sampled).summary())
    return _over_seeds(summaries)


def _over_seeds(summaries: list[dict[str, float]]) -> dict[str, float]:
    """Means over seeds; the intervals of sampled figures are over seeds too, where there are several."""
    figures = {name: sum(s[name] for s in summaries) / len(summaries) for name in summaries[0]}
    for name in ("rouge_l", "exact_match"):
        values = [summary[name] for summary in summaries]
        if len(values) > 1:
            interval = paired_difference(values, [0.0] * len(values))
            figures |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return figures | {"seeds": len(summaries)}

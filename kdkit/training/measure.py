"""Measuring a model on rows, as `kdkit evaluate` does."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from kdkit.data.rows import load_rows
from kdkit.evaluation import Evaluation, GenerationSettings, evaluate_model, paired_difference
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
) -> dict[str, float | None]:
    """Figures of one model on rows with answers; says on stderr which rows were left out or cut.

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
    if rows.report.dropped:
        print(f"{path}: {rows.report}", file=sys.stderr)
    if seeds is None:
        evaluation = evaluate_model(model, tokenizer, rows, settings)
        _say_dropped(path, evaluation)
        return evaluation.summary()
    evaluations = []
    for seed in range(10, 10 * (seeds + 1), 10):
        print(f"{path}: sampling with seed {seed}", file=sys.stderr)
        sampled = replace(settings, sampling_temperature=1.0, seed=seed)
        evaluations.append(evaluate_model(model, tokenizer, rows, sampled))
    _say_dropped(path, evaluations[0])
    return _over_seeds([evaluation.summary() for evaluation in evaluations])


def _say_dropped(path: str, evaluation: Evaluation) -> None:
    if evaluation.dropped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in evaluation.dropped.items())
        num_given = len(evaluation.predictions)
        print(f"{path}: {evaluation.num_rows} of {num_given} rows measured ({reasons})", file=sys.stderr)


def _over_seeds(summaries: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Means over seeds; the intervals of sampled figures are over seeds too, where there are several."""
    columns = {name: [x for s in summaries if (x := s[name]) is not None] for name in summaries[0]}
    figures = {
        name: sum(values) / len(values) if len(values) == len(summaries) else None for name, values in columns.items()
    }
    for name in ("rouge_l", "exact_match"):
        values = columns[name]
        if len(values) > 1:
            interval = paired_difference(values, [0.0] * len(values))
            figures |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return figures | {"seeds": len(summaries)}

"""Figures from plain rows: each answers one question, and its title says the answer.

Rows are those of metrics.jsonl or of a comparison; no model and no trainer is needed. Figures are made without pyplot,
so that none stays open.
"""

from kdkit.plots.alignment import plot_alignment
from kdkit.plots.axes import METRICS, Row, figure_bytes
from kdkit.plots.comparison import comparison_finding, intervals_over, plot_comparison
from kdkit.plots.curriculum import ablation_finding, plot_ablation, plot_gradients, plot_schedule
from kdkit.plots.experts import plot_expert_shares, plot_word_experts
from kdkit.plots.live import plot_live
from kdkit.plots.memory import CardBars, memory_finding, plot_memory
from kdkit.plots.rollout import plot_rollout
from kdkit.plots.spans import SpanView, plot_spans
from kdkit.plots.sweep import plot_sweep
from kdkit.plots.temperature import TokenView, plot_temperature
from kdkit.plots.terms import plot_terms
from kdkit.plots.threshold import plot_threshold
from kdkit.plots.training import plot_evaluations, plot_training
from kdkit.plots.weights import plot_weights

__all__ = [
    "METRICS",
    "CardBars",
    "Row",
    "SpanView",
    "TokenView",
    "ablation_finding",
    "comparison_finding",
    "figure_bytes",
    "intervals_over",
    "memory_finding",
    "plot_ablation",
    "plot_alignment",
    "plot_comparison",
    "plot_evaluations",
    "plot_expert_shares",
    "plot_gradients",
    "plot_live",
    "plot_memory",
    "plot_rollout",
    "plot_schedule",
    "plot_spans",
    "plot_sweep",
    "plot_temperature",
    "plot_terms",
    "plot_threshold",
    "plot_training",
    "plot_weights",
    "plot_word_experts",
]

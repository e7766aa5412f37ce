"""kdkit: distil a large language model into a small one on one modest GPU.

The map, in the order in which a run uses it:

    config      every knob once; presets and YAML files become one validated `DistillConfig`
    data        rows from files or hubs -> tokenised rows -> batches with labels, positions and word units
    teacher     what a loss may know of the teacher, live or cached, behind one interface
    losses      divergences, the chunked head pass, the alignment of hidden states
    softdtw     soft dynamic time warping: values, gradients, expected alignments
    cuda        kernels of our own for a card, compiled there;  compiled: loops for a CPU
    training    objective, model, trainer, checkpoints, and `run`, which strings stages together;
                `rollout`, the student's own text; `sweep`, one config over values and seeds
    memory      bytes by part before anything is loaded, counted or estimated; what fits; hours
    evaluation  ROUGE-L, exact match, perplexity, with confidence intervals
    doctor      what is wrong with a config, and with a run by its log; fixes
    plots       figures from plain rows;  report: one HTML page per run
    inspection  a finished run's models on one prompt, and a teacher's dtype, experts and tokenizer before one
    notebook    what notebooks call
    widgets     sliders over the above, with a static figure where nobody can move one
    runtime     what this machine can do;  loading: models and tokenizers, dtype always explicit
    kaggle      from a checkout to its notebooks on Kaggle

Importing `kdkit` loads none of them: the names below are resolved on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "DistillConfig": "kdkit.config",
    "load_config": "kdkit.config",
    "run_distillation": "kdkit.training.run",
    "DistillTrainer": "kdkit.training.trainer",
    "DistillModel": "kdkit.training.model",
    "divergence": "kdkit.losses",
    "head_pass": "kdkit.losses",
    "linear_divergence": "kdkit.losses",
    "LOSSES": "kdkit.losses",
    "soft_dtw": "kdkit.softdtw",
    "soft_dtw_divergence": "kdkit.softdtw",
    "expected_alignment": "kdkit.softdtw",
    "load_rows": "kdkit.data",
    "evaluate_model": "kdkit.evaluation",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    """Import a public name from its module the first time it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kdkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

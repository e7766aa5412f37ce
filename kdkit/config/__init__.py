"""Every knob of a run, once: `fields` says what exists, `reading` makes it of presets, files, `--set`."""

from kdkit.config.fields import (
    AdaptiveBandConfig,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    DtwConfig,
    EarlyStoppingConfig,
    EmaConfig,
    EvaluationConfig,
    KdConfig,
    LmConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
)
from kdkit.config.reading import demo_folder, dump_config, list_presets, load_config
from kdkit.config.rollout import CollapseConfig, GateConfig, GuardConfig, RolloutConfig

__all__ = [
    "AdaptiveBandConfig",
    "CheckpointConfig",
    "CollapseConfig",
    "DataConfig",
    "DistillConfig",
    "DtwConfig",
    "EarlyStoppingConfig",
    "EmaConfig",
    "EvaluationConfig",
    "GateConfig",
    "GuardConfig",
    "KdConfig",
    "LmConfig",
    "LoggingConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RolloutConfig",
    "StudentConfig",
    "TeacherConfig",
    "demo_folder",
    "dump_config",
    "list_presets",
    "load_config",
]

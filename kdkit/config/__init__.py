"""Every knob of a run, once: `fields` says what exists, `reading` makes it of presets, files, `--set`."""

from kdkit.config.fields import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
)
from kdkit.config.objective import (
    AdaptiveBandConfig,
    AttentionConfig,
    ContrastiveConfig,
    DtwConfig,
    HiddenConfig,
    KdConfig,
    LayerwiseConfig,
    LmConfig,
    ObjectiveConfig,
    RoutingConfig,
    SpanConfig,
)
from kdkit.config.reading import demo_folder, dump_config, list_presets, load_config
from kdkit.config.rollout import CollapseConfig, GateConfig, GuardConfig, RolloutConfig

__all__ = [
    "AdaptiveBandConfig",
    "AttentionConfig",
    "CheckpointConfig",
    "CollapseConfig",
    "ContrastiveConfig",
    "DataConfig",
    "DistillConfig",
    "DtwConfig",
    "EvaluationConfig",
    "GateConfig",
    "GuardConfig",
    "HiddenConfig",
    "KdConfig",
    "LayerwiseConfig",
    "LmConfig",
    "LoggingConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RolloutConfig",
    "RoutingConfig",
    "SpanConfig",
    "StudentConfig",
    "TeacherConfig",
    "demo_folder",
    "dump_config",
    "list_presets",
    "load_config",
]

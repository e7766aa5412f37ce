"""What a path is that the doctor is pointed at: a config, or what a run left."""

import json
from pathlib import Path

from kdkit.errors import UserError

_CONFIG_SUFFIXES = (".yaml", ".yml", ".sh")


def is_config(target: str) -> bool:
    """Whether it is a config or a preset's name, rather than a run's folder or log.

    Raises:
        UserError: it is nothing.
    """
    path = Path(target)
    if path.is_dir():
        return False
    if path.is_file():
        return path.suffix in _CONFIG_SUFFIXES or (path.suffix == ".json" and not _is_trainer_state(path))
    from kdkit.config import list_presets

    if target in list_presets():
        return True
    raise UserError(
        f"there is nothing at {target}, and no preset is called so. Give a config, a run's folder, a metrics.jsonl, a "
        f"trainer_state.json, a text log, or one of the presets {', '.join(list_presets())}"
    )


def _is_trainer_state(path: Path) -> bool:
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return path.name == "trainer_state.json"
    return not isinstance(tree, dict) or "log_history" in tree

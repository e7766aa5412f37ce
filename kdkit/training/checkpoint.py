"""Checkpoints that are whole or not there at all.

A checkpoint is written into a staging folder, sealed with a list of its files and their sizes, and renamed. A folder
without a seal, or whose files do not match it, does not count: resuming takes the newest one that does.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from kdkit.errors import RunFailed

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
SEAL = "complete.json"
STAGING = ".staging"


def seal(folder: Path) -> None:
    """Write the list of files and sizes that makes a folder count as whole; everything is on disk afterwards."""
    sizes = {name: (folder / name).stat().st_size for name in _file_names(folder)}
    write_text(folder / SEAL, json.dumps(sizes, indent=1))
    for name in sizes:
        _flush_to_disk(folder / name)


def is_whole(folder: Path) -> bool:
    """Whether a folder is sealed and every sealed file still has its size."""
    try:
        sizes = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def publish(staged: Path, final: Path) -> None:
    """Seal a staged folder and move it to its place in one step.

    Args:
        staged: folder with everything in it, on the same file system as `final`.
        final: where it belongs; a leftover that is not whole is replaced.
    """
    seal(staged)
    if final.exists():
        shutil.rmtree(final)
    os.replace(staged, final)
    _flush_to_disk(final.parent)


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps in a folder, or None; damaged ones are named in a warning."""
    for checkpoint in reversed(_checkpoints(folder)):
        if is_whole(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete or damaged and is left out", checkpoint)
    return None


def rotate(folder: Path, *, keep: int) -> None:
    """Delete all but the `keep` newest whole checkpoints, and whatever is not whole."""
    whole = [checkpoint for checkpoint in _checkpoints(folder) if is_whole(checkpoint)]
    kept = set(whole[-keep:])
    for checkpoint in _checkpoints(folder):
        if checkpoint not in kept:
            shutil.rmtree(checkpoint)


def clear_staging(folder: Path) -> None:
    """Remove what an interrupted save left behind."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Refuse to start writing what will not fit.

    Args:
        folder: where it will be written.
        needed_bytes: estimate of what will be written.
    Raises:
        RunFailed: there is less room on that disk.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise RunFailed(
            f"a checkpoint needs about {needed_bytes / 2**20:.0f} MiB and {folder} has {free_bytes / 2**20:.0f} MiB "
            "free. Nothing was written and the previous checkpoint is kept: make room, then run again with --resume"
        )


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by number of steps, whole or not."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def _file_names(folder: Path) -> list[str]:
    """Names of the files under a folder, relative to it, without the seal."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return sorted(str(path.relative_to(folder)) for path in files)


def _flush_to_disk(path: Path) -> None:
    """Make the file system write a file or folder out."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

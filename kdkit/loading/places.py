"""A folder or a hub name: what it is, whether it can be reached, and what to say when it cannot."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from kdkit.attached import find_model
from kdkit.errors import UserError
from kdkit.runtime import hub_answers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a model or tokenizer is to be read from."""

    name: str
    """Folder, file or hub name, as `from_pretrained` takes it."""
    revision: str | None
    """Branch, tag or commit on the hub."""
    local_files_only: bool
    """True for a folder, and for a hub name when the hub is out of reach: then only its cache is read."""
    is_folder: bool

    def read_arguments(self) -> dict[str, str | bool | None]:
        """Keyword arguments for `from_pretrained`."""
        if self.is_folder:
            return {"local_files_only": True}
        return {"local_files_only": self.local_files_only, "revision": self.revision or "main"}


def locate(path: str | Path, *, revision: str | None = None) -> Place:
    """Find out whether `path` is a folder or file here or a hub name, without reading it.

    Where the hub is out of reach, a hub name stands for the model of that name among what is attached to the notebook.

    Raises:
        UserError: it is written like a path and does not exist; or a revision was asked of a local folder.
    """
    name = str(path)
    local = Path(name).expanduser()
    if local.exists():
        if revision is not None:
            raise UserError(f"revision {revision!r} was given, but {name} is a local folder: leave revision out")
        return Place(str(local), None, local_files_only=True, is_folder=True)
    if isinstance(path, Path) or _is_written_like_a_path(name):
        raise UserError(f"{name} does not exist; give the folder of a model, or a hub name such as openai/gpt2")
    if hub_answers():
        return Place(name, revision, local_files_only=False, is_folder=False)
    attached = find_model(name)
    if attached is not None:
        logger.warning("the hub is not reachable: %s is read from %s", name, attached)
        return Place(str(attached), None, local_files_only=True, is_folder=True)
    logger.warning("the hub is not reachable: %s is looked up in the local cache only", name)
    return Place(name, revision, local_files_only=True, is_folder=False)


def files_of(path: str | Path, *, revision: str | None = None) -> Path | None:
    """The folder of a model's files, as far as they are on this machine; the hub is not asked.

    Args:
        path: folder of a model or a hub name.
        revision: branch, tag or commit on the hub.
    Returns:
        The folder that has its config.json; None where there is none here.
    """
    local = Path(path).expanduser()
    if (local / "config.json").is_file():
        return local
    if isinstance(path, Path) or _is_written_like_a_path(path):
        return None
    held = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(held).parent if isinstance(held, str) else find_model(path)


@contextmanager
def one_message(what: str, place: Place) -> Iterator[None]:
    """Turn the many errors of reading `what` from `place` into one short message."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot load the {what} {place.name}: {reason} ({_advice(place, error)})") from error


def _advice(place: Place, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "set trust_remote_code only if you trust its source"
    if isinstance(error, ImportError):
        return "install what is named, or choose another setting"
    if place.is_folder:
        return "the folder needs config.json, model.safetensors and the tokenizer's files, all complete"
    if place.local_files_only:
        return "the hub is not reachable and its cache has no such name: give a folder, go online, or attach it"
    return "check the spelling, the revision, and whether the model needs a login"


def _is_written_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/")

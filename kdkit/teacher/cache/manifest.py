"""What a cache says of itself: of which teacher, which rows, what was kept, and a checksum of every file."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from kdkit.errors import UserError
from kdkit.loading import ModelShape

MANIFEST = "cache.json"
VERSION = 1
"""Of the format; another one is refused."""

StoredDtype = Literal["float16", "float32"]
_NUM_BLOCKS, _BLOCK_BYTES = 64, 2**16
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth")


class _Facts(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TeacherFacts(_Facts):
    """The model that was asked."""

    path: str
    revision: str | None
    dtype: str
    """Of the weights while it was asked."""
    quantization: str | None
    config_sha256: str | None
    """Of its config.json; None where its files are not at hand."""
    weights_sha256: str | None
    """Of sizes and samples of its files of weights; None likewise."""


class ShapeFacts(_Facts):
    """The teacher's sizes, as `ModelShape`."""

    head_size: int
    hidden_size: int
    num_layers: int
    num_experts: int | None

    def shape(self) -> ModelShape:
        """As adapters take it."""
        return ModelShape(self.head_size, self.hidden_size, self.num_layers, self.num_experts)


class Contents(_Facts):
    """What is kept at every counted position."""

    kind: Literal["top_k", "samples"]
    k: int
    """Kept ids, or draws."""
    num_ids: int
    """Ids that the teacher's distribution is over."""
    dtype: StoredDtype
    """Of log-probabilities and hidden states."""
    temperatures: tuple[float, float]
    """Lowest and highest that may be asked for."""
    unit: Literal["word", "token"] | None
    """What the hidden states are means over; None: there are none."""
    seed: int | None = None
    """Of the draws."""


class DataFacts(_Facts):
    """How the rows were read; what tells why a row is missing."""

    template: str
    train_template: str | None
    max_length: int
    max_prompt_length: int


class ShardFacts(_Facts):
    """One file of the cache."""

    size_bytes: int
    sha256: str


class Manifest(_Facts):
    """All of it."""

    version: int
    kdkit: str
    teacher: TeacherFacts
    shape: ShapeFacts
    contents: Contents
    data: DataFacts
    batch_tokens: int
    """Padded tokens of a pass while caching; another number rounds otherwise."""
    shard_tokens: int
    """Counted tokens after which a shard ends."""
    num_rows: int
    num_tokens: int
    """Counted tokens of all rows."""
    num_shards: int
    files: dict[str, ShardFacts] = {}
    """Everything that is written, by name."""

    @property
    def is_complete(self) -> bool:
        """Whether every shard is written."""
        return all(shard_name(index) in self.files for index in range(self.num_shards))


def shard_name(index: int) -> str:
    """File of a shard."""
    return f"shard-{index:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        UserError: there is none, it is damaged, or of another version of the format.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder} holds no cache ({MANIFEST} is missing): make one with kdkit cache, or name another")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{file} is damaged or of another version of kdkit: delete the folder and make the cache again"
        ) from error
    if manifest.version != VERSION:
        raise UserError(
            f"{file} is of format {manifest.version}, and this kdkit reads {VERSION}: delete the folder and make the "
            "cache again"
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step."""
    write_whole(folder / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())


def write_whole(path: Path, content: bytes) -> ShardFacts:
    """Write a file that is on disk in full before it has its name."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _flush(path.parent)
    return ShardFacts(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def differences(held: Manifest, given: Manifest) -> Iterator[str]:
    """Each field in which a cache differs from the one that is asked for, its files apart."""
    before, after = (_flat(one.model_dump(mode="json", exclude={"files"})) for one in (held, given))
    for name in before:
        if before[name] != after.get(name):
            yield f"{name}: {before[name]} there, {after.get(name)} asked for"


def model_facts(folder: Path) -> dict[str, str]:
    """Cheap digests of a model's folder: of its config.json, and of its files of weights by size and samples.

    A file is sampled in 64 blocks of 64 KiB spread over it, its first and last among them, which finds another model
    or another checkpoint in milliseconds; a change of a few bytes in between it may miss.

    Args:
        folder: with the model's files.
    Returns:
        `config_sha256` and `weights_sha256`, hexadecimal.
    """
    weights = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_ENDINGS):
        weights.update(f"{file.name} {file.stat().st_size}\n".encode())
        for block in _samples(file):
            weights.update(block)
    config = hashlib.sha256((folder / "config.json").read_bytes())
    return {"config_sha256": config.hexdigest(), "weights_sha256": weights.hexdigest()}


def _samples(file: Path) -> Iterator[bytes]:
    last = max(file.stat().st_size - _BLOCK_BYTES, 0)
    with file.open("rb") as content:
        for start in sorted({last * block // (_NUM_BLOCKS - 1) for block in range(_NUM_BLOCKS)}):
            content.seek(start)
            yield content.read(_BLOCK_BYTES)


def _flat(tree: Mapping[str, JsonValue], above: str = "") -> dict[str, JsonValue]:
    """A tree as one level of dotted names."""
    flat: dict[str, JsonValue] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[above + name] = value
    return flat


def _flush(folder: Path) -> None:
    """Have a renamed file's name on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

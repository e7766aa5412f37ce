"""Asking the teacher once about every row of a run, and writing down what it says."""

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kdkit.config import DistillConfig
from kdkit.data.batch import DistillCollator, EncodedRow
from kdkit.errors import RunFailed, UserError
from kdkit.loading import check_finite_logits, check_head, head_width, load_teacher, load_tokenizer
from kdkit.runtime import preflight
from kdkit.teacher.cache.keeping import Parts, bytes_per_token, bytes_per_unit, keep_rows
from kdkit.teacher.cache.manifest import (
    MANIFEST,
    Manifest,
    ShardFacts,
    StoredDtype,
    differences,
    read_manifest,
    shard_name,
    write_manifest,
    write_whole,
)
from kdkit.teacher.cache.rows import ROWS, RowIndex, batches_by_length
from kdkit.teacher.cache.shards import write_shard
from kdkit.teacher.cache.source import TOKENIZER
from kdkit.teacher.signal import DenseSignal, LiveSignal
from kdkit.teacher.sources import LiveTeacher
from kdkit.training.cache_plan import SHARD_TOKENS, Keep, check_cacheable, plan_cache, student_width, teacher_stages
from kdkit.training.progress import say
from kdkit.training.rows import RunRows
from kdkit.training.stopping import StopRequest
from kdkit.training.tokenizers import Tokenizers, load_tokenizers

_SAY_SECONDS = 10.0


@dataclass(frozen=True)
class CacheResult:
    """What a finished cache holds."""

    folder: Path
    num_rows: int
    num_tokens: int
    """Counted ones, those whose prediction is compared."""
    size_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Everything in the folder over its counted tokens."""
        return self.size_bytes / self.num_tokens


def write_teacher_cache(
    config: DistillConfig,
    output: Path,
    *,
    resume: bool = False,
    samples: int | None = None,
    dtype: StoredDtype = "float16",
    stop: StopRequest | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> CacheResult:
    """Write down what the teacher says at every counted token of the rows that a run trains and evaluates on.

    Kept are its `objective.kd.top_k` most likely ids (64 where that is unset) with the mass of the rest, for every
    temperature between 1 and those of `objective.kd.temperature`, and its last hidden states, averaged over units,
    where a term looks at them. A cache that was killed and resumed has the same bytes as one that was not.

    Args:
        config: the run, with its stages; what it sets of `teacher.cache` does not matter.
        output: folder to make.
        resume: continue what a stopped call left there.
        samples: keep this many draws from the teacher at each token instead of its most likely ids.
        dtype: of log-probabilities and hidden states; float16 is off by at most 1 in 2,000 of a log-probability.
        stop: asked between batches whether to stop.
        shard_tokens: counted tokens of a file.
    Returns:
        What the cache holds.
    Raises:
        UserError: no cache can serve this config; the folder holds something else; the tokenizers differ.
        RunFailed: there is no room on the disk.
        Interrupted: someone asked to stop; whole shards are kept.
    """
    stages = teacher_stages(config)
    check_cacheable(stages, samples)
    _check_folder(output, resume=resume)
    machine = preflight()
    if not machine.ok:
        raise UserError(f"{machine.problem}\n  {machine.remedy}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizers = load_tokenizers(config, must_agree=True)
    index, rows = RowIndex.of(_rows(stages, tokenizers))
    model = load_teacher(config.teacher, machine)
    collator = DistillCollator.of(tokenizers.student)
    check_finite_logits(model, collator(rows[:4]))
    width, num_ids = head_width(model), min(head_width(model), student_width(config))
    cut = None if width == num_ids else num_ids
    teacher = LiveTeacher(model, vocab_size=cut, dense=check_head(model) is not None)
    keep = Keep(samples, dtype, shard_tokens)
    manifest = plan_cache(config, stages, teacher=teacher, index=index, num_ids=num_ids, keep=keep)
    writing = _Writing(output, manifest, index, rows, teacher, collator, stop or StopRequest())
    writing.begin(config)
    return writing.run()


@dataclass
class _Writing:
    """A cache while it is written."""

    folder: Path
    manifest: Manifest
    index: RowIndex
    rows: Sequence[EncodedRow]
    teacher: LiveTeacher
    collator: DistillCollator
    stop: StopRequest
    _begun: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)
    _asked_tokens: int = 0

    def begin(self, config: DistillConfig) -> None:
        """Take up what is there, or write all but the shards."""
        if (self.folder / MANIFEST).is_file():
            held = read_manifest(self.folder)
            changes = [*differences(held, self.manifest), *_other_rows(held, self.index)]
            if changes:
                listed = "\n  ".join(changes)
                raise UserError(
                    f"{self.folder} holds another cache:\n  {listed}\nResume it with its own config, or give another "
                    "--output"
                )
            self.manifest = held
        self._check_room()
        if ROWS in self.manifest.files and all(map(self._is_whole, self._beside_shards())):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {ROWS: write_whole(self.folder / ROWS, self.index.content())}
        files |= _save_tokenizer(config, self.folder)
        self._add(files)

    def run(self) -> CacheResult:
        """Write every shard that is not there yet."""
        sizes = self.index.num_tokens
        shards = self.index.shards(self.manifest.shard_tokens)
        missing = [number for number in range(len(shards)) if not self._is_written(number)]
        left = int(sum(sizes[shards[number]].sum() for number in missing))
        done = int(sizes.sum()) - left
        say(f"caching {len(self.rows):,} rows, {sizes.sum():,} tokens in {len(shards)} files; {done:,} are there")
        for number in missing:
            rows = self._ask(self.rows[shards[number]], left=left)
            self._add({shard_name(number): write_shard(self.folder, number, rows)})
        size = sum(facts.size_bytes for facts in self.manifest.files.values())
        return CacheResult(self.folder, len(self.rows), int(sizes.sum()), size + self._manifest_bytes())

    def _ask(self, rows: Sequence[EncodedRow], *, left: int) -> list[Parts]:
        """What is kept of the rows of a shard."""
        kept: dict[int, Parts] = {}
        for places in batches_by_length(rows, self.manifest.batch_tokens):
            self.stop.check()
            batch = self.collator([rows[place] for place in places])
            signal = self.teacher(batch)
            assert isinstance(signal, DenseSignal | LiveSignal)
            parts = keep_rows(signal, batch, self.manifest.contents, device=self.teacher.model.device)
            kept |= zip(places, parts, strict=True)
            self._asked_tokens += batch["positions"].numel()
            self._say(left)
        return [kept[place] for place in range(len(rows))]

    def _say(self, left: int) -> None:
        """How far it is, every few seconds."""
        now = time.monotonic()
        if now - self._said < _SAY_SECONDS:
            return
        self._said, rate = now, self._asked_tokens / (now - self._begun)
        minutes = (left - self._asked_tokens) / rate / 60
        say(f"{self._asked_tokens:,}/{left:,} tokens, {rate:,.0f} a second, {minutes:.1f} min left")

    def _add(self, files: dict[str, ShardFacts]) -> None:
        self.manifest = self.manifest.model_copy(update={"files": self.manifest.files | files})
        write_manifest(self.folder, self.manifest)

    def _is_written(self, number: int) -> bool:
        """Whether a shard is there in full; one that was cut short or deleted since is made again."""
        return shard_name(number) in self.manifest.files and self._is_whole(shard_name(number))

    def _is_whole(self, name: str) -> bool:
        """Whether a file of the manifest has its size."""
        path = self.folder / name
        return path.is_file() and path.stat().st_size == self.manifest.files[name].size_bytes

    def _beside_shards(self) -> list[str]:
        """The index of the rows and the tokenizer's files."""
        shards = {shard_name(number) for number in range(self.manifest.num_shards)}
        return [name for name in self.manifest.files if name not in shards]

    def _manifest_bytes(self) -> int:
        return (self.folder / MANIFEST).stat().st_size

    def _check_room(self) -> None:
        """Refuse to start what the disk cannot hold."""
        contents, head_size = self.manifest.contents, self.manifest.shape.head_size
        needed = bytes_per_token(contents) * int(self.index.num_tokens.sum())
        needed += bytes_per_unit(contents, head_size) * int(self.index.num_units.sum())
        needed -= sum(facts.size_bytes for facts in self.manifest.files.values())
        existing = next(folder for folder in (self.folder, *self.folder.resolve().parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise RunFailed(
                f"the cache needs {needed / 2**20:,.0f} MiB more and {existing} has {free / 2**20:,.0f} MiB free: make "
                "room, lower objective.kd.top_k or data.train_rows, or give another --output"
            )


def _check_folder(folder: Path, *, resume: bool) -> None:
    if folder.is_file():
        raise UserError(f"--output {folder} is a file; give a folder")
    is_cache = (folder / MANIFEST).is_file()
    if is_cache and not resume:
        raise UserError(f"--output {folder} holds a cache: add --resume to finish it, or give another folder")
    if not is_cache and folder.is_dir() and not _is_leftover(folder):
        raise UserError(f"--output {folder} exists, is not empty and holds no cache: give another folder")


def _is_leftover(folder: Path) -> bool:
    """Whether all that is there is what a call wrote that was killed before its first manifest."""
    ours = {TOKENIZER, ROWS, f"{ROWS}.partial", f"{MANIFEST}.partial"}
    return all(path.name in ours for path in folder.iterdir())


def _rows(stages: Sequence[DistillConfig], tokenizers: Tokenizers) -> Iterator[EncodedRow]:
    """Every row that a stage trains on or evaluates its objective on while training."""
    rows = RunRows(tokenizers.student)
    kinds: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    for kind in kinds:
        for stage in stages:
            yield from rows.encoded(kind, stage).dataset


def _other_rows(held: Manifest, index: RowIndex) -> Iterator[str]:
    """Says so where the rows of a cache are others, in another order or other in number."""
    facts = held.files.get(ROWS)
    if facts is not None and facts.sha256 != hashlib.sha256(index.content()).hexdigest():
        yield "rows: others there than those of this config"


def _save_tokenizer(config: DistillConfig, folder: Path) -> dict[str, ShardFacts]:
    """The teacher's tokenizer in the cache, so that a run needs nothing of the teacher; what its files are."""
    teacher = config.teacher
    tokenizer = load_tokenizer(teacher.path, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)  # of a call that was killed here
    tokenizer.save_pretrained(folder / TOKENIZER)
    files = sorted(path for path in (folder / TOKENIZER).iterdir() if path.is_file())
    return {f"{TOKENIZER}/{path.name}": write_whole(path, path.read_bytes()) for path in files}

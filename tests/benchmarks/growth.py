"""How cost and memory grow with length, vocabulary, batch and rows: `make growth`, half an hour on one thread.

Each point is a process of its own. Seconds are those of the processor, so that other programs of the machine do not
count; bytes are what a step adds to the resident set over its inputs, its gradients included. Of the rows, bytes are
anonymous memory: pages of a mapped file go back to the system when it needs them.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from growth_figure import AXES, Axis, Point, Points, draw, exponents

from kdkit.losses import linear_divergence
from kdkit.losses.alignment import alignment_loss, pool_units
from kdkit.softdtw import soft_dtw
from kdkit.teacher.signal import Head, LiveSignal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdkit.data import EncodedRows, Rows

ROOT = Path(__file__).parents[2]
STUDENT_SIZE, TEACHER_SIZE, NUM_IDS, BAND, GAMMA, ALPHA = 256, 512, 8192, 32, 0.1, 0.1
ROUNDS = 3
LIMIT_BYTES = 12 * 2**30
"""Memory that a step may take; a series ends where it asks for more."""
NUM_BATCHES, BATCH_SIZE = 100, 32
"""Batches drawn from the rows, and their rows."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Series:
    """One line of the figure: what is done, at which sizes."""

    axis: Axis
    sizes: Sequence[int]
    make: Callable[[int], Step]
    """Inputs of a size -> what is measured."""


def head_pass_step(num_positions: int, num_ids: int) -> Step:
    """Skew reverse KL between two heads, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    student = torch.empty(num_positions, STUDENT_SIZE).normal_(generator=generator).requires_grad_()
    weight = torch.empty(num_ids, STUDENT_SIZE).normal_(0, 0.02, generator=generator).requires_grad_()
    teacher = torch.empty(num_positions, TEACHER_SIZE).normal_(generator=generator)
    signal = LiveSignal(teacher, Head(torch.empty(num_ids, TEACHER_SIZE).normal_(0, 0.02, generator=generator)))

    def step() -> None:
        student.grad = weight.grad = None
        linear_divergence("skew_reverse_kl", student, Head(weight), signal, alpha=ALPHA).backward()

    return step


def dtw_step(num_tokens: int, *, batch: int = 1, band: int | None = BAND, unit: str = "word") -> Step:
    """The dtw term: states of both sides averaged over units, then their divergence, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    student = torch.empty(batch, num_tokens, TEACHER_SIZE).normal_(generator=generator).requires_grad_()
    teacher = torch.empty(batch, num_tokens, TEACHER_SIZE).normal_(generator=generator)
    tokens = torch.arange(num_tokens)
    ids = (tokens if unit == "token" else tokens * 3 // 4).expand(batch, -1)  # a word has 4/3 tokens
    num_units = int(ids.max()) + 1

    def step() -> None:
        student.grad = None
        own, lengths = pool_units(student, ids, num_units)
        theirs, _ = pool_units(teacher, ids, num_units)
        alignment_loss(own, theirs, lengths, lengths, gamma=GAMMA, band=band).per_sample.mean().backward()

    return step


def soft_dtw_step(num_tokens: int) -> Step:
    """Soft-DTW of a cost matrix that exists, forward and backward."""
    cost = torch.rand(1, num_tokens, num_tokens, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def step() -> None:
        cost.grad = None
        soft_dtw(cost, gamma=GAMMA, band=BAND).sum().backward()

    return step


LENGTHS = [128 * 2**k for k in range(7)]
VOCABULARIES = [*(1024 * 2**k for k in range(7)), 151_936]
BATCHES = [2**k for k in range(7)]
SERIES = {
    "head pass": Series("length", LENGTHS, lambda size: head_pass_step(size, NUM_IDS)),
    "DTW over words": Series("length", LENGTHS, lambda size: dtw_step(size, band=None)),
    "DTW over words, band 32": Series("length", LENGTHS, dtw_step),
    "DTW over tokens, band 32": Series("length", LENGTHS, lambda size: dtw_step(size, unit="token")),
    "its recursion, band 32": Series("length", LENGTHS, soft_dtw_step),
    "head pass, 512 positions": Series("vocabulary", VOCABULARIES, lambda size: head_pass_step(512, size)),
    "head pass, 256 a row": Series("batch", BATCHES, lambda size: head_pass_step(256 * size, NUM_IDS)),
    "DTW over words, band 32, 256 tokens": Series("batch", BATCHES, lambda size: dtw_step(256, batch=size)),
}
ROWS = [10**k for k in range(3, 8)]
ROWS_SERIES = ("reading", "tokenising", f"drawing {NUM_BATCHES} batches")


def measure(name: str, size: int) -> Point:
    """A step of a size; its smallest sibling goes first, so that nothing is compiled or loaded within it."""
    series = SERIES[name]
    series.make(series.sizes[0])()
    step = series.make(size)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step()
    peak = _status_bytes("VmHWM")
    return Point(size, statistics.median(_processor_seconds(step) for _ in range(ROUNDS)), max(peak - before, 0))


def measure_rows(file: Path, size: int, *, reads_only: bool) -> dict[str, Point]:
    """What a run does with its rows before its first step, and the batches of its first steps."""
    from kdkit.data import load_rows
    from kdkit.loading import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "data/demo/teacher"))
    _draw(_encode(load_rows(file, limit=BATCH_SIZE, tokenizer=tokenizer), tokenizer), tokenizer)
    before, found = _status_bytes("RssAnon"), {}

    def stage(name: str, work: Callable[[], object]) -> object:
        begin = time.process_time()
        with _peak_of("RssAnon") as peaks:
            result = work()
        found[name] = Point(size, time.process_time() - begin, max(peaks) - before)
        return result

    rows = stage(ROWS_SERIES[0], lambda: load_rows(file))
    if not reads_only:
        encoded = stage(ROWS_SERIES[1], lambda: _encode(rows, tokenizer))
        stage(ROWS_SERIES[2], lambda: _draw(encoded, tokenizer))
    return found


def _encode(rows: "Rows", tokenizer: "PreTrainedTokenizerBase") -> "EncodedRows":
    from kdkit.data import encode_rows

    return encode_rows(rows, tokenizer, max_length=256, max_prompt_length=192)


def _draw(encoded: "EncodedRows", tokenizer: "PreTrainedTokenizerBase") -> None:
    """The first batches in a shuffled order, as the trainer's loader draws them."""
    from torch.utils.data import DataLoader

    from kdkit.data import DistillCollator

    loader = DataLoader(encoded.dataset, BATCH_SIZE, shuffle=True, collate_fn=DistillCollator.of(tokenizer))
    for _ in zip(range(NUM_BATCHES), loader, strict=False):
        pass


def write_rows(file: Path, count: int) -> None:
    """Rows as short as Dolly's shorter ones, all different."""
    draw_from = random.Random(0)
    words = ["river", "copper", "seven", "lamp", "walks", "the", "of", "a", "quiet", "garden", "music", "tin", "made"]
    said = [" ".join(draw_from.choices(words, k=draw_from.randint(6, 18))) for _ in range(1009)]
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            question = f"What is said of thing {number}: {said[number % 997]}?"
            out.write(json.dumps({"instruction": question, "context": "", "response": said[number % 1009]}) + "\n")


def _processor_seconds(step: Step) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


def _status_bytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


@contextmanager
def _peak_of(field: str) -> Iterator[list[int]]:
    """Looks at a figure of this process every few milliseconds; the system keeps no peak of it."""
    seen, is_over = [_status_bytes(field)], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            seen[0] = max(seen[0], _status_bytes(field))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()
        seen[0] = max(seen[0], _status_bytes(field))


def _in_own_process(*arguments: str) -> object | None:
    """What this program prints as JSON for such arguments; None where it ran out of the memory that it may take."""
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **one_thread, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode and "alloc" in done.stderr.lower():
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(axes: Sequence[Axis], *, most_tokenised: int) -> Points:
    """Every point of some axes, said as it is found."""
    points: Points = {}

    def take(axis: Axis, name: str, point: Point) -> None:
        points.setdefault(axis, {}).setdefault(name, []).append(point)
        print(f"{name}: {axis} {point.size:,}, {point.seconds:.4g} s, {point.num_bytes / 2**20:.1f} MiB", flush=True)

    for name, series in SERIES.items():
        for size in series.sizes if series.axis in axes else ():
            found = _in_own_process("--point", name, str(size))
            if found is None:
                print(f"{name}: {series.axis} {size:,} asks for more than {LIMIT_BYTES / 2**30:g} GiB", flush=True)
                break
            take(series.axis, name, Point(*found))
    for size in ROWS if "rows" in axes else ():
        for name, point in _median_rows(size, reads_only=size > most_tokenised).items():
            take("rows", name, point)
    return points


def _median_rows(size: int, *, reads_only: bool) -> dict[str, Point]:
    """Three times, and once where that takes long."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, size)
        arguments = ("--rows", str(file), str(size), *(["--reads-only"] if reads_only else []))
        found = [_in_own_process(*arguments) for _ in range(ROUNDS if size <= 10_000 else 1)]
    names = found[0]
    return {name: Point(*map(statistics.median, zip(*(one[name] for one in found), strict=True))) for name in names}


def _with_newer(kept: dict[Axis, dict[str, list[list[float]]]], newer: Points) -> Points:
    """Every point that was measured, now or before."""
    points: Points = {}
    for axis in AXES:
        for name in {**kept.get(axis, {}), **newer.get(axis, {})}:
            by_size = {point[0]: Point(*point) for point in kept.get(axis, {}).get(name, [])}
            by_size |= {point.size: point for point in newer.get(axis, {}).get(name, [])}
            points.setdefault(axis, {})[name] = [by_size[size] for size in sorted(by_size)]
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/figures", help="folder of growth.json, growth.png")
    parser.add_argument(
        "--axes", nargs="*", choices=AXES, default=AXES, help="what to measure; growth.json has the rest"
    )
    parser.add_argument("--most-tokenised", type=int, default=10**6, help="more rows than these are only read")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rows", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--reads-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.point:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
        print(json.dumps(measure(options.point[0], int(options.point[1]))))
        return
    if options.rows:
        found = measure_rows(Path(options.rows[0]), int(options.rows[1]), reads_only=options.reads_only)
        print(json.dumps(found))
        return
    file = options.output / "growth.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    points = _with_newer(kept, measure_all(options.axes, most_tokenised=options.most_tokenised))
    options.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(points) + "\n", encoding="utf-8")
    (options.output / "growth.png").write_bytes(draw(points))
    for name, (seconds, memory) in exponents(points).items():
        print(f"{name}: seconds ^{seconds:.2f}, bytes ^{memory:.2f}")


if __name__ == "__main__":
    main()

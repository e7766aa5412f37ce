"""Which batches of an accumulation window are gold, fresh or replayed; and all that a rollout remembers."""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from kdkit.config import RolloutConfig
from kdkit.data.batch import Batch, DistillCollator, EncodedRow, batch_rows
from kdkit.runtime import generator
from kdkit.training.rollout.ahead import Judged, Place, Shelf, answers, pack_shelf, unpack_shelf
from kdkit.training.rollout.buffer import HeldText, ReplayBuffer, pack_texts, unpack_texts
from kdkit.training.rollout.generator import StudentGenerator
from kdkit.training.rollout.guard import REASONS, Guard
from kdkit.training.rollout.threshold import AdaptiveThreshold, CollapseRule, Shares, TextCounts, shares

TEXTS_FILE = "rollout.safetensors"
"""Texts of the replay buffer in a checkpoint, and those written ahead."""
AHEAD = "ahead."
"""Before the names of the latter."""
STATE_FILE = "rollout.json"
"""The rest of a rollout's state in a checkpoint."""
Source = Literal["gold", "fresh", "replayed", "empty"]
SOURCES: tuple[Source, ...] = get_args(Source)
ReadAhead = Callable[[int], Sequence[Sequence[Batch]]]
"""Number of windows -> the batches of the next ones, fewer at the end of an epoch."""
Figures = dict[str, tuple[float, float]]
"""Name -> (sum, weight) of a window; a log row shows their ratio."""


@dataclass(frozen=True)
class Memory:
    """What a rollout remembers after an optimizer step: all that a checkpoint needs of it."""

    texts: tuple[HeldText, ...]
    shelf: Shelf
    numbers: str
    """JSON."""


class Rollout:
    """Replaces batches of gold rows by the student's own text.

    Every process draws the same sources for a window and, where there are several, gets every process's texts, so
    that all hold the same buffer and the same threshold.

    Args:
        config: the stage's.
        generate: draws texts.
        guard: judges them.
        collator: makes batches.
        seed: of the draws.
        num_steps: optimizer steps of the stage.
        begin_step: the gate's; completed steps before which nothing is generated.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        generate: StudentGenerator,
        guard: Guard,
        collator: DistillCollator,
        seed: int,
        num_steps: int,
        begin_step: int = 0,
    ) -> None:
        self.config = config
        self.generate = generate
        self.guard = guard
        self.collator = collator
        self.seed = seed
        self.num_steps = num_steps
        self.begin_step = begin_step
        self.buffer = ReplayBuffer(config.capacity)
        self.threshold = AdaptiveThreshold(
            config.start_threshold,
            step=config.threshold_step,
            cap=config.threshold_cap,
            epsilon=config.loss_epsilon,
            reference=config.reference,
        )
        self.collapse = None if config.collapse is None else CollapseRule(config.collapse)
        self.shelf: Shelf = {}
        self.tally = TextCounts()
        self.is_rouge_reached = config.gate is None or config.gate.min_rouge_l == 0
        self._settled = self._memory()

    @property
    def needs_first_evaluation(self) -> bool:
        """Whether threshold or collapse rule compare with an evaluation before step 1."""
        return self.config.mode == "adaptive" or self.collapse is not None

    # ---- at a step ----

    def mix(
        self,
        batches: Sequence[Batch],
        student: nn.Module,
        *,
        step: int,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        read_ahead: ReadAhead = lambda num_windows: (),
    ) -> tuple[list[Batch], Figures]:
        """The batches of an accumulation window, some of them replaced.

        Args:
            batches: of gold rows, or of prompts alone.
            student: as it is now.
            step: completed optimizer steps.
            accelerator: knows the processes.
            autocast: what the student generates under.
            read_ahead: the batches of windows to come, whose texts are written along.
        Returns:
            As many batches, and figures for the log. A refused text leaves its gold row in its place.
        """
        began, figures = time.monotonic(), Figures()
        sources = [self._draw_source(step, index) for index in range(len(batches))]
        asked = {index: batch_rows(batch) for index, batch in enumerate(batches) if sources[index] == "fresh"}
        replaced: dict[int, list[EncodedRow]] = {}
        if asked:
            places = {Place(step, index, accelerator.process_index): rows for index, rows in asked.items()}
            if not self._are_written(places, accelerator):
                places |= self._places_to_come(read_ahead, step=step, process=accelerator.process_index)
                self._write(places, student, step=step, accelerator=accelerator, autocast=autocast)
            judged = {index: self.shelf[Place(step, index, accelerator.process_index)] for index in asked}
            every = [one for texts in judged.values() for one in texts]
            self._keep(every, accelerator=accelerator)
            _add_texts(figures, every, is_guarded=self.guard.config is not None)
            replaced |= {index: _in_their_places(asked[index], texts) for index, texts in judged.items()}
        self.shelf = {place: texts for place, texts in self.shelf.items() if place.step > step}
        for index, batch in enumerate(batches):
            if sources[index] == "replayed":
                key, size = (step, index, accelerator.process_index), len(batch["row_ids"])
                replaced[index] = self._replayed_rows(size, key=key, figures=figures)
                self.tally.num_trained += size * accelerator.num_processes
        self._count_sources(sources, batches, replaced, figures=figures)
        _add(figures, "threshold", self.threshold.value, 1)
        _add(figures, "buffer_texts", len(self.buffer), 1)
        _add(figures, "seconds", time.monotonic() - began, 1)
        mixed = [self.collator(replaced[i]) if i in replaced else batch for i, batch in enumerate(batches)]
        return mixed, {f"rollout/{name}": figure for name, figure in figures.items()}

    def _are_written(self, places: Mapping[Place, list[EncodedRow]], accelerator: Accelerator) -> bool:
        """Whether the texts of these batches lie ready, in every process: they write together or not at all."""
        are_ready = all(answers(self.shelf.get(place, ()), rows) for place, rows in places.items())
        return all(gather_object([are_ready])) if accelerator.num_processes > 1 else are_ready

    def _places_to_come(self, read_ahead: ReadAhead, *, step: int, process: int) -> dict[Place, list[EncodedRow]]:
        """Batches of the steps to come that are the student's text as things stand now, and their rows."""
        num_windows = min(self.config.ahead, self.num_steps - step) - 1
        windows = read_ahead(num_windows) if num_windows > 0 else ()
        return {
            Place(later, index, process): batch_rows(batch)
            for later, window in enumerate(windows, start=step + 1)
            for index, batch in enumerate(window)
            if self._draw_source(later, index) == "fresh"
        }

    def _write(
        self,
        places: Mapping[Place, list[EncodedRow]],
        student: nn.Module,
        *,
        step: int,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """A text of the student for every row, all in one go, judged and put on the shelf of every process."""
        rows = [row for rows in places.values() for row in rows]
        with autocast():  # the teacher reads them outside, in its own precision
            texts = self.generate(student, rows, key=(step, accelerator.process_index))
        judged = (Judged(text, verdict, step) for text, verdict in zip(texts, self.guard(texts), strict=True))
        written = [(place, tuple(itertools.islice(judged, len(rows)))) for place, rows in places.items()]
        self.shelf |= dict(gather_object(written) if accelerator.num_processes > 1 else written)

    def _replayed_rows(self, num_rows: int, *, key: Sequence[int], figures: Figures) -> list[EncodedRow]:
        """A batch from the buffer."""
        held = self.buffer.sample(num_rows, generator(self.seed, "replay", *key))
        _add(figures, "age_steps", sum(key[0] - text.born_step for text in held), num_rows)
        return [text.row for text in held]

    def _count_sources(
        self,
        sources: Sequence[Source],
        batches: Sequence[Batch],
        replaced: Mapping[int, Sequence[EncodedRow]],
        *,
        figures: Figures,
    ) -> None:
        """Where the rows of the window come from, as shares of them; a prompt without an answer is empty."""
        num_rows: Counter[Source] = Counter()
        for index, (source, batch) in enumerate(zip(sources, batches, strict=True)):
            if index not in replaced:
                empty = int((batch["lengths"] == batch["prompt_lengths"]).sum())
                num_rows.update(gold=len(batch["row_ids"]) - empty, empty=empty)
            for row in replaced.get(index, ()):
                is_empty = len(row["input_ids"]) == row["prompt_length"]
                num_rows["empty" if is_empty else "gold" if row.get("is_gold", True) else source] += 1
        for name in SOURCES:
            _add(figures, f"{name}_fraction", num_rows[name], num_rows.total())

    def shares(self, step: int) -> Shares:
        """Probabilities of a batch after so many completed steps."""
        if not self.is_rouge_reached or step < self.begin_step:
            return Shares(0.0, 0.0)
        if self.config.mode == "on_policy":
            return Shares(self.threshold.value, self.threshold.value)
        return shares(self.threshold.value, step / self.num_steps, self.config.replay_ratio)

    def _draw_source(self, step: int, index: int) -> Source:
        """DistiLLM's choice for one batch; a replay waits until the buffer is full."""
        now = self.shares(step)
        draw = torch.rand((), generator=generator(self.seed, "source", step, index), dtype=torch.float64).item()
        if draw < now.fresh or (draw < now.student and not self.buffer.is_full):
            return "fresh"
        return "replayed" if draw < now.student else "gold"

    def _keep(self, texts: Sequence[Judged], *, accelerator: Accelerator) -> None:
        """Count what was refused and push the rest, of all processes, in one order everywhere."""
        judged = [(HeldText(one.text.row, one.born_step, one.verdict.score), one.verdict.reason) for one in texts]
        if accelerator.num_processes > 1:
            judged = gather_object(judged)
        self.tally.num_texts += len(judged)
        self.tally.num_trained += sum(reason is None for _, reason in judged)
        self.tally.refused.update(reason for _, reason in judged if reason is not None)
        if self.config.mode != "on_policy":
            self.buffer.push(text for text, reason in judged if reason is None)

    # ---- at an evaluation ----

    def observe(self, figures: Mapping[str, float]) -> tuple[dict[str, float], str | None]:
        """Move the threshold by what an evaluation found.

        Args:
            figures: with `cross_entropy`, and `rouge_l` where answers were generated.
        Returns:
            Figures to log beside them, and a sentence for the reader where something happened.
        """
        rouge, before, tally = figures.get("rouge_l"), self.threshold.value, self.tally
        notes = []
        if not self.is_rouge_reached and rouge is not None:
            assert self.config.gate is not None
            self.is_rouge_reached = rouge >= self.config.gate.min_rouge_l
            if self.is_rouge_reached:
                notes.append(f"ROUGE-L {rouge:.1f} opens the gate (floor {self.config.gate.min_rouge_l:g})")
        fall = self._find_fall(rouge)
        is_taken_back = self.collapse is not None and fall is not None and self.collapse.is_collapse
        if fall is not None:
            notes.append(self._take_back(fall, rouge) if is_taken_back else self._watch(fall))
        if self.config.mode == "adaptive" and self.threshold.observe(figures["cross_entropy"], may_rise=fall is None):
            notes.append(
                f"validation loss {figures['cross_entropy']:.4g}: threshold {before:g} -> {self.threshold.value:g}"
            )
        logged = {"rollout/threshold": self.threshold.value, "rollout/taken_back": float(is_taken_back)}
        if tally.num_texts and self.guard.config is not None:
            logged["rollout/pass_fraction"] = tally.num_passed / tally.num_texts
            if not tally.num_passed:
                notes.append(
                    f"the guard refused all {tally.num_texts} texts since the last evaluation ({tally.reasons()}): "
                    "training goes on with gold rows, where the prompts have any"
                )
        self.tally = TextCounts()
        return logged, "; ".join(notes) or None

    def _find_fall(self, rouge: float | None) -> str | None:
        """What fell since the student's text came in, where there is any to take back."""
        if self.collapse is None:
            return None
        fall = self.collapse.observe(rouge, self.tally, threshold=self.threshold.value)
        return fall if self.threshold.value > 0 else None

    def _watch(self, fall: str) -> str:
        """A fall that may be a dip: nothing is done yet."""
        assert self.collapse is not None
        done, needed = self.collapse.num_falls, self.collapse.config.patience
        return (
            f"{fall}: seen at {done} evaluation{'s' if done > 1 else ''}, at {needed} in a row the threshold goes back"
        )

    def _take_back(self, fall: str, rouge: float | None) -> str:
        """Lower the threshold, keep an adaptive one below what did the harm, and forget the texts."""
        assert self.collapse is not None
        before = self.threshold.value
        self.threshold.value = self.collapse.take_back(before, rouge)
        self.threshold.cap = min(self.threshold.cap, max(before - self.threshold.step, self.threshold.step))
        more = f", from now on at most {self.threshold.cap:g}" if self.config.mode == "adaptive" else ""
        emptied = "; replay buffer emptied" if len(self.buffer) else ""
        self.buffer.clear()
        return f"{fall}: threshold {before:g} -> {self.threshold.value:g}{more}{emptied}"

    # ---- at a checkpoint ----

    def settle(self) -> None:
        """Mark the end of an optimizer step: a checkpoint holds what is remembered now, whatever comes after."""
        self._settled = self._memory()

    def save(self, folder: Path) -> None:
        """Write what was remembered at the last complete step."""
        tensors, places = pack_shelf(self._settled.shelf)
        tensors = {f"{AHEAD}{name}": tensor for name, tensor in tensors.items()} if places else {}
        save_file(pack_texts(self._settled.texts) | tensors, folder / TEXTS_FILE)
        numbers = json.loads(self._settled.numbers) | {"shelf": places}
        (folder / STATE_FILE).write_text(json.dumps(numbers, indent=1), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        numbers = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self.buffer.clear()
        tensors = load_file(folder / TEXTS_FILE)
        ahead = {name.removeprefix(AHEAD): tensors.pop(name) for name in list(tensors) if name.startswith(AHEAD)}
        self.buffer.push(unpack_texts(tensors))
        self.shelf = unpack_shelf(ahead, numbers["shelf"]) if ahead else {}
        self.threshold = AdaptiveThreshold(**numbers["threshold"])
        self.tally = TextCounts(**numbers["tally"] | {"refused": Counter(numbers["tally"]["refused"])})
        self.is_rouge_reached = numbers["is_rouge_reached"]
        if self.collapse is not None:
            self.collapse = CollapseRule(self.collapse.config, **numbers["collapse"])
        self.settle()

    def _memory(self) -> Memory:
        rule = {} if self.collapse is None else {k: v for k, v in vars(self.collapse).items() if k != "config"}
        numbers = {
            "threshold": vars(self.threshold),
            "collapse": rule,
            "is_rouge_reached": self.is_rouge_reached,
            "tally": {**vars(self.tally), "refused": dict(self.tally.refused)},
        }
        return Memory(self.buffer.texts(), dict(self.shelf), json.dumps(numbers))


def _in_their_places(rows: Sequence[EncodedRow], texts: Sequence[Judged]) -> list[EncodedRow]:
    """The rows of a batch: the student's text, or the gold row where it was refused."""
    pairs = zip(rows, texts, strict=True)
    return [one.text.row if one.verdict.reason is None else row for row, one in pairs]


def _add_texts(figures: Figures, judged: Sequence[Judged], *, is_guarded: bool) -> None:
    """What was generated, whether or not it may be trained on."""
    texts, verdicts = [one.text for one in judged], [one.verdict for one in judged]
    refused = Counter(verdict.reason for verdict in verdicts if verdict.reason is not None)
    scores = [verdict.score for verdict in verdicts if verdict.score > float("-inf")]
    if is_guarded:
        _add(figures, "pass_fraction", len(texts) - refused.total(), len(texts))
    for reason in REASONS if is_guarded else REASONS[:1]:  # what the teacher cannot read is refused without a guard
        _add(figures, f"refused/{reason}", refused[reason], len(texts))
    _add(figures, "mean_tokens", sum(len(text.response_ids) for text in texts), len(texts))
    _add(figures, "ended_fraction", sum(text.ended for text in texts), len(texts))
    _add(figures, "repeat_fraction", sum(verdict.repeat_fraction for verdict in verdicts), len(verdicts))
    _add(figures, "teacher_logprob", sum(scores), len(scores))


def _add(figures: Figures, name: str, total: float, weight: float) -> None:
    before = figures.get(name, (0.0, 0.0))
    figures[name] = (before[0] + total, before[1] + weight)

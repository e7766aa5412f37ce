"""A training step against trl's GKDTrainer: `pytest tests/benchmarks --benchmark-only`, extra `bench`.

Both train the same pair on the same encoded rows with the same divergence, batch and fused AdamW, through their own
trainers. Bodies are timed by hooks: the pass of each model up to its head, and the student's backward pass from there
on. The demo pair takes processor seconds of one thread, which other work on the machine disturbs least, the large pair
seconds of the wall with two. A run of kdkit and one of trl take turns; what counts is the median over the steps but the
first.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from pytest_benchmark.fixture import BenchmarkFixture
from readme_table import Row, show
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
)

from kdkit.config import demo_folder, load_config
from kdkit.data import DistillCollator, encode_rows, load_rows
from kdkit.loading import load_model
from kdkit.memory.shapes import shape_folder
from kdkit.runtime import cpu_bfloat16_units
from kdkit.teacher.sources import LiveTeacher
from kdkit.training.arguments import training_arguments
from kdkit.training.flow import StageFlow
from kdkit.training.metrics import MetricsFile
from kdkit.training.model import DistillModel
from kdkit.training.objective import Objective
from kdkit.training.rollout import build_rollout
from kdkit.training.stopping import StopRequest
from kdkit.training.trainer import DistillTrainer

BETA = 0.5
PROMPT_TOKENS = 16
NEW_TOKENS = 32
NUM_TURNS = 2
PARTS = ("total", "bodies", "optimizer", "outside")
CLOCK = time.process_time
AHEAD = 4
"""Steps whose texts kdkit writes in one go, where it is asked to: `rollout.ahead`."""
LEAST_GOLD, LEAST_HALF, LEAST_HALF_AHEAD, MOST_OUTSIDE, MOST_SHARE = 1.5, 1.4, 2.0, 1 / 3, 0.1
MOST_SHARE_WITH_HEADS = 0.2
LEAST_BFLOAT16 = 1.5


@dataclass
class Pair:
    """Two models, and rows to train on."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    batch_size: int
    num_steps: int


@dataclass
class Step:
    """Seconds of an optimizer step."""

    total: float = 0.0
    bodies: float = 0.0
    """Both models' passes up to the head, and the student's backward pass from there on."""
    optimizer: float = 0.0

    @property
    def outside(self) -> float:
        """What is neither the bodies' nor the optimizer's."""
        return self.total - self.bodies - self.optimizer


@dataclass
class Stopwatch(TrainerCallback):
    """Takes the time of each step and of its parts."""

    steps: list[Step] = field(default_factory=list)
    now: Step = field(default_factory=Step)
    is_writing: bool = False
    """Whether the student is writing: its passes then are no training."""
    _began: float | None = None
    _backward_began: float = 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        end = CLOCK()
        if self._began is not None:  # the first step warms up
            self.now.total = end - self._began
            self.steps.append(self.now)
        self.now, self._began = Step(), end

    def steps_of(self, pair: Pair, trainer: Trainer) -> list[Step]:
        """Train, and take the time by hooks in both models, the optimizer and the trainer's backward pass."""
        for model in (pair.student, pair.teacher):
            self._watch_body(model.base_model)
        backward = trainer.accelerator.backward

        def timed_backward(loss: torch.Tensor, **options: object) -> None:
            backward(loss, **options)
            self.now.bodies += CLOCK() - self._backward_began

        trainer.accelerator.backward = timed_backward
        with self._timed_optimizer():
            trainer.train()
        return self.steps

    def _watch_body(self, body: nn.Module) -> None:
        began = [0.0]

        def before(*_: object) -> None:
            began[0] = CLOCK()

        def after(module: nn.Module, inputs: object, output: object) -> None:
            if self.is_writing:
                return
            self.now.bodies += CLOCK() - began[0]
            if output.last_hidden_state.requires_grad:
                output.last_hidden_state.register_hook(lambda _: self._mark_backward())

        body.register_forward_pre_hook(before)
        body.register_forward_hook(after)

    def _mark_backward(self) -> None:
        self._backward_began = CLOCK()

    def writing(self, function: Callable) -> Callable:
        """A function in which the student writes."""

        def wrapped(*args: object, **kwargs: object) -> object:
            self.is_writing = True
            try:
                return function(*args, **kwargs)
            finally:
                self.is_writing = False

        return wrapped

    @contextmanager
    def _timed_optimizer(self) -> Iterator[None]:
        """AdamW's steps are timed inside."""
        step = torch.optim.AdamW.step

        def timed(*args: object, **kwargs: object) -> object:
            began = CLOCK()
            done = step(*args, **kwargs)
            self.now.optimizer += CLOCK() - began
            return done

        with mock.patch.object(torch.optim.AdamW, "step", timed):
            yield


def ours(pair: Pair, folder: Path, *, writes: int, ahead: int = 1, precision: str = "float32") -> list[Step]:
    """Steps of kdkit; every batch is the student's own text where it writes any tokens, for some steps in one go."""
    tree = {
        "preset": "demo",
        "objective": {"kd": {"loss": "jsd", "beta": BETA}},
        "optim": {"max_steps": pair.num_steps, "batch_size": pair.batch_size},
        "data": {"max_length": 512},
    }
    own_text = f"{{mode: on_policy, max_new_tokens: {writes}, ahead: {ahead}, guard: null, collapse: null}}"
    config = load_config(tree, [f"rollout={own_text}"] if writes else [])
    collator, teacher = DistillCollator.of(pair.tokenizer), LiveTeacher(pair.teacher)
    watch, flow = Stopwatch(), StageFlow(log_every=10, save_every=0, evaluate_every=0, stop=StopRequest())
    trainer = DistillTrainer(
        DistillModel(pair.student, Objective(config.objective), teacher=teacher.shape),
        training_arguments(config, folder, num_steps=pair.num_steps, precision=precision, use_cpu=True),
        stage="bench",
        collator=collator,
        train_rows=pair.rows,
        eval_rows=pair.rows.select([0]),
        teacher=teacher,
        tokenizer=pair.tokenizer,
        metrics=MetricsFile(folder / "metrics.jsonl"),
        rollout=build_rollout(
            config,
            tokenizer=pair.tokenizer,
            teacher=teacher,
            collator=collator,
            num_steps=pair.num_steps,
            num_warmup_steps=0,
            references=list,
        ),
        callbacks=[flow, watch],
    )
    flow.trainer = trainer
    if trainer.rollout is not None:
        trainer.rollout.mix = watch.writing(trainer.rollout.mix)
    with mock.patch.object(trainer, "_save_checkpoint"):
        return watch.steps_of(pair, trainer)


def theirs(pair: Pair, folder: Path, *, writes: int) -> list[Step]:
    """Steps of trl, from rows that are tokenised already."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = [
        {
            "prompt": pair.tokenizer.decode(row["input_ids"][: row["prompt_length"]]),
            "input_ids": row["input_ids"],
            "completion_mask": [int(place >= row["prompt_length"]) for place in range(len(row["input_ids"]))],
        }
        for row in pair.rows
    ]
    settings = GKDConfig(
        output_dir=str(folder),
        max_steps=pair.num_steps,
        per_device_train_batch_size=pair.batch_size,
        lmbda=float(writes > 0),
        beta=BETA,
        temperature=1.0,
        max_new_tokens=max(writes, 1),
        max_length=512,
        learning_rate=6e-3,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
    )
    watch = Stopwatch()
    trainer = GKDTrainer(
        model=pair.student,
        teacher_model=pair.teacher,
        args=settings,
        processing_class=pair.tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[watch],
    )
    trainer.generate_on_policy_outputs = watch.writing(trainer.generate_on_policy_outputs)
    return watch.steps_of(pair, trainer)


def heads_products(pair: Pair) -> float:
    """Seconds of what the models' heads compute in a step: the teacher's logits, the student's and their gradients."""
    num_ids, student_size = pair.student.lm_head.weight.shape
    num_positions = pair.batch_size * (len(pair.rows[0]["input_ids"]) - PROMPT_TOKENS)
    logits = torch.empty(num_positions, num_ids)
    student, teacher = (torch.randn(num_positions, size) for size in (student_size, pair.teacher.config.hidden_size))
    by_weight = torch.empty(num_ids, student_size)

    def products() -> float:
        began = CLOCK()
        torch.mm(teacher, pair.teacher.lm_head.weight.T, out=logits)
        torch.mm(student, pair.student.lm_head.weight.T, out=logits)
        logits @ pair.student.lm_head.weight
        torch.mm(logits.T, student, out=by_weight)
        return CLOCK() - began

    with torch.no_grad():
        return statistics.median([products() for _ in range(8)][1:])


SIDES = {"kdkit": ours, "kdkit ahead": partial(ours, ahead=AHEAD), "trl": theirs}


def medians(steps: Sequence[Step], of: Callable[[Step], float]) -> float:
    return statistics.median(map(of, steps))


def demo_pair() -> Pair:
    """The embedded teacher, and the embedded student before its first step."""
    folder = demo_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    rows = load_rows(folder / "train.jsonl", template="plain", limit=512)
    on_cpu = {"dtype": torch.float32, "device": "cpu"}
    return Pair(
        student=load_model(folder / "student", trainable=True, from_scratch=True, **on_cpu),
        teacher=load_model(folder / "teacher", **on_cpu),
        tokenizer=tokenizer,
        rows=encode_rows(rows, tokenizer, max_length=256, max_prompt_length=192).dataset,
        batch_size=32,
        num_steps=9,
    )


def large_pair() -> Pair:
    """Random weights in the shapes of SmolLM-135M and Qwen3-0.6B over one vocabulary, one row of 256 tokens a batch."""
    tokenizer = AutoTokenizer.from_pretrained(demo_folder() / "teacher")
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    shape = LlamaConfig.from_pretrained(shape_folder("smollm-135m"), **ids)
    qwen3 = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, len(tokenizer), (8, 256), generator=draws).tolist()
    row = {"prompt_length": PROMPT_TOKENS, "unit_ids": [-1] * 256}
    return Pair(
        student=LlamaForCausalLM(shape),
        teacher=Qwen3ForCausalLM(qwen3),
        tokenizer=tokenizer,
        rows=Dataset.from_list([{"input_ids": ids, "row_id": number, **row} for number, ids in enumerate(tokens)]),
        batch_size=1,
        num_steps=8,
    )


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock counts every thread's time, waiting for each other included."""
    pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads_by_the_wall(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user waits."""
    torch.set_num_threads(2)
    monkeypatch.setattr(sys.modules[__name__], "CLOCK", time.perf_counter)


@pytest.mark.benchmark(group="step")
@pytest.mark.filterwarnings("ignore")  # trl's own
class TestAgainstTrl:
    def test_the_demo_pair(self, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
        """A step on gold rows, and the mean of one on gold rows and one on the student's text: half of them each."""

        def measure() -> dict[tuple[str, int], float]:
            found: dict[tuple[str, int], list[Step]] = {}
            for number in range(NUM_TURNS):
                for side, train in SIDES.items():
                    for writes in (NEW_TOKENS,) if side == "kdkit ahead" else (0, NEW_TOKENS):
                        folder = tmp_path / f"{side}-{writes}-{number}"
                        folder.mkdir()
                        found.setdefault((side, writes), []).extend(train(demo_pair(), folder, writes=writes))
            # The mean of the steps that write, as one of several may write for all; it is the same for those that do.
            gold = {key: medians(steps, attrgetter("total")) for key, steps in found.items() if key[1] == 0}
            own = {key: statistics.mean(step.total for step in steps) for key, steps in found.items() if key[1]}
            return gold | own

        seconds = benchmark.pedantic(measure, rounds=1)
        gold = seconds["trl", 0] / seconds["kdkit", 0]
        theirs = seconds["trl", 0] + seconds["trl", NEW_TOKENS]
        half = theirs / (seconds["kdkit", 0] + seconds["kdkit", NEW_TOKENS])
        ahead = theirs / (seconds["kdkit", 0] + seconds["kdkit ahead", NEW_TOKENS])
        benchmark.extra_info["seconds"] = {
            f"{side}, {writes} new": round(s, 3) for (side, writes), s in seconds.items()
        }
        at = "demo pair, batch 32; processor, 1 thread"
        measured = {
            f"{at}; gold rows": gold,
            f"{at}; half the batches its own text": half,
            f"{at}; half its own text, {AHEAD} steps' written at once": ahead,
        }
        benchmark.extra_info["trl_over_kdkit"] = {name: round(ratio, 2) for name, ratio in measured.items()}
        show(
            benchmark,
            *(
                Row("a training step", name, "trl's GKDTrainer", f"{ratio:.1f} x as fast")
                for name, ratio in measured.items()
            ),
        )
        assert gold >= LEAST_GOLD
        assert half >= LEAST_HALF
        assert ahead >= LEAST_HALF_AHEAD

    @pytest.mark.usefixtures("two_threads_by_the_wall")
    def test_what_is_not_the_two_bodies(self, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
        """Of a pair of 135M and 600M parameters at 1 x 256; the optimizer's time, the same for both, stands apart."""

        def measure() -> tuple[dict[str, list[Step]], float]:
            found: dict[str, list[Step]] = {}
            for number in range(NUM_TURNS):
                for side, train in (("kdkit", ours), ("trl", theirs)):
                    (tmp_path / f"{side}-{number}").mkdir()
                    found.setdefault(side, []).extend(train(large_pair(), tmp_path / f"{side}-{number}", writes=0))
            return found, heads_products(large_pair())

        found, products = benchmark.pedantic(measure, rounds=1)
        parts = {
            side: {part: round(medians(steps, attrgetter(part)), 3) for part in PARTS} for side, steps in found.items()
        }
        outside = parts["kdkit"]["outside"] / parts["trl"]["outside"]
        share = medians(found["kdkit"], lambda step: step.outside / (step.total - step.optimizer))
        own = medians(found["kdkit"], lambda step: (step.outside - products) / (step.total - step.optimizer))
        benchmark.extra_info["seconds"] = parts | {"heads' products": round(products, 3)}
        benchmark.extra_info["kdkit_over_trl_outside"] = round(outside, 3)
        benchmark.extra_info["outside_fraction_of_kdkit"] = {"bodies": round(share, 3), "models": round(own, 3)}
        at = "135M student, 0.6B teacher, 1x256; wall, 2 threads"
        show(
            benchmark,
            Row("a step outside both bodies' passes", at, "trl's GKDTrainer", f"{outside:.2f} of its time"),
            Row(
                "a step outside both models' passes", at, "the step but AdamW", f"{own:.1%}; {share:.1%} with the heads"
            ),
        )
        assert outside <= MOST_OUTSIDE
        assert own <= MOST_SHARE
        assert share <= MOST_SHARE_WITH_HEADS

    @pytest.mark.usefixtures("two_threads_by_the_wall")
    def test_bfloat16_on_a_cpu_with_units_for_it(self, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
        """The same pair with both models' products in bfloat16, which `optim.precision` and `teacher.dtype` name."""
        if not (units := cpu_bfloat16_units()):
            pytest.skip("this CPU has none")

        def measure() -> dict[str, list[Step]]:
            found: dict[str, list[Step]] = {}
            for number in range(NUM_TURNS):
                for precision in ("float32", "bfloat16"):
                    pair, folder = large_pair(), tmp_path / f"{precision}-{number}"
                    folder.mkdir()
                    pair.teacher.to(getattr(torch, precision))
                    found.setdefault(precision, []).extend(ours(pair, folder, writes=0, precision=precision))
            return found

        found = benchmark.pedantic(measure, rounds=1)
        seconds = {name: medians(steps, attrgetter("total")) for name, steps in found.items()}
        ratio = seconds["float32"] / seconds["bfloat16"]
        benchmark.extra_info["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
        at = f"135M student, 0.6B teacher, 1x256; wall, 2 threads, {units}"
        show(benchmark, Row("a training step in bfloat16", at, "in float32", f"{ratio:.1f} x as fast"))
        assert ratio >= LEAST_BFLOAT16

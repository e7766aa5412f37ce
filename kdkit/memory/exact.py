"""The peak of a training step, counted: the real step on fake tensors, which have shapes and no memory.

Teacher, student, objective, averaging and optimizer are those of a run. What is not: values, so that the batch is the
costliest there is, and kernels of a card, for which `kdkit.memory.stand_ins` allocates as they do. Not counted: the
CUDA context, the work space of cuBLAS and the allocator's gaps.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from kdkit.config import DistillConfig, ObjectiveConfig
from kdkit.data.batch import Batch, DistillCollator, EncodedRow, batch_tensors
from kdkit.errors import UserError
from kdkit.loading import head_of, head_width, num_experts
from kdkit.losses import GroupedIds, HeadPassResult, VocabularyGroups, VocabularyMatch
from kdkit.losses.blocks import BLOCK_ENTRIES, BLOCK_ENTRIES_ELSEWHERE
from kdkit.losses.spans import Spans
from kdkit.memory.counting import LiveBytes
from kdkit.memory.generation import answer
from kdkit.memory.stand_ins import CardKernels, KernelAdamW, quantize
from kdkit.teacher.sources import LiveTeacher
from kdkit.training.averaging import WeightAverage
from kdkit.training.model import DistillModel
from kdkit.training.objective import Across, Moment, Objective, count_items
from kdkit.training.optimizer import parameter_groups

_HEAD_PASS = import_module("kdkit.losses.head_pass")  # its package has a function of that name
Kernels = Literal["card", "cpu"]
"""Whose allocations are counted."""

SHARED_IDS_FRACTION = 0.6
"""Of the smaller vocabulary, where `kd.across` is hybrid: SmolLM shares about this much with Qwen."""
_NUM_MOMENTS = 20
_NUM_PIECES = 3
_OPTIMIZER_RATE = 1e-3  # any: only what the step allocates is looked at


@dataclass(frozen=True)
class Counted:
    """What tensors of a run hold at most, each rounded up as the CUDA allocator does."""

    peak_bytes: int
    """The most at once, on the student's device."""
    teacher_peak_bytes: int
    """The most at once on the teacher's own device, 0 where it shares the student's."""
    phase: str
    """Where the peak is: teacher, student, backward, optimizer, evaluation or generation."""
    parts: dict[str, int]
    """What was alive at the peak; they sum to `peak_bytes`."""
    phases: dict[str, int]
    """The most at once in each phase, on the student's device."""


def count_step(
    config: DistillConfig,
    *,
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    precision: str,
    crosses: bool = False,
    kernels: Kernels = "card",
    fake: bool = True,
) -> Counted:
    """Run an optimizer step, an evaluation and an answer, and count what tensors hold.

    The batch is the costliest of its shape: `optim.batch_size` rows of `data.max_length` tokens, each but the first
    counted and a unit of its own; the last row one token shorter, so that there is padding as in nearly every batch.
    With accumulation it runs among the gradients of those before it. Schedules stand where most
    terms are on.

    Args:
        config: of one stage; its teacher and student are named by the two configs that follow.
        teacher: the teacher's config; its weights are never read.
        student: the student's.
        precision: what `auto` means on the machine: "float32", "float16" or "bfloat16".
        crosses: the two read text by different tokenizers. Without these, the comparison is taken to have as many
            groups as the smaller vocabulary has ids (grouped), or `SHARED_IDS_FRACTION` of them in pairs (hybrid).
        kernels: those of a card, or those of the CPU as it is.
        fake: False allocates everything, on the CPU: to test the count. Takes `kernels="cpu"`.
    Returns:
        `Counted`.
    Raises:
        UserError: the student has LoRA layers, or the teacher is not to be there while training.
    """
    _check_countable(config)
    is_apart = config.teacher.device not in ("auto", "cuda", "cuda:0")
    count = LiveBytes(
        FakeTensorMode(allow_non_fake_inputs=True) if fake else None,
        elsewhere=("teacher weights", "teacher's pass") if is_apart else (),
        num_experts=num_experts(teacher) or 1,
    )
    card = CardKernels(has_flash_attention=precision == "bfloat16") if kernels == "card" else None  # both from 8.0 on
    with count, nullcontext() if card is None else _on(card), _few_pieces() if fake else nullcontext():
        run = _Run.build(
            config,
            count,
            teacher=teacher,
            student=student,
            precision=precision,
            crosses=crosses,
            card=card,
        )
        run.train_step()
        run.evaluate()
        run.generate()
    phases = {name: peak.num_bytes for name, peak in count.peaks.items()}
    phase = max(phases, key=lambda name: phases[name])
    return Counted(
        peak_bytes=phases[phase],
        teacher_peak_bytes=max(peak.elsewhere_bytes for peak in count.peaks.values()),
        phase=phase,
        parts=dict(sorted(count.peaks[phase].parts.items(), key=lambda item: -item[1])),
        phases=phases,
    )


def _check_countable(config: DistillConfig) -> None:
    """Refuse what the step below is not the step of."""
    if config.student.lora is not None:
        raise UserError(
            "LoRA layers cannot be counted on tensors without values: leave --exact out, the estimate has them"
        )
    if config.teacher.cache is not None or config.teacher.device == "offload":
        raise UserError(
            "a step is counted with the teacher on a card: leave --exact out for a cached or an offloaded one, the "
            "estimate has them"
        )


class _LabelledObjective(Objective):
    """The objective, whose allocations belong to the divergence or to the other terms."""

    def __init__(self, config: ObjectiveConfig, count: LiveBytes, *, across: Across | None) -> None:
        super().__init__(config, across=across)
        self.count = count

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with self.count.part("other terms"):
            return super().__call__(*args, **kwargs)

    def _vocabulary_pass(self, *args: Any, **kwargs: Any) -> HeadPassResult:
        with self.count.part("divergence"):
            return super()._vocabulary_pass(*args, **kwargs)


@dataclass(eq=False)
class _Run:
    """Models, optimizer and all else of a stage, as a trainer holds them."""

    config: DistillConfig
    count: LiveBytes
    teacher: LiveTeacher
    model: DistillModel
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    dtype: torch.dtype
    """Of the student's autocast."""
    crosses: bool
    card: CardKernels | None

    @classmethod
    def build(
        cls,
        config: DistillConfig,
        count: LiveBytes,
        *,
        teacher: PreTrainedConfig,
        student: PreTrainedConfig,
        precision: str,
        crosses: bool,
        card: CardKernels | None,
    ) -> "_Run":
        """Everything that is there before the first step."""
        with count.part("teacher weights"):
            source = _build_teacher(config, teacher, precision=precision)
        with count.part("student weights"):
            learner = _build_model(student, torch.float32, config.student.attention)
            if config.student.gradient_checkpointing:
                learner.activation_checkpointing_enable({"use_reentrant": False} | _recomputing(card))
        widths = head_width(learner), head_width(source.model)
        vocab_size = min(widths) if widths[0] != widths[1] and not crosses else None
        source.vocab_size = vocab_size
        with count.part("batch"):
            across = _relate(config.objective, widths) if crosses else None
        objective = _LabelledObjective(config.objective, count, across=across)
        with count.part("adapters"), no_init_weights() if count.fake else nullcontext():
            model = DistillModel(
                learner, objective, teacher=source.shape, vocab_size=vocab_size, dense=_is_dense(learner)
            ).train()
        with count.part("average of the weights"):
            average = None if config.optim.ema is None else WeightAverage(model, config.optim.ema)
        asked = precision if config.optim.precision == "auto" else config.optim.precision
        optimizer = _build_optimizer(config, model, is_card=card is not None)
        run = cls(config, count, source, model, optimizer, average, getattr(torch, asked), crosses, card)
        run._prime_optimizer()
        return run

    def train_step(self) -> None:
        """The micro-batches of a window, and what the optimizer makes of their gradients."""
        with self.count.part("batch"):
            batch = _costliest_batch(self.config, self.config.optim.batch_size, crosses=self.crosses)
        self.count.hold(batch_tensors(batch).values(), "batch")
        if self.config.optim.accumulation > 1:
            self._accumulate()
        loss = self._forward(batch)
        with self.count.phase("backward"), self.count.part("backward"):
            loss.backward()
        del loss
        with self.count.phase("optimizer"), self.count.part("optimizer step"):
            self._update()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self) -> None:
        """The objective over two batches of validation rows: the first one's signal is there while the second runs."""
        self.model.eval()
        size = self.config.evaluation.batch_size
        with self.count.phase("evaluation"), self.count.part("evaluation"), self._averaged():
            batch = _costliest_batch(self.config, size, crosses=self.crosses)
            moment = self._moment(batch)
            signal = None
            for _ in range(2):
                with self.count.part("teacher's pass"):
                    signal = self.teacher(batch, self.model.objective.views_at(moment))
            with self._autocast(), self.count.part("student's activations"):
                self.model(batch, signal=signal, moment=moment, extras=("label_logprobs",))

    @torch.no_grad()
    def generate(self) -> None:
        """Answers of the student while it trains, and of the teacher when the run is over."""
        data, evaluation, rollout = self.config.data, self.config.evaluation, self.config.rollout
        student = self.model.student.eval()
        with self.count.phase("generation"), self.count.part("generation"):
            num_rows = evaluation.batch_size * evaluation.num_beams
            if evaluation.generate_rows != 0:
                with self._averaged():
                    answer(student, num_rows, data.max_prompt_length, evaluation.max_new_tokens)
            if rollout.is_on:
                rows = self.config.rows_written_together
                with self._autocast():
                    answer(student, rows * rollout.num_beams, data.max_prompt_length, rollout.max_new_tokens)
        del student, self.model, self.optimizer, self.average
        if evaluation.teacher:
            with self.count.phase("generation"), self.count.part("teacher's pass"):
                answer(self.teacher.model, num_rows, data.max_prompt_length, evaluation.max_new_tokens)

    def _forward(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch; all that nothing holds for the backward pass is gone afterwards."""
        moment = self._moment(batch)
        signal = None
        if self.config.objective.needs_teacher:
            with self.count.phase("teacher"), self.count.part("teacher's pass"):
                signal = self.teacher(batch, self.model.objective.views_at(moment))
        with self.count.phase("student"), self.count.part("student's activations"), self._autocast():
            return self.model(batch, signal=signal, moment=moment)["loss"]

    def _update(self) -> None:
        """Clipping and the optimizer's step; the copy that the norm of the change is taken from is on the host."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        nn.utils.clip_grad_norm_(trained, self.config.optim.max_grad_norm, foreach=self.card is not None or None)
        before = [] if self.card is not None else [parameter.detach().clone() for parameter in trained]
        self.optimizer.step()
        del before

    def _accumulate(self) -> None:
        """Gradients as the micro-batches before leave them."""
        with self.count.part("gradients"):
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def _prime_optimizer(self) -> None:
        """A step without gradients, which makes the optimizer's states; from then on gradients are told apart."""
        with self.count.part("optimizer states"):
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._hold_gradient)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _hold_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.count.hold([parameter.grad], "gradients")

    def _moment(self, batch: Batch) -> Moment:
        """When most terms are on, and as many experts as ever."""
        counts = {name: float(number) for name, number in count_items(batch).items()}
        moments = [Moment(step, _NUM_MOMENTS, counts) for step in range(_NUM_MOMENTS + 1)]

        def cost(moment: Moment) -> tuple[int, int]:
            experts = self.model.objective.views_at(moment).experts
            active = sum(term.weight(moment) > 0 for term in self.model.objective.terms)
            return active, experts[1] if experts else 0

        return max(moments, key=cost)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.in_place()


@contextmanager
def _on(card: CardKernels) -> Iterator[None]:
    """A card's kernels, and the size of its blocks in the head pass."""
    kept = BLOCK_ENTRIES["cpu"]
    BLOCK_ENTRIES["cpu"] = BLOCK_ENTRIES_ELSEWHERE
    try:
        with card:
            yield
    finally:
        BLOCK_ENTRIES["cpu"] = kept


@contextmanager
def _few_pieces() -> Iterator[None]:
    """The first pieces of a head pass and its last one: without values all others are the same again."""

    def few(rows: slice, size: int, spans: Spans | None) -> Iterator[slice]:
        found = list(_HEAD_PASS.pieces(rows, size, spans))
        yield from found if len(found) <= _NUM_PIECES else [*found[: _NUM_PIECES - 1], found[-1]]

    vars(_HEAD_PASS)["walk"] = few
    try:
        yield
    finally:
        vars(_HEAD_PASS)["walk"] = _HEAD_PASS.pieces


def _recomputing(card: CardKernels | None) -> dict[str, Any]:
    """Takes a card's kernels into the recomputation, as torch leaves such modes when a backward pass begins."""
    return {} if card is None else {"context_fn": lambda: (nullcontext(), copy(card))}


def _build_model(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """A model of the right sizes; fake weights need no values."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype, **chosen)
    model.tie_weights()
    return model


def _build_teacher(config: DistillConfig, teacher: PreTrainedConfig, *, precision: str) -> LiveTeacher:
    """The teacher in its dtype, or in its few bits."""
    asked: str = config.teacher.dtype
    if asked == "auto":
        asked = "float32" if config.teacher.device == "cpu" else precision
    model = _build_model(teacher, getattr(torch, asked), config.teacher.attention)
    if config.teacher.quantization is not None:
        quantize(model, config.teacher.quantization)
    return LiveTeacher(model, dense=_is_dense(model), chunk_tokens=config.objective.chunk_tokens)


def _is_dense(model: PreTrainedModel) -> bool:
    """Whether the head cannot be had apart, as far as its shape tells."""
    try:
        head_of(model)
    except ValueError:
        return True
    return False


def _build_optimizer(config: DistillConfig, model: DistillModel, *, is_card: bool) -> torch.optim.Optimizer:
    """As the trainer builds it: on a card in its fused form."""
    groups = parameter_groups(
        model,
        {name for name, parameter in model.named_parameters() if parameter.dim() > 1},  # neither norms nor biases
        weight_decay=config.optim.weight_decay,
        adapter_rate=config.objective.adapter_learning_rate,
    )
    if config.optim.optimizer == "adamw_torch" and not is_card:
        return torch.optim.AdamW(groups, lr=_OPTIMIZER_RATE)
    if config.optim.optimizer == "adamw_torch":
        return KernelAdamW(groups)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return KernelAdamW(groups, in_8_bits=[weight for weight in model.parameters() if weight not in embeddings])


def _costliest_batch(config: DistillConfig, num_rows: int, *, crosses: bool) -> Batch:
    """Rows that are as long as can be, every token a unit and a span."""
    longest = config.data.max_length
    lengths = [longest] * (num_rows - 1) + [longest - 1 if num_rows > 1 else longest]
    return DistillCollator(0, teacher_pad_token_id=0)([_row(length, crosses=crosses) for length in lengths])


def _row(length: int, *, crosses: bool) -> EncodedRow:
    units = list(range(-1, length - 1))
    row = EncodedRow(input_ids=[1] * length, prompt_length=1, unit_ids=units, row_id=0)
    if crosses:
        row["span_ids"] = units
        row["teacher"] = EncodedRow(**row)
    return row


def _relate(config: ObjectiveConfig, widths: tuple[int, int]) -> Across:
    """Ids that are related in a plausible way: only the tokenizers know how many truly are."""
    if config.kd.weight.largest == 0 or config.kd.across == "uld":
        return Across()
    if config.kd.across == "hybrid":
        shared = torch.arange(int(SHARED_IDS_FRACTION * min(widths)))
        return Across(match=VocabularyMatch(shared, shared, *widths))
    sides = (GroupedIds(torch.arange(width) % min(widths), min(widths)) for width in widths)
    return Across(groups=VocabularyGroups(*sides))

"""The peak of a distillation step by named part, from two configs and the run's settings: nothing is loaded.

A run is a few phases, each with parts that are alive at its worst moment; the peak is the largest sum. What stays over
all phases (weights, optimizer states) is in each of them.
"""

from dataclasses import dataclass, field

from kdkit.config import DistillConfig
from kdkit.config.objective import CACHED_IDS, LAST_HIDDEN_TERMS
from kdkit.errors import UserError
from kdkit.memory.activations import (
    HALF,
    SINGLE,
    backward_bytes,
    kept_bytes,
    kv_cache_bytes,
    passing_bytes,
)
from kdkit.memory.cards import Card
from kdkit.memory.sizes import ModelSizes, lora_params
from kdkit.runtime import FULL_FRACTION, GIB, INT8_CAPABILITY, NF4_BLOCK

OFFLOAD = "offload"
"""The teacher's device where its layers stay in the host's memory."""
CONTEXT_BYTES = round(0.45 * GIB)
"""What CUDA, its libraries' kernels and cuBLAS' workspace take of a card before the first tensor."""
SLACK_FRACTION = 0.05
"""Of what comes and goes: blocks that the allocator holds and cannot use, by rounding and in between others."""
NF4_BYTES = 0.5 + SINGLE / NF4_BLOCK
"""A weight in NF4: half a byte, and its share of a scale."""
BLOCK_BYTES = 2**22 * SINGLE
"""Entries of the logits that the losses take at a time on a card, float32."""
NUM_BLOCKS = 9
"""Tensors of that size alive at once: log-probabilities of both sides, the loss's own, gradients."""
NUM_DTW_MATRICES = 6
"""Tensors (3B, U, U) float32 alive at once in soft-DTW's divergence: costs, alignment, gradient."""
NUM_DTW_STATES = 8
"""Tensors (B, U, H) float32 alive at once beside them: pooled, projected, normalised states of both sides."""

Parts = dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part for every phase of a run, on the student's card and on the teacher's own where it has one."""

    card: Card
    precision: str
    """Of the student's products."""
    phases: dict[str, Parts]
    """Phase -> part -> bytes, on the student's card."""
    beside: dict[str, Parts] = field(default_factory=dict)
    """The same on the teacher's own card; empty where it shares the student's."""
    notes: tuple[str, ...] = ()
    """What the reader has to know."""

    @property
    def peak_phase(self) -> str:
        """In which the student's card is fullest."""
        return self.fullest[0]

    @property
    def parts(self) -> Parts:
        """What is there at the peak."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        """On the student's card."""
        return sum(self.parts.values())

    @property
    def beside_bytes(self) -> int:
        """The peak on the teacher's own card; 0 where it shares the student's."""
        return max((sum(parts.values()) for parts in self.beside.values()), default=0)

    @property
    def fullest(self) -> tuple[str, ...]:
        """The fullest phase of each card."""
        return tuple(
            max(phases, key=lambda phase: sum(phases[phase].values()))
            for phases in (self.phases, self.beside)
            if phases
        )

    @property
    def fullest_parts(self) -> tuple[Parts, ...]:
        """What is on each card in its fullest phase."""
        return tuple(phases[name] for phases, name in zip((self.phases, self.beside), self.fullest, strict=False))

    @property
    def tensor_bytes(self) -> int:
        """The peak without context and slack: what `--exact` counts."""
        return max(
            sum(size for part, size in parts.items() if part not in (CONTEXT, SLACK)) for parts in self.phases.values()
        )

    @property
    def used_fraction(self) -> float:
        """Of the fuller card."""
        return max(self.peak_bytes, self.beside_bytes) / self.card.memory_bytes

    @property
    def fits(self) -> bool:
        """Whether no card is fuller than an estimate can promise."""
        return self.used_fraction <= FULL_FRACTION


CONTEXT, SLACK = "CUDA context", "allocator slack"
WEIGHTS_OF_TEACHER, WEIGHTS_OF_STUDENT = "teacher weights", "student weights"


def estimate_memory(
    config: DistillConfig, *, teacher: ModelSizes, student: ModelSizes, card: Card, precision: str | None = None
) -> MemoryPlan:
    """The plan of a config's stage on a card.

    The worst batch is assumed: every row as long as `data.max_length`, one token of it prompt, each token a unit.

    Args:
        config: the run, or one stage of it.
        teacher: the teacher's sizes.
        student: the student's sizes.
        card: on which it is to run.
        precision: of the student's products; None: what the config says, for this card.
    Returns:
        `MemoryPlan`.
    Raises:
        UserError: the card cannot compute with the teacher's weights as they are asked for.
    """
    if config.teacher.quantization == "int8" and card.capability < INT8_CAPABILITY:
        asked, has = (".".join(map(str, capability)) for capability in (INT8_CAPABILITY, card.capability))
        raise UserError(f"int8 needs compute capability {asked}, and the {card.name} has {has}: take nf4")
    kind, _, index = config.teacher.device.partition(":")
    if kind == "cuda" and int(index or 0) >= card.num_cards:
        raise UserError(f"teacher.device is cuda:{index}, and {card.name} is {card.num_cards} card(s): take auto")
    return _Estimate(config, teacher, student, card, precision or _resolved(config.optim.precision, card)).plan()


def _resolved(asked: str, card: Card) -> str:
    return card.precision if asked == "auto" else asked


def _number(dtype: str) -> int:
    return SINGLE if dtype == "float32" else HALF


@dataclass(frozen=True)
class _Estimate:
    """One config on one card, while it is added up."""

    config: DistillConfig
    teacher: ModelSizes
    student: ModelSizes
    card: Card
    precision: str

    def plan(self) -> MemoryPlan:
        """All phases."""
        phases: dict[str, Parts] = {}
        beside: dict[str, Parts] = {}
        held = self._held()
        if self._needs_teacher:
            target, own = (beside, self._teacher_weights()) if self._is_beside else (phases, held)
            target["teacher"] = own | self._accumulated(on_student=not self._is_beside) | self._teacher_pass()
            if self._is_beside:
                target["evaluation"] = own | self._teacher_pass(self.config.evaluation.batch_size)
        phases["student"] = held | self._accumulated() | self._waiting() | {"divergence": self._head_pass_bytes()}
        phases["terms"] = held | self._accumulated() | self._waiting() | self._held_by_head() | self._terms()
        phases["backward"] = held | self._backward()
        phases["optimizer"] = held | {"gradients": self._gradient_bytes}
        phases["evaluation"] = held | self._evaluation()
        if self.config.rollout.is_on:
            phases["rollout"] = held | self._half_copies() | self._writing()
        if self._is_teacher_measured:
            target = beside if self._is_beside else phases
            target["teacher's answers"] = self._teacher_weights() | self._answering(self.teacher)
        return MemoryPlan(
            self.card,
            self.precision,
            {name: self._on_a_card(parts) for name, parts in phases.items()},
            {} if self._is_on_host else {name: self._on_a_card(parts) for name, parts in beside.items()},
            tuple(self._notes()),
        )

    # ---- what the config says ----

    @property
    def _needs_teacher(self) -> bool:
        """Whether the model itself is in memory while training."""
        return self.config.objective.needs_teacher and self.config.teacher.cache is None

    @property
    def _is_beside(self) -> bool:
        """Whether the teacher is not on the student's card."""
        device = self.config.teacher.device
        return self.card.num_cards > 1 if device == "auto" else device not in ("cuda", "cuda:0", OFFLOAD)

    @property
    def _is_on_host(self) -> bool:
        """Whether the teacher computes on the CPU, whose memory is not planned."""
        return self.config.teacher.device == "cpu"

    @property
    def _number(self) -> int:
        """Bytes of a number in the student's products."""
        return _number(self.precision)

    @property
    def _base_number(self) -> int:
        """Bytes of a student's weight: less than float32 where it is frozen under LoRA."""
        lora = self.config.student.lora
        return SINGLE if lora is None else _number(_resolved(lora.base_dtype, self.card))

    @property
    def _teacher_number(self) -> int:
        return _number(_resolved(self.config.teacher.dtype, self.card))

    @property
    def _rows(self) -> int:
        return self.config.optim.batch_size

    @property
    def _length(self) -> int:
        return self.config.data.max_length

    @property
    def _num_tokens(self) -> int:
        return self._rows * self._length

    @property
    def _lora_params(self) -> int:
        lora = self.config.student.lora
        if lora is None:
            return 0
        return lora_params(self.student, rank=lora.rank, target_modules=lora.target_modules)

    @property
    def _trained_params(self) -> int:
        """What has gradients and states: all of the student, or its LoRA layers; and the adapters."""
        return (self._lora_params or self.student.num_params) + self._adapter_params

    @property
    def _gradient_bytes(self) -> int:
        return SINGLE * self._trained_params

    @property
    def _adapter_params(self) -> int:
        """The projector from the student's to the teacher's width."""
        weights = self.config.objective.weights
        projects = any(weights[name].largest > 0 for name in ("dtw", "hidden", "contrastive", "routing"))
        both = self.student.hidden * self.teacher.hidden + self.teacher.hidden
        pairs = 0
        if weights["layerwise"].largest > 0:
            fewest = min(self.student.num_layers, self.teacher.num_layers)
            pairs = self.config.objective.layerwise.num_pairs or fewest
        return both * ((1 if projects else 0) + pairs)

    # ---- what stays ----

    def _held(self) -> Parts:
        trained = self._trained_params
        parts = {} if self._is_beside or not self._needs_teacher else self._teacher_weights()
        parts[WEIGHTS_OF_STUDENT] = self._base_number * self.student.num_params + SINGLE * self._lora_params
        parts["adapters"] = SINGLE * self._adapter_params
        parts["optimizer states"] = 2 * SINGLE * trained
        if self.config.optim.optimizer == "adamw_8bit":
            embeddings = 0 if self._lora_params else self.student.embedding_params
            in_32_bits = embeddings + self._adapter_params
            parts["optimizer states"] = 2 * (trained - in_32_bits) + 2 * SINGLE * in_32_bits
        if self.config.optim.ema is not None:
            parts["average of the weights"] = SINGLE * trained
        return parts

    def _teacher_weights(self) -> Parts:
        sizes, number = self.teacher, self._teacher_number
        packed = sizes.product_params - sizes.stacked_params
        size = {None: float(number), "nf4": NF4_BYTES, "int8": 1.0}[self.config.teacher.quantization]
        if self.config.teacher.device == OFFLOAD:  # a layer at a time, and what is around the layers
            moved = sizes.product_params
            return {WEIGHTS_OF_TEACHER: number * (sizes.num_params - moved + moved // sizes.num_layers)}
        return {WEIGHTS_OF_TEACHER: round(packed * size) + (sizes.num_params - packed) * number}

    def _accumulated(self, *, on_student: bool = True) -> Parts:
        """Gradients of the micro-batches before."""
        return {"gradients": self._gradient_bytes} if on_student and self.config.optim.accumulation > 1 else {}

    # ---- the teacher's pass ----

    def _teacher_pass(self, rows: int | None = None) -> Parts:
        rows = rows or self._rows
        return {"teacher's pass": self._teacher_passing(rows) + self._signal_bytes(rows)}

    def _teacher_passing(self, rows: int) -> int:
        passing = passing_bytes(
            self.teacher,
            num_rows=rows,
            length=self._length,
            number=self._teacher_number,
            attention=self.config.teacher.attention or "sdpa",
            all_layers=self.config.objective.layerwise.weight.largest > 0,
        )
        if self.config.teacher.quantization is not None:  # one product at a time is unpacked
            passing += self._teacher_number * self.teacher.hidden * self.teacher.intermediate
        return passing

    def _signal_bytes(self, rows: int) -> int:
        """States of all tokens, those of the counted ones, and what else the terms look at."""
        weights, sizes = self.config.objective.weights, self.teacher
        states = 2 * rows * self._length * sizes.hidden * self._teacher_number
        if weights["layerwise"].largest > 0:
            states += rows * self._length * sizes.hidden * self._teacher_number * sizes.num_layers
        if weights["attention"].largest > 0:
            maps = rows * sizes.num_heads * self._length**2 * self._teacher_number
            states += maps * sizes.num_layers
        return states

    def _cached_bytes(self, rows: int) -> int:
        """Ids and log-probabilities of all tokens of a batch, and states where a term looks at them."""
        num_tokens, k = rows * self._length, self.config.objective.kd.top_k or CACHED_IDS
        compares_states = any(self.config.objective.weights[name].largest > 0 for name in LAST_HIDDEN_TERMS)
        states = HALF * self.teacher.hidden * 2 if compares_states else 0
        return num_tokens * (k * (HALF + SINGLE) + states)

    # ---- the student's pass ----

    def _waiting(self) -> Parts:
        """What a forward pass leaves for the backward pass, before any loss."""
        parts = {
            "student's activations": kept_bytes(
                self.student,
                num_rows=self._rows,
                length=self._length,
                number=self._number,
                attention=self.config.student.attention or "sdpa",
                repeats_kv=not (self.card.has_flash_attention and self._number == HALF),
                checkpointing=self.config.student.gradient_checkpointing,
            )
        }
        parts |= self._half_copies()
        if self.config.teacher.cache is not None:
            parts["teacher's signal"] = self._cached_bytes(self._rows)
        elif self._needs_teacher and not self._is_beside:
            parts["teacher's signal"] = self._signal_bytes(self._rows)
        return parts

    def _half_copies(self) -> Parts:
        """Weights that autocast has cast: it keeps them until a forward pass ends, recomputed layers or not."""
        has_copies = self._number == HALF and self._base_number == SINGLE
        return {"half-precision copies": HALF * self.student.product_params} if has_copies else {}

    @property
    def _head_gradient_bytes(self) -> int:
        """Of its weight; LoRA leaves the head as it is."""
        return 0 if self._lora_params else SINGLE * self.student.vocab_size * self.student.hidden

    def _held_by_head(self) -> Parts:
        """Gradients by the head's inputs and weight, which its pass has formed already."""
        return {"divergence": self._head_gradient_bytes + SINGLE * self._num_tokens * self.student.hidden}

    @property
    def _block_bytes(self) -> int:
        """Of one tensor that the losses work on; comparing K ids alone spares less than one of them, counted."""
        chunk = min(self.config.objective.chunk_tokens, self._num_tokens)
        return min(BLOCK_BYTES, chunk * self.student.vocab_size * SINGLE)

    def _chunk_bytes(self) -> int:
        """The chunked pass besides its gradients: the head's copy, logits of both sides, blocks in float32."""
        chunk = min(self.config.objective.chunk_tokens, self._num_tokens)
        logits = chunk * self.student.vocab_size * self._number
        if self._needs_teacher:
            logits += chunk * self.teacher.vocab_size * self._teacher_number
        copy = self.student.vocab_size * self.student.hidden * HALF if self._number == HALF else 0
        return copy + logits + self._block_bytes * NUM_BLOCKS

    def _head_pass_bytes(self) -> int:
        """The chunked pass at its fullest, gradients by the head's inputs and weight included."""
        has_product = self._number == HALF and not self._lora_params
        product = self.student.vocab_size * self.student.hidden * HALF if has_product else 0  # a chunk's, by the weight
        rows = SINGLE * self._num_tokens * self.student.hidden
        return self._held_by_head()["divergence"] + self._chunk_bytes() + product + rows

    def _terms(self) -> Parts:
        """What the terms over hidden states have alive beside the activations."""
        weights, parts = self.config.objective.weights, {}
        states = SINGLE * self._num_tokens * self.teacher.hidden
        if weights["dtw"].largest > 0:
            matrices = 3 * self._rows * self._length**2 * SINGLE * NUM_DTW_MATRICES
            parts["dtw"] = matrices + NUM_DTW_STATES * states
        others = [name for name in ("hidden", "routing") if weights[name].largest > 0]
        size = len(others) * 4 * states
        if weights["contrastive"].largest > 0:
            size += 3 * SINGLE * self._num_tokens**2 + 4 * states
        if weights["layerwise"].largest > 0:
            size += 4 * states * self.student.num_layers
        if weights["attention"].largest > 0:
            size += 3 * SINGLE * self._rows * self.student.num_heads * self._length**2
        if size:
            parts["feature terms"] = size
        return parts

    # ---- the way back, the optimizer's step, evaluation ----

    def _backward(self) -> Parts:
        """The fuller of its two ends: all activations and the head's gradient, or all gradients."""
        waiting, head = self._waiting(), self._head_gradient_bytes
        if self.config.student.gradient_checkpointing and "half-precision copies" in waiting:  # cast layer by layer
            waiting["half-precision copies"] //= self.student.num_layers
        working = backward_bytes(self.student, num_tokens=self._num_tokens, number=self._number)
        start = {**self._accumulated(), **waiting, "divergence": 2 * head, "backward": working}
        end = {"gradients": self._gradient_bytes, "backward": working + head}
        return max(start, end, key=lambda parts: sum(parts.values()))

    def _evaluation(self) -> Parts:
        """The fuller of answering rows and of measuring the objective, without gradients."""
        evaluation, data = self.config.evaluation, self.config.data
        moments = [self._measuring(evaluation.batch_size)]
        if self._needs_teacher and not self._is_beside:
            moments.append(self._teacher_pass(evaluation.batch_size))
        if evaluation.generate_rows != 0:
            rows = min(evaluation.batch_size, evaluation.generate_rows or evaluation.batch_size)
            length = data.max_prompt_length + evaluation.max_new_tokens
            moments.append(self._generation(rows=rows * evaluation.num_beams, length=length, number=SINGLE))
        own = {} if self.config.optim.ema is None else {"weights set aside": SINGLE * self._trained_params}
        return own | max(moments, key=lambda parts: sum(parts.values()))

    def _measuring(self, rows: int) -> Parts:
        """The student's pass over a batch of the evaluation, and its losses."""
        seeing = passing_bytes(
            self.student,
            num_rows=rows,
            length=self._length,
            number=self._number,
            attention=self.config.student.attention or "sdpa",
        )
        parts = {"student's activations": seeing, **self._half_copies(), "divergence": self._chunk_bytes()}
        if self._needs_teacher and not self._is_beside:
            parts["teacher's signal"] = 2 * self._signal_bytes(rows)  # the batch before's is there for a while
        return parts

    @property
    def _is_teacher_measured(self) -> bool:
        """Whether the teacher answers rows when the run is over and the student is gone."""
        return self.config.evaluation.teacher and self.config.objective.needs_teacher

    def _writing(self) -> Parts:
        """The student's own text to the prompts of a step, all of them together unless the config says how many."""
        rollout, rows = self.config.rollout, self.config.rows_written_together
        length = self.config.data.max_prompt_length + rollout.max_new_tokens
        return self._generation(rows=rows * rollout.num_beams, length=length, number=self._number)

    def _answering(self, sizes: ModelSizes) -> Parts:
        """The teacher's answers, in its own precision."""
        evaluation, data = self.config.evaluation, self.config.data
        rows, number = evaluation.batch_size * evaluation.num_beams, self._teacher_number
        prompt, length = data.max_prompt_length, data.max_prompt_length + evaluation.max_new_tokens
        seeing = passing_bytes(sizes, num_rows=rows, length=prompt, number=number, attention="sdpa")
        cache = kv_cache_bytes(sizes, num_rows=rows, length=length, number=number)
        return {"KV cache": cache, "generation": seeing + 3 * rows * sizes.vocab_size * SINGLE}

    def _generation(self, *, rows: int, length: int, number: int) -> Parts:
        prompt = min(length, self.config.data.max_prompt_length)
        seeing = passing_bytes(self.student, num_rows=rows, length=prompt, number=SINGLE, attention="sdpa")
        logits = 3 * rows * self.student.vocab_size * SINGLE
        cache = kv_cache_bytes(self.student, num_rows=rows, length=length, number=number)
        return {"KV cache": cache, "generation": seeing + logits}

    # ---- around it ----

    def _on_a_card(self, parts: Parts) -> Parts:
        """With context and slack; empty parts left out."""
        stays = (WEIGHTS_OF_TEACHER, WEIGHTS_OF_STUDENT, "adapters", "optimizer states", "average of the weights")
        coming = sum(size for name, size in parts.items() if name not in stays)
        whole = parts | {CONTEXT: CONTEXT_BYTES, SLACK: round(SLACK_FRACTION * coming)}
        return {name: size for name, size in whole.items() if size}

    def _notes(self) -> list[str]:
        notes = []
        sizes, quantization = self.teacher, self.config.teacher.quantization
        if quantization is not None and sizes.stacked_params:
            share = sizes.stacked_params / sizes.num_params
            notes.append(
                f"{share:.0%} of the teacher are stacked experts, which bitsandbytes leaves in half precision: "
                f"{quantization} packs the rest alone"
            )
        if self.config.student.lora is not None:
            notes.append("LoRA: activations are planned as without it, which is a little more than there are")
        if self.config.objective.kd.top_k is not None and self._needs_teacher:
            notes.append(
                f"top_k={self.config.objective.kd.top_k} saves at most {self._block_bytes / 2**20:.0f} MiB while the "
                "teacher is live: its logits over all ids are formed chunk by chunk all the same"
            )
        return notes

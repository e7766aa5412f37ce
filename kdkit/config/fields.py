"""The fields of a run: unit, range, default, and where the default comes from."""

import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from kdkit.config.objective import LAST_HIDDEN_TERMS, UNIT_TERMS, ObjectiveConfig
from kdkit.config.part import Count, Limit, Part
from kdkit.config.rollout import RolloutConfig

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]


class TeacherConfig(Part):
    """The model to learn from."""

    path: str
    """Folder or hub name of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None is its main branch."""
    dtype: DtypeName = "auto"
    """Weights in memory; auto: float32 on CPU, bfloat16 where the card has it in hardware, else float16."""
    quantization: Literal["nf4", "int8"] | None = None
    """Weights in 4 or 8 bits (bitsandbytes, GPU only); int8 needs a card of 2018 or newer."""
    device: str = "auto"
    """auto: another card where one process has several, else the student's. A card is named as cuda:1. offload, the
    last resort: weights stay in the machine's memory, and each layer goes to the student's device when it computes. A
    pass then takes as long as all weights take over the bus (7B in 16 bits: 14 GB, over a second); an answer takes
    that for each token, so that evaluation.teacher=false is worth a thought."""
    attention: str | None = None
    """Attention implementation as transformers names it; None is the model's own choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""
    cache: str | None = None
    """Folder that `kdkit cache` wrote: stages read there what the teacher says, and load no teacher."""

    @field_validator("device")
    @classmethod
    def _device_exists(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|offload|cuda(:\d+)?", device):
            raise ValueError("allowed: auto, cpu, offload, cuda, or a card by its number such as cuda:1")
        return device

    @model_validator(mode="after")
    def _offload_is_of_plain_weights(self) -> "TeacherConfig":
        if self.device == "offload" and self.quantization is not None:
            raise ValueError(
                f"device offload moves weights as they are, and quantization {self.quantization} packs them for one "
                "card: set quantization=null, or give another device"
            )
        return self


class LoraConfig(Part):
    """LoRA layers in a frozen student (peft): the weights that are trained and checkpointed are a hundredth of its own,
    with as much less for gradients and optimizer. A finished student has them merged in, and holds them apart in
    `model/lora` too; stages go on with the same layers. Experts of an MoE student stay as they are. Not under FSDP."""

    rank: Count = 16
    """Width of each layer's two factors. LoRA (arXiv:2106.09685) has 1 to 64, peft 8."""
    alpha: float = Field(default=32.0, gt=0)
    """What is learnt counts alpha / rank times: 2, as "LoRA Learns Less and Forgets Less" has it (arXiv:2405.09673)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the layers' input while training; 0 as in peft."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Layers by the end of their name, such as [q_proj, v_proj]; all-linear: all but the head (QLoRA)."""
    base_dtype: DtypeName = "auto"
    """Frozen weights in memory; auto: float32 on CPU, bfloat16 where the card has it in hardware, else float16."""


class StudentConfig(Part):
    """The model to train; what is trained of it is always float32."""

    path: str
    """Folder or hub name of a causal language model, or of a config when `from_scratch`."""
    from_scratch: bool = False
    """Start from random weights, seeded by `seed`."""
    tokenizer: str | None = None
    """Folder or hub name of its tokenizer; None: its own, or the teacher's where it starts from scratch."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None is its main branch."""
    attention: str | None = None
    """Attention implementation as transformers names it; None is the model's own choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train LoRA layers alone; None: all weights. {} takes the defaults; the learning rate wants to be higher then."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""

    @model_validator(mode="after")
    def _lora_has_something_to_start_from(self) -> "StudentConfig":
        if self.lora is not None and self.from_scratch:
            raise ValueError(
                "lora leaves the student's weights as they are, and from_scratch makes them random: set lora=null, or "
                "from_scratch=false"
            )
        return self


class DataConfig(Part):
    """Rows: a JSONL, CSV or Parquet file, a `datasets` folder or a hub name."""

    train: str
    """Rows to train on."""
    validation: str
    """Rows to evaluate on while training."""
    test: str | None = None
    """Rows for the final figures; None uses the validation rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the columns where they are not found by themselves, for instance {instruction: question}."""
    template: str = "alpaca"
    """alpaca, plain, chat, or a format string with {instruction} and {input}."""
    train_template: str | None = None
    """Of the training rows where it is another one: "{instruction}" for what `kdkit cache --generate` wrote."""
    max_length: Count = 512
    """Tokens of prompt and answer together; longer answers are cut. DistiLLM: 512."""
    max_prompt_length: Count = 256
    """Tokens of the prompt; rows with longer prompts are left out and counted. DistiLLM: 256."""
    train_rows: Count | None = None
    """Use only the first so many usable training rows."""
    validation_rows: Count | None = None
    """Use only the first so many usable validation rows."""
    test_rows: Count | None = None
    """Use only the first so many usable test rows."""

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> "DataConfig":
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length "
                f"({self.max_length}), or no answer fits"
            )
        return self


class EmaConfig(Part):
    """Exponential moving average of student and adapters: the raw weights train and write rollouts, the average is
    evaluated, left by the stage and where the next stage starts. It is a float32 copy of all trained weights on their
    device (SmolLM-135M: 0.5 GiB), and evaluating it takes a second one for as long as that lasts, when there are no
    gradients. Not under FSDP."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """Share of the average that stays at each optimizer step; 0.999 averages over about the last 1,000."""
    warmup: bool = True
    """Lower it to (1 + n) / (10 + n) after n updates, so that a short run does not hang on its start (TensorFlow)."""


class OptimConfig(Part):
    """Optimizer, learning rate and batch."""

    learning_rate: float = Field(default=5e-4, gt=0, le=1)
    """Peak learning rate of the student. DistiLLM, GPT-2 0.1B: 5e-4."""
    scheduler: Literal["cosine", "linear", "constant_with_warmup", "constant"] = "cosine"
    """Shape of the learning rate after warm-up, counted in optimizer steps."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the optimizer steps in which the learning rate rises from 0."""
    warmup_steps: Limit | None = None
    """Optimizer steps of warm-up; overrides `warmup_fraction`."""
    optimizer: Literal["adamw_torch", "adamw_8bit"] = "adamw_torch"
    """adamw_8bit keeps the optimizer's state in 8 bits (bitsandbytes, GPU only)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay; not on norms and biases. DistiLLM: 0.01."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm. DistiLLM: 1.0."""
    batch_size: Count = 8
    """Rows of one forward pass on one device."""
    accumulation: Count = 1
    """Forward passes that make one optimizer step."""
    group_by_length: bool = False
    """Batches of rows of nearly the same length, so that less of each pass is padding. A batch is then less of a chance
    sample of the rows: short and long answers take turns."""
    max_steps: Count | None = None
    """Optimizer steps of the stage; overrides `epochs`."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    precision: DtypeName = "auto"
    """Autocast of the student; auto: float32 on CPU, else bfloat16 where the card has it, else float16."""
    ema: EmaConfig | None = None
    """Average of the weights, evaluated and left in place of the last ones; None: off. {} takes the defaults."""

    def num_steps(self, num_rows: int, *, num_processes: int = 1) -> int:
        """Optimizer steps of a stage: `max_steps`, else enough for `epochs` passes over its rows; at least 1."""
        if self.max_steps is not None:
            return self.max_steps
        batches = math.ceil(num_rows / (self.batch_size * num_processes))
        return max(math.ceil(self.epochs * math.ceil(batches / self.accumulation)), 1)


class EarlyStoppingConfig(Part):
    """Ends a stage that no longer gets better, and lets it leave the student of its best evaluation, which it keeps as
    `best-<step>` beside its checkpoints. The total loss is no metric: its weights change along a stage."""

    metric: Literal["rouge_l", "cross_entropy"] = "rouge_l"
    """Validation figure to watch: ROUGE-L of the generated rows, to rise, or cross-entropy in nats, to fall."""
    patience: Count = 3
    """Evaluations in a row without a better figure after which the stage ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """How much better a figure has to be to be worth waiting on, in points of ROUGE-L or in nats."""


class EvaluationConfig(Part):
    """What is measured, when, and on how much text."""

    every_steps: Limit = 0
    """Optimizer steps between evaluations; 0 evaluates only at the end of the stage."""
    batch_size: Count = 32
    """Rows of one forward or generation batch."""
    generate_rows: Limit | None = None
    """Validation rows answered by the student at each evaluation while training; 0: none, None: all."""
    max_new_tokens: Count = 128
    """Longest answer, in tokens."""
    num_beams: Count = 1
    """Beams; 1 with sampling_temperature 0 is greedy decoding."""
    sampling_temperature: float = Field(default=0.0, ge=0)
    """0 is greedy; DistiLLM evaluates by sampling at 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampling."""
    teacher: bool = True
    """Measure the teacher on the final rows too."""
    before: bool = True
    """Measure the student as it was before the run too, unless it started from random weights."""
    resamples: Count = 1000
    """Bootstrap resamples of the 95 % intervals."""
    early_stopping: EarlyStoppingConfig | None = None
    """When a stage ends before its last step; None: never, and it leaves its last student. {} takes the defaults."""

    @model_validator(mode="after")
    def _early_stopping_has_what_it_watches(self) -> "EvaluationConfig":
        if self.early_stopping is None:
            return self
        if self.every_steps == 0:
            raise ValueError(
                "early_stopping looks at evaluations while training, and every_steps=0 makes one at the end alone: set "
                "every_steps above 0, or early_stopping=null"
            )
        if self.early_stopping.metric == "rouge_l" and self.generate_rows == 0:
            raise ValueError(
                "early_stopping waits for a ROUGE-L, and generate_rows=0 lets the student answer no rows: set "
                "generate_rows above 0, or early_stopping.metric=cross_entropy"
            )
        return self


class CheckpointConfig(Part):
    """What is kept of a running stage."""

    every_steps: Limit = 0
    """Optimizer steps between checkpoints; 0 saves only at the end of the stage and when stopped."""
    every_minutes: float = Field(default=0.0, ge=0)
    """Minutes after the last checkpoint at which another is due, for machines that may go away; 0: none."""
    keep: Count = 2
    """Newest checkpoints that stay."""


class LoggingConfig(Part):
    """How often figures are written."""

    every_steps: Count = 10
    """Optimizer steps between two rows of metrics.jsonl."""
    report_to: list[str] = Field(default_factory=list)
    """Trackers of transformers that also get the figures, for instance [tensorboard]."""


class DoctorConfig(Part):
    """Looks at the log while it is written, by those checks of `kdkit doctor` that an unfinished run can answer. What
    they find is said once, and stands in metrics.jsonl."""

    on_fail: Literal["warn", "stop", "off"] = "warn"
    """stop: what spoils the run ends it, saved and with exit code 1, from its 100th step on; a resume may set warn to
    go on all the same. off: nobody looks."""
    every_steps: Limit = 100
    """Optimizer steps between two looks besides the one at each evaluation; 0: none."""

    @field_validator("on_fail", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: object) -> object:
        return "off" if value is False else value  # what YAML reads a bare off as


class DistillConfig(Part):
    """One run: a base and the stages that override it, in order."""

    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    doctor: DoctorConfig = DoctorConfig()
    stages: dict[str, dict[str, JsonValue]] = Field(default={"distill": {}}, min_length=1)
    """Each stage and what it overrides, in order: {warm_start: {optim: {max_steps: 100}}, distill: {}}."""
    seed: int = Field(default=10, ge=0, lt=2**31)
    """Seeds weights, row order and dropout; each stage derives its own. DistiLLM runs 10 to 50."""
    threads: Count | None = None
    """CPU threads of torch; None takes its own choice. Pin it where a resume has to be bit-identical."""

    @property
    def rows_written_together(self) -> int:
        """Prompts that the student answers in one go while it trains."""
        return self.rollout.batch_size or self.optim.batch_size * self.optim.accumulation * self.rollout.ahead

    @model_validator(mode="after")
    def _experts_are_there_to_be_read(self) -> "DistillConfig":
        if self.teacher.device == "offload" and self.objective.weights["routing"].largest > 0:
            raise ValueError(
                "objective.routing reads the teacher's experts, which are on no device between two passes under "
                "teacher.device offload: set objective.routing.weight=0, or give another device"
            )
        return self

    @model_validator(mode="after")
    def _rollout_fits(self) -> "DistillConfig":
        if self.rollout.is_on:
            for problem in _rollout_problems(self):
                raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _cache_suffices(self) -> "DistillConfig":
        if self.teacher.cache is not None:
            for problem in cache_problems(self):
                raise ValueError(problem)
        return self


def cache_problems(config: DistillConfig) -> Iterator[str]:
    """Why no cache can stand for the teacher of a config."""
    if config.rollout.is_on:
        yield (
            f"rollout.mode {config.rollout.mode} lets the student write new text, and teacher.cache knows only the "
            "text it was cached on: set teacher.cache=null, or rollout.mode=off"
        )
    for name in UNIT_TERMS:
        if name not in LAST_HIDDEN_TERMS and config.objective.weights[name].largest > 0:
            yield (
                f"objective.{name} looks inside the teacher, and a cache keeps its distributions and last hidden "
                f"states alone: set objective.{name}.weight=0, or teacher.cache=null"
            )


def _rollout_problems(config: DistillConfig) -> Iterator[str]:
    """Why the student's own text cannot be trained on with the rest of a config."""
    rollout, data, evaluation = config.rollout, config.data, config.evaluation
    measures_rouge = evaluation.every_steps > 0 and evaluation.generate_rows != 0
    if not config.objective.needs_teacher:
        yield (
            f"rollout.mode {rollout.mode} gives text that the student wrote, which is never a label for lm: give "
            "objective.kd or objective.dtw a weight, or set rollout.mode=off"
        )
    if rollout.mode == "adaptive" and evaluation.every_steps == 0:
        yield "rollout.mode adaptive moves its threshold at evaluations: set evaluation.every_steps above 0"
    if rollout.mode != "on_policy" and rollout.capacity < config.optim.batch_size:
        yield (
            f"rollout.capacity ({rollout.capacity}) is below optim.batch_size ({config.optim.batch_size}): a batch "
            "could never be replayed from it"
        )
    if data.max_prompt_length + rollout.max_new_tokens > data.max_length:
        yield (
            f"rollout.max_new_tokens ({rollout.max_new_tokens}) after a prompt of data.max_prompt_length "
            f"({data.max_prompt_length}) exceeds data.max_length ({data.max_length}): lower the first two or raise "
            "the last"
        )
    if rollout.gate is not None and rollout.gate.min_rouge_l > 0 and not measures_rouge:
        yield (
            "rollout.gate waits for a validation ROUGE-L that is never measured: set evaluation.every_steps above 0 "
            "and evaluation.generate_rows other than 0"
        )
    if rollout.collapse is not None and (evaluation.every_steps == 0 or not (measures_rouge or rollout.guard)):
        yield (
            "rollout.collapse looks at ROUGE-L and at the guard's pass rate at evaluations, and there are none: set "
            "evaluation.every_steps above 0, and generate_rows other than 0 or a guard; or rollout.collapse=null"
        )

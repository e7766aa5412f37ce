"""A run from its config: models, rows, stages in order, resume, figures at the end. What every command calls."""

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from kdkit.config import DistillConfig, KdConfig
from kdkit.config.reading import stage_config
from kdkit.data.batch import DistillCollator, teacher_view
from kdkit.data.rows import Rows
from kdkit.errors import UserError
from kdkit.evaluation import (
    Evaluation,
    GenerationSettings,
    evaluate_model,
    generate_answers,
    score_predictions,
    texts_digest,
)
from kdkit.loading import (
    LORA_FOLDER,
    LogitsOverflow,
    add_lora,
    check_finite_logits,
    check_head,
    check_tokenizer_fits,
    files_of,
    head_width,
    load_model,
    load_teacher,
    read_lora,
    shared_vocab_size,
    teacher_device,
)
from kdkit.runtime import GIB, Preflight, cpu_bfloat16_units, preflight, usable_dtype
from kdkit.teacher.cache import CachedTeacher, TeacherCache, cached_vocab_size, check_rows, open_fitting_cache
from kdkit.teacher.sources import LiveTeacher, TeacherSource
from kdkit.training import checkpoint
from kdkit.training.card import model_card
from kdkit.training.controls import Controls
from kdkit.training.folder import RunFolder
from kdkit.training.objective import Across, Objective, relate_vocabularies
from kdkit.training.progress import say
from kdkit.training.rows import RunRows
from kdkit.training.stage import StageInputs, run_stage
from kdkit.training.stopping import StopRequest
from kdkit.training.tokenizers import load_tokenizers

STAGE_SEED_STRIDE = 1000
"""Distance between the seeds of two stages, so that runs with neighbouring seeds never share one."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run left."""

    folder: Path
    model: Path
    """The finished student, as `from_pretrained` reads it."""
    evaluations: dict[str, dict[str, float | None]]
    """Figures of `student` and, where asked for, `teacher` and `before`."""
    predictions: list[dict[str, object]]
    """One row per final row: prompt, references, and the answer of each measured model."""


def run_distillation(
    config: DistillConfig,
    output: str | Path,
    *,
    resume: bool = False,
    stop: StopRequest | None = None,
    controls: Controls | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Run every stage of a config and measure what came out.

    Args:
        config: the run.
        output: its folder; new, or with `resume` one that holds the same run.
        resume: continue from the newest whole checkpoint of the first unfinished stage.
        stop: asked between steps and batches whether to stop.
        controls: asked between steps what to change; what is changed is logged, and a resume needs controls again.
        callbacks: of transformers' Trainer, for whoever wants to watch; they must not draw random numbers.
    Returns:
        The finished student's folder and figures.
    Raises:
        UserError: settings, files or models do not fit; nothing was started.
        RunFailed: the run broke off; what is done is saved.
        Interrupted: someone asked to stop; what is done is saved.
    """
    run = _Run(config, RunFolder(Path(output)), stop or StopRequest(), controls, callbacks)
    run.open(resume=resume)
    student: Path | None = None
    try:
        for index, name in enumerate(config.stages):
            student = run.stage(index, name, after=student)
    except (UserError, ValueError, RuntimeError):  # the models or the machine cannot do what is asked of them
        if not resume and run.processes.is_main_process:
            run.folder.discard_unbegun()
        raise
    assert student is not None
    return run.conclude(student)


@dataclass
class _Run:
    """A run while it lasts: what its stages share."""

    config: DistillConfig
    folder: RunFolder
    stop: StopRequest
    controls: Controls | None = None
    callbacks: Sequence[TrainerCallback] = ()
    machine: Preflight = field(default_factory=preflight)
    _teacher: LiveTeacher | None = None

    def open(self, *, resume: bool) -> None:
        """Check machine, folder, tokenizers and rows before anything is trained."""
        if not self.machine.ok:
            raise UserError(f"{self.machine.problem}\n  {self.machine.remedy}")
        if self.machine.problem:
            say(self.machine.problem)
        disable_progress_bar()  # a bar per file read or written; the run has its own
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        # One process measures while the others wait: longer than torch's ten minutes.
        self.processes = PartialState(cpu=self.machine.device == "cpu", timeout=timedelta(hours=4))
        self.cache = open_fitting_cache(self.config, verify=self.processes.is_main_process)
        found = load_tokenizers(self.config, cached=None if self.cache is None else self.cache.tokenizer)
        self.tokenizer, self.teacher_tokenizer, self.tokenizer_kind = found.student, found.teacher, found.kind
        across = None if self.teacher_tokenizer is None else Across()
        for name in self.config.stages:  # refuses terms that do not go with these tokenizers
            Objective(stage_config(self.config, name).objective, across=across)
        self.collator = DistillCollator.of(self.tokenizer, self.teacher_tokenizer)
        self.rows = RunRows(self.tokenizer, self.teacher_tokenizer)
        used = self.rows.describe({name: stage_config(self.config, name) for name in self.config.stages})
        if self.cache is not None:
            self._check_cached_rows(self.cache)
            say(f"teacher: {self.cache.describe()}")
        if self.config.optim.precision == "bfloat16" and self.machine.device == "cpu":
            self._say_what_bfloat16_does()
        if self.processes.is_main_process:
            setup = {
                "precision": self._dtype_name(self.config.optim.precision),
                "num_processes": self.processes.num_processes,
            }
            self.folder.open(self.config, rows=used, setup=setup, resume=resume)
        self.processes.wait_for_everyone()

    def _say_what_bfloat16_does(self) -> None:
        """On a CPU; the student's passes alone take `optim.precision`."""
        if not (units := cpu_bfloat16_units()):
            say(
                "optim.precision=bfloat16: no units for it (AMX, AVX512-BF16, Arm BF16) are known of this CPU; without "
                "them torch emulates it, slowly: optim.precision=float32 is likely faster"
            )
        elif self._is_teacher_in_float32():
            say(
                f"optim.precision=bfloat16: the student's products take the {units} units; the teacher's stay in "
                "float32 and may then be most of a step: with teacher.dtype=bfloat16 they take the units too"
            )

    def _is_teacher_in_float32(self) -> bool:
        """On a CPU, where nobody named a dtype and some stage asks it."""
        teacher, stages = self.config.teacher, [stage_config(self.config, name) for name in self.config.stages]
        is_asked = self.cache is None and any(stage.objective.needs_teacher for stage in stages)
        return is_asked and teacher.dtype == "auto" and teacher.quantization is None

    def stage(self, index: int, name: str, *, after: Path | None) -> Path:
        """Run one stage unless it is already done; returns the folder of its student."""
        folder = self.folder.stage(name)
        if checkpoint.is_whole(folder / "model"):
            return folder / "model"
        settings = stage_config(self.config, name)
        settings = settings.model_copy(update={"seed": self.config.seed + STAGE_SEED_STRIDE * index})
        student = self._load_student(after)
        teacher: TeacherSource | None = None
        vocab_size = across = None
        if settings.objective.needs_teacher and self.cache is not None:
            teacher = CachedTeacher(self.cache, top_k=settings.objective.kd.top_k)
            vocab_size = cached_vocab_size(self.cache, student)
        elif settings.objective.needs_teacher:
            teacher = live = self._load_teacher()
            if self.teacher_tokenizer is not None:
                across = self._across(settings.objective.kd, student, self.teacher_tokenizer)
            else:
                vocab_size = live.vocab_size = self._shared_vocab_size(student)
        inputs = StageInputs(
            student=student,
            tokenizer=self.tokenizer,
            teacher=teacher,
            train_rows=self.rows.encoded("train", settings).dataset,
            eval_rows=self.rows.encoded("validation", settings).dataset,
            collator=self.collator,
            generate=None if settings.evaluation.generate_rows == 0 else self._generate_with(settings),
            references=lambda: self.rows.read("train", settings).dataset["references"],
            vocab_size=vocab_size,
            across=across,
            teacher_tokenizer=self.teacher_tokenizer,
            dense_student=_needs_dense_path(student, "student"),
            precision=self._dtype_name(settings.optim.precision),
            use_cpu=self.machine.device == "cpu",
            adapters_from=after,
        )
        run_stage(
            settings,
            inputs,
            folder=folder,
            metrics=self.folder.metrics,
            stop=self.stop,
            controls=self.controls,
            callbacks=self.callbacks,
        )
        del inputs, student
        _free_memory()
        return folder / "model"

    def conclude(self, student: Path) -> RunResult:
        """Publish the last stage's student and measure it beside the teacher and where it started from."""
        if self.processes.is_main_process and not checkpoint.is_whole(self.folder.model):
            staged = self.folder.path / checkpoint.STAGING
            checkpoint.clear_staging(self.folder.path)
            shutil.copytree(student, staged)
            checkpoint.publish(staged, self.folder.model)
        self.processes.wait_for_everyone()
        if not self.processes.is_main_process:
            return RunResult(self.folder.path, self.folder.model, {}, [])
        if not self.folder.evaluation.is_file():
            self._measure_finals()
        figures = json.loads(self.folder.evaluation.read_text(encoding="utf-8"))
        return RunResult(self.folder.path, self.folder.model, figures["models"], figures["predictions"])

    # ---- parts ----

    def _check_cached_rows(self, cache: TeacherCache) -> None:
        """Refuse rows that the cache knows nothing of, before anything is trained."""
        for name in self.config.stages:
            settings = stage_config(self.config, name)
            for kind in ("train", "validation") if settings.objective.needs_teacher else ():
                check_rows(cache, self.rows.encoded(kind, settings).dataset, kind=kind, config=settings)

    def _load_student(self, after: Path | None) -> PreTrainedModel:
        """The student as the stage before left it, or as the config names it."""
        settings, lora = self.config.student, self.config.student.lora
        changed = None if lora is not None else after  # LoRA layers go on beside the weights that they began with
        student = load_model(
            changed or settings.path,
            dtype=getattr(torch, "float32" if lora is None else self._dtype_name(lora.base_dtype)),
            device=self._device(),
            trainable=lora is None,
            revision=settings.revision if changed is None else None,
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
            from_scratch=settings.from_scratch and changed is None,
            seed=self.config.seed,
        )
        if lora is not None:
            add_lora(student, lora, seed=self.config.seed)
            if after is not None:
                read_lora(student, after / LORA_FOLDER)
        check_tokenizer_fits(student, self.tokenizer)
        if settings.gradient_checkpointing:
            student.activation_checkpointing_enable({"use_reentrant": False})
        return student

    def _load_teacher(self) -> LiveTeacher:
        """The teacher, loaded once for all stages and checked on its first rows."""
        if self._teacher is None:
            model = self._load_finite_teacher()
            if self.teacher_tokenizer is not None:
                check_tokenizer_fits(model, self.teacher_tokenizer)
            chunk_tokens = self.config.objective.chunk_tokens
            self._teacher = LiveTeacher(model, dense=_needs_dense_path(model, "teacher"), chunk_tokens=chunk_tokens)
        return self._teacher

    def _load_finite_teacher(self) -> PreTrainedModel:
        """The teacher on its device; with dtype auto in float32 where it overflows on its first rows in float16."""
        settings, own = self.config.teacher, self._device()
        device = teacher_device(settings, self.machine, student=own, num_processes=self.processes.num_processes)
        card = self.machine.card(device)
        if card is not None and card != self.machine.card(own):
            say(f"teacher on {device} with {card.free_memory_bytes / GIB:.1f} GiB free, student on {own}")
        rows = self.rows.encoded("train", self.config).dataset
        first = teacher_view(self.collator([rows[i] for i in range(min(4, len(rows)))]))
        model = load_teacher(settings, self.machine, device=device)
        try:
            check_finite_logits(model, first)
        except LogitsOverflow:
            if settings.dtype != "auto" or model.dtype != torch.float16:
                raise
            say("teacher: its logits overflow in float16, so that dtype auto takes float32, twice the memory")
            del model
            _free_memory()
            model = load_teacher(settings.model_copy(update={"dtype": "float32"}), self.machine, device=device)
            check_finite_logits(model, first)
        return model

    def _across(self, config: KdConfig, student: PreTrainedModel, teacher_tokenizer: PreTrainedTokenizerBase) -> Across:
        """How the ids of the two models relate, as far as kd compares them."""
        widths = head_width(student), head_width(self._load_teacher().model)
        across = relate_vocabularies(config, self.tokenizer, teacher_tokenizer, widths=widths)
        if across.groups is not None:
            say(f"kd compares {across.groups.student.num_groups} groups of tokens that may begin the same text")
        if across.match is not None:
            say(f"kd compares {len(across.match.student_ids)} of the student's {len(self.tokenizer)} tokens by id")
        return across

    def _shared_vocab_size(self, student: PreTrainedModel) -> int | None:
        teacher = self._load_teacher().model
        return shared_vocab_size(teacher, student, len(self.tokenizer), kind=self.tokenizer_kind)

    def _device(self) -> str:
        return str(self.processes.device)

    def _dtype_name(self, asked: str) -> str:
        if asked != "auto":
            return asked
        return usable_dtype(self.machine.device, self.machine.capability).dtype

    def _generation(self, settings: DistillConfig) -> GenerationSettings:
        evaluation = settings.evaluation
        return GenerationSettings(
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            num_beams=evaluation.num_beams,
            sampling_temperature=evaluation.sampling_temperature,
            top_p=evaluation.top_p,
            seed=settings.seed,
        )

    def _generate_with(self, settings: DistillConfig) -> "_ValidationAnswers":
        """What the trainer calls to have the student answer validation rows."""
        rows = self.rows.read("validation", settings)
        kept = self.rows.encoded("validation", settings).dataset["row_id"]
        return _ValidationAnswers(
            rows.dataset.select(kept),
            self.tokenizer,
            self._generation(settings),
            settings.evaluation.generate_rows,
            self.stop,
            self.processes,
        )

    def _measure_finals(self) -> None:
        """Answer and score the final rows with every model of the comparison; one file, written at the end."""
        rows = self.rows.read("test", self.config)
        measured: dict[str, Evaluation] = {}
        for name, path, revision in self._finalists():
            say(f"measuring {name} on {len(rows)} rows")
            model = load_model(
                path,
                dtype=torch.float32,
                device=self._device(),
                revision=revision,
                attn_implementation=self.config.student.attention,
                trust_remote_code=self.config.student.trust_remote_code,
            )
            measured[name] = self._measure(model, rows)
            del model
            _free_memory()
        if self.config.evaluation.teacher and self._has_teacher_at_hand():
            say(f"measuring teacher on {len(rows)} rows")
            theirs = self.rows.read("test", self.config, as_teacher=True)
            measured["teacher"] = self._measure(self._load_teacher().model, theirs, self.teacher_tokenizer)
        predictions = [
            {"prompt": row["prompt"], "references": row["references"]}
            | {name: evaluation.predictions[index] for name, evaluation in measured.items()}
            for index, row in enumerate(rows.dataset)
        ]
        models = {name: evaluation.summary() for name, evaluation in measured.items()}
        card = model_card(self.config, models, rows_sha256=rows.sha256)
        checkpoint.write_text(self.folder.model / "README.md", card)
        document = {"rows": rows.sha256, "models": models, "predictions": predictions}
        checkpoint.write_text(self.folder.evaluation, json.dumps(document, indent=1, ensure_ascii=False))

    def _has_teacher_at_hand(self) -> bool:
        """Whether the teacher can be measured: a run from a cache does without its files, and says so."""
        settings = self.config.teacher
        if self.cache is None or files_of(settings.path, revision=settings.revision) is not None:
            return True
        say(f"the teacher is not measured: {settings.path} is not on this machine, and the run took it from a cache")
        return False

    def _finalists(self) -> list[tuple[str, str | Path, str | None]]:
        """Students to measure, with their revision: the finished one, and its start unless that was random."""
        finalists: list[tuple[str, str | Path, str | None]] = [("student", self.folder.model, None)]
        student = self.config.student
        if self.config.evaluation.before and not student.from_scratch:
            finalists.append(("before", student.path, student.revision))
        return finalists

    def _measure(
        self, model: PreTrainedModel, rows: Rows, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Evaluation:
        data = self.config.data
        return evaluate_model(
            model,
            tokenizer or self.tokenizer,
            rows,
            self._generation(self.config),
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
            resamples=self.config.evaluation.resamples,
            progress=self.stop.check_unless_late,
        )


@dataclass(frozen=True)
class _ValidationAnswers:
    """Lets the student answer validation rows while it trains."""

    rows: Dataset
    """Rows whose prompts are short enough."""
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    limit: int | None
    """Rows at each evaluation; None: all."""
    stop: StopRequest
    processes: PartialState
    """Share the rows."""

    def __call__(self, student: PreTrainedModel, limit: int | None) -> Mapping[str, float | str]:
        """ROUGE-L, exact match, how long and how complete the answers are, and a digest of them.

        With a `limit`, for a first try, the longest prompts are answered: they show whether all fit.
        """
        if limit is None:
            rows = self.rows.select(range(min(len(self.rows), self.limit or len(self.rows))))
        else:
            lengths = [len(prompt) for prompt in self.rows["prompt"]]
            rows = self.rows.select(sorted(range(len(lengths)), key=lengths.__getitem__)[-min(limit, 2) :])
        answers = generate_answers(
            student,
            self.tokenizer,
            rows["prompt"],
            self.settings,
            progress=self.stop.check,
            processes=self.processes,
        )
        scores = score_predictions([a.text for a in answers], rows["references"], resamples=0)
        return {
            "rouge_l": scores.rouge_l.value,
            "exact_match": scores.exact_match.value,
            "mean_tokens": sum(a.num_tokens for a in answers) / len(answers),
            "num_answers": float(len(answers)),
            "ended_fraction": sum(a.ended for a in answers) / len(answers),
            "texts_digest": texts_digest(answers),
        }


def _free_memory() -> None:
    """Let go of a stage's student and optimizer: trainer and callbacks hold each other until a collection."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _needs_dense_path(model: PreTrainedModel, role: str) -> bool:
    """Whether a model's head cannot be applied apart from its body; said once, with the reason."""
    reason = check_head(model)
    if reason is None:
        return False
    say(f"{role}: logits are taken whole, which costs memory, because {reason}")
    return True

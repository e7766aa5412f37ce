"""The rows of a run: read once, tokenised once, whichever stages ask for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from kdkit.config import DistillConfig
from kdkit.data.encoding import EncodedRows, TeacherText, encode_rows
from kdkit.data.rows import Rows, load_rows
from kdkit.errors import UserError
from kdkit.training.folder import RowsUsed
from kdkit.training.progress import say

Kind = Literal["train", "validation", "test"]
KINDS: tuple[Kind, ...] = ("train", "validation", "test")


@dataclass
class RunRows:
    """What a run reads, by kind and by the settings of the stage that asks."""

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    """The teacher's, where it is another one."""
    _read: dict[tuple[object, ...], Rows] = field(default_factory=dict)
    _encoded: dict[tuple[object, ...], EncodedRows] = field(default_factory=dict)

    def read(self, kind: Kind, config: DistillConfig, *, as_teacher: bool = False) -> Rows:
        """Rows of a kind as a stage reads them; test rows are the validation rows where none are named.

        Args:
            kind: which rows.
            config: the stage's.
            as_teacher: with the prompts as the teacher's chat template writes them.
        Returns:
            Rows, the same as long as they are asked for with the same settings.
        Raises:
            UserError: as `load_rows`.
        """
        data, prompts_suffice = config.data, kind == "train" and _prompts_suffice(config)
        limits = {"train": data.train_rows, "validation": data.validation_rows, "test": data.test_rows}
        sources = {"train": data.train, "validation": data.validation, "test": data.test}
        source = sources[kind]
        if source is None:
            return self.read("validation", config, as_teacher=as_teacher)
        template = (data.train_template if kind == "train" else None) or data.template
        other = self.teacher_tokenizer if as_teacher and template == "chat" else None
        key = (source, limits[kind], template, prompts_suffice, other is None, *sorted(data.columns.items()))
        if key not in self._read:
            self._read[key] = load_rows(
                source,
                columns=data.columns,
                template=template,
                limit=limits[kind],
                require_references=not prompts_suffice,
                tokenizer=other or self.tokenizer,
            )
        return self._read[key]

    def encoded(self, kind: Kind, config: DistillConfig) -> EncodedRows:
        """The rows as tokens, cut and left out as the stage's lengths ask.

        Raises:
            UserError: as `load_rows` and `encode_rows`.
        """
        rows, data, unit = self.read(kind, config), config.data, config.objective.unit
        prompts_suffice = kind == "train" and _prompts_suffice(config)
        key = (rows.sha256, data.max_length, data.max_prompt_length, unit, prompts_suffice)
        if key not in self._encoded:
            self._encoded[key] = encode_rows(
                rows,
                self.tokenizer,
                max_length=data.max_length,
                max_prompt_length=data.max_prompt_length,
                unit=unit,
                keep_prompt_only=prompts_suffice,
                teacher=self._teacher_text(kind, config),
            )
        return self._encoded[key]

    def _teacher_text(self, kind: Kind, config: DistillConfig) -> TeacherText | None:
        """The rows as a teacher with another tokenizer reads them."""
        if self.teacher_tokenizer is None:
            return None
        own, theirs = self.read(kind, config), self.read(kind, config, as_teacher=True)
        if not own.dataset.data.column("references").equals(theirs.dataset.data.column("references")):
            raise UserError(
                f"the chat templates of teacher and student do not accept the same rows of '{own.name}' ({len(theirs)} "
                f"and {len(own)}): set data.template to another one, or leave such rows out"
            )
        return TeacherText(self.teacher_tokenizer, theirs.dataset["prompt"])

    def describe(self, stages: Mapping[str, DistillConfig]) -> dict[str, RowsUsed]:
        """Read everything that the stages will ask for; says once which rows, by content, and what was left out.

        Args:
            stages: settings by stage.
        Returns:
            By kind, or `stage.kind` where a stage reads other rows than the first one.
        Raises:
            UserError: something cannot be read, or nothing of it is usable.
        """
        used: dict[str, RowsUsed] = {}
        for stage, config in stages.items():
            for kind in KINDS:
                found = self._describe(kind, config)
                if found != used.setdefault(kind, found):
                    used[f"{stage}.{kind}"] = found
        for name, rows in used.items():
            reasons = "".join(f", {reason}: {count}" for reason, count in rows["dropped"].items())
            kept = f"{rows['num_kept']} of {rows['num_read']} rows{reasons}"
            say(f"{name}: {kept}, sha256 {rows['sha256'][:12]}")
        return used

    def _describe(self, kind: Kind, config: DistillConfig) -> RowsUsed:
        rows, encoded = self.read(kind, config), self.encoded(kind, config)
        return {
            "sha256": rows.sha256,
            "num_read": rows.report.num_read,
            "num_kept": encoded.report.num_kept,
            "dropped": {**rows.report.dropped, **encoded.report.dropped, **encoded.report.truncated},
        }


def _prompts_suffice(config: DistillConfig) -> bool:
    """Whether a row without an answer is of use: the student writes every text from the start, no label is learnt."""
    rollout = config.rollout
    return rollout.mode == "on_policy" and rollout.gate is None and config.objective.lm.weight.largest == 0

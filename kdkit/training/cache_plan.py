"""What a cache of a run is to hold, and whether there can be one: settled before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import AutoConfig

from kdkit import __version__
from kdkit.config import DistillConfig
from kdkit.config.fields import cache_problems
from kdkit.config.objective import CACHED_IDS, LAST_HIDDEN_TERMS
from kdkit.config.reading import stage_config
from kdkit.errors import UserError
from kdkit.loading import files_of
from kdkit.loading.places import locate, one_message
from kdkit.teacher.cache.checks import sampling_problems
from kdkit.teacher.cache.manifest import (
    VERSION,
    Contents,
    DataFacts,
    Manifest,
    ShapeFacts,
    StoredDtype,
    TeacherFacts,
    model_facts,
)
from kdkit.teacher.cache.rows import RowIndex
from kdkit.teacher.kept import temperature_range
from kdkit.teacher.sources import LiveTeacher

SHARD_TOKENS = 2**16
"""Counted tokens of a shard, about 25 MB at 64 ids: what a kill can lose."""


@dataclass(frozen=True)
class Keep:
    """How a cache is written, apart from what the config of the run says."""

    samples: int | None
    """Draws at each token; None: the most likely ids."""
    dtype: StoredDtype
    shard_tokens: int


def teacher_stages(config: DistillConfig) -> list[DistillConfig]:
    """The stages in which a term looks at the teacher."""
    stages = [stage_config(config, name) for name in config.stages]
    found = [stage for stage in stages if stage.objective.needs_teacher]
    if not found:
        raise UserError(
            "no stage of this config looks at the teacher, so there is nothing to cache: give objective.kd or "
            "objective.dtw a weight"
        )
    return found


def check_cacheable(stages: Sequence[DistillConfig], samples: int | None) -> None:
    """Refuse what no cache can serve."""
    problems = list(chain.from_iterable(map(cache_problems, stages)))
    if samples is not None and samples < 1:
        problems.append(f"--samples is {samples}; give 1 or more draws a token")
    if samples is not None:
        problems += chain.from_iterable(map(sampling_problems, stages))
    if len({stage.objective.unit for stage in stages if _wants_hidden(stage)}) > 1:
        problems.append("stages differ in objective.unit, and a cache holds hidden states by one: use one in all")
    if problems:
        raise UserError("no cache can serve this config:\n  " + "\n  ".join(dict.fromkeys(problems)))


def plan_cache(
    config: DistillConfig,
    stages: Sequence[DistillConfig],
    *,
    teacher: LiveTeacher,
    index: RowIndex,
    num_ids: int,
    keep: Keep,
) -> Manifest:
    """The manifest before anything is written."""
    data, shape = config.data, teacher.shape
    return Manifest(
        version=VERSION,
        kdkit=__version__,
        teacher=_teacher_facts(config, teacher),
        shape=ShapeFacts(
            head_size=shape.head_size,
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
        ),
        contents=_contents(config, stages, num_ids=num_ids, keep=keep),
        data=DataFacts(**{name: getattr(data, name) for name in DataFacts.model_fields}),
        batch_tokens=config.optim.batch_size * data.max_length,
        shard_tokens=keep.shard_tokens,
        num_rows=len(index),
        num_tokens=int(index.num_tokens.sum()),
        num_shards=len(index.shards(keep.shard_tokens)),
    )


def _contents(config: DistillConfig, stages: Sequence[DistillConfig], *, num_ids: int, keep: Keep) -> Contents:
    """What is kept of each token: enough for every stage."""
    is_sampled = keep.samples is not None
    softened = [stage.objective.kd.temperature for stage in stages if stage.objective.kd.weight.largest > 0]
    temperatures = [1.0, *(value for schedule in softened for value in (schedule.smallest, schedule.largest))]
    top_k = max(stage.objective.kd.top_k or CACHED_IDS for stage in stages)
    return Contents(
        kind="samples" if is_sampled else "top_k",
        k=keep.samples or min(top_k, num_ids),
        num_ids=num_ids,
        dtype=keep.dtype,
        temperatures=temperature_range([1.0] if is_sampled else temperatures),
        unit=next((stage.objective.unit for stage in stages if _wants_hidden(stage)), None),
        seed=config.seed if is_sampled else None,
    )


def _teacher_facts(config: DistillConfig, teacher: LiveTeacher) -> TeacherFacts:
    settings = config.teacher
    files = files_of(settings.path, revision=settings.revision)
    nothing: dict[str, str | None] = {"config_sha256": None, "weights_sha256": None}
    return TeacherFacts(
        path=settings.path,
        revision=settings.revision,
        dtype=str(teacher.model.dtype).removeprefix("torch."),
        quantization=settings.quantization,
        **(nothing if files is None else model_facts(files)),
    )


def _wants_hidden(config: DistillConfig) -> bool:
    return any(config.objective.weights[name].largest > 0 for name in LAST_HIDDEN_TERMS)


def student_width(config: DistillConfig) -> int:
    """Ids that the student's head knows, from its config alone."""
    place = locate(config.student.path, revision=config.student.revision)
    with one_message("config", place):
        found = AutoConfig.from_pretrained(
            place.name, trust_remote_code=config.student.trust_remote_code, **place.read_arguments()
        )
    return int(found.get_text_config().vocab_size)

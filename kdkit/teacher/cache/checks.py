"""Whether a cache is of the teacher, the settings and the rows that a run asks for; each refusal names what differs."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from kdkit.config import DistillConfig, TeacherConfig
from kdkit.config.objective import LAST_HIDDEN_TERMS
from kdkit.config.reading import stage_config
from kdkit.data.batch import EncodedRow, row_key
from kdkit.errors import UserError
from kdkit.loading import files_of, head_width
from kdkit.teacher.cache.manifest import model_facts
from kdkit.teacher.cache.source import TeacherCache, open_cache


def open_fitting_cache(config: DistillConfig, *, verify: bool = True) -> TeacherCache | None:
    """The cache that a config names, if it is of its teacher and holds what its stages ask for.

    Args:
        config: the run.
        verify: as for `open_cache`.
    Returns:
        The cache; None where the config names none. Its rows are still to be checked, once there are some.
    Raises:
        UserError: as `open_cache`, `check_teacher` and `check_settings`.
    """
    if config.teacher.cache is None:
        return None
    cache = open_cache(Path(config.teacher.cache).expanduser(), verify=verify)
    check_teacher(cache, config.teacher)
    for name in config.stages:
        check_settings(cache, stage_config(config, name))
    return cache


def check_teacher(cache: TeacherCache, settings: TeacherConfig) -> None:
    """Refuse a cache of another teacher, as far as the teacher's files are at hand; by name where they are not.

    Args:
        cache: an opened one.
        settings: the teacher that the config names.
    Raises:
        UserError: names each difference, what the cache has and what the config asks for.
    """
    held, found = cache.manifest.teacher, []
    files = files_of(settings.path, revision=settings.revision)
    if files is None or held.config_sha256 is None:
        if (held.path, held.revision) != (settings.path, settings.revision):
            asked = _named(settings.path, settings.revision)
            found.append(f"teacher.path: {_named(held.path, held.revision)} there, {asked} asked for")
    else:
        facts = model_facts(files)
        if facts["config_sha256"] != held.config_sha256:
            found.append(f"config.json of the teacher: another one there (of {held.path}) than in {files}")
        if facts["weights_sha256"] != held.weights_sha256:
            found.append(f"weights of the teacher: others there (of {held.path}) than in {files}")
    if settings.dtype not in ("auto", held.dtype):
        found.append(f"teacher.dtype: {held.dtype} there, {settings.dtype} asked for")
    if settings.quantization != held.quantization:
        found.append(f"teacher.quantization: {held.quantization} there, {settings.quantization} asked for")
    if found:
        raise UserError(_refusal(cache, "is of another teacher", found))


def check_settings(cache: TeacherCache, config: DistillConfig) -> None:
    """Refuse what a stage asks of a cache and the cache does not hold.

    Args:
        cache: an opened one.
        config: the stage's.
    Raises:
        UserError: names each setting, what the cache has and what the config asks for.
    """
    contents, objective, found = cache.contents, config.objective, []
    kd = objective.kd
    if kd.weight.largest > 0:
        if contents.kind == "samples":
            found += sampling_problems(config)
        elif kd.top_k is not None and kd.top_k > contents.k and contents.k < contents.num_ids:
            found.append(f"objective.kd.top_k: {contents.k} ids there, {kd.top_k} asked for")
        low, high = contents.temperatures
        asked = (kd.temperature.smallest, kd.temperature.largest)
        if contents.kind == "top_k" and not low <= asked[0] <= asked[1] <= high:
            found.append(
                f"objective.kd.temperature: {_span(low, high)} there, {_span(*asked)} asked for; a tail cannot be "
                "softened beyond what was kept of it"
            )
    looked_at = [name for name in LAST_HIDDEN_TERMS if objective.weights[name].largest > 0]
    if looked_at and contents.unit != objective.unit:
        held = "no hidden states" if contents.unit is None else f"hidden states by {contents.unit}"
        found.append(
            f"objective.{' and objective.'.join(looked_at)}: {held} there, those by {objective.unit} asked for "
            "(they are cached with a config that gives such a term a weight)"
        )
    if found:
        raise UserError(_refusal(cache, "does not hold what is asked for", found))


def sampling_problems(config: DistillConfig) -> list[str]:
    """Why draws from the teacher cannot serve a config."""
    kd, dtw = config.objective.kd, config.objective.dtw
    found = []
    if kd.loss != "forward_kl":
        found.append(
            f"objective.kd.loss: {kd.loss} asked for, and draws from the teacher give an unbiased gradient of "
            "forward_kl alone"
        )
    if (kd.temperature.smallest, kd.temperature.largest) != (1.0, 1.0):
        asked = _span(kd.temperature.smallest, kd.temperature.largest)
        found.append(f"objective.kd.temperature: {asked} asked for, and draws are from temperature 1")
    if kd.top_k is not None:
        found.append(f"objective.kd.top_k: {kd.top_k} asked for, and draws know no most likely ids")
    if dtw.weight.largest > 0 and dtw.importance != "none":
        found.append(f"objective.dtw.importance: {dtw.importance} asked for, and draws do not tell the entropy")
    return found


def check_rows(cache: TeacherCache, rows: Iterable[EncodedRow], *, kind: str, config: DistillConfig) -> None:
    """Refuse rows of which the cache knows nothing.

    Args:
        cache: an opened one.
        rows: tokenised ones that the stage will read.
        kind: which they are, for the message.
        config: the stage's.
    Raises:
        UserError: says how many are missing, which is the first, and which settings of the rows differ.
    """
    known = cache.index.place_of
    counted = [row for row in rows if len(row["input_ids"]) > row["prompt_length"]]
    missing = [row for row in counted if row_key(row["input_ids"], row["prompt_length"]) not in known]
    if not missing:
        return
    held, data = cache.manifest.data.model_dump(), config.data
    settings = [
        f"data.{name}: {value} there, {getattr(data, name)} asked for"
        for name, value in held.items()
        if value != getattr(data, name)
    ]
    first = f"the first of them row {missing[0]['row_id'] + 1} ({len(missing[0]['input_ids'])} tokens)"
    what = f"lacks {len(missing)} of {len(counted)} {kind} rows, {first}"
    raise UserError(_refusal(cache, what, settings or ["the rows themselves are others, or more"]))


def cached_vocab_size(cache: TeacherCache, student: PreTrainedModel) -> int | None:
    """The number of leading ids to compare, as `shared_vocab_size` gives it for a live teacher.

    Args:
        cache: an opened one.
        student: with a head of any width.
    Returns:
        The ids that the cached distributions are over; None where the student has as many.
    Raises:
        UserError: the student has fewer, so that a distribution over more was kept.
    """
    width, num_ids = head_width(student), cache.contents.num_ids
    if width < num_ids:
        raise UserError(
            f"the cache {cache.folder} holds distributions over {num_ids:,} ids, and the student's head knows "
            f"{width:,}: cache again with this student in the config"
        )
    return None if width == num_ids else num_ids


def _named(path: str, revision: str | None) -> str:
    return path if revision is None else f"{path} ({revision})"


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _refusal(cache: TeacherCache, what: str, found: Sequence[str]) -> str:
    listed = "\n  ".join(found)
    return (
        f"the cache {cache.folder} {what}:\n  {listed}\nCache again with this config (kdkit cache), name another "
        "teacher.cache, or leave it out to ask the teacher itself"
    )

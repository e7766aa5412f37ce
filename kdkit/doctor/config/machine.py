"""Checks of the config against the card: memory, dtypes, kernels."""

from collections.abc import Iterator
from contextlib import suppress

from kdkit.doctor.config.subject import Stage
from kdkit.doctor.findings import Check, NotApplicable, Observation, Value, fail, warn
from kdkit.doctor.sources import POST_MORTEMS
from kdkit.memory.cards import Card
from kdkit.runtime import BF16_CAPABILITY, FLASH_CAPABILITY, FULL_FRACTION, INT8_CAPABILITY

FLASH_CAPABILITIES = {"flash_attention_2": FLASH_CAPABILITY, "flash_attention_3": (9, 0)}
_OWN_CHOICE = "the model's own choice"


def check_memory(stage: Stage) -> Iterator[Observation]:
    """The planned peak against the card."""
    around, card = stage.around, stage.around.card
    stage.needs("teacher.path", "student.path", "optim.batch_size", "data.max_length")
    plan = around.plan.worst
    if plan.fits:
        return
    patch: dict[str, Value] = {}
    price = ", and no settings fit"
    with suppress(NotApplicable):
        changes = around.fit.changes
        patch = {} if "teacher.cache" in changes else dict(changes)  # a cache has to be made first
        price = f"; what fits costs: {'; '.join(around.fit.given_up)}" if around.fit.given_up else ""
    yield fail(
        f"stage {around.plan.stage} is planned to take {plan.used_fraction:.0%} of the {card.memory_gib:g} GiB of a "
        f"{card.name}{price}",
        **patch,
    )


def check_dtypes(stage: Stage) -> Iterator[Observation]:
    """What the card cannot compute in, and two dtypes that meet."""
    config, card = stage.config, stage.around.card
    is_card_known = not (stage.is_foreign and stage.around.is_card_assumed)
    for field, value in (
        ("teacher.dtype", config.teacher.dtype),
        ("optim.precision", config.optim.precision),
        ("student.lora.base_dtype", config.student.lora.base_dtype if config.student.lora else "auto"),
    ):
        if value == "bfloat16" and card.capability < BF16_CAPABILITY and stage.knows(field) and is_card_known:
            yield warn(f"{field}=bfloat16 on a {card.name}, which only emulates it, slowly", **{field: "auto"})
    if stage.stated is not None:
        if stage.stated.get("student.dtype") == "float16" and config.optim.precision == "float16":
            yield fail("float16 weights of the student under a loss scaler")
        return
    teacher, precision = config.teacher, config.optim.precision
    if teacher.quantization is not None and "auto" not in (teacher.dtype, precision) and teacher.dtype != precision:
        yield warn(
            f"teacher.quantization {teacher.quantization} computes in {teacher.dtype}, the student in {precision}",
            **{"teacher.dtype": precision},
        )
    if teacher.quantization == "int8" and card.capability < INT8_CAPABILITY:
        yield fail(_lacks("teacher.quantization=int8", card, INT8_CAPABILITY), **{"teacher.quantization": "nf4"})


def check_kernels(stage: Stage) -> Iterator[Observation]:
    """Attention that the card has no kernel for, or that shows no maps."""
    config, card = stage.config, stage.around.card
    compares_maps = config.objective.attention.weight.largest > 0
    for side, attention in (("teacher", config.teacher.attention), ("student", config.student.attention)):
        if not stage.knows(f"{side}.attention"):
            continue
        if compares_maps and attention != "eager" and not stage.is_foreign:
            yield fail(
                f"objective.attention compares maps, and {side}.attention is {attention or _OWN_CHOICE}",
                **{f"{side}.attention": "eager"},
            )
        elif card.capability < (needed := FLASH_CAPABILITIES.get(attention or "", (0, 0))):
            yield fail(_lacks(f"{side}.attention={attention}", card, needed), **{f"{side}.attention": "sdpa"})


def _lacks(setting: str, card: Card, needed: tuple[int, int]) -> str:
    return (
        f"{setting} needs a card of capability {needed[0]}.{needed[1]}, a {card.name} has "
        f"{card.capability[0]}.{card.capability[1]}"
    )


CHECKS = (
    Check(
        "KD110",
        "memory against the card",
        f"the planned peak is above {FULL_FRACTION * 100:g} % of the card",
        "A longer batch or a fragmented allocator ends the run.",
        "Take what the planner proposes; `kdkit plan --fit` says what it gives up.",
        POST_MORTEMS,
        check_memory,
    ),
    Check(
        "KD111",
        "dtypes",
        "bfloat16 without hardware, float16 weights under a loss scaler, a quantized teacher of another dtype",
        "Cards before capability 8.0 emulate bfloat16 very slowly. A scaler cannot unscale the gradients of float16 "
        "weights. Where autocast ends, two dtypes meet in one product and the run ends.",
        "Leave dtype and precision at auto; keep what is trained in float32.",
        POST_MORTEMS,
        check_dtypes,
    ),
    Check(
        "KD112",
        "kernels of attention",
        "flash attention on a card that has none, or attention maps from a kernel that shows none",
        "Flash attention needs capability 8.0; only eager attention gives its maps out.",
        "Take sdpa, or eager where maps are compared.",
        "documentation of transformers, attention implementations",
        check_kernels,
    ),
)

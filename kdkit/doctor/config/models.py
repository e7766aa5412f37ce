"""Checks of the two models against each other: tokenizers, chat templates, depth, experts."""

import re
from collections.abc import Iterator

from kdkit.config.objective import TERM_NAMES
from kdkit.doctor.config.subject import Stage
from kdkit.doctor.findings import Check, NotApplicable, Observation, Value, fail, warn
from kdkit.doctor.sources import POST_MORTEMS
from kdkit.schedules import Schedule


def check_tokenizers(stage: Stage) -> Iterator[Observation]:
    """Distributions compared id by id between tokenizers that differ."""
    stage.needs_kd()
    stage.needs_models()
    relation = stage.around.relation
    if relation.kind != "different":
        return
    if stage.is_foreign:
        yield fail(f"the tokenizers differ: {relation.evidence}")
        return
    objective = stage.config.objective
    follows_kd = objective.span.weight is None or objective.span.weight.largest > 0
    if not follows_kd and objective.lm.weight.largest == 0:
        yield warn(
            f"the tokenizers differ ({relation.evidence}), span and lm are off: kd alone compares the first token of "
            "each span",
            **{"objective.span.weight": None},
        )


def check_padding(stage: Stage) -> Iterator[Observation]:
    """A padding token that is the end of text."""
    stage.needs_models()
    tokenizer = stage.around.student_tokenizer
    if stage.is_foreign and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield warn(f"the student pads with its end-of-text token {tokenizer.eos_token}")


_CHATS = re.compile(r"instruct|chat|-it\b", re.IGNORECASE)
"""Names of models that were tuned on chats; base models bring a chat template along too."""


def check_chat_template(stage: Stage) -> Iterator[Observation]:
    """A chat template where none is, or none where both models have one."""
    stage.needs_models()
    stage.needs("data.template")
    template = stage.config.data.template
    without = [
        side
        for side, tokenizer in (
            ("teacher", stage.around.teacher_tokenizer),
            ("student", stage.around.student_tokenizer),
        )
        if tokenizer.chat_template is None
    ]
    if template == "chat" and without:
        yield fail(f"data.template chat, and the {' and the '.join(without)} has none", **{"data.template": "alpaca"})
    elif template != "chat" and not without and _CHATS.search(stage.config.student.path):
        name = template if len(template) < 20 else "of its own"
        yield warn(f"data.template {name}, and both models have a chat template", **{"data.template": "chat"})


def check_depth(stage: Stage) -> Iterator[Observation]:
    """More layers paired than there are, or layers paired by index with a deeper student."""
    objective = stage.config.objective
    on = [name for name in ("attention", "layerwise") if objective.weights[name].largest > 0]
    if not on:
        raise NotApplicable("objective.attention or objective.layerwise")
    stage.needs_models()
    teacher, student = stage.around.teacher_sizes.num_layers, stage.around.student_sizes.num_layers
    depths = f"the teacher has {teacher} layers, the student {student}"
    if stage.is_foreign and student > teacher:
        yield warn(f"{depths}: {' and '.join(on)} need a map from layer to layer")
    fewest = min(teacher, student)
    for name, field, given in (
        ("attention", "num_layers", objective.attention.num_layers),
        ("layerwise", "num_pairs", objective.layerwise.num_pairs or 0),
    ):
        if name in on and given > fewest:
            yield fail(f"objective.{name}.{field}={given}, and {depths}", **{f"objective.{name}.{field}": fewest})


def check_routing(stage: Stage) -> Iterator[Observation]:
    """Experts of a dense teacher."""
    if stage.config.objective.weights["routing"].largest == 0:
        raise NotApplicable("objective.routing")
    stage.needs_models()
    sizes = stage.around.teacher_sizes
    if sizes.num_experts == 0:
        others = sum(stage.config.objective.weights[name].largest for name in TERM_NAMES if name != "routing")
        patch: dict[str, Value] = {"objective.routing.weight": 0.0} if others > 0 else {}
        yield fail(f"objective.routing is on, and the teacher ({sizes.family}) has no experts", **patch)
    elif stage.config.objective.routing.num_experts.largest > sizes.num_experts:
        yield fail(
            f"num_experts goes up to {stage.config.objective.routing.num_experts.largest:g}, and the teacher has "
            f"{sizes.num_experts}",
            **{
                "objective.routing.num_experts": _at_most(stage.config.objective.routing.num_experts, sizes.num_experts)
            },
        )


def _at_most(schedule: Schedule, value: int) -> Value:
    if schedule.smallest >= value:
        return float(value)
    tree: dict[str, Value] = schedule.model_dump(mode="json")
    return tree | {"start": min(schedule.start, float(value)), "end": min(schedule.end, float(value))}


CHECKS = (
    Check(
        "KD113",
        "tokenizers differ",
        "two tokenizers, and distributions compared id by id",
        "An id names another token in each vocabulary: the divergence is large, and means nothing.",
        "Compare groups of tokens and spans (kdkit does where tokenizers differ), or take a pair with one tokenizer.",
        POST_MORTEMS,
        check_tokenizers,
    ),
    Check(
        "KD114",
        "padding is the end of text",
        "pad token and end-of-text token are one",
        "A trainer that leaves the padding id out of the loss leaves the end of text out too: the student never learns "
        "to stop. kdkit masks by length.",
        "Mask by length, or give the tokenizer a padding token of its own.",
        "github.com/huggingface/trl issue 1623",
        check_padding,
    ),
    Check(
        "KD115",
        "chat template",
        "template chat for a model that has none, or another prompt for two models that were tuned on chats",
        "Models that were tuned on chats answer best, and stop, under the template they were tuned with.",
        "Take template chat where both models have one, else alpaca or plain.",
        "documentation of transformers, chat templates",
        check_chat_template,
    ),
    Check(
        "KD116",
        "layers",
        "more layers to be paired than a model has, or a student deeper than its teacher without a map",
        "Pairing by index leaves layers of the deeper model without a partner, or ends in an error.",
        "Pair layers at equal shares of the depth, at most as many as the shallower model has.",
        POST_MORTEMS,
        check_depth,
    ),
    Check(
        "KD117",
        "experts of a dense teacher",
        "the routing term with a teacher that has no experts, or fewer than are asked for",
        "There is nothing to mix, and the run stops at its first step.",
        "Set objective.routing.weight=0.",
        "kdkit",
        check_routing,
    ),
)

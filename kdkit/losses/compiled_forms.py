"""Which terms the compiled backends "native" and "cuda" of the head pass know, and by what numbers."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import torch
from torch import Tensor

from kdkit.losses import divergences
from kdkit.losses.terms import DivergenceTerm, LabelTerm, Task, Term


class Kind(IntEnum):
    """What a term computes; the loops and the kernels have the same numbers."""

    FORWARD_KL = 0
    REVERSE_KL = 1
    JSD = 2
    TVD = 3
    SKEW_FORWARD_KL = 4
    SKEW_REVERSE_KL = 5
    ALPHA_BETA = 6
    LABELS = 7


KINDS: dict[Callable[..., Tensor], Kind] = {
    divergences.forward_kl: Kind.FORWARD_KL,
    divergences.reverse_kl: Kind.REVERSE_KL,
    divergences.jsd: Kind.JSD,
    divergences.tvd: Kind.TVD,
    divergences.skew_forward_kl: Kind.SKEW_FORWARD_KL,
    divergences.skew_reverse_kl: Kind.SKEW_REVERSE_KL,
    divergences.alpha_beta: Kind.ALPHA_BETA,
}
"""Losses with a compiled form."""
WITHOUT_SKEW = {Kind.SKEW_FORWARD_KL: Kind.FORWARD_KL, Kind.SKEW_REVERSE_KL: Kind.REVERSE_KL}
"""What is left where alpha is 0."""


@dataclass(frozen=True)
class Form:
    """A term as compiled code knows it."""

    kind: Kind
    """What it computes."""
    temperature: float
    """Divides both sides' logits."""
    own: tuple[float, float] = (0.0, 0.0)
    """The loss's own arguments."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A task as compiled code takes it."""

    temperatures: list[float]
    """1 first, if it is among them."""
    forms: list[Form]
    """Of the terms, in their order."""


def plan_of(task: Task) -> Plan | str:
    """How compiled code does a task.

    Args:
        task: the terms, the student's head and the teacher's signal.
    Returns:
        The plan, or why there is none.
    """
    forms = {term.name: _form_of(term) for term in task.terms}
    for name, form in forms.items():
        if form is None:
            return f"term {name!r} has no compiled form"
    if task.head.softcap is not None:
        return "the head has a soft cap"
    known = [form for form in forms.values() if form is not None]
    return Plan(sorted(task.temperatures, key=lambda temperature: temperature != 1.0), known)


def _form_of(term: Term) -> Form | None:
    """None for spans, a loss of the caller's own and the limits of `alpha_beta`."""
    if isinstance(term, LabelTerm):
        return Form(Kind.LABELS, 1.0)
    if not isinstance(term, DivergenceTerm):
        return None
    loss = term.loss
    own = loss.keywords if isinstance(loss, partial) else {}
    function = loss.func if isinstance(loss, partial) else loss
    if function not in KINDS or (isinstance(loss, partial) and loss.args):
        return None
    return _resolved(KINDS[function], term.temperature, _all_of(function, own))


def _all_of(function: Callable[..., Tensor], own: dict[str, float]) -> dict[str, float]:
    """A loss's own arguments, those left out included; it refuses those that are not allowed."""
    nothing = torch.zeros(0, 1)
    function(nothing, nothing, **own)
    signature = inspect.signature(function).bind(nothing, nothing, **own)
    signature.apply_defaults()
    return {name: value for name, value in signature.arguments.items() if name in ("alpha", "beta")}


def _resolved(kind: Kind, temperature: float, own: dict[str, float]) -> Form | None:
    """A loss at these arguments; None at a limit that has no form."""
    alpha, beta = own.get("alpha", 0.0), own.get("beta", 0.0)
    if kind == Kind.JSD:
        return Form(kind, temperature, (beta, 0.0))
    if kind == Kind.ALPHA_BETA:
        return None if 0 in (alpha, beta, round(alpha + beta, 12)) else Form(kind, temperature, (alpha, beta))
    return Form(WITHOUT_SKEW.get(kind, kind) if alpha == 0 else kind, temperature, (alpha, 0.0))

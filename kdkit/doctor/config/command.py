"""`kdkit doctor CONFIG`: what is asked, and the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdkit.doctor.config import Fixed, diagnose_config, fix_config
from kdkit.doctor.findings import Diagnosis
from kdkit.files import write_whole
from kdkit.memory.cards import card_here, choose_card


@dataclass(frozen=True)
class ConfigRequest:
    """What is asked beside the config."""

    overrides: Sequence[str] = ()
    gpu: str | None = None
    budget_gib: float | None = None
    num_rows: int | None = None
    output: Path | None = None
    """Where the corrected config goes; None corrects nothing."""


def answer_config(source: str, request: ConfigRequest) -> tuple[Diagnosis, Fixed | None]:
    """Judge a config, and mend it if asked.

    Args:
        source: as `diagnose_config`.
        request: the command's options.
    Returns:
        The diagnosis, of the mended config where there is one, and what was changed.
    Raises:
        UserError: as `diagnose_config`; nothing is written then.
    """
    is_named = request.gpu is not None or request.budget_gib is not None
    card = choose_card(request.gpu, request.budget_gib) if is_named else card_here()
    if request.output is None:
        return diagnose_config(source, request.overrides, card=card, num_rows=request.num_rows), None
    fixed = fix_config(source, request.overrides, card=card, num_rows=request.num_rows)
    write_whole(request.output, fixed.text.encode())
    return fixed.diagnosis, fixed

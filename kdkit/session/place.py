"""Where a notebook runs: Kaggle or elsewhere, with a person or as a batch, on which card, online or not, how long."""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kdkit.attached import find_model, find_rows
from kdkit.errors import UserError
from kdkit.runtime import GIB, Preflight, environment, hub_answers, is_batch, preflight, usable_dtype
from kdkit.session.packages import install_lacking, old_torchao
from kdkit.training.stopping import StopRequest

BUDGET_HOURS = 11.0
"""Of Kaggle's 12 for a session: the rest is for saving, measuring and showing."""
WEEKLY_GPU_HOURS = 30.0
"""Kaggle's quota."""
LARGE_CARD_BYTES = 14 * GIB
"""What a T4 leaves usable, and enough for GPT-2 XL as a teacher."""
LOW_DISK_BYTES = 2 * GIB
SCRATCH = Path("/tmp/huggingface")
"""On Kaggle, for downloads: what lies in the working folder is saved with the notebook, and 20 GB is all it takes."""

_TOLD = "KDKIT_TOLD_HUB_OFFLINE"
_BEGAN = time.monotonic()  # a first cell that runs again does not begin another session


@dataclass(frozen=True)
class Session:
    """Where this notebook runs, and until when."""

    machine: Preflight
    is_kaggle: bool
    is_batch: bool
    """Nobody is there: the notebook runs from top to bottom, and an error would lose what Kaggle saves."""
    has_internet: bool
    hours: float
    """Budget."""

    @property
    def deadline(self) -> float:
        """When training is to stop, as `time.monotonic()` counts."""
        return _BEGAN + 3600 * self.hours

    @property
    def hours_left(self) -> float:
        """Of the budget; 0 when it is used up."""
        return max(self.deadline - time.monotonic(), 0.0) / 3600

    def suits(self, preset: str) -> bool:
        """Whether a preset of large models can run: a card of about 16 GB, and its models and rows online or attached.

        Args:
            preset: its name; it names models and rows of the hub.
        Raises:
            UserError: there is no such preset, or something it needs is attached more than once.
        """
        from kdkit.config import load_config  # begin may have had to install what it needs

        config = load_config(preset)
        if self.machine.device != "cuda" or self.machine.total_memory_bytes < LARGE_CARD_BYTES:
            return False
        models, rows = (config.teacher.path, config.student.path), config.data.train.partition("#")[0]
        return self.has_internet or (all(map(find_model, models)) and find_rows(rows) is not None)

    def stop_request(self) -> StopRequest:
        """Stops a run at the deadline, or before."""
        return StopRequest(deadline=self.deadline)

    def quota(self, hours: float) -> str:
        """Hours of a session in words, with their share of Kaggle's week where they count."""
        counts = self.is_kaggle and self.machine.device == "cuda"
        share = f", {hours / WEEKLY_GPU_HOURS:.0%} of a week's {WEEKLY_GPU_HOURS:.0f} GPU hours" if counts else ""
        return f"{hours:.1f} h{share}" if hours >= 1 else f"{60 * hours:.0f} min{share}"


def begin(*, hours: float = BUDGET_HOURS) -> Session:
    """Make a notebook ready: folders and token, packages, the card; and say what was found.

    On Kaggle, downloads go to scratch, and the hub's token is taken from the secret HF_TOKEN where there is one.

    Args:
        hours: after which training stops, counted from the first call in this process: a kernel that was restarted does
            not know what the session had used before.
    Returns:
        Session.
    Raises:
        UserError: a package cannot be had, or the card cannot run this build of torch; the message has the remedy.
    """
    kind = os.environ.get("KAGGLE_KERNEL_RUN_TYPE")
    if hours <= 0:
        raise UserError(f"a session of {hours:g} hours trains nothing: give more than 0; Kaggle allows 12")
    if kind is not None:
        _use_scratch()
        _use_secret()
    has_internet = _look_for_internet()
    installed = install_lacking()
    machine = preflight()
    if not machine.ok:
        raise UserError(f"{machine.problem}\n-> {machine.remedy}\n   then restart the session")
    session = Session(machine, kind is not None, is_batch(), has_internet, hours)
    for line in _findings(session, installed):
        print(line)
    return session


def skip_the_rest() -> None:
    """Make the cells below this one do nothing: an error in a batch session would lose what was saved."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is not None:
        shell.input_transformers_cleanup.append(lambda lines: [])


def _look_for_internet() -> bool:
    """Whether the hub answers; where not, its library is told, or it tries each file again and again."""
    if os.environ.pop(_TOLD, None):  # by an earlier call, before the internet was switched on
        del os.environ["HF_HUB_OFFLINE"]
    has_internet = hub_answers()
    if not has_internet and "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = os.environ[_TOLD] = "1"
    return has_internet


def _use_scratch() -> None:
    """Before huggingface_hub is imported: it reads the variable once."""
    if "HF_HOME" not in os.environ:
        SCRATCH.mkdir(parents=True, exist_ok=True)
        os.environ["HF_HOME"] = str(SCRATCH)


def _use_secret() -> None:
    if "HF_TOKEN" in os.environ or find_spec("kaggle_secrets") is None:
        return
    from kaggle_secrets import UserSecretsClient

    try:
        os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")
    except Exception as error:  # noqa: BLE001  (no secret, no permission, no network: each a class of Kaggle's own)
        print(
            f"no HF_TOKEN among the secrets of this notebook ({type(error).__name__}): models behind a login stay shut"
        )


def _findings(session: Session, installed: Sequence[str]) -> Iterator[str]:
    """What a reader should know before anything long begins."""
    machine, versions = session.machine, environment()
    yield ", ".join(f"{name} {versions[name]}" for name in ("kdkit", "python", "torch", "transformers", "datasets"))
    card = f"{machine.num_devices} x {machine.name}" if machine.device == "cuda" else f"CPU ({machine.name})"
    dtype = usable_dtype(machine.device, machine.capability)
    yield f"{card}, {machine.total_memory_bytes / GIB:.1f} GiB; {dtype.dtype}: {dtype.reason}"
    place = ("Kaggle" if session.is_kaggle else "not Kaggle") + (", as a batch" if session.is_batch else "")
    free = shutil.disk_usage(Path.cwd()).free
    yield (
        f"{place}; internet {'on' if session.has_internet else 'off'}; {free / GIB:.0f} GiB of disk free; training "
        f"stops after {session.quota(session.hours)}"
    )
    if installed:
        yield f"installed: {', '.join(installed)}"
    stale = [name for name in (said.partition(" ")[0] for said in installed) if name.replace("-", "_") in sys.modules]
    if stale:
        yield f"restart the session: an older {', '.join(stale)} was loaded before it was replaced"
    if machine.problem:
        yield f"{machine.problem} {machine.remedy}".strip()
    if free < LOW_DISK_BYTES:
        yield f"only {free / GIB:.1f} GiB free in {Path.cwd()}: delete what is not needed"
    if advice := old_torchao():
        yield advice

"""A run in a notebook: it goes on where an earlier cell or session stopped, and ends before the session does."""

import shutil
import stat
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdkit.attached import find_output
from kdkit.config import DistillConfig
from kdkit.errors import UserError
from kdkit.session.place import Session, skip_the_rest
from kdkit.training.folder import CONFIG_FILE, RunFolder
from kdkit.training.run import RunResult, run_distillation
from kdkit.training.stopping import Interrupted

IN_BACKGROUND: dict[Path, object] = {}
"""Folder of a run that trains in the background of this notebook -> its controls."""
STEPS_FOR_SPEED = 10
"""After which a run says how long it will take."""


def start_or_resume(
    config: DistillConfig, folder: str | Path, *, session: Session, resume: bool = True
) -> RunResult | None:
    """Run a config in a notebook; run again, it goes on where it stopped.

    Stopping the cell saves the last complete step, and so does the end of the session's time. A new session begins with
    an empty disk: attach the output of the earlier version, and the run in it is copied here first. Progress goes to
    stdout, where it is not red.

    Args:
        config: the run.
        folder: of the run.
        session: how long it may take.
        resume: continue the run that is there, if there is one; False refuses a folder that holds something.
    Returns:
        As `run_distillation`; None where the time of a batch session ended: the cells that follow are skipped, since an
        error would lose what is saved.
    Raises:
        UserError, RunFailed, Interrupted: as `run_distillation`; or several attached outputs hold this run.
    """
    folder = Path(folder)
    check_nothing_trains()
    if resume and not (folder / CONFIG_FILE).is_file():
        bring_back(folder)
    begun = resume and (folder / CONFIG_FILE).is_file()
    try:
        with redirect_stderr(sys.stdout), session.stop_request().on_signals() as stop:
            if not RunFolder(folder).evaluation.is_file():
                stop.check()
            return run_distillation(config, folder, resume=begun, stop=stop, callbacks=[TimeNote(session)])
    except Interrupted as interrupted:
        print(f"stopped by {interrupted.reason}: what is done is in {folder}. {how_to_go_on(session)}")
        if not session.is_batch:
            raise
        skip_the_rest()
        return None


def check_nothing_trains() -> None:
    """Refuse a second run: accelerate has one state for the whole process.

    Raises:
        UserError: names the run that trains.
    """
    for folder in IN_BACKGROUND:
        raise UserError(
            f"{folder} is training in the background of this notebook, which runs one at a time: stop it first"
        )


def how_to_go_on(session: Session) -> str:
    """What a person does to continue in another session."""
    if not session.is_kaggle:
        return "Run the notebook again to go on."
    return (
        "To go on: save this version, open the notebook again, add this version's output under Input (Add Input, Your "
        "Work, Notebooks), and run it again."
    )


class TimeNote(TrainerCallback):
    """Says once, when the speed is known, how long the stage takes and whether the session is long enough.

    Args:
        session: whose time it is.
        say: takes the line.
    """

    def __init__(self, session: Session, *, say: Callable[[str], None] = print) -> None:
        self.session = session
        self.say = say
        self._began = 0.0
        self._first_step = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the first steps; the very first one is no measure."""
        if state.global_step == self._first_step + 1:
            self._began = time.monotonic()
        if state.global_step != self._first_step + 1 + STEPS_FOR_SPEED:
            return
        seconds = (time.monotonic() - self._began) / STEPS_FOR_SPEED
        left = (state.max_steps - state.global_step) * seconds / 3600
        note = f"{seconds:.2f} s a step: about {self.session.quota(left)} left for this stage"
        if left > self.session.hours_left:
            note += f"; the session has {self.session.hours_left:.1f} h, so it will take another one to finish"
        self.say(note)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where this session takes the stage up."""
        self._first_step = state.global_step


def bring_back(folder: Path) -> None:
    """Copy the run of an earlier session to where it was; the copy is whole or not there."""
    marker = find_output(Path(*folder.parts[-2:]) / CONFIG_FILE)
    if marker is None:
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(marker.parent, partial, copy_function=shutil.copyfile)
    for place in (partial, *partial.rglob("*")):  # what is attached is read-only, and folders take that along
        place.chmod(place.stat().st_mode | stat.S_IWUSR)
    partial.rename(folder)
    print(f"continuing {marker.parent}")

"""A run that trains in the background of a notebook while its knobs are turned by hand."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.display import DisplayHandle, display
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdkit.config import DistillConfig
from kdkit.config.reading import stage_config
from kdkit.errors import RunFailed, UserError
from kdkit.plots.live import FIELD_NAMES, plot_live
from kdkit.schedules import Schedule
from kdkit.session.place import Session
from kdkit.session.runs import IN_BACKGROUND, TimeNote, bring_back, check_nothing_trains, how_to_go_on, start_or_resume
from kdkit.training.controls import TEMPERATURE, THRESHOLD, Controls, planned_values
from kdkit.training.folder import CONFIG_FILE, RunFolder
from kdkit.training.progress import heard_by
from kdkit.training.run import RunResult, run_distillation
from kdkit.training.stopping import Interrupted
from kdkit.widgets.explorer import has_front_end
from kdkit.widgets.picture import Picture

if TYPE_CHECKING:
    import ipywidgets

SAVE_MINUTES = 10.0
"""Between checkpoints where the config names no time: a session without a person's hand on it ends without a word."""
_SECONDS_BETWEEN_PICTURES = 2.0
_DRAWING_FRACTION = 0.1  # of the time at most goes into pictures
_LINES_KEPT = 12
_SMALL_WEIGHT = 0.25


class LiveControls:
    """Sliders for temperature, weights and threshold that act on a run from its next step on, with live curves.

    Every change is in the run's metrics.jsonl with its step; `kdkit distill CONFIG --replay metrics.jsonl` repeats the
    run, on a CPU bit for bit. What kdkit draws in other cells meanwhile changes nothing; what a cell draws from the
    global random states itself does. Where nobody can move a slider, `start` trains in the foreground, and shows the
    curves.

    Args:
        config: the run. Without times of its own, checkpoints are written every 10 minutes and at a pause.
        folder: of the run; what is in it goes on.
        session: until when it may train.
    """

    def __init__(self, config: DistillConfig, folder: str | Path, *, session: Session) -> None:
        self.config = _saving_by_the_clock(config)
        self.folder = Path(folder)
        self.session = session
        self.controls = Controls(on_pause=self._stand_still)
        self.stop = session.stop_request()
        self.result: RunResult | None = None
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self.picture = Picture()
        self.watch: list[TrainerCallback] = [TimeNote(session, say=self._say), _Watch(self)]
        self.sliders: dict[str, ipywidgets.Widget] = {}
        self.box: ipywidgets.VBox | None = None
        self._thread: threading.Thread | None = None
        self._display: DisplayHandle | None = None  # there is none without a notebook
        if has_front_end():
            self.box = self._build(_changeable(self.config))

    def start(self) -> "LiveControls":
        """Show the sliders and train in the background.

        Returns:
            Those that train: these, or, where a cell is run again, the ones that are training in this folder already.
        Raises:
            UserError: another run trains in the background of this notebook.
        """
        if self.box is None:
            self.result = start_or_resume(self.config, self.folder, session=self.session)
            self.update_picture()
            data, metadata = self.picture.bundle()
            display(data, metadata=metadata, raw=True)
            return self
        training = IN_BACKGROUND.get(self.folder.resolve())
        if isinstance(training, LiveControls):
            training._show()
            return training
        check_nothing_trains()
        IN_BACKGROUND[self.folder.resolve()] = self
        self._show()
        self._thread = threading.Thread(target=self._train, name=f"training {self.folder}", daemon=True)
        self._thread.start()
        return self

    def _show(self) -> None:
        data, metadata = self.picture.bundle(self.box)
        self._display = display(data, metadata=metadata, raw=True, display_id=True)

    def wait(self, seconds: float | None = None) -> RunResult | None:
        """Wait for the end of training; meanwhile this notebook hears no slider.

        Args:
            seconds: at most; None: as long as it takes.
        Returns:
            The finished run, or None where it has not ended, was stopped or broke off.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        return self.result

    # ---- what is shown ----

    def _build(self, values: Mapping[str, Schedule]) -> "ipywidgets.VBox":
        import ipywidgets

        self.sliders = {field: _slider(field, schedule) for field, schedule in values.items()}
        for field, slider in self.sliders.items():
            slider.observe(lambda change, field=field: self._ask(field, change["new"]), names="value")
        self.pause_button = ipywidgets.Button(description="Pause")
        self.stop_button = ipywidgets.Button(description="Stop and save")
        self.pause_button.on_click(lambda _: self._pause_or_go_on())
        self.stop_button.on_click(lambda _: self._stop())
        self.status, self.message = ipywidgets.HTML("starting"), ipywidgets.HTML()
        self.log = ipywidgets.HTML()
        buttons = ipywidgets.HBox([self.pause_button, self.stop_button])
        return ipywidgets.VBox(
            [*self.sliders.values(), buttons, self.status, self.message, self.picture.widget(), self.log]
        )

    def _ask(self, field: str, value: float) -> None:
        """What a person's hand on a slider does; the training thread moves sliders too, to where the knobs are."""
        if threading.current_thread() is self._thread:
            return
        try:
            self.controls.ask(field, value)
        except UserError as error:
            self.message.value = f'<b role="alert">{escape(str(error))}</b>'
        else:
            self.message.value = ""

    def _pause_or_go_on(self) -> None:
        if self.controls.is_paused:
            self.controls.go_on()
            self.pause_button.description = "Pause"
        else:
            self.controls.pause()
            self.pause_button.description = "Go on"
            self.status.value = "pausing: the step under way is finished and saved first"

    def _stop(self) -> None:
        self.stop.ask("you")
        self.status.value = "stopping: the step under way is finished and saved first"

    def _stand_still(self, step: int) -> None:
        self.status.value = f"paused after step {step}, which is saved"

    def update_picture(self) -> None:
        """Draw what the log holds by now."""
        rows = RunFolder(self.folder).metrics.rows()
        if any(row["kind"] == "train" for row in rows):
            self.picture.draw(plot_live(rows))

    # ---- what happens in the background ----

    def _train(self) -> None:
        """The run, from its start or from where it stopped; whatever ends it is said in the box."""
        try:
            if not (self.folder / CONFIG_FILE).is_file():
                bring_back(self.folder)
            with heard_by(self._say):
                self.result = run_distillation(
                    self.config,
                    self.folder,
                    resume=(self.folder / CONFIG_FILE).is_file(),
                    stop=self.stop,
                    controls=self.controls,
                    callbacks=self.watch,
                )
            figures = self.result.evaluations["student"]
            self.status.value = f"finished: ROUGE-L {figures['rouge_l']:.1f}; the student is in {self.result.model}"
        except Interrupted as interrupted:
            self.status.value = f"stopped by {interrupted.reason}, saved in {self.folder}. {how_to_go_on(self.session)}"
        except (UserError, RunFailed) as error:
            self.status.value = f'<b role="alert">{escape(str(error))}</b>'
        except BaseException as error:
            said = escape(f"{type(error).__name__}: {error}")
            self.status.value = f'<b role="alert">{said}</b>; what is done is saved in {self.folder}'
            raise
        finally:
            del IN_BACKGROUND[self.folder.resolve()]
            self._close()

    def _close(self) -> None:
        """Nothing can be turned any more; the picture of the end is what a saved notebook shows."""
        for widget in (*self.sliders.values(), self.pause_button, self.stop_button):
            widget.disabled = True
        self.update_picture()
        if self._display is not None:
            data, metadata = self.picture.bundle(self.box)
            self._display.update(data, metadata=metadata, raw=True)

    def _say(self, text: str) -> None:
        """The run's last lines of progress, below the picture."""
        self._lines.extend(text.splitlines())
        self.log.value = f"<pre>{escape(chr(10).join(self._lines))}</pre>"


class _Watch(TrainerCallback):
    """Keeps the box true to the run: sliders, status, curves."""

    def __init__(self, live: LiveControls) -> None:
        self.live = live
        self._drawn_at = self._drawing = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say where the run is."""
        if not self.live.stop.reason and not self.live.controls.is_paused:
            self.live.status.value = f"step {state.global_step} of {state.max_steps}"

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move sliders that nobody turned to where a schedule or a collapse rule moved the knobs."""
        values = self.live.controls.values
        for field, slider in self.live.sliders.items():
            slider.disabled = field not in values
            if field in values and not self.live.controls.is_wanted(field) and slider.value != values[field]:
                slider.value = values[field]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Draw the curves, but never most of the time."""
        began = time.monotonic()
        if began - self._drawn_at < max(_SECONDS_BETWEEN_PICTURES, self._drawing / _DRAWING_FRACTION):
            return
        self.live.update_picture()
        self._drawn_at = time.monotonic()
        self._drawing = self._drawn_at - began

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Until the next stage begins there is nothing to turn."""
        for slider in self.live.sliders.values():
            slider.disabled = True


def _saving_by_the_clock(config: DistillConfig) -> DistillConfig:
    if config.checkpoint.every_steps or config.checkpoint.every_minutes:
        return config
    saving = config.checkpoint.model_copy(update={"every_minutes": SAVE_MINUTES})
    return config.model_copy(update={"checkpoint": saving})


def _changeable(config: DistillConfig) -> dict[str, Schedule]:
    """What can be changed in any stage, and how the first stage that has it moves it."""
    found: dict[str, Schedule] = {}
    for stage in config.stages:
        found = planned_values(stage_config(config, stage)) | found
    return found


def _slider(field: str, schedule: Schedule) -> "ipywidgets.Widget":
    """A slider that reports when it is let go; the temperature counts in powers of two, weights in forties of a range.

    A term that is to weigh 0.05 at most needs finer steps than one that weighs 1.
    """
    import ipywidgets

    shared = {
        "value": schedule.start,
        "description": FIELD_NAMES[field],
        "continuous_update": False,
        "disabled": True,  # until a stage begins
        "readout_format": ".2f",
        "style": {"description_width": "130px"},
        "layout": ipywidgets.Layout(width="560px"),
    }
    if field == TEMPERATURE:
        return ipywidgets.FloatLogSlider(base=2, min=-1, max=4, step=0.05, **shared)
    if field == THRESHOLD:
        return ipywidgets.FloatSlider(min=0, max=1, step=0.05, **shared)
    is_small = schedule.largest < _SMALL_WEIGHT
    most = 4 * schedule.largest if is_small else max(2.0, 2 * schedule.largest)
    shared["readout_format"] = ".3f" if is_small else ".2f"
    return ipywidgets.FloatSlider(min=0, max=most, step=most / 40, **shared)

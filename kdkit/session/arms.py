"""Several kinds of runs in a notebook, each with the same seeds, so that their figures can be compared in pairs."""

import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

from kdkit.config import DistillConfig
from kdkit.errors import UserError
from kdkit.session.place import Session
from kdkit.session.runs import how_to_go_on, start_or_resume
from kdkit.training.run import RunResult
from kdkit.training.sweep import SEED_STRIDE

LOG_FILE = "log.txt"


def run_arms(
    arms: Mapping[str, DistillConfig], folder: str | Path, *, session: Session, num_seeds: int = 1
) -> dict[str, dict[int, RunResult]]:
    """Run each config with each seed; run again, it goes on where it stopped.

    One line a run is printed, with the time left; what the runs themselves say is in `log.txt`.

    Args:
        arms: name -> config; their seeds are the config's own, and on by 10.
        folder: of all runs: each is in `<name>/seed-<seed>`.
        session: how long they may take.
        num_seeds: of each arm. Seed by seed, so that what is interrupted has whole comparisons.
    Returns:
        Arm -> seed -> run. Runs that the time of a batch session did not allow are left out.
    Raises:
        UserError, RunFailed, Interrupted: as `start_or_resume`; or there is no arm or no seed.
    """
    if not arms or num_seeds < 1:
        raise UserError(f"{len(arms)} kinds of runs with {num_seeds} seeds: give at least one of each")
    folder, results = Path(folder), {name: dict[int, RunResult]() for name in arms}
    folder.mkdir(parents=True, exist_ok=True)
    began, num_runs = time.monotonic(), len(arms) * num_seeds
    for number, (index, name) in enumerate(product(range(num_seeds), arms), start=1):
        seed = arms[name].seed + SEED_STRIDE * index
        config = arms[name].model_copy(update={"seed": seed})
        with (folder / LOG_FILE).open("a", encoding="utf-8") as log, redirect_stdout(log):
            result = start_or_resume(config, folder / name / f"seed-{seed}", session=session)
        if result is None:
            print(f"the session's time is over after {number - 1} of {num_runs} runs. {how_to_go_on(session)}")
            break
        results[name][seed] = result
        left = (num_runs - number) * (time.monotonic() - began) / number
        print(f"{number}/{num_runs} {name}, seed {seed}: {_figures(result)}; about {left / 60:.1f} min left")
    return results


def _figures(result: RunResult) -> str:
    student = result.evaluations["student"]
    entropy, rouge_l = (student.get(name) for name in ("cross_entropy", "rouge_l"))
    said = [] if entropy is None else [f"cross-entropy {entropy:.3f} nats a token"]
    return ", ".join(said + ([] if rouge_l is None else [f"ROUGE-L {rouge_l:.1f}"]))

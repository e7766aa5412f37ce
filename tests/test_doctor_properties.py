"""Each run check fires on traces built to have its fault, and all stay silent on healthy ones, most of them real."""

import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkit.doctor import RUN_CHECKS, Diagnosis, Series, Trace, diagnose_run
from kdkit.doctor.findings import examine
from kdkit.doctor.trace import Event, Planned

TRACES = Path(__file__).parent / "traces"
SEEDS = st.integers(0, 2**32 - 1)
PREFIXES = 3
"""Of each healthy run that are looked at, as a live run shows them."""


# --- Built runs ------------------------------------------------------------------------------------------------------


@dataclass
class Built:
    """A run whose figures can be spoilt before it is looked at."""

    steps: np.ndarray
    eval_steps: np.ndarray
    train: dict[str, np.ndarray]
    evals: dict[str, np.ndarray]
    planned: Planned
    events: list[Event] = field(default_factory=list)
    num_lines: int | None = None
    missing_from: dict[str, int] = field(default_factory=dict)
    """Figure -> row from which on it is not logged."""

    def sum_up(self) -> None:
        """Make the totals the sums of the terms."""
        terms = ("kd", "lm", "dtw")
        self.train["loss"] = sum(self.train[f"part/{term}"] * self.train[f"weight/{term}"] for term in terms)
        self.evals["loss"] = sum(self.evals[f"part/{term}"] * self.train[f"weight/{term}"][-1] for term in terms)

    @property
    def codes(self) -> set[str]:
        train = {
            name: Series(name, self.steps[: self.missing_from.get(name)], values[: self.missing_from.get(name)])
            for name, values in self.train.items()
        }
        evals = {name: Series(name, self.eval_steps, values) for name, values in self.evals.items()}
        trace = Trace("built", train, evals, self.events, self.planned, self.num_lines)
        return examine("built", {None: trace}, RUN_CHECKS).codes


def rate_of(family: str, steps: np.ndarray, *, warmup: float, end: float, peak: float) -> np.ndarray:
    """A learning rate, as transformers has it."""
    share = np.clip((steps - warmup) / (end - warmup), 0, 1)
    decay = {"linear": 1 - share, "cosine": (1 + np.cos(np.pi * share)) / 2, "constant": np.ones(len(steps))}[family]
    return peak * np.where(steps < warmup, steps / max(warmup, 1), decay)


def noisy(rng: np.random.Generator, values: np.ndarray, share: float) -> np.ndarray:
    return values * (1 + share * rng.uniform(-1, 1, len(values)))


def healthy(rng: np.random.Generator) -> Built:
    """A run of kdkit that goes well: three terms that fall, quality that rises with some noise."""
    every, num_rows, num_evals = int(rng.choice([4, 10, 50])), int(rng.integers(40, 200)), int(rng.integers(8, 20))
    steps = every * np.arange(1, num_rows + 1)
    eval_steps = np.linspace(steps[0], steps[-1], num_evals).astype(int)
    total, family = int(steps[-1]), str(rng.choice(["linear", "cosine", "constant"]))
    fall = np.exp(-3 * steps / total)
    train = {
        "part/kd": noisy(rng, rng.uniform(0.5, 2) + rng.uniform(1, 4) * fall, 0.02),
        "part/lm": noisy(rng, rng.uniform(1, 3) + rng.uniform(2, 4) * fall, 0.02),
        "part/dtw": noisy(rng, 0.2 + 0.5 * fall, 0.02),
        "weight/kd": np.full(num_rows, 0.7),
        "weight/lm": np.full(num_rows, 0.3),
        "weight/dtw": np.full(num_rows, 0.1),
        "learning_rate": rate_of(family, steps, warmup=0.1 * total, end=total, peak=10 ** rng.uniform(-5, -2)),
        "grad_norm": 10 ** rng.uniform(-1, 0.5) * rng.lognormal(0, 0.3, num_rows),
        "update_norm": rng.uniform(0.01, 0.1, num_rows),
        "seconds": noisy(rng, np.full(num_rows, rng.uniform(1, 10)), 0.3),
        "memory/used_fraction": rng.uniform(0.4, 0.88, num_rows),
        "routing/load_balance": rng.uniform(0.0001, 0.5, num_rows),
        "rollout/repeat_fraction": rng.uniform(0, 0.15, num_rows),
    }
    rise, cross_entropy = 1 - np.exp(-3 * eval_steps / total), np.interp(eval_steps, steps, train["part/lm"])
    evals = {f"part/{term}": np.interp(eval_steps, steps, train[f"part/{term}"]) for term in ("kd", "lm", "dtw")} | {
        "cross_entropy": cross_entropy,
        "perplexity": np.exp(cross_entropy),
        "rouge_l": noisy(rng, 15 + 20 * rise, 0.03),
        "exact_match": noisy(rng, 2 + 4 * rise, 0.2),
        "mean_tokens": noisy(rng, np.full(num_evals, 25.0), 0.15),
        "ended_fraction": rng.uniform(0.85, 1, num_evals),
        "rollout/threshold": np.full(num_evals, 0.3),
    }
    run = Built(steps, eval_steps, train, evals, Planned(num_steps=total, scheduler=family, max_grad_norm=1.0))
    run.sum_up()
    return run


# --- Faults ----------------------------------------------------------------------------------------------------------

Fault = Callable[[np.random.Generator, Built], None]


def some_row(rng: np.random.Generator, values: np.ndarray, *, low: float = 0.0, high: float = 1.0) -> int:
    """An index between two shares of the run."""
    return int(rng.integers(int(low * (len(values) - 1)), int(high * (len(values) - 1)) + 1))


def zero_rate(rng: np.random.Generator, run: Built) -> None:
    run.train["learning_rate"] = np.zeros(len(run.steps))


def stretched(rng: np.random.Generator, run: Built) -> None:
    family, end = str(rng.choice(["linear", "cosine"])), rng.uniform(2, 16) * run.steps[-1]
    run.planned = replace(run.planned, scheduler=family)
    warmup = rng.uniform(0, 0.3) * run.steps[-1]
    run.train["learning_rate"] = rate_of(family, run.steps, warmup=warmup, end=end, peak=1e-3)


def frozen(rng: np.random.Generator, run: Built) -> None:
    at = some_row(rng, run.eval_steps, high=0.5)
    run.evals["loss"][at : at + 2] = run.evals["loss"][at]


def capped(rng: np.random.Generator, run: Built) -> None:
    run.evals["perplexity"][some_row(rng, run.eval_steps) :] = round(math.exp(rng.choice([20, 50])), 2)


def of_the_total(rng: np.random.Generator, run: Built) -> None:
    run.evals["perplexity"] = np.exp(run.evals["cross_entropy"] + rng.uniform(0.1, 20))


def not_finite(rng: np.random.Generator, run: Built) -> None:
    name = str(rng.choice(["loss", "part/kd", "part/lm"]))
    run.train[name][some_row(rng, run.steps)] = rng.choice([math.nan, math.inf])


def too_large(rng: np.random.Generator, run: Built) -> None:
    name = f"part/{rng.choice(['kd', 'lm', 'dtw'])}"
    for figures in (run.train, run.evals):
        figures[name] = rng.uniform(15, 200) * figures[name] / run.train[name].min()
    run.sum_up()


def diverging(rng: np.random.Generator, run: Built) -> None:
    at = some_row(rng, run.steps, low=0.2, high=0.7)
    run.train["loss"][at:] += rng.uniform(4, 50) * run.train["loss"][at]


def still(rng: np.random.Generator, run: Built) -> None:
    run.train["loss"] = noisy(rng, np.full(len(run.steps), rng.uniform(2, 30)), 0.005)


def other_objective(rng: np.random.Generator, run: Built) -> None:
    run.train["weight/dtw"][:] = 0
    run.evals["loss"] = run.train["loss"].max() * rng.uniform(1.6, 10, len(run.eval_steps))


def full_card(rng: np.random.Generator, run: Built) -> None:
    run.train["memory/used_fraction"][some_row(rng, run.steps)] = rng.uniform(0.905, 1)


def event(kind: str, text: str) -> Fault:
    def happen(rng: np.random.Generator, run: Built) -> None:
        run.events.append(Event(kind, text, int(rng.choice(run.steps))))

    return happen


def collapsed(rng: np.random.Generator, run: Built) -> None:
    at = some_row(rng, run.eval_steps, low=0.4, high=0.8)
    run.evals["rouge_l"][at:] = rng.uniform(0.1, 0.78) * run.evals["rouge_l"][:at].max()


def no_match(rng: np.random.Generator, run: Built) -> None:
    run.evals["exact_match"][some_row(rng, run.eval_steps, low=0.3, high=0.8) :] = 0


def chatty(rng: np.random.Generator, run: Built) -> None:
    run.num_lines = 10_001 + int(rng.uniform(6, 50) * run.steps[-1])


def other_scheduler(rng: np.random.Generator, run: Built) -> None:
    named, seen = rng.permutation(["linear", "cosine", str(rng.choice(["linear", "cosine"]))])[:2]
    named = "constant" if named == seen else named
    run.planned = replace(run.planned, scheduler=str(rng.choice([named, f"{named}_with_warmup"])))
    run.train["learning_rate"] = rate_of(seen, run.steps, warmup=0.1 * run.steps[-1], end=run.steps[-1], peak=1e-3)


def dominating(rng: np.random.Generator, run: Built) -> None:
    for figures in (run.train, run.evals):
        figures["part/dtw"] = figures["part/dtw"] * rng.uniform(120, 500)
    run.sum_up()


def unlike_sum(rng: np.random.Generator, run: Built) -> None:
    raw = sum(run.train[f"part/{term}"] for term in ("kd", "lm", "dtw"))
    run.train["loss"] = rng.uniform(1.5, 20) * raw


def oscillating(rng: np.random.Generator, run: Built) -> None:
    run.train["loss"] *= 1 + rng.choice([-1, 1], len(run.steps)) * rng.uniform(0.15, 0.5, len(run.steps))


def spiking(rng: np.random.Generator, run: Built) -> None:
    at = int(rng.integers(5, len(run.steps) - 5))
    run.train["loss"][at] = run.train["loss"].max() * rng.uniform(3, 20)


def bad_gradient(rng: np.random.Generator, run: Built) -> None:
    norm = run.train["grad_norm"]
    match rng.integers(3):
        case 0:
            norm[:] = 0
        case 1:
            norm[-len(norm) // 3 :] *= rng.uniform(300, 1e6)
        case 2:
            norm *= 30 * rng.uniform(1, 100) / np.median(norm)


def vanishing(rng: np.random.Generator, run: Built) -> None:
    name = f"part/{rng.choice(['kd', 'lm', 'dtw'])}"
    match rng.integers(3):
        case 0:
            run.train[name][some_row(rng, run.steps, low=0.3, high=0.5) :] *= rng.choice([0, 1e-8])
        case 1:
            run.train[name][:] = 0
        case 2:
            run.missing_from[name] = some_row(rng, run.steps, low=0.03, high=0.5)


def one_expert(rng: np.random.Generator, run: Built) -> None:
    run.train["routing/load_balance"][some_row(rng, run.steps, high=0.5) :] = rng.uniform(0.92, 1)


def slow(rng: np.random.Generator, run: Built) -> None:
    run.planned = replace(run.planned, num_steps=2 * int(run.steps[-1]))
    run.train["seconds"] *= rng.uniform(13, 100) * 3600 / run.train["seconds"].sum()


def own_text(rng: np.random.Generator, run: Built) -> None:
    at = some_row(rng, run.eval_steps, low=0.4, high=0.8)
    run.evals["rouge_l"][at:] = 0.85 * run.evals["rouge_l"][:at].max()
    run.evals["rollout/threshold"][at:] += rng.uniform(0.1, 0.6)


def longer(rng: np.random.Generator, run: Built) -> None:
    at = some_row(rng, run.eval_steps, low=0.4, high=0.8)
    run.evals["rouge_l"][at:] = 0.85 * run.evals["rouge_l"][:at].max()
    run.evals["mean_tokens"][at:] *= rng.uniform(2.2, 10)


def endless(rng: np.random.Generator, run: Built) -> None:
    run.evals["ended_fraction"][some_row(rng, run.eval_steps, low=0.2, high=0.8) :] -= rng.uniform(0.42, 0.8)


def repeating(rng: np.random.Generator, run: Built) -> None:
    run.train["rollout/repeat_fraction"][-int(rng.integers(8, 20)) :] = rng.uniform(0.5, 1)


FAULTS: dict[str, Fault] = {
    "KD201": zero_rate,
    "KD202": stretched,
    "KD203": frozen,
    "KD204": capped,
    "KD205": of_the_total,
    "KD206": not_finite,
    "KD207": too_large,
    "KD208": diverging,
    "KD209": still,
    "KD210": other_objective,
    "KD211": full_card,
    "KD212": event("dtype", "mat1 and mat2 must have the same dtype, but got Half and Float"),
    "KD213": event("out_of_memory", "CUDA out of memory. Tried to allocate 2.00 GiB"),
    "KD214": collapsed,
    "KD215": no_match,
    "KD216": chatty,
    "KD217": event("early_stop", "Early stopping: no improvement in 10 evaluations"),
    "KD218": other_scheduler,
    "KD219": dominating,
    "KD220": unlike_sum,
    "KD221": oscillating,
    "KD222": spiking,
    "KD223": bad_gradient,
    "KD224": vanishing,
    "KD225": one_expert,
    "KD226": slow,
    "KD227": own_text,
    "KD228": longer,
    "KD229": endless,
    "KD230": repeating,
}


class TestFaults:
    @pytest.mark.parametrize("code", [check.code for check in RUN_CHECKS])
    @settings(max_examples=20, deadline=None)
    @given(seed=SEEDS)
    def test_is_named_wherever_it_is(self, code: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        run = healthy(rng)
        FAULTS[code](rng, run)
        assert code in run.codes

    @settings(max_examples=50, deadline=None)
    @given(seed=SEEDS)
    def test_the_run_below_it_is_healthy(self, seed: int) -> None:
        assert healthy(np.random.default_rng(seed)).codes == set()


NAMES = [*healthy(np.random.default_rng(0)).train, "loss", "epoch", "kd_temperature", "weighted/kd", "weighted/lm"]
EVALUATED = [
    "loss",
    "cross_entropy",
    "perplexity",
    "rouge_l",
    "exact_match",
    "mean_tokens",
    "ended_fraction",
    "part/kd",
]
ODD = [0.0, -1.0, 1e-300, 1e308, -1e308, 5.0, 485165195.41, math.nan, math.inf, -math.inf]


class TestAnyTrace:
    @settings(max_examples=100, deadline=None)
    @given(seed=SEEDS)
    def test_is_looked_at_without_a_traceback(self, seed: int) -> None:
        """Figures of any length and number, with or without a plan: found, passed or skipped, never an error."""
        rng = np.random.default_rng(seed)

        def figures(names: list[str]) -> dict[str, Series]:
            chosen = [name for name in names if rng.random() < 0.6]
            return {name: some_series(rng, name) for name in chosen}

        planned = Planned(
            num_steps=rng.choice([None, 1, 100, 2**53 - 1]),
            num_epochs=rng.choice([None, 1e-300, 3.0, 1e299]),
            scheduler=rng.choice([None, "cosine", "linear", "constant", "other"]),
            max_grad_norm=rng.choice([None, 1.0, 1e-300]),
        )
        trace = Trace("any", figures(NAMES), figures(EVALUATED), (), planned)
        with np.errstate(all="ignore"):
            diagnosis = examine("any", {None: trace}, RUN_CHECKS)
        assert len(diagnosis.codes) + len(diagnosis.passed) + len(diagnosis.skipped) == len(RUN_CHECKS)


def some_series(rng: np.random.Generator, name: str) -> Series:
    """Of odd values, of few, of one, or falling."""
    length = int(rng.choice([1, 2, 5, 30]))
    values = np.linspace(5, 1, length) if rng.random() < 0.3 else rng.choice(ODD[: rng.integers(1, 11)], length)
    return Series(name, np.sort(rng.integers(0, rng.choice([2, 200, 2**53 - 1]), length)), values)


class TestCollapse:
    @settings(max_examples=20, deadline=None)
    @given(seed=SEEDS)
    def test_is_named_within_two_evaluations_and_stays_named(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        run = healthy(rng)
        rouge = run.evals["rouge_l"]
        fall = int(rng.integers(2, len(rouge) - 3))
        rouge[fall:] = rng.uniform(0.05, 0.79, len(rouge) - fall) * rouge[:fall].max()
        named = [
            "KD214" in replace_evaluations(run, num_evals=count).codes for count in range(2, len(rouge) + 1)
        ]  # as a live run sees it
        assert not any(named[: fall - 1])
        assert all(named[fall + 1 :])


def replace_evaluations(run: Built, *, num_evals: int) -> Built:
    """The run up to an evaluation."""
    evals = {name: values[:num_evals] for name, values in run.evals.items()}
    return replace(run, eval_steps=run.eval_steps[:num_evals], evals=evals)


# --- Healthy runs ----------------------------------------------------------------------------------------------------


def real_runs() -> Iterator[dict]:
    """Runs of kdkit; see traces/README.md."""
    with gzip.open(TRACES / "kdkit-runs.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


REAL = list(real_runs())
NUM_OTHERS = 40


def diagnose_rows(folder: Path, config: dict, rows: list[dict]) -> Diagnosis:
    """As `kdkit doctor RUN` sees them."""
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return diagnose_run(folder)


def trainer_state(run: Built, rng: np.random.Generator) -> str:
    """A healthy run as the Trainer of transformers leaves it; its config, and so its scheduler, is not in there."""
    scale = rng.uniform(0.5, 1) * run.train["loss"]
    rows: list[dict] = [
        {"epoch": step / 100, "step": int(step), "loss": round(loss, 4), "grad_norm": norm, "learning_rate": rate}
        for step, loss, norm, rate in zip(
            run.steps, scale, run.train["grad_norm"], run.train["learning_rate"], strict=True
        )
    ]
    rows += [
        {"epoch": step / 100, "step": int(step), "eval_loss": loss, "eval_rougeL": rouge, "eval_runtime": 12.5}
        for step, loss, rouge in zip(run.eval_steps, run.evals["cross_entropy"], run.evals["rouge_l"], strict=True)
    ]
    return json.dumps({"max_steps": run.planned.num_steps, "num_train_epochs": 3, "log_history": rows})


def distillm_log(run: Built) -> str:
    """A healthy run in DistiLLM's words."""
    lines = []
    for step, loss, kd, rate in zip(
        run.steps, run.train["loss"], run.train["part/kd"], run.train["learning_rate"], strict=True
    ):
        lines.append(
            f"train | epoch   0 | Iter: {step:6d}/{run.steps[-1]:6d} | global iter: {step:6d}/{run.steps[-1]:6d} | "
            f"loss: {loss:.4f} | ds_loss: {kd:.4f} | lr: {rate:.4e} | scale: 1024.0000 | micro time: 0.213"
        )
        for at in np.flatnonzero(run.eval_steps == step):
            figures = {"exact_match": run.evals["exact_match"][at], "rougeL": run.evals["rouge_l"][at]}
            rounded = {name: round(float(value), 4) for name, value in figures.items()}
            lines.append(f"dev | avg_loss: {run.evals['cross_entropy'][at]:.4f} | {rounded}")
    return "\n".join(lines)


class TestHealthy:
    """No alarm on 170 real runs and 40 of other trainers, nor at any point on the way."""

    def test_there_are_enough(self) -> None:
        assert len(REAL) + NUM_OTHERS >= 200
        assert len(REAL) > NUM_OTHERS

    @pytest.mark.parametrize("tenth", range(10))
    def test_real_runs_and_what_a_live_run_shows_of_them(self, tenth: int, tmp_path: Path) -> None:
        rng = np.random.default_rng(tenth)
        for run in REAL[tenth::10]:
            lengths = [len(run["rows"]), *rng.integers(1, len(run["rows"]) + 1, PREFIXES)]
            for length in lengths:
                assert diagnose_rows(tmp_path, run["config"], run["rows"][:length]).findings == []

    @pytest.mark.parametrize("seed", range(NUM_OTHERS))
    def test_other_trainers(self, seed: int, tmp_path: Path) -> None:
        rng = np.random.default_rng(seed)
        run = healthy(rng)
        name = "trainer_state.json" if seed % 2 else "log.txt"
        (tmp_path / name).write_text(trainer_state(run, rng) if seed % 2 else distillm_log(run))
        assert diagnose_run(tmp_path / name).findings == []

    def test_every_check_has_a_real_run_to_look_at(self, tmp_path: Path) -> None:
        asked = set()
        for run in REAL:
            asked |= set(diagnose_rows(tmp_path, run["config"], run["rows"]).passed)
        of_text_logs, of_curricula = {"KD216"}, {"KD210"}
        assert asked >= {check.code for check in RUN_CHECKS} - of_text_logs - of_curricula

    def test_guarded_runs_never_collapse(self, tmp_path: Path) -> None:
        guarded = [run for run in REAL if run["config"]["guarded"]]
        assert len(guarded) >= 20
        for run in guarded:
            for length in range(1, len(run["rows"]) + 1, 5):
                assert "KD214" not in diagnose_rows(tmp_path, run["config"], run["rows"][:length]).codes

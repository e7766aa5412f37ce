"""`kdkit plan`: from its options to what it prints and writes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from kdkit.config import DistillConfig
from kdkit.errors import UserError
from kdkit.files import write_whole
from kdkit.memory.cards import Card, choose_card
from kdkit.memory.fit import Fit, as_settings, fit_run
from kdkit.memory.planning import Pair, RunPlan, are_other_tokenizers, plan_run, stages_of
from kdkit.memory.showing import plan_bars, plan_json, plan_lines, plan_table
from kdkit.memory.sizes import find_config
from kdkit.runtime import GIB

if TYPE_CHECKING:
    from kdkit.memory.exact import Counted


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of a plan."""

    gpu: str | None = None
    budget_gib: float | None = None
    fit: bool = False
    exact: bool = False
    measured: Path | None = None
    figure: Path | None = None
    output: Path | None = None

    def card(self) -> Card:
        """The card that is meant.

        Raises:
            UserError: nobody knows its name, or the budget is not above 0.
        """
        return choose_card(self.gpu, self.budget_gib)


@dataclass(frozen=True)
class CountedPlan:
    """The peak of the stage that needs most, counted, beside its estimate."""

    step: "Counted"
    planned_bytes: int
    crosses_tokenizers: bool

    @property
    def as_json(self) -> dict[str, object]:
        """For programs."""
        own = {"planned_bytes": self.planned_bytes, "crosses_tokenizers": self.crosses_tokenizers}
        return asdict(self.step) | own

    def __str__(self) -> str:
        peak, planned = self.step.peak_bytes, self.planned_bytes
        return (
            f"counted: tensors of at most {peak / GIB:.2f} GiB, in phase {self.step.phase}; planned "
            f"{planned / GIB:.2f} ({planned / peak - 1:+.1%}), without context and slack"
        )


@dataclass(frozen=True)
class PlanAnswer:
    """A plan, what `--fit` proposes and what `--exact` counted."""

    plan: RunPlan
    fit: Fit | None = None
    counted: CountedPlan | None = None

    @property
    def fits(self) -> bool:
        """Whether what is proposed fits, or else what was planned."""
        return True if self.fit is not None else self.plan.fits

    @property
    def as_json(self) -> dict[str, object]:
        """For programs."""
        answer = plan_json(self.plan)
        if self.fit is not None:
            answer["fit"] = {
                "changes": self.fit.changes,
                "given_up": list(self.fit.given_up),
                "plan": plan_json(self.fit.plan),
            }
        return answer if self.counted is None else answer | {"exact": self.counted.as_json}

    def show(self) -> None:
        """Print it for people: tables and sentences on stdout."""
        from rich.console import Console

        console = Console(width=None if Console().is_terminal else 110, highlight=False)
        console.print(plan_table(self.plan.worst))
        counted = [] if self.counted is None else [str(self.counted)]
        for line in [*plan_lines(self.plan), *counted, *self._fit_lines()]:
            console.print(line, soft_wrap=True, markup=False)

    def _fit_lines(self) -> list[str]:
        if self.fit is None:
            return []
        if not self.fit.changes:
            return ["nothing to change: the settings fit, and none that train the same are faster"]
        proposal = as_settings(self.fit.changes, option="--set ")
        lines = [f"proposal: {proposal}", *(f"  {line}" for line in plan_lines(self.fit.plan))]
        if self.fit.given_up:
            lines.append(f"  for that: {'; '.join(self.fit.given_up)}")
        return lines


def answer_plan(config: DistillConfig, request: PlanRequest) -> PlanAnswer:
    """Plan a run as asked, and write what is to be written.

    Args:
        config: the run.
        request: the command's options.
    Returns:
        The answer, to be shown.
    Raises:
        UserError: a card, a model's config or a folder is not what it should be; nothing fits.
    """
    card, pair = request.card(), Pair.of(config)
    plan = plan_run(config, card, pair=pair, measured=request.measured)
    fit = fit_run(config, card, pair=pair) if request.fit else None
    answer = PlanAnswer(plan, fit, _count(config, plan) if request.exact else None)
    if request.figure is not None:
        write_whole(request.figure, _figure(plan if fit is None else fit.plan, request.figure))
    if request.output is not None and fit is not None:
        write_whole(request.output, yaml.safe_dump(fit.patch(), sort_keys=False).encode())
    return answer


def _count(config: DistillConfig, plan: RunPlan) -> CountedPlan:
    """`CountedPlan`, on tensors without values."""
    import warnings

    from transformers import AutoConfig

    from kdkit.memory.exact import count_step

    shapes = {
        role: AutoConfig.from_pretrained(
            find_config(side.path, revision=side.revision).parent, trust_remote_code=side.trust_remote_code
        )
        for role, side in (("teacher", config.teacher), ("student", config.student))
    }
    widths = [shape.get_text_config().vocab_size for shape in shapes.values()]
    stage, worst = stages_of(config)[plan.stage], plan.worst
    if worst.beside:  # which auto means on several cards
        stage = stage.model_copy(update={"teacher": stage.teacher.model_copy(update={"device": "cuda:1"})})
    crosses = are_other_tokenizers(*widths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models without values
        counted = count_step(stage, **shapes, precision=worst.card.precision, crosses=crosses)
    return CountedPlan(counted, worst.tensor_bytes, crosses)


def _figure(plan: RunPlan, path: Path) -> bytes:
    """The bars as a file's content, in the kind that its name ends in."""
    from kdkit.plots import figure_bytes, plot_memory

    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise UserError(f"--figure {path}: give a name that ends in .png or .svg")
    return figure_bytes(plot_memory(plan_bars(plan.worst)), kind)

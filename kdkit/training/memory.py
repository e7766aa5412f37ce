"""How full the cards get while a stage trains, beside what was planned."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from transformers import PreTrainedModel

from kdkit.config import DistillConfig
from kdkit.memory.blame import blame
from kdkit.memory.cards import Card
from kdkit.memory.estimate import MemoryPlan, Parts, estimate_memory
from kdkit.memory.sizes import sizes_of
from kdkit.runtime import GIB, machine_memory_bytes

WARN_FRACTION = 0.9
"""Share of a card from which a step more may be one too many."""
WORSE_FRACTION = 0.02
"""How much fuller it has to get to be said again."""


class Meter(Protocol):
    """Tells how full a device got."""

    @property
    def name(self) -> str:
        """As torch writes the device."""
        ...

    def take(self) -> tuple[int, int]:
        """(most bytes in use since the last call, bytes there are)."""
        ...


@dataclass
class CudaMeter:
    """A card: the most that torch had reserved, and whatever else is on it now, the context and other processes."""

    device: torch.device

    @property
    def name(self) -> str:
        """As torch writes it."""
        return str(self.device)

    def take(self) -> tuple[int, int]:
        """As `Meter.take`."""
        free, total = torch.cuda.mem_get_info(self.device)
        beside = total - free - torch.cuda.memory_reserved(self.device)
        peak = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return beside + peak, total


@dataclass
class HostMeter:
    """This process on the host: the most that it has had resident so far, of the machine's memory."""

    total_bytes: int
    name: str = "cpu"

    def take(self) -> tuple[int, int]:
        """As `Meter.take`."""
        if sys.platform == "win32":  # has no such figure
            return 0, self.total_bytes
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024), self.total_bytes


@dataclass
class MemoryWatch:
    """Figures for every log row, and a warning when a device is nearly full."""

    meters: Sequence[Meter]
    """The student's device first."""
    plan: MemoryPlan | None = None
    """What was planned for this stage; None where the models are of no known kind."""
    _warned: dict[str, float] = field(default_factory=dict)

    def take(self) -> tuple[dict[str, float], list[str]]:
        """The peak since the last call.

        Returns:
            Figures under the names of metrics.jsonl: `memory/peak_gib` of the student's device,
            `memory/teacher_peak_gib` where the teacher has its own, `memory/planned_gib`, `memory/used_fraction` of the
            fullest; and warnings, each said once unless it gets worse.
        """
        taken = [(meter.name, *meter.take()) for meter in self.meters]
        figures = {"memory/peak_gib": taken[0][1] / GIB}
        if len(taken) > 1:
            figures["memory/teacher_peak_gib"] = taken[1][1] / GIB
        if self.plan is not None:
            figures["memory/planned_gib"] = self.plan.peak_bytes / GIB
        figures["memory/used_fraction"] = max(_share(peak, total) for _, peak, total in taken)
        fullest = () if self.plan is None else self.plan.fullest_parts
        warnings = [
            self._warning(name, peak, total, fullest[card] if card < len(fullest) else {})
            for card, (name, peak, total) in enumerate(taken)
        ]
        return figures, list(filter(None, warnings))

    def _warning(self, name: str, peak: int, total: int, parts: Parts) -> str:
        """A line when a device is nearly full and was not before; else nothing."""
        share = _share(peak, total)
        if share < WARN_FRACTION or share < self._warned.get(name, 0.0) + WORSE_FRACTION:
            return ""
        self._warned[name] = share
        line = f"memory of {name}: {peak / GIB:.1f} of {total / GIB:.1f} GiB ({share:.0%})"
        return f"{line}; {blame(parts)}" if parts else line


def _share(peak: int, total: int) -> float:
    """Of what there is; 0 where the system does not say how much that is."""
    return peak / total if total else 0.0


def watch_memory(
    config: DistillConfig,
    *,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    precision: str,
    teacher_width: int | None = None,
) -> MemoryWatch:
    """A watch over the devices of a stage.

    Args:
        config: the stage's config.
        student: on its device.
        teacher: on its own; None where no model of it is there.
        precision: of the student's products.
        teacher_width: of the teacher's states, where no model of it is there.
    """
    devices = [student.device]
    if teacher is not None and teacher.device.type == "cuda" and teacher.device != student.device:
        devices.append(teacher.device)
    if student.device.type != "cuda":
        return MemoryWatch([HostMeter(machine_memory_bytes())])
    meters: list[Meter] = [CudaMeter(device) for device in devices]
    if config.teacher.device not in ("cpu", "offload"):  # the number of cards says where it is
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"device": "auto"})})
    plan = _plan(
        config,
        student,
        teacher,
        card=_card_of(student.device, len(devices)),
        precision=precision,
        teacher_width=teacher_width,
    )
    return MemoryWatch(meters, plan)


def _plan(
    config: DistillConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    *,
    card: Card,
    precision: str,
    teacher_width: int | None = None,
) -> MemoryPlan | None:
    """What is planned for these very models; None where their configs are of no known kind."""
    num_params = sum(weight.numel() for name, weight in student.named_parameters() if ".lora_" not in name)
    ours = sizes_of(student.config.get_text_config().to_dict(), num_params=num_params)
    theirs = None if ours is None else replace(ours, hidden=teacher_width or ours.hidden)  # a cached one is a width
    if teacher is not None:
        theirs = sizes_of(teacher.config.get_text_config().to_dict(), num_params=teacher.num_parameters())
    if ours is None or theirs is None:
        return None
    return estimate_memory(config, teacher=theirs, student=ours, card=card, precision=precision)


def _card_of(device: torch.device, num_cards: int) -> Card:
    """The card at hand; its speed is of no interest here."""
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Card(
        properties.name, properties.total_memory / GIB, capability, half_tflops=1.0, bandwidth=1.0, num_cards=num_cards
    )

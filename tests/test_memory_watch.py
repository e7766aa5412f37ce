"""Memory while a stage trains: figures in the log, a warning at 90 %, the part to blame."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdkit.config import load_config
from kdkit.memory import estimate
from kdkit.memory.blame import REMEDIES, blame
from kdkit.memory.cards import CARDS, Card
from kdkit.memory.estimate import MemoryPlan, estimate_memory
from kdkit.memory.sizes import read_sizes
from kdkit.runtime import GIB
from kdkit.training.failures import out_of_memory
from kdkit.training.memory import CudaMeter, HostMeter, MemoryWatch, watch_memory


def tiny_pair():
    """A student and a teacher of two sizes."""
    sizes = {"vocab_size": 64, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    return tuple(
        LlamaForCausalLM(LlamaConfig(**sizes, hidden_size=hidden, num_hidden_layers=layers))
        for hidden, layers in ((16, 1), (32, 2))
    )


def planned(**parts: float) -> MemoryPlan:
    sizes = {name.replace("_", " "): round(gib * GIB) for name, gib in parts.items()}
    return MemoryPlan(CARDS["t4"], "float16", {"student": sizes})


@dataclass
class Readings:
    """A device that was this full, in GiB, at one reading after the other."""

    gib: list[float]
    total_gib: float = 10.0
    name: str = "cuda:0"
    _left: list[float] = field(init=False)

    def __post_init__(self):
        self._left = list(self.gib)

    def take(self):
        return round(self._left.pop(0) * GIB), round(self.total_gib * GIB)


class TestMemoryWatch:
    def test_figures_of_both_cards_beside_the_plan(self):
        watch = MemoryWatch([Readings([4.0]), Readings([6.0], name="cuda:1")], planned(divergence=5))
        figures, warnings = watch.take()
        assert figures == {
            "memory/peak_gib": 4.0,
            "memory/teacher_peak_gib": 6.0,
            "memory/planned_gib": 5.0,
            "memory/used_fraction": pytest.approx(0.6),
        }
        assert warnings == []

    def test_warns_from_90_percent_on_and_names_the_part(self):
        plan = planned(student_weights=6, divergence=3, optimizer_states=1)
        watch = MemoryWatch([Readings([8.9, 9.05, 9.1, 9.3])], plan)
        said = [watch.take()[1] for _ in range(4)]
        assert said[0] == []
        (line,) = said[1]
        assert "9.1 of 10.0 GiB (90%)" in line or "9.0 of 10.0 GiB (90%)" in line
        assert "divergence, 3.0 GiB as planned: a smaller objective.chunk_tokens" in line
        assert said[2] == [], "not again for the same"
        assert len(said[3]) == 1, "but again when it gets worse"

    def test_the_second_card_has_its_own_part_to_blame(self):
        teacher = {"teacher": {"teacher weights": 9 * GIB}}
        plan = MemoryPlan(CARDS["t4x2"], "float16", planned(divergence=1).phases, teacher)
        (line,) = MemoryWatch([Readings([1.0]), Readings([9.9], name="cuda:1")], plan).take()[1]
        assert "memory of cuda:1" in line
        assert "is teacher weights, 9.0 GiB as planned" in line

    def test_the_second_card_warns_under_its_own_name(self):
        watch = MemoryWatch([Readings([1.0]), Readings([9.9], name="cuda:1")])
        (line,) = watch.take()[1]
        assert line == "memory of cuda:1: 9.9 of 10.0 GiB (99%)"


class TestCudaMeter:
    def test_counts_what_is_beside_torch(self, monkeypatch):
        """14.6 GiB in all, 3.6 free now; torch holds 9 now and had 10: 2 are context and others."""
        gib = {"mem_get_info": (3.6, 14.6), "memory_reserved": 9.0, "max_memory_reserved": 10.0}
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: tuple(round(x * GIB) for x in gib["mem_get_info"]))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: round(gib["memory_reserved"] * GIB))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: round(gib["max_memory_reserved"] * GIB))
        reset = []
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
        peak, total = CudaMeter(torch.device("cuda", 0)).take()
        assert peak / GIB == pytest.approx(12.0)
        assert total / GIB == pytest.approx(14.6)
        assert reset == [torch.device("cuda", 0)]


class TestHostMeter:
    def test_sees_an_allocation(self):
        meter = HostMeter(total_bytes=100 * GIB)
        before, _ = meter.take()
        held = torch.ones(before // 4 + 64 * 2**20)  # more than all there was, in float32
        after, _ = meter.take()
        assert after > before + 0.5 * held.numel()


class TestBlame:
    def test_what_nothing_makes_smaller_is_not_blamed(self):
        plan = planned(student_weights=9, CUDA_context=5, optimizer_states=1)
        assert "optimizer states, 1.0 GiB" in blame(plan.parts)

    def test_every_part_that_a_plan_can_have_is_named_as_it_names_it(self):
        """A remedy under a name that no plan uses would never be said."""
        source = Path(estimate.__file__).read_text()
        assert all(f'"{name}"' in source for name in REMEDIES)


class TestOutOfMemory:
    def test_names_the_part_and_the_command_that_helps(self):
        failed = out_of_memory(
            torch.OutOfMemoryError("tried to allocate 2 GiB"), stage="distill", step=7, plan=planned(divergence=3)
        )
        assert "stage distill, step 7" in str(failed)
        assert "is divergence, 3.0 GiB as planned: a smaller objective.chunk_tokens" in str(failed)
        assert "kdkit plan CONFIG --fit" in str(failed)


class TestWatchMemory:
    @pytest.fixture
    def on_a_card(self, monkeypatch):
        """A student that says it is on a T4."""
        properties = SimpleNamespace(name="Tesla T4", total_memory=round(14.6 * GIB), major=7, minor=5)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

        def place(model, device):
            monkeypatch.setattr(type(model), "device", property(lambda self: torch.device(self.place)))
            model.place = device
            return model

        return place

    def test_the_plan_of_a_loaded_pair_is_that_of_their_configs(self, on_a_card, tmp_path):
        config = load_config({"preset": ["demo", "fkl-dtw"]})
        student, teacher = (on_a_card(model, "cuda:0") for model in tiny_pair())
        watch = watch_memory(config, student=student, teacher=teacher, precision="float16")
        for model, name in ((student, "student"), (teacher, "teacher")):
            model.config.save_pretrained(tmp_path / name)
        sizes = {name: read_sizes(str(tmp_path / name)) for name in ("student", "teacher")}
        card = Card("Tesla T4", 14.6, (7, 5), half_tflops=1.0, bandwidth=1.0)
        assert watch.plan.phases == estimate_memory(config, **sizes, card=card, precision="float16").phases

    def test_a_teacher_on_a_second_card_is_watched_too(self, on_a_card):
        student, teacher = tiny_pair()
        on_a_card(student, "cuda:0")
        teacher.place = "cuda:1"
        config = load_config({"preset": ["demo", "fkl"]})
        watch = watch_memory(config, student=student, teacher=teacher, precision="float16")
        assert [meter.name for meter in watch.meters] == ["cuda:0", "cuda:1"]

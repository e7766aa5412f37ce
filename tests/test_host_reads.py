"""Where the host looks at a tensor's value within a training step: on a card each look waits for all that is queued.

Seen on the CPU by what torch is asked for. A copy back to the host (`.cpu()`, `.tolist()`) asks for nothing there, so
that these are counted where they are called.
"""

import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import build_trainer, make_pair, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import kdkit
from kdkit.config import DistillConfig
from kdkit.loading import backbone

PACKAGE = Path(kdkit.__file__).parent
ON_THE_HOST = ("softdtw/api.py checked_lengths", "softdtw/band.py diagonal_path")
"""They read lengths that the collator made and no card ever had."""
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
"""Operators whose result, or its shape, depends on values."""
ALL_TERMS = {
    "kd": {"loss": "skew_reverse_kl", "weight": 0.7},
    "lm": {"weight": 0.3},
    "dtw": {"weight": 0.5, "band": 4, "importance": "inverse_entropy"},
    "hidden": {"weight": 0.1},
    "layerwise": {"weight": 0.1, "num_pairs": 1},
    "contrastive": {"weight": 0.1},
}


class HostReads(TorchDispatchMode):
    """Counts reads by the line of kdkit, or else of the library, that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self.is_open = False

    def __enter__(self):
        self.is_open = True
        return super().__enter__()

    def __exit__(self, *error) -> None:
        self.is_open = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in READS or _has_boolean_index(func, args):
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        frame, place = sys._getframe(2), ""
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(PACKAGE):
                self.places[f"{file.relative_to(PACKAGE).as_posix()} {place or frame.f_code.co_name}"] += 1
                return
            if file.match("transformers/*.py"):
                place = place or f"via transformers' {frame.f_code.co_name}"
            frame = frame.f_back


def _has_boolean_index(func, args) -> bool:
    if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


class CountSteps(TrainerCallback):
    """Opens the count when a step begins, closes it when the optimizer has stepped."""

    def __init__(self) -> None:
        self.reads = HostReads()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.reads.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.reads.__exit__(None, None, None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_pair(tmp_path_factory.mktemp("pair"))


def reads_of(config: DistillConfig, folder: Path) -> Counter[str]:
    """Reads from a step's begin until its optimizer steps, by place."""
    counting, tolist = CountSteps(), torch.Tensor.tolist
    trainer = build_trainer(config, folder, callbacks=(counting,))

    def noted(tensor: torch.Tensor) -> list:
        if counting.reads.is_open:
            counting.reads.note()
        return tolist(tensor)

    with mock.patch.object(torch.Tensor, "tolist", noted):
        trainer.train()
    return counting.reads.places


class TestTrainingStep:
    @pytest.mark.parametrize("packed", [True, False])
    def test_the_host_looks_once_a_step_and_transformers_once_a_pass(self, pair, tmp_path, packed, monkeypatch) -> None:
        for name in ("MOST_TOKENS", "MOST_WITH_LAYERS"):
            monkeypatch.setattr(backbone, name, float(packed))
        num_steps, accumulation = 3, 2
        config = tiny_config(pair, objective=ALL_TERMS, accumulation=accumulation, max_steps=num_steps)
        found = reads_of(config, tmp_path)
        for place in ON_THE_HOST:
            found.pop(place)
        # Whether several texts stand in one row; a step has a pass of the teacher and one of the student.
        of_transformers = found.pop("loading/backbone.py via transformers' find_packed_sequence_indices", 0)
        assert of_transformers == (0 if packed else 2 * accumulation * num_steps)
        assert found == {
            "training/trainer.py _get_grad_norm": num_steps,
            "training/trainer.py _check_losses": num_steps,  # right after: there is nothing left to wait for
        }

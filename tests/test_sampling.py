"""The order of the rows: every row once an epoch, little padding, and the same again for the same seed."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from tiny import build_trainer, make_pair, tiny_config
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from kdkit.training.run import run_distillation
from kdkit.training.sampling import LengthGroupedSampler
from kdkit.training.stopping import Interrupted, StopRequest

GROUP = 8


class StopAfter(TrainerCallback):
    """Asks for an end during a step."""

    def __init__(self, stop: StopRequest, step: int) -> None:
        self.stop, self.step = stop, step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step - 1:
            self.stop.ask("a test")


def steps_of(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and counted tokens of each training step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["tokens"]) for row in rows if row["kind"] == "train"]


def skewed_lengths(num_rows: int) -> list[int]:
    draws = random.Random(0)
    return [10 + int(draws.expovariate(0.02)) for _ in range(num_rows)]


def order(lengths: list[int], *, seed: int = 1, epoch: int = 0) -> list[int]:
    sampler = LengthGroupedSampler(lengths, group_size=GROUP, seed=seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    return list(sampler)


def padding_fraction(lengths: list[int], rows: list[int]) -> float:
    batches = [[lengths[row] for row in rows[start : start + GROUP]] for start in range(0, len(rows), GROUP)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    return 1 - sum(map(sum, batches)) / padded


class TestLengthGroupedSampler:
    def test_an_epoch_has_every_row_once(self) -> None:
        for num_rows in (1, GROUP, GROUP + 1, 400, 1003):
            assert sorted(order(skewed_lengths(num_rows))) == list(range(num_rows))

    def test_leaves_a_seventh_of_the_padding_of_a_random_order(self) -> None:
        lengths = skewed_lengths(2000)
        shuffled = list(range(2000))
        random.Random(1).shuffle(shuffled)
        assert padding_fraction(lengths, order(lengths)) < 1 / 7 * padding_fraction(lengths, shuffled)

    def test_seed_and_epoch_alone_decide(self) -> None:
        lengths = skewed_lengths(300)
        assert order(lengths) == order(lengths)
        assert order(lengths) != order(lengths, seed=2)
        assert order(lengths) != order(lengths, epoch=1)

    def test_batches_come_in_no_order_of_length(self) -> None:
        lengths = skewed_lengths(400)
        rows = order(lengths)
        means = [np.mean([lengths[row] for row in rows[start : start + GROUP]]) for start in range(0, 400, GROUP)]
        assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.4  # of 50 in random order: 0.14 on the mean

    def test_the_short_batch_at_the_end_is_of_any_length(self) -> None:
        lengths = list(range(1, 8 * GROUP + 4))
        last = [np.mean([lengths[row] for row in order(lengths, epoch=epoch)[-3:]]) for epoch in range(20)]
        assert min(last) < len(lengths) / 3
        assert max(last) > 2 * len(lengths) / 3


class TestEpoch:
    def test_the_trainer_says_which_it_is_before_the_first_row_of_one_is_drawn(self, tmp_path: Path) -> None:
        """After a resume, nothing else reaches the sampler through what accelerate wraps around it."""
        trainer = build_trainer(tiny_config(make_pair(tmp_path), max_steps=1), tmp_path / "run")
        trainer.sampler = LengthGroupedSampler(skewed_lengths(40), group_size=4, seed=1)
        for epoch in (0.0, 1.4, 2 - 1e-9):
            trainer.state.epoch = epoch
            trainer.get_batch_samples(iter(()), 1, trainer.args.device)
            assert trainer.sampler.epoch == round(epoch - 0.2)


class TestDefaultOrder:
    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_a_resume_in_a_later_epoch_keeps_that_epochs_order(self, num_processes: int) -> None:
        """accelerate's own sampler, through all that its loader and a resume wrap around it."""
        sampler = SeedableRandomSampler(range(32), generator=torch.Generator(), data_seed=7)
        loader = DataLoader(range(32), batch_size=4, sampler=sampler)
        options = {"process_index": 0, "use_seedable_sampler": True, "data_seed": 7}
        whole, resumed = (prepare_data_loader(loader, num_processes=num_processes, **options) for _ in range(2))
        resumed = skip_first_batches(resumed, 1)
        for one in (whole, resumed):
            one.set_epoch(2)
        assert torch.cat(list(resumed)).tolist() == torch.cat(list(whole)).tolist()[4:]


class TestResume:
    @pytest.mark.parametrize("stop_after", [2, 6])  # within the first epoch of 4 steps, and within the second
    def test_goes_on_with_the_rows_of_the_uninterrupted_run(self, tmp_path: Path, stop_after: int) -> None:
        objective = {"lm": {"weight": 1.0}, "kd": {"weight": 0.0}}
        config = tiny_config(make_pair(tmp_path), objective=objective, max_steps=7, group_by_length=True)
        run_distillation(config, tmp_path / "whole")
        stop = StopRequest()
        with pytest.raises(Interrupted):
            run_distillation(config, tmp_path / "run", stop=stop, callbacks=[StopAfter(stop, stop_after)])
        assert steps_of(tmp_path / "run")[-1][0] == stop_after
        run_distillation(config, tmp_path / "run", resume=True)
        assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
        assert len(steps_of(tmp_path / "whole")) == 7

"""The average of the weights: its arithmetic, and that it never touches what is trained."""

import math
from math import comb

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_trainer, make_pair, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from kdkit.config import EmaConfig
from kdkit.training.averaging import WeightAverage, decay_at
from kdkit.training.run import run_distillation

STEADY = {"scheduler": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


class Tied(nn.Module):
    """Two layers that share a weight, one of their own, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.own = nn.Linear(2, 1)
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)


def set_all(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)


def average_of(average, model):
    with average.in_place():
        return model.own.weight.detach().clone()


class TestDecayAt:
    def test_rises_to_the_decay_as_tensorflows_does(self):
        config = EmaConfig(decay=0.999)
        found = [decay_at(n, config) for n in (0, 1, 9, 90, 8980, 9000)]
        assert found == pytest.approx([1 / 10, 2 / 11, 10 / 19, 91 / 100, 8981 / 8990, 0.999])

    def test_without_warm_up_is_the_decay(self):
        assert decay_at(0, EmaConfig(decay=0.9, warmup=False)) == 0.9


class TestWeightAverage:
    def test_is_the_sum_that_the_papers_write(self):
        """The weight of step i after N is (1 - d) d^(N - i), and the start keeps d^N."""
        model, decay = Tied(), 0.75
        set_all(model, 1.0)
        average = WeightAverage(model, EmaConfig(decay=decay, warmup=False))
        for step in range(1, 6):
            set_all(model, step**2)
            average.update()
        expected = decay**5 + sum((1 - decay) * decay ** (5 - i) * i**2 for i in range(1, 6))
        assert average_of(average, model) == pytest.approx(torch.full((1, 2), expected))
        assert torch.equal(model.own.weight, torch.full((1, 2), 25.0))

    def test_under_warm_up_hardly_anything_of_a_random_start_is_left_after_20_steps(self):
        """The product of (1 + n) / (10 + n) over n < N is 1 / C(N + 9, 9); without warm-up 98 % would be left."""
        model = Tied()
        set_all(model, 1.0)
        average = WeightAverage(model, EmaConfig(decay=0.999))
        set_all(model, 0.0)
        for _ in range(20):
            average.update()
        assert average_of(average, model) == pytest.approx(torch.full((1, 2), 1 / comb(29, 9)), rel=1e-5)

    def test_the_weights_come_back_bit_for_bit_whatever_happens_meanwhile(self):
        model = Tied()
        average = WeightAverage(model, EmaConfig(decay=0.9, warmup=False))
        set_all(model, 1 / 3)
        average.update()
        before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}

        def break_off():
            with average.in_place():
                set_all(model, math.nan)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            break_off()
        for name, parameter in model.named_parameters():
            assert parameter is before[name][0], name  # an optimizer holds it
            assert torch.equal(parameter, before[name][1]), name

    def test_a_tied_weight_stays_tied_and_a_frozen_one_alone(self):
        model = Tied()
        average = WeightAverage(model, EmaConfig())
        set_all(model, 2.0)
        average.update()
        with average.in_place():
            assert model.head.weight is model.embedding.weight
            assert torch.equal(model.frozen, torch.full((2,), 7.0))
        assert model.head.weight is model.embedding.weight

    def test_takes_up_weights_that_were_moved_to_other_memory(self):
        """A parameter's data may be replaced (by `.to`); what was seen of it before is not what is trained."""
        model = Tied()
        set_all(model, 0.0)
        average = WeightAverage(model, EmaConfig(decay=0.5, warmup=False))
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        set_all(model, 1.0)
        average.update()
        assert torch.equal(average_of(average, model), torch.full((1, 2), 0.5))


class AfterStep(TrainerCallback):
    """Keeps the raw weights of each optimizer step."""

    def __init__(self):
        self.weights = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})


def train_averaged(pair, folder, *overrides, **optim):
    seen = AfterStep()
    trainer = build_trainer(tiny_config(pair, *overrides, **optim), folder, callbacks=(seen,))
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer, [start, *seen.weights]


def blended(weights, decays):
    """The average by hand."""
    held = weights[0]
    for decay, now in zip(decays, weights[1:], strict=True):
        held = {name: decay * held[name] + (1 - decay) * now[name] for name in held}
    return held


class TestInTraining:
    def test_one_update_per_optimizer_step_student_and_adapters(self, pair, tmp_path):
        optim = {"batch_size": 2, "accumulation": 4, **STEADY}
        trainer, weights = train_averaged(pair, tmp_path, "optim.ema={decay: 0.9}", **optim)
        expected = blended(weights, [1 / 10, 2 / 11, 3 / 12])
        assert any(name.startswith("adapters.") for name in expected)
        with trainer.average.in_place():
            for name, parameter in trainer.model.named_parameters():
                torch.testing.assert_close(parameter.detach(), expected[name], msg=name)

    def test_the_raw_weights_train_as_without_one(self, pair, tmp_path):
        _, plain = train_averaged(pair, tmp_path / "plain", "evaluation.every_steps=1", **STEADY)
        _, averaged = train_averaged(pair, tmp_path / "ema", "evaluation.every_steps=1", "optim.ema={}", **STEADY)
        for ours, theirs in zip(averaged, plain, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_the_average_is_evaluated_and_answers_and_the_raw_student_is_not(self, pair, tmp_path):
        config = tiny_config(pair, "optim.ema={decay: 0.5, warmup: false}", **STEADY)
        trainer = build_trainer(config, tmp_path)
        asked = []
        trainer.generate = lambda student, limit: asked.append(student.lm_head.weight.detach().clone()) or {}
        trainer.train()
        row = next(row for row in trainer.metrics.rows() if row["kind"] == "eval")
        with trainer.average.in_place():
            assert torch.equal(asked[-1], trainer.model.student.lm_head.weight)
        held, trainer.average = trainer.average, None
        raw = trainer.evaluate()["eval_cross_entropy"]
        with held.in_place():
            assert trainer.evaluate()["eval_cross_entropy"] == row["cross_entropy"]
        assert raw != row["cross_entropy"]

    def test_a_step_that_did_not_happen_is_not_averaged(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair, "optim.ema={}", "objective.on_nonfinite=skip", **STEADY), tmp_path)
        weight, calls = trainer.model.student.lm_head.weight, []

        def poison_the_second(gradient):
            calls.append(None)
            return gradient * math.nan if len(calls) == 2 else gradient

        weight.register_hook(poison_the_second)
        trainer.train()
        assert (trainer.remembered.num_skipped_steps, trainer.average.num_updates) == (1, 2)

    def test_nor_is_one_that_a_loss_scaler_skipped(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair, "optim.ema={}", **STEADY), tmp_path)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
        calls = []

        def overflow_first(gradient):
            calls.append(None)
            return gradient * math.inf if len(calls) == 1 else gradient

        trainer.model.student.lm_head.weight.register_hook(overflow_first)
        trainer.train()
        assert (trainer.remembered.num_skipped_steps, trainer.average.num_updates) == (1, 2)

    def test_an_evaluation_that_breaks_leaves_the_raw_weights_in_the_checkpoint(self, pair, tmp_path):
        config = tiny_config(pair, "optim.ema={decay: 0.5, warmup: false}", "evaluation.every_steps=2", **STEADY)
        seen = AfterStep()
        trainer = build_trainer(config, tmp_path, callbacks=(seen,))

        def crash(student, limit):
            if limit is None:
                raise ZeroDivisionError
            return {}

        trainer.generate = crash
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
        assert all(torch.equal(value, seen.weights[-1][f"student.{name}"]) for name, value in saved.items())

    def test_both_are_in_the_checkpoint_and_read_with_from_pretrained(self, pair, tmp_path):
        trainer, _ = train_averaged(pair, tmp_path, "optim.ema={}", **STEADY)
        raw = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", dtype=torch.float32).state_dict()
        mean = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3" / "ema", dtype=torch.float32).state_dict()
        held = trainer.model.student.state_dict()
        assert all(torch.equal(value, held[name]) for name, value in raw.items())
        with trainer.average.in_place():
            held = {name: value.clone() for name, value in trainer.model.student.state_dict().items()}
        assert all(torch.equal(value, held[name]) for name, value in mean.items())
        assert any(not torch.equal(mean[name], raw[name]) for name in raw)


class TestStages:
    def test_a_stage_leaves_the_average_and_the_next_starts_from_it(self, pair, tmp_path):
        stages = "stages={first: {optim: {ema: {}}}, second: {}}"
        run = run_distillation(tiny_config(pair, stages, max_steps=2), tmp_path / "run")
        first = tmp_path / "run" / "stages" / "first"
        left, mean, raw = (
            load_file(folder / "model.safetensors")
            for folder in (first / "model", first / "checkpoint-2" / "ema", first / "checkpoint-2")
        )
        assert all(torch.equal(left[name], mean[name]) for name in left)
        assert any(not torch.equal(left[name], raw[name]) for name in left)
        assert not (first / "model" / "ema").exists()
        assert "rouge_l" in run.evaluations["student"]

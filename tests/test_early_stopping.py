"""Early stopping: what ends a stage, which student it leaves, and that a resume changes neither."""

import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from killing import run_forked, run_killed_then_resumed
from safetensors.torch import load_file
from test_run import assert_same_run
from tiny import build_trainer, make_pair, tiny_config
from transformers import TrainerCallback

from kdkit.config import EarlyStoppingConfig
from kdkit.errors import UserError
from kdkit.training import checkpoint
from kdkit.training.early_stopping import EarlyStopping
from kdkit.training.run import run_distillation
from kdkit.training.stopping import Interrupted, StopRequest

STEADY = {"scheduler": "constant", "warmup_steps": 0}
NEVER_BETTER = "early_stopping: {metric: cross_entropy, patience: 2, min_delta: 100}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), dropout=0.2)


def watch(folder, values, **settings):
    """Early stopping after evaluations with these values, at steps 10, 20, ..."""
    stopping = EarlyStopping(EarlyStoppingConfig(**settings), folder)
    for number, value in enumerate(values, start=1):
        stopping.observe(10 * number, {stopping.config.metric: value})
    return stopping


class TestEarlyStopping:
    @pytest.mark.parametrize(
        ("settings", "values", "best", "is_exhausted"),
        [
            ({"patience": 2}, [20.0, 21.0, 21.0], 20, False),
            ({"patience": 2}, [20.0, 21.0, 21.0, 20.9], 20, True),
            ({"patience": 2}, [20.0, 19.0, 21.0, 20.9], 30, False),
            ({"patience": 2, "metric": "cross_entropy"}, [3.0, 2.5, 2.6, 2.7], 20, True),
            ({"patience": 2, "metric": "cross_entropy"}, [3.0, 2.9, 2.8, 2.7], 40, False),
            # small gains are not worth waiting on, and yet the last of them is the best student
            ({"patience": 2, "min_delta": 0.5}, [20.0, 20.2, 20.4], 30, True),
            ({"patience": 2, "min_delta": 0.5}, [20.0, 20.4, 20.8, 20.9], 40, False),
            ({"patience": 1}, [20.0], 10, False),
            ({"patience": 2, "metric": "cross_entropy"}, [3.0, math.nan, math.inf], 10, True),
        ],
    )
    def test_waits_as_long_as_patience_says_and_knows_the_best(self, tmp_path, settings, values, best, is_exhausted):
        stopping = watch(tmp_path, values, **settings)
        assert (stopping.best.step, stopping.is_exhausted) == (best, is_exhausted)

    def test_an_evaluation_that_is_made_again_counts_once(self, tmp_path):
        """A stop between save and evaluation: the resumed run evaluates at the checkpoint's own step."""
        stopping = watch(tmp_path, [20.0, 19.0], patience=2)
        held = json.loads(json.dumps(stopping.evaluations))
        for step in (20, 20, 20):
            stopping.restore(held, step=step)
            stopping.observe(step, {"rouge_l": 19.0})
        assert not stopping.is_exhausted
        stopping.observe(30, {"rouge_l": 19.0})
        assert stopping.is_exhausted

    def test_says_why_and_which_student_is_left(self, tmp_path):
        stopping = watch(tmp_path, [20.0, 21.55, 21.0, 20.9], patience=2, min_delta=0.5)
        assert stopping.say(is_last=False) == (
            "stopped early: 2 evaluations without a better rouge_l by more than 0.5; "
            "the stage leaves the student of step 20, its best (rouge_l 21.55)"
        )
        assert stopping.say(is_last=True) == "the stage leaves the student of step 20, its best (rouge_l 21.55)"
        assert watch(tmp_path, [20.0, 21.0], patience=1).say(is_last=True) is None

    def test_of_two_that_a_kill_left_the_better_is_taken_and_half_a_one_is_not(self, tmp_path):
        for step, value in ((10, 20.0), (20, 22.0), (30, 24.0)):
            folder = tmp_path / f"best-{step}"
            folder.mkdir()
            (folder / "best.json").write_text(json.dumps({"metric": "rouge_l", "value": value, "step": step}))
            if step < 30:
                checkpoint.seal(folder)
        stopping = watch(tmp_path, [], patience=1)
        assert (stopping.best.step, stopping.best.value) == (20, 22.0)
        assert not stopping.observe(40, {"rouge_l": 21.0})


def scripted(trainer, values):
    """Let the evaluations after steps find these ROUGE-Ls."""
    values = iter(values)
    trainer.generate = lambda student, limit: {"rouge_l": 0.0 if limit else next(values)}


class AfterStep(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.student.named_parameters()})


def evaluations(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "eval"]


ROUGE = ("evaluation.every_steps=1", "evaluation.early_stopping={patience: 2}")


class TestInTraining:
    def test_ends_after_patience_says_so_once_and_keeps_the_best_students_weights(self, pair, tmp_path, capsys):
        seen = AfterStep()
        trainer = build_trainer(tiny_config(pair, *ROUGE, **STEADY, max_steps=9), tmp_path, callbacks=(seen,))
        scripted(trainer, [20.0, 30.0, 29.0, 28.0])
        trainer.train()
        note = (
            "stopped early: 2 evaluations without a better rouge_l; "
            "the stage leaves the student of step 2, its best (rouge_l 30)"
        )
        assert [row.get("note") for row in evaluations(tmp_path)] == [None, None, None, note]
        assert capsys.readouterr().err.count(f"distill 4: {note}") == 1
        assert [folder.name for folder in tmp_path.glob("best-*")] == ["best-2"]
        best = load_file(tmp_path / "best-2" / "model.safetensors")
        assert all(torch.equal(value, seen.weights[1][name]) for name, value in best.items())
        assert checkpoint.newest_checkpoint(tmp_path).name == "checkpoint-4"

    def test_with_an_average_that_is_the_student_which_was_evaluated(self, pair, tmp_path):
        config = tiny_config(pair, *ROUGE, "optim.ema={decay: 0.5, warmup: false}", **STEADY, max_steps=9)
        trainer = build_trainer(config, tmp_path)
        found, values = [], iter([20.0, 30.0, 29.0, 28.0])

        def generate(student, limit):
            if limit is None:
                found.append(student.lm_head.weight.detach().clone())
            return {"rouge_l": 0.0 if limit else next(values)}

        trainer.generate = generate
        trainer.train()
        best = load_file(tmp_path / "best-2" / "model.safetensors")
        assert torch.equal(best["model.embed_tokens.weight"], found[1])

    def test_rotation_leaves_the_best_alone(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair, *ROUGE, **STEADY, max_steps=9), tmp_path)
        flow = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "StageFlow")
        flow.save_every = trainer.keep = 1
        scripted(trainer, [30.0, 29.0, 28.0])
        trainer.train()
        assert sorted(folder.name for folder in tmp_path.glob("*-*")) == ["best-1", "checkpoint-3"]

    def test_the_evaluation_before_step_1_is_not_counted(self, pair, tmp_path):
        own_text = ("rollout.mode=mixed", "rollout.max_new_tokens=4", "rollout.guard=null")
        config = tiny_config(pair, *ROUGE, *own_text, **STEADY, max_steps=9)
        trainer = build_trainer(config, tmp_path)
        scripted(trainer, [50.0, 20.0, 19.0, 18.0])
        trainer.train()
        assert trainer.early_stopping.best.step == 1
        assert trainer.state.global_step == 3

    def test_a_stage_that_ran_to_its_end_says_what_it_leaves(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair, *ROUGE, **STEADY, max_steps=3), tmp_path)
        scripted(trainer, [20.0, 30.0, 29.0])
        trainer.train()
        assert evaluations(tmp_path)[-1]["note"] == "the stage leaves the student of step 2, its best (rouge_l 30)"


@pytest.fixture(scope="module")
def config(pair):
    """The first stage ends after 3 of its evaluations, with the student of step 2, averaged; the second runs on."""
    stages = f"stages={{first: {{evaluation: {{{NEVER_BETTER}}}}}, second: {{optim: {{max_steps: 2}}}}}}"
    more = ("checkpoint.every_steps=3", "evaluation.every_steps=2", "logging.every_steps=2", "optim.ema={}")
    return tiny_config(pair, stages, *more, max_steps=12)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return folder, run_forked(config, folder)


class TestStages:
    def test_ends_the_stage_alone_and_the_next_starts_from_its_best(self, uninterrupted):
        folder, _ = uninterrupted
        rows = evaluations(folder)
        assert [(row["stage"], row["step"]) for row in rows] == [
            ("first", 2),
            ("first", 4),
            ("first", 6),
            ("second", 2),
        ]
        first = folder / "stages" / "first"
        (best,) = first.glob("best-*")
        lowest = min(rows[:3], key=lambda row: row["cross_entropy"])
        assert best.name == f"best-{lowest['step']}"
        left, kept = load_file(first / "model" / "model.safetensors"), load_file(best / "model.safetensors")
        assert all(torch.equal(left[name], kept[name]) for name in left)
        assert not (first / "model" / "best.json").exists()
        assert (folder / "evaluation.json").is_file()

    def test_after_a_kill_at_random_moments_the_run_is_that_of_the_uninterrupted_one(
        self, config, uninterrupted, tmp_path
    ):
        folder, num_events = uninterrupted
        moments = np.random.default_rng(2).choice(np.arange(1, num_events + 1), size=6, replace=False)
        for moment in sorted(moments.tolist()):
            assert_same_run(run_killed_then_resumed(config, tmp_path / "run", moment), folder)

    @pytest.mark.slow
    def test_after_a_kill_at_every_event(self, config, uninterrupted, tmp_path):
        folder, num_events = uninterrupted
        for moment in range(1, num_events + 1):
            assert_same_run(run_killed_then_resumed(config, tmp_path / "run", moment), folder)

    def test_a_stage_that_had_ended_is_not_trained_on_when_it_is_resumed(self, config, uninterrupted, tmp_path):
        """The checkpoint of the last step has no mark of the end in it: its evaluation is made again, and ends it."""

        class StopAtTheEnd(StopRequest):
            def check(self, *_):
                if (tmp_path / "run" / "stages" / "first" / "checkpoint-6" / "complete.json").is_file():
                    raise Interrupted("the test")

        with pytest.raises(Interrupted):
            run_distillation(config, tmp_path / "run", stop=StopAtTheEnd())
        with (
            mock.patch("torch.optim.AdamW.step", side_effect=AssertionError("trained on")),
            pytest.raises(AssertionError, match="trained on"),  # the second stage does
        ):
            run_distillation(config, tmp_path / "run", resume=True)
        assert checkpoint.is_whole(tmp_path / "run" / "stages" / "first" / "model")
        run_forked(config, tmp_path / "run", resume=True)
        assert_same_run(tmp_path / "run", uninterrupted[0])


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (("evaluation.early_stopping={}",), r"every_steps=0 makes one at the end alone: set every_steps above 0"),
            ((*ROUGE, "evaluation.generate_rows=0"), r"generate_rows=0 lets the student answer no rows"),
            ((*ROUGE, "evaluation.early_stopping.metric=loss"), "'rouge_l' or 'cross_entropy'"),
            (("optim.ema={decay: 1}",), r"optim\.ema\.decay: input should be less than 1"),
        ],
    )
    def test_settings_that_do_not_go_together_are_named(self, pair, overrides, message):
        with pytest.raises(UserError, match=message):
            tiny_config(pair, *overrides)

    def test_a_patience_that_the_stage_is_too_short_for_is_said_with_the_numbers(self, pair, tmp_path, capsys):
        overrides = ("evaluation.every_steps=2", "evaluation.early_stopping={metric: cross_entropy, patience: 3}")
        run_distillation(tiny_config(pair, *overrides, "evaluation.generate_rows=0", max_steps=5), tmp_path / "run")
        said = "early stopping: after 3 evaluations without a better cross_entropy, which 3 evaluations cannot show"
        assert said in capsys.readouterr().err

"""Invariants of a training step: what is counted, what is trained, what is logged, and what stops it."""

import json
import math
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tiny import ALL_TERMS, GradientDump, build_trainer, make_pair, tiny_config
from transformers import TrainerCallback

from kdkit.errors import RunFailed
from kdkit.training.objective import PROJECTOR, Moment


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def gradients_of(config, folder):
    dump = GradientDump()
    trainer = build_trainer(config, folder, callbacks=(dump,))
    trainer.train()
    return trainer, dump.steps


def rows_of(trainer, kind="train"):
    return [row for row in trainer.metrics.rows() if row["kind"] == kind]


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    norm = torch.stack([g.norm() for g in theirs.values()]).norm()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= tolerance * norm, name


OBJECTIVES = {
    "kd": {"kd": {"weight": 1.0}},
    "lm": {"kd": {"weight": 0.0}, "lm": {"weight": 1.0}},
    "dtw": {"kd": {"weight": 0.0}, "dtw": {"weight": 1.0}},
    "all": ALL_TERMS,
    "weight still 0": {"kd": {"weight": 1.0}, "dtw": {"weight": {"start": 0, "end": 1, "begin": 0.9}}},
}


class TestAccumulation:
    @pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
    def test_batch_1_times_8_is_batch_8_times_1(self, pair, tmp_path, objective):
        """trl #4719: a loss that averages micro-batches weighs short answers more under accumulation."""
        steps = {"max_steps": 2, "scheduler": "constant", "warmup_steps": 0}
        whole = tiny_config(pair, objective=objective, batch_size=8, accumulation=1, **steps)
        split = tiny_config(pair, objective=objective, batch_size=1, accumulation=8, **steps)
        one, whole_steps = gradients_of(whole, tmp_path / "whole")
        many, split_steps = gradients_of(split, tmp_path / "split")
        assert_same_gradients(split_steps[0], whole_steps[0])
        for ours, theirs in zip(rows_of(many), rows_of(one), strict=True):
            for name in ("loss", "grad_norm", *(key for key in theirs if key.startswith("part/"))):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


class TestWhatIsTrained:
    def test_the_projector_is_zeroed_clipped_saved_and_has_its_own_rate(self, pair, tmp_path):
        """WARD leaves it out of the optimizer; beside the Trainer's model its gradient is never zeroed."""
        config = tiny_config(pair, "objective.adapter_learning_rate=0.05", scheduler="constant", warmup_steps=0)
        trainer, steps = gradients_of(config, tmp_path)
        name = f"adapters.{PROJECTOR}.weight"
        group = next(g for g in trainer.optimizer.param_groups if g["lr"] == 0.05)
        assert [p.shape for p in group["params"]] == [(24, 16)]
        assert group["weight_decay"] == 0
        for gradients in steps:
            total = torch.stack([g.norm() for g in gradients.values()]).norm()
            assert total <= config.optim.max_grad_norm * 1.001
        saved = load_file(tmp_path / "checkpoint-3" / "adapters.safetensors")
        assert torch.equal(saved[f"{PROJECTOR}.weight"], trainer.model.adapters[PROJECTOR].weight)
        assert name in steps[0]

    def test_the_teacher_is_no_part_of_the_model_and_does_not_move(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair), tmp_path)
        before = {name: p.clone() for name, p in trainer.teacher.model.named_parameters()}
        assert not any("teacher" in name for name, _ in trainer.model.named_parameters())
        trainer.train()
        assert all(torch.equal(p, before[name]) for name, p in trainer.teacher.model.named_parameters())

    def test_no_teacher_is_asked_while_its_terms_weigh_nothing(self, pair, tmp_path):
        objective = {"kd": {"weight": {"start": 0, "end": 1, "begin": 0.9}}, "lm": {"weight": 1.0}}
        trainer = build_trainer(tiny_config(pair, objective=objective), tmp_path)
        trainer.teacher = mock.Mock(side_effect=AssertionError("asked"))
        trainer.evaluate = mock.Mock()  # at the last step the weight is 1, and so it is there
        trainer.train()
        assert trainer.state.global_step == 3

    def test_two_visible_cards_never_become_data_parallel(self, pair, tmp_path):
        with mock.patch("transformers.training_args.TrainingArguments.n_gpu", new_callable=mock.PropertyMock) as seen:
            seen.return_value = 2
            args = build_trainer(tiny_config(pair), tmp_path).args
        assert args.n_gpu == 1


class TestWhatIsLogged:
    def test_parts_times_weights_sum_to_the_total(self, pair, tmp_path):
        trainer, _ = gradients_of(tiny_config(pair), tmp_path)
        for row in rows_of(trainer):
            weighted = {name: row[f"weighted/{name}"] for name in ("kd", "lm", "dtw")}
            assert row["loss"] == pytest.approx(sum(weighted.values()), rel=1e-6)
            assert weighted["kd"] == pytest.approx(0.7 * 4.0 * row["part/kd"], rel=1e-6)  # T² = 4
            assert weighted["lm"] == pytest.approx(0.3 * row["part/lm"], rel=1e-6)
            assert row["kd_temperature"] == 2.0
            assert row["update_norm"] > 0
            assert 0 <= row["dtw/off_diagonal_fraction"] <= 1

    def test_at_random_weights_every_part_is_of_order_ten_at_most(self, pair, tmp_path):
        row = rows_of(gradients_of(tiny_config(pair), tmp_path)[0])[0]
        assert all(0 <= row[f"part/{name}"] < 10 for name in ("kd", "lm", "dtw"))

    def test_label_part_is_the_models_own_cross_entropy(self, pair, tmp_path):
        objective = {"kd": {"weight": 0}, "lm": {"weight": 1}}
        config = tiny_config(pair, objective=objective, max_steps=1)
        trainer = build_trainer(config, tmp_path)
        batches = []
        forward = trainer.model.forward
        trainer.model.forward = lambda batch, **given: batches.append(batch) or forward(batch, **given)
        expected = []

        class Measure(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                batches.clear()

            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                student, batch = trainer.model.student, batches[-1]
                logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                expected.append(
                    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
                )

        trainer.add_callback(Measure())
        trainer.train()
        assert rows_of(trainer)[0]["part/lm"] == pytest.approx(expected[0].item(), rel=1e-5)


class TestTopK:
    def test_all_ids_kept_is_the_dense_divergence_and_few_are_less(self, pair, tmp_path):
        """Merging the teacher's tail into one bucket can only lose divergence (data processing inequality)."""
        parts = {}
        for top_k in (None, 1024, 4):
            config = tiny_config(pair, objective={"kd": {"loss": "skew_reverse_kl", "top_k": top_k}}, max_steps=1)
            trainer = build_trainer(config, tmp_path / str(top_k))
            trainer.train()
            parts[top_k] = rows_of(trainer)[0]["part/kd"]
        assert parts[1024] == pytest.approx(parts[None], rel=1e-5)
        assert 0 < parts[4] < parts[None]


class TestEvaluate:
    def test_counts_rows_once_whatever_the_batch_size(self, pair, tmp_path):
        """The Trainer averages batch means: 5.480, 5.441, 5.458 for batches of 1, 2, 4 on the same rows."""
        found = []
        for size in (1, 3, 7):
            config = tiny_config(pair, f"evaluation.batch_size={size}", max_steps=1)
            trainer = build_trainer(config, tmp_path / str(size))
            trainer.train()
            found.append(rows_of(trainer, "eval")[0])
        for name in ("loss", "cross_entropy", "part/kd", "part/dtw"):
            assert [row[name] for row in found] == pytest.approx([found[0][name]] * 3, rel=1e-5)
        assert found[0]["perplexity"] == pytest.approx(math.exp(found[0]["cross_entropy"]))

    def test_uses_the_weights_of_the_step_at_which_it_stands(self, pair, tmp_path):
        """Seed 002: evaluation at step None took full weights, so that its loss could not be compared."""
        ramp = {"start": 0, "end": 1}
        objective = {"kd": {"weight": 1.0}, "lm": {"weight": ramp}}
        trainer = build_trainer(tiny_config(pair, objective=objective, max_steps=4), tmp_path)
        trainer.train()
        trainer.state.global_step = 2
        figures = trainer.evaluate()
        assert figures["eval_loss"] == pytest.approx(figures["eval_part/kd"] + 0.5 * figures["eval_part/lm"], rel=1e-6)

    def test_perplexity_comes_from_cross_entropy_alone_and_is_not_capped(self, pair, tmp_path):
        """Seeds 001 and 004: perplexity was exp(total loss), shown as e^20 = 485165195 whatever happened."""
        trainer = build_trainer(tiny_config(pair, "objective.lm.weight=0"), tmp_path)
        with torch.no_grad():
            trainer.model.student.lm_head.weight.mul_(200.0)
        figures = trainer.evaluate()
        assert figures["eval_cross_entropy"] > 20
        assert figures["eval_perplexity"] == pytest.approx(math.exp(figures["eval_cross_entropy"]), rel=1e-9)

    def test_on_or_off_the_weights_are_the_same(self, tmp_path):
        pair, weights = make_pair(tmp_path, dropout=0.2), []
        for every in (0, 1):
            trainer = build_trainer(tiny_config(pair), tmp_path / str(every))
            trainer.generate = None
            flow = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "StageFlow")
            flow.evaluate_every = every
            trainer.train()
            weights.append(trainer.model.state_dict())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class TestNonfinite:
    @pytest.mark.parametrize("term", ["kd", "lm", "dtw"])
    def test_stops_names_the_term_and_step_and_saves_the_batch(self, pair, tmp_path, term):
        """Seeds 001 and 004: a NaN was clamped to 0 and corrupted the run from then on."""
        trainer = build_trainer(tiny_config(pair), tmp_path)
        objective, calls = trainer.objective, []
        original = type(objective).__call__

        def poisoned(self, *args, **kwargs):
            outputs = original(self, *args, **kwargs)
            if torch.is_grad_enabled():
                calls.append(term)
                if len(calls) == 2:
                    outputs["sums"][term] = outputs["sums"][term] * math.nan
                    outputs["loss"] = outputs["loss"] * math.nan
            return outputs

        with (
            mock.patch.object(type(objective), "__call__", poisoned),
            pytest.raises(RunFailed, match=rf"stage distill, step 2: the loss is nan; term {term}\."),
        ):
            trainer.train()
        assert "input_ids" in load_file(tmp_path / "nonfinite-batch-2.safetensors")
        assert (tmp_path / "checkpoint-1" / "complete.json").is_file()
        saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in saved.values())

    def test_a_gradient_that_is_not_finite_stops_too(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair), tmp_path)
        trainer.model.student.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(RunFailed, match="the gradient's norm is inf although the loss is finite"):
            trainer.train()

    def test_a_loss_scale_that_never_helps_stops_with_its_name(self, pair, tmp_path):
        """Under fp16 the scaler skips such steps by itself, for ever, with plausible losses in the log."""
        trainer = build_trainer(tiny_config(pair, max_steps=40), tmp_path)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        trainer.model.student.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
        with pytest.raises(RunFailed, match="no loss scale gives a finite gradient"):
            trainer.train()
        assert trainer.remembered.num_skipped_steps > 1

    def test_skip_leaves_weights_alone_and_counts(self, pair, tmp_path):
        config = tiny_config(pair, "objective.on_nonfinite=skip", scheduler="constant", warmup_steps=0)
        trainer = build_trainer(config, tmp_path)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.model.student.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
        trainer.train()
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        last = rows_of(trainer)[-1]
        assert (last["skipped_steps"], last["loss"]) == (3, None)


class TestCheckpoint:
    def test_any_exception_leaves_the_last_complete_step(self, pair, tmp_path):
        class Fault(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    raise KeyError("fault")

        config = tiny_config(pair, batch_size=4, accumulation=2)
        with pytest.raises(KeyError, match="fault"):
            build_trainer(config, tmp_path / "broken", callbacks=(Fault(),)).train()
        assert (tmp_path / "broken" / "checkpoint-2" / "complete.json").is_file()

    def test_before_step_1_evaluation_generation_and_saving_are_tried(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair), tmp_path)
        trainer.generate = mock.Mock(side_effect=ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert trainer.state.global_step == 0
        assert rows_of(trainer) == []

    def test_a_save_that_fails_stops_before_step_1(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair), tmp_path)
        trainer._save = mock.Mock(side_effect=OSError("no space left"))
        with pytest.raises(RunFailed, match="step 0: the checkpoint could not be written"):
            trainer.train()
        assert rows_of(trainer) == []
        assert not (tmp_path / ".staging").exists()

    def test_a_model_with_other_names_on_disk_than_in_memory_resumes(self, pair, tmp_path):
        """Mixture-of-experts models are stored expert by expert and held as one tensor."""
        from shutil import copytree

        from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

        folder = copytree(pair["student"], tmp_path / "moe")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None}
        MixtralForCausalLM(
            MixtralConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes, **heads)
        ).save_pretrained(folder)
        config = tiny_config(pair | {"student": str(folder)}, objective={"kd": {"weight": 1}}, max_steps=2)
        trained, _ = gradients_of(config, tmp_path / "run")
        again = build_trainer(config, tmp_path / "again")
        again._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
        theirs = trained.model.student.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in again.model.student.state_dict().items())

    def test_saving_comes_before_evaluation(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair, max_steps=1), tmp_path)
        evaluate = trainer.evaluate

        def crash(*args, **kwargs):
            if trainer.state.global_step == 1:
                raise ZeroDivisionError
            return evaluate(*args, **kwargs)

        trainer.evaluate = crash
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert (tmp_path / "checkpoint-1" / "complete.json").is_file()

    def test_a_full_disk_is_one_message_and_keeps_what_is_there(self, pair, tmp_path):
        trainer = build_trainer(tiny_config(pair), tmp_path)
        flow = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "StageFlow")
        flow.save_every = 1
        free = mock.Mock(side_effect=lambda _: mock.Mock(free=2**40 if trainer.state.global_step < 2 else 10))
        with (
            mock.patch("kdkit.training.checkpoint.shutil.disk_usage", free),
            pytest.raises(RunFailed, match=r"MiB free. Nothing was written and the previous checkpoint is kept"),
        ):
            trainer.train()
        assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
        assert not (tmp_path / ".staging").exists()

    def test_a_checkpoint_reads_with_from_pretrained(self, pair, tmp_path):
        from transformers import AutoModelForCausalLM

        trainer, _ = gradients_of(tiny_config(pair), tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", dtype=torch.float32)
        ours = trainer.model.student.state_dict()
        assert all(torch.equal(value, ours[name]) for name, value in again.state_dict().items())
        assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


class TestMoment:
    def test_fraction_is_the_share_of_completed_steps(self):
        assert Moment(25, 100).fraction == 0.25

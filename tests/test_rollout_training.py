"""A rollout inside training: what is replaced, counted, logged, remembered and refused."""

import json
import math
from unittest import mock

import numpy as np
import pytest
from killing import run_forked, run_killed_then_resumed
from safetensors.torch import load_file
from tiny import OF_THE_MACHINE, build_trainer, make_pair, tiny_config
from transformers import AutoTokenizer, LlamaForCausalLM

from kdkit.config import load_config
from kdkit.errors import UserError
from kdkit.evaluation import Answer, generation
from kdkit.teacher.sources import LiveTeacher
from kdkit.training import checkpoint
from kdkit.training.rollout import STATE_FILE, TEXTS_FILE, build_rollout, unpack_texts
from kdkit.training.rollout import generator as generator_module
from kdkit.training.run import run_distillation

EOS = 1
FREE = ("rollout.guard=null", "rollout.collapse=null", "rollout.max_new_tokens=8")
LENGTHS = ("data.max_length=160", "data.max_prompt_length=128")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), dropout=0.2)


@pytest.fixture(scope="session")
def plain_pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("plain_pair"))


def mixed_config(pair, *overrides, mode="mixed", objective=None, **optim):
    return tiny_config(
        pair, f"rollout.mode={mode}", "evaluation.every_steps=2", *FREE, *overrides, objective=objective, **optim
    )


def log_of(trainer, kind="train"):
    return [row for row in trainer.metrics.rows() if row["kind"] == kind]


def student_says(*texts):
    """Stands in for generation: every prompt gets the next of the texts; a text without an end was cut."""

    def answers(student, tokenizer, prompts, settings):
        made = []
        for number, _ in enumerate(prompts):
            said = texts[number % len(texts)]
            ids = tokenizer(said.removesuffix("<eos>"), add_special_tokens=False)["input_ids"]
            ended = said.endswith("<eos>")
            made.append(Answer(said.removesuffix("<eos>"), tuple(ids + [EOS] * ended), ended))
        return made

    return mock.patch.object(generator_module, "generate_answers", answers)


class TestMix:
    def test_sources_of_the_rows_add_up_and_follow_the_threshold(self, pair, tmp_path):
        config = mixed_config(pair, "rollout.threshold=0.6", "rollout.capacity=8", max_steps=40)
        trainer = build_trainer(config, tmp_path)
        trainer.train()
        rows = log_of(trainer)
        shares = np.array([[row[f"rollout/{name}_fraction"] for name in ("gold", "fresh", "replayed")] for row in rows])
        assert np.allclose(shares.sum(axis=1), 1.0)
        assert set(np.unique(shares)) == {0.0, 1.0}  # one batch a step, nothing refused
        student = 1.0 - shares[:, 0].mean()
        assert abs(student - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 40)
        assert shares[:20, 1].sum() > shares[20:, 1].sum()  # the fresh share falls to 0
        assert all(row["rollout/age_steps"] >= 1 for row in rows if row["rollout/replayed_fraction"])

    def test_on_policy_generates_every_batch_and_keeps_no_buffer(self, pair, tmp_path):
        trainer = build_trainer(mixed_config(pair, mode="on_policy"), tmp_path)
        trainer.train()
        assert [row["rollout/fresh_fraction"] for row in log_of(trainer)] == [1.0] * 3
        assert len(trainer.rollout.buffer) == 0

    def test_adaptive_starts_with_the_loss_before_step_1_and_trains_on_gold_until_it_rises(self, pair, tmp_path):
        trainer = build_trainer(mixed_config(pair, mode="adaptive"), tmp_path)
        trainer.train()
        first = log_of(trainer, "eval")[0]
        assert first["step"] == 0
        assert trainer.rollout.threshold.level == first["cross_entropy"]
        assert [row["rollout/gold_fraction"] for row in log_of(trainer)] == [1.0] * 3

    def test_a_whole_accumulation_window_is_generated_at_once(self, pair, tmp_path):
        config = mixed_config(pair, mode="on_policy", batch_size=2, accumulation=4, max_steps=2)
        trainer = build_trainer(config, tmp_path)
        with mock.patch.object(generation, "write", side_effect=generation.write) as made:
            trainer.train()
        assert [call.kwargs["input_ids"].shape[0] for call in made.call_args_list] == [8, 8]

    def test_texts_of_steps_to_come_are_written_along_up_to_the_end_of_the_epoch(self, pair, tmp_path):
        config = mixed_config(pair, "rollout.ahead=3", mode="on_policy", max_steps=6)  # an epoch has 4 steps
        trainer = build_trainer(config, tmp_path)
        with mock.patch.object(generation, "write", side_effect=generation.write) as made:
            trainer.train()
        assert [call.kwargs["input_ids"].shape[0] for call in made.call_args_list] == [24, 8, 16]
        assert [row["rollout/fresh_fraction"] for row in log_of(trainer)] == [1.0] * 6

    def test_what_is_written_ahead_is_for_the_rows_of_its_step(self, plain_pair, tmp_path):
        """Every prompt gets the same text, so that only rows and their order can differ."""
        logs = []
        for ahead in (1, 3):
            settings = ("rollout.threshold=0.7", f"rollout.ahead={ahead}", "rollout.capacity=8")
            trainer = build_trainer(mixed_config(plain_pair, *settings, max_steps=7), tmp_path / str(ahead))
            with student_says("A text of the student.<eos>"):
                trainer.train()
            apart = {*OF_THE_MACHINE, "rollout/age_steps"}
            logs.append([{name: row[name] for name in row if name not in apart} for row in log_of(trainer)])
        assert logs[0] == logs[1]

    def test_a_threshold_that_falls_leaves_unused_what_was_written_ahead(self, pair, tmp_path):
        trainer = build_trainer(mixed_config(pair, "rollout.threshold=1.0", "rollout.ahead=3", max_steps=3), tmp_path)
        rollout, sizes = trainer.rollout, []
        mix = rollout.mix

        def mix_then_fall(*args, **kwargs):
            mixed = mix(*args, **kwargs)
            sizes.append(len(rollout.shelf))
            rollout.threshold.value = 0.0
            return mixed

        rollout.mix = mix_then_fall
        trainer.train()
        assert sizes == [2, 1, 0]
        assert [row["rollout/gold_fraction"] for row in log_of(trainer)] == [0.0, 1.0, 1.0]

    def test_batch_1_times_8_is_batch_8_times_1_with_the_students_text(self, plain_pair, tmp_path):
        """Counts are taken after the texts came in; texts differ in length, so that a mean of means would show."""
        logs = []
        for batch_size, accumulation in ((8, 1), (1, 8)):
            steps = {"batch_size": batch_size, "accumulation": accumulation, "max_steps": 2}
            trainer = build_trainer(mixed_config(plain_pair, mode="on_policy", **steps), tmp_path / str(batch_size))
            with student_says("One.<eos>", "A longer text<eos>", "cut short"):
                trainer.train()
            logs.append(log_of(trainer))
        for ours, theirs in zip(*logs, strict=True):
            for name in ("loss", "part/kd", "part/dtw", "tokens", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


class TestWhatIsLearnt:
    def test_the_students_text_is_never_a_label(self, pair, tmp_path):
        """On-policy with lm alone beside kd: lm has nothing to count, and its part and gradient are 0."""
        objective = {"kd": {"weight": 1.0}, "lm": {"weight": 1.0}}
        trainer = build_trainer(mixed_config(pair, mode="on_policy", objective=objective), tmp_path)
        trainer.train()
        assert not any("part/lm" in row for row in log_of(trainer))
        assert [row["weighted/lm"] for row in log_of(trainer)] == [0.0] * 3
        assert all(row["part/kd"] > 0 for row in log_of(trainer))

    def test_refused_texts_leave_their_gold_rows_which_alone_are_labels(self, pair, tmp_path):
        objective = {"kd": {"weight": 1.0}, "lm": {"weight": 1.0}}
        config = mixed_config(pair, "rollout.guard={min_teacher_logprob: null}", mode="on_policy", objective=objective)
        trainer = build_trainer(config, tmp_path)
        with student_says("Fine.<eos>", "not ended"):
            trainer.train()
        for row in log_of(trainer):
            assert (row["rollout/gold_fraction"], row["rollout/fresh_fraction"]) == (0.5, 0.5)
            assert row["rollout/refused/no_end"] == row["rollout/pass_fraction"] == 0.5
            assert row["part/lm"] > 1.0

    def test_prompts_without_an_answer_are_kept_where_the_student_writes_every_text(self, pair, tmp_path):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"instruction": f"Say {n}.", "output": ""}) + "\n" for n in range(16)))
        config = mixed_config(
            pair, f"data.train={file}", mode="on_policy", objective={"kd": {"weight": 1.0}}, max_steps=2
        )
        result = run_distillation(config, tmp_path / "run")
        rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        assert all(row["tokens"] >= 8 for row in rows if row["kind"] == "train")

    def test_a_window_without_anything_to_learn_changes_no_weight_by_its_gradient(self, pair, tmp_path):
        """Prompts alone, and a guard that refuses every text: no token counts."""
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"instruction": f"Say {n}.", "output": ""}) + "\n" for n in range(16)))
        config = mixed_config(
            pair,
            f"data.train={file}",
            "rollout.guard={min_tokens: 100, min_teacher_logprob: null}",
            mode="on_policy",
            objective={"kd": {"weight": 1.0}, "dtw": {"weight": 1.0}},
        )
        result = run_distillation(config, tmp_path / "run")
        rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "train"]
        assert [(row["loss"], row["grad_norm"]) for row in steps] == [(0.0, 0.0)] * 3
        assert [row["rollout/empty_fraction"] for row in steps] == [1.0] * 3


class TestGuardInTraining:
    def test_a_guard_that_refuses_everything_is_said_and_training_goes_on_with_gold(self, pair, tmp_path, capsys):
        config = mixed_config(pair, "rollout.guard={}", mode="on_policy", max_steps=4)
        trainer = build_trainer(config, tmp_path)
        trainer.train()
        assert [row["rollout/gold_fraction"] for row in log_of(trainer)] == [1.0] * 4
        notes = [row["note"] for row in log_of(trainer, "eval")]
        assert all("the guard refused all 16 texts since the last evaluation (no_end 16)" in note for note in notes)
        assert "training goes on with gold rows" in capsys.readouterr().err

    def test_the_gate_keeps_generation_off_until_the_floor_is_reached(self, pair, tmp_path):
        config = mixed_config(pair, "rollout.gate={min_rouge_l: 5}", mode="on_policy", max_steps=6)
        trainer = build_trainer(config, tmp_path)
        reached = iter([0.0, 1.0, 6.0, 2.0])  # the dry run, then after 2, 4 and 6 steps
        trainer.generate = lambda student, limit: {"rouge_l": next(reached)}
        trainer.train()
        fresh = [row["rollout/fresh_fraction"] for row in log_of(trainer)]
        assert fresh == [0.0] * 4 + [1.0] * 2
        assert "opens the gate" in log_of(trainer, "eval")[1]["note"]

    def test_a_gate_without_a_floor_opens_without_a_measured_rouge_l(self, pair, tmp_path):
        gate = "rollout.gate={min_rouge_l: 0, begin_fraction: 0.5}"
        config = mixed_config(pair, gate, "evaluation.generate_rows=0", mode="on_policy", max_steps=4)
        trainer = build_trainer(config, tmp_path)
        trainer.train()
        assert [row["rollout/fresh_fraction"] for row in log_of(trainer)] == [0.0, 0.0, 1.0, 1.0]

    def test_a_collapse_takes_the_threshold_back_and_empties_the_buffer(self, pair, tmp_path):
        config = mixed_config(pair, "rollout.threshold=0.9", "rollout.collapse={}", max_steps=8)
        trainer = build_trainer(config, tmp_path)
        # the dry run, before step 1, then after 2, 4, 6 and 8 steps
        reached = iter([0.0, 29.0, 30.0, 12.0, 11.0, 30.0])
        trainer.generate = lambda student, limit: {"rouge_l": next(reached)}
        trainer.train()
        evaluations = log_of(trainer, "eval")
        assert [row["rollout/threshold"] for row in evaluations] == [0.9, 0.9, 0.9, 0.45, 0.45]
        assert [row.get("note") for row in evaluations] == [
            None,
            None,
            "ROUGE-L fell from 30.0 to 12.0: seen at 1 evaluation, at 2 in a row the threshold goes back",
            "ROUGE-L fell from 30.0 to 11.0: threshold 0.9 -> 0.45; replay buffer emptied",
            None,
        ]
        assert [row["rollout/taken_back"] for row in evaluations] == [0.0, 0.0, 0.0, 1.0, 0.0]
        assert log_of(trainer)[-1]["rollout/threshold"] == 0.45
        assert len(trainer.rollout.buffer) <= 16

    def test_a_single_dip_is_noted_and_takes_nothing_back(self, pair, tmp_path):
        config = mixed_config(pair, "rollout.collapse={}", mode="on_policy", max_steps=6)
        trainer = build_trainer(config, tmp_path)
        reached = iter([0.0, 30.0, 12.0, 30.0, 12.0])
        trainer.generate = lambda student, limit: {"rouge_l": next(reached)}
        trainer.train()
        assert [row["rollout/threshold"] for row in log_of(trainer, "eval")] == [1.0] * 4
        assert [row["rollout/fresh_fraction"] for row in log_of(trainer)] == [1.0] * 6

    def test_while_a_fall_is_watched_an_adaptive_threshold_does_not_rise(self, pair, tmp_path):
        rises = ("rollout.threshold=0.5", "rollout.loss_epsilon=0", "rollout.reference=best", "rollout.collapse={}")
        trainer = build_trainer(mixed_config(pair, *rises, mode="adaptive"), tmp_path)
        trainer.rollout.tally.num_trained = 100
        trainer.rollout.observe({"cross_entropy": 2.0, "rouge_l": 30.0})
        trainer.rollout.tally.num_trained = 100
        moved, note = trainer.rollout.observe({"cross_entropy": 3.0, "rouge_l": 12.0})
        assert moved["rollout/threshold"] == 0.5
        assert "seen at 1 evaluation" in note
        moved, _ = trainer.rollout.observe({"cross_entropy": 3.0, "rouge_l": 30.0})
        assert moved["rollout/threshold"] == 0.6


STAGES = (
    "stages={warm_start: {objective: {kd: {weight: 0}, lm: {weight: 1}, dtw: {weight: 0}}, rollout: {mode: off}},"
    " distill: {}}",
    "checkpoint.every_steps=2",
    "logging.every_steps=2",
    "rollout.capacity=8",
    "rollout.threshold=0.9",
    "rollout.loss_epsilon=0.0",
    "rollout.guard={require_end: false, min_teacher_logprob: -9, max_repeat_fraction: 1}",
    "rollout.collapse={}",
)


@pytest.fixture(scope="module", params=[1, 3])
def adaptive(pair, request):
    return mixed_config(pair, *STAGES, f"rollout.ahead={request.param}", mode="adaptive", max_steps=5)


@pytest.fixture(scope="module")
def uninterrupted(adaptive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return folder, run_forked(adaptive, folder)


class TestResume:
    @staticmethod
    def trace(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows]

    def assert_same(self, ours, theirs):
        assert self.trace(ours) == self.trace(theirs)
        for name in ("model.safetensors", "adapters.safetensors"):
            mine, other = load_file(ours / "model" / name), load_file(theirs / "model" / name)
            assert all(np.array_equal(mine[key], other[key]) for key in mine | other), name
        mine, other = (checkpoint.newest_checkpoint(folder / "stages" / "distill") for folder in (ours, theirs))
        assert (mine / STATE_FILE).read_text() == (other / STATE_FILE).read_text()
        texts, others = (unpack_texts(load_file(folder / TEXTS_FILE)) for folder in (mine, other))
        assert texts == others
        assert texts

    def test_after_a_kill_at_random_moments_buffer_threshold_and_trace_are_the_same(
        self, adaptive, uninterrupted, tmp_path
    ):
        folder, num_events = uninterrupted
        rows = [row for row in self.trace(folder) if row["stage"] == "distill" and row["kind"] == "train"]
        assert any(row["rollout/fresh_fraction"] for row in rows)  # the story has something to remember
        assert any(row["rollout/replayed_fraction"] for row in rows)
        moments = np.random.default_rng(1).choice(np.arange(1, num_events + 1), size=4, replace=False)
        for moment in sorted(moments.tolist()):
            self.assert_same(run_killed_then_resumed(adaptive, tmp_path / "run", moment), folder)

    @pytest.mark.slow
    def test_after_a_kill_at_every_event(self, adaptive, uninterrupted, tmp_path):
        folder, num_events = uninterrupted
        for moment in range(1, num_events + 1):
            self.assert_same(run_killed_then_resumed(adaptive, tmp_path / "run", moment), folder)

    def test_the_finished_student_has_none_of_it(self, uninterrupted):
        folder, _ = uninterrupted
        assert not {TEXTS_FILE, STATE_FILE} & {file.name for file in (folder / "model").iterdir()}


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (("rollout.capacity=4",), r"rollout.capacity \(4\) is below optim.batch_size \(8\)"),
            (("rollout.max_new_tokens=100",), r"exceeds data.max_length \(160\)"),
            (("rollout.mode=adaptive", "evaluation.every_steps=0"), "moves its threshold at evaluations"),
            (("rollout.mode=on_policy", "rollout.threshold=0.5"), "take mode mixed"),
            (("objective.kd.weight=0", "objective.lm.weight=1", "objective.dtw.weight=0"), "never a label for lm"),
            (("rollout.gate={}", "evaluation.generate_rows=0"), "waits for a validation ROUGE-L"),
            (("rollout.collapse={}", "evaluation.generate_rows=0"), "rollout.collapse looks at"),
            (("rollout.mode=adaptve",), "rollout.mode"),
            (("rollout.thresold=0.5",), "did you mean threshold"),
        ],
    )
    def test_settings_that_do_not_go_together_are_named(self, pair, overrides, message):
        with pytest.raises(UserError, match=message):
            mixed_config(pair, *overrides)

    def test_a_threshold_that_could_never_move_is_refused(self, pair, tmp_path):
        config = mixed_config(pair, "rollout.mode=adaptive", "evaluation.every_steps=3")
        with pytest.raises(UserError, match=r"evaluation\.every_steps=3 the first evaluation is the last"):
            run_distillation(config, tmp_path / "run")

    def test_off_is_read_from_yaml_as_the_mode(self, pair):
        assert load_config(mixed_config(pair).model_dump(mode="json"), ["rollout.mode=off"]).rollout.mode == "off"

    def test_a_cached_teacher_is_refused(self, pair):
        class CachedTeacher:
            hidden_size = 24

        tokenizer = AutoTokenizer.from_pretrained(pair["student"])
        with pytest.raises(UserError, match="a cached teacher knows only the text it was cached on"):
            build_rollout(
                mixed_config(pair),
                tokenizer=tokenizer,
                teacher=CachedTeacher(),
                collator=None,
                num_steps=1,
                num_warmup_steps=0,
                references=list,
            )

    def test_words_of_a_tokenizer_that_does_not_give_back_its_text_are_refused(self, pair):
        tokenizer = AutoTokenizer.from_pretrained(pair["student"])
        teacher = LiveTeacher(LlamaForCausalLM.from_pretrained(pair["teacher"]))
        steps = {"num_steps": 1, "num_warmup_steps": 0, "references": list, "collator": None}
        objective = {"kd": {"weight": 1.0}, "dtw": {"weight": 1.0}}
        with mock.patch.object(tokenizer, "decode", return_value="withoutspaces"):
            with pytest.raises(UserError, match=r"does not give back 'The quick brown fox.*objective\.unit=token"):
                build_rollout(mixed_config(pair, objective=objective), tokenizer=tokenizer, teacher=teacher, **steps)
            tokens = mixed_config(pair, "objective.unit=token", objective=objective)
            assert build_rollout(tokens, tokenizer=tokenizer, teacher=teacher, **steps) is not None

    def test_texts_beyond_the_students_positions_are_refused_before_step_1(self, pair, tmp_path):
        config = mixed_config(pair, "data.max_length=1024", "rollout.max_new_tokens=600")
        with pytest.raises(UserError, match=r"max_new_tokens \(600\).*exceeds the student's 512 positions"):
            run_distillation(config, tmp_path / "run")
        assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_a_text_with_an_id_that_the_teacher_lacks_is_refused_without_a_guard(pair, tmp_path):
    """A vocabulary padded to another width: what only one side knows is refused, guard or not."""
    trainer = build_trainer(mixed_config(pair, mode="on_policy"), tmp_path)
    trainer.rollout.guard.vocab_size = 500
    trainer.train()
    assert log_of(trainer)[0]["rollout/refused/outside_vocabulary"] > 0.5

"""Whole runs across tokenizers: every term, two stages, the student's own text, a resume, and what is refused."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from crossing import BYTES, META_SPACE, make_pair, moment_of, rows_of, run_objective, tokenizer_of
from killing import run_forked, run_killed_then_resumed
from safetensors.torch import load_file
from tiny import OF_THE_MACHINE
from transformers import AutoTokenizer

from kdkit.config import demo_folder, load_config
from kdkit.data import DistillCollator
from kdkit.data.batch import teacher_view
from kdkit.errors import UserError
from kdkit.teacher.sources import LiveTeacher
from kdkit.training import checkpoint
from kdkit.training.controls import planned_values
from kdkit.training.rollout import TEXTS_FILE, Rollout, unpack_texts
from kdkit.training.rollout.building import teacher_scores
from kdkit.training.rows import RunRows
from kdkit.training.run import run_distillation

RAMP = {"start": 0.0, "end": 0.1, "begin": 0.2, "finish": 0.8}
EVERY_TERM = {
    "kd": {"weight": 0.7, "temperature": {"start": 2.0, "end": 1.5}, "top_k": 256},
    "lm": {"weight": 0.3},
    "span": {"weight": 0.2},
    "dtw": {"weight": 0.1, "importance": "inverse_entropy"},
    "hidden": {"weight": RAMP},
    "attention": {"weight": RAMP, "num_layers": 2},
    "layerwise": {"weight": RAMP, "mixing": "learnt"},
    "contrastive": {"weight": RAMP},
    "routing": {"weight": RAMP},
}
STAGES = (
    "stages={warm_start: {objective: {kd: {weight: 1}, lm: {weight: 1}, span: {weight: 0}, dtw: {weight: 0},"
    " attention: {weight: 0}, layerwise: {weight: 0.1, mixing: equal}, contrastive: {weight: 0}, routing: {weight: 0}},"
    " rollout: {mode: off}}, distill: {}}",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=2",
    "logging.every_steps=2",
)
OWN_TEXT = (
    "rollout.mode=mixed",
    "rollout.threshold=0.8",
    "rollout.collapse=null",
    "rollout.capacity=4",
    "rollout.guard={require_end: false, min_teacher_logprob: -99, max_repeat_fraction: 1}",
)


def cross_config(*overrides, objective=None, **optim):
    """A few steps of the embedded MoE pair on a few rows."""
    tree = {
        "preset": "demo-moe",
        "teacher": {"attention": "eager"},
        "student": {"attention": "eager"},
        "data": {"train_rows": 12, "validation_rows": 4, "test_rows": 4},
        "objective": objective if objective is not None else EVERY_TERM,
        "optim": {"max_steps": 4, "batch_size": 4, **optim},
        "evaluation": {"every_steps": 2, "batch_size": 4, "max_new_tokens": 4, "generate_rows": 2, "before": False},
        "rollout": {"max_new_tokens": 12},
        "logging": {"every_steps": 1},
        "threads": 1,
    }
    return load_config(tree, overrides)


def trace(folder, *kinds):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if not kinds or row["kind"] in kinds]
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in kept]


@pytest.fixture(scope="module")
def config():
    return cross_config(*STAGES, *OWN_TEXT, max_steps=7)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return folder, run_forked(config, folder)


def texts_of(folder):
    newest = checkpoint.newest_checkpoint(folder / "stages" / "distill")
    return unpack_texts(load_file(newest / TEXTS_FILE))


class TestResume:
    def test_after_a_kill_at_random_moments_all_is_as_without(self, config, uninterrupted, tmp_path):
        folder, num_events = uninterrupted
        assert any(row.get("rollout/replayed_fraction") for row in trace(folder))
        moments = np.random.default_rng(3).choice(np.arange(num_events // 3, num_events), size=2, replace=False)
        for moment in sorted(moments.tolist()):
            ours = run_killed_then_resumed(config, tmp_path / "run", moment)
            assert trace(ours) == trace(folder)
            for name in ("model.safetensors", "adapters.safetensors"):
                mine, other = load_file(ours / "model" / name), load_file(folder / "model" / name)
                assert mine.keys() == other.keys()
                assert all(torch.equal(mine[key], other[key]) for key in mine), name
            assert texts_of(ours) == texts_of(folder)
            evaluations = [json.loads((path / "evaluation.json").read_text()) for path in (ours, folder)]
            assert evaluations[0] == evaluations[1]

    def test_the_buffer_in_a_checkpoint_holds_both_readings(self, uninterrupted):
        texts = texts_of(uninterrupted[0])
        assert texts
        for text in texts:
            assert max(text.row["span_ids"]) == max(text.row["teacher"]["span_ids"])
            assert len(text.row["teacher"]["span_ids"]) == len(text.row["teacher"]["input_ids"])


class TestStages:
    def test_the_second_has_all_terms_and_the_first_few(self, uninterrupted):
        parts = {}
        for row in trace(uninterrupted[0], "train"):
            parts.setdefault(row["stage"], set()).update(name for name in row if name.startswith("part/"))
        assert parts["warm_start"] == {"part/kd", "part/lm", "part/hidden", "part/layerwise"}
        assert parts["distill"] == {f"part/{name}" for name in EVERY_TERM}

    def test_adapters_that_fit_are_taken_over(self, tmp_path):
        """The second stage moves nothing, so that what it ends with is what it began with."""
        standing = "distill: {objective: {adapter_learning_rate: 1.0e-12, layerwise: {num_pairs: 3}}}}"
        first = (
            "stages={warm_start: {objective: {attention: {weight: 0}, contrastive: {weight: 0}, routing: {weight: 0}}},"
        )
        run = run_distillation(cross_config(f"{first} {standing}", max_steps=2), tmp_path / "run")
        before, after = (
            load_file(run.folder / "stages" / stage / "model" / "adapters.safetensors")
            for stage in ("warm_start", "distill")
        )
        torch.testing.assert_close(after["projector.weight"], before["projector.weight"], rtol=0, atol=1e-9)
        assert (after["layer_projectors.0.weight"] - before["layer_projectors.0.weight"]).norm() > 1.0  # 3 pairs, not 4
        assert {name.split(".")[0] for name in after} - {name.split(".")[0] for name in before} == {
            "router",
            "routing_projector",
        }


@pytest.fixture(scope="module")
def same_rows(tmp_path_factory):
    """The log of a run that is trained and evaluated on the same four rows, all in one batch."""
    overrides = ("data.train=${demo}/validation.jsonl", "data.train_rows=4", "evaluation.every_steps=1")
    return trace(
        run_distillation(cross_config(*overrides, max_steps=5), tmp_path_factory.mktemp("same") / "run").folder
    )


class TestWhatIsLogged:
    def test_weighted_parts_sum_to_the_total_in_training_and_evaluation(self, same_rows):
        config = cross_config().objective
        for row in same_rows:
            step = row["step"] - (row["kind"] == "train")  # a step's row is written when it is done
            factors = {name: weight.at(step, 5) for name, weight in config.weights.items()}
            factors["kd"] *= config.kd.temperature.at(step, 5) ** 2
            total = sum(factor * row[f"part/{name}"] for name, factor in factors.items() if factor)
            assert row["loss"] == pytest.approx(total, rel=1e-6)
            assert {name for name in row if name.startswith("part/")} == {
                f"part/{name}" for name, factor in factors.items() if factor
            }

    def test_evaluation_at_a_step_is_the_next_steps_training_loss_on_the_same_rows(self, same_rows):
        """Seed 002: the two had other weights and could not be compared."""
        evaluated = {row["step"]: row for row in same_rows if row["kind"] == "eval"}
        for row in (row for row in same_rows if row["kind"] == "train" and row["step"] > 1):
            before = evaluated[row["step"] - 1]
            for name in ("loss", *(name for name in row if name.startswith("part/"))):
                assert before[name] == pytest.approx(row[name], rel=1e-5), (name, row["step"])


class TestEvaluation:
    def test_the_teacher_answers_by_its_own_tokenizer(self, tmp_path):
        config = cross_config(
            "evaluation.teacher=true",
            "evaluation.max_new_tokens=48",
            "data.test_rows=8",
            objective={"kd": {"weight": 1.0}},
            max_steps=1,
        )
        found = run_distillation(config, tmp_path / "run").evaluations
        assert found["teacher"]["rouge_l"] > 50 > found["student"]["rouge_l"]


def read_text(tokenizer, row):
    """What a row's response says, as its own tokenizer decodes it."""
    ids = [index for index in row["input_ids"][row["prompt_length"] :] if index != tokenizer.eos_token_id]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class TestRollout:
    @pytest.mark.parametrize("mode", ["on_policy", "mixed"])
    def test_both_sides_read_the_same_text(self, tmp_path, mode):
        threshold = ("rollout.threshold=1.0", "rollout.capacity=4") if mode == "mixed" else ()
        seen, mix = [], Rollout.mix

        def watched(self, *args, **given):
            batches, figures = mix(self, *args, **given)
            seen.extend(batches)
            return batches, figures

        config = cross_config(f"rollout.mode={mode}", "rollout.guard=null", *threshold)
        with mock.patch.object(Rollout, "mix", watched):
            run_distillation(config, tmp_path / "run")
        own, theirs = tokenizer_of(META_SPACE), tokenizer_of(BYTES)
        texts = []
        for batch in seen:
            twin = teacher_view(batch)
            for index in range(len(batch["row_ids"])):
                rows = []
                for side in (batch, twin):
                    length = side["lengths"][index]
                    ids, units = (side[name][index, :length].tolist() for name in ("input_ids", "unit_ids"))
                    rows.append({"input_ids": ids, "prompt_length": side["prompt_lengths"][index], "units": units})
                assert read_text(own, rows[0]) == read_text(theirs, rows[1])
                assert max(rows[0]["units"]) == max(rows[1]["units"])
                texts.append(read_text(own, rows[0]))
        assert sum(bool(text) for text in texts) > len(texts) // 2

    def test_the_guard_scores_by_the_teachers_own_reading(self):
        pair = make_pair("a Qwen2-MoE teacher", crosses=True)
        rows = rows_of(pair.tokenizer, pair.teacher_tokenizer, "word")[:5]
        collate = DistillCollator(0, teacher_pad_token_id=0)
        found = teacher_scores(pair.teacher, collate, rows, batch_size=2)
        for row, score in zip(rows, found, strict=True):
            ids, prompt = torch.tensor(row["teacher"]["input_ids"]), row["teacher"]["prompt_length"]
            with torch.no_grad():
                logprobs = pair.teacher(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            each = [logprobs[place - 1, ids[place]].item() for place in range(prompt, len(ids))]
            assert score == pytest.approx(sum(each) / len(each), rel=1e-4)

    def test_what_the_student_wrote_is_no_label_and_is_compared(self):
        pair = make_pair("a Qwen2-MoE teacher", crosses=True)
        rows = [{**row, "is_gold": False} for row in rows_of(pair.tokenizer, pair.teacher_tokenizer, "word")[:3]]
        batch = DistillCollator(0, teacher_pad_token_id=0)(rows)
        model = pair.model({"kd": {"weight": 1.0}, "lm": {"weight": 1.0}, "span": {"weight": 1.0}})
        sums = run_objective(model, LiveTeacher(pair.teacher), batch, moment_of(batch))["sums"]
        assert sums["lm"] == 0.0
        assert sums["kd"] > 0.0
        assert sums["span"] > 0.0


class TestChatTemplates:
    def test_each_side_is_rendered_by_its_own(self, tmp_path):
        templates = {
            BYTES: "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ",
            META_SPACE: "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>",
        }
        tokenizers = {}
        for name, template in templates.items():
            tokenizers[name] = AutoTokenizer.from_pretrained(demo_folder() / name)
            tokenizers[name].chat_template = template
        config = cross_config("data.template=chat", "data.max_length=320", "data.max_prompt_length=256")
        encoded = RunRows(tokenizers[META_SPACE], tokenizers[BYTES]).encoded("train", config).dataset
        assert len(encoded) == 12
        for row in encoded:
            prompts = {
                name: tokenizers[name].decode(side["input_ids"][: side["prompt_length"]]).strip()
                for name, side in ((META_SPACE, row), (BYTES, row["teacher"]))
            }
            assert prompts[META_SPACE].startswith("<user>")
            assert prompts[META_SPACE].endswith("</><assistant>")
            assert prompts[BYTES].startswith("[user] ")
            assert prompts[BYTES].endswith("\n[assistant]")
            told = prompts[META_SPACE].removeprefix("<user>").removesuffix("</><assistant>")
            assert told == prompts[BYTES].removeprefix("[user] ").removesuffix("\n[assistant]")
            assert read_text(tokenizers[META_SPACE], row) == read_text(tokenizers[BYTES], row["teacher"])

    def test_rows_that_one_of_them_refuses_are_not_paired_with_others(self):
        picky = "{% for m in messages %}{% if '?' in m.content %}{{ raise_exception('no questions') }}{% endif %}"
        tokenizers = {name: AutoTokenizer.from_pretrained(demo_folder() / name) for name in (META_SPACE, BYTES)}
        tokenizers[META_SPACE].chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizers[BYTES].chat_template = picky + "{{ m.content }}{% endfor %}"
        config = cross_config("data.template=chat", "data.max_length=320", "data.max_prompt_length=256")
        with pytest.raises(UserError, match=r"do not accept the same rows of 'train' \(12 and 12\)"):
            RunRows(tokenizers[META_SPACE], tokenizers[BYTES]).encoded("train", config)


LATER = "{start: 0, end: 1, begin: 0.9}"


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                ("teacher.attention=sdpa", f"objective.attention.weight={LATER}"),
                r"moe_teacher returns no attention maps .* sdpa.*set teacher\.attention=eager",
            ),
            (
                ("student.attention=sdpa", f"objective.attention.weight={LATER}"),
                r"returns no attention maps .* sdpa.*student\.attention=eager",
            ),
            (
                (f"objective.attention={{weight: {LATER}, num_layers: 5}}",),
                r"attention\.num_layers is 5, and the shallower model has 4 layers: give 1 to 4",
            ),
            (
                (f"objective.layerwise={{weight: {LATER}, num_pairs: 5}}",),
                r"objective\.layerwise: num_pairs is 5; allowed: 1 to 4",
            ),
            (
                (f"objective.routing={{weight: {LATER}, num_experts: 9}}",),
                r"routing\.num_experts goes up to 9, and the teacher has 8 experts",
            ),
            (
                (f"objective.routing={{weight: {LATER}, layer: 4}}",),
                r"routing\.layer is 4; layers of the teacher with experts: 0, 1, 2, 3",
            ),
            (
                (f"objective.routing={{weight: {LATER}, layer: -5}}",),
                r"routing\.layer is -5; .* or -1 to -4 from the end",
            ),
            (
                ("teacher.path=${demo}/teacher", f"objective.routing.weight={LATER}"),
                r"routing needs an MoE teacher.*is of type 'llama'.*choose an MoE teacher",
            ),
            (
                (
                    "student.path=${demo}/student",
                    "student.tokenizer=${demo}/moe_teacher",
                    f"objective.span.weight={LATER}",
                ),
                r"objective\.span compares the spans of two tokenizers, and teacher and student have one",
            ),
        ],
        ids=lambda value: value[-1][:60] if isinstance(value, tuple) else "",
    )
    def test_what_cannot_work_ends_before_step_1(self, tmp_path, overrides, message):
        plain = {"kd": {"weight": 1.0}}
        with pytest.raises(UserError, match=message):
            run_distillation(cross_config(*overrides, objective=plain), tmp_path / "run")
        assert not (tmp_path / "run").exists(), "the next try would be told to resume it"

    def test_a_term_that_the_tokenizers_do_not_allow_leaves_no_folder(self, tmp_path):
        """The run had made its folder by then, and the next try was told to resume it."""
        one = ("student.path=${demo}/student", "student.tokenizer=${demo}/moe_teacher", "objective.span.weight=1")
        with pytest.raises(UserError, match=r"objective\.span compares the spans of two tokenizers"):
            run_distillation(cross_config(*one, objective={"kd": {"weight": 1.0}}), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_no_weight_at_all_is_refused_as_the_config_is_read(self):
        with pytest.raises(UserError, match="every term has the weight 0"):
            cross_config(objective={"kd": {"weight": 0}})

    def test_a_tokenizer_without_offsets_is_refused_by_name(self, tmp_path):
        slow = mock.PropertyMock(return_value=False)
        with (
            mock.patch.object(type(tokenizer_of(META_SPACE)), "is_fast", slow),
            pytest.raises(UserError, match=r"is a slow one and gives no offsets.*use its fast version"),
        ):
            run_distillation(cross_config(), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_uld_runs_where_nobody_knows_what_the_ids_stand_for(self, tmp_path):
        """Its own advice: a tokenizer that cannot be read is told to use uld."""
        unknown = mock.Mock(side_effect=UserError("what its tokens stand for is not known"))
        with mock.patch("kdkit.training.objective.across.byte_groups", unknown):
            uld = {"kd": {"weight": 1.0, "across": "uld"}, "lm": {"weight": 0.5}}
            run_distillation(cross_config(objective=uld, max_steps=1), tmp_path / "run")
            with pytest.raises(UserError, match="not known"):
                run_distillation(cross_config(objective={"kd": {"weight": 1.0}}), tmp_path / "other")


def test_controls_know_every_term_before_the_tokenizers_are_read():
    values = planned_values(cross_config())
    assert [name for name in values if name.endswith(".weight")] == [f"objective.{name}.weight" for name in EVERY_TERM]

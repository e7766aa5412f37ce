"""The plan of a run from two config.json: sizes, cards, what fits, how long, and what the command says."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kdkit.cli import cli
from kdkit.config import load_config
from kdkit.errors import RunFailed, UserError
from kdkit.memory import cards
from kdkit.memory.cards import CARDS, card_here, card_of_budget, find_card
from kdkit.memory.fit import fit_run
from kdkit.memory.hours import looked_up_speed, measured_speed
from kdkit.memory.planning import Pair, plan_run
from kdkit.memory.shapes import shape_folder
from kdkit.memory.sizes import read_sizes
from kdkit.runtime import FULL_FRACTION, GIB

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
FAMILIES = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gemma": SMALL,
    "gemma2": SMALL,
    "gpt2": GPT2,
    "gpt_neox": {name: value for name, value in SMALL.items() if name != "num_key_value_heads"},
    "mixtral": SMALL | {"num_local_experts": 4},
    "qwen2_moe": SMALL | EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": SMALL | EXPERTS,
    "olmo2": SMALL,  # not among those whose keys are known
    "bloom": {"vocab_size": 512, "hidden_size": 64, "n_layer": 3, "n_head": 4},
}
SMOL = SMALL | {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
MOE = SMALL | {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
}


def write_model(folder, family: str, **sizes):
    """A folder with a config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    return folder


@pytest.fixture
def pair_config(tmp_path):
    """SmolLM-135M under a 1 B MoE, eight rows of 512 tokens, four times a step."""
    teacher, student = (
        write_model(tmp_path / "moe", "qwen3_moe", **MOE),
        write_model(tmp_path / "smol", "llama", **SMOL),
    )
    return {
        "preset": "fkl-dtw",
        "teacher": {"path": str(teacher)},
        "student": {"path": str(student)},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "optim": {"batch_size": 8, "accumulation": 4, "max_steps": 2000},
    }


class TestReadSizes:
    @pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"num_hidden_layers": 5}])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_parameters_are_those_of_the_model(self, tmp_path, family, change):
        config = CONFIG_MAPPING[family](**{**FAMILIES[family], **change})
        config.save_pretrained(tmp_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        sizes = read_sizes(str(tmp_path))
        assert sizes.num_params == sum(parameter.numel() for parameter in model.parameters())
        assert sizes.num_layers == config.num_hidden_layers
        assert sizes.head_params == (0 if config.tie_word_embeddings else sizes.vocab_size * sizes.hidden)

    def test_a_file_of_few_keys_has_the_familys_defaults(self, tmp_path):
        """GPT-2's own config.json says n_embd, n_head, n_layer and no inner width."""
        folder = write_model(tmp_path, "gpt2", n_embd=768, n_head=12, n_layer=12, n_positions=1024, vocab_size=50257)
        assert read_sizes(str(folder)).num_params == 124_439_808  # GPT-2's published size

    def test_published_sizes(self, tmp_path):
        assert read_sizes(str(write_model(tmp_path / "smol", "llama", **SMOL))).num_params == 134_515_008

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "has no config.json"),
            ("{", "no config.json that can be read"),
            ("{}", "says no model_type"),
            ('{"model_type": "llama", "vocab_size": 5}', "says nothing of 'hidden_size'"),
            ('{"model_type": "nonsense"}', "is not understood"),
            (
                '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}',
                "heads is 0; a whole",
            ),
            ('{"model_type": "llama", "hidden_size": "x", "num_attention_heads": 4}', "hidden_size is 'x'; a whole"),
        ],
    )
    def test_what_is_no_config_is_named(self, tmp_path, content, message):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_sizes(str(tmp_path))

    def test_a_hub_name_that_is_not_here_says_what_to_do(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UserError, match=r"put it into a folder"):
            read_sizes("nobody/nothing-at-all")


PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "smollm-135m": 134_515_008,
}
"""Parameters of each, as its publisher's weights have them."""


class TestShapeFolder:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_has_the_published_number_of_parameters(self, name):
        assert read_sizes(str(shape_folder(name))).num_params == PUBLISHED[name]

    def test_the_mixture_has_the_sizes_that_its_runs_report(self):
        sizes = read_sizes(str(shape_folder("huihui-moe-1b")))
        assert (sizes.num_layers, sizes.hidden, sizes.vocab_size, sizes.num_experts) == (24, 1024, 151_936, 8)
        assert round(sizes.num_params / 1e9, 1) == 1.1

    def test_holds_nothing_but_a_config(self):
        names = {*PUBLISHED, "huihui-moe-1b"}
        assert {folder.name for folder in shape_folder("gpt2").parent.iterdir() if folder.is_dir()} == names
        assert all([file.name for file in shape_folder(name).iterdir()] == ["config.json"] for name in names)

    def test_an_unknown_one_has_its_nearest_names(self):
        with pytest.raises(UserError, match=r"did you mean gpt2-xl or gpt2\? There are gpt2, gpt2-xl, huihui-moe-1b"):
            shape_folder("gpt2xl")


class TestCards:
    @pytest.mark.parametrize(
        ("name", "known"), [("T4", "t4"), ("Tesla T4", "t4"), ("t4-x2", "t4x2"), ("A100-40", "a100-40")]
    )
    def test_found_however_it_is_written(self, name, known):
        assert find_card(name) is CARDS[known]

    def test_an_unknown_one_has_its_nearest_names(self):
        with pytest.raises(UserError, match=r"did you mean .*rtx3090.*--budget-gib"):
            find_card("rtx3091")

    @pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf"), 1e300])
    def test_a_budget_is_above_0(self, gib):
        with pytest.raises(UserError, match="above 0"):
            card_of_budget(gib)

    @pytest.mark.parametrize(
        ("printed", "memory_gib", "num_cards", "like"),
        [
            ("Tesla T4, 15360\nTesla T4, 15360\n", 15.0, 2, "t4"),
            ("NVIDIA GeForce RTX 4090, 24564\n", 23.99, 1, "rtx4090"),
            ("NVIDIA Something New, 8192\n", 8.0, 1, "t4"),
        ],
    )
    def test_this_machines_own_is_what_its_driver_says(self, monkeypatch, printed, memory_gib, num_cards, like):
        answer = subprocess.CompletedProcess([], 0, stdout=printed, stderr="")
        monkeypatch.setattr(cards.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
        monkeypatch.setattr(cards.subprocess, "run", lambda *_, **__: answer)
        found = card_here()
        assert found is not None
        assert found.memory_gib == pytest.approx(memory_gib, abs=0.01)
        assert (found.num_cards, found.capability) == (num_cards, CARDS[like].capability)

    def test_a_driver_that_does_not_answer_is_no_card(self, monkeypatch):
        monkeypatch.setattr(cards.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
        failed = subprocess.CompletedProcess([], 9, stdout="NVIDIA-SMI has failed", stderr="")
        monkeypatch.setattr(cards.subprocess, "run", lambda *_, **__: failed)
        assert card_here() is None


class TestPlanRun:
    def test_weights_and_states_are_arithmetic(self, pair_config):
        config = load_config(pair_config)
        plan = plan_run(config, find_card("t4")).worst
        student = 134_515_008
        adapters = 576 * 1024 + 1024
        assert plan.parts["student weights"] == 4 * student
        assert plan.parts["optimizer states"] == 8 * (student + adapters)
        assert plan.parts["teacher weights"] == 2 * Pair.of(config).teacher.num_params

    @pytest.mark.parametrize(
        ("field", "part", "is_less"),
        [
            ("student.gradient_checkpointing=true", "student's activations", True),
            ("objective.chunk_tokens=64", "divergence", True),
            ("optim.optimizer=adamw_8bit", "optimizer states", True),
            ("teacher.quantization=nf4", "teacher weights", True),
            ("teacher.dtype=float32", "teacher weights", False),
            ("data.max_length=1024", "student's activations", False),
            ("optim.batch_size=16", "student's activations", False),
            ("student.attention=eager", "student's activations", False),
            ("optim.precision=float32", "student's activations", False),
        ],
    )
    def test_each_setting_moves_its_part(self, pair_config, field, part, is_less):
        before = plan_run(load_config(pair_config), find_card("t4")).worst.phases["student"]
        after = plan_run(load_config(pair_config, [field]), find_card("t4")).worst.phases["student"]
        assert (after[part] < before[part]) is is_less
        assert after[part] != before[part]

    def test_a_teacher_on_its_own_card_is_not_on_the_students(self, pair_config):
        plan = plan_run(load_config(pair_config, ["teacher.device=cuda:1"]), find_card("t4x2")).worst
        assert all("teacher weights" not in parts for parts in plan.phases.values())
        assert all("teacher weights" in parts for parts in plan.beside.values())
        assert plan.beside_bytes > 0

    def test_weights_that_a_card_cannot_compute_with_are_refused(self, pair_config):
        config = load_config(pair_config, ["teacher.quantization=int8"])
        assert plan_run(config, find_card("t4")).fits
        with pytest.raises(UserError, match=r"int8 needs compute capability 7\.5, and the P100 16 GB has 6\.0"):
            plan_run(config, find_card("p100"))

    def test_two_cards_take_one_model_each_by_themselves(self, pair_config):
        plan = plan_run(load_config(pair_config), find_card("t4x2")).worst
        assert set(plan.beside) == {"teacher", "evaluation", "teacher's answers"}

    def test_an_offloaded_teacher_is_a_layer_on_the_card(self, pair_config):
        whole, layer = (
            plan_run(load_config(pair_config, changes), find_card("t4")).worst.phases["teacher"]["teacher weights"]
            for changes in ([], ["teacher.device=offload"])
        )
        assert layer < 0.4 * whole  # stacked experts leave the card too; embeddings and head stay
        assert whole - layer > 0.9 * 23 / 24 * 24 * 1024 * 3 * 1024 * 2  # products of 23 layers, stacked experts stay

    def test_lora_trains_and_keeps_states_of_its_layers_alone(self, pair_config):
        plan = plan_run(load_config(pair_config, ["student.lora={rank: 8}"]), find_card("t4")).worst.phases["student"]
        layer = 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
        trained = 30 * layer + 576 * 1024 + 1024
        assert plan["optimizer states"] == 8 * trained
        assert plan["student weights"] == 2 * 134_515_008 + 4 * 30 * layer
        assert "half-precision copies" not in plan

    def test_a_cached_teacher_leaves_what_it_said(self, pair_config, tmp_path):
        student = write_model(tmp_path / "same", "llama", **SMOL | {"vocab_size": 151_936})
        settings = pair_config | {"student": {"path": str(student)}}
        live, cached = (
            plan_run(load_config(settings, changes), find_card("t4")).worst
            for changes in ([], ["teacher.cache=somewhere"])
        )
        assert "teacher" not in cached.phases
        assert cached.peak_bytes < live.peak_bytes - 1.9 * GIB

    def test_the_students_own_text_is_written_for_all_prompts_of_a_step(self, pair_config):
        rollout = {"mode": "on_policy", "max_new_tokens": 128, "collapse": None}
        settings = pair_config | {"rollout": rollout, "data": {**pair_config["data"], "max_prompt_length": 128}}
        caches = [
            plan_run(load_config(settings, changes), find_card("t4")).worst.phases["rollout"]["KV cache"]
            for changes in ([], ["rollout.batch_size=8"], ["rollout.num_beams=2"])
        ]
        per_row = 2 * 30 * 192 * 256 * 2  # keys and values, layers, width, tokens, half precision
        assert caches == [32 * per_row, 8 * per_row, 64 * per_row]

    @pytest.mark.parametrize("device", ["cuda:1", "cuda:7"])
    def test_a_card_that_is_not_there_is_refused(self, pair_config, device):
        with pytest.raises(UserError, match=r"T4 is 1 card\(s\)"):
            plan_run(load_config(pair_config, [f"teacher.device={device}"]), find_card("t4"))

    def test_a_teacher_on_the_cpu_is_on_no_card(self, pair_config):
        plan = plan_run(load_config(pair_config, ["teacher.device=cpu"]), find_card("t4")).worst
        assert plan.beside == {}
        assert all("teacher weights" not in parts for parts in plan.phases.values())

    def test_sft_holds_no_teacher(self, pair_config):
        settings = pair_config | {"preset": "sft"}
        plan = plan_run(load_config(settings), find_card("t4")).worst
        assert "teacher" not in plan.phases
        assert all("teacher" not in part for parts in plan.phases.values() for part in parts)

    def test_the_stage_that_needs_most_is_the_one_that_is_shown(self, pair_config):
        long = {"optim": {"batch_size": 16, "max_steps": 10}}
        settings = pair_config | {"stages": {"warm": {"optim": {"max_steps": 30}}, "long": long}}
        plan = plan_run(load_config(settings), find_card("t4"))
        assert plan.stage == "long"
        assert plan.steps == {"warm": 30, "long": 10}

    def test_stacked_experts_are_said_not_to_be_packed(self, pair_config):
        (note,) = plan_run(load_config(pair_config, ["teacher.quantization=nf4"]), find_card("t4")).worst.notes
        assert "57% of the teacher are stacked experts" in note  # 24 layers x 8 experts x 3 x 1024 x 1024 of 1.066 B

    def test_what_comparing_few_ids_saves_is_said_and_is_little(self, pair_config):
        """One tensor (128, 49,152) in float32 is 24 MiB, cut to blocks of 16."""
        dense, sparse = (
            plan_run(
                load_config(pair_config, [f"objective.kd.top_k={k}", "objective.chunk_tokens=128"]), find_card("t4")
            )
            for k in ("null", 64)
        )
        (note,) = sparse.worst.notes
        assert note.startswith("top_k=64 saves at most 16 MiB")
        assert dense.worst.notes == ()

    def test_reads_no_weights_and_imports_no_torch(self, pair_config, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(pair_config))
        code = (
            "import sys; from kdkit.config import load_config; from kdkit.memory.planning import plan_run; "
            f"from kdkit.memory.cards import find_card; plan_run(load_config({str(file)!r}), find_card('t4')); "
            "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestFitRun:
    def test_what_fits_as_it_is_only_gets_faster(self, pair_config):
        config, card = load_config(pair_config), find_card("t4")
        given, fit = plan_run(config, card), fit_run(config, card)
        assert fit.given_up == ()
        assert fit.plan.speeds["distill"].step_seconds < given.speeds["distill"].step_seconds
        assert fit.plan.worst.used_fraction <= FULL_FRACTION
        rows = fit.changes.get("optim.batch_size", 8) * fit.changes.get("optim.accumulation", 4)
        assert rows == 32, "a step trains on the same rows"

    @pytest.mark.parametrize("gib", [5.0, 6.0, 8.0, 12.0])
    def test_the_patch_laid_over_the_config_is_the_plan_that_fits(self, pair_config, gib):
        config, card = load_config(pair_config), card_of_budget(gib)
        fit = fit_run(config, card)
        settings = [f"{field}={json.dumps(value)}" for field, value in fit.changes.items()]
        again = plan_run(load_config(pair_config, settings), card)
        assert again.worst.phases == fit.plan.worst.phases
        assert again.worst.used_fraction <= FULL_FRACTION

    def test_less_room_gives_up_more_and_never_less(self, pair_config):
        config = load_config(pair_config)
        given_up = [len(fit_run(config, card_of_budget(gib)).given_up) for gib in (16, 8, 6, 5, 4.9)]
        assert given_up == sorted(given_up)
        assert given_up[0] == 0
        assert given_up[-1] > 0

    def test_a_budget_nothing_fits_is_told_the_smallest_that_would(self, pair_config):
        config = load_config(pair_config)
        with pytest.raises(UserError, match=r"smallest budget that something would fit is (?P<gib>[\d.]+) GiB") as told:
            fit_run(config, card_of_budget(1))
        smallest = float(str(told.value).partition("would fit is ")[2].partition(" GiB")[0])
        fit_run(config, card_of_budget(smallest + 0.1))
        with pytest.raises(UserError, match="nothing fits"):
            fit_run(config, card_of_budget(smallest - 0.1))

    def test_two_cards_take_a_teacher_that_one_cannot(self, pair_config, tmp_path):
        """A 6 B teacher in half precision is 12 GiB."""
        teacher = write_model(tmp_path / "big", "llama", **SMALL | {
            "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 30,
            "num_attention_heads": 32, "num_key_value_heads": 32,
        })  # fmt: skip
        settings = pair_config | {"teacher": {"path": str(teacher)}}
        both, one = (fit_run(load_config(settings), find_card(name)) for name in ("t4x2", "t4"))
        assert both.given_up == ()
        assert one.given_up != ()

    def test_a_cache_is_offered_where_one_tokenizer_serves_both(self, pair_config, tmp_path):
        student = write_model(tmp_path / "same", "llama", **SMOL | {"vocab_size": 151_936})
        small = card_of_budget(6)
        (word,) = fit_run(load_config(pair_config | {"student": {"path": str(student)}}), small).given_up
        assert "kdkit cache" in word
        assert not any("kdkit cache" in word for word in fit_run(load_config(pair_config), small).given_up)

    def test_a_stage_that_splits_its_rows_itself_keeps_its_rows_a_step(self, pair_config):
        own = {"optim": {"batch_size": 2}}
        settings = pair_config | {"stages": {"warm": {}, "distill": own}}
        fit = fit_run(load_config(settings), card_of_budget(12))
        assert not {"optim.batch_size", "optim.accumulation"} & set(fit.changes)

    def test_fewer_prompts_are_answered_together_before_anything_is_given_up(self, pair_config):
        rollout = {"mode": "on_policy", "max_new_tokens": 256, "num_beams": 32, "collapse": None}
        settings = pair_config | {"rollout": rollout}
        fit = fit_run(load_config(settings), find_card("t4"))
        assert fit.given_up == ()
        assert fit.changes["rollout.batch_size"] < 32

    def test_the_smallest_budget_that_is_told_does_fit(self, pair_config):
        config = load_config(pair_config)
        with pytest.raises(UserError, match="would fit is") as told:
            fit_run(config, card_of_budget(2))
        fit_run(config, card_of_budget(float(str(told.value).partition("would fit is ")[2].partition(" GiB")[0])))

    def test_what_a_stage_says_of_a_field_gives_way(self, pair_config):
        settings = pair_config | {"stages": {"distill": {"objective": {"chunk_tokens": 32}}}}
        fit = fit_run(load_config(settings), card_of_budget(8))
        assert fit.plan.worst.used_fraction <= FULL_FRACTION
        again = load_config(settings, [f"{field}={json.dumps(value)}" for field, value in fit.changes.items()])
        assert plan_run(again, card_of_budget(8)).worst.phases == fit.plan.worst.phases


class TestHours:
    def test_more_work_takes_longer(self, pair_config):
        config = load_config(pair_config)
        pair, card = Pair.of(config), find_card("t4")

        def seconds(*changes: str) -> float:
            settings = load_config(pair_config, changes)
            return looked_up_speed(settings, teacher=pair.teacher, student=pair.student, card=card).step_seconds

        assert seconds() < seconds("student.gradient_checkpointing=true") < 1.4 * seconds()
        assert seconds() < seconds("data.max_length=1024")
        assert seconds("optim.batch_size=32", "optim.accumulation=1") < seconds()

    def test_of_a_run_that_was_made(self, tmp_path):
        rows = [{"kind": "train", "stage": "a", "step": 10 * n, "seconds": 25.0} for n in range(1, 6)]
        rows[2]["seconds"] = 400.0  # a pause
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert measured_speed(tmp_path).step_seconds == 2.5

    def test_a_folder_without_a_run_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"no metrics\.jsonl"):
            measured_speed(tmp_path)
        (tmp_path / "metrics.jsonl").write_text("")
        with pytest.raises(UserError, match="two of one stage"):
            measured_speed(tmp_path)

    @pytest.mark.parametrize("content", ["{", '{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}', "[1]"])
    def test_a_log_that_is_none_is_named(self, tmp_path, content):
        (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(UserError, match="is no log of a run"):
            measured_speed(tmp_path)


class TestCommand:
    @pytest.fixture
    def file(self, pair_config, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(pair_config))
        return str(path)

    def invoke(self, *arguments: str):
        return CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=True)

    def test_says_whether_it_fits_and_how_long(self, file):
        result = self.invoke(file, "--gpu", "t4")
        assert result.exit_code == 0
        assert "fits: " in result.stdout
        assert "of 14.6 GiB on the T4" in result.stdout
        assert "% of a week's 30 h" in result.stdout

    def test_what_does_not_fit_ends_with_1(self, file):
        result = self.invoke(file, "--budget-gib", "5")
        assert isinstance(result.exception, RunFailed)
        assert "does not fit" in result.stdout

    def test_json_adds_up(self, file):
        answer = json.loads(self.invoke(file, "--gpu", "t4", "--json").stdout)
        phases = answer["stages"]["distill"]["phases"]
        assert answer["peak_bytes"] == max(sum(parts.values()) for parts in phases.values())
        assert answer["used_fraction"] == answer["peak_bytes"] / round(14.6 * GIB)

    def test_fit_writes_a_patch_that_a_config_takes(self, file, pair_config, tmp_path):
        patch = tmp_path / "new" / "patch.yaml"
        result = self.invoke(file, "--budget-gib", "5", "--fit", "--output", str(patch))
        assert result.exit_code == 0
        tree = yaml.safe_load(patch.read_text())
        assert f"--set optim.batch_size={tree['optim']['batch_size']}" in result.stdout

    @pytest.mark.parametrize("ending", ["png", "svg"])
    def test_draws_the_bars(self, file, tmp_path, ending):
        figure = tmp_path / f"plan.{ending}"
        assert self.invoke(file, "--gpu", "t4", "--figure", str(figure)).exit_code == 0
        assert figure.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--gpu", "t4", "--budget-gib", "4"], "either --gpu or --budget-gib"),
            (["--output", "x.yaml"], "add --fit"),
            (["--gpu", "t44"], "did you mean"),
            (["--figure", "plan.doc"], r"ends in \.png or \.svg"),
            (["--measured", "nowhere"], r"no metrics\.jsonl"),
        ],
    )
    def test_bad_options_are_one_message(self, file, arguments, message):
        result = self.invoke(file, *arguments)
        assert result.exit_code != 0
        said = result.stderr + str(result.exception)
        assert re.search(message, said)

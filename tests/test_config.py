import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kdkit.config
from kdkit.config import DistillConfig, demo_folder, dump_config, list_presets, load_config
from kdkit.config.objective import LOSS_ARGUMENTS
from kdkit.config.reading import part_in, stage_config
from kdkit.errors import UserError
from kdkit.schedules import Schedule

BASE = {
    "teacher": {"path": "big"},
    "student": {"path": "small"},
    "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
}


def load(*overrides, **fields):
    return load_config(BASE | fields, overrides)


class TestLoadConfig:
    def test_reads_a_yaml_file(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(BASE | {"optim": {"learning_rate": "1e-3"}}))
        assert load_config(file).optim.learning_rate == 1e-3

    def test_overrides_lie_over_the_file_and_the_file_over_its_preset(self):
        config = load("objective.kd.alpha=0.3", preset="srkl-dtw", objective={"dtw": {"band": 8}})
        assert (config.objective.kd.loss, config.objective.kd.alpha) == ("skew_reverse_kl", 0.3)
        assert (config.objective.dtw.band, config.objective.dtw.weight.start) == (8, 1.0)

    def test_a_preset_may_be_set_on_the_command_line(self):
        assert load("preset=jsd").objective.kd.loss == "jsd"

    def test_a_schedule_is_replaced_as_a_whole(self):
        first = {"start": 2.0, "end": 1.5, "begin": 0.2}
        config = load("objective.kd.temperature={start: 3, end: 1}", objective={"kd": {"temperature": first}})
        assert config.objective.kd.temperature.begin == 0.0

    def test_demo_stands_for_the_embedded_folder(self):
        assert load("data.train=${demo}/train.jsonl").data.train == f"{demo_folder()}/train.jsonl"

    def test_the_mapping_given_is_left_alone(self):
        given = {**BASE, "objective": {"kd": {"weight": 1}}}
        load_config(given, ["objective.kd.weight=2"])
        assert given["objective"] == {"kd": {"weight": 1}}

    @pytest.mark.parametrize("preset", [name for name in list_presets() if not name.startswith("demo")])
    def test_every_preset_makes_a_config(self, preset):
        config = load(f"preset={preset}")
        assert all(stage_config(config, name) for name in config.stages)

    @pytest.mark.parametrize("preset", ["srkl", "rkl", "tvd", "abkd", "srkl-dtw"])
    def test_losses_that_are_poor_from_a_random_start_warm_up_on_labels_alone(self, preset):
        objective = stage_config(load(f"preset={preset}"), "warm_start").objective
        assert (objective.kd.weight.largest, objective.dtw.weight.largest) == (0, 0)
        assert objective.lm.weight.smallest == 1

    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("objective.kd.los=jsd", ["objective.kd.los: no such field", "did you mean loss?"]),
            ("objective.kd.loss=forwad_kl", ["objective.kd.loss", "'forward_kl'", "'forwad_kl'"]),
            ("optim.learning_rate=-1", ["optim.learning_rate", "greater than 0", "-1"]),
            ("optim.batch_size=many", ["optim.batch_size", "integer", "'many'"]),
            ("objective.kd.beta=0.5", ["forward_kl takes no beta", "jsd, alpha_beta"]),
            ("objective.kd={loss: jsd, beta: 1.5}", ["beta of jsd is 1.5", "above 0 and below 1"]),
            ("objective.kd={loss: skew_reverse_kl, alpha: 1}", ["alpha of skew_reverse_kl is 1"]),
            ("objective.kd={loss: alpha_beta, alpha: 0.005, beta: 0.5}", ["alpha of alpha_beta is 0.005"]),
            ("optim.epochs=.inf", ["optim.epochs", "finite"]),
            ("objective.kd.weight=0", ["every term has the weight 0"]),
            ("objective.dtw.gamma=0", ["objective.dtw.gamma", "above 0"]),
            ("data.max_prompt_length=600", ["max_prompt_length (600)", "max_length (512)"]),
            ("stages.distill.teacher.path=x", ["stages.distill.teacher", "belongs to the whole run"]),
            ("stages.distill.optim.max_step=1", ["stages.distill.optim.max_step", "did you mean max_steps?"]),
            ("preset=srlk", ["'srlk'", "did you mean srkl"]),
            ("objective.kd.weight", ["field.path=value"]),
            ("objective.kd.weight={", ["not readable as YAML"]),
        ],
    )
    def test_what_is_wrong_is_named_with_what_is_allowed(self, override, parts):
        with pytest.raises(UserError) as caught:
            load(override)
        assert [part for part in parts if part not in str(caught.value)] == []

    def test_all_faults_come_in_one_message(self):
        with pytest.raises(UserError, match=r"(?s)learning_rate.*batch_size"):
            load("optim.learning_rate=0", "optim.batch_size=0")

    def test_required_fields_are_named(self):
        with pytest.raises(UserError, match=r"teacher: required, not given"):
            load_config({"student": {"path": "x"}})

    def test_neither_file_nor_preset(self):
        with pytest.raises(UserError, match=r"no config file and no preset is called 'srkl-dwt'.*srkl-dtw"):
            load_config("srkl-dwt")

    @pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
    def test_a_file_that_is_no_mapping(self, tmp_path, text):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=r"run\.yaml"):
            load_config(file)


class TestRanges:
    """What the config lets through, the loss takes: a fault must not wait until the models are loaded."""

    @pytest.mark.parametrize(
        ("loss", "own"),
        [
            ("jsd", {"beta": 0.01}),
            ("jsd", {"beta": 0.99}),
            ("skew_forward_kl", {"alpha": 0.0}),
            ("skew_reverse_kl", {"alpha": 0.99}),
            ("alpha_beta", {"alpha": 0.0, "beta": 1.0}),
            ("alpha_beta", {"alpha": 0.5, "beta": -0.5}),
            ("alpha_beta", {"alpha": 1.9, "beta": -1.0}),
        ],
    )
    def test_the_ends_of_the_allowed_range_are_finite_losses(self, loss, own):
        import torch

        from kdkit.losses import LOSSES

        config = load(objective={"kd": {"loss": loss, **own}}).objective.kd
        logprobs = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
        assert torch.isfinite(LOSSES[loss](*logprobs, **config.loss_arguments)).all()


class TestStageConfig:
    def test_lays_the_stage_over_the_base(self):
        config = load(stages={"warm": {"optim": {"max_steps": 5}}, "rest": {}}, optim={"max_steps": 9})
        assert [stage_config(config, name).optim.max_steps for name in config.stages] == [5, 9]


class TestDumpConfig:
    @pytest.mark.parametrize("preset", ["srkl-dtw", "sft"])
    def test_reads_back_equal(self, preset):
        config = load(f"preset={preset}", "objective.kd.temperature={start: 2, end: 1.5}")
        assert load_config(yaml.safe_load(dump_config(config))) == config


def test_every_field_has_one_line_of_documentation():
    def walk(model):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields") and inner.__name__ != "Schedule":
                yield from walk(inner)
            elif not field.description:
                yield f"{model.__name__}.{name}"

    assert list(walk(DistillConfig)) == []


def test_losses_and_their_arguments_are_those_of_the_library():
    import inspect
    from typing import get_args

    from kdkit.config.objective import LossName
    from kdkit.losses import LOSSES

    assert set(get_args(LossName)) == set(LOSSES)
    for name, loss in LOSSES.items():
        own = {p.name for p in inspect.signature(loss).parameters.values() if p.kind == p.KEYWORD_ONLY}
        assert own == set(LOSS_ARGUMENTS.get(name, {})), name


def test_reading_a_config_needs_no_torch():
    code = "import sys, kdkit.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestPresetsReadme:
    text = (Path(kdkit.config.__file__).parents[1] / "presets" / "README.md").read_text(encoding="utf-8")

    def test_every_field_that_a_flag_maps_to_exists(self):
        mapped = re.findall(r"^\| `--[^|]*\| `([a-z_.]+)` \|", self.text, flags=re.MULTILINE)
        assert len(mapped) > 35
        known = set()

        def walk(model, above=""):
            for name, field in model.model_fields.items():
                known.add(above + name)
                inner = part_in(field.annotation)
                if inner is not None and inner is not Schedule:
                    walk(inner, f"{above}{name}.")

        walk(DistillConfig)
        assert sorted(set(mapped) - known - {"preset"}) == []

    def test_every_preset_is_listed(self):
        assert [name for name in list_presets() if f"`{name}`" not in self.text] == []


class TestTeacherDevice:
    @pytest.mark.parametrize("device", ["auto", "cpu", "offload", "cuda", "cuda:1"])
    def test_what_there_can_be_is_taken(self, device):
        assert load_config("demo", ["preset=[demo, fkl]", f"teacher.device={device}"]).teacher.device == device

    @pytest.mark.parametrize("device", ["foo", "cuda:", "gpu", "cuda:x"])
    def test_anything_else_is_refused_with_what_is_allowed(self, device):
        with pytest.raises(UserError, match=r"teacher\.device: allowed: auto, cpu, offload, cuda"):
            load_config("demo", ["preset=[demo, fkl]", f"teacher.device='{device}'"])


class TestStagesOfPresets:
    """A file's stages over those of a preset."""

    @pytest.mark.parametrize(
        ("above", "order"),
        [
            ("distill", ["warm_start", "distill"]),
            ("first, distill", ["warm_start", "first", "distill"]),
            ("first, warm_start", ["first", "warm_start", "distill"]),
            ("distill, last", ["warm_start", "distill", "last"]),
        ],
    )
    def test_a_new_one_stands_ahead_of_the_one_it_is_written_ahead_of(self, above: str, order: list[str]) -> None:
        stages = {name: {} for name in above.split(", ")}
        assert list(load_config({"preset": ["demo", "srkl"], "stages": stages}).stages) == order

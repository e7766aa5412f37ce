"""`accelerate launch -m kdkit distill`, and the files for it that come with kdkit."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny import tiny_config

from kdkit.config import dump_config, list_launch_configs
from kdkit.training.arguments import training_arguments

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(folder, config, *options):
    """Run a config in two processes, as a person would; the launcher's name for several, gloo where there is no GPU."""
    (folder / "run.yaml").write_text(dump_config(config))
    alone = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0", *options]
    command = [*LAUNCH, *alone, "--dynamo_backend", "no", "-m", "kdkit", "distill", "run.yaml", "--output", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, "--json"], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


class TestLaunchConfigs:
    @pytest.mark.parametrize("name", ["2-nodes", "a10x4", "t4x2"])
    def test_each_is_read_by_accelerate_and_printed_whole(self, kdkit, tmp_path, name):
        code, text, _ = kdkit("launch-config", name)
        assert code == 0
        (tmp_path / "file.yaml").write_text(text)
        read = load_config_from_file(str(tmp_path / "file.yaml"))
        known = launch_command_parser().parse_args(["--config_file", str(tmp_path / "file.yaml"), "train.py"])
        assert read.num_processes == {"2-nodes": 2, "a10x4": 4, "t4x2": 2}[name]
        sharding = yaml.safe_load(text).get("fsdp_config", {})
        assert all(option in vars(known) for option in sharding)  # accelerate itself lets unknown ones pass
        assert name in kdkit("launch-config")[1].split()

    def test_an_unknown_name_is_refused_with_the_nearest(self, kdkit):
        code, _, said = kdkit("launch-config", "t4-x2")
        assert code == 2
        assert "did you mean t4x2" in said.lower()
        assert all(name in said for name in list_launch_configs())


class TestPrecision:
    @pytest.mark.parametrize(
        ("told", "precision", "taken"),
        [("fp16", "float32", "no"), ("no", "bfloat16", "bf16"), ("bf16", "bfloat16", "bf16")],
    )
    def test_the_config_decides_and_says_so(self, tiny_pair, tmp_path, monkeypatch, capsys, told, precision, taken):
        """With precision float32, the Trainer took what the launcher's file asked for, and the log said float32."""
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        arguments = training_arguments(tiny_config(tiny_pair), tmp_path, num_steps=1, precision=precision, use_cpu=True)
        assert arguments.mixed_precision == taken
        is_overruled = told not in ("no", taken)
        assert ("optim.precision decides, and takes float32" in capsys.readouterr().err) == is_overruled


class TestTwoProcesses:
    @pytest.mark.slow
    def test_make_one_run_with_one_writer_and_go_on_only_as_two(self, tiny_pair, tmp_path, kdkit):
        config = tiny_config(tiny_pair, "evaluation.generate_rows=5", batch_size=4, max_steps=2)
        done = launch(tmp_path, config, "--mixed_precision", "fp16")
        assert done.returncode == 0, done.stderr[-4000:]
        assert "optim.precision decides, and takes float32" in done.stderr
        printed = json.loads(done.stdout)  # one process prints, or this would be no JSON
        assert set(printed["evaluations"]) == {"student"}
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("eval", 2)]
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["num_processes"] == 2
        code, _, said = kdkit("distill", tmp_path / "run.yaml", "--output", tmp_path / "run", "--resume")
        assert code == 2
        assert "began with num_processes 2, and here it is 1" in said

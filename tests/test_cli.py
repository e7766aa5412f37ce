"""Commands as a user types them: what they print, what they leave, and how they refuse."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import make_pair, tiny_config
from transformers import GPT2Config, GPT2LMHeadModel

from kdkit.config import demo_folder

SHARED_ROWS = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def write_config(folder, config):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return file


class TestDistill:
    def test_leaves_a_student_figures_and_a_report_and_prints_json_alone_on_stdout(self, kdkit, pair, tmp_path):
        config = write_config(tmp_path, tiny_config(pair, "evaluation.teacher=true"))
        code, out, err = kdkit("distill", config, "--output", tmp_path / "run", "--json", "--set", "optim.max_steps=2")
        assert code == 0, err
        printed = json.loads(out)
        assert set(printed["evaluations"]) == {"student", "teacher"}
        assert {"rouge_l", "exact_match", "perplexity"} <= set(printed["evaluations"]["student"])
        assert "2 optimizer steps" in err
        assert "sha256" in err
        names = {p.name for p in (tmp_path / "run").iterdir()}
        assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "model", "evaluation.json", "report.html"}
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optim"]["max_steps"] == 2

    def test_a_second_run_into_the_same_folder_is_refused_and_nothing_lost(self, kdkit, pair, tmp_path):
        config = write_config(tmp_path, tiny_config(pair, max_steps=1))
        assert kdkit("distill", config, "--output", tmp_path / "run")[0] == 0
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
        code, out, err = kdkit("distill", config, "--output", tmp_path / "run")
        assert (code, out) == (2, "")
        assert "add --resume to continue the run in it, or give another folder" in err
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("data.train=missing.jsonl", "missing.jsonl"),
            ("data.validation={broken}", "line 2"),
            ("data.validation={empty}", "empty"),
            ("data.train={unanswered}", "no usable row"),
            ("teacher.path=no/such/model", "no/such/model"),
            ("optim.learning_rate=fast", "optim.learning_rate"),
            ("data.max_prompt_length=3", "longer than 3"),
        ],
    )
    def test_bad_input_is_one_message_and_exit_code_2(self, kdkit, pair, tmp_path, override, message):
        files = {
            "broken": '{"prompt": "a", "completion": "b"}\n{"prompt": \n',
            "empty": "",
            "unanswered": '{"prompt": "a"}\n',
        }
        for name, text in files.items():
            (tmp_path / f"{name}.jsonl").write_text(text)
        override = override.format(**{name: tmp_path / f"{name}.jsonl" for name in files})
        config = write_config(tmp_path, tiny_config(pair))
        code, out, err = kdkit("distill", config, "--output", tmp_path / "run", "--set", override)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists()

    def test_replay_repeats_what_was_changed_in_another_run(self, kdkit, pair, tmp_path):
        config, log = write_config(tmp_path, tiny_config(pair)), tmp_path / "metrics.jsonl"
        log.write_text('{"kind": "change", "stage": "distill", "step": 1, "objective.kd.temperature": 5.0}\n')
        code, _, err = kdkit("distill", config, "--output", tmp_path / "run", "--replay", log)
        assert code == 0, err
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["kd_temperature"] for row in rows if row["kind"] == "train"] == [2.0, 5.0, 5.0]
        code, _, err = kdkit("distill", config, "--output", tmp_path / "other", "--replay", tmp_path / "none")
        assert (code, (tmp_path / "other").exists()) == (2, False)
        assert "is not there: give the metrics.jsonl of a run" in err

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_saves_then_stops_and_resume_finishes(self, kdkit, pair, tmp_path, number, code):
        config = write_config(tmp_path, tiny_config(pair, max_steps=4000, batch_size=1))
        run = tmp_path / "run"
        command = [sys.executable, "-m", "kdkit", "distill", str(config), "--output", str(run)]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "a resumed run (--resume) goes on from there" in err
        assert "Traceback" not in err
        saved = list((run / "stages" / "distill").glob("checkpoint-*/complete.json"))
        assert len(saved) == 1


class TestOtherArchitecture:
    @pytest.mark.skipif(not SHARED_ROWS.is_dir(), reason="the shared rows are not here")
    def test_gpt2_class_with_a_large_vocabulary_on_rows_nobody_here_wrote(self, kdkit, byte_tokenizer, tmp_path):
        width = 30_011  # more rows than the tokenizer has ids, and prime: nothing divides it
        for name, size, seed in (("teacher", 48, 1), ("student", 32, 2)):
            torch.manual_seed(seed)
            ids = {"bos_token_id": None, "eos_token_id": byte_tokenizer.eos_token_id}
            config = GPT2Config(vocab_size=width, n_embd=size, n_layer=2, n_head=2, n_positions=512, **ids)
            GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
            byte_tokenizer.save_pretrained(tmp_path / name)
        settings = {
            "preset": "srkl-dtw",
            "teacher": {"path": str(tmp_path / "teacher")},
            "student": {"path": str(tmp_path / "student")},
            "data": {
                "train": str(SHARED_ROWS / "t0_train.jsonl"),
                "validation": str(SHARED_ROWS / "t0_validation.jsonl"),
            },
            "optim": {"max_steps": 3, "batch_size": 4},
            "evaluation": {"max_new_tokens": 4, "teacher": False, "generate_rows": 2},
            "logging": {"every_steps": 1},
        }
        settings["data"] |= {"train_rows": 60, "validation_rows": 6}
        (tmp_path / "gpt2.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        code, _, err = kdkit("distill", tmp_path / "gpt2.yaml", "--output", tmp_path / "run", "--json")
        assert code == 0, err
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        first, last = (r for r in rows if r["kind"] == "train" and r["stage"] == "distill" and r["step"] in (1, 3))
        assert last["part/kd"] > 0
        assert 0 < first["part/dtw"] < 10


class TestEvaluate:
    def test_scores_a_file_of_predictions(self, kdkit, tmp_path):
        file = tmp_path / "predictions.jsonl"
        rows = [
            {"prediction": "The cat sat.", "references": ["the cat sat", "a cat was sitting"]},
            {"prediction": "no", "references": ["yes"]},
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, out, err = kdkit("evaluate", "--predictions", file, "--json")
        assert code == 0, err
        figures = json.loads(out)
        assert (figures["rouge_l"], figures["exact_match"]) == (50.0, 50.0)

    def test_measures_a_model_beside_its_teacher(self, kdkit, pair, tmp_path):
        data = tmp_path / "rows.jsonl"
        data.write_text(json.dumps({"prompt": "Say hello", "completion": "hello"}) + "\n")
        options = ["--data", data, "--template", "plain", "--max-new-tokens", 3, "--json"]
        code, out, err = kdkit("evaluate", pair["student"], "--teacher", pair["teacher"], *options)
        assert code == 0, err
        student, teacher = json.loads(out)
        assert student["model"] == pair["student"]
        assert teacher["perplexity"] > 1

    @pytest.mark.parametrize("arguments", [[], ["model", "--predictions", "x.jsonl"], ["model"]])
    def test_unclear_usage_is_refused(self, kdkit, arguments):
        code, _, err = kdkit("evaluate", *arguments)
        assert code == 2
        assert "Usage" in err


class TestCache:
    def test_writes_the_teachers_answers_to_prompts_with_and_without_an_answer(self, kdkit, pair, tmp_path):
        rows = [{"prompt": f"Count to {n}", "completion": "ok" if n % 2 else ""} for n in range(5)]
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = tiny_config(pair | {"teacher": str(demo_folder() / "teacher")}, f"data.train={data}")
        config = write_config(tmp_path, tree)
        out = tmp_path / "answers.jsonl"
        options = ("--generate", "--output", out, "--set", "evaluation.max_new_tokens=40")
        code, _, err = kdkit("cache", config, *options)
        assert code == 0, err
        written = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(written) > 2
        assert all(row["ended"] and row["completion"].strip() for row in written)
        assert {row["prompt"].split()[2] for row in written} >= {
            "0",
            "1",
        }  # of a row with an answer, and of one without
        assert not list(tmp_path.glob("*.partial"))

        whole = out.read_bytes()
        lines = whole.decode().splitlines(keepends=True)
        out.unlink()
        (tmp_path / "answers.jsonl.partial").write_text("".join(lines[:2]) + '{"prompt": "cut o')  # what a kill leaves
        assert kdkit("cache", config, *options)[0] == 2
        assert kdkit("cache", config, *options, "--resume")[0] == 0
        assert out.read_bytes() == whole

    def test_writes_a_cache_where_the_config_says_and_says_what_a_token_takes(self, kdkit, pair, tmp_path):
        objective = {"kd": {"top_k": 4}}
        given = tiny_config(pair, f"teacher.cache={tmp_path / 'cache'}", objective=objective, max_steps=1)
        config = write_config(tmp_path, given)
        code, out, err = kdkit("cache", config)
        assert (code, out) == (0, ""), err
        size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
        assert f"907 tokens of 39 rows in {tmp_path / 'cache'}" in err
        assert f"{size / 907:,.0f} bytes a token" in err
        code, _, err = kdkit("distill", config, "--output", tmp_path / "run")
        assert code == 0, err
        assert f"teacher: cached in {tmp_path / 'cache'}: the 4 likeliest of 1,024 ids" in err
        code, _, err = kdkit("cache", config)
        assert code == 2
        assert "add --resume to finish it" in err

    @pytest.mark.parametrize("options", [(), ("--generate",)])
    def test_asks_where_to_write(self, kdkit, pair, tmp_path, options):
        code, _, err = kdkit("cache", write_config(tmp_path, tiny_config(pair)), *options)
        assert code == 2
        assert "say where to write: --output" in err

    def test_refuses_to_overwrite(self, kdkit, pair, tmp_path):
        config = write_config(tmp_path, tiny_config(pair))
        (tmp_path / "answers.jsonl").touch()
        code, _, err = kdkit("cache", config, "--generate", "--output", tmp_path / "answers.jsonl")
        assert code == 2
        assert "exists; give another file" in err


class TestHelp:
    def test_starts_without_torch(self):
        code = "import sys; sys.argv = ['kdkit', '--help']\nfrom kdkit import cli\ntry: cli.main()\n"
        code += "finally: print('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stderr.strip() == "False"
        assert all(command in done.stdout for command in ("demo", "distill", "evaluate", "cache"))

    def test_an_unknown_command_is_bad_usage(self, kdkit):
        code, _, err = kdkit("destil")
        assert code == 2
        assert "destil" in err

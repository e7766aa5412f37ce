"""Two processes give the gradients of one; nothing home-made in between."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import OBJECTIVES, assert_same_gradients, gradients_of, rows_of
from tiny import ALL_TERMS, GradientDump, build_trainer, given_text, make_pair, tiny_config

from kdkit.errors import UserError
from kdkit.training.rollout import STATE_FILE, TEXTS_FILE, unpack_texts
from kdkit.training.sharding import check_sharding

TINY = Path(__file__).with_name("tiny.py")
STEPS = {"max_steps": 2, "scheduler": "constant", "warmup_steps": 0}

FSDP = (
    "--use_fsdp",
    "--fsdp_version=1",
    "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
    "--fsdp_state_dict_type=FULL_STATE_DICT",
    "--fsdp_use_orig_params=true",
    "--fsdp_sync_module_states=false",  # the default asks for an accelerator
    "--fsdp_cpu_ram_efficient_loading=false",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def launch(folder, config, *options, scripted_rouge_l=False, has_given_text=False):
    """Train with `accelerate launch` on two processes, over gloo where there is no GPU; returns the log rows."""
    folder.mkdir(parents=True)
    if scripted_rouge_l:
        (folder / "rouge_l.json").write_text("[30.0, 29.0, 28.0, 27.0]")
    if has_given_text:
        (folder / "given_text").touch()
    (folder / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *options]
    command += ["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(TINY), str(folder)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-12000:]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


class TestTwoProcesses:
    @pytest.mark.parametrize("name", ["all", "weight still 0"])
    def test_of_batch_4_are_one_of_batch_8(self, pair, tmp_path, name):
        single = tiny_config(pair, objective=OBJECTIVES[name], batch_size=8, **STEPS)
        # 7 rows in batches of 3: two processes see 2 batches each, one of them twice, and count it once.
        half = tiny_config(pair, "evaluation.batch_size=3", objective=OBJECTIVES[name], batch_size=4, **STEPS)
        trainer, steps = gradients_of(single, tmp_path / "one")
        rows = launch(tmp_path / "two", half, "--multi_gpu")  # the launcher's name for several processes; gloo here
        assert_same_gradients(load_file(tmp_path / "two" / "gradients-0.safetensors"), steps[0])
        ours = [row for row in rows if row["kind"] == "train"]
        for mine, other in zip(ours, rows_of(trainer), strict=True):
            for key in ("loss", "grad_norm", *(k for k in other if k.startswith(("part/", "dtw/")))):
                assert mine[key] == pytest.approx(other[key], rel=1e-4), key
        measured = next(row for row in rows if row["kind"] == "eval")
        expected = rows_of(trainer, "eval")[0]
        for key in ("loss", "cross_entropy"):
            assert measured[key] == pytest.approx(expected[key], rel=1e-4)
        assert measured["rows_digest"] == expected["rows_digest"]

    def test_of_batch_4_are_one_of_batch_8_on_a_given_text_of_the_student(self, pair, tmp_path):
        """The counts are those of the text that came in, over both processes, not those of the rows it replaced."""
        free = ("rollout.mode=on_policy", "rollout.threshold=1", "rollout.guard=null", "rollout.collapse=null")
        more, objective = ("rollout.max_new_tokens=4",), {"kd": {"weight": 1.0}}
        whole, half = (
            tiny_config(pair, *free, *more, objective=objective, batch_size=size, **STEPS) for size in (8, 4)
        )
        dump = GradientDump()
        trainer = build_trainer(whole, tmp_path / "one", callbacks=(dump,))
        trainer.rollout.generate = given_text
        trainer.train()
        rows = launch(tmp_path / "two", half, "--multi_gpu", has_given_text=True)
        for step, gradients in enumerate(dump.steps):
            assert_same_gradients(load_file(tmp_path / "two" / f"gradients-{step}.safetensors"), gradients, 1e-4)
        for mine, other in zip((row for row in rows if row["kind"] == "train"), rows_of(trainer), strict=True):
            assert mine["rollout/fresh_fraction"] == other["rollout/fresh_fraction"] == 1
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)

    def test_draw_their_own_texts(self, pair, tmp_path):
        """The same draw in each process would be one text in as many copies."""
        free = ("rollout.mode=on_policy", "rollout.threshold=1", "rollout.guard=null", "rollout.collapse=null")
        config = tiny_config(pair, *free, "rollout.max_new_tokens=4")
        trainer, keys = build_trainer(config, tmp_path), []
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.rollout.generate = lambda student, rows, *, key: keys.append(tuple(key)) or given_text(0, rows, key=0)
        for rank in (0, 1):
            accelerator = SimpleNamespace(num_processes=1, process_index=rank)
            trainer.rollout.mix([batch], trainer.model.student, step=5, accelerator=accelerator)
        assert keys == [(5, 0), (5, 1)]

    def test_hold_the_same_replay_buffer_and_threshold(self, pair, tmp_path):
        """Each writes its own texts; all keep those of all, so that a checkpoint of one speaks for both."""
        free = ("rollout.mode=adaptive", "rollout.threshold=0.9", "rollout.loss_epsilon=0", "rollout.guard=null")
        more = ("rollout.collapse=null", "rollout.max_new_tokens=4", "rollout.capacity=12", "evaluation.every_steps=1")
        objective = {"kd": {"weight": 1.0}}
        config = tiny_config(pair, *free, *more, objective=objective, batch_size=4, **STEPS | {"max_steps": 4})
        rows = launch(tmp_path / "two", config, "--multi_gpu")
        folders = [tmp_path / "two" / f"rollout-{rank}" for rank in range(2)]
        ours, theirs = ((folder / STATE_FILE).read_text() for folder in folders)
        assert ours == theirs
        texts, others = (unpack_texts(load_file(folder / TEXTS_FILE)) for folder in folders)
        assert len(texts) == 12
        assert [(text.row, text.born_step) for text in texts] == [(text.row, text.born_step) for text in others]
        assert any(row.get("rollout/replayed_fraction") for row in rows)

    def test_hold_the_same_average_and_stop_at_the_same_step(self, pair, tmp_path):
        """What the first process finds has to end the others too, or they wait for it for ever."""
        watch = ("evaluation.every_steps=1", "evaluation.early_stopping={patience: 2, min_delta: 100}", "optim.ema={}")
        config = tiny_config(pair, *watch, batch_size=4, **STEPS | {"max_steps": 8})
        rows = launch(tmp_path / "two", config, "--multi_gpu", scripted_rouge_l=True)
        last = [row for row in rows if row["kind"] == "eval"][-1]
        assert last["step"] == 3
        assert "stopped early: 2 evaluations" in last["note"]
        ours, theirs = (load_file(tmp_path / "two" / f"average-{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
        (best,) = (tmp_path / "two" / "run").glob("best-*")
        assert best.name == "best-1"

    def test_fsdp_with_the_students_text_is_refused(self, pair, tmp_path):
        config = tiny_config(
            pair, "rollout.mode=on_policy", "rollout.collapse=null", "rollout.max_new_tokens=4", batch_size=4, **STEPS
        )
        with pytest.raises(AssertionError, match="rollout needs the whole student in each process, and FSDP cuts it"):
            launch(tmp_path / "two", config, *FSDP)

    def test_sharded_by_fsdp_train_to_the_same_weights(self, pair, tmp_path):
        single = tiny_config(pair, objective=ALL_TERMS, batch_size=8, **STEPS)
        trainer, _ = gradients_of(single, tmp_path / "one")
        rows = launch(tmp_path / "two", tiny_config(pair, objective=ALL_TERMS, batch_size=4, **STEPS), *FSDP)
        assert (tmp_path / "two" / "wrapper.txt").read_text() == "FullyShardedDataParallel"
        for mine, other in zip(rows, trainer.metrics.rows(), strict=True):
            for key in ("loss", "grad_norm", "cross_entropy", *(k for k in other if k.startswith(("part/", "dtw/")))):
                if key in other:
                    assert mine[key] == pytest.approx(other[key], rel=1e-3), key
        for name in ("model.safetensors", "adapters.safetensors"):
            weights, expected = (
                load_file(folder / "checkpoint-2" / name) for folder in (tmp_path / "two" / "run", tmp_path / "one")
            )
            assert weights.keys() == expected.keys()
            for key, weight in weights.items():
                torch.testing.assert_close(weight, expected[key], rtol=1e-3, atol=1e-4)


class TestCheckSharding:
    plugin = SimpleNamespace(state_dict_type="StateDictType.FULL_STATE_DICT", fsdp_version=1, use_orig_params=True)
    nothing = {"has_rollout": False, "has_average": False, "has_lora": False, "watches_rouge_l": False}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ("has_rollout", "use DDP, or mode off"),
            ("has_average", r"optim\.ema averages the whole student .* use DDP, or ema=null"),
            ("has_lora", r"student\.lora is small .* use DDP, or lora=null"),
            ("watches_rouge_l", r"use DDP, or early_stopping\.metric=cross_entropy"),
        ],
    )
    def test_what_needs_the_whole_student_is_refused_by_name(self, asked, message):
        with pytest.raises(UserError, match=message):
            check_sharding(self.plugin, **self.nothing | {asked: True})

    def test_the_rest_is_let_through(self):
        check_sharding(self.plugin, **self.nothing)

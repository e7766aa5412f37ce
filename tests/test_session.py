"""A notebook's session: what it finds and installs, what is attached, when it ends and how the next one goes on."""

import json
import os
import shutil
import stat
import sys
import time
from importlib import metadata
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import make_pair, tiny_config
from transformers import TrainerCallback, TrainerControl, TrainerState

from kdkit import attached, runtime
from kdkit.errors import UserError
from kdkit.runtime import GIB, Preflight, preflight
from kdkit.session import begin, install_lacking, packages, place
from kdkit.session.place import Session
from kdkit.session.runs import TimeNote, start_or_resume
from kdkit.training import run
from kdkit.training.run import run_distillation
from kdkit.training.stopping import Interrupted

CARD = Preflight("cuda", 2, "Tesla T4", (7, 5), ("sm_75",), int(14.6 * GIB), ok=True, problem="", remedy="")


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Nothing of this machine: no network, nothing attached, no variable of Kaggle's or the hub's."""
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "KDKIT_BATCH", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", *runtime._PROXIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(attached.INPUTS_VARIABLE, str(tmp_path / "input"))
    monkeypatch.setattr(place, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(place, "hub_answers", lambda: True)


def make_session(**changes):
    given = {"machine": preflight(), "is_kaggle": False, "is_batch": False, "has_internet": False, "hours": 1e6}
    return Session(**given | changes)


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


class TestBegin:
    def test_says_versions_machine_place_and_time(self, capsys):
        session = begin(hours=9)
        said = capsys.readouterr().out
        assert "kdkit " in said
        assert "CPU (" in said
        assert "not Kaggle; internet on" in said
        assert "training stops after 9.0 h" in said
        assert (session.is_kaggle, session.is_batch, session.hours) == (False, False, 9)

    def test_on_kaggle_downloads_go_to_scratch_and_not_into_what_is_saved(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
        session = begin()
        assert (session.is_kaggle, session.is_batch) == (True, False)
        assert os.environ["HF_HOME"] == str(tmp_path / "scratch")
        assert (tmp_path / "scratch").is_dir()

    def test_a_home_that_was_chosen_is_kept(self, monkeypatch):
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        monkeypatch.setenv("HF_HOME", "mine")
        assert begin().is_batch
        assert os.environ["HF_HOME"] == "mine"

    @pytest.fixture
    def secrets(self, monkeypatch):
        """Kaggle's module, whose client answers or raises."""
        held = {}

        class UserSecretsClient:
            def get_secret(self, label):
                if label not in held:
                    raise LookupError(f"no secret {label}")
                return held[label]

        module = ModuleType("kaggle_secrets")
        module.UserSecretsClient = UserSecretsClient
        module.__spec__ = SimpleNamespace()
        monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
        return held

    def test_a_batch_elsewhere_is_one_too(self, monkeypatch, capsys):
        monkeypatch.setenv("KDKIT_BATCH", "1")
        session = begin()
        assert (session.is_kaggle, session.is_batch) == (False, True)
        assert "not Kaggle, as a batch" in capsys.readouterr().out

    def test_the_token_comes_from_the_secrets(self, secrets, monkeypatch, capsys):
        monkeypatch.setenv("HF_TOKEN", "")  # so that it is put back afterwards
        monkeypatch.delenv("HF_TOKEN")
        secrets["HF_TOKEN"] = "hf_1"
        begin()
        assert os.environ.pop("HF_TOKEN") == "hf_1"
        assert "hf_1" not in capsys.readouterr().out

    def test_without_that_secret_it_goes_on_and_says_what_stays_shut(self, secrets, capsys):
        begin()
        assert "no HF_TOKEN among the secrets of this notebook (LookupError)" in capsys.readouterr().out
        assert "HF_TOKEN" not in os.environ

    def test_offline_the_hub_is_not_asked_again_and_again(self, monkeypatch, capsys):
        monkeypatch.setattr(place, "hub_answers", lambda: False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        assert not begin().has_internet
        assert os.environ.pop("HF_HUB_OFFLINE") == os.environ.pop(place._TOLD) == "1"
        assert "internet off" in capsys.readouterr().out

    def test_switched_on_later_the_internet_is_found(self, monkeypatch):
        """The first call had told the hub's library that there is none, and the second one believed it."""
        answers = iter([False, True])
        monkeypatch.setattr(place, "hub_answers", lambda: next(answers) and "HF_HUB_OFFLINE" not in os.environ)
        assert [begin().has_internet, begin().has_internet] == [False, True]
        assert "HF_HUB_OFFLINE" not in os.environ

    def test_a_card_without_kernels_stops_it_with_the_line_to_run(self, monkeypatch):
        card = Preflight("cuda", 1, "Tesla P100", (6, 0), ("sm_70",), 16 * GIB, False, "no kernels", "pip install it")
        monkeypatch.setattr(place, "preflight", lambda: card)
        with pytest.raises(UserError, match="no kernels\n-> pip install it\n   then restart") as caught:
            begin()
        assert caught.value._render_traceback_() == [f"UserError: {caught.value}"]

    def test_no_hours_are_refused(self):
        with pytest.raises(UserError, match="a session of 0 hours trains nothing"):
            begin(hours=0)

    def test_a_nearly_full_disk_is_said(self, monkeypatch, capsys):
        monkeypatch.setattr(place.shutil, "disk_usage", lambda where: SimpleNamespace(free=GIB // 2))
        begin()
        assert "only 0.5 GiB free in" in capsys.readouterr().out

    def test_what_was_installed_is_said_and_what_was_loaded_before_needs_a_restart(self, monkeypatch, capsys):
        monkeypatch.setattr(place, "install_lacking", lambda: ["no-such-module 0.1.2", "json 9.9"])
        begin()
        said = capsys.readouterr().out
        assert "installed: no-such-module 0.1.2, json 9.9" in said
        assert "restart the session: an older json was loaded before it was replaced" in said

    @pytest.mark.parametrize(
        ("torchao", "peft", "is_said"), [("0.10.0", "0.21", True), ("0.16.0", "0.21", False), ("0.10.0", None, False)]
    )
    def test_a_torchao_that_makes_peft_raise_is_named_with_the_line_to_run(
        self, monkeypatch, capsys, torchao, peft, is_said
    ):
        installed = {"torchao": torchao, "peft": peft}
        real = packages._version
        monkeypatch.setattr(packages, "_version", lambda name: installed.get(name) if name in installed else real(name))
        begin()
        assert ('pip install --no-deps -U "torchao>=0.16"' in capsys.readouterr().out) == is_said


class TestSession:
    def test_time_counts_from_the_first_cell_and_not_from_the_last_call(self, monkeypatch):
        monkeypatch.setattr(place, "_BEGAN", time.monotonic() - 3600)
        assert make_session(hours=3).hours_left == pytest.approx(2, abs=0.01)
        assert make_session(hours=0.5).hours_left == 0
        assert make_session(hours=0.5).stop_request().reason == "the end of its time"

    @pytest.mark.parametrize(
        ("machine", "internet", "suits"),
        [
            (CARD, True, True),
            (CARD, False, False),
            (Preflight("cuda", 1, "small", (7, 5), (), 8 * GIB, True, "", ""), True, False),
            (Preflight("cpu", 1, "cpu", None, (), 64 * GIB, True, "", ""), True, False),
        ],
    )
    def test_large_models_want_a_card_and_somewhere_to_come_from(self, machine, internet, suits):
        assert make_session(machine=machine, has_internet=internet).suits("gpt2-dolly") == suits

    def test_offline_all_of_them_have_to_be_attached(self, tmp_path):
        parts = ["teacher-gpt2-1.5b/1/config.json", "gpt2/1/config.json", "databricks-dolly-15k/rows.jsonl"]
        for number, part in enumerate(parts):
            assert not make_session(machine=CARD).suits("gpt2-dolly"), f"{number} of {len(parts)} are attached"
            touch(tmp_path / "input", part)
        assert make_session(machine=CARD).suits("gpt2-dolly")

    def test_hours_on_a_card_of_kaggle_are_a_share_of_the_week(self):
        assert make_session(machine=CARD, is_kaggle=True).quota(3) == "3.0 h, 10% of a week's 30 GPU hours"
        assert make_session(is_kaggle=True).quota(0.5) == "30 min"


class TestPackages:
    @pytest.fixture
    def world(self, monkeypatch):
        """Installed versions, requirements, and an index that pip would install from."""
        world = SimpleNamespace(
            installed={"kdkit": "0.1", "numpy": "2.0", "torch": "2.10", "transformers": "5.0", "hub": "1.0"},
            requires={"transformers": ["hub>=2"]},
            index={"transformers": "5.23.0", "rouge-score": "0.1.2", "hub": "2.4"},
            commands=[],
        )
        needed = ["torch>=2.6", "numpy>=1.26", "transformers>=5.23", 'x>=1; extra == "dev"', "rouge-score>=0.1"]
        world.requires["kdkit"] = needed

        def requires(name):
            return world.requires.get(name)

        def version(name):
            if name not in world.installed:
                raise metadata.PackageNotFoundError(name)
            return world.installed[name]

        monkeypatch.setattr(metadata, "requires", requires)
        monkeypatch.setattr(metadata, "version", version)
        return world

    def install(self, world):
        def pip(places):
            world.commands.append(list(places))
            for name in world.index:
                if any(place.replace("_", "-").rpartition("/")[2].startswith(name) for place in places):
                    world.installed[name] = world.index[name]

        return pip

    def test_what_is_missing_or_too_old_is_installed_and_what_that_needs_in_turn(self, world):
        assert install_lacking(install=self.install(world)) == [
            "transformers 5.23.0",
            "rouge-score 0.1.2",
            "hub 2.4",
        ]
        assert world.commands == [["transformers>=5.23", "rouge-score>=0.1"], ["hub>=2"]]

    def test_attached_wheels_come_first_the_newest_that_fits(self, world, tmp_path):
        wheels = ["transformers-5.22.0", "transformers-5.23.0", "transformers-5.24.0", "rouge_score-0.1.2"]
        touch(tmp_path / "input" / "me" / "wheels", *(f"{wheel}-py3-none-any.whl" for wheel in wheels))
        install_lacking(install=self.install(world))
        assert [place.rpartition("/")[2] for place in world.commands[0]] == [
            "transformers-5.24.0-py3-none-any.whl",
            "rouge_score-0.1.2-py3-none-any.whl",
        ]

    def test_a_wheel_for_another_python_is_left_to_the_index(self, world, tmp_path):
        touch(tmp_path / "input", "transformers-5.24.0-cp27-cp27m-win32.whl", "transformers-broken.whl")
        install_lacking(install=self.install(world))
        assert world.commands[0][0] == "transformers>=5.23"

    def test_where_nothing_lacks_pip_is_not_called(self, world):
        world.installed |= world.index
        assert install_lacking(install=self.install(world)) == []
        assert world.commands == []

    @pytest.mark.parametrize(("name", "held"), [("torch", "2.5"), ("numpy", "1.25"), ("torch", None)])
    def test_torch_and_numpy_are_never_replaced_but_named(self, world, name, held):
        world.installed.pop(name)
        if held:
            world.installed[name] = held
        with pytest.raises(
            UserError, match=f"{name}.* is needed, and here it is {held or 'missing'}.*latest environment"
        ):
            install_lacking(install=self.install(world))
        assert world.commands == []

    def test_what_pip_cannot_get_is_one_message_with_what_to_do(self, world, monkeypatch):
        failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
        seen = []
        monkeypatch.setattr(packages.subprocess, "run", lambda command, **kwargs: seen.append(command) or failed)
        with pytest.raises(UserError, match=r"No matching distribution found\. Switch the internet on .* or attach"):
            install_lacking()
        assert "--no-deps" in seen[0]

    def test_what_is_still_missing_afterwards_needs_a_restart(self, world):
        with pytest.raises(UserError, match=r"transformers>=5\.23.*restart the session"):
            install_lacking(install=lambda places: None)

    def test_nothing_lacks_where_the_tests_run(self):
        assert install_lacking(install=None) == []


class TestAttached:
    @pytest.fixture
    def root(self, tmp_path):
        return tmp_path / "input"

    @pytest.mark.parametrize(
        ("name", "path"),
        [
            ("openai-community/gpt2-xl", "gpt2-xl/pytorch/default/1"),
            ("openai-community/gpt2-xl", "models/someone/gpt2-xl"),
            ("Qwen/Qwen2.5-0.5B", "qwen2.5/transformers/0.5b/1"),
            ("Qwen/Qwen2.5-0.5B", "datasets/someone/my-models/Qwen2.5-0.5B"),
            ("openai-community/gpt2", "hub/models--openai-community--gpt2/snapshots/" + "0" * 40),
        ],
    )
    def test_a_model_is_found_wherever_it_was_mounted(self, root, name, path):
        touch(root, f"{path}/config.json", "distilgpt2/pytorch/default/1/config.json", "gpt2-medium/1/config.json")
        assert attached.find_model(name) == root / path

    @pytest.mark.parametrize("path", ["distilgpt2/1", "gpt2-xl/1", "gpt2/tokenizer"])
    def test_a_model_of_another_name_is_not_it(self, root, path):
        touch(root, f"{path}/config.json")
        assert attached.find_model("openai-community/gpt2") is None

    def test_two_of_one_name_are_a_question(self, root):
        touch(root, "a/gpt2/config.json", "b/gpt2/config.json")
        with pytest.raises(UserError, match=r"gpt2 is attached 2 times .*detach all but one"):
            attached.find_model("gpt2")

    def test_nothing_attached_is_nothing(self):
        assert attached.find_model("gpt2") is None
        assert attached.find_rows("a/b") is None

    @pytest.mark.parametrize("file", ["databricks-dolly-15k/rows.jsonl", "data/databricks-dolly-15k.parquet"])
    def test_rows_are_found_by_their_folder_or_their_own_name(self, root, file):
        touch(root, file, "other/rows.jsonl")
        assert attached.find_rows("databricks/databricks-dolly-15k") == root / file

    def test_a_description_beside_the_rows_is_not_a_second_answer(self, root):
        touch(root, "dolly-15k/dataset_infos.json", "dolly-15k/databricks-dolly-15k.jsonl", "dolly-15k/extra.jsonl")
        found = attached.find_rows("databricks/databricks-dolly-15k")
        assert found == root / "dolly-15k" / "databricks-dolly-15k.jsonl"

    def test_rows_saved_by_datasets_are_their_folder(self, root):
        touch(root, "dolly/dataset_dict.json", "dolly/train/state.json", "dolly/train/data.json")
        assert attached.find_rows("databricks/dolly") == root / "dolly"

    def test_offline_a_run_takes_models_and_rows_from_there(self, root, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        pair = make_pair(tmp_path / "pair")
        for role in ("teacher", "student"):
            shutil.copytree(pair[role], root / f"tiny-{role}" / "transformers" / "default" / "1")
        rows = [{"instruction": f"Say {n}.", "response": f"It is {n}."} for n in range(12)]
        (root / "some-rows").mkdir()
        (root / "some-rows" / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = {"teacher": "someone/tiny-teacher", "student": "someone/tiny-student"}
        data = ["data.train=someone/some-rows#train[4:]", "data.validation=someone/some-rows#train[:4]"]
        config = tiny_config(names, *data, "data.train_rows=null", max_steps=1)
        assert run_distillation(config, tmp_path / "run").evaluations["student"]["num_rows"] == 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), dropout=0.2)


@pytest.fixture(scope="module")
def config(pair):
    return tiny_config(pair, "data.train_rows=16", max_steps=4)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return run_distillation(config, tmp_path_factory.mktemp("session") / "demo" / "after")


class TestStartOrResume:
    def test_the_second_time_nothing_is_trained_again(self, config, tmp_path, capsys):
        first = start_or_resume(config, tmp_path / "run", session=make_session())
        said = capsys.readouterr()
        assert "4 optimizer steps" in said.out
        assert said.err == ""
        metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        second = start_or_resume(config, tmp_path / "run", session=make_session())
        assert "optimizer steps" not in capsys.readouterr().out
        assert second.evaluations == first.evaluations
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics

    def test_without_resume_a_folder_that_holds_a_run_is_refused(self, config, finished):
        with pytest.raises(UserError, match="is not empty"):
            start_or_resume(config, finished.folder, session=make_session(), resume=False)

    def test_a_run_in_an_attached_output_goes_on_although_it_is_read_only(self, config, finished, tmp_path, capsys):
        """The copy took along that nothing may be written: the run in it could not go on."""
        output = tmp_path / "input" / "notebooks" / "someone" / "slug" / "demo" / "after"
        shutil.copytree(finished.folder, output)
        for path in (*output.rglob("*"), output):
            path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))
        again = start_or_resume(config, tmp_path / "demo" / "after", session=make_session())
        said = capsys.readouterr().out
        assert f"continuing {output}" in said
        assert "optimizer steps" not in said
        assert again.evaluations == finished.evaluations
        assert again.folder == tmp_path / "demo" / "after"
        assert not list(again.folder.parent.glob("*.partial"))
        assert all(path.stat().st_mode & stat.S_IWUSR for path in again.folder.rglob("*"))
        for path in (output, *output.rglob("*")):
            path.chmod(0o700)

    def test_an_attached_run_of_another_name_is_left_alone(self, config, finished, tmp_path, capsys):
        shutil.copytree(finished.folder, tmp_path / "input" / "demo" / "after")
        start_or_resume(config, tmp_path / "other" / "after", session=make_session())
        assert "continuing" not in capsys.readouterr().out

    def test_two_attached_outputs_need_a_choice(self, config, tmp_path):
        touch(tmp_path / "input", "one/demo/after/config.yaml", "two/demo/after/config.yaml")
        with pytest.raises(UserError, match="is attached 2 times"):
            start_or_resume(config, tmp_path / "demo" / "after", session=make_session())
        assert not (tmp_path / "demo").exists()


class TestTheEndOfTheTime:
    @pytest.fixture
    def clock(self, monkeypatch):
        """The time ends in the second step."""

        class Strike(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    monkeypatch.setattr(place, "_BEGAN", time.monotonic() - 1e12)

        monkeypatch.setattr("kdkit.session.runs.TimeNote", lambda session: Strike())
        monkeypatch.setattr(Session, "stop_request", lambda self: _Clock())

    def test_with_a_person_it_stops_saved_and_says_how_to_go_on(self, config, tmp_path, clock, capsys):
        with pytest.raises(Interrupted, match="stopped by the end of its time"):
            start_or_resume(config, tmp_path / "demo" / "run", session=make_session())
        assert "Run the notebook again to go on." in capsys.readouterr().out
        assert (tmp_path / "demo" / "run" / "stages" / "distill" / "checkpoint-2").is_dir()

    def test_a_batch_ends_without_an_error_and_the_next_with_its_output_attached_gets_the_same_weights(
        self, config, finished, tmp_path, clock, capsys, monkeypatch
    ):
        skipped = []
        monkeypatch.setattr("kdkit.session.runs.skip_the_rest", lambda: skipped.append(True))
        batch = make_session(is_kaggle=True, is_batch=True)
        assert start_or_resume(config, tmp_path / "input" / "slug" / "demo" / "run", session=batch) is None
        assert skipped == [True]
        assert "add this version's output under Input" in capsys.readouterr().out
        monkeypatch.undo()
        monkeypatch.setenv(attached.INPUTS_VARIABLE, str(tmp_path / "input"))
        again = start_or_resume(config, tmp_path / "demo" / "run", session=make_session())
        ours, theirs = (load_file(result.model / "model.safetensors") for result in (again, finished))
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours | theirs)


class _Clock(run.StopRequest):
    @property
    def reason(self):
        return "the end of its time" if place._BEGAN < 0 else ""


class TestTimeNote:
    def test_after_ten_steps_it_says_how_long_the_stage_takes_and_when_the_session_is_too_short(self, monkeypatch):
        said, now = [], [1000.0]
        monkeypatch.setattr("kdkit.session.runs.time.monotonic", lambda: now[0])
        monkeypatch.setattr(place, "_BEGAN", 1000.0)
        session = make_session(machine=CARD, is_kaggle=True, hours=1.0)
        note, state = TimeNote(session, say=said.append), TrainerState(max_steps=7211)
        note.on_train_begin(None, state, TrainerControl())
        for step in range(1, 30):
            state.global_step, now[0] = step, now[0] + (60.0 if step == 1 else 2.0)
            note.on_step_end(None, state, TrainerControl())
        (line,) = said
        assert line == (
            "2.00 s a step: about 4.0 h, 13% of a week's 30 GPU hours left for this stage; the session has 1.0 h, "
            "so it will take another one to finish"
        )

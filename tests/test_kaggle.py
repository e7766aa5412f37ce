"""The way to Kaggle: the table, what is rendered from it, what the real client sends of that, and the wheels."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from loopback_kaggle import ACCOUNT, CLIENT, LoopbackKaggle

from kdkit.errors import UserError
from kdkit.kaggle import kernels, push, table
from kdkit.kaggle.wheelhouse import build_wheelhouse, pinned_versions, wheel_faults

ROOT = Path(__file__).resolve().parents[1]
TABLE = table.read_table(ROOT)
SLUGS = [kernel.slug for kernel in TABLE.kernels]
FIRST = SLUGS[0]


def has_client():
    try:
        return bool(version("kaggle"))
    except PackageNotFoundError:
        return False


needs_client = pytest.mark.skipif(not has_client(), reason="the kaggle client is not installed")


@pytest.fixture
def checkout(tmp_path):
    """What the commands read of a checkout, in a folder of its own."""
    root = tmp_path / "checkout"
    (root / "kaggle").mkdir(parents=True)
    (root / "notebooks").mkdir()
    for name in ("kaggle/kernels.yaml", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, root / "notebooks")
    return root


@pytest.fixture
def rendered(checkout):
    kernels.render(checkout, TABLE, owner=ACCOUNT)
    return checkout


@pytest.fixture
def server():
    with LoopbackKaggle() as running:
        running.answers["SaveKernel"] = (200, {"versionNumber": 3, "url": "https://kaggle.test/code/x", "ref": "x"})
        yield running


def edit_table(root, change):
    path = root / table.TABLE_FILE
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def edit_notebook(path, change):
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    path.write_text(json.dumps(notebook))


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestTable:
    def test_every_notebook_has_its_kernel(self):
        assert sorted(kernel.notebook for kernel in TABLE.kernels) == sorted(
            path.name for path in (ROOT / "notebooks").glob("*.ipynb")
        )

    def test_it_asks_for_two_t4_privately_and_with_internet(self):
        asked = {(kernel.machine_shape, kernel.enable_internet, kernel.is_private) for kernel in TABLE.kernels}
        assert asked == {("NvidiaTeslaT4", True, True)}

    @given(st.from_regex(r"[A-Za-z0-9]+([ -][A-Za-z0-9]+)*", fullmatch=True))
    def test_a_slug_is_what_the_client_makes_of_the_title(self, title):
        slugify = pytest.importorskip("slugify").slugify
        assert table.slug_of(title) == slugify(title)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t["defaults"].update(machine_shape="NvidiaTeslaP100"), "retired it on 2026-09-15"),
            (lambda t: t["defaults"].update(machine_shape="nvidiaTeslaT4"), "did you mean NvidiaTeslaT4?"),
            (lambda t: t["defaults"].update(enable_internet="maybe"), "kernels.0.enable_internet"),
            (lambda t: t["defaults"].update(enable_interet=True), "kernels.0.enable_interet: no such field"),
            (lambda t: t["kernels"][1].update(is_privat=True), "kernels.1.is_privat: no such field"),
            (lambda t: t["kernels"][1].pop("notebook"), "kernels.1.notebook: required"),
            (lambda t: t["kernels"][1].update(title="kdkit: distillation!"), "kernels.1.title: a title is words"),
            (lambda t: t["kernels"][1].update(title="kdkit " * 9 + "x"), "at most 50 characters"),
            (lambda t: t["kernels"][1].update(title=t["kernels"][0]["title"].upper()), f"have the slug {FIRST}"),
            (lambda t: t["kernels"][1].update(notebook="../secret.ipynb"), "kernels.1.notebook"),
            (lambda t: t["kernels"][1].update(dataset_sources=["just-a-slug"]), "kernels.1.dataset_sources.0"),
            (lambda t: t["kernels"][1].update(dataset_sources=["datasets/a/b"]), "kernels.1.dataset_sources.0"),
            (lambda t: t["kernels"][1].update(model_sources=["a/b/transformers/c"]), "kernels.1.model_sources.0"),
            (lambda t: t.update(kernels=[]), "at least 1 item"),
            (lambda t: t["dataset"].update(subtitle="short"), "dataset.subtitle"),
            (lambda t: t["wheels"]["registry"].append("torch==2.10.0"), "torch is never shipped: the image's is built"),
            (lambda t: t["wheels"]["registry"].append("NumPy"), "numpy is never shipped"),
            (lambda t: t["wheels"]["build"].append("ipywidgets"), "ipywidgets is never shipped"),
            (lambda t: t["wheels"]["registry"].append("click>=8"), "wheels.registry.12"),
        ],
    )
    def test_what_kaggle_would_take_and_get_wrong_is_refused_by_name(self, checkout, change, message):
        edit_table(checkout, change)
        with pytest.raises(UserError, match=re.escape(message)):
            table.read_table(checkout)

    @pytest.mark.parametrize("text", ["kernels: [", "- a list", "defaults: 3\nkernels: 4"])
    def test_a_file_of_another_shape_is_one_message(self, checkout, text):
        (checkout / table.TABLE_FILE).write_text(text)
        with pytest.raises(UserError):
            table.read_table(checkout)

    def test_an_installed_kdkit_says_that_it_needs_a_checkout(self, kdkit, tmp_path):
        code, _, err = kdkit("kaggle", "--checkout", tmp_path, "render", "--owner", ACCOUNT)
        assert code == 2
        assert "needs a checkout" in err


class TestRender:
    def test_the_first_lies_in_kaggle_itself_and_each_other_in_its_folder(self, rendered):
        places = {path.parent.relative_to(rendered / "kaggle") for path in rendered.rglob("kernel-metadata.json")}
        assert places == {Path("."), *map(Path, SLUGS[1:])}

    def test_every_field_of_the_first(self, rendered):
        assert json.loads((rendered / "kaggle" / "kernel-metadata.json").read_text()) == {
            "id": "somebody/kdkit-01-soft-dtw-distillation",
            "title": "kdkit 01 soft-DTW distillation",
            "code_file": "../notebooks/01_dtw_distill.ipynb",
            "language": "python",
            "kernel_type": "notebook",
            "is_private": True,
            "enable_gpu": True,
            "enable_internet": True,
            "machine_shape": "NvidiaTeslaT4",
            "dataset_sources": ["somebody/kdkit-wheels"],
            "kernel_sources": [],
            "model_sources": [],
        }

    def test_a_kernel_overrides_the_defaults_and_adds_its_sources(self, checkout):
        own = {"machine_shape": None, "enable_internet": False, "dataset_sources": ["a/rows"]}
        edit_table(checkout, lambda tree: tree["kernels"][0].update(own))
        kernels.render(checkout, table.read_table(checkout), owner=ACCOUNT)
        written = json.loads((checkout / "kaggle" / "kernel-metadata.json").read_text())
        assert (written["machine_shape"], written["enable_gpu"], written["enable_internet"]) == ("", False, False)
        assert written["dataset_sources"] == ["somebody/kdkit-wheels", "a/rows"]

    def test_resuming_attaches_the_output_of_that_kernel_alone(self, checkout, kdkit):
        code, out, err = kdkit("kaggle", "--checkout", checkout, "render", "--owner", ACCOUNT, "--resume", SLUGS[1])
        assert code == 0, err
        written = [json.loads(Path(line).read_text()) for line in out.splitlines() if "kernel-metadata" in line]
        assert {w["id"]: w["kernel_sources"] for w in written if w["kernel_sources"]} == {
            f"somebody/{SLUGS[1]}": [f"somebody/{SLUGS[1]}"]
        }

    def test_what_the_table_no_longer_has_is_removed(self, rendered):
        edit_table(rendered, lambda tree: tree["kernels"].pop())
        kernels.render(rendered, table.read_table(rendered), owner=ACCOUNT)
        assert not (rendered / "kaggle" / SLUGS[-1] / "kernel-metadata.json").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda nb: nb.cells[-1].update(cell_type="code", outputs=[], execution_count=7), "carries outputs"),
            (lambda nb: nb.metadata.pop("kernelspec"), "kernelspec is not python3"),
            (lambda nb: nb.cells[0].pop("metadata"), "no valid notebook"),
            (lambda nb: nb.cells[0].update(source="x" * 2**20), "bytes, and at most"),
        ],
    )
    def test_a_notebook_that_would_fail_there_is_refused_and_nothing_written(self, checkout, change, message):
        edit_notebook(checkout / "notebooks" / TABLE.kernels[1].notebook, change)
        with pytest.raises(UserError, match=f"{TABLE.kernels[1].notebook}: .*{message}"):
            kernels.render(checkout, TABLE, owner=ACCOUNT)
        assert not list(checkout.rglob("*metadata.json"))

    @pytest.mark.parametrize(("text", "message"), [(None, "no such file"), ("{", "no valid notebook")])
    def test_a_notebook_that_is_none_is_refused(self, checkout, text, message):
        path = checkout / "notebooks" / TABLE.kernels[0].notebook
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(UserError, match=message):
            kernels.render(checkout, TABLE, owner=ACCOUNT)

    @pytest.mark.parametrize("owner", ["", "some body", "somebody/kernel", "https://www.kaggle.com/somebody"])
    def test_an_owner_that_is_no_account_is_refused(self, checkout, owner):
        with pytest.raises(UserError, match="no Kaggle account"):
            kernels.render(checkout, TABLE, owner=owner)

    def test_resuming_an_unknown_kernel_names_those_there_are(self, checkout):
        with pytest.raises(UserError, match=FIRST):
            kernels.render(checkout, TABLE, owner=ACCOUNT, resumed=frozenset({"kdkit-09"}))


class TestOwner:
    def test_no_account_is_under_version_control(self, rendered):
        """Every rendered file names the account, so git must ignore each, and none may have been added by force."""
        git = ["git", "-C", str(ROOT)]
        tracked = subprocess.run([*git, "ls-files", "kaggle"], capture_output=True, text=True, check=False)
        if tracked.returncode:
            pytest.skip("not a git checkout")
        assert not [name for name in tracked.stdout.splitlines() if name.endswith("metadata.json")]
        written = [path.relative_to(rendered) for path in rendered.rglob("*metadata.json")]
        written += [Path("kaggle/dataset/kdkit-0.1.0-py3-none-any.whl")]
        ignored = subprocess.run(
            [*git, "check-ignore", "--no-index", *map(str, written)], capture_output=True, text=True, check=False
        )
        assert sorted(ignored.stdout.splitlines()) == sorted(map(str, written))

    def test_the_table_names_nobody(self):
        assert not re.search(r"kaggle\.com/|[\w-]+/kdkit", (ROOT / table.TABLE_FILE).read_text())

    def test_make_kaggle_without_an_owner_says_so_before_anything_is_set_up(self):
        alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "kaggle", "OWNER="]
        done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stdout.strip() == "name the Kaggle account: make kaggle OWNER=name"


def run_client(server, home, folder, *arguments):
    return subprocess.run(
        [CLIENT, *arguments], cwd=folder, env=server.environment(home), capture_output=True, text=True, check=False
    )


@pytest.fixture
def push_here(server, rendered, kdkit, monkeypatch, tmp_path):
    """`kdkit kaggle push` in this process, where the real client talks to the loopback server."""
    for name, value in server.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    client = pytest.importorskip("kaggle.api.kaggle_api_extended")
    monkeypatch.setattr(client.KaggleApi, "args", ["--local"])
    return lambda *slugs: kdkit("kaggle", "--checkout", rendered, "push", *slugs)


REFUSALS = {
    "refused": ({"error": "Notebook not found"}, "Kaggle refused the kernel: Notebook not found"),
    "no dataset": ({"versionNumber": 3, "invalidDatasetSources": ["a/b"]}, "left out the datasets a/b"),
    "no model": ({"versionNumber": 3, "invalidModelSources": ["a/b/c/d/1"]}, "left out the models a/b/c/d/1"),
    "no output": ({"versionNumber": 3, "invalidKernelSources": ["a/c"]}, "left out the kernels a/c"),
    "no tag": ({"versionNumber": 3, "invalidTags": ["x"]}, "left out the tags x"),
    "no version": ({"url": "https://kaggle.test/code/x"}, "without a version"),
}


@needs_client
class TestPush:
    @pytest.mark.parametrize("kernel", TABLE.kernels, ids=SLUGS)
    def test_the_client_takes_each_folder_as_it_stands(self, rendered, server, tmp_path, kernel):
        folder = kernels.kernel_folder(rendered, TABLE, kernel)
        done = run_client(server, tmp_path, folder, "kernels", "push")
        assert done.returncode == 0, done.stderr
        assert "does not resolve" not in done.stdout
        (sent,) = server.sent("SaveKernel")
        assert sent.pop("text")
        assert sent == {
            "slug": f"somebody/{kernel.slug}",
            "newTitle": kernel.title,
            "language": "python",
            "kernelType": "notebook",
            "isPrivate": True,
            "enableGpu": True,
            "enableTpu": False,
            "enableInternet": True,
            "machineShape": "NvidiaTeslaT4",
            "datasetDataSources": ["somebody/kdkit-wheels"],
        }

    def test_the_whole_notebook_is_sent_and_its_version_said(self, push_here, server):
        code, out, err = push_here(*SLUGS)
        assert code == 0, err
        assert out.splitlines() == [f"{slug}: version 3 runs at https://kaggle.test/code/x" for slug in SLUGS]
        for sent, kernel in zip(server.sent("SaveKernel"), TABLE.kernels, strict=True):
            ours = nbformat.read(ROOT / "notebooks" / kernel.notebook, as_version=4)
            theirs = nbformat.reads(sent["text"], as_version=4)
            assert [(c.cell_type, c.source) for c in theirs.cells] == [(c.cell_type, c.source) for c in ours.cells]
            assert theirs.metadata.kernelspec.name == "python3"

    @pytest.mark.parametrize("name", ["refused", "no dataset"])
    def test_the_client_exits_0_where_the_server_refuses_or_drops_and_we_do_not(
        self, push_here, rendered, server, tmp_path, name
    ):
        answer, message = REFUSALS[name]
        server.answers["SaveKernel"] = (200, answer)
        assert run_client(server, tmp_path, rendered / "kaggle", "kernels", "push").returncode == 0
        code, out, err = push_here(FIRST)
        assert (code, out) == (1, "")
        assert message in err
        assert f"logged in as {ACCOUNT}" in err

    def test_an_http_error_is_one_message(self, push_here, server):
        server.answers["SaveKernel"] = (403, {"code": 403, "message": "Permission denied"})
        code, _, err = push_here(FIRST)
        assert code == 1
        assert "Permission denied" in err

    def test_a_server_out_of_reach_is_one_message(self, push_here, monkeypatch):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        code, _, err = push_here(FIRST)
        assert code == 1
        assert "nothing is pushed from" in err

    def test_nobody_logged_in_is_one_message_of_the_process(self, rendered, server, tmp_path):
        command = [sys.executable, "-m", "kdkit", "kaggle", "--checkout", rendered, "push", FIRST]
        environment = server.environment(tmp_path, logged_in=False)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "kaggle auth login" in done.stderr
        assert server.requests == []


def server_answer(fields):
    return pytest.importorskip("kagglesdk.kernels.types.kernels_api_service").ApiSaveKernelResponse.from_dict(fields)


class TestFaultsOf:
    @pytest.mark.parametrize(("fields", "message"), REFUSALS.values(), ids=REFUSALS)
    def test_each_way_in_which_the_server_saves_less_than_was_sent(self, fields, message):
        (fault,) = push.faults_of(server_answer(fields))
        assert message in fault

    def test_a_saved_version_has_none(self):
        assert list(push.faults_of(server_answer({"versionNumber": 3, "invalidTags": [], "error": ""}))) == []

    def test_every_list_of_dropped_things_is_read(self):
        fields = {name for name in dir(server_answer({})) if name.startswith("invalid_")}
        assert fields == set(push.DROPPED)


class TestBeforeAPush:
    """Nothing is sent of what was not rendered from the table as it is now."""

    def push(self, kdkit, monkeypatch, root, *slugs):
        monkeypatch.setattr(push, "push_kernel", lambda folder: pytest.fail("pushed"))
        code, _, err = kdkit("kaggle", "--checkout", root, "push", *slugs)
        assert code == 2
        return err

    def test_not_rendered(self, kdkit, monkeypatch, checkout):
        assert "make kaggle OWNER=name" in self.push(kdkit, monkeypatch, checkout, FIRST)

    def test_edited_by_hand(self, kdkit, monkeypatch, rendered):
        path = rendered / "kaggle" / "kernel-metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"enable_intrenet": True, "machine_shape": "T4"}))
        err = self.push(kdkit, monkeypatch, rendered, FIRST)
        assert "(enable_intrenet, machine_shape)" in err
        assert f"make kaggle OWNER={ACCOUNT}" in err

    def test_rendered_before_the_table_changed(self, kdkit, monkeypatch, rendered):
        edit_table(rendered, lambda tree: tree["defaults"].update(enable_internet=False))
        assert "(enable_internet)" in self.push(kdkit, monkeypatch, rendered, *SLUGS)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"id": 3}'])
    def test_damaged(self, kdkit, monkeypatch, rendered, text):
        (rendered / "kaggle" / "kernel-metadata.json").write_text(text)
        assert "damaged" in self.push(kdkit, monkeypatch, rendered, FIRST)

    def test_a_notebook_that_was_run_since(self, kdkit, monkeypatch, rendered):
        edit_notebook(
            rendered / "notebooks" / TABLE.kernels[0].notebook, lambda nb: nb.cells[2].update(execution_count=1)
        )
        assert "carries outputs" in self.push(kdkit, monkeypatch, rendered, FIRST)

    def test_no_kernel_is_pushed_by_default(self, kdkit, monkeypatch, rendered):
        assert "SLUG" in self.push(kdkit, monkeypatch, rendered)

    def test_an_unknown_slug(self, kdkit, monkeypatch, rendered):
        assert FIRST in self.push(kdkit, monkeypatch, rendered, "kdkit-09")

    def test_resumed_is_what_the_table_says_too(self, rendered):
        kernels.render(rendered, TABLE, owner=ACCOUNT, resumed=frozenset({FIRST}))
        kernels.check_rendered(rendered, TABLE, TABLE.kernels[0])

    def test_without_the_client(self, monkeypatch, rendered):
        """`import kaggle` alone would find the folder kaggle/ of a checkout."""
        for name in ("kaggle", "kaggle.api.kaggle_api_extended"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=re.escape("pip install 'kdkit[kaggle]'")):
            push.push_kernel(rendered / "kaggle")


def make_wheel(folder, name, *, requires=(), python=">=3.11"):
    """A wheel with nothing but metadata."""
    distribution, number = name.split("-")[:2]
    lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {number}", f"Requires-Python: {python}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(f"{distribution}-{number}.dist-info/METADATA", "\n".join(lines) + "\n")


@needs_client
class TestDataset:
    def test_the_client_uploads_the_wheels_and_nothing_else(self, rendered, server, tmp_path):
        folder = rendered / "kaggle" / "dataset"
        for name in ("a-1.0-py3-none-any.whl", "b_c-2.0-py3-none-any.whl"):
            make_wheel(folder, name)
        server.answers |= {
            "GetDatasetStatus": (404, {"code": 404, "message": "not found"}),
            "StartBlobUpload": (200, {"token": "token", "createUrl": f"{server.address}/blob"}),
            "CreateDataset": (200, {"status": "ok", "url": "https://kaggle.test/datasets/x"}),
            "CreateDatasetVersion": (200, {"status": "ok", "url": "https://kaggle.test/datasets/x"}),
        }
        created = run_client(server, tmp_path, rendered, "datasets", "create", "-p", "kaggle/dataset")
        assert "Your private Dataset is being created" in created.stdout, created.stderr
        assert {body["name"] for body in server.sent("StartBlobUpload")} == {path.name for path in folder.glob("*.whl")}
        (sent,) = server.sent("CreateDataset")
        assert (sent["ownerSlug"], sent["slug"], sent["title"]) == (ACCOUNT, "kdkit-wheels", "kdkit wheels")
        assert (sent["isPrivate"], sent["licenseName"]) == (True, "other")
        line = ("datasets", "version", "-p", "kaggle/dataset", "-m", "second")
        assert "Dataset version is being created" in run_client(server, tmp_path, rendered, *line).stdout


IMAGE = {"numpy": "2.0.2", "PyYAML": "6.0.3"}


class TestWheelFaults:
    @pytest.mark.parametrize(
        "name",
        [
            "a-1.0-py3-none-any.whl",
            "a-1.0-cp312-cp312-manylinux_2_28_x86_64.whl",
            "a-1.0-cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        ],
    )
    def test_a_wheel_for_kaggle_that_has_what_it_needs_is_fine(self, tmp_path, name):
        needs = ["numpy>=1.26", "pyyaml", "B.C>=2.0rc1", "tomli; python_version < '3.11'", "torch; extra == 'gpu'"]
        make_wheel(tmp_path, name, requires=[*needs, "pywin32; sys_platform == 'win32'"])
        make_wheel(tmp_path, "b_c-2.0rc1-py3-none-any.whl")
        assert list(wheel_faults(tmp_path, IMAGE)) == []

    @pytest.mark.parametrize(
        "name",
        [
            "a-1.0-cp311-cp311-manylinux_2_28_x86_64.whl",
            "a-1.0-cp313-abi3-manylinux_2_28_x86_64.whl",
            "a-1.0-cp312-cp312-manylinux_2_39_x86_64.whl",
            "a-1.0-cp312-cp312-macosx_11_0_arm64.whl",
            "a-1.0-py2-none-any.whl",
        ],
    )
    def test_a_wheel_for_another_place_is_named(self, tmp_path, name):
        make_wheel(tmp_path, name)
        (fault,) = wheel_faults(tmp_path, IMAGE)
        assert fault == f"{name}: not for Python 3.12 on 64-bit Linux with glibc 2.28"

    @pytest.mark.parametrize(
        ("requirement", "has"),
        [
            ("numpy>=2.1", "has 2.0.2"),
            ("httpx2>=2", "has none"),
            ("b-c<2", "has 2.0"),
            ("x; python_version>'3.11'", "has none"),
        ],
    )
    def test_a_requirement_that_nothing_meets_is_named(self, tmp_path, requirement, has):
        make_wheel(tmp_path, "a-1.0-py3-none-any.whl", requires=[requirement])
        make_wheel(tmp_path, "b_c-2.0-py3-none-any.whl")
        (fault,) = wheel_faults(tmp_path, IMAGE)
        assert fault.startswith("a-1.0-py3-none-any.whl needs ")
        assert has in fault

    def test_a_newer_python_is_named(self, tmp_path):
        make_wheel(tmp_path, "a-1.0-py3-none-any.whl", python=">=3.13")
        assert list(wheel_faults(tmp_path, IMAGE)) == ["a-1.0-py3-none-any.whl needs Python >=3.13"]

    @pytest.mark.parametrize("name", ["a-1.0.tar.gz", "a-1.0.zip", "notes.txt"])
    def test_what_is_no_wheel_is_named(self, tmp_path, name):
        (tmp_path / name).touch()
        assert list(wheel_faults(tmp_path, IMAGE)) == [
            f"{name}: only wheels are shipped, since Kaggle unpacks archives"
        ]


class TestBuildWheelhouse:
    def test_versions_come_from_the_tested_pins(self):
        pinned = pinned_versions(ROOT / "requirements.txt")
        assert pinned["pyyaml"] == version("PyYAML")
        assert pinned["huggingface-hub"] == version("huggingface_hub")

    def test_a_wheel_without_a_version_anywhere_is_refused(self, checkout):
        edit_table(checkout, lambda tree: tree["wheels"]["registry"].append("einops"))
        with pytest.raises(UserError, match="write einops==VERSION"):
            build_wheelhouse(checkout, table.read_table(checkout), checkout / "kaggle" / "dataset")

    def test_a_folder_with_other_files_is_refused_and_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").touch()
        make_wheel(tmp_path, "old-1.0-py3-none-any.whl")
        before = files_below(tmp_path)
        with pytest.raises(UserError, match=re.escape("thesis.tex, which would be uploaded too")):
            build_wheelhouse(ROOT, TABLE, tmp_path)
        assert files_below(tmp_path) == before

    def test_where_pip_fails_the_old_wheels_stay_and_nothing_is_left_over(self, kdkit, monkeypatch, tmp_path):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        folder = tmp_path / "dataset"
        folder.mkdir()
        make_wheel(folder, "old-1.0-py3-none-any.whl")
        before = files_below(tmp_path)
        code, _, err = kdkit("kaggle", "wheels", "--output", folder)
        assert code == 1
        assert "pip wheel failed" in err
        assert files_below(tmp_path) == before
        assert list(tmp_path.iterdir()) == [folder]


def python_of_kaggle():
    """A Python 3.12 of this machine, else the one that runs the tests; wheels of the table are made for both."""
    places = [shutil.which("python3.12"), *(Path.home() / ".pyenv" / "versions").glob("3.12*/bin/python3.12")]
    for place in filter(None, places):
        if subprocess.run([place, "--version"], capture_output=True, check=False).returncode == 0:
            return place
    return sys.executable


@pytest.mark.slow
class TestWheelhouse:
    def test_it_installs_without_an_index_and_kdkit_imports(self, kdkit, tmp_path):
        folder = tmp_path / "dataset"
        folder.mkdir()
        make_wheel(folder, "old-1.0-py3-none-any.whl")
        (folder / "dataset-metadata.json").write_text("{}")
        code, out, err = kdkit("kaggle", "wheels", "--output", folder)
        assert code == 0, err
        wheels = sorted(folder.glob("*.whl"))
        assert sorted(map(Path, out.splitlines())) == wheels
        assert {path.name for path in folder.iterdir()} == {path.name for path in wheels} | {"dataset-metadata.json"}
        names = {path.name.split("-")[0] for path in wheels}
        assert {"kdkit", "rouge_score", "transformers", "huggingface_hub", "bitsandbytes"} <= names
        assert not names & {"old", "torch", "numpy", "ipywidgets"}

        subprocess.run([python_of_kaggle(), "-m", "venv", tmp_path / "venv"], check=True)
        python = tmp_path / "venv" / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links", folder]
        subprocess.run([*install, *sorted(names)], check=True)
        said = [
            subprocess.run([python, "-I", *line], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
            for line in (
                ["-m", "kdkit", "--version"],
                ["-c", "import kdkit, tokenizers, safetensors, hf_xet; print(kdkit.__file__)"],
            )
        ]
        assert said[0] == "kdkit, version 0.1.0\n"
        assert Path(said[1].strip()).is_relative_to(tmp_path / "venv")

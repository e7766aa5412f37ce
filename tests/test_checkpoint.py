import json
import shutil

import pytest

from kdkit.errors import RunFailed
from kdkit.training.checkpoint import (
    SEAL,
    check_room,
    is_whole,
    newest_checkpoint,
    publish,
    rotate,
    seal,
    write_text,
)


def make(folder, step, *, whole=True):
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 100)
    (path / "inner" / "state.json").write_text("{}")
    if whole:
        seal(path)
    return path


class TestIsWhole:
    def test_a_sealed_folder_is(self, tmp_path):
        assert is_whole(make(tmp_path, 1))

    @pytest.mark.parametrize("damage", ["unsealed", "missing", "cut short", "seal cut short", "gone"])
    def test_a_damaged_one_is_not(self, tmp_path, damage):
        path = make(tmp_path, 1, whole=damage != "unsealed")
        if damage == "missing":
            (path / "inner" / "state.json").unlink()
        elif damage == "cut short":
            (path / "model.safetensors").write_bytes(b"x" * 99)
        elif damage == "seal cut short":
            (path / SEAL).write_text((path / SEAL).read_text()[:-5])
        elif damage == "gone":
            shutil.rmtree(path)
        assert not is_whole(path)


class TestNewestCheckpoint:
    def test_goes_by_steps_as_numbers(self, tmp_path):
        for step in (9, 10, 100):
            make(tmp_path, step)
        assert newest_checkpoint(tmp_path).name == "checkpoint-100"

    def test_falls_back_past_a_damaged_one_and_says_so(self, tmp_path, caplog):
        make(tmp_path, 1)
        make(tmp_path, 2, whole=False)
        assert newest_checkpoint(tmp_path).name == "checkpoint-1"
        assert "checkpoint-2 is incomplete or damaged" in caplog.text

    def test_none_where_there_is_none(self, tmp_path):
        (tmp_path / "checkpoint-best").mkdir()
        assert newest_checkpoint(tmp_path) is None


class TestPublish:
    def test_moves_a_staged_folder_whole_over_a_leftover(self, tmp_path):
        leftover = make(tmp_path, 3, whole=False)
        (leftover / "old").touch()
        staged = make(tmp_path / ".staging", 3, whole=False)
        publish(staged, leftover)
        assert is_whole(leftover)
        assert not (leftover / "old").exists()
        assert not staged.exists()


class TestRotate:
    def test_keeps_the_newest_whole_ones(self, tmp_path):
        for step in (1, 2, 3, 4):
            make(tmp_path, step, whole=step != 4)
        rotate(tmp_path, keep=2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


class TestCheckRoom:
    def test_refuses_before_anything_is_written(self, tmp_path):
        check_room(tmp_path, 1)
        with pytest.raises(RunFailed, match=r"Nothing was written and the previous checkpoint is kept"):
            check_room(tmp_path, 2**62)


class TestWriteText:
    def test_replaces_in_one_step(self, tmp_path):
        file = tmp_path / "a.json"
        write_text(file, "1")
        write_text(file, json.dumps([2]))
        assert file.read_text() == "[2]"
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

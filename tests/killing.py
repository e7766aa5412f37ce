"""Runs in forked processes that can be killed at any change to the file system, for tests of resuming."""

import builtins
import io
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from kdkit.config import DistillConfig
from kdkit.evaluation import generation
from kdkit.training.run import run_distillation


class Reaper:
    """Counts changes of files, generations and optimizer steps; kills its process, as `kill -9` does, at one."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.count = 0

    def before(self, function: Callable) -> Callable:
        def counted(*args, **kwargs):
            self.note()
            return function(*args, **kwargs)

        return counted

    def note(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_writing(self, function: Callable) -> Callable:
        def opened(file, mode="r", *args, **kwargs):
            if any(letter in mode for letter in "wax+"):
                self.note()
            return function(file, mode, *args, **kwargs)

        return opened

    def watch(self) -> None:
        """Count from here on; for a process that ends with the run."""
        for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
            mock.patch.object(os, name, self.before(getattr(os, name))).start()
        mock.patch.object(generation, "write", self.before(generation.write)).start()
        mock.patch.object(torch, "save", self.before(torch.save)).start()
        mock.patch.object(torch.optim.AdamW, "step", self.before(torch.optim.AdamW.step)).start()
        for module in (builtins, io):
            mock.patch.object(module, "open", self.before_writing(module.open)).start()


def forked(job: Callable[[], object], *, kill_at: int | None = None) -> int | None:
    """Do a job in a child process; returns how many events it saw, or None when it was killed at one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            reaper = Reaper(kill_at)
            reaper.watch()
            job()
            os.write(writer, str(reaper.count).encode())
            status = 0
        except BaseException:  # noqa: BLE001
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert status == 0, said
    return int(said)


def run_forked(config: DistillConfig, folder: Path, *, resume: bool = False, kill_at: int | None = None) -> int | None:
    """Run in a child process; returns how many events it saw, or None when it was killed at one."""
    return forked(lambda: run_distillation(config, folder, resume=resume), kill_at=kill_at)


def run_killed_then_resumed(config: DistillConfig, folder: Path, kill_at: int) -> Path:
    """A run that is killed at an event and then resumed, or begun again where nothing had been written yet."""
    shutil.rmtree(folder, ignore_errors=True)
    assert run_forked(config, folder, kill_at=kill_at) is None
    run_forked(config, folder, resume=(folder / "config.yaml").is_file())
    return folder

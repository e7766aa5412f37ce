"""Memory measured: what comes and goes within, and nothing of what was there before."""

import sys
import time

import pytest
import torch

from kdkit.inspection import measured_peaks, memory
from kdkit.inspection.memory import watched_memory

MIB = 2**20


def fill(mebibytes: int) -> torch.Tensor:
    """A tensor whose every page has been written, there for as long as it takes to be seen."""
    tensor = torch.ones(mebibytes * MIB // 4)
    time.sleep(0.03)
    return tensor


@pytest.mark.skipif(torch.cuda.is_available(), reason="there tensors of the card are counted, not of the process")
class TestWatchedMemory:
    def test_finds_what_is_freed_again(self):
        with watched_memory() as peak:
            for size in (20, 90, 40):
                fill(size)
        assert peak.num_bytes == pytest.approx(90 * MIB, rel=0.1)

    def test_what_was_there_before_is_not_counted(self):
        held = fill(200)
        with watched_memory() as peak:
            fill(60)
        assert peak.num_bytes == pytest.approx(60 * MIB, rel=0.1)
        assert held.numel() == 200 * MIB // 4

    def test_what_was_freed_before_hides_nothing(self):
        """The allocator had kept blocks of 2 MiB, and the next ones made the process no larger."""
        before = [fill(2) for _ in range(20)]
        del before
        with watched_memory() as peak:
            now = [fill(2) for _ in range(20)]
        assert len(now) == 20
        assert peak.num_bytes == pytest.approx(40 * MIB, rel=0.1)


class TestMeasuredPeaks:
    def test_each_run_is_measured_by_itself_and_the_first_made_twice(self, monkeypatch, capsys):
        made = []

        def run(config, folder):
            made.append(config)
            print("progress", file=sys.stderr)
            assert folder.parent.is_dir()
            fill(100 if made == [30] else config)  # what is imported on the way, the first time

        monkeypatch.setattr(memory, "run_distillation", run)
        assert measured_peaks([30, 60]) == pytest.approx([30 * MIB, 60 * MIB], rel=0.1)
        assert made == [30, 30, 60]
        assert capsys.readouterr().err == ""

    def test_no_run_is_no_peak(self):
        assert measured_peaks([]) == []

"""Memory measured: what comes and goes within, and nothing of what was there before."""

import subprocess
import sys
import time

import pytest
import torch

from kdkit.inspection import measured_peaks, memory

MIB = 2**20


def fill(mebibytes: int) -> torch.Tensor:
    """A tensor whose every page has been written, there for as long as it takes to be seen."""
    tensor = torch.ones(mebibytes * MIB // 4)
    time.sleep(0.03)
    return tensor


@pytest.mark.skipif(torch.cuda.is_available(), reason="there tensors of the card are counted, not of the process")
class TestWatchedMemory:
    """Each in a process of its own: what an allocator keeps of a long life is no part of the answer."""

    @pytest.mark.parametrize(
        ("before", "watched", "expected_mib"),
        [
            ("pass", "for size in (20, 90, 40): fill(size)", 90),
            ("held = fill(200)", "fill(60)", 60),
            # the allocator had kept blocks of 2 MiB, and the next ones made the process no larger
            ("kept = [fill(2) for _ in range(20)]; del kept", "now = [fill(2) for _ in range(20)]", 40),
        ],
        ids=[
            "finds what is freed again",
            "what was there before is not counted",
            "what was freed before hides nothing",
        ],
    )
    def test_finds_the_most_that_was_added(self, before, watched, expected_mib):
        code = f"""
import torch
from kdkit.inspection.memory import watched_memory

def fill(mib):
    return torch.ones(mib * 2**20 // 4)

{before}
with watched_memory() as peak:
    {watched}
print(peak.num_bytes)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        # The system takes freed memory back in pieces: of the last case's 40 MiB up to 5 were never seen to go.
        assert int(done.stdout) == pytest.approx(expected_mib * MIB, rel=0.2)


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

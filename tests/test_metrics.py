import json
import math

import torch

from kdkit.training.metrics import MetricsFile, RunningSums


def numbers(sums):
    values, num_steps = sums.take()
    return {name: value.tolist() for name, value in values.items()}, num_steps


class TestRunningSums:
    def test_adds_micro_batches_of_a_step_and_counts_steps(self):
        sums = RunningSums()
        for value in (1.0, 2.0):
            sums.add("kd", torch.tensor(value))
        sums.complete_step()
        sums.add("kd", torch.tensor(4.0))
        sums.complete_step()
        assert numbers(sums) == ({"kd": 7.0}, 2)
        assert numbers(sums) == ({}, 0)

    def test_a_step_that_failed_leaves_no_trace(self):
        sums = RunningSums()
        sums.add("kd", torch.tensor(1.0))
        sums.complete_step()
        sums.add("kd", torch.tensor(math.nan))
        sums.forget_step()
        sums.complete_step()
        assert numbers(sums) == ({"kd": 1.0}, 1)

    def test_state_goes_through_json_bit_for_bit(self):
        sums, copy = RunningSums(), RunningSums()
        sums.add("kd", torch.tensor(0.1) / 3)
        sums.add("pair", torch.tensor([1 / 3, math.pi]))
        sums.complete_step()
        copy.restore(json.loads(json.dumps(sums.state())), torch.device("cpu"))
        assert numbers(copy) == numbers(sums)


def row(stage, step, kind="train", **figures):
    return {"kind": kind, "stage": stage, "step": step, **figures}


class TestMetricsFile:
    def test_a_line_that_a_crash_cut_off_is_left_out(self, tmp_path):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.append(row("a", 1))
        with file.path.open("a") as handle:
            handle.write('{"kind": "tra')
        assert file.rows() == [row("a", 1)]

    def test_reading_on_gives_each_row_once_and_only_when_it_is_whole(self, tmp_path):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        assert file.rows_after(0) == ([], 0)
        file.append(row("a", 1))
        rows, place = file.rows_after(0)
        with file.path.open("a") as handle:
            handle.write('{"kind": "train", "stage": "ä", ')
        assert (rows, file.rows_after(place)) == ([row("a", 1)], ([], place))
        with file.path.open("a") as handle:
            handle.write('"step": 2}\n')
        rows, place = file.rows_after(place)
        assert (rows, place) == ([row("ä", 2)], file.path.stat().st_size)

    def test_what_is_not_finite_becomes_null(self, tmp_path):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.append(row("a", 1, loss=math.nan))
        assert file.rows() == [row("a", 1, loss=None)]

    def test_cut_drops_what_came_after_the_checkpoint_and_keeps_earlier_stages(self, tmp_path):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        kept = [row("a", 5), row("a", 5, "eval"), row("b", 2), row("b", 2, "eval"), row("b", 4)]
        lost = [row("b", 4, "eval"), row("b", 6), row("c", 1)]
        for one in kept + lost:
            file.append(one)
        file.cut("b", step=4)
        assert file.rows() == kept

    def test_cut_of_a_stage_that_has_not_begun_changes_nothing(self, tmp_path):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.append(row("a", 5))
        file.cut("b", step=0)
        assert file.rows() == [row("a", 5)]

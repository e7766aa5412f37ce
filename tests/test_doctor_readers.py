"""The doctor's readers: formats as trainers write them, files of every kind, and what is none."""

import gzip
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkit.cli import cli
from kdkit.doctor import RUN_CHECKS, Trace, diagnose_run, read_traces
from kdkit.doctor.line_shape import NUMBER
from kdkit.doctor.text_log import _without_digits, read_log, read_text
from kdkit.doctor.trace import Planned
from kdkit.errors import UserError

NAN = math.nan

# Name -> text, figures of training and of evaluations as {name: {step: value}}, written by hand from the text.
FORMATS = {
    "key=value": (
        "step=10 loss=2.5 lr=1e-4\nstep=20 loss=-2.25e+00, lr=0.00e+00, grad_norm=1.5\n",
        {"loss": {10: 2.5, 20: -2.25}, "learning_rate": {10: 1e-4, 20: 0.0}, "grad_norm": {20: 1.5}},
        {},
    ),
    "a row of JSON": ('{"step": 5, "loss": 2.5, "eval_loss": 2.75}\n', {"loss": {5: 2.5}}, {"loss": {5: 2.75}}),
    "thousands, tensors and NumPy": (
        "step: 1,000, loss: tensor(2.5, device='cuda:0')\nstep: 2,000, loss: np.float64(nan)\n",
        {"loss": {1000: 2.5, 2000: NAN}},
        {},
    ),
    "colours": ("\x1b[32mINFO\x1b[0m step=10 loss=\x1b[1;31m2.5\x1b[0m\n", {"loss": {10: 2.5}}, {}),
    "DistiLLM": (
        "train | epoch   0 | Iter:     50/  5000 | global iter:     50/  5000 | loss: 2.3100 | ds_loss: 1.8000 | "
        "lr: 1.0000e-05 | scale:     1.0000 | micro time: 0.512 | step time: 1.024\n"
        "dev | avg_loss: 2.5 | {'exact_match': 0.6, 'rougeL': 21.6}\n",
        {
            "loss": {50: 2.31},
            "part/kd": {50: 1.8},
            "learning_rate": {50: 1e-5},
            "loss_scale": {50: 1.0},
            "step_seconds": {50: 1.024},
        },
        {"loss": {50: 2.5}, "exact_match": {50: 0.6}, "rouge_l": {50: 21.6}},
    ),
    "transformers 4, which names no step": (
        "{'loss': 2.3101, 'grad_norm': 1.25, 'learning_rate': 2e-05, 'epoch': 0.1}\n"
        "{'loss': 2.2, 'grad_norm': nan, 'learning_rate': 1.5e-05, 'epoch': 0.2}\n"
        "{'eval_loss': 2.1, 'eval_rougeL': 21.3, 'eval_gen_len': 40.5, 'eval_runtime': 12.3, 'epoch': 0.2}\n"
        "{'train_runtime': 100.2, 'train_samples_per_second': 5.1, 'train_loss': 2.25, 'epoch': 0.2}\n",
        {
            "loss": {1: 2.3101, 2: 2.2},
            "grad_norm": {1: 1.25, 2: NAN},
            "learning_rate": {1: 2e-5, 2: 1.5e-5},
            "epoch": {1: 0.1, 2: 0.2},
        },
        {"loss": {2: 2.1}, "rouge_l": {2: 21.3}, "mean_tokens": {2: 40.5}, "epoch": {2: 0.2}},
    ),
    "transformers 5 between its progress bars": (
        "  0%|          | 0/500 [00:00<?, ?it/s]\r 10%|█         | 50/500 [00:10<01:30,  5.00it/s]"
        "{'loss': '2.31', 'learning_rate': '2e-05', 'epoch': '0.1'}\n"
        "\r  0%|          | 0/16 [00:00<?, ?it/s]\r 75%|███████▌  | 12/16 [00:01<00:00, 10.0it/s]\n"
        "{'eval_loss': '2.1', 'epoch': '0.1'}\n"
        "Map: 100%|██████████| 1000/1000 [00:20<00:00, 50.0it/s]\n"
        "\r 20%|██        | 100/500 [00:20<13:20,  2.00s/it]\r{'loss': '2.2', 'epoch': '0.2'}\n",
        {
            "loss": {50: 2.31, 100: 2.2},
            "learning_rate": {50: 2e-5},
            "epoch": {50: 0.1, 100: 0.2},
            "steps_per_second": {50: 5.0},
            "step_seconds": {100: 2.0},
        },
        {"loss": {50: 2.1}, "epoch": {50: 0.1}},
    ),
    "progress bars of epochs": (
        "Epoch 1/3:  10%|#         | 50/500 [00:10<01:30,  5.00it/s, loss=2.5]\n"
        "Epoch 2/3:  20%|##        | 100/500 [00:10<01:30,  5.00it/s, loss=2.25]\n",
        {"loss": {50: 2.5, 600: 2.25}, "steps_per_second": {50: 5.0, 600: 5.0}},
        {},
    ),
    "the table of a notebook": (
        "Step\tTraining Loss\tValidation Loss\tRougel\n100\tNo log\t2.41\t20.1\n200\t2.31\t2.2\t21.0\n",
        {"loss": {200: 2.31}},
        {"loss": {100: 2.41, 200: 2.2}, "rouge_l": {100: 20.1, 200: 21.0}},
    ),
    "the same, copied as columns": (
        "Step Training Loss Validation Loss\n100 2.5 2.41\n200 2.31 nan\nwords between\n300 2 2\n",
        {"loss": {100: 2.5, 200: 2.31, 300: 2.0}},
        {"loss": {100: 2.41, 200: NAN, 300: 2.0}},
    ),
    "Markdown": (
        "| Training Loss | Epoch | Step  | Validation Loss |\n|:---:|:---:|:---:|:---:|\n"
        "| No log        | 0.5   | 1,000 | 2.41            |\n| 2.31          | 1.0   | 2,000 | ~2.2            |\n",
        {"loss": {2000: 2.31}, "epoch": {1000: 0.5, 2000: 1.0}},
        {"loss": {1000: 2.41, 2000: 2.2}},
    ),
    "CSV with empty cells": (
        "epoch,step,train_loss,val_loss,lr\n0,10,2.5,,1e-4\n0,20,,2.45,\n1,30,nan,,-3e-4\n",
        {"loss": {10: 2.5, 30: NAN}, "learning_rate": {10: 1e-4, 30: -3e-4}, "epoch": {10: 0, 20: 0, 30: 1}},
        {"loss": {20: 2.45}},
    ),
    "CSV in quotes": ('"Step","my run - train/loss"\n"10","2.5"\n"20","2.25"\n', {"loss": {10: 2.5, 20: 2.25}}, {}),
    "CSV without steps": (
        "epoch,loss,val_loss\n0,2.5,2.75\n1,2.25,2.5\n",
        {"loss": {1: 2.5, 2: 2.25}, "epoch": {1: 0.0, 2: 1.0}},
        {"loss": {1: 2.75, 2: 2.5}},
    ),
    "words without a sign between": (
        "step 250: train loss 2.3101, val loss 2.4501\niter 260: loss 2.2001, time 35.20ms, mfu 3.2%\n",
        {"loss": {250: 2.3101, 260: 2.2001}},
        {"loss": {250: 2.4501}},
    ),
    "Megatron": (
        " iteration      100/  500000 | elapsed time per iteration (ms): 1234.5 | learning rate: 1.500E-04 | "
        "lm loss: 6.7E+00 | loss scale: 1.0 | grad norm: 1.23 |\n",
        {"learning_rate": {100: 1.5e-4}, "loss": {100: 6.7}, "loss_scale": {100: 1.0}, "grad_norm": {100: 1.23}},
        {},
    ),
    "Megatron's evaluation": (
        " validation loss at iteration 500 | lm loss value: 2.0E+00 | lm loss PPL: 7.389056E+00 |\n",
        {},
        {"cross_entropy": {500: 2.0}, "perplexity": {500: 7.389056}},
    ),
    "DeepSpeed, whose rates are a list": (
        "[INFO] [logging.py:96:log_dist] [Rank 0] step=10, skipped=3, lr=[2e-05, 1e-05], mom=[(0.9, 0.95)]\n",
        {"learning_rate": {10: 2e-5}},
        {},
    ),
    "counts in brackets, and a figure after an exponent": (
        "Epoch [1/3] Step [20/2000] Loss: 2.5 LR: 1.0e-05 Grad Norm: 0.75\n",
        {"loss": {20: 2.5}, "learning_rate": {20: 1e-5}, "grad_norm": {20: 0.75}},
        {},
    ),
    "Lightning": (
        "epoch,lr-AdamW,step,train_loss_epoch,train_loss_step,val_loss\n,1e-4,49,,,\n0,,49,,2.5,\n0,,99,2.4,,2.25\n",
        {"learning_rate": {49: 1e-4}, "loss": {49: 2.5}, "epoch": {49: 0, 99: 0}},
        {"loss": {99: 2.25}},
    ),
    "fastai, with times": (
        "epoch     train_loss  valid_loss  time    \n0         2.500000    2.750000    01:10   \n"
        "1         2.250000    2.500000    1:01:10\n",
        {"loss": {1: 2.5, 2: 2.25}, "epoch": {1: 0.0, 2: 1.0}},
        {"loss": {1: 2.75, 2: 2.5}},
    ),
    "transformers without its bar, placed by epochs": (
        "  Num Epochs = 2\n  Total optimization steps = 500\n{'loss': 2.5, 'epoch': 0.04}\n"
        "{'eval_loss': 2.25, 'epoch': 0.04}\n{'loss': 2.0, 'epoch': 2.0}\n",
        {"loss": {10: 2.5, 500: 2.0}, "epoch": {10: 0.04, 500: 2.0}},
        {"loss": {10: 2.25}, "epoch": {10: 0.04}},
    ),
    "fairseq": (
        "| epoch 001:    100 / 5000 loss=9.1, ppl=295.1, wps=10000, gnorm=1.2, lr=0.0001, num_updates=100\n",
        {"loss": {100: 9.1}, "perplexity": {100: 295.1}, "grad_norm": {100: 1.2}, "learning_rate": {100: 1e-4}},
        {},
    ),
    "a post-mortem's curriculum": (
        "[CURRICULUM] Step 1000 (4.0%): kd=0.700, feat=0.000, attn=0.000\n[TOTAL] Loss: 29.0376, Components: 6\n"
        "  kd_loss: 27.4571\n  routing_load_balance_loss: 0.0002\n  lm_loss: 1.5804\n"
        "[Eval] loss: 28.56, ppl: ~2.3e12\n",
        {
            "weight/kd": {1000: 0.7},
            "weight/hidden": {1000: 0.0},
            "weight/attention": {1000: 0.0},
            "loss": {1000: 29.0376},
            "part/kd": {1000: 27.4571},
            "part/load_balance": {1000: 0.0002},
            "part/lm": {1000: 1.5804},
        },
        {"loss": {1000: 28.56}, "perplexity": {1000: 2.3e12}},
    ),
    "a post-mortem's bare losses": (
        "Step 0:   28.19\nStep 100: 22.34  (-21%)\nStep 600: KD Raw: 38.3527, Temperature²: 9.0\n"
        "[Warning] Loss 28.41 too high for meaningful perplexity (capped at 20)\n",
        {"loss": {0: 28.19, 100: 22.34}, "part/kd": {600: 38.3527}, "kd_temperature": {600: 3.0}},
        {},
    ),
}


def as_dict(figures) -> dict[str, dict[int, float]]:
    return {name: dict(zip(s.steps.tolist(), s.values.tolist(), strict=True)) for name, s in figures.items()}


def all_of(trace: Trace) -> tuple:
    """What can be compared; NaN is text here."""
    return repr(as_dict(trace.train)), repr(as_dict(trace.evals)), trace.events, trace.planned, trace.num_lines


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def read_one(file: Path) -> Trace:
    (trace,) = read_traces(file).values()
    return trace


class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    def test_every_figure_is_at_its_step(self, name: str) -> None:
        text, train, evals = FORMATS[name]
        trace = read_text(text, source="log")
        for found, expected in ((trace.train, train), (trace.evals, evals)):
            assert {name: len(series) for name, series in found.items()} == {n: len(v) for n, v in expected.items()}
            assert {name: pytest.approx(values, nan_ok=True) for name, values in expected.items()} == as_dict(found)

    @pytest.mark.parametrize(
        ("text", "planned"),
        [
            ("Iter:  50/ 7140 | global iter:  50/ 7140 | loss: 2.3", Planned(num_steps=7140)),
            (
                "[Scheduler] Total batches: 75,000\n[Scheduler] Gradient accumulation: 16\n"
                "[Scheduler] Optimizer steps: 4,687\n[Scheduler] Warmup steps: 468 (10.0%)",
                Planned(num_steps=4687, num_batches=75_000, accumulation=16, warmup_steps=468),
            ),
            (
                "  Gradient Accumulation steps = 4\n  Total optimization steps = 500\n"
                " 1%| | 5/600 [00:01<02:00, 5it/s]",
                Planned(num_steps=500, accumulation=4),
            ),
            (
                "TrainingArguments(lr_scheduler_type=SchedulerType.COSINE, max_steps=500, warmup_steps=50)",
                Planned(num_steps=500, warmup_steps=50, scheduler="cosine"),
            ),
            ("  lr_decay_style .................. linear\n", Planned(scheduler="linear")),
        ],
    )
    def test_what_was_planned(self, text: str, planned: Planned) -> None:
        assert read_text(text, source="log").planned == planned

    def test_settings_are_no_events(self) -> None:
        """A log that began with its settings had counted as stopped early, and as not finite."""
        text = "on_nonfinite: stop\nearly_stopping_patience: 10\n'early_stopping': None\nloss: 2.0\n"
        text += "EarlyStopping counter: 3 out of 7\nEarly stopping enabled with patience 7\n"
        assert read_text(text, source="log").events == []

    def test_events_name_line_and_step(self) -> None:
        text = "CUDA out of memory\nstep 5\r loss: 2\nValueError: no\nEarly stopping: no improvement in 10\n"
        events = [(event.kind, event.step, event.line) for event in read_text(text, source="log").events]
        assert events == [("out_of_memory", None, 1), ("failure", 5, 3), ("early_stop", 5, 4)]

    def test_a_second_run_in_the_log_may_be_shorter(self) -> None:
        trace = read_text("iter 90/ 100 loss: 3\niter 10/ 50 loss: 2\nstep 3/16 of eval\nloss: 1\n", source="log")
        assert as_dict(trace.train) == {"loss": {10: 1.0, 90: 3.0}}

    def test_what_came_before_any_step_is_at_step_0(self) -> None:
        trace = read_text("loss: 5\nloss: 4\nstep 7\nloss: 3\n", source="log")
        assert trace.train["loss"].steps.tolist() == [0, 0, 7]


class TestShapes:
    ANY_LINE = st.text(st.sampled_from("0123456789.,eE+-:= loss|%\r\n") | st.characters(codec="utf-8"), max_size=60)

    @settings(max_examples=300, derandomize=True, deadline=None)
    @given(ANY_LINE)
    def test_a_shape_has_as_many_numbers_as_its_lines(self, line: str) -> None:
        shape = _without_digits(line.encode()).decode()
        assert len(NUMBER.findall(shape)) == len(NUMBER.findall(line))

    @settings(max_examples=50, derandomize=True, deadline=None)
    @given(st.sampled_from(sorted(FORMATS)), st.data())
    def test_blocks_change_nothing(self, name: str, data: st.DataObject) -> None:
        lines = FORMATS[name][0].encode().splitlines(keepends=True)
        at = data.draw(st.integers(0, len(lines)))
        blocks = [b"".join(lines[:at]), b"".join(lines[at:])]
        assert all_of(read_log(blocks, source="log")) == all_of(read_text(FORMATS[name][0], source="log"))

    def test_many_shapes_and_long_lines(self) -> None:
        """A model's own text is a shape of its own at every line, and a progress bar may be one line of megabytes."""
        words = "".join(f"step {n} loss: {n} {chr(97 + n % 26) * (n // 26)}\n" for n in range(2000))
        long = "x" * 3_000_000 + "\nstep 5000 loss: 1" + "\r step 5001 loss: 2" * 50_000
        trace = read_text(words + long, source="log")
        assert len(trace.train["loss"]) == 52_001 - 1 + 1
        assert trace.num_lines == 2002


LOG = "step=10 loss=2.5\nstep=20 loss=2.25\n"


class TestFiles:
    @pytest.mark.parametrize(
        "content",
        [
            LOG.encode(),
            LOG.replace("\n", "\r\n").encode(),
            gzip.compress(LOG.encode(), mtime=0),
            LOG.encode("utf-8-sig"),
            LOG.encode("utf-16"),
            gzip.compress(LOG.encode("utf-16"), mtime=0),
            b"\xff\xfe" + LOG.encode("utf-16-le"),
            b"\xfe\xff" + LOG.encode("utf-16-be"),
            b"broken \xe2\x96 bytes\n" + LOG.encode(),
        ],
    )
    def test_text_is_read_however_it_is_stored(self, content: bytes, tmp_path: Path) -> None:
        assert as_dict(read_one(write(tmp_path, "log", content)).train) == {"loss": {10: 2.5, 20: 2.25}}

    def test_a_cut_gzip_is_read_to_its_cut(self, tmp_path: Path) -> None:
        text = "".join(f"step {n} loss {n % 7}.{n * n % 1009}\n" for n in range(20_000))
        whole = gzip.compress(text.encode())
        losses = read_one(write(tmp_path, "log.gz", whole[: len(whole) // 2])).train["loss"]
        assert 5_000 < len(losses) < 15_000

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "is no text: it holds NUL bytes"),
            ("log.gz", b"\x1f\x8bjunk of more bytes", "cannot be read: Unknown compression method"),
            ("log.gz", gzip.compress(b"loss: 2\n", mtime=0)[:-8] + b"12345678", "cannot be read: CRC check failed"),
            ("log.txt", b"", "names no figure"),
            ("trainer_state.json", b"\xff\xff", "list log_history"),
            ("trainer_state.json", b"[" * 100_000, "list log_history"),
            ("metrics.jsonl", b"{" * 1000, "names no figure"),
        ],
    )
    def test_what_cannot_be_read_is_said(self, name: str, content: bytes, said: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=said):
            read_traces(write(tmp_path, name, content))

    def test_places_that_cannot_be_looked_at(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot be looked at"):
            read_traces(tmp_path / ("x" * 5000))
        with pytest.raises(UserError, match="there is no file"):
            read_traces(Path("\0"))

    def test_a_file_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise PermissionError(13, "Permission denied")

        file = write(tmp_path, "metrics.jsonl", '{"step": 1, "loss": 2}')
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=r"cannot be read: .*Permission denied"):
            read_traces(file)

    def test_the_newest_checkpoint_of_a_folder(self, tmp_path: Path) -> None:
        for step in (5, 10, 9):
            (tmp_path / f"checkpoint-{step}").mkdir()
            state = json.dumps({"log_history": [{"step": step, "loss": 2.0}]})
            write(tmp_path / f"checkpoint-{step}", "trainer_state.json", state)
        assert read_one(tmp_path).last_step == 10


class TestRows:
    def test_a_trainer_state(self, tmp_path: Path) -> None:
        state = """{"best_metric": 2.1, "max_steps": 30, "log_history": [
            {"step": 10, "loss": 2.5, "grad_norm": NaN, "learning_rate": 1e-4},
            {"eval_loss": 2.75, "eval_rougeL": 20, "eval_runtime": 1.5},
            {"step": 20, "loss": Infinity, "note": "x", "flag": true, "list": [1]},
            {"step": 20, "train_runtime": 9.5, "train_loss": 2.25}, 7]}"""
        trace = read_one(write(tmp_path, "trainer_state.json", state))
        assert trace.planned == Planned(num_steps=30)
        assert repr(as_dict(trace.train)) == repr(
            {"loss": {10: 2.5, 20: math.inf}, "grad_norm": {10: NAN}, "learning_rate": {10: 1e-4}}
        )
        assert as_dict(trace.evals) == {"loss": {10: 2.75}, "rouge_l": {10: 20.0}, "runtime": {10: 1.5}}

    def test_rows_of_other_trainers(self, tmp_path: Path) -> None:
        rows = '{"global_step": 10.0, "train/loss": 2.5}\n{"global_step": 20, "eval/loss": 2.75, "val_ppl": null}\n'
        trace = read_one(write(tmp_path, "log.jsonl", rows))
        assert as_dict(trace.train) == {"global_step": {10: 10.0, 20: 20.0}, "loss": {10: 2.5}}
        assert repr(as_dict(trace.evals)) == repr({"loss": {20: 2.75}, "perplexity": {20: NAN}})

    def test_columns_hold_the_order_of_steps(self, tmp_path: Path) -> None:
        rows = [
            {"step": step, "kind": "train", "stage": "a", "loss": loss} for step, loss in ((2, 1.0), (1, 2), (2, None))
        ]
        trace = read_one(write(tmp_path, "metrics.jsonl", "\n".join(map(json.dumps, rows))))
        assert trace.train["loss"].steps.tolist() == [1, 2, 2]
        assert repr(trace.train["loss"].values.tolist()) == "[2.0, 1.0, nan]"

    def test_changes_by_hand_are_no_figures(self, tmp_path: Path) -> None:
        rows = [
            {"kind": kind, "stage": "a", "step": 1, "loss": loss} for kind, loss in (("train", 2.0), ("change", 9.0))
        ]
        file = write(tmp_path, "metrics.jsonl", "\n".join(map(json.dumps, rows)))
        assert as_dict(read_one(file).train) == {"loss": {1: 2.0}}

    @pytest.mark.parametrize(
        "config",
        [
            b"!!int ''",
            b"a: !!timestamp x",
            b"a: !!bool x",
            b"[" * 5000,
            b"\xff\0",
            b"- 1",
            b"optim: 3",
            b"a: 1:" * 99,
            b"optim: {max_steps: -3, scheduler: [1]}\nstages: {a: {optim: null}}",
            b"? {a: b}\n: c",
            b"&a [*a]",
        ],
    )
    def test_a_config_that_is_junk_counts_as_none(self, config: bytes, tmp_path: Path) -> None:
        write(tmp_path, "config.yaml", config)
        rows = write(tmp_path, "metrics.jsonl", '{"kind": "train", "stage": "a", "step": 1, "loss": 2.0}')
        assert read_one(rows).planned == Planned()

    def test_a_stage_overrides_the_config(self, tmp_path: Path) -> None:
        config = "optim: {max_steps: 9, scheduler: linear, accumulation: 4}\nstages: {a: {optim: {max_steps: 5}}}"
        write(tmp_path, "config.yaml", config)
        rows = write(tmp_path, "metrics.jsonl", '{"kind": "train", "stage": "a", "step": 1, "loss": 2.0}')
        assert read_one(rows).planned == Planned(num_steps=5, scheduler="linear", accumulation=4)


# --- whatever a file may hold ---------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 1, 2, 50, -1, 2**53, 2**70, -(10**400), 10**400, 1e308, -1e308, 5e-324, NAN, math.inf])
FIGURE_NAMES = """step loss learning_rate grad_norm part/kd weight/kd weight/lm perplexity rouge_l cross_entropy
exact_match update_norm eval_loss eval_rougeL memory/used_fraction seconds rollout/threshold mean_tokens ended_fraction
tokens_per_second train_runtime kd_temperature"""
NAMES = st.sampled_from(FIGURE_NAMES.split())
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)


def mostly(good: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(st.integers(0, 9), good, JUNK).map(lambda drawn: drawn[2] if drawn[0] == 9 else drawn[1])


STEPS = mostly(st.integers(0, 400) | st.integers(-5, 5))
ROW = st.builds(
    lambda figures, step, kind, stage: figures | {"step": step, "kind": kind, "stage": stage},
    st.dictionaries(NAMES, mostly(NUMBERS | st.floats()), max_size=10),
    STEPS,
    mostly(st.sampled_from(["train", "eval"])),
    mostly(st.sampled_from(["a", "a", "b", None])),
)
RUN = st.lists(ROW, max_size=12)
WORDS = st.sampled_from(
    ["step", "loss", "lr", "eval_loss:", "rougeL", "ppl=", "kd_loss: ", "[CURRICULUM] kd=", "[dev]"]
)
SIGNS = st.sampled_from(["=", ": ", " | ", ",", "\t", "\r", "\n", "\n", "²", "\x1b[31m", "\0", "é", "١٢"])
VALUES = st.sampled_from(
    ["nan", "-inf", "1e999", "-1e-999", "9" * 400, "2.5", "0", "1,2,3\n", "(0.99)", "adaptive_threshold: 1"]
)
LINES = st.sampled_from(
    ["Step 7:", "iter 9/ 90", "global iter: 3/7", "{'loss': '2.3'}", "12%|# | 5/9 [0:1<0:2, 3.1it/s]", "max_steps=10\n"]
) | st.sampled_from(
    ["Epoch 3: 1%|#| 2/3 [", "Step,loss,lr\n", "| Step | loss | ppl |\n", "High GPU memory", "out of memory"]
)
PIECES = WORDS | SIGNS | VALUES | LINES | st.sampled_from(["Early stopping!", "Total batches: ", "scheduler: cosine"])
TEXT = st.lists(PIECES | st.text(max_size=6) | NUMBERS.map(str), max_size=40).map("".join)
CONTENT = st.one_of(
    st.tuples(
        st.sampled_from(["log.txt", "log.csv", "log", "a.jsonl"]), TEXT.map(lambda t: t.encode(errors="replace"))
    ),
    st.tuples(st.sampled_from(["log.txt", "metrics.jsonl", "trainer_state.json", "x.gz"]), st.binary(max_size=200)),
    st.tuples(
        st.just("metrics.jsonl"), RUN.map(lambda rows: "\n".join(map(json.dumps, rows)).encode(errors="replace"))
    ),
    st.tuples(
        st.just("trainer_state.json"),
        st.builds(lambda rows, steps: {"log_history": rows, "max_steps": steps}, mostly(RUN), STEPS)
        .map(json.dumps)
        .map(lambda t: t.encode(errors="replace")),
    ),
)
STORED = st.sampled_from(
    [lambda b: b, lambda b: b, gzip.compress, lambda b: b.decode(errors="replace").encode("utf-16")]
)
CONFIG = (
    st.none() | st.binary(max_size=60) | JUNK.map(lambda tree: json.dumps({"optim": tree, "stages": tree}).encode())
)


ANY_RUN = st.tuples(CONTENT, STORED, st.just(1.0) | st.floats(0, 1), CONFIG, st.sampled_from([(), ("--json",)]))


def outcome_of(folder: Path, case: tuple) -> bool:
    """Whether a run has a diagnosis, from the command and from the library; else it ends in one message."""
    (name, content), stored, kept_fraction, config, options = case
    whole = stored(content)
    file = write(folder, name, whole[: math.ceil(kept_fraction * len(whole))])
    (folder / "config.yaml").unlink(missing_ok=True)
    if config is not None:
        write(folder, "config.yaml", config)
    result = CliRunner().invoke(cli, ["doctor", str(file), *options])
    if isinstance(result.exception, UserError):
        return False
    assert isinstance(result.exception, SystemExit | None), result.exc_info
    diagnosis = diagnose_run(file)
    assert len(diagnosis.codes) + len(diagnosis.passed) + len(diagnosis.skipped) == len(RUN_CHECKS)
    assert result.exit_code == int(diagnosis.num_failures > 0)
    return True


class TestJunk:
    def test_ends_in_a_diagnosis_or_one_message(self, tmp_path: Path) -> None:
        outcomes = []

        @settings(max_examples=200, derandomize=True, deadline=None)
        @given(ANY_RUN)
        def check(case: tuple) -> None:
            with warnings.catch_warnings(action="error"):
                outcomes.append(outcome_of(tmp_path, case))

        check()
        assert 0.05 < np.mean(outcomes) < 0.95  # both are seen


class TestLightness:
    """As in an environment that holds NumPy, click and PyYAML alone."""

    CODE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"click", "kdkit", "numpy", "yaml"} and not top.startswith("_"):
            raise ModuleNotFoundError(f"there is no {name} here", name=name)

sys.meta_path.insert(0, Refuse())
sys.argv = ["kdkit", "doctor", sys.argv[1]]
from kdkit.cli import main
main()
"""

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("log.txt", LOG),
            ("metrics.jsonl", '{"kind": "train", "stage": "a", "step": 1, "loss": 2.0}'),
            ("trainer_state.json", '{"log_history": [{"step": 1, "loss": 2.0}]}'),
        ],
    )
    def test_needs_nothing_else(self, name: str, content: str, tmp_path: Path) -> None:
        write(tmp_path, "config.yaml", "optim: {max_steps: 5}")
        command = [sys.executable, "-c", self.CODE, str(write(tmp_path, name, content))]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, "")
        assert "0 fail" in run.stdout

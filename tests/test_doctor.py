"""The doctor of runs: what the five post-mortems logged is named, healthy runs are left alone, junk is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdkit.cli import cli
from kdkit.doctor import RUN_CHECKS, Diagnosis, diagnose_run
from kdkit.doctor.readers import read_text
from kdkit.errors import UserError

# Each in the format and with the numbers of its post-mortem, and what of it is a fault.
LOGS = {
    "000": (
        """
train | epoch   0 | Iter:    100/  7140 | global iter:    100/  7140 | loss: 8.1000 | ds_loss: 1.8000 | lr: 5.0000e-04
dev | global iter: 200 | avg_loss: 3.1 | {'exact_match': 2.8, 'rougeL': 21.8068} | adaptive_threshold: 0.0
train | epoch   1 | Iter:    400/  7140 | global iter:    400/  7140 | loss: 20.1000 | ds_loss: 4.8000 | lr: 4.9000e-04
dev | global iter: 400 | avg_loss: 3.4 | {'exact_match': 0.4, 'rougeL': 12.1} | adaptive_threshold: 0.1
train | epoch   2 | Iter:    800/  7140 | global iter:    800/  7140 | loss: 39.5000 | ds_loss: 9.8000 | lr: 4.8000e-04
dev | global iter: 800 | avg_loss: 3.9 | {'exact_match': 0.0, 'rougeL': 6.2} | adaptive_threshold: 0.5
train | epoch   3 | Iter:   1200/  7140 | global iter:   1200/  7140 | loss: 47.0000 | ds_loss: 11.8000 | lr: 4.6000e-04
dev | global iter: 1200 | avg_loss: 4.4 | {'exact_match': 0.0, 'rougeL': 6.0} | adaptive_threshold: 0.8
""",
        {"KD208", "KD214", "KD215"},
    ),
    "001": (
        """
[Scheduler] Total batches: 75,000
[Scheduler] Gradient accumulation: 16
Step 999: loss=21.5475, lr=0.00e+00
Step 1000: loss=101.3997, ppl=485165195.41, kd=21.1447, feature=40.7860, attention=0.4858
[Warning] High GPU memory usage detected (0.96)
Step 1999: loss=21.6245, lr=0.00e+00
Step 2000: loss=101.3997, ppl=485165195.41, kd=21.1447, feature=40.7860, attention=0.4858
Step 2154: [Warning] lm_loss produced non-finite value (nan); clamping to zero.
Step 2999: loss=21.6569, lr=0.00e+00
Step 3000: loss=101.3997, ppl=485165195.41, kd=21.1447, feature=40.7860, attention=0.4858
[Warning] High GPU memory usage detected (0.98)
Step 3475: loss=21.1665, lr=0.00e+00
""",
        {"KD201", "KD203", "KD204", "KD206", "KD207", "KD209", "KD211"},
    ),
    "002": (
        """
Step 0: KD Raw: 37.3485
Step 499: eval_loss: 51.7094, ppl: 485165195.41
[CURRICULUM] Step 1000 (4.0%): kd=0.700, feat=0.000, attn=0.000, layer=0.000, contr=0.000
[TOTAL] Loss: 29.0376, Components: 6
Step 1000: KD Raw: 39.2245, lr=0.000e+00
Step 999: eval_loss: 51.7094, ppl: 485165195.41
""",
        {"KD203", "KD204", "KD207", "KD210"},
    ),
    "003": (
        "".join(
            f"Step {step}: kd_loss: {30 + step % 10}, feature_loss: {150 + step % 50}, "
            f"attention_loss: {90 + step % 50}\n" + 35 * "[DEBUG] layer ok\n"
            for step in range(300, 1500)
        )
        + "Early stopping: no improvement in 10 evaluations\n"
        "RuntimeError: mat1 and mat2 must have the same dtype, but got Half and Float\n",
        {"KD207", "KD212", "KD216", "KD217"},
    ),
    "004": (
        """
Step 0:   28.19
Step 100: 22.34  (-21%)
Step 0:   KD Raw: 38.0254, Temperature²: 9.0
Step 100: KD Raw: 28.6117, Temperature²: 9.0
Step 436: [Warning] lm_loss produced non-finite value (nan); clamping to zero.
Step 600: KD Raw: 38.3527, Temperature²: 9.0
Step 600: 28.34  (+42%)
[Eval] loss: 28.4074, ppl: 485165195.41
""",
        {"KD204", "KD206", "KD207"},
    ),
}
HEALTHY = """
train | epoch   0 | Iter:   100/ 7140 | global iter:   100/ 7140 | loss: 2.9000 | ds_loss: 1.8000 | lr: 5.0000e-04
dev | global iter: 500 | avg_loss: 3.1 | {'exact_match': 2.1, 'rougeL': 21.0}
train | epoch   1 | Iter:  1000/ 7140 | global iter:  1000/ 7140 | loss: 2.4000 | ds_loss: 1.5000 | lr: 4.0000e-04
dev | global iter: 1000 | avg_loss: 3.0 | {'exact_match': 2.6, 'rougeL': 21.5}
train | epoch   2 | Iter:  2000/ 7140 | global iter:  2000/ 7140 | loss: 2.1000 | ds_loss: 1.3000 | lr: 3.0000e-04
train | epoch   3 | Iter:  3000/ 7140 | global iter:  3000/ 7140 | loss: 1.9000 | ds_loss: 1.2000 | lr: 2.0000e-04
dev | global iter: 3000 | avg_loss: 2.9 | {'exact_match': 2.8, 'rougeL': 21.8}
"""


def diagnose(folder: Path, text: str, name: str = "log.txt") -> Diagnosis:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return diagnose_run(file)


def run_of(folder: Path, *, num_rows: int = 30, **figures: object) -> Diagnosis:
    """A metrics.jsonl of one stage that goes well but for the figures given, each a function of 0..1 over the run."""
    healthy = {"loss": lambda at: 4 - 2 * at, "learning_rate": lambda at: 1e-3 * (1 - at), "grad_norm": lambda at: 1.0}
    rows = []
    for index in range(num_rows):
        at = index / (num_rows - 1)
        row = {name: figure(at) for name, figure in (healthy | figures).items() if not name.startswith("eval_")}
        rows.append({"kind": "train", "stage": "distill", "step": 10 * index} | row)
        measured = {name[5:]: figure(at) for name, figure in figures.items() if name.startswith("eval_")}
        if measured and index % 3 == 2:
            rows.append({"kind": "eval", "stage": "distill", "step": 10 * index} | measured)
    return diagnose(folder, "".join(json.dumps(row) + "\n" for row in rows), "metrics.jsonl")


class TestPostMortems:
    @pytest.mark.parametrize("number", LOGS)
    def test_every_fault_is_named(self, number: str, tmp_path: Path) -> None:
        text, faults = LOGS[number]
        assert diagnose(tmp_path, text).codes == faults

    def test_the_run_that_was_hoped_for_is_left_alone(self, tmp_path: Path) -> None:
        diagnosis = diagnose(tmp_path, HEALTHY)
        assert not diagnosis.findings
        assert {"KD201", "KD203", "KD207", "KD208", "KD209", "KD214", "KD215"} <= set(diagnosis.passed)

    def test_a_learning_rate_of_zero_is_what_froze_the_evaluation(self, tmp_path: Path) -> None:
        frozen = next(f for f in diagnose(tmp_path, LOGS["001"][0]).findings if f.code == "KD203")
        assert "101.4 at steps 1000 and 2000" in frozen.evidence
        assert "the learning rate is 0 all along" in frozen.evidence

    def test_a_small_learning_rate_is_not_zero(self, tmp_path: Path) -> None:
        log = "".join(f"Step {step}: loss={9 - step / 100}, lr={2.01e-5:.3e}\n" for step in range(100, 500, 50))
        assert not diagnose(tmp_path, log).findings


class TestChecks:
    def test_a_healthy_run(self, tmp_path: Path) -> None:
        healthy = run_of(tmp_path, eval_rouge_l=lambda at: 20 * at, eval_exact_match=lambda at: 5 * at)
        assert not healthy.findings

    def test_a_schedule_made_for_forward_passes(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("optim: {scheduler: linear, max_steps: 290}")
        assert not run_of(tmp_path).findings
        stretched = run_of(tmp_path, learning_rate=lambda at: 1e-3 * (1 - at / 16))
        assert stretched.codes == {"KD202"}

    def test_a_kept_result_is_told_from_a_student_that_does_not_learn(self, tmp_path: Path) -> None:
        kept = run_of(tmp_path, update_norm=lambda at: 0.1, eval_loss=lambda at: 3.0)
        assert "kept result" in kept.findings[0].evidence
        still = run_of(tmp_path, update_norm=lambda at: 0.0, eval_loss=lambda at: 3.0)
        assert "nothing was learnt" in still.findings[0].evidence

    def test_a_perplexity_of_the_total_loss(self, tmp_path: Path) -> None:
        right = {"eval_cross_entropy": lambda at: 3 - at, "eval_perplexity": lambda at: np.exp(3 - at)}
        assert not run_of(tmp_path, **right).findings
        assert run_of(tmp_path, **right | {"eval_perplexity": lambda at: np.exp(5 - at)}).codes == {"KD205"}

    def test_a_nan_names_what_was_before_it(self, tmp_path: Path) -> None:
        broken = run_of(tmp_path, loss=lambda at: None if at > 0.5 else 4 - at)
        (finding,) = broken.findings
        assert finding.code == "KD206"
        assert "15 log rows, first at step 150; before it loss 3.517, grad_norm 1" in finding.evidence

    @pytest.mark.parametrize("lost_at", [4, 9])
    def test_a_collapse_is_named_within_two_evaluations(self, lost_at: int, tmp_path: Path) -> None:
        history = [{"step": 10 * n, "eval_rougeL": 20.0 if n < lost_at else 15.9} for n in range(lost_at + 2)]
        found = diagnose(tmp_path, json.dumps({"log_history": history}), "trainer_state.json")
        assert found.codes == {"KD214"}
        assert f"15.9 at step {10 * lost_at + 10}" in found.findings[0].evidence
        once = diagnose(tmp_path, json.dumps({"log_history": history[:-1]}), "trainer_state.json")
        assert not once.findings

    def test_changing_weights_make_losses_incomparable(self, tmp_path: Path) -> None:
        grown = {"loss": lambda at: 1 + 9 * at, "weight/lm": lambda at: at}
        diagnosis = run_of(tmp_path, **grown)
        assert not diagnosis.findings
        assert "KD208" in diagnosis.skipped

    def test_codes_are_in_order_and_say_all(self) -> None:
        codes = [check.code for check in RUN_CHECKS]
        assert codes == [f"KD{201 + index}" for index in range(len(codes))]
        assert all(check.symptom and check.cause and check.fix and check.source for check in RUN_CHECKS)


class TestReading:
    def test_stages_are_told_apart(self, tmp_path: Path) -> None:
        rows = [
            {"kind": "train", "stage": stage, "step": step, "loss": 2.0, "learning_rate": rate}
            for stage, rate in (("first", 0.1), ("second", 0.0))
            for step in (1, 2, 3)
        ]
        (finding,) = diagnose(tmp_path, "\n".join(map(json.dumps, rows)), "metrics.jsonl").findings
        assert (finding.code, finding.stage) == ("KD201", "second")

    def test_figures_of_a_distillm_line(self) -> None:
        trace = read_text(LOGS["000"][0], source="log")
        assert trace.train["part/kd"].values.tolist() == [1.8, 4.8, 9.8, 11.8]
        assert trace.train["learning_rate"].steps.tolist() == [100, 400, 800, 1200]
        assert trace.evals["rouge_l"].values.tolist() == [21.8068, 12.1, 6.2, 6.0]

    def test_a_cut_last_line_is_passed_over(self, tmp_path: Path) -> None:
        row = json.dumps({"kind": "train", "stage": "a", "step": 1, "loss": 2.0})
        assert not diagnose(tmp_path, f"{row}\n{row[:20]}", "metrics.jsonl").findings

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("log.txt", "nothing to see", "names no figure"),
            ("metrics.jsonl", "", "names no figure"),
            ("trainer_state.json", "[1, 2", "list log_history"),
            ("trainer_state.json", '{"log_history": 3}', "list log_history"),
        ],
    )
    def test_what_is_no_log_is_refused(self, name: str, text: str, said: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=said):
            diagnose(tmp_path, text, name)

    def test_what_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no run"):
            diagnose_run(tmp_path)
        with pytest.raises(UserError, match="there is no file"):
            diagnose_run(tmp_path / "absent.txt")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["step", "loss", "a"]), inner),
    max_leaves=8,
)
ROW = st.dictionaries(
    st.sampled_from(
        ["kind", "stage", "step", "loss", "part/kd", "learning_rate", "eval_loss", "rouge_l", "perplexity"]
    ),
    JUNK | st.sampled_from(["train", "eval", "distill", 1, 2, 3, 1e308, -1e308, 10**400]),
)
WORDS = st.lists(
    st.sampled_from(["step", "Step 7", "loss", "=", ":", "nan", "1e999", "9" * 400, "ppl", "eval", "[", "rougeL", "\n"])
    | st.text(max_size=6),
    max_size=30,
).map(" ".join)
ANY_FILE = st.one_of(
    st.tuples(st.just("log.txt"), st.binary(max_size=300) | WORDS.map(lambda text: text.encode("utf-8", "replace"))),
    st.tuples(
        st.just("metrics.jsonl"),
        st.lists(ROW, max_size=8).map(lambda rows: "\n".join(map(json.dumps, rows)).encode("utf-8", "replace")),
    ),
    st.tuples(
        st.just("trainer_state.json"),
        st.lists(ROW | JUNK, max_size=8).map(lambda rows: json.dumps({"log_history": rows}).encode("utf-8", "replace")),
    ),
)


class TestJunk:
    @settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(ANY_FILE)
    def test_never_ends_in_a_traceback(self, tmp_path: Path, file: tuple[str, bytes]) -> None:
        name, content = file
        (tmp_path / name).write_bytes(content)
        try:
            diagnosis = diagnose_run(tmp_path / name)
        except UserError:
            return
        assert len(diagnosis.codes) + len(diagnosis.passed) + len(diagnosis.skipped) == len(RUN_CHECKS)


class TestCommand:
    def test_failures_end_in_exit_code_1(self, tmp_path: Path) -> None:
        (tmp_path / "log.txt").write_text(LOGS["001"][0])
        result = CliRunner().invoke(cli, ["doctor", str(tmp_path / "log.txt")])
        assert result.exit_code == 1
        assert "fail  KD201 learning rate is 0" in result.output
        assert "6 fail, 2 warn, " in result.output

    def test_json(self, tmp_path: Path) -> None:
        (tmp_path / "log.txt").write_text(HEALTHY)
        result = CliRunner().invoke(cli, ["doctor", str(tmp_path / "log.txt"), "--json"])
        assert result.exit_code == 0
        assert json.loads(result.output)["counts"]["fail"] == 0

    def test_needs_neither_torch_nor_the_config(self) -> None:
        code = "import sys, kdkit.doctor; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert loaded.stdout.strip() == "[]"

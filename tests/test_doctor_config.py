"""kdkit doctor CONFIG: every check by its fault, silence on what is well, and fixes that hold."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkit.cli import cli
from kdkit.config import demo_folder, list_presets, load_config
from kdkit.doctor.config import CONFIG_CHECKS, diagnose_config, fix_config
from kdkit.doctor.config.names import DISTILLM_KEYS, USUAL_KEYS
from kdkit.doctor.findings import Severity
from kdkit.errors import UserError
from kdkit.memory.cards import CARDS, card_of_budget
from kdkit.memory.planning import plan_run

T4 = CARDS["t4"]
DEMO_PAIR = (
    "teacher.path=${demo}/teacher",
    "student.path=${demo}/student",
    "data.train=${demo}/train.jsonl",
    "data.validation=${demo}/validation.jsonl",
    "data.template=plain",
    "data.max_prompt_length=192",
)
SEED_001 = {
    "num_epochs": 3,
    "max_train_samples": 50000,
    "batch_size": 2,
    "gradient_accumulation_steps": 16,
    "scheduler_type": "cosine",
    "num_training_steps": 75000,
    "warmup_steps": 1000,
    "learning_rate": 3e-05,
    "max_length": 384,
    "temperature": 3.0,
    "alpha_kd": 0.7,
    "alpha_feature": 0.1,
    "alpha_attention": 0.1,
    "alpha_layerwise": 0.05,
    "alpha_contrastive": 0.05,
    "attention_layers": 2,
    "eval_steps": 1000,
    "early_stopping_patience": 3,
    "seed": 42,
}
"""The config of post-mortem 001: 25,000 batches an epoch, warm-up and schedule counted in them."""
SEED_004 = SEED_001 | {"temperature": 4.0, "min_temperature": 2.0, "num_training_steps": 4687, "warmup_steps": 468}
SEED_000 = """#! /bin/bash
BATCH_SIZE=8
GRAD_ACC=1
OPTS=""
OPTS+=" --batch-size ${BATCH_SIZE}"
OPTS+=" --gradient-accumulation-steps ${GRAD_ACC}"
OPTS+=" --train-num 10000 --epochs 20"
OPTS+=" --warmup-iters 0"
OPTS+=" --save-interval -1"
OPTS+=" --eval-interval -1"
# OPTS+=" --type fkl"
OPTS+=" --type adaptive-srkl-dtw"
OPTS+=" --student-gen"
OPTS+=" --init-threshold 0.0"
OPTS+=" --loss-eps 0.1"
"""
SEED_000_ADVICE = SEED_000.replace("threshold 0.0", "threshold 0.7").replace("eps 0.1", "eps 0.01")
SEED_000_ADVICE = SEED_000_ADVICE.replace("eval-interval -1", "eval-interval 1").replace(
    "save-interval -1", "save-interval 2"
)


def found(source: str | Path, *overrides: str, **options: object) -> dict[str, Severity]:
    """Code -> severity of all findings."""
    options = {"card": T4} | options
    diagnosis = diagnose_config(str(source), overrides, **options)  # type: ignore[arg-type]
    return {finding.code: finding.severity for finding in reversed(diagnosis.findings)}


def written(folder: Path, content: str | Mapping[str, object], name: str = "config.json") -> Path:
    """A file of another trainer."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
    return path


class TestFaults:
    """One fault each, in a config that is well without it."""

    @pytest.mark.parametrize(
        ("code", "severity", "overrides"),
        [
            ("KD102", "fail", ["optim.warmup_steps=300"]),
            ("KD102", "warn", ["optim.warmup_steps=60"]),
            ("KD102", "warn", ["optim.warmup_fraction=0"]),
            ("KD102", "warn", ["optim.scheduler=constant"]),
            ("KD126", "warn", ["optim.learning_rate=0.03"]),
            ("KD126", "fail", ["optim.learning_rate=0.9"]),
            ("KD104", "warn", ["objective.kd.weight=30"]),
            ("KD104", "warn", ["objective.lm.weight=0.001"]),
            ("KD105", "warn", ["objective.kd.temperature=3"]),
            ("KD105", "warn", ["objective.kd.temperature=2", "objective.kd.temperature_scaling=none"]),
            ("KD106", "warn", ["objective.kd.temperature={start: 1.5, end: 2.0}"]),
            ("KD106", "warn", ["objective.kd.temperature=0.5"]),
            ("KD107", "fail", ["objective.kd.loss=reverse_kl"]),
            ("KD107", "warn", ["objective.kd.loss=skew_reverse_kl", "student.from_scratch=false"]),
            ("KD107", "fail", ["rollout.mode=on_policy", "rollout.max_new_tokens=32"]),
            ("KD108", "fail", ["data.max_length=40", "data.max_prompt_length=35"]),
            ("KD108", "warn", ["data.max_prompt_length=35"]),
            ("KD109", "warn", ["objective.kd.top_k=4"]),
            ("KD109", "warn", ["objective.kd.top_k=100000"]),
            ("KD111", "warn", ["optim.precision=bfloat16"]),
            ("KD111", "warn", ["teacher.quantization=nf4", "teacher.dtype=float16", "optim.precision=float32"]),
            ("KD112", "fail", ["objective.attention.weight=0.1"]),
            ("KD112", "fail", ["teacher.attention=flash_attention_2"]),
            ("KD115", "fail", ["data.template=chat"]),
            ("KD116", "fail", ["objective.layerwise={weight: 0.1, num_pairs: 50}"]),
            ("KD117", "fail", ["objective.routing.weight=0.05"]),
            ("KD118", "warn", ["rollout={mode: mixed, guard: null, max_new_tokens: 32}"]),
            ("KD119", "warn", ["rollout={mode: adaptive, threshold: 0.7, max_new_tokens: 32}"]),
            ("KD119", "warn", ["rollout={mode: adaptive, loss_epsilon: 0.01, max_new_tokens: 32}"]),
            ("KD120", "warn", ["evaluation.every_steps=0"]),
            ("KD120", "warn", ["evaluation.every_steps=200"]),
            ("KD120", "warn", ["evaluation.generate_rows=5"]),
            ("KD121", "warn", ["evaluation={every_steps: 1, generate_rows: 200}"]),
            ("KD122", "warn", ["evaluation={every_steps: 5, generate_rows: 30, early_stopping: {patience: 2}}"]),
            ("KD123", "fail", ["data.validation=${demo}/train.jsonl"]),
            ("KD124", "warn", ["optim={max_steps: 1000000, batch_size: 64}"]),
            ("KD124", "warn", ["checkpoint.every_steps=1"]),
        ],
    )
    def test_it_is_named(self, code: str, severity: str, overrides: list[str]) -> None:
        assert found("demo", *overrides)[code] == severity

    def test_memory_of_a_small_card(self) -> None:
        assert found("demo", card=card_of_budget(0.1))["KD110"] == "fail"

    def test_bfloat16_where_there_are_units_for_it(self) -> None:
        assert "KD111" not in found("demo", "optim.precision=bfloat16", card=CARDS["l4"])

    def test_tokenizers_that_differ_with_nothing_but_kd(self) -> None:
        assert "KD113" not in found("demo-moe")
        assert found("demo-moe", "objective.span.weight=0")["KD113"] == "warn"

    def test_rows_that_are_shared_by_name(self, tmp_path: Path) -> None:
        rows = "data.train=some/rows#train[100:]", "data.validation=some/rows#train[:200]"
        evidence = [f.evidence for f in diagnose_config("demo", rows, card=T4).findings if f.code == "KD123"]
        assert evidence == ["data.validation and data.train share rows 100 to 200 of some/rows"]
        apart = "data.train=some/rows#train[200:]", "data.validation=some/rows#train[:200]"
        assert "KD123" not in found("demo", *apart, "data.test=null")

    def test_rows_that_are_shared_by_their_prompts(self, tmp_path: Path) -> None:
        lines = (demo_folder() / "train.jsonl").read_text().splitlines(keepends=True)
        other = written(tmp_path, "".join(lines[:30]), "other.jsonl")
        assert found("demo", f"data.validation={other}")["KD123"] == "warn"

    def test_memory_that_the_planner_calls_fitting_is_no_fault(self) -> None:
        used = plan_run(load_config("demo"), T4).worst.used_fraction * T4.memory_gib
        assert "KD110" not in found("demo", card=card_of_budget(used / 0.91))
        assert found("demo", card=card_of_budget(used / 0.93))["KD110"] == "fail"

    def test_few_answers_where_nobody_knows_the_steps(self, tmp_path: Path) -> None:
        overrides = ["data.train=hub/rows", "evaluation={every_steps: 10, generate_rows: 5}"]
        assert found("demo", *overrides)["KD120"] == "warn"

    def test_shared_prompts_beside_rows_that_are_not_here(self, tmp_path: Path) -> None:
        """What was seen before a check lacked something was lost."""
        copied = tmp_path / "copied.jsonl"
        copied.write_bytes((demo_folder() / "train.jsonl").read_bytes())
        assert found("demo", f"data.validation={copied}", "data.test=hub/rows")["KD123"] == "warn"

    def test_what_fits_says_its_price(self) -> None:
        (finding,) = (f for f in diagnose_config("demo", card=card_of_budget(0.1)).findings if f.code == "KD110")
        assert finding.evidence.endswith("and no settings fit")

    def test_each_check_has_been_seen_to_fire(self) -> None:
        cases = next(mark for mark in self.test_it_is_named.pytestmark if mark.name == "parametrize").args[1]  # type: ignore[attr-defined]
        elsewhere = {"KD101", "KD103", "KD110", "KD113", "KD114", "KD125"}
        assert {case[0] for case in cases} | elsewhere == {check.code for check in CONFIG_CHECKS}


class TestHealthy:
    """Nothing where nothing is wrong."""

    @pytest.mark.parametrize("preset", ["demo", "demo-moe", "gpt2-dolly", "moe-smollm", "qwen-smollm"])
    def test_whole_presets(self, preset: str) -> None:
        assert found(preset) == {}

    @pytest.mark.parametrize("preset", sorted(set(list_presets()) - {"demo", "demo-moe"}))
    def test_presets_on_the_demo_have_no_failure(self, preset: str) -> None:
        if preset in ("gpt2-dolly", "moe-smollm", "qwen-smollm"):
            pytest.skip("a pair of its own")
        assert set(found(preset, *DEMO_PAIR)) <= {"KD120"}

    def test_a_stage_says_which_one_it_is(self) -> None:
        stages = "stages={warm_start: {}, distill: {objective: {kd: {temperature: 3.0}}}}"
        (finding,) = diagnose_config("demo", [stages], card=T4).findings
        assert finding.stage == "distill"
        assert finding.patch == {"stages.distill.objective.kd.temperature": 2.0}

    def test_what_all_stages_share_is_said_once(self) -> None:
        stages = "stages={warm_start: {}, distill: {}}"
        (finding,) = diagnose_config("demo", [stages, "objective.kd.temperature=3"], card=T4).findings
        assert finding.stage is None
        assert finding.patch == {"objective.kd.temperature": 2.0}


class TestOtherTrainers:
    """The configs of the post-mortems."""

    def test_001(self, tmp_path: Path) -> None:
        path = written(tmp_path, SEED_001)
        assert found(path) == {"KD102": "warn", "KD103": "fail", "KD105": "warn"}
        (warmup,) = (f for f in diagnose_config(str(path), card=T4).findings if f.code == "KD102")
        assert warmup.evidence == "1,000 of 4,689 optimizer steps are warm-up, 21.3%"

    def test_what_was_read_is_said(self, tmp_path: Path) -> None:
        path = written(tmp_path, {"lr": 1e-4, "temperature": 2.0, "unknown": 3, "seed": 1})
        read = diagnose_config(str(path), card=T4).read
        assert read.startswith("in kdkit's terms: optim.learning_rate=0.0001, objective.kd.temperature")
        assert "unknown" not in read

    def test_004(self, tmp_path: Path) -> None:
        assert found(written(tmp_path, SEED_004)) == {"KD105": "warn"}

    def test_004_healed_as_it_says_itself(self, tmp_path: Path) -> None:
        assert found(written(tmp_path, SEED_004 | {"temperature": 2.0, "min_temperature": 1.5})) == {}

    def test_003_pairs_a_deeper_student_and_another_tokenizer(self, tmp_path: Path) -> None:
        models = {
            "teacher_model": str(demo_folder() / "moe_teacher"),
            "student_model": str(demo_folder() / "deep_student"),
        }
        assert found(written(tmp_path, SEED_004 | {"temperature": 2.0, "min_temperature": 1.5} | models)) == {
            "KD113": "fail",
            "KD116": "warn",
        }

    def test_000(self, tmp_path: Path) -> None:
        assert found(written(tmp_path, SEED_000, "train.sh")) == {"KD102": "warn", "KD107": "fail", "KD118": "warn"}

    def test_000_with_the_settings_that_it_advises(self, tmp_path: Path) -> None:
        codes = found(written(tmp_path, SEED_000_ADVICE, "train.sh"))
        assert set(codes) == {"KD102", "KD107", "KD118", "KD119", "KD121", "KD124"}

    def test_an_interval_of_minus_one_is_an_epoch_for_distillm_and_never_for_others(self, tmp_path: Path) -> None:
        assert "KD120" not in found(written(tmp_path, SEED_000, "train.sh"))
        assert (
            found(written(tmp_path, SEED_001 | {"eval_steps": -1, "early_stopping_patience": None}))["KD120"] == "warn"
        )

    def test_arguments_that_distillm_saved(self, tmp_path: Path) -> None:
        saved = {"type": "adaptive-srkl", "student_gen": True, "warmup_iters": 100, "epochs": 3, "train_num": 9000}
        assert found(written(tmp_path, saved, "args.json")) == {"KD107": "fail", "KD118": "warn"}

    def test_hf_arguments(self, tmp_path: Path) -> None:
        given = {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "num_train_epochs": 1,
            "bf16": True,
        }
        given |= {"warmup_steps": 100, "learning_rate": 1e-4, "save_steps": 0, "student_dtype": "float16", "seed": 1}
        assert found(written(tmp_path, given), num_rows=3200) == {"KD102": "fail", "KD111": "warn", "KD124": "warn"}
        half = given | {"bf16": False, "fp16": True, "warmup_steps": 10, "save_steps": 50}
        assert found(written(tmp_path, half), num_rows=3200) == {"KD111": "fail"}

    def test_what_hf_overrules_or_leaves_open_is_no_fault(self, tmp_path: Path) -> None:
        given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_train_epochs": 1.0}
        given |= {"max_steps": 5000, "warmup_steps": 0, "warmup_ratio": 0.1, "eval_steps": 0.1, "save_steps": 0.1}
        given |= {"max_grad_norm": 0, "max_length": None}
        assert found(written(tmp_path, given), num_rows=3200) == {}
        given |= {"eval_strategy": "epoch", "eval_steps": None, "warmup_steps": 0.1, "warmup_ratio": None}
        assert found(written(tmp_path, given), num_rows=3200) == {}

    def test_temperature_of_trl_gkd_is_that_of_sampling(self, tmp_path: Path) -> None:
        assert found(written(tmp_path, {"temperature": 0.9, "lmbda": 0.5, "seed": 1})) == {}

    def test_flags_of_hf_have_underscores_and_quotes(self, tmp_path: Path) -> None:
        flags = '--learning_rate "5e-5" --per_device_train_batch_size=8 --gradient_accumulation_steps 4 --bf16'
        path = written(tmp_path, f"python train.py {flags} --num_train_epochs 1 --warmup_steps '100'\n", "train.sh")
        (warmup, dtype) = diagnose_config(str(path), card=T4, num_rows=3200).findings
        assert warmup.evidence.startswith("100 of 100 optimizer steps are warm-up")
        assert dtype.code == "KD111"

    def test_a_variable_that_the_script_does_not_set_is_no_value(self, tmp_path: Path) -> None:
        script = "python train.py --lr ${LR:-5e-4} --batch-size $1 --epochs 3 --seed 1\n"
        assert found(written(tmp_path, script, "train.sh")) == {}

    @pytest.mark.parametrize("text", ["optimizer: {type: AdamW}\nlr: 1\n1: 2\n", "type: srkl\nlr: 1\n1: 2\n"])
    def test_keys_that_are_no_words(self, tmp_path: Path, text: str) -> None:
        assert "KD126" in found(written(tmp_path, text, "other.yaml"))  # lr: 1 is read all the same

    def test_a_type_of_optimizer_is_none_of_distillm(self, tmp_path: Path) -> None:
        assert found(written(tmp_path, {"optimizer": {"type": "AdamW"}, "lr": 0.001})) == {"KD125": "warn"}

    def test_padding_that_is_the_end_of_text(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(demo_folder() / "teacher")
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(tmp_path / "student")
        models = {
            "teacher_model": str(demo_folder() / "teacher"),
            "student_model": str(tmp_path / "student"),
            "seed": 1,
        }
        assert found(written(tmp_path, models)) == {"KD114": "warn"}

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            # 8000 rows x 3 epochs / (2 x 4) = 3000 steps
            (
                "axolotl.yaml",
                "micro_batch_size: 2\ngradient_accumulation_steps: 4\nnum_epochs: 3\nwarmup_steps: 1000\n",
                "1,000 of 3,000",
            ),
            # 8000 / (8 x 8) = 125; a batch of the evaluation is none of training
            (
                "torchtune.yaml",
                "seed: null\nepochs: 1\nbatch_size: 8\ngradient_accumulation_steps: 8\neval: {batch_size: 2}\n"
                "lr_scheduler: {num_warmup_steps: 100}\n",
                "100 of 125",
            ),
            # `data` is a part of kdkit's too; 8000 x 3 / (2 x 16) = 750
            (
                "hydra.yaml",
                "training:\n  batch_size: 2\n  gradient_accumulation_steps: 16\n  epochs: 3\n"
                "  scheduler: {type: cosine, warmup_steps: 700}\ndistill: {alpha_kd: 1}\ndata: {max_length: 512}\n",
                "700 of 750",
            ),
            # on two cards, 8000 x 3 / (2 x 4 x 16) = 187.5; no rest is left out, so that an epoch has 63
            (
                "hf.sh",
                "bs=${1:-4}\nN=$bs\naccelerate launch --num_processes 2 run.py --per_device_train_batch_size=$N \\\n"
                '  --gradient_accumulation_steps "16" --num_train_epochs 3 --warmup_steps 180 "${@:2}"\n',
                "180 of 189",
            ),
        ],
    )
    def test_warm_up_in_the_words_of_others(self, tmp_path: Path, name: str, text: str, said: str) -> None:
        findings = diagnose_config(str(written(tmp_path, text, name)), card=T4, num_rows=8000).findings
        assert {f.code for f in findings} - {"KD125"} == {"KD102"}
        assert said in next(f.evidence for f in findings if f.code == "KD102")

    def test_a_variable_that_nobody_sets_is_no_fault(self, tmp_path: Path) -> None:
        script = "python train.py --learning_rate $1 --num_epochs ${EPOCHS} --seed 1 --batch_size 4\n"
        assert found(written(tmp_path, script, "train.sh")) == {}

    def test_what_to_set_has_the_name_of_the_file(self, tmp_path: Path) -> None:
        patches = [f.patch for f in diagnose_config(str(written(tmp_path, SEED_001)), card=T4).findings]
        assert patches == [{"num_training_steps": 4689}, {"warmup_steps": 469}, {"temperature": 2.0}]

    def test_rows_are_asked_for_only_where_they_help(self, tmp_path: Path) -> None:
        skipped = diagnose_config(str(written(tmp_path, {"warmup_steps": 9, "seed": 1})), card=T4, num_rows=80).skipped
        assert "optim.batch_size" in skipped["KD102"]

    def test_values_that_nobody_can_mean_and_no_seed(self, tmp_path: Path) -> None:
        path = written(tmp_path, {"learning_rate": -1, "temperature": "hot", "batch_size": 0, "max_length": 64})
        assert found(path) == {"KD101": "fail", "KD125": "warn"}
        evidence = [f.evidence for f in diagnose_config(str(path), card=T4).findings if f.code == "KD101"]
        assert [text.partition(":")[0] for text in evidence] == [
            "optim.learning_rate=-1",
            "optim.batch_size=0",
            "objective.kd.temperature='hot'",
        ]

    def test_null_is_not_set(self, tmp_path: Path) -> None:
        assert found(written(tmp_path, {"learning_rate": None, "teacher_model": None, "seed": 1})) == {}

    @pytest.mark.parametrize("text", ["{}", "[1, 2]", '{"unknown": 1}', "null", "3"])
    def test_a_file_without_settings_is_refused(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(UserError):
            diagnose_config(str(written(tmp_path, text)), card=T4)


class TestFix:
    """Corrected, in its own format, and for good."""

    @pytest.mark.parametrize(
        ("name", "content"),
        [("000.sh", SEED_000), ("advice.sh", SEED_000_ADVICE), ("001.json", SEED_001), ("004.json", SEED_004)],
    )
    def test_post_mortems_have_no_failure_left(self, tmp_path: Path, name: str, content: str) -> None:
        path = written(tmp_path, content, name)
        fixed = fix_config(str(path), card=T4)
        assert fixed.difference
        assert fixed.diagnosis.num_failures == 0
        again = fix_config(str(written(tmp_path, fixed.text, f"fixed-{name}")), card=T4)
        assert (again.text, again.difference) == (fixed.text, "")

    def test_values_of_001(self, tmp_path: Path) -> None:
        fixed = json.loads(fix_config(str(written(tmp_path, SEED_001)), card=T4).text)
        assert fixed == SEED_001 | {"num_training_steps": 4689, "warmup_steps": 469, "temperature": 2.0}

    def test_values_of_004(self, tmp_path: Path) -> None:
        fixed = json.loads(fix_config(str(written(tmp_path, SEED_004)), card=T4).text)
        assert fixed == SEED_004 | {"temperature": 2.0, "min_temperature": 1.5}

    def test_a_script_keeps_its_lines(self, tmp_path: Path) -> None:
        fixed = fix_config(str(written(tmp_path, SEED_000, "train.sh")), card=T4).text
        changed = SEED_000.replace("adaptive-srkl-dtw", "srkl-dtw").replace("warmup-iters 0", "warmup-iters 2500")
        assert fixed == changed

    def test_a_variable_is_changed_where_it_is_set(self, tmp_path: Path) -> None:
        script = SEED_000.replace('" --warmup-iters 0"', '" --warmup-iters ${WARM}"').replace("GRAD", "WARM=0\nGRAD", 1)
        fixed = fix_config(str(written(tmp_path, script, "train.sh")), card=T4).text
        assert "WARM=2500" in fixed
        assert "--warmup-iters ${WARM}" in fixed

    def test_a_switch_goes_away(self, tmp_path: Path) -> None:
        """`False` had been written onto the flag, which the next round then did not know any more."""
        script = "python train.py --learning_rate 1e-4 --bf16 --seed 1\n"
        fixed = fix_config(str(written(tmp_path, script, "train.sh")), card=T4)
        assert fixed.text == script.replace("--bf16", "")
        assert fixed.diagnosis.findings == []

    def test_yaml_of_others_keeps_all_but_the_value(self, tmp_path: Path) -> None:
        text = "# mine\ntrain: {kd_temperature: 4.0, lr: 5e-5}  # hot\nseed: 1\nlist:\n    - 'a'\nshuffle: True\n"
        fixed = fix_config(str(written(tmp_path, text, "other.yaml")), card=T4)
        assert fixed.text == text.replace("4.0", "2.0")

    def test_comments_stay(self, tmp_path: Path) -> None:
        text = "# mine\npreset: demo  # short\noptim:\n  warmup_steps: 100  # too long?\n"
        fixed = fix_config(str(written(tmp_path, text, "mine.yaml")), card=T4)
        assert fixed.text == text.replace("100", "25 ")
        assert [finding.code for finding in fixed.mended] == ["KD102"]

    def test_comments_and_indentation_of_another_trainers_file_stay(self, tmp_path: Path) -> None:
        text = "train:\n    warmup_steps: 400  # too long?\n    max_steps: 500\n    seed: 1\n"
        fixed = fix_config(str(written(tmp_path, text, "other.yaml")), card=T4)
        assert fixed.text == text.replace("400", "50")

    def test_json_stays_json(self, tmp_path: Path) -> None:
        own = {"preset": "demo", "optim": {"warmup_steps": 100}}
        fixed = fix_config(str(written(tmp_path, own)), card=T4)
        assert json.loads(fixed.text) == own | {"optim": {"warmup_steps": 25}}

    def test_a_switch_is_taken_out(self, tmp_path: Path) -> None:
        script = "python train.py --bf16 --batch_size 8 --seed 1\n"
        fixed = fix_config(str(written(tmp_path, script, "train.sh")), card=T4)
        assert fixed.text.split() == script.replace("--bf16 ", "").split()

    def test_a_schedule_of_set_takes_the_place_of_the_file_s(self, tmp_path: Path) -> None:
        text = "preset: demo\nobjective: {kd: {temperature: {start: 2, end: 1.5, begin: 0.5}}}\n"
        above = "objective.kd.temperature={start: 2.5, end: 2}"
        fixed = fix_config(str(written(tmp_path, text, "mine.yaml")), [above], card=T4)
        assert yaml.safe_load(fixed.text)["objective"]["kd"]["temperature"] == {"start": 2.5, "end": 2}

    @pytest.mark.parametrize("text", ["- a\n", "", "preset: demo\nseed: 1\nseed: 2\noptim: {warmup_fraction: 0}\n"])
    def test_what_cannot_be_changed_is_one_message(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(UserError):
            fix_config(str(written(tmp_path, text, "mine.yaml")), ["student.revision=x"], card=T4)

    def test_a_stage_that_is_well_does_not_change(self, tmp_path: Path) -> None:
        text = """preset: demo
stages:
  first: {}
  second: {objective: {kd: {weight: 1.0}, lm: {weight: 9.0}}, evaluation: {early_stopping: {patience: 1}}}
"""
        path = written(tmp_path, text, "mine.yaml")
        before, fixed = load_config(path), fix_config(str(path), ["objective.kd.temperature=3"], card=T4)
        after = load_config(yaml.safe_load(fixed.text))
        assert fixed.diagnosis.findings == []
        assert after.objective.kd.temperature.start == 2.0  # which both stages take from the base
        assert after.objective.weights == before.objective.weights
        assert after.evaluation == before.evaluation
        second = after.stages["second"]["objective"]
        assert (second["kd"]["weight"], second["lm"]["weight"]) == (0.1, 0.9)  # type: ignore[index,call-overload]

    def test_a_warm_start_leaves_the_other_stages(self, tmp_path: Path) -> None:
        """It took the place of all of them, and of what the first one sets."""
        stages = {"warm_start": {"objective": {"kd": {"loss": "reverse_kl"}}}, "last": {"optim": {"epochs": 1.0}}}
        path = written(tmp_path, yaml.safe_dump({"preset": "demo", "stages": stages}, sort_keys=False), "mine.yaml")
        fixed = load_config(yaml.safe_load(fix_config(str(path), card=T4).text)).stages
        assert list(fixed) == ["warm_start_first", "warm_start", "last"]
        assert {name: fixed[name] for name in stages} == stages

    def test_a_part_that_one_stage_alone_has(self, tmp_path: Path) -> None:
        """Patience went to the base, which has no evaluations to wait for, and the config was refused."""
        stage = "{evaluation: {every_steps: 5, early_stopping: {}}}"
        text = f"preset: demo\nevaluation: {{every_steps: 0}}\nstages:\n  main: {stage}\n"
        fixed = fix_config(str(written(tmp_path, text, "mine.yaml")), ["optim.max_steps=500"], card=T4)
        assert yaml.safe_load(fixed.text)["stages"]["main"]["evaluation"]["early_stopping"] == {"patience": 20}

    def test_evaluations_that_are_rare_and_dear_take_fewer_rows(self) -> None:
        dear = ["optim.max_steps=100", "evaluation={every_steps: 10, generate_rows: 5000, max_new_tokens: 128}"]
        (finding,) = diagnose_config("demo", dear, card=T4).findings
        assert (finding.code, list(finding.patch)) == ("KD121", ["evaluation.generate_rows"])
        assert fix_config("demo", dear, card=T4).diagnosis.findings == []

    def test_a_ramp_of_experts_stays_a_ramp(self) -> None:
        asked = ["objective.routing={weight: 0.05, num_experts: {start: 1, end: 64}}"]
        experts = yaml.safe_load(fix_config("demo-moe", asked, card=T4).text)["objective"]["routing"]["num_experts"]
        assert experts["start"] == 1 < experts["end"] < 64

    def test_a_missing_warm_start_comes_first(self) -> None:
        fixed = fix_config("demo", ["objective.kd.loss=reverse_kl"], card=T4)
        assert list(load_config(yaml.safe_load(fixed.text)).stages) == ["warm_start", "distill"]
        assert fixed.diagnosis.findings == []

    def test_a_warm_start_comes_first_before_the_stages_of_a_preset_too(self, tmp_path: Path) -> None:
        """It was merged behind them, and the fixes undid each other."""
        text = "preset: [demo, srkl]\nstages:\n  # mine\n  warm_start: {objective: {kd: {weight: 1.0}}}  # why\n"
        fixed = fix_config(str(written(tmp_path, text, "mine.yaml")), card=T4)
        assert list(load_config(yaml.safe_load(fixed.text)).stages) == ["warm_start_first", "warm_start", "distill"]
        assert fixed.diagnosis.findings == []
        assert "# why" in fixed.text

    @pytest.mark.parametrize("name", ["results/gpt2/train/init/gpt2-base", "gpt2-dolly-sft", "SmolLM2-135M-Instruct"])
    def test_a_student_that_was_tuned_needs_no_warm_start(self, tmp_path: Path, name: str) -> None:
        script = SEED_000 + f'OPTS+=" --model-path {name}"\n'
        assert "KD107" not in found(written(tmp_path, script, "train.sh"))

    def test_bfloat16_of_another_trainer_on_a_card_that_nobody_named(self, tmp_path: Path) -> None:
        path = written(tmp_path, {"bf16": True, "learning_rate": 1e-4, "seed": 1})
        assert found(path, card=None) == {}
        assert found(path) == {"KD111": "warn"}

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.data())
    def test_any_mixture_of_faults_is_mended_for_good(self, data: st.DataObject) -> None:
        faults = [mark for mark in TestFaults.test_it_is_named.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
        unmendable = {"KD108", "KD123"}  # rows are the user's own
        cases = [case[2] for case in faults[0].args[1] if case[0] not in unmendable]
        overrides = [
            one for case in data.draw(st.lists(st.sampled_from(cases), min_size=1, max_size=5)) for one in case
        ]
        try:
            load_config("demo", overrides)
        except UserError:
            return  # no config: the mixture contradicts itself
        fixed = fix_config("demo", overrides, card=T4)
        left = [finding for finding in fixed.diagnosis.findings if finding.patch or finding.severity == "fail"]
        assert left == []
        load_config(yaml.safe_load(fixed.text))

    @pytest.mark.parametrize("preset", list_presets())
    def test_presets(self, preset: str) -> None:
        try:
            load_config(preset)
            overrides: tuple[str, ...] = ()
        except UserError:
            overrides = DEMO_PAIR
        fixed = fix_config(preset, overrides, card=T4)
        assert fixed.diagnosis.findings == []


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([-1, 0, 1, 10**400, 1e308, "off", "cosine", "1e-4", "auto", "nf4", "${demo}/teacher"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(sorted({*USUAL_KEYS, *DISTILLM_KEYS, "type", "student_gen", "training", "teacher", "stages"}))
LINES = st.lists(
    st.builds(lambda key, value: f'OPTS+=" --{key.replace("_", "-")} {value}"', KEYS, JUNK) | st.text(max_size=20),
    max_size=12,
)


class TestJunk:
    """Whatever stands in the file: a diagnosis or one message."""

    def outcome_of(self, path: Path) -> str:
        try:
            fix_config(str(path), card=T4)
        except UserError as error:
            return str(error)
        return "mended"

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(content=st.dictionaries(KEYS | st.text(max_size=5), JUNK, max_size=12), is_nested=st.booleans())
    def test_keys(self, content: dict[str, object], is_nested: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
        tree = {"training": content} if is_nested else content
        assert self.outcome_of(written(tmp_path_factory.mktemp("junk"), tree))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(lines=LINES)
    def test_flags(self, lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("junk") / "train.sh"
        path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
        assert self.outcome_of(path)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="replace")))
    @pytest.mark.parametrize("name", ["mine.yaml", "mine.json", "mine.sh"])
    def test_bytes(self, content: bytes, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("junk") / name
        path.write_bytes(content)
        assert self.outcome_of(path)


class TestCommand:
    """kdkit doctor CONFIG."""

    def run(self, *arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["doctor", *map(str, arguments)])
        return result.exit_code, result.output

    def test_healthy(self) -> None:
        code, said = self.run("demo", "--gpu", "t4")
        assert code == 0
        assert "0 fail, 0 warn" in said

    def test_a_failure_is_exit_code_1(self) -> None:
        code, said = self.run("demo", "--set", "objective.kd.loss=reverse_kl", "--gpu", "t4")
        assert code == 1
        assert "KD107" in said

    def test_json(self) -> None:
        code, said = self.run("demo", "--set", "objective.kd.temperature=3", "--json", "--gpu", "t4")
        assert code == 0
        (finding,) = json.loads(said)["findings"]
        assert finding["patch"] == {"objective.kd.temperature": 2.0}

    def test_fix_writes_what_then_is_clean(self, tmp_path: Path) -> None:
        output = tmp_path / "new" / "fixed.yaml"
        code, said = self.run(
            "demo", "--set", "objective.kd.loss=reverse_kl", "--fix", "--output", output, "--gpu", "t4"
        )
        assert code == 0
        assert "+stages:" in said
        assert "fixed KD107 no warm start" in said
        code, said = self.run(output, "--fix", "--output", output, "--gpu", "t4")
        assert code == 0
        assert "nothing to change" in said
        assert [path.name for path in output.parent.iterdir()] == ["fixed.yaml"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["demo", "--fix"], "--output FILE"),
            (["demo", "--output", "x"], "--fix"),
            (["demo", "--gpu", "t4", "--budget-gib", "3"], "either"),
            (["demo", "--gpu", "t44"], "t4"),
            (["demo", "--rows", "0"], "x>=1"),
            (["demo", "--set", "optim.warmup_stepz=3"], "warmup_steps"),
            (["nothing-here"], "presets"),
        ],
    )
    def test_bad_use_is_one_message(self, arguments: list[str], words: str) -> None:
        result = CliRunner().invoke(cli, ["doctor", *arguments])
        said = result.output + str(result.exception)
        assert result.exit_code == 2 or isinstance(result.exception, UserError)
        assert words in said

    def test_options_of_a_config_are_none_of_a_run(self, tmp_path: Path) -> None:
        log = written(tmp_path, "step: 10 loss: 2.5\n", "train.log")
        code, said = self.run(log, "--rows", 5)
        assert code == 2
        assert "for configs" in said

    @pytest.mark.parametrize(
        "content", [b"\x00\xff\xfe", b"a: [", b"{", b"- 1\n", b"", b"a: &a [*a]\n", b"teacher: 3\n"]
    )
    @pytest.mark.parametrize("name", ["bad.yaml", "bad.json", "bad.sh"])
    def test_broken_files_are_one_message(self, tmp_path: Path, content: bytes, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError):
            diagnose_config(str(path), card=T4)

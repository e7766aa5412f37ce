import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdkit.data.spans import PROBES, tokenizer_relation

DEMO = Path(__file__).parents[1] / "data" / "demo"
SPLITS = ("train", "validation", "test")
TEACHERS = ("teacher", "moe_teacher")
TEACHER_LIMIT_BYTES = 6_000_000


def read_rows(split):
    lines = (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def references_of(row):
    return row["output"] if isinstance(row["output"], list) else [row["output"]]


def prompt_of(row):
    return "\n".join(part for part in (row["instruction"], row["input"], "Answer:\n") if part)


def config_of(name):
    return json.loads((DEMO / name / "config.json").read_text(encoding="utf-8"))


def run_maker(program, folder):
    subprocess.run([sys.executable, program, folder], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "teacher")


@pytest.fixture(scope="module")
def unigram():
    return AutoTokenizer.from_pretrained(DEMO / "deep_student")


class TestMakeRows:
    def test_writes_the_committed_bytes(self, tmp_path):
        run_maker(DEMO / "make_rows.py", tmp_path)
        for split in SPLITS:
            made = (tmp_path / f"{split}.jsonl").read_bytes()
            assert made == (DEMO / f"{split}.jsonl").read_bytes(), split

    def test_another_seed_writes_other_rows(self, tmp_path):
        for name in ("make_rows.py", "words.py"):
            shutil.copy(DEMO / name, tmp_path)
        program = tmp_path / "make_rows.py"
        text = program.read_text(encoding="utf-8")
        program.write_text(text.replace("\nSEED = ", "\nSEED = 1"), encoding="utf-8")
        run_maker(program, tmp_path)
        assert (tmp_path / "test.jsonl").read_bytes() != (DEMO / "test.jsonl").read_bytes()


class TestRows:
    @pytest.mark.parametrize(
        ("split", "fewest", "most"),
        [("train", 4000, 5000), ("validation", 400, 400), ("test", 500, 500)],
    )
    def test_split_sizes(self, split, fewest, most):
        assert fewest <= len(read_rows(split)) <= most

    @pytest.mark.parametrize("split", SPLITS)
    def test_every_row_has_the_three_fields_and_an_instruction(self, split):
        for row in read_rows(split):
            assert set(row) == {"instruction", "input", "output"}
            assert row["instruction"].strip() == row["instruction"] != ""
            assert row["input"].strip() == row["input"]

    @pytest.mark.parametrize("split", SPLITS)
    def test_answers_are_distinct_sentences(self, split):
        for row in read_rows(split):
            references = references_of(row)
            assert references
            assert len(set(references)) == len(references)
            for text in references:
                assert text[-1] == "."
                assert text[0] == text[0].upper()
                assert "  " not in text
                assert 5 <= len(text.split()) <= 32, text

    @pytest.mark.parametrize("split", SPLITS)
    def test_some_answers_have_several_wordings_and_some_prompts_no_input(self, split):
        rows = read_rows(split)
        several = sum(isinstance(row["output"], list) for row in rows)
        without_input = sum(row["input"] == "" for row in rows)
        assert 0 < several < len(rows)
        assert 0 < without_input < len(rows) / 4

    def test_no_question_stands_in_two_rows_even_under_another_instruction(self):
        questions = [row["input"] or row["instruction"] for split in SPLITS for row in read_rows(split)]
        assert len(questions) > 5000
        assert len(set(questions)) == len(questions)

    @pytest.mark.parametrize("split", SPLITS)
    def test_every_sum_in_an_answer_is_right(self, split):
        sums = [
            found
            for row in read_rows(split)
            for text in references_of(row)
            for found in re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)", text)
        ]
        assert len(sums) > 100
        for left, sign, right, result in sums:
            change = int(right) if sign == "plus" else -int(right)
            assert int(left) + change == int(result)


class TestTeachers:
    @pytest.mark.parametrize("name", TEACHERS)
    def test_knows_the_committed_rows_and_tokenizer(self, name):
        # Weights trained on another vocabulary load without complaint; only their loss tells.
        model = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
        losses = []
        for row in read_rows("test")[:20]:
            prompt = tokenizer(prompt_of(row))["input_ids"]
            answer = [*tokenizer(references_of(row)[0])["input_ids"], tokenizer.eos_token_id]
            labels = torch.tensor([[-100] * len(prompt) + answer])
            with torch.no_grad():
                losses.append(model(torch.tensor([prompt + answer]), labels=labels).loss.item())
        assert sum(losses) / len(losses) < 1.0

    @pytest.mark.parametrize("name", TEACHERS)
    def test_folder_is_small_and_holds_no_pickle(self, name):
        files = [path for path in (DEMO / name).rglob("*") if path.is_file()]
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in files}
        assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".md"}
        assert sum(path.stat().st_size for path in files) <= TEACHER_LIMIT_BYTES

    @pytest.mark.parametrize("name", TEACHERS)
    def test_record_names_the_committed_weights(self, name):
        record = json.loads((DEMO / name / "training.json").read_text(encoding="utf-8"))
        assert record["parameters"] == AutoModelForCausalLM.from_pretrained(DEMO / name).num_parameters()
        assert record["test rows"]["rouge_l"] > 80

    def test_student_shares_the_vocabulary_and_is_several_times_smaller(self):
        teacher, student = config_of("teacher"), config_of("student")
        for field in ("vocab_size", "pad_token_id", "eos_token_id"):
            assert student[field] == teacher[field]
        assert student["hidden_size"] * 2 <= teacher["hidden_size"]

    def test_deep_student_is_deeper_and_narrower_than_the_moe_teacher(self):
        teacher, student = config_of("moe_teacher"), config_of("deep_student")
        assert student["num_hidden_layers"] > teacher["num_hidden_layers"]
        assert student["hidden_size"] < teacher["hidden_size"]
        assert student["vocab_size"] < teacher["vocab_size"]


class TestTeacherAnswers:
    @pytest.mark.parametrize("name", TEACHERS)
    def test_are_the_teachers_to_every_training_prompt_in_order(self, name):
        lines = (DEMO / f"{name}_answers.jsonl").read_text(encoding="utf-8").splitlines()
        answers = [json.loads(line) for line in lines]
        assert [answer["prompt"] for answer in answers] == [prompt_of(row) for row in read_rows("train")]
        assert all(answer["ended"] and answer["completion"].strip() for answer in answers)
        model = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
        asked = tokenizer([answer["prompt"] for answer in answers[:20]], padding=True, return_tensors="pt")
        ids = model.generate(**asked, max_new_tokens=64, do_sample=False)[:, asked["input_ids"].shape[1] :]
        told = tokenizer.batch_decode(ids, skip_special_tokens=True)
        same = sum(text == answer["completion"] for text, answer in zip(told, answers, strict=False))
        assert same >= 18, "another machine may round a close call the other way, and no more"


class TestMoeTeacher:
    @pytest.fixture
    def model(self):
        return AutoModelForCausalLM.from_pretrained(DEMO / "moe_teacher", dtype=torch.float32).eval()

    def test_every_layer_has_eight_experts_of_its_own_and_a_shared_one(self, model):
        assert (model.config.model_type, model.config.num_experts_per_tok) == ("qwen2_moe", 2)
        assert model.config.num_hidden_layers == 4
        for layer in model.model.layers:
            experts = layer.mlp.experts.down_proj  # (experts, hidden, inner)
            assert len(experts) == 8
            distances = torch.cdist(experts.flatten(1), experts.flatten(1))  # (8, 8)
            norm = experts.flatten(1).norm(dim=1).mean()
            assert distances[~torch.eye(8, dtype=torch.bool)].min() > 0.5 * norm, "two experts are one"
            assert layer.mlp.shared_expert.down_proj.weight.abs().max() > 0

    def test_no_expert_of_any_layer_is_out_of_use(self, model):
        """The training had no loss that spreads the tokens, so nothing but the result says that they are spread."""
        chosen = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _, __, output: chosen.append(output[2]))  # (tokens, 2)
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "moe_teacher", padding_side="right")
        texts = [prompt_of(row) + references_of(row)[0] for row in read_rows("validation")]
        counts = torch.zeros(4, 8)
        for start in range(0, len(texts), 50):
            batch = tokenizer(texts[start : start + 50], padding=True, return_tensors="pt")
            with torch.inference_mode():
                model(**batch)
            is_text = batch["attention_mask"].flatten().bool()
            counts += torch.stack([experts[is_text].flatten().bincount(minlength=8) for experts in chosen])
            chosen.clear()
        shares = counts / counts.sum(1, keepdim=True)
        assert shares.min() > 0.02
        record = json.loads((DEMO / "moe_teacher" / "training.json").read_text(encoding="utf-8"))
        recorded = torch.tensor(list(record["expert shares on validation rows"].values()))
        torch.testing.assert_close(shares, recorded, atol=0.002, rtol=0)


class TestTokenizer:
    def test_training_both_again_gives_the_committed_bytes(self, tmp_path):
        run_maker(DEMO / "make_tokenizer.py", tmp_path)
        made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.json")}
        folders = ("teacher", "moe_teacher", "deep_student")
        assert made == {Path(folder, f"tokenizer{part}.json") for folder in folders for part in ("", "_config")}
        for path in made:
            assert (tmp_path / path).read_bytes() == (DEMO / path).read_bytes(), path

    def test_pad_and_eos_are_distinct(self, tokenizer):
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        assert len(tokenizer) == 1024

    @pytest.mark.parametrize("split", ["validation", "test"])
    @pytest.mark.parametrize("folder", ["teacher", "deep_student"])
    def test_encoding_round_trips_and_adds_nothing(self, folder, split):
        tokenizer = AutoTokenizer.from_pretrained(DEMO / folder)
        texts = [text for row in read_rows(split) for text in (row["input"], *references_of(row))]
        ids = tokenizer(texts)["input_ids"]
        assert tokenizer.batch_decode(ids) == texts
        assert not {index for row in ids for index in row} & set(tokenizer.all_special_ids)

    @pytest.mark.parametrize(
        ("folder", "usual", "most"), [("teacher", 96, 128), ("moe_teacher", 96, 128), ("deep_student", 112, 128)]
    )
    def test_prompt_and_answer_are_short(self, folder, usual, most):
        rows = read_rows("train")
        texts = [f"{r['instruction']}\n{r['input']}\nAnswer:\n{references_of(r)[0]}" for r in rows]
        lengths = [len(ids) + 1 for ids in AutoTokenizer.from_pretrained(DEMO / folder)(texts)["input_ids"]]
        assert sum(length <= usual for length in lengths) >= 0.99 * len(lengths)
        assert max(lengths) <= most


class TestUnigramTokenizer:
    """The deep student's, which has to give back all that the teachers' byte-level BPE gives back."""

    def test_has_the_ids_that_the_config_names(self, unigram):
        config = AutoConfig.from_pretrained(DEMO / "deep_student")
        assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (768, 0, 1)
        assert unigram.convert_tokens_to_ids(["<pad>", "<eos>"]) == [0, 1]
        assert sorted(unigram.get_vocab().values()) == list(range(768))

    @pytest.mark.parametrize(
        "text", [*PROBES, "", "       ", "\t\n  \r\n\tx ", "a literal <0x0A>, <eos> and <unk>", "é", "\x00\x7f", "𝔘🙂 "]
    )
    def test_gives_back_every_character_and_says_where_it_stood(self, unigram, text):
        encoded = unigram(text, return_offsets_mapping=True, split_special_tokens=True)
        assert unigram.decode(encoded["input_ids"]) == text
        spans = sorted(set(encoded["offset_mapping"]))
        assert "".join(text[start:end] for start, end in spans) == text
        shared = [span for span in spans if encoded["offset_mapping"].count(span) > 1]
        assert all(end - start == 1 for start, end in shared), "bytes that carry the place of several characters"

    def test_is_no_relation_of_the_teachers(self, unigram, tokenizer):
        assert tokenizer_relation(tokenizer, unigram).kind == "different"
        texts = [references_of(row)[0] for row in read_rows("test")]
        ends = [
            [{end for _, end in row} for row in side(texts, return_offsets_mapping=True)["offset_mapping"]]
            for side in (tokenizer, unigram)
        ]
        alone = sum(len(ours - theirs) for theirs, ours in zip(*ends, strict=True))
        assert alone > 0.25 * sum(len(ours) for ours in ends[1]), "it cuts where the other one does"

"""Rows: every layout and every format gives the same rows; every bad input gives one message that helps."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from kdkit.data.rows import TEMPLATES, find_columns, load_rows
from kdkit.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hi.", "input": "", "output": "Hi!"},
]
BOTH_PROMPTS = [
    "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
    "### Instruction:\nSay hi.\n\n### Response:\n",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path):
    return lambda *records: write_jsonl(tmp_path / "rows.jsonl", list(records))


def message_of(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(*args, **kwargs)
    return str(caught.value)


class TestLoadRows:
    def test_writes_the_prompt_and_lists_the_answer(self, jsonl):
        rows = load_rows(jsonl(*ALPACA))
        assert rows.dataset["prompt"][:] == BOTH_PROMPTS
        assert rows.dataset["references"][:] == [["3"], ["Hi!"]]
        assert (rows.name, len(rows)) == ("rows", 2)
        assert (rows.report.num_read, rows.report.num_kept, rows.report.dropped) == (2, 2, {})

    @pytest.mark.parametrize(
        "record",
        [
            {"instruction": "Q", "context": "C", "response": "A", "category": "qa"},
            {"instruction": "Q", "input": "C", "output": "A", "source": "x"},
            {"prompt": "Q", "completion": "A"},
            {"prompt": "Q", "response": "A"},
            {"question": "Q", "answer": "A"},
            {"prompt": "Q", "references": ["A"]},
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        ],
    )
    def test_finds_the_columns_of_each_layout(self, jsonl, record):
        row = load_rows(jsonl(record), template="plain").dataset[0]
        context = "C\n" if "C" in record.values() else ""
        assert row == {"prompt": f"Q\n{context}Answer:\n", "references": ["A"]}

    def test_named_columns_win_over_those_found(self, jsonl):
        path = jsonl({"instruction": "no", "task": "Q", "output": "no", "gold": "A", "input": "C"})
        rows = load_rows(path, template="plain", columns={"instruction": "task", "output": "gold"})
        assert rows.dataset[0] == {"prompt": "Q\nC\nAnswer:\n", "references": ["A"]}

    def test_answers_that_are_texts_lists_and_numbers_mix(self, jsonl):
        answers = ["a", ["b", "c"], 3, 2.5, True, ["", "d"]]
        path = jsonl(*({"prompt": "Q", "completion": answer} for answer in answers))
        expected = [["a"], ["b", "c"], ["3"], ["2.5"], ["true"], ["d"]]
        assert load_rows(path).dataset["references"][:] == expected

    def test_text_that_looks_like_a_date_a_number_or_nothing_stays_as_written(self, tmp_path):
        # The builders of `datasets` make a timestamp of the first, 7.0 of the second, null of the others.
        answers = ["2020-01-01", "007", "None", "NA", " padded "]
        path = tmp_path / "rows.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["prompt", "completion"], *(["Q", a] for a in answers)])
        lines = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Q", "completion": a} for a in answers])
        for rows in (load_rows(path), load_rows(lines)):
            assert rows.dataset["references"][:] == [[answer] for answer in answers]

    def test_every_format_gives_the_same_rows_and_the_same_hash(self, tmp_path):
        table = pa.Table.from_pylist(ALPACA)
        lines = write_jsonl(tmp_path / "a.jsonl", ALPACA)
        (tmp_path / "b.json").write_text(json.dumps(ALPACA, indent=1))
        (tmp_path / "c.json").write_text(json.dumps({"data": ALPACA}))
        (tmp_path / "d.json").write_bytes(b"\xef\xbb\xbf" + lines.read_bytes())
        with (tmp_path / "e [1] *.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ALPACA[0]))
            writer.writeheader()
            writer.writerows(ALPACA)
        pyarrow.parquet.write_table(table, tmp_path / "f [1] *.parquet")
        datasets.Dataset(table).save_to_disk(str(tmp_path / "g"))
        datasets.DatasetDict(train=datasets.Dataset(table)).save_to_disk(str(tmp_path / "h"))
        loaded = [load_rows(path) for path in sorted(tmp_path.iterdir())]
        assert len(loaded) == 8
        assert {tuple(rows.dataset["prompt"][:]) for rows in loaded} == {tuple(BOTH_PROMPTS)}
        assert len({rows.sha256 for rows in loaded}) == 1

    def test_the_hash_follows_every_character_and_the_order(self, jsonl):
        one = {"prompt": "a", "completion": ["b", "c"]}
        variants = [
            [one, {"prompt": "d", "completion": "e"}],
            [{"prompt": "d", "completion": "e"}, one],
            [one, {"prompt": "d", "completion": "e "}],
            [{"prompt": "a", "completion": ["bc"]}, {"prompt": "d", "completion": "e"}],
            [{"prompt": "a", "completion": ["c", "b"]}, {"prompt": "d", "completion": "e"}],
        ]
        assert len({load_rows(jsonl(*variant)).sha256 for variant in variants}) == len(variants)

    def test_what_is_dropped_is_counted_by_reason(self, jsonl):
        records = [
            {"prompt": "Q", "completion": "A"},
            {"prompt": " \n", "completion": "A"},
            {"prompt": None, "completion": "A"},
            {"prompt": "Q", "completion": ""},
            {"prompt": "Q", "completion": []},
            {"prompt": "Q", "completion": float("nan")},
            {"prompt": "Q"},
            {"prompt": "Q", "completion": {"text": "A"}},
            {"prompt": ["Q"], "completion": "A"},
            {"prompt": "Q", "completion": "\ud800"},
            {"title": "A"},
        ]
        report = load_rows(jsonl(*records)).report
        assert (report.num_read, report.num_kept) == (len(records), 1)
        assert report.dropped == {
            "empty prompt": 2,
            "no answer": 4,
            "answer is not text": 1,
            "prompt is not text": 1,
            "text is not valid Unicode": 1,
            "no prompt column": 1,
        }
        assert "1 of 11 rows kept (no answer: 4" in str(report)

    def test_rows_without_an_answer_are_kept_where_none_is_needed(self, jsonl):
        path = jsonl({"prompt": "P"}, {"prompt": "Q", "completion": "A"})
        rows = load_rows(path, require_references=False)
        assert rows.dataset["references"][:] == [[], ["A"]]

    def test_an_input_alone_is_the_prompt(self, jsonl):
        row = {"instruction": "", "input": "Q", "output": "A"}
        assert load_rows(jsonl(row), template="plain").dataset[0]["prompt"] == "Q\nAnswer:\n"

    def test_a_blank_input_is_none(self, jsonl):
        row = {"instruction": "Q", "input": " \n", "output": "A"}
        assert load_rows(jsonl(row)).dataset[0]["prompt"] == "### Instruction:\nQ\n\n### Response:\n"

    def test_limit_keeps_the_first_usable_rows(self, jsonl):
        path = jsonl({"prompt": "", "completion": "x"}, *({"prompt": c, "completion": "x"} for c in "abc"))
        rows = load_rows(path, limit=2, template="{instruction}")
        assert rows.dataset["prompt"][:] == ["a", "b"]
        assert rows.report.num_read == 3
        assert "at least 1" in message_of(path, limit=0)

    def test_a_long_csv_field_and_a_line_separator_in_json_are_text(self, tmp_path, jsonl):
        answer = "x" * 200_000
        path = tmp_path / "long.csv"
        path.write_text(f'prompt,completion\nQ,"{answer},\n"\n', newline="")
        assert load_rows(path).dataset[0]["references"] == [answer + ",\n"]
        assert csv.field_size_limit() == 131_072
        path = tmp_path / "separator.jsonl"
        path.write_text('{"prompt": "a\u2028b", "completion": "c\u0085d"}\n', encoding="utf-8")
        assert load_rows(path).dataset[0]["references"] == ["c\u0085d"]

    def test_leaves_nothing_behind_and_is_quiet(self, tmp_path, capfd, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.enable_progress_bars()
        pyarrow.parquet.write_table(pa.Table.from_pylist(ALPACA), tmp_path / "rows.parquet")
        rows = load_rows(tmp_path / "rows.parquet", limit=1)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.parquet"]
        assert rows.dataset.cache_files == []
        assert capfd.readouterr() == ("", "")
        assert not datasets.are_progress_bars_disabled()

    def test_importing_it_loads_nothing_heavy(self):
        code = "import sys, kdkit.data.rows; sys.exit(bool({'torch', 'datasets', 'transformers'} & {*sys.modules}))"
        root = Path(__file__).resolve().parents[1]
        subprocess.run([sys.executable, "-c", code], cwd=root, check=True)

    @pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not here")
    @pytest.mark.parametrize(("name", "num_rows"), [("t0_test", 500), ("t0_validation", 400), ("selfinst_eval", 252)])
    def test_reads_real_rows_whole(self, name, num_rows):
        rows = load_rows(SHARED / f"{name}.jsonl")
        lines = (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        last = json.loads(lines[-1])
        assert len(rows) == len(lines) == num_rows
        assert rows.dataset[-1]["references"] == [last["output"]]
        assert last["instruction"] in rows.dataset[-1]["prompt"]


class TestBadFiles:
    def test_a_missing_file_names_its_neighbours(self, jsonl):
        path = jsonl(*ALPACA)
        message = message_of(path.parent / "rowz.jsonl")
        assert "rowz.jsonl' not found" in message
        assert "did you mean 'rows.jsonl'?" in message

    def test_a_missing_folder_is_named(self, tmp_path):
        assert f"there is no folder '{tmp_path / 'nope'}'" in message_of(tmp_path / "nope" / "a.jsonl")

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.jsonl", b"", "is empty"),
            ("a.csv", b" \n\n", "is empty"),
            ("a.csv", b"\xef\xbb\xbf", "is empty"),
            ("a.json", b"[" * 100_000, "nests too deeply"),
            ("a.json", b'[{"prompt": ' + b"1" * 5000 + b"}]", "more than 4,300 digits"),
            ("a.parquet", b"", "is empty"),
            ("a.jsonl", bytes(range(256)), "binary data"),
            ("a.jsonl", b"<!DOCTYPE html><html>404</html>", "an HTML or XML page"),
            ("a.csv", b"<html>404</html>", "an HTML or XML page"),
            ("a.jsonl", b"PAR1....", "a Parquet file"),
            ("a.jsonl", b"\x1f\x8b....", "a gzip archive"),
            ("a.csv", "a,b".encode("utf-16"), "UTF-16"),
            ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
            ("a.parquet", b"instruction,output\n", "ends in .parquet but is text"),
            ("a.parquet", b"PAR1 and then nothing of use PAR1", "cannot be read as Parquet"),
            ("a.txt", b"hello", "expected one of .jsonl, .json, .csv, .parquet"),
        ],
    )
    def test_a_file_that_is_not_what_its_ending_says(self, tmp_path, capfd, name, content, expected):
        path = tmp_path / name
        path.write_bytes(content)
        message = message_of(path)
        assert str(path) in message
        assert expected in message
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("name", "content", "line", "expected"),
        [
            ("a.jsonl", b'{"prompt": "Q"}\n\n{"prompt": \n', 3, "one JSON object per line"),
            ("a.jsonl", b'{"prompt": "Q"}\n"text"\n', 2, "one JSON object per line"),
            ("a.jsonl", b'[{"prompt": "Q"}]\n', 1, "belongs in a .json file"),
            ("a.jsonl", b'{"prompt": "Q"}\n{"prompt": "caf\xe9"}\n', 2, "not UTF-8 (byte 0xe9)"),
            ("a.jsonl", b'{"prompt": "Q"}\n' + b"[" * 100_000 + b"\n", 2, "nests too deeply"),
            ("a.jsonl", b'{"prompt": "Q"}\n{"prompt": ' + b"1" * 5000 + b"}\n", 2, "more than 4,300 digits"),
            ("a.jsonl", b"prompt,completion\nQ,A\n", 1, "one JSON object per line"),
            ("a.json", b'[{"prompt": "Q"},\n {"prompt" "R"}]', 2, "not valid JSON"),
            ("a.json", b'{"prompt": "Q"}\n{"prompt": }\n', 2, "one JSON object per line"),
            ("a.csv", b"prompt,completion\nQ,A\nQ,A,B\n", 3, "3 fields where the header has 2"),
            ("a.csv", b'prompt,completion\nQ,"A\nB"\nQ\n', 4, "1 fields where the header has 2"),
            ("a.csv", b'prompt,completion\nQ,A\nQ,"A\nQ,A\n', 2, "not valid CSV"),
            ("a.csv", b"prompt,prompt\nQ,A\n", 1, "more than once"),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path, name, content, line, expected):
        path = tmp_path / name
        path.write_bytes(content)
        message = message_of(path, require_references=False)
        assert f"'{path}', line {line}" in message
        assert expected in message

    @pytest.mark.parametrize("content", [b"[1, 2]", b'"text"'])
    def test_json_without_objects(self, tmp_path, content):
        path = tmp_path / "a.json"
        path.write_bytes(content)
        assert "expected" in message_of(path)

    @pytest.mark.parametrize("refusing", ["open", "stat"])
    def test_a_file_that_may_not_be_read(self, jsonl, monkeypatch, refusing):
        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        path = jsonl(*ALPACA)
        monkeypatch.setattr(Path, refusing, refuse)
        assert message_of(path) == f"'{path}' cannot be read: Permission denied"

    def test_csv_in_another_encoding(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_bytes("prompt,completion\nQ,café\n".encode("latin-1"))
        assert "not UTF-8" in message_of(path)

    def test_a_folder_that_is_no_dataset_says_what_it_holds(self, jsonl):
        message = message_of(jsonl(*ALPACA).parent)
        assert "was not written by datasets' save_to_disk" in message
        assert "it holds rows.jsonl: name that file" in message

    def test_a_damaged_dataset_folder(self, tmp_path):
        datasets.Dataset.from_list(ALPACA).save_to_disk(str(tmp_path / "saved"))
        next((tmp_path / "saved").glob("*.arrow")).unlink()
        assert "damaged" in message_of(tmp_path / "saved")

    def test_unknown_columns_are_listed_beside_the_expected(self, jsonl):
        message = message_of(jsonl({"title": "T", "body": "B"}, {"topic": "T"}))
        assert "found body, title, topic" in message
        assert "instruction, input, output (Alpaca)" in message
        assert "data.columns" in message

    def test_a_named_column_that_is_not_there(self, jsonl):
        message = message_of(jsonl(*ALPACA), columns={"output": "gold"})
        assert "no column 'gold'; found input, instruction, output" in message

    def test_an_unknown_role(self, jsonl):
        message = message_of(jsonl(*ALPACA), columns={"outptu": "output"})
        assert "unknown 'outptu' (did you mean 'output'?)" in message
        assert "alone" in message_of(jsonl(*ALPACA), columns={"messages": "m", "output": "o"})

    def test_no_usable_row_says_why(self, jsonl):
        message = message_of(jsonl({"prompt": "Q"}, {"prompt": ""}))
        assert "no usable row: 0 of 2 rows kept (no answer: 1, empty prompt: 1)" in message
        assert "data.columns" in message

    def test_a_csv_with_a_header_alone(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("prompt,completion\n")
        assert "no usable row: 0 of 0" in message_of(path)


class TestSplits:
    @pytest.fixture
    def saved(self, tmp_path):
        parts = {name: datasets.Dataset.from_list([row]) for name, row in zip("ab", ALPACA, strict=True)}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    def test_takes_the_split_asked_for(self, saved):
        assert load_rows(saved, split="b").dataset["references"][:] == [["Hi!"]]

    def test_several_splits_need_a_choice(self, saved):
        assert f"has the splits a, b: say which one, such as '{saved}#a'" in message_of(saved)
        assert "no split 'c', only a, b" in message_of(saved, split="c")

    def test_a_file_has_only_train(self, jsonl):
        path = jsonl(*ALPACA)
        assert len(load_rows(path, split="train")) == 2
        assert "has no splits" in message_of(path, split="test")

    def test_a_source_may_name_its_split(self, saved):
        assert load_rows(f"{saved}#b").dataset["references"][:] == [["Hi!"]]

    @pytest.mark.parametrize(
        ("split", "kept"),
        [("train[:2]", "01"), ("train[2:]", "234"), ("train[1:3]", "12"), ("train[-1:]", "4"), ("train", "01234")],
    )
    def test_rows_of_a_split_are_counted_as_python_counts(self, jsonl, tmp_path, split, kept):
        records = [{"prompt": "Q", "completion": str(n)} for n in range(5)]
        file = jsonl(*records)
        folder = tmp_path / "folder"
        datasets.Dataset.from_list(records).save_to_disk(str(folder))
        for place in (file, folder):
            assert [r for [r] in load_rows(f"{place}#{split}").dataset["references"]] == list(kept)

    def test_cuts_that_meet_share_no_row_and_lose_none(self, jsonl):
        file = jsonl(*[{"prompt": "Q", "completion": str(n)} for n in range(7)])
        parts = [load_rows(f"{file}#train{cut}").dataset["references"][:] for cut in ("[:2]", "[2:3]", "[3:]")]
        assert [len(part) for part in parts] == [2, 1, 4]
        assert [answer for part in parts for [answer] in part] == list("0123456")

    def test_a_file_whose_name_holds_a_hash_is_that_file(self, tmp_path):
        assert len(load_rows(write_jsonl(tmp_path / "week#2.jsonl", ALPACA))) == 2

    @pytest.mark.parametrize("split", ["train[500]", "train[:5%]", "train[", ""])
    def test_what_is_no_split_is_refused(self, jsonl, split):
        assert "expected a name, or a name and rows such as train[:500]" in message_of(f"{jsonl(*ALPACA)}#{split}")

    def test_no_row_in_the_cut(self, jsonl):
        assert "no usable row" in message_of(f"{jsonl(*ALPACA)}#train[2:]")


class TestHub:
    def test_a_name_that_is_no_file_is_loaded_from_the_hub(self, monkeypatch):
        calls = []

        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            return datasets.DatasetDict(train=datasets.Dataset.from_list(ALPACA))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        rows = load_rows("some-owner/some.rows:main")
        assert calls == [(("some-owner/some.rows", "main"), {"split": None})]
        assert (rows.name, len(rows)) == ("some-owner/some.rows:main", 2)

    def test_rows_of_a_hub_split(self, monkeypatch):
        calls = []

        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            return datasets.Dataset.from_list(ALPACA)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        rows = load_rows("some-owner/some.rows#train[1:]")
        assert calls == [(("some-owner/some.rows", None), {"split": "train"})]
        assert rows.dataset["references"][:] == [["Hi!"]]

    @pytest.mark.parametrize("error", [ConnectionError("offline"), datasets.exceptions.DatasetNotFoundError("unknown")])
    def test_a_failed_load_says_that_neither_was_found(self, monkeypatch, error):
        def load_dataset(*args, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        message = message_of("some-owner/nope")
        assert "there is no folder 'some-owner'" in message
        assert f"could not be loaded: {error}" in message

    @pytest.mark.parametrize("source", ["nope.jsonl", "./nope", "a/b/c", "/nope/rows"])
    def test_a_path_is_never_looked_up(self, monkeypatch, source):
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
        assert "not found" in message_of(source)


class TestTemplates:
    def test_plain(self, jsonl):
        rows = load_rows(jsonl(*ALPACA), template="plain")
        assert rows.dataset["prompt"][:] == ["Add.\n1 and 2\nAnswer:\n", "Say hi.\nAnswer:\n"]

    def test_a_format_string(self, jsonl):
        rows = load_rows(jsonl(*ALPACA), template="Q: {instruction} [{input}] {{x}}\nA:")
        assert rows.dataset["prompt"][0] == "Q: Add. [1 and 2] {x}\nA:"

    def test_an_input_that_the_format_string_has_no_place_for_follows_the_instruction(self, jsonl):
        rows = load_rows(jsonl(*ALPACA), template="<{instruction}>")
        assert rows.dataset["prompt"][:] == ["<Add.\n1 and 2>", "<Say hi.>"]

    def test_braces_in_the_data_are_text(self, jsonl):
        row = {"instruction": "{input} {0}", "input": "{x}", "output": "y"}
        assert load_rows(jsonl(row), template="{instruction}|{input}").dataset[0]["prompt"] == ("{input} {0}|{x}")

    @pytest.mark.parametrize(
        "template", ["alpca", "no field", "{instruction} {topic}", "{input}", "{", "{instruction:d}", "{instruction!r}"]
    )
    def test_an_unknown_template(self, jsonl, template):
        message = message_of(jsonl(*ALPACA), template=template)
        assert "alpaca, plain, chat" in message
        assert ("did you mean 'alpaca'?" in message) == (template == "alpca")

    def test_all_named_templates_hold_the_whole_question(self, jsonl, chat_tokenizer):
        for name in TEMPLATES:
            prompt = load_rows(jsonl(*ALPACA), template=name, tokenizer=chat_tokenizer).dataset[0]["prompt"]
            assert "Add." in prompt
            assert "1 and 2" in prompt


@pytest.fixture
def chat_tokenizer(byte_tokenizer):
    byte_tokenizer.chat_template = CHAT_TEMPLATE
    yield byte_tokenizer
    byte_tokenizer.chat_template = None


def turns(*contents: str) -> dict:
    """system-less conversation of alternating turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


class TestChat:
    def test_the_last_assistant_message_is_the_answer(self, jsonl, chat_tokenizer):
        rows = load_rows(jsonl(turns("a", "b", "c", "d", "e")), template="chat", tokenizer=chat_tokenizer)
        assert rows.dataset[0] == {
            "prompt": "<user>a\n<assistant>b\n<user>c\n<assistant>",
            "references": ["d"],
        }

    def test_an_instruction_becomes_a_user_turn(self, jsonl, chat_tokenizer):
        rows = load_rows(jsonl(*ALPACA), template="chat", tokenizer=chat_tokenizer)
        assert rows.dataset["prompt"][0] == "<user>Add.\n\n1 and 2\n<assistant>"

    def test_one_turn_fits_every_template(self, jsonl):
        row = {"messages": [{"role": "system", "content": "Be kind."}, *turns("Hi", "Hello")["messages"]]}
        assert load_rows(jsonl(row), template="plain").dataset[0] == {
            "prompt": "Be kind.\n\nHi\nAnswer:\n",
            "references": ["Hello"],
        }

    def test_what_cannot_be_used_is_counted(self, jsonl):
        records = [
            turns("Q", "A"),
            turns("a", "b", "c", "d"),
            turns("Q"),
            turns(" ", "A"),
            {"messages": [{"role": "assistant", "content": "A"}]},
            {"messages": [{"role": "user", "content": None}]},
            {"messages": "Q"},
        ]
        assert load_rows(jsonl(*records)).report.dropped == {
            "empty prompt": 2,
            "several turns need template 'chat'": 1,
            "no answer": 1,
            "message without a role and a text": 1,
            "messages are not a list of role and content": 1,
        }

    def test_a_conversation_the_template_refuses_is_counted(self, jsonl, chat_tokenizer):
        refused = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "A"}]}
        rows = load_rows(jsonl(turns("Q", "A"), refused), template="chat", tokenizer=chat_tokenizer)
        assert rows.report.dropped == {"refused by the chat template (no tools)": 1}

    def test_a_tokenizer_without_a_chat_template_is_an_error(self, jsonl, byte_tokenizer):
        path = jsonl(turns("Q", "A"))
        assert "no tokenizer was given" in message_of(path, template="chat")
        message = message_of(path, template="chat", tokenizer=byte_tokenizer)
        assert "has none: choose alpaca, plain or a format string" in message

    def test_messages_survive_parquet(self, tmp_path):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist([turns("Q", "A")]), path)
        assert load_rows(path, template="plain").dataset[0] == {"prompt": "Q\nAnswer:\n", "references": ["A"]}


class TestFindColumns:
    def test_a_conversation_wins_over_its_first_prompt(self):
        assert find_columns(["prompt", "messages", "response"]) == {"messages": "messages"}

    def test_a_named_instruction_wins_over_a_conversation(self):
        found = find_columns(["text", "messages"], {"instruction": "text"})
        assert found == {"instruction": "text"}

    def test_a_named_column_plays_no_second_role(self):
        assert find_columns(["question", "answer"], {"instruction": "answer"}) == {"instruction": "answer"}

    def test_without_a_prompt_there_is_nothing(self):
        assert find_columns(["output", "input"]) == {}

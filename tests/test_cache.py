"""A cached teacher: the same run as with the teacher itself, resumed after a kill, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from killing import forked
from tiny import OF_THE_MACHINE, make_pair, save_llama, tiny_config
from transformers import AutoTokenizer

from kdkit.data import DistillCollator, encode_rows, load_rows
from kdkit.errors import RunFailed, UserError
from kdkit.loading import load_model
from kdkit.losses.alignment import pool_units
from kdkit.teacher.cache import CachedTeacher, cached_vocab_size, open_cache
from kdkit.teacher.cache.manifest import model_facts
from kdkit.teacher.cache.rows import RowIndex, batches_by_length
from kdkit.teacher.sources import LiveTeacher
from kdkit.training import run as run_module
from kdkit.training.caching import write_teacher_cache
from kdkit.training.run import run_distillation
from kdkit.training.stopping import Interrupted, StopRequest

SOFTENED = "objective.kd.temperature={start: 1.0, end: 2.0}"
SHARD_TOKENS = 200
KD = {"kd": {"loss": "forward_kl"}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def num_ids(pair):
    return len(AutoTokenizer.from_pretrained(pair["teacher"]))


@pytest.fixture(scope="module")
def whole(pair, num_ids, tmp_path_factory):
    """Every id in float32, hidden states by word, temperatures 1 to 2."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    config = tiny_config(pair, SOFTENED, f"objective.kd.top_k={num_ids}")
    write_teacher_cache(config, folder, dtype="float32", shard_tokens=SHARD_TOKENS)
    return folder


@pytest.fixture(scope="module")
def small(pair, tmp_path_factory):
    """Eight ids in float16, no hidden states, temperature 1."""
    folder = tmp_path_factory.mktemp("cache") / "small"
    config = tiny_config(pair, "objective.kd.top_k=8", objective=KD)
    write_teacher_cache(config, folder, shard_tokens=SHARD_TOKENS)
    return folder


@pytest.fixture(scope="module")
def rows(pair):
    """The rows of tiny_config's training, as tokens."""
    loaded = load_rows(tiny_config(pair).data.train, template="plain", limit=32)
    tokenizer = AutoTokenizer.from_pretrained(pair["student"])
    return encode_rows(loaded, tokenizer, max_length=160, max_prompt_length=128).dataset


@pytest.fixture(scope="module")
def batch(rows):
    return DistillCollator(0)([rows[index] for index in (11, 3, 3, 30)])


@pytest.fixture(scope="module")
def live(pair):
    return LiveTeacher(load_model(pair["teacher"], dtype=torch.float32, device="cpu"))


@pytest.fixture(scope="module")
def drawn(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "drawn"
    write_teacher_cache(tiny_config(pair, objective=KD), folder, samples=3000, shard_tokens=SHARD_TOKENS)
    return folder


@pytest.fixture(scope="module")
def config(pair):
    return tiny_config(pair, SOFTENED, "objective.kd.top_k=8")


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "cache"
    num_events = forked(lambda: write_teacher_cache(config, folder, shard_tokens=SHARD_TOKENS))
    return contents(folder), num_events


@pytest.fixture(scope="module")
def wide(pair, tmp_path_factory):
    folder = shutil.copytree(pair["teacher"], tmp_path_factory.mktemp("wide") / "teacher")
    model = load_model(folder, dtype=torch.float32, device="cpu")
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(folder)
    return str(folder)


def trace(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in found]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_trace(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        figures = {name: value for name, value in other.items() if isinstance(value, float)}
        assert {name: mine[name] for name in figures} == pytest.approx(figures, rel=1e-6, abs=1e-4)
        assert mine.keys() == other.keys()


class TestCachedIsLive:
    def test_with_every_id_losses_and_gradients_of_a_run_are_those_of_the_live_teacher(
        self, pair, whole, tmp_path, monkeypatch
    ):
        given = (SOFTENED, "evaluation.every_steps=2")
        run_distillation(tiny_config(pair, *given), tmp_path / "live")
        monkeypatch.setattr(run_module, "load_teacher", None)  # no stage may load it
        run_distillation(tiny_config(pair, *given, f"teacher.cache={whole}"), tmp_path / "cached")
        live = trace(tmp_path / "live")
        assert {"part/kd", "part/dtw", "part/lm", "grad_norm"} <= live[0].keys()
        assert {row["kind"] for row in live} == {"train", "eval"}
        assert_same_trace(trace(tmp_path / "cached"), live)

    def test_with_fewer_ids_a_run_is_that_of_the_live_teacher_with_as_many(self, pair, whole, tmp_path):
        given = ("objective.kd.top_k=5", "objective.dtw.importance=none")
        run_distillation(tiny_config(pair, *given), tmp_path / "live")
        run_distillation(tiny_config(pair, *given, f"teacher.cache={whole}"), tmp_path / "cached")
        assert_same_trace(trace(tmp_path / "cached"), trace(tmp_path / "live"))

    def test_the_real_teacher_is_measured_at_the_end_where_it_is_asked_for(self, pair, small, tmp_path):
        config = tiny_config(pair, "evaluation.teacher=true", f"teacher.cache={small}", objective=KD, max_steps=1)
        assert set(run_distillation(config, tmp_path / "run").evaluations) == {"student", "teacher"}

    def test_nothing_of_the_teacher_has_to_be_there(self, pair, tmp_path, capsys):
        moved = pair | {"teacher": str(shutil.copytree(pair["teacher"], tmp_path / "teacher"))}
        config = tiny_config(moved, objective=KD, max_steps=1)
        write_teacher_cache(config, tmp_path / "cache")
        shutil.rmtree(tmp_path / "teacher")
        asked = ("evaluation.teacher=true", f"teacher.cache={tmp_path / 'cache'}")
        config = tiny_config(moved, *asked, objective=KD, max_steps=1)
        assert set(run_distillation(config, tmp_path / "run").evaluations) == {"student"}
        assert "the teacher is not measured" in capsys.readouterr().err
        elsewhere = tiny_config(
            moved | {"teacher": "some/name"}, f"teacher.cache={tmp_path / 'cache'}", objective=KD, max_steps=1
        )
        with pytest.raises(UserError, match=r"teacher\.path: .*teacher there, some/name asked for"):
            run_distillation(elsewhere, tmp_path / "other")


class TestCachedTeacher:
    def test_gives_each_row_of_a_batch_in_any_order_and_twice(self, whole, live, batch):
        signal, expected = CachedTeacher(open_cache(whole))(batch), live(batch)
        for temperature in (1.0, 1.5, 2.0):
            dense = expected.logprobs_at(temperature).gather(-1, signal.support)
            torch.testing.assert_close(signal.logprobs_at(temperature)[:, :-1], dense, rtol=0, atol=1e-5)

    def test_pooling_its_hidden_states_gives_those_of_the_teacher(self, whole, live, batch):
        pooled, expected = (
            pool_units(teacher(batch).hidden_states, batch["unit_ids"], batch["max_units"])[0]
            for teacher in (CachedTeacher(open_cache(whole)), live)
        )
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)

    def test_half_precision_is_near(self, small, live, batch):
        signal = CachedTeacher(open_cache(small))(batch)
        kept = live(batch).logprobs_at(1.0).topk(8)
        assert torch.equal(signal.support, kept.indices)
        torch.testing.assert_close(signal.logprobs_at(1.0)[:, :-1], kept.values, rtol=2e-3, atol=2e-3)
        assert signal.hidden_states is None

    def test_a_row_that_was_not_cached_is_named(self, small, rows):
        row = dict(rows[4])
        row["input_ids"] = [*row["input_ids"][:-1], 5]
        with pytest.raises(UserError, match="row 4 of a batch is not in the cache"):
            CachedTeacher(open_cache(small))(DistillCollator(0)([rows[3], row]))

    def test_single_tokens_are_units_where_the_objective_says_so(self, pair, live, tmp_path):
        objective = {"hidden": {"weight": 1.0}, "kd": {"weight": 0.0}, "unit": "token"}
        write_teacher_cache(tiny_config(pair, objective=objective), tmp_path / "cache", dtype="float32")
        loaded = load_rows(tiny_config(pair).data.train, template="plain", limit=4)
        tokenizer = AutoTokenizer.from_pretrained(pair["student"])
        encoded = encode_rows(loaded, tokenizer, max_length=160, max_prompt_length=128, unit="token").dataset
        batch = DistillCollator(0)([encoded[index] for index in range(4)])
        is_unit = batch["unit_ids"] >= 0
        states = CachedTeacher(open_cache(tmp_path / "cache"))(batch).hidden_states[is_unit]
        torch.testing.assert_close(states, live(batch).hidden_states[is_unit], rtol=0, atol=1e-5)


class TestSamples:
    def test_shares_of_draws_approach_the_probabilities(self, drawn, live, batch, num_ids):
        signal = CachedTeacher(open_cache(drawn))(batch)
        columns = signal.logprobs_at(1.0).exp()
        shares = torch.zeros(len(columns), num_ids).scatter(-1, signal.support, columns[:, :-1])
        torch.testing.assert_close(shares, live(batch).logprobs_at(1.0).exp(), rtol=0, atol=0.05)

    def test_another_seed_draws_otherwise_and_the_same_seed_alike(self, pair, tmp_path):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            config = tiny_config(pair, f"seed={seed}", objective=KD)
            write_teacher_cache(config, tmp_path / name, samples=4, shard_tokens=SHARD_TOKENS)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
        shard = "shard-00000.safetensors"
        assert (tmp_path / "a" / shard).read_bytes() != (tmp_path / "c" / shard).read_bytes()

    def test_a_run_trains_on_them(self, pair, drawn, tmp_path):
        config = tiny_config(pair, f"teacher.cache={drawn}", objective=KD, max_steps=2)
        run_distillation(config, tmp_path / "cached")
        run_distillation(tiny_config(pair, objective=KD, max_steps=2), tmp_path / "live")
        ours, theirs = (trace(tmp_path / name)[0]["grad_norm"] for name in ("cached", "live"))
        assert ours == pytest.approx(theirs, rel=0.1)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("objective.kd.loss=reverse_kl", "objective.kd.loss: reverse_kl asked for"),
            ("objective.kd.temperature=2.0", "objective.kd.temperature: 2 asked for, and draws are from temperature 1"),
            ("objective.kd.top_k=4", "objective.kd.top_k: 4 asked for"),
            ("objective.dtw={weight: 1, importance: inverse_entropy}", "draws do not tell the entropy"),
        ],
    )
    def test_serve_forward_kl_at_temperature_one_alone(self, pair, drawn, tmp_path, override, message):
        with pytest.raises(UserError, match=message):
            write_teacher_cache(tiny_config(pair, override, objective=KD), tmp_path / "cache", samples=4)
        assert not (tmp_path / "cache").exists()
        config = tiny_config(pair, override, f"teacher.cache={drawn}", objective=KD)
        with pytest.raises(UserError, match=message):
            run_distillation(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def cache_killed_then_resumed(config, folder, kill_at):
    """A cache that is killed at an event and then resumed."""
    shutil.rmtree(folder, ignore_errors=True)
    assert forked(lambda: write_teacher_cache(config, folder, shard_tokens=SHARD_TOKENS), kill_at=kill_at) is None
    forked(lambda: write_teacher_cache(config, folder, shard_tokens=SHARD_TOKENS, resume=True))
    return contents(folder)


class TestResume:
    def test_after_a_kill_the_cache_is_byte_for_byte_that_of_an_uninterrupted_call(
        self, config, uninterrupted, tmp_path
    ):
        expected, num_events = uninterrupted
        assert sum(name.startswith("shard-") for name in expected) >= 4
        assert cache_killed_then_resumed(config, tmp_path / "cache", num_events // 2) == expected

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(5))
    def test_after_a_kill_at_a_random_moment(self, config, uninterrupted, tmp_path, seed):
        expected, num_events = uninterrupted
        moment = int(np.random.default_rng(seed).integers(1, num_events + 1))
        assert cache_killed_then_resumed(config, tmp_path / "cache", moment) == expected

    def test_a_stop_request_leaves_whole_shards(self, config, uninterrupted, tmp_path):
        class StopAfter(StopRequest):
            reads = 2

            @property
            def reason(self):
                self.reads -= 1
                return "SIGTERM" if self.reads < 0 else ""

        with pytest.raises(Interrupted):
            write_teacher_cache(config, tmp_path / "cache", stop=StopAfter(), shard_tokens=SHARD_TOKENS)
        left = contents(tmp_path / "cache")
        shards = [name for name in left if name.startswith("shard-")]
        assert 0 < len(shards) < 4
        assert all(left[name] == uninterrupted[0][name] for name in shards)
        with pytest.raises(UserError, match=r"not complete .*--resume"):
            open_cache(tmp_path / "cache")
        write_teacher_cache(config, tmp_path / "cache", resume=True, shard_tokens=SHARD_TOKENS)
        assert contents(tmp_path / "cache") == uninterrupted[0]

    @pytest.mark.parametrize("name", ["shard-00001.safetensors", "rows.safetensors", "tokenizer/tokenizer.json"])
    def test_a_file_that_was_cut_short_is_made_again(self, config, uninterrupted, tmp_path, name):
        write_teacher_cache(config, tmp_path / "cache", shard_tokens=SHARD_TOKENS)
        with (tmp_path / "cache" / name).open("r+b") as file:
            file.truncate(100)
        write_teacher_cache(config, tmp_path / "cache", resume=True, shard_tokens=SHARD_TOKENS)
        assert contents(tmp_path / "cache") == uninterrupted[0]

    def test_a_folder_with_another_cache_is_refused_and_each_difference_named(self, pair, small):
        before = contents(small)
        with pytest.raises(UserError, match="holds a cache: add --resume"):
            write_teacher_cache(tiny_config(pair, "objective.kd.top_k=8", objective=KD), small)
        other = tiny_config(pair, "objective.kd.top_k=9", "data.train_rows=31", objective=KD)
        with pytest.raises(UserError, match="another cache") as caught:
            write_teacher_cache(other, small, resume=True, shard_tokens=SHARD_TOKENS)
        said = str(caught.value)
        assert all(what in said for what in ("contents.k: 8 there, 9 asked for", "num_rows: 39 there, 38", "rows: oth"))
        assert contents(small) == before

    def test_a_folder_with_something_else_is_refused(self, pair, tmp_path):
        (tmp_path / "mine.txt").touch()
        for resume in (False, True):
            with pytest.raises(UserError, match="holds no cache"):
                write_teacher_cache(tiny_config(pair), tmp_path, resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_a_disk_without_room_is_refused_before_a_byte_is_written(self, pair, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5000))
        with pytest.raises(RunFailed, match=r"the cache needs 0 MiB more .* has 0 MiB free"):
            write_teacher_cache(tiny_config(pair, objective=KD), tmp_path / "cache")
        assert not (tmp_path / "cache").exists()


class TestRefusals:
    """Each names the difference, and nothing is loaded or written."""

    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, monkeypatch):
        monkeypatch.setattr(run_module, "load_teacher", None)
        monkeypatch.setattr(run_module, "load_model", None)

    def refused(self, tmp_path, pair, *overrides, objective=KD):
        with pytest.raises(UserError) as caught:
            run_distillation(tiny_config(pair, *overrides, objective=objective), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    def test_another_teacher(self, pair, small, tmp_path):
        other = save_llama(tmp_path / "other", hidden_size=24, seed=3)
        said = self.refused(tmp_path, pair | {"teacher": str(other)}, f"teacher.cache={small}")
        assert "is of another teacher" in said
        assert f"weights of the teacher: others there (of {pair['teacher']}) than in {other}" in said
        assert "config.json of the teacher" not in said  # the same sizes
        said = self.refused(tmp_path, pair, f"teacher.cache={small}", "teacher.dtype=bfloat16")
        assert "teacher.dtype: float32 there, bfloat16 asked for" in said

    def test_another_tokenizer(self, pair, small, tmp_path, byte_tokenizer):
        other = shutil.copytree(pair["student"], tmp_path / "student")
        byte_tokenizer.save_pretrained(other)
        said = self.refused(tmp_path, pair | {"student": str(other)}, f"teacher.cache={small}")
        assert "these differ" in said
        assert "kdkit cache CONFIG --generate" in said
        with pytest.raises(UserError, match=r"these differ: .*--generate"):
            write_teacher_cache(tiny_config(pair | {"student": str(other)}, objective=KD), tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_other_rows(self, pair, small, tmp_path):
        said = self.refused(tmp_path, pair, f"teacher.cache={small}", "data.train_rows=34")
        assert "lacks 2 of 34 train rows, the first of them row 33 (" in said
        said = self.refused(tmp_path, pair, f"teacher.cache={small}", "data.template=alpaca")
        assert "lacks 32 of 32 train rows" in said
        assert "data.template: plain there, alpaca asked for" in said

    def test_fewer_rows_are_no_difference(self, pair, small, tmp_path):
        said = self.refused(tmp_path, pair, f"teacher.cache={small}", "data.train_rows=5", "data.validation_rows=8")
        assert "lacks 1 of 8 validation rows" in said

    @pytest.mark.parametrize("name", ["shard-00001.safetensors", "rows.safetensors", "tokenizer/tokenizer.json"])
    def test_a_file_that_is_cut_short_missing_or_changed(self, pair, small, tmp_path, name):
        def broken(spoil):
            folder = shutil.copytree(small, tmp_path / "cache", dirs_exist_ok=True)
            spoil(folder / name)
            return self.refused(tmp_path, pair, f"teacher.cache={folder}")

        content = (small / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        assert f"{name} has {len(content) - 1:,} bytes and was written with {len(content):,}" in broken(
            lambda path: path.write_bytes(content[:-1])
        )
        assert f"{name} is not what was written (its checksum differs)" in broken(
            lambda path: path.write_bytes(flipped)
        )
        assert f"lacks {name}" in broken(lambda path: path.unlink())

    def test_a_folder_without_a_cache_or_with_a_damaged_manifest(self, pair, tmp_path):
        assert "holds no cache" in self.refused(tmp_path, pair, f"teacher.cache={tmp_path}")
        (tmp_path / "cache.json").write_text('{"version": 1}')
        assert "is damaged or of another version" in self.refused(tmp_path, pair, f"teacher.cache={tmp_path}")

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("objective.kd.top_k=9", "objective.kd.top_k: 8 ids there, 9 asked for"),
            ("objective.kd.temperature=2.0", "objective.kd.temperature: 1 there, 2 asked for"),
            ("objective.dtw.weight=1", "objective.dtw: no hidden states there, those by word asked for"),
            ("objective.contrastive.weight=1", "objective.contrastive: no hidden states there"),
        ],
    )
    def test_what_was_not_kept(self, pair, small, tmp_path, override, message):
        assert message in self.refused(tmp_path, pair, override, f"teacher.cache={small}")

    def test_hidden_states_of_other_units(self, pair, whole, tmp_path):
        given = ("objective.unit=token", f"teacher.cache={whole}")
        said = self.refused(tmp_path, pair, *given, objective=KD | {"hidden": {"weight": 1.0}})
        assert "objective.hidden: hidden states by word there, those by token asked for" in said

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("rollout={mode: on_policy, max_new_tokens: 8, collapse: null}", "knows only the text it was cached on"),
            ("objective.attention.weight=1", r"objective\.attention looks inside the teacher"),
            ("objective.layerwise.weight=1", r"objective\.layerwise looks inside the teacher"),
            ("objective.routing.weight=1", r"objective\.routing looks inside the teacher"),
        ],
    )
    def test_what_no_cache_can_serve(self, pair, tmp_path, override, message):
        with pytest.raises(UserError, match=message):
            tiny_config(pair, override, "teacher.cache=somewhere", objective=KD)
        with pytest.raises(UserError, match=message):
            write_teacher_cache(tiny_config(pair, override, objective=KD), tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_a_config_without_a_teacher_has_nothing_to_cache(self, pair, tmp_path):
        config = tiny_config(pair, objective={"kd": {"weight": 0.0}, "lm": {"weight": 1.0}})
        with pytest.raises(UserError, match="nothing to cache"):
            write_teacher_cache(config, tmp_path / "cache")

    def test_hidden_states_beyond_half_precision(self, pair, tmp_path):
        large = shutil.copytree(pair["teacher"], tmp_path / "teacher")
        model = load_model(large, dtype=torch.float32, device="cpu")
        model.model.norm.weight.data.mul_(1e5)
        model.save_pretrained(large)
        objective = KD | {"hidden": {"weight": 1.0}}
        config = tiny_config(pair | {"teacher": str(large)}, objective=objective)
        with pytest.raises(UserError, match="beyond what float16 holds: cache with --dtype float32"):
            write_teacher_cache(config, tmp_path / "cache")


class TestVocabularies:
    """Of a teacher and a student that pad one vocabulary to other widths."""

    def test_ids_beyond_the_students_have_no_share(self, pair, wide, num_ids, tmp_path):
        config = tiny_config(pair | {"teacher": wide}, "objective.kd.top_k=1000000", objective=KD, max_steps=2)
        write_teacher_cache(config, tmp_path / "cache", dtype="float32")
        cache = open_cache(tmp_path / "cache")
        assert (cache.contents.num_ids, cache.contents.k) == (num_ids, num_ids)
        run_distillation(config, tmp_path / "live")
        overrides = (f"teacher.cache={tmp_path / 'cache'}",)
        run_distillation(
            tiny_config(pair | {"teacher": wide}, *overrides, objective=KD, max_steps=2), tmp_path / "cached"
        )
        assert_same_trace(trace(tmp_path / "cached"), trace(tmp_path / "live"))

    def test_a_wider_student_is_cut_and_a_narrower_one_refused(self, pair, wide, num_ids, small, tmp_path):
        cut, narrow = (load_model(path, dtype=torch.float32, device="cpu") for path in (wide, pair["student"]))
        assert cached_vocab_size(open_cache(small), cut) == num_ids
        assert cached_vocab_size(open_cache(small), narrow) is None
        config = tiny_config({"teacher": wide, "student": wide}, objective=KD)
        write_teacher_cache(config, tmp_path / "cache")
        with pytest.raises(UserError, match=rf"over {num_ids + 8:,} ids, and the student's head knows {num_ids:,}"):
            cached_vocab_size(open_cache(tmp_path / "cache"), narrow)


class TestRowIndex:
    def test_each_row_once_and_none_without_an_answer(self, rows):
        bare = dict(rows[0]) | {"input_ids": rows[0]["input_ids"][: rows[0]["prompt_length"]]}
        index, kept = RowIndex.of([rows[0], rows[1], rows[0], bare])
        assert [row["row_id"] for row in kept] == [0, 1]
        assert index.num_tokens.tolist() == [len(row["input_ids"]) - row["prompt_length"] for row in kept]

    @pytest.mark.parametrize("shard_tokens", [1, 7, 100, 10**6])
    def test_shards_hold_every_row_in_order(self, rows, shard_tokens):
        index, _ = RowIndex.of(rows)
        shards = index.shards(shard_tokens)
        assert [place for rows_of in shards for place in range(len(index))[rows_of]] == list(range(len(index)))
        assert all(index.num_tokens[rows_of].sum() >= min(shard_tokens, 1) for rows_of in shards)

    def test_a_batch_stays_within_its_tokens_and_all_rows_are_in_one(self, rows):
        batches = batches_by_length(rows, 400)
        assert sorted(place for places in batches for place in places) == list(range(len(rows)))
        lengths = [[len(rows[place]["input_ids"]) for place in places] for places in batches]
        assert all(len(of_batch) * max(of_batch) <= 400 for of_batch in lengths)
        assert lengths[0][0] == max(map(max, lengths))


class TestModelFacts:
    def test_finds_another_checkpoint_and_another_config(self, pair, tmp_path):
        before = model_facts(shutil.copytree(pair["teacher"], tmp_path / "model"))
        file = tmp_path / "model" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        after = model_facts(tmp_path / "model")
        assert before["config_sha256"] == after["config_sha256"]
        assert before["weights_sha256"] != after["weights_sha256"]

"""Counted on fake tensors against tensors that are there, and the laws that hold between counts."""

import itertools

import pytest
import torch
from pairs_published import NUM_PARAMETERS, config_of
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from kdkit import compiled
from kdkit.config import DistillConfig, load_config
from kdkit.errors import UserError
from kdkit.memory.counting import BLOCK_BYTES, LiveBytes
from kdkit.memory.exact import Counted, count_step

PHASES = {"teacher", "student", "backward", "optimizer", "evaluation", "generation"}
SMALL = {"max_position_embeddings": 512, "tie_word_embeddings": True}


def llama(width: int, layers: int, *, vocab_size: int = 4000) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        **SMALL,
    )


def moe() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=3000,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        **SMALL,
    )


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=4000, n_positions=512, n_embd=128, n_layer=3, n_head=4)


def config(preset: str = "fkl", *, rows: int = 4, length: int = 96, **parts: dict) -> DistillConfig:
    """A stage of few rows; evaluation is smaller than training, so that the peak is in the step."""
    given = {
        "data": {"max_length": length, "max_prompt_length": length // 2},
        "optim": {"batch_size": rows},
        "evaluation": {"batch_size": 2, "max_new_tokens": 16},
        "teacher": {"dtype": "auto"},
    }
    for name, part in parts.items():
        given[name] = {**given.get(name, {}), **part}
    return load_config({"preset": ["demo", preset], **given})


def counted(
    settings: DistillConfig,
    *,
    teacher: PreTrainedConfig | None = None,
    student: PreTrainedConfig | None = None,
    precision: str = "float16",
    **told: object,
) -> Counted:
    """Of a small pair, unless another one is given."""
    pair = {"teacher": teacher or llama(256, 4), "student": student or llama(128, 3)}
    return count_step(settings, **pair, precision=precision, **told)


def witnessed(settings: DistillConfig, *, teacher: PreTrainedConfig, student: PreTrainedConfig) -> tuple[Counted, int]:
    """The count over real tensors, and the most that torch's own profiler saw allocated meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        own = counted(settings, teacher=teacher, student=student, precision="float32", kernels="cpu", fake=False)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return own, max(itertools.accumulate(sizes))


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tensors go the way of those without values, which no loop compiled for the CPU can read."""
    monkeypatch.setattr(compiled, "is_installed", lambda: False)


@pytest.mark.usefixtures("as_on_a_card")
class TestCountOfFakeTensors:
    @pytest.mark.parametrize(
        ("teacher", "student", "preset", "crosses"),
        [
            (llama(256, 4), llama(128, 3), "fkl-dtw", False),
            (gpt2(), gpt2(), "fkl-dtw", False),
            (llama(256, 4, vocab_size=6000), llama(128, 3), "fkl-dtw", True),
            (moe(), llama(128, 3), "student-aware", True),
        ],
        ids=["llama", "gpt2", "two tokenizers", "experts"],
    )
    def test_is_that_of_real_ones(self, teacher, student, preset, crosses):
        settings = config(preset, length=64, student={"attention": "eager"}, teacher={"attention": "eager"})
        pair = {"teacher": teacher, "student": student, "precision": "bfloat16", "crosses": crosses, "kernels": "cpu"}
        fake, real = (count_step(settings, **pair, fake=is_fake) for is_fake in (True, False))
        for phase in PHASES:
            assert fake.phases[phase] == pytest.approx(real.phases[phase], rel=0.02), phase

    def test_is_within_a_tenth_of_what_the_profiler_saw(self):
        settings = config("fkl-dtw", rows=8)
        pair = {"teacher": llama(256, 4), "student": llama(128, 3)}
        fake = counted(settings, **pair, precision="float32", kernels="cpu")
        real, seen_bytes = witnessed(settings, **pair)
        assert real.peak_bytes == pytest.approx(seen_bytes, rel=0.1)
        assert fake.peak_bytes == pytest.approx(seen_bytes, rel=0.1)

    @pytest.mark.slow
    def test_is_within_a_tenth_of_what_the_profiler_saw_of_a_pair_of_50_million_parameters(self):
        settings = config("fkl-dtw", rows=4, length=256)
        pair = {"teacher": llama(512, 10, vocab_size=16_000), "student": llama(256, 6, vocab_size=16_000)}
        fake = counted(settings, **pair, precision="float32", kernels="cpu")
        real, seen_bytes = witnessed(settings, **pair)
        print(f"counted {fake.peak_bytes:,}, on real tensors {real.peak_bytes:,}, profiler {seen_bytes:,} bytes")
        assert fake.peak_bytes == pytest.approx(seen_bytes, rel=0.1)


class TestParts:
    @pytest.mark.parametrize("rows", [1, 8])
    def test_sum_to_the_peak(self, rows):
        found = counted(config(rows=rows))
        assert sum(found.parts.values()) == found.peak_bytes == max(found.phases.values())
        assert found.phases[found.phase] == found.peak_bytes
        assert set(found.phases) == PHASES
        assert found.teacher_peak_bytes == 0

    def test_weights_and_states_are_what_the_sizes_say(self):
        found = counted(config(rows=1, length=16), student=config_of("smollm-135m"))
        num_bytes = 4 * NUM_PARAMETERS["smollm-135m"]
        assert found.parts["student weights"] == pytest.approx(num_bytes, rel=1e-3)
        assert found.parts["optimizer states"] == pytest.approx(2 * num_bytes, rel=1e-3)
        held = found.parts["teacher weights"] + 4 * num_bytes  # weights, gradients and two states
        assert found.phases["optimizer"] == pytest.approx(held, rel=1e-3)

    def test_the_divergence_never_holds_the_logits_of_all_positions(self):
        """Of 7 times the positions it takes their hidden states' gradients more, and no logits: those of the added
        positions would be 30 times as large."""
        few, many = (counted(config(rows=rows, length=128)).parts["divergence"] for rows in (4, 28))
        positions, width, vocab_size = 24 * 127, 128, 4000
        assert many - few < 4 * positions * width * 3
        assert 4 * positions * width * 3 < 2 * positions * vocab_size

    def test_a_teacher_on_its_own_card_is_not_on_the_students(self):
        together, apart = (counted(config(teacher={"device": device})) for device in ("auto", "cuda:1"))
        assert "teacher weights" not in apart.parts
        assert apart.peak_bytes < together.peak_bytes
        assert apart.teacher_peak_bytes > together.parts["teacher weights"]


class TestSettings:
    def test_gradient_checkpointing_lowers_the_peak(self):
        kept, recomputed = (
            counted(config(rows=16, student={"gradient_checkpointing": on}), student=llama(128, 12))
            for on in (False, True)
        )
        assert recomputed.phases["student"] < 0.7 * kept.phases["student"]

    def test_accumulation_raises_it_by_the_gradients(self):
        once, twice = (counted(config(optim={"accumulation": number})) for number in (1, 2))
        assert twice.phases["teacher"] - once.phases["teacher"] == pytest.approx(twice.parts["gradients"], rel=0.01)
        assert twice.peak_bytes > once.peak_bytes

    def test_the_teachers_dtype_and_bits_are_what_its_weights_take(self):
        teacher = llama(256, 4)
        told = [{"dtype": "float32"}, {"dtype": "float16"}, {"quantization": "int8"}, {"quantization": "nf4"}]
        full, half, eight, four = (
            counted(config(teacher=way), teacher=teacher).parts["teacher weights"] for way in told
        )
        embeddings = 2 * 4000 * 256
        linear = half - embeddings  # but for the norms, which are small
        assert half == pytest.approx(full / 2, rel=0.01)
        assert eight == pytest.approx(embeddings + linear / 2, rel=0.02)
        assert four == pytest.approx(embeddings + linear * 4.5 / 16, rel=0.02)

    def test_an_8_bit_optimizer_keeps_two_bytes_a_weight_but_of_embeddings(self):
        student = llama(256, 4)
        states = [
            counted(config(optim={"optimizer": name}), student=student).parts["optimizer states"]
            for name in ("adamw_torch", "adamw_8bit")
        ]
        embeddings = 8 * 4000 * 256
        assert states[1] == pytest.approx(embeddings + (states[0] - embeddings) * (2 + 8 / 256) / 8, rel=0.02)

    @pytest.mark.parametrize(
        "asked",
        [
            {"student": {"from_scratch": False, "lora": {"rank": 8}}},
            {"teacher": {"cache": "somewhere"}},
            {"teacher": {"device": "offload"}},
        ],
    )
    def test_what_it_cannot_count_is_refused(self, asked):
        with pytest.raises(UserError, match="leave --exact out"):
            counted(config(**asked))

    def test_an_average_of_the_weights_is_one_more_copy(self):
        plain, averaged = (counted(config(optim={"ema": ema})) for ema in (None, {}))
        one_copy = plain.parts["student weights"]  # with the buffers, which are no part of it
        assert averaged.parts["average of the weights"] == pytest.approx(one_copy, rel=1e-3)

    def test_rollouts_take_a_cache_of_their_own(self):
        rollout = {"mode": "on_policy", "max_new_tokens": 48, "batch_size": 64}
        without, with_them = (counted(config(rollout=given)) for given in ({}, rollout))
        assert with_them.phases["generation"] > without.phases["generation"]

    def test_autocast_keeps_casted_weights_and_half_the_activations(self):
        full, half = (counted(config(rows=16), precision=dtype).phases["student"] for dtype in ("float32", "bfloat16"))
        assert half < full


class TestCardKernels:
    def test_fused_attention_keeps_no_maps_on_a_card(self):
        """The CPU's kernel with a mask and dropout would keep (B, heads, T, T)."""
        fused, eager = (
            counted(config(rows=2, length=512, student={"attention": attention}), student=gpt2())
            for attention in ("sdpa", "eager")
        )
        maps = 3 * 2 * 4 * 512**2
        assert eager.phases["student"] - fused.phases["student"] > 2 * 2 * maps

    def test_the_optimizer_has_no_copies_on_a_card(self):
        """Over lists of tensors AdamW would take the roots of all second moments at once."""
        found = counted(config(rows=1), student=llama(128, 12))
        parts = counted(config(rows=8), student=llama(128, 12)).parts
        held = sum(parts[name] for name in ("teacher weights", "student weights", "optimizer states"))
        assert found.phases["optimizer"] == pytest.approx(held + parts["student weights"], rel=0.02)  # and gradients


class TestLiveBytes:
    def test_rounds_each_storage_up_and_counts_views_once(self):
        with LiveBytes() as count, count.phase("all"), count.part("a"):
            kept = torch.zeros(130)  # 520 bytes
            view = kept[:4]
            with count.part("b"):
                torch.zeros(1000).sum()
        assert count.live_bytes == 2 * BLOCK_BYTES
        assert count.peaks["all"].parts == {"a": 1024, "b": 4096 + BLOCK_BYTES}
        del kept
        assert count.live_bytes == 2 * BLOCK_BYTES  # the view holds it
        del view
        assert count.live_bytes == 0

    def test_a_storage_can_change_its_part(self):
        with LiveBytes() as count, count.part("a"):
            tensor = torch.zeros(128)
            count.hold([tensor], "b")
        assert count.live_parts == {"a": 0, "b": BLOCK_BYTES}

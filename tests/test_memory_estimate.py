"""The estimate against the count: what a layer keeps, and the peak of published pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pairs_published import PAIRS, SETTINGS, config_of
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from kdkit.config import load_config
from kdkit.memory import counting
from kdkit.memory.activations import HALF, SINGLE, kept_bytes
from kdkit.memory.cards import find_card
from kdkit.memory.counting import LiveBytes
from kdkit.memory.estimate import estimate_memory
from kdkit.memory.exact import count_step
from kdkit.memory.sizes import ModelSizes, sizes_of
from kdkit.memory.stand_ins import CardKernels

ROWS, LENGTH = 2, 64
WIDTHS = [(64, 128, 4, 4), (96, 192, 4, 2), (128, 320, 8, 2), (64, 192, 8, 8)]
"""Hidden and inner width, heads, heads of keys."""


def sizes_from(config: PreTrainedConfig) -> ModelSizes:
    return replace(sizes_of(json.loads(json.dumps(config.to_dict(), default=str)), num_params=0), num_others=0)


def layer_config(family: str, num_layers: int, widths: tuple[int, int, int, int], attention: str) -> PreTrainedConfig:
    hidden, inner, heads, kv_heads = widths
    if family == "gpt2":
        given = {"n_embd": hidden, "n_inner": inner, "n_head": heads, "n_layer": num_layers, "n_positions": 128}
    else:
        given = {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_hidden_layers": num_layers,
        }
        given |= {} if family == "gpt_neox" else {"num_key_value_heads": kv_heads}
        given |= {"head_dim": 16} if family in ("llama", "qwen3") else {}
    return CONFIG_MAPPING[family](vocab_size=64, attn_implementation=attention, pad_token_id=0, **given)


def held_bytes(config: PreTrainedConfig, dtype: torch.dtype | None) -> int:
    """What a forward pass of padded rows leaves alive, without autocast's copies of the weights."""
    count = LiveBytes(FakeTensorMode(allow_non_fake_inputs=True))
    with count, no_init_weights():
        model = AutoModelForCausalLM.from_config(config).train()
        model.tie_weights()
    ids, mask = torch.ones(ROWS, LENGTH, dtype=torch.int64), torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[0, -3:] = 0
    count.hold((*model.parameters(), *model.buffers()))
    before = count.live_bytes
    with count, CardKernels(has_flash_attention=False), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    held = count.live_bytes - before
    del output
    return held - (0 if dtype is None else HALF * sizes_from(config).product_params)


class TestKept:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("dtype", [torch.float16, None])
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
    def test_a_layer_keeps_what_the_table_says(self, monkeypatch, family, dtype, attention):
        """transformers may change what a layer keeps; then these numbers have to be counted again."""
        if family == "gpt_neox" and attention == "eager":
            pytest.skip("keeps less than the table's rule for written-down maps")
        monkeypatch.setattr(counting, "BLOCK_BYTES", 1)
        for widths in WIDTHS if family in ("llama", "qwen3") else [w for w in WIDTHS if w[2] == w[3]]:
            deep, shallow = (layer_config(family, depth, widths, attention) for depth in (3, 2))
            counted = held_bytes(deep, dtype) - held_bytes(shallow, dtype)
            expected = np.diff(
                [
                    kept_bytes(
                        sizes_from(config),
                        num_rows=ROWS,
                        length=LENGTH,
                        number=SINGLE if dtype is None else HALF,
                        attention=attention,
                        repeats_kv=True,
                        checkpointing=False,
                    )
                    for config in (shallow, deep)
                ]
            )
            assert expected[0] == pytest.approx(counted, rel=0.015), widths


def compared(pair: str, setting: str) -> tuple[int, int]:
    """(estimated, counted) bytes of tensors at the peak."""
    teacher, student, told = PAIRS[pair]
    rows, length = SETTINGS[setting]["batch"]
    config = load_config(
        {
            "preset": ["demo", "fkl-dtw"],
            "teacher": {"dtype": "float16", **told},
            "student": {"gradient_checkpointing": SETTINGS[setting]["gradient_checkpointing"]},
            "data": {"max_length": length, "max_prompt_length": length // 2},
            "optim": {"batch_size": rows, "precision": "float16"},
            "evaluation": {"batch_size": 8, "max_new_tokens": 128},
        }
    )
    configs = {"teacher": config_of(teacher), "student": config_of(student)}
    sizes = {role: sizes_from(shape) for role, shape in configs.items()}
    planned = estimate_memory(config, **sizes, card=find_card("t4"), precision="float16")
    counted = count_step(config, **configs, precision="float16", crosses="Huihui" in pair)
    print(f"{pair}, {setting}: planned {planned.tensor_bytes:,}, counted {counted.peak_bytes:,} in {counted.phase}")
    return planned.tensor_bytes, counted.peak_bytes


class TestEstimate:
    def test_of_a_published_pair_is_within_a_tenth_of_the_count(self):
        planned, counted = compared("GPT-2 XL -> GPT-2", "4 x 512")
        assert planned == pytest.approx(counted, rel=0.1)

    @pytest.mark.slow
    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("pair", PAIRS)
    def test_of_every_published_pair_is_within_a_tenth_of_the_count(self, pair, setting):
        planned, counted = compared(pair, setting)
        assert planned == pytest.approx(counted, rel=0.1)

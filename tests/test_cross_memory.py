"""Peak memory of the curriculum's terms at the shapes of the real pair, counted on fake tensors: no weight exists."""

from pairs_published import config_of

from kdkit.config import load_config
from kdkit.memory.exact import count_step
from kdkit.runtime import GIB


class TestPeak:
    def test_of_the_curriculum_with_routing_at_the_real_pairs_shapes_is_below_16_gib(self):
        """Seeds 001 to 004 ran out of 16 GB on this pair, for the logits of both vocabularies were whole."""
        config = load_config(
            {
                "preset": ["demo-moe", "student-aware"],
                "teacher": {"dtype": "auto"},
                "data": {"max_length": 256, "max_prompt_length": 160},
                "objective": {"routing": {"weight": 0.1}, "kd": {"across": "grouped"}},
                "optim": {"batch_size": 4, "accumulation": 8},
                "evaluation": {"batch_size": 4},
            }
        )
        pair = {"teacher": config_of("huihui-moe-1b"), "student": config_of("smollm-135m")}
        found = count_step(config, **pair, precision="bfloat16", crosses=True)
        for name, num_bytes in found.parts.items():
            print(f"{name}: {num_bytes / GIB:.2f} GiB")
        assert found.parts["teacher weights"] >= 2 * 1_066_392_576
        assert found.peak_bytes <= 16 * GIB

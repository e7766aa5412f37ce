"""The machine as kdkit sees it, on simulated cards and on this CPU."""

# ruff: noqa: NPY002  (the global generators are what is tested)

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import safetensors.torch
import torch

from kdkit import runtime
from kdkit.errors import UserError

GIB = 2**30
# As printed by torch.cuda.get_arch_list() of the builds on PyPI and download.pytorch.org.
TORCH_27_CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
TORCH_28_CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CARDS = {"P100": (6, 0), "T4": (7, 5), "A100": (8, 0), "L4": (8, 9), "H100": (9, 0), "RTX 5090": (12, 0)}


class TestBuildRunsOn:
    @pytest.mark.parametrize(
        ("card", "arch_list", "runs"),
        [
            ("P100", TORCH_27_CU126, True),
            ("P100", TORCH_28_CU128, False),
            ("T4", TORCH_28_CU128, True),
            ("A100", TORCH_28_CU128, True),
            ("L4", TORCH_28_CU128, True),  # 8.9 runs what was built for 8.6
            ("H100", TORCH_28_CU128, True),
            ("RTX 5090", TORCH_28_CU128, True),
            ("RTX 5090", TORCH_27_CU126, False),
        ],
    )
    def test_real_cards_against_real_builds(self, card, arch_list, runs):
        assert runtime.build_runs_on(CARDS[card], arch_list) is runs

    def test_binary_code_does_not_cross_the_major_version(self):
        assert not runtime.build_runs_on((9, 0), ["sm_80", "sm_89"])

    def test_binary_code_for_a_higher_minor_version_does_not_run(self):
        assert not runtime.build_runs_on((8, 0), ["sm_86"])

    def test_ptx_serves_newer_cards_and_not_older_ones(self):
        assert runtime.build_runs_on((12, 0), ["compute_80"])
        assert not runtime.build_runs_on((7, 5), ["compute_80"])

    def test_suffix_a_means_exactly_that_card(self):
        assert runtime.build_runs_on((9, 0), ["sm_90a"])
        assert not runtime.build_runs_on((10, 3), ["sm_100a"])
        assert runtime.build_runs_on((10, 3), ["sm_100f"])

    def test_other_notation_leaves_the_verdict_to_the_operation(self):
        assert runtime.build_runs_on((9, 4), ["gfx90a", "gfx942"])


class TestInstallLine:
    def test_a_pascal_card_gets_the_last_build_with_its_kernels(self):
        line = "pip install torch==2.7.1 --index-url https://download.pytorch.org/whl/cu126"
        assert runtime.install_line((6, 0)) == line

    def test_a_card_newer_than_the_build_gets_a_newer_build(self):
        assert "--upgrade torch" in runtime.install_line((12, 0))

    def test_a_card_without_any_build_is_sent_to_the_cpu(self):
        assert "CPU" in runtime.install_line((3, 5))


@pytest.fixture
def simulate_cards(monkeypatch):
    """Make torch report cards that are not here; `failure` is what the small operation says on each."""

    def simulate(capabilities, *, arch_list, failure="", free_gib=15):
        properties = namedtuple("properties", "name total_memory")("Simulated card", 16 * GIB)
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(cuda, "get_device_name", lambda index: properties.name)
        monkeypatch.setattr(cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(cuda, "get_arch_list", lambda: arch_list)
        monkeypatch.setattr(cuda, "mem_get_info", lambda index: ((free_gib - index) * GIB, 16 * GIB))
        monkeypatch.setattr(runtime, "_operation_failure", lambda device: failure)

    return simulate


class TestPreflight:
    def test_this_machine_passes_with_a_real_operation(self):
        found = runtime.preflight()
        assert found.ok
        assert runtime._operation_failure(found.device) == ""
        assert found.total_memory_bytes > 0

    def test_a_p100_under_a_new_build_is_refused_with_the_install_line(self, simulate_cards):
        simulate_cards([(6, 0)], arch_list=TORCH_28_CU128)
        found = runtime.preflight()
        assert (found.device, found.ok) == ("cuda", False)
        assert "sm_60" in found.problem
        assert found.remedy == "pip install torch==2.7.1 --index-url https://download.pytorch.org/whl/cu126"

    def test_two_t4_pass(self, simulate_cards):
        simulate_cards([(7, 5), (7, 5)], arch_list=TORCH_28_CU128)
        found = runtime.preflight()
        assert found.ok
        assert (found.num_devices, found.capability) == (2, (7, 5))
        assert found.total_memory_bytes == 16 * GIB
        assert found.problem == found.remedy == ""
        assert [card.device for card in found.cards] == ["cuda:0", "cuda:1"]
        assert [card.free_memory_bytes for card in found.cards] == [15 * GIB, 14 * GIB]
        assert found.card("cuda:1").free_memory_bytes == 14 * GIB
        assert found.card("cuda") == found.card("cuda:0") == found.cards[0]
        assert found.card("cpu") is found.card("cuda:2") is None

    def test_the_second_card_is_looked_at_too(self, simulate_cards):
        simulate_cards([(8, 0), (6, 1)], arch_list=TORCH_28_CU128)
        found = runtime.preflight()
        assert not found.ok
        assert "cuda:1" in found.problem

    def test_a_card_that_matches_but_fails_the_operation_is_refused(self, simulate_cards):
        simulate_cards([(7, 5)], arch_list=TORCH_28_CU128, failure="CUDA error: out of memory")
        found = runtime.preflight()
        assert not found.ok
        assert "out of memory" in found.problem

    def test_a_process_of_several_looks_at_its_own_card_alone(self, simulate_cards, monkeypatch):
        """Each of N processes probed all N cards: N x N contexts of some 400 MiB."""
        simulate_cards([(8, 0), (8, 0), (8, 0)], arch_list=TORCH_28_CU128)
        probed = []
        monkeypatch.setattr(runtime, "_operation_failure", lambda device: probed.append(device) or "")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert runtime.preflight().ok
        assert probed == ["cuda:1"]
        monkeypatch.setenv("LOCAL_RANK", "3")  # more processes than cards
        assert runtime.preflight().num_devices == 3
        assert probed == ["cuda:1", "cuda:0", "cuda:1", "cuda:2"]

    def test_an_apple_gpu_is_left_alone(self, monkeypatch):
        """It has no float64: every run crashed at its first sum."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        found = runtime.preflight()
        assert (found.device, found.ok, found.num_devices) == ("cpu", True, 1)
        assert found.problem == "the Apple GPU has no float64, which kdkit's sums need: running on the CPU"

    def test_a_driver_under_a_cpu_build_is_pointed_out(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        found = runtime.preflight()
        assert (found.device, found.ok) == ("cpu", True)
        assert "CPU" in found.problem
        assert found.remedy.startswith("pip install")

    def test_a_failing_operation_is_reported_in_one_line(self):
        message = runtime._operation_failure("nosuchdevice")  # torch's own RuntimeError
        assert "nosuchdevice" in message
        assert "\n" not in message


class TestUsableDtype:
    @pytest.mark.parametrize(
        ("card", "dtype"),
        [("P100", "float16"), ("T4", "float16"), ("A100", "bfloat16"), ("H100", "bfloat16")],
    )
    def test_bfloat16_needs_capability_8(self, card, dtype):
        assert runtime.usable_dtype("cuda", CARDS[card]).dtype == dtype

    def test_emulated_bfloat16_does_not_count(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *given, **named: True)
        assert runtime.usable_dtype("cuda", (7, 5)).dtype == "float16"

    def test_no_card_computes_in_float32(self):
        assert runtime.usable_dtype("cpu", None).dtype == "float32"

    @pytest.mark.parametrize(
        ("line", "units"),
        [
            ("flags\t\t: fpu avx512_bf16 amx_tile amx_bf16", "AMX"),
            ("flags\t\t: fpu avx2 avx512f avx512_bf16", "AVX512-BF16"),
            ("Features\t: fp asimd bf16 i8mm", "Arm BF16"),
            ("flags\t\t: fpu avx2 avx512f amx_tile", ""),
            ("vendor_id\t: avx512_bf16", ""),
        ],
    )
    def test_what_of_a_cpu_multiplies_bfloat16(self, tmp_path, monkeypatch, line, units):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
        assert runtime.cpu_bfloat16_units(cpuinfo) == units
        monkeypatch.setattr(runtime, "cpu_bfloat16_units", lambda: units)
        choice = runtime.usable_dtype("cpu", None)
        assert choice.dtype == "float32"
        assert ("optim.precision=bfloat16" in choice.reason) == bool(units)

    def test_a_system_that_lists_no_features_has_no_units_that_we_know_of(self, tmp_path):
        assert runtime.cpu_bfloat16_units(tmp_path / "absent") == ""

    def test_the_reason_names_the_capability(self):
        assert "7.5" in runtime.usable_dtype("cuda", (7, 5)).reason

    def test_a_card_without_capability_is_a_mistake_of_the_caller(self):
        with pytest.raises(ValueError, match="capability"):
            runtime.usable_dtype("cuda", None)


class TestThreadCount:
    def test_is_what_a_process_may_use(self):
        assert 1 <= runtime.thread_count() <= len(os.sched_getaffinity(0))

    @pytest.mark.parametrize(
        ("content", "count"), [("150000 100000\n", 2), ("max 100000\n", 8), ("20000 100000\n", 1), (None, 8)]
    )
    def test_a_container_may_have_less(self, tmp_path, monkeypatch, content, count):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
        quota = tmp_path / "cpu.max"
        if content is not None:
            quota.write_text(content)
        assert runtime.thread_count(quota) == count


def draw_everything():
    """Three draws from each global source, with a normal draw that leaves a cached second one behind."""
    return (
        [random.random(), random.gauss(0.0, 1.0), random.random()],
        [np.random.rand(), np.random.randn(), np.random.rand()],
        torch.rand(3).tolist(),
    )


class TestSeedEverything:
    def test_the_same_seed_gives_the_same_draws_from_every_source(self):
        draws = []
        for seed in (7, 7, 8):
            runtime.seed_everything(seed)
            draws.append(draw_everything())
        assert draws[0] == draws[1]
        assert all(first != other for first, other in zip(draws[0], draws[2], strict=True))

    def test_a_seed_beyond_32_bits_is_accepted(self):
        runtime.seed_everything(2**40 + 3)


class TestGenerator:
    def test_depends_on_seed_and_keys_only(self):
        first = torch.rand(4, generator=runtime.generator(1, "rollout", 20))
        torch.manual_seed(99)
        torch.rand(5)
        assert torch.equal(first, torch.rand(4, generator=runtime.generator(1, "rollout", 20)))

    def test_no_two_keys_share_a_stream(self):
        keys = [(1,), (2,), (1, 0), (1, "0"), (1, 0, 1), (10, 1), (1, 1, 0), (1, "rollout"), (1, "eval")]
        draws = [torch.rand(4, generator=runtime.generator(*key)) for key in keys]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))

    def test_is_the_same_in_another_process(self):
        code = (
            "import torch, kdkit.runtime as r;"
            "print(torch.randint(2**31, (1,), generator=r.generator(5, 'x', 3)).item())"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        here = torch.randint(2**31, (1,), generator=runtime.generator(5, "x", 3)).item()
        assert int(run.stdout) == here

    def test_leaves_the_global_state_alone(self):
        before = torch.get_rng_state()
        torch.rand(3, generator=runtime.generator(0, 1))
        assert torch.equal(before, torch.get_rng_state())


class TestPreservedRngState:
    def test_draws_inside_change_nothing_after(self):
        runtime.seed_everything(3)
        draw_everything()
        expected_state = runtime.rng_state()
        with runtime.preserved_rng_state():
            runtime.seed_everything(1234)
            draw_everything()
        restored = runtime.rng_state()
        assert all(torch.equal(restored[name], value) for name, value in expected_state.items())

    def test_is_put_back_after_an_error(self):
        runtime.seed_everything(3)
        expected = draw_everything()
        runtime.seed_everything(3)
        with pytest.raises(ZeroDivisionError), runtime.preserved_rng_state():
            sum(draw_everything()[0]) / 0
        assert draw_everything() == expected


class TestRngState:
    @pytest.mark.parametrize("draws_before", [0, 1])
    def test_survives_a_safetensors_file(self, tmp_path, draws_before):
        runtime.seed_everything(11)
        for _ in range(draws_before):  # one gaussian draw leaves a cached one behind
            random.gauss(0.0, 1.0)
            np.random.randn()
        safetensors.torch.save_file(runtime.rng_state(), tmp_path / "rng.safetensors")
        expected = [random.gauss(0.0, 1.0), np.random.randn(), *draw_everything()]
        runtime.seed_everything(999)
        runtime.set_rng_state(safetensors.torch.load_file(tmp_path / "rng.safetensors"))
        assert [random.gauss(0.0, 1.0), np.random.randn(), *draw_everything()] == expected

    def test_the_state_of_a_card_that_is_not_here_is_left_out(self):
        state = runtime.rng_state() | {"cuda:7": torch.zeros(16, dtype=torch.uint8)}
        runtime.set_rng_state(state)

    def test_an_incomplete_state_is_refused_by_name(self):
        state = runtime.rng_state()
        del state["numpy"]
        with pytest.raises(UserError, match="numpy"):
            runtime.set_rng_state(state)


class TestEnvironment:
    def test_is_json_and_names_the_versions_in_use(self):
        found = runtime.environment()
        assert json.loads(json.dumps(found)) == found
        assert found["torch"] == torch.__version__
        assert found["python"] == ".".join(map(str, sys.version_info[:3]))
        assert {"kdkit", "transformers", "datasets", "accelerate", "device", "num_threads"} <= set(found)

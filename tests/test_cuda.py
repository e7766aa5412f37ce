"""Kernels on a CUDA device: their compiler and driver meet what they may meet, on the CPU."""

import ctypes
import locale
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import emulated
import pytest
import torch

from kdkit.cuda import CudaUnavailable, Module, kernels, load_kernels, nvrtc

SOURCE = """
struct Numbers { const float* values; int size; };
extern "C" __global__ void multiply(Numbers numbers, double factor, float* out, const float* nothing) {
    for (int k = threadIdx.x; k < numbers.size; k += blockDim.x)
        out[k] = nothing == nullptr ? (float)(numbers.values[k] * factor) : 0.0f;
}
"""


class Numbers(ctypes.Structure):
    """`Numbers` of the source."""

    _fields_ = (("values", ctypes.c_void_p), ("size", ctypes.c_int))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a CUDA driver whose device is the CPU."""
    return str(
        emulated.build_driver(
            tmp_path_factory.mktemp("driver"), written(tmp_path_factory.mktemp("source")), ["multiply"]
        )
    )


def written(folder: Path) -> Path:
    source = folder / "multiply.cu"
    source.write_text(SOURCE)
    return source


class TestCompiled:
    def test_a_fault_is_shown_in_the_compilers_words(self, tmp_path: Path) -> None:
        emulated.skip_without_compiler((7, 5))
        with pytest.raises(CudaUnavailable, match=r"(?s)wrong\.cu.*sm_75.*\(1\): error.*nowhere"):
            nvrtc.compiled("int x = nowhere;", capability=(7, 5), name="wrong.cu", folder=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_the_locale_of_the_caller_stays_as_it_was(self, tmp_path: Path) -> None:
        emulated.skip_without_compiler((7, 5))
        before = locale.getencoding()
        nvrtc.compiled(SOURCE, capability=(7, 5), name="multiply.cu", folder=tmp_path)
        assert locale.getencoding() == before


class FakeNvrtc:
    """Compiles by upper-casing; knows one card."""

    compilations = 0
    version = (12, 4)

    def __init__(self, path: str) -> None:
        if path != "fake":
            raise OSError(path)

    def capabilities(self) -> list[int]:
        return [75]

    def compile(self, source: str, name: str, options: list[str]) -> bytes:
        type(self).compilations += 1
        return source.upper().encode()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeNvrtc]:
    monkeypatch.setattr(nvrtc, "Nvrtc", FakeNvrtc)
    monkeypatch.setattr(nvrtc, "libraries", lambda: ["broken", "fake"])
    monkeypatch.setattr(FakeNvrtc, "compilations", 0)
    return FakeNvrtc


class TestKept:
    def test_a_source_is_compiled_once_for_each_text(self, fake: type[FakeNvrtc], tmp_path: Path) -> None:
        for _ in range(3):
            for text in ("one", "two"):
                found = nvrtc.compiled(text, capability=(7, 5), name="x.cu", folder=tmp_path / "made")
                assert found == text.upper().encode()
        assert fake.compilations == 2
        assert len(list((tmp_path / "made").iterdir())) == 2

    def test_other_options_and_another_version_compile_again(
        self, fake: type[FakeNvrtc], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        nvrtc.compiled("one", capability=(7, 5), name="x.cu", folder=tmp_path)
        monkeypatch.setattr(nvrtc, "OPTIONS", ("--std=c++20",))
        nvrtc.compiled("one", capability=(7, 5), name="x.cu", folder=tmp_path)
        monkeypatch.setattr(fake, "version", (12, 9))
        nvrtc.compiled("one", capability=(7, 5), name="x.cu", folder=tmp_path)
        assert fake.compilations == 3

    def test_a_folder_that_cannot_be_made_is_no_error(self, fake: type[FakeNvrtc], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        for _ in range(2):
            folder = tmp_path / "file" / "below"
            assert nvrtc.compiled("one", capability=(7, 5), name="x.cu", folder=folder) == b"ONE"
        assert fake.compilations == 2

    def test_a_card_that_no_library_knows_is_named_with_a_remedy(self, fake: type[FakeNvrtc], tmp_path: Path) -> None:
        with pytest.raises(CudaUnavailable, match=r"NVRTC 12\.4 does not compile for capability 6\.0.*pip install"):
            nvrtc.compiled("one", capability=(6, 0), name="x.cu", folder=tmp_path)

    def test_without_a_library_the_error_says_where_it_comes_from(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(nvrtc, "libraries", lambda: [str(tmp_path / "libnvrtc.so.12")])
        with pytest.raises(CudaUnavailable, match=r"no NVRTC was found.*pip install"):
            nvrtc.compiled("one", capability=(7, 5), name="x.cu", folder=tmp_path)

    def test_looks_where_pip_puts_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        places = [tmp_path / "nvidia" / "cuda_nvrtc" / "lib", tmp_path / "nvidia" / "cu13" / "lib"]
        for place, name in zip(places, ("libnvrtc.so.12", "libnvrtc.so.13"), strict=True):
            place.mkdir(parents=True)
            (place / name).touch()
            (place / name.replace("nvrtc", "nvrtc-builtins")).touch()
        (tmp_path / "nvidia" / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, "nvidia", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        own = [str(places[0] / "libnvrtc.so.12"), str(places[1] / "libnvrtc.so.13")]
        for cuda_version, order in (("12.4", own), ("13.0", own[::-1])):
            monkeypatch.setattr(torch.version, "cuda", cuda_version)
            found = nvrtc.libraries()
            assert [path for path in found if path in own] == order
            assert not [path for path in found if "builtins" in path]


class TestModule:
    def test_arguments_arrive_as_the_kernel_names_them(self, driver: str) -> None:
        values, out = torch.arange(7.0), torch.zeros(7)
        module = Module(emulated.CUBIN, device=0, driver=driver)
        numbers = Numbers(values.data_ptr(), 5)
        module.launch("multiply", numbers, 0.5, out, None, grid=(1, 1, 1), threads=3, shared_bytes=0, stream=0)
        assert out.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 0.0, 0.0]

    def test_without_a_driver_it_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(CudaUnavailable, match=r"driver's library .*libcuda\.so\.1 cannot be loaded"):
            Module(b"", device=0, driver=str(tmp_path / "libcuda.so.1"))

    def test_a_refused_cubin_is_told_in_the_drivers_words(self, driver: str) -> None:
        with pytest.raises(CudaUnavailable, match=r"cuModuleLoadData: device kernel image is invalid \(200\)"):
            Module(b"not machine code", device=0, driver=driver)

    def test_a_device_that_is_not_there_is_refused(self, driver: str) -> None:
        with pytest.raises(CudaUnavailable, match="cuDeviceGet"):
            Module(emulated.CUBIN, device=7, driver=driver)

    def test_a_launch_that_fails_names_kernel_and_call(self, driver: str) -> None:
        module = Module(emulated.CUBIN, device=0, driver=driver)
        one_block = {"grid": (1, 1, 1), "threads": 1, "shared_bytes": 0, "stream": 0}
        with pytest.raises(RuntimeError, match=r"cuModuleGetFunction of nothing: named symbol not found \(500\)"):
            module.launch("nothing", **one_block)
        with pytest.raises(RuntimeError, match="cuLaunchKernel of multiply"):
            module.launch("multiply", **one_block | {"threads": 2000})

    def test_leaves_the_threads_context_as_it_was(self, driver: str) -> None:
        Module(emulated.CUBIN, device=0, driver=driver)
        calls, context = ctypes.CDLL(driver), ctypes.c_void_p()
        assert calls.cuCtxPopCurrent_v2(ctypes.byref(context)) != 0  # there is none to take away


@pytest.fixture
def fresh() -> Iterator[None]:
    kernels._load.cache_clear()
    yield
    kernels._load.cache_clear()


@pytest.mark.usefixtures("fresh")
class TestLoadKernels:
    def test_a_torch_without_cuda_has_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)  # as in builds for the CPU or for AMD's cards
        with pytest.raises(CudaUnavailable, match="not built for CUDA"):
            load_kernels(written(tmp_path), torch.device("cuda", 0))

    @pytest.mark.parametrize(("capability", "reason"), [((6, 0), "capability 6.0"), ((7, 5), "image is invalid")])
    def test_what_the_compiler_or_driver_refuses_is_the_reason(
        self,
        capability: tuple[int, int],
        reason: str,
        driver: str,
        fake: type[FakeNvrtc],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", "12.4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(kernels, "compiled", partial(nvrtc.compiled, folder=tmp_path))
        monkeypatch.setattr(kernels, "Module", partial(Module, driver=driver))
        with pytest.raises(CudaUnavailable, match=reason):
            load_kernels(written(tmp_path), torch.device("cuda", 0))

    def test_each_is_loaded_once(self, driver: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(torch.version, "cuda", "12.4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
        monkeypatch.setattr(kernels, "compiled", lambda source, capability, name: emulated.CUBIN)
        monkeypatch.setattr(kernels, "Module", partial(Module, driver=driver))
        source = written(tmp_path)
        found = [load_kernels(source, torch.device("cuda", 0)) for _ in range(2)]
        assert found[0] is found[1]

"""CUDA source to machine code by NVRTC, NVIDIA's compiler as a library: no nvcc, no host compiler, no header.

torch's own builds for CUDA bring the library. What was compiled is kept on disk, beside this package as Python
keeps its own compiled code, so that a machine compiles a source once.
"""

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

OPTIONS = ("--std=c++17",)
CACHE = Path(__file__).with_name("__pycache__")


class CudaUnavailable(ValueError):
    """Why kernels cannot be compiled or loaded here."""


def compiled(source: str, *, capability: tuple[int, int], name: str, folder: Path = CACHE) -> bytes:
    """Machine code ("cubin") of a source, from disk where it was compiled before.

    Args:
        source: CUDA C++ that includes nothing.
        capability: of the card, such as (7, 5).
        name: how errors and the kept file call the source.
        folder: where the result is kept; one that cannot be written to is no error.
    Returns:
        What `cuModuleLoadData` takes.
    Raises:
        CudaUnavailable: there is no NVRTC, none that knows the card, or the source does not compile.
    """
    library = _library_for(capability)
    arch = f"sm_{capability[0]}{capability[1]}"
    key = "\n".join([source, arch, *OPTIONS, str(library.version)])
    kept = folder / f"{Path(name).stem}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    with ThreadPoolExecutor(1) as apart:  # NVRTC leaves its thread in the C locale, where open() reads ASCII
        cubin = apart.submit(library.compile, source, name, [f"--gpu-architecture={arch}", *OPTIONS]).result()
    with suppress(OSError):  # where nothing can be kept, the next process compiles again, for a second or so
        _keep(kept, cubin)
    return cubin


def _keep(path: Path, content: bytes) -> None:
    """Write a file under a name of this process's own, then give it its place: the ranks of a run do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Nvrtc:
    """One NVRTC library.

    Args:
        path: of the library, or a name that the system's loader finds.
    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if Path(path).is_absolute():
            for part in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(part))  # NVRTC asks for it by its bare name, which the system's loader may not know
        self._calls = ctypes.CDLL(path)
        self._calls.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._calls.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def capabilities(self) -> list[int]:
        """What it compiles for: 75 for capability 7.5."""
        count = ctypes.c_int()
        self._check(self._calls.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        known = (ctypes.c_int * count.value)()
        self._check(self._calls.nvrtcGetSupportedArchs(known))
        return list(known)

    def compile(self, source: str, name: str, options: Sequence[str]) -> bytes:
        """Machine code.

        Raises:
            CudaUnavailable: the source does not compile; the compiler's own words follow.
        """
        with self._program(source, name) as program:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._calls.nvrtcCompileProgram(program, len(options), given)
            if status != 0:
                log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
                raise CudaUnavailable(
                    f"NVRTC {self.version[0]}.{self.version[1]} did not compile {name} with {' '.join(options)}: "
                    f"{self._error(status)}\n{log}"
                )
            return self._read(program, "CUBIN")

    @contextmanager
    def _program(self, source: str, name: str) -> Iterator[ctypes.c_void_p]:
        program = ctypes.c_void_p()
        text = source.encode()
        self._check(self._calls.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None))
        try:
            yield program
        finally:
            self._calls.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        """nvrtcGet<what> of as many bytes as nvrtcGet<what>Size says."""
        size = ctypes.c_size_t()
        self._check(self._calls[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
        content = ctypes.create_string_buffer(size.value)
        self._check(self._calls[f"nvrtcGet{what}"](program, content))
        return content.raw

    def _error(self, status: int) -> str:
        return self._calls.nvrtcGetErrorString(status).decode()

    def _check(self, status: int) -> None:
        if status != 0:
            raise CudaUnavailable(f"NVRTC at {self.path} fails: {self._error(status)}")


def _library_for(capability: tuple[int, int]) -> Nvrtc:
    """The first library that compiles for the card."""
    found = []
    for path in libraries():
        try:
            library = Nvrtc(path)
            known = library.capabilities()
        except (OSError, AttributeError, CudaUnavailable):  # not there, too old to be asked, or broken
            continue
        if 10 * capability[0] + capability[1] in known:
            return library
        found.append(f"{library.version[0]}.{library.version[1]}")
    card = f"{capability[0]}.{capability[1]}"
    if found:
        raise CudaUnavailable(
            f"NVRTC {' and '.join(found)} does not compile for capability {card}; cards before 7.5 need NVRTC 12: "
            "pip install nvidia-cuda-nvrtc-cu12"
        )
    raise CudaUnavailable("no NVRTC was found; torch's builds for CUDA bring it, or pip install nvidia-cuda-nvrtc-cu12")


def libraries() -> list[str]:
    """Where NVRTC may lie: what pip installed, torch's own folder, what the system's loader finds.

    Those of the CUDA that torch was built for come first: its driver takes their machine code for certain.
    """
    nvidia = importlib.util.find_spec("nvidia")
    folders = [] if nvidia is None else [Path(place) for place in nvidia.submodule_search_locations or ()]
    found = [path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    found += sorted((Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*"))
    paths = [str(path) for path in found if "builtins" not in path.name]
    paths += ["libnvrtc.so.13", "libnvrtc.so.12"]
    major = (torch.version.cuda or "").partition(".")[0]
    return sorted(paths, key=lambda path: not path.endswith(f".so.{major}"))

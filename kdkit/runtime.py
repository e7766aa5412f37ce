"""The machine: can this card run this build of torch, in which dtype, with how many threads; and its random states.

torch is imported inside the functions only, so that a command which merely reads a log starts at once.
"""

import hashlib
import json
import os
import platform
import random
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from kdkit import __version__
from kdkit.errors import UserError

if TYPE_CHECKING:
    import torch

DeviceType = Literal["cuda", "cpu"]
Capability = tuple[int, int]

GIB = 2**30
FULL_FRACTION = 0.92
"""Share of a card's memory above which an estimate is no promise."""

# bfloat16 units begin with Ampere; torch.cuda.is_bf16_supported() also counts emulation, which is very slow.
BF16_CAPABILITY: Capability = (8, 0)
_BFLOAT16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
# torch's fused attention reads keys that heads share as they are, and FlashAttention 2 runs, from here on.
FLASH_CAPABILITY: Capability = (8, 0)
# bitsandbytes documents LLM.int8 from here on, and NF4.
INT8_CAPABILITY: Capability = (7, 5)
NF4_CAPABILITY: Capability = (6, 0)
NF4_BLOCK = 64
"""Weights that share a float32 scale in bitsandbytes' 4-bit layers, without double quantization."""
# torch 2.7.1 for CUDA 12.6 has kernels from 5.0 on; from 2.8 on the builds on PyPI leave old cards out.
OLD_CARD_CAPABILITIES: tuple[Capability, Capability] = ((5, 0), (7, 5))
INSTALL_FOR_OLD_CARD = "pip install torch==2.7.1 --index-url https://download.pytorch.org/whl/cu126"
INSTALL_FOR_NEW_CARD = "pip install --upgrade torch --index-url https://download.pytorch.org/whl/cu128"

_ARCH = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<only>a?)f?")


@dataclass(frozen=True)
class Card:
    """A card that this process may use."""

    index: int
    """As in `cuda:<index>`."""
    name: str
    capability: Capability
    total_memory_bytes: int
    free_memory_bytes: int
    """When it was looked at, with nothing of this process on it but torch itself."""

    @property
    def device(self) -> str:
        """As torch names it."""
        return f"cuda:{self.index}"


@dataclass(frozen=True)
class Preflight:
    """What `preflight` found. `problem` and `remedy` are empty when there is nothing to say."""

    device: DeviceType
    """The device to use; "cuda" also when a card is there but cannot be used (`ok` is then False)."""
    num_devices: int
    """Cards; 1 for "cpu"."""
    name: str
    """Name of the first card, or of the processor."""
    capability: Capability | None
    """CUDA compute capability (major, minor) of the first card."""
    arch_list: tuple[str, ...]
    """What this build of torch was compiled for, as `torch.cuda.get_arch_list()` says it."""
    total_memory_bytes: int
    """Memory of the first card, or of the machine."""
    ok: bool
    """True if one small operation ran on every card that this process may use."""
    problem: str
    """What is wrong; may be said while `ok`, when a card stands idle."""
    remedy: str
    """The line to run, or the thing to change."""
    cards: tuple[Card, ...] = ()
    """Those that this process may use and that ran the operation; a launcher gives each process one."""

    def card(self, device: str) -> Card | None:
        """The card that torch calls by this name, "cuda" being the first; None where it is none of these."""
        kind, _, index = device.partition(":")
        return next((card for card in self.cards if kind == "cuda" and card.index == int(index or 0)), None)


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype for mixed precision, and the reason in one line."""

    dtype: Literal["bfloat16", "float16", "float32"]
    reason: str


def build_runs_on(capability: Capability, arch_list: Sequence[str]) -> bool:
    """Whether a torch build carries code that a card can run.

    Binary code (`sm_XY`) runs on cards of the same major version whose minor version is not lower; with
    the suffix "a" on exactly that card. PTX (`compute_XY`) is compiled on the fly for any card that is not
    older. `torch.cuda.is_available()` does not look at this: it is True, and the first real operation dies.

    Args:
        capability: (major, minor) as in `torch.cuda.get_device_capability()`.
        arch_list: entries as in `torch.cuda.get_arch_list()`.
    Returns:
        True also when no entry is in CUDA's notation (a ROCm build): there only a real operation can tell.
    """
    matches = [match for match in map(_ARCH.fullmatch, arch_list) if match]
    return not matches or any(_covers(match, capability) for match in matches)


def _covers(arch: re.Match[str], capability: Capability) -> bool:
    built_for = (int(arch["major"]), int(arch["minor"]))
    if arch["only"]:
        return built_for == capability
    if arch["kind"] == "compute":
        return built_for <= capability
    return built_for[0] == capability[0] and built_for[1] <= capability[1]


def install_line(capability: Capability) -> str:
    """The command that installs a torch build with kernels for a card of this capability."""
    oldest, current = OLD_CARD_CAPABILITIES
    if capability < oldest:
        return "use the CPU (CUDA_VISIBLE_DEVICES=''): no supported torch build has kernels for it"
    return INSTALL_FOR_OLD_CARD if capability < current else INSTALL_FOR_NEW_CARD


def preflight() -> Preflight:
    """Find the device and prove with one small operation that it works.

    Returns:
        A `Preflight`; `ok` is False when a card is visible and cannot be used, and `remedy` says what to do.
    """
    import torch

    if torch.cuda.is_available():
        return _preflight_cuda()
    problem, remedy = _idle_card()
    return Preflight(
        device="cpu",
        num_devices=1,
        name=platform.processor() or platform.machine(),
        capability=None,
        arch_list=(),
        total_memory_bytes=machine_memory_bytes(),
        ok=True,
        problem=problem,
        remedy=remedy,
    )


def _idle_card() -> tuple[str, str]:
    """(problem, remedy) of a card that is here and not used; two empty strings where there is none."""
    import torch

    if torch.backends.mps.is_available():
        return "the Apple GPU has no float64, which kdkit's sums need: running on the CPU", ""
    if torch.version.cuda is None and shutil.which("nvidia-smi") is not None:
        return "an NVIDIA driver is here, but this torch build is for the CPU", INSTALL_FOR_NEW_CARD
    return "", ""


def _preflight_cuda() -> Preflight:
    import torch

    num_devices = torch.cuda.device_count()
    arch_list = tuple(torch.cuda.get_arch_list())
    problem = remedy = ""
    cards: list[Card] = []
    for index in _own_cards(num_devices):
        problem, remedy = _cuda_problem(index, arch_list)
        if problem:
            break
        cards.append(_look_at(index))
    first = torch.cuda.get_device_properties(0)
    return Preflight(
        device="cuda",
        num_devices=num_devices,
        name=first.name,
        capability=torch.cuda.get_device_capability(0),
        arch_list=arch_list,
        total_memory_bytes=first.total_memory,
        ok=not problem,
        problem=problem,
        remedy=remedy,
        cards=tuple(cards),
    )


def _look_at(index: int) -> Card:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return Card(index, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), total, free)


def _own_cards(num_devices: int) -> Sequence[int]:
    """The card of this process where a launcher gave it one: probing the others would take memory on each."""
    rank = os.environ.get("LOCAL_RANK", "")
    return [int(rank)] if rank.isdecimal() and int(rank) < num_devices else range(num_devices)


def _cuda_problem(index: int, arch_list: Sequence[str]) -> tuple[str, str]:
    """(problem, remedy) of one card; two empty strings when it works."""
    import torch

    major, minor = capability = torch.cuda.get_device_capability(index)
    card = f"{torch.cuda.get_device_name(index)} (cuda:{index}, sm_{major}{minor})"
    if not build_runs_on(capability, arch_list):
        built_for = " ".join(arch_list)
        return (
            f"torch {torch.__version__} has no kernels for the {card}; it was built for {built_for}",
            install_line(capability),
        )
    failure = _operation_failure(f"cuda:{index}")
    if failure:
        return (
            f"a 64 x 64 matrix product failed on the {card}: {failure}",
            f"free the card or restart the session; if it stays: {install_line(capability)}",
        )
    return "", ""


def _operation_failure(device: str) -> str:
    """First line of the error of one small real operation on `device`; empty when it ran and is right."""
    import torch

    try:
        ones = torch.ones(64, 64, device=device)
        total = float((ones @ ones).sum().item())  # .item() waits for the device
    except RuntimeError as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return "" if total == 64.0**3 else f"the result was {total}, not {64.0**3}"


def usable_dtype(device: DeviceType, capability: Capability | None) -> DtypeChoice:
    """The dtype for mixed precision that this hardware computes natively.

    Args:
        device: as in `Preflight.device`.
        capability: as in `Preflight.capability`.
    Returns:
        "bfloat16" from capability 8.0 on; "float16" on older cards, for autocast over float32 weights; else
        "float32".
    Raises:
        ValueError: device is "cuda" and no capability was given.
    """
    if device != "cuda":
        units = cpu_bfloat16_units()
        named = f"; its {units} units multiply bfloat16 where optim.precision=bfloat16 names it" if units else ""
        return DtypeChoice("float32", f"{device}: half precision saves little here and costs accuracy{named}")
    if capability is None:
        raise ValueError("usable_dtype needs the capability of a cuda device, got None")
    found = f"compute capability {capability[0]}.{capability[1]}"
    if capability >= BF16_CAPABILITY:
        return DtypeChoice("bfloat16", f"{found} has bfloat16 units, and its range needs no loss scaling")
    return DtypeChoice("float16", f"{found} only emulates bfloat16 (native from 8.0), very slowly")


def cpu_bfloat16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What of this processor multiplies bfloat16 in hardware.

    Args:
        cpuinfo: where Linux lists the processor's features.
    Returns:
        "AMX", "AVX512-BF16" or "Arm BF16"; "" where there is none, or the system does not say. torch then emulates
        such products, slower than those in float32.
    """
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    known = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    features = set(next(known, "").split())
    return next((name for feature, name in _BFLOAT16_UNITS.items() if feature in features), "")


# --- room ---


def machine_memory_bytes() -> int:
    """Physical memory of this machine, 0 where the system does not say."""
    names = os.sysconf_names if sys.platform != "win32" else {}
    if "SC_PHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def thread_count(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Processors that this process may use, which in a container are fewer than the machine has.

    Args:
        quota: the control group's file, "<microseconds or max> <period>"; need not be there.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    limit, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return allowed if limit == "max" else max(1, min(allowed, round(int(limit) / int(period))))


# --- randomness ---


def seed_everything(seed: int) -> None:
    """Seed Python's `random`, numpy and torch on every device."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries draw from the global generator)
    torch.manual_seed(seed)


def generator(seed: int, *keys: int | str, device: str = "cpu") -> "torch.Generator":
    """A torch generator that depends on nothing but (seed, keys), the same in every process and session.

    Draws keyed by the step cannot be shifted by an evaluation, a resume or another process.

    Args:
        seed: the run's seed.
        *keys: what the draw is for, such as `("rollout", step)`; 1 and "1" differ.
        device: where the tensors to be drawn live.
    """
    import torch

    digest = hashlib.sha256(json.dumps([seed, *keys]).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


_RNG_LOCK = threading.RLock()  # the states are the process's, and a notebook may train in one thread and ask in another


@contextmanager
def undisturbed_rng() -> Iterator[None]:
    """No other thread that keeps to this draws from the global random states, or puts others in place, meanwhile."""
    with _RNG_LOCK:
        yield


@contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Whatever is drawn inside (generation, evaluation, an initialisation) changes no draw after it, in any thread."""
    with undisturbed_rng():
        state = rng_state()
        try:
            yield
        finally:
            set_rng_state(state)


def rng_state() -> dict[str, "torch.Tensor"]:
    """All global random states as plain CPU tensors, which a safetensors file can hold.

    Returns:
        "python", "python_gauss", "numpy", "numpy_position", "numpy_gauss", "torch", one "cuda:i" for each
        card, and "mps". The `*_gauss` entries hold the cached second normal draw, or nothing.
    """
    import numpy as np
    import torch

    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached] if has_gauss else [], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for index, cuda_state in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda:{index}"] = cuda_state
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, "torch.Tensor"]) -> None:
    """Put back what `rng_state` returned; states of cards that are not here are left out.

    Raises:
        UserError: the state is incomplete or was not written by `rng_state`.
    """
    import numpy as np
    import torch

    missing = {"python", "python_gauss", "numpy", "numpy_position", "numpy_gauss", "torch"} - set(state)
    if missing:
        raise UserError(f"the saved random state lacks {sorted(missing)}: it is incomplete")
    python_gauss, numpy_gauss = state["python_gauss"].tolist(), state["numpy_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), *(python_gauss or [None])))
    keys, position = state["numpy"].numpy().astype(np.uint32), int(state["numpy_position"])
    np.random.set_state(  # noqa: NPY002
        ("MT19937", keys, position, len(numpy_gauss), *(numpy_gauss or [0.0]))
    )
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda:{index}" in state:
                torch.cuda.set_rng_state(state[f"cuda:{index}"], index)
    if torch.backends.mps.is_available() and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


# --- where we are ---

_PROXIES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def is_batch() -> bool:
    """Whether a notebook runs with nobody there: a batch session of Kaggle, or anywhere with KDKIT_BATCH=1."""
    return os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch" or os.environ.get("KDKIT_BATCH") == "1"


def hub_answers() -> bool:
    """Whether the model hub's name resolves; without this, each file asked for offline costs some 20 s of retries."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in _PROXIES):
        return True  # the proxy resolves names, this machine need not
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def environment() -> dict[str, str | int | None]:
    """What a run was made with, for `environment.json`: versions, device, threads, platform."""
    import torch

    found = preflight()
    versions = {name: _version(name) for name in ("transformers", "datasets", "accelerate", "numpy")}
    return {
        "kdkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "platform": platform.platform(),
        "device": found.device,
        "device_name": found.name,
        "num_devices": found.num_devices,
        "device_memory_bytes": found.total_memory_bytes,
        "capability": ".".join(map(str, found.capability)) if found.capability else None,
        "cuda": torch.version.cuda,
        "num_threads": thread_count(),
        "torch_num_threads": torch.get_num_threads(),
        "kaggle": os.environ.get("KAGGLE_KERNEL_RUN_TYPE"),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

"""Cards and what fits on them: usable memory, what they compute, and how fast."""

import difflib
import shutil
import subprocess
from dataclasses import dataclass, replace

from kdkit.errors import UserError
from kdkit.runtime import BF16_CAPABILITY, FLASH_CAPABILITY, GIB, Capability

_TENSOR_CORES = (7, 0)


@dataclass(frozen=True)
class Card:
    """A GPU model."""

    name: str
    memory_gib: float
    """What a process can have of it, in GiB, its own context included."""
    capability: Capability
    half_tflops: float
    """Dense float16 matrix products with float32 sums, in 10^12 operations a second, as the maker states it."""
    bandwidth: float
    """Of its memory, in 10^9 bytes a second, as the maker states it."""
    num_cards: int = 1
    """How many of them the machine has."""

    @property
    def memory_bytes(self) -> int:
        """Of one card."""
        return round(self.memory_gib * GIB)

    @property
    def has_flash_attention(self) -> bool:
        """Whether a kernel exists that reads grouped keys and values as they are; half precision alone."""
        return self.capability >= FLASH_CAPABILITY

    @property
    def single_tflops(self) -> float:
        """The same in float32, roughly: half of it before tensor cores, an eighth with them."""
        return self.half_tflops / (2 if self.capability < _TENSOR_CORES else 8)

    @property
    def precision(self) -> str:
        """What `precision: auto` means on it."""
        return "bfloat16" if self.capability >= BF16_CAPABILITY else "float16"


# Memory: what the driver reports as total. Kaggle's T4 reports 14.6 to 14.7 GiB with error correction on.
CARDS = {
    "p100": Card("P100 16 GB", 15.9, (6, 0), 18.7, 732.0),
    "v100": Card("V100 16 GB", 15.8, (7, 0), 112.0, 900.0),
    "v100-32": Card("V100 32 GB", 31.7, (7, 0), 112.0, 900.0),
    "t4": Card("T4", 14.6, (7, 5), 65.0, 320.0),
    "t4x2": Card("T4 x2", 14.6, (7, 5), 65.0, 320.0, num_cards=2),
    "rtx2080ti": Card("RTX 2080 Ti", 10.7, (7, 5), 53.8, 616.0),
    "a100-40": Card("A100 40 GB", 39.4, (8, 0), 312.0, 1555.0),
    "a100-80": Card("A100 80 GB", 79.1, (8, 0), 312.0, 2039.0),
    "a10": Card("A10", 22.1, (8, 6), 125.0, 600.0),
    "a10g": Card("A10G", 22.1, (8, 6), 70.0, 600.0),
    "rtx3060": Card("RTX 3060 12 GB", 11.6, (8, 6), 25.0, 360.0),
    "rtx3090": Card("RTX 3090", 23.6, (8, 6), 71.0, 936.0),
    "l4": Card("L4", 22.0, (8, 9), 121.0, 300.0),
    "rtx4060ti-16": Card("RTX 4060 Ti 16 GB", 15.6, (8, 9), 44.0, 288.0),
    "rtx4090": Card("RTX 4090", 23.5, (8, 9), 165.0, 1008.0),
    "l40s": Card("L40S", 44.4, (8, 9), 362.0, 864.0),
    "h100": Card("H100 80 GB", 79.1, (9, 0), 989.0, 3350.0),
}
"""By the name that `--gpu` takes."""


_MOST_GIB = 100_000.0


def find_card(name: str) -> Card:
    """The card of a name, upper or lower case.

    Raises:
        UserError: nobody knows it; the message has the nearest names.
    """
    key = _key(name).removeprefix("nvidia").removeprefix("tesla")
    for known, card in CARDS.items():
        if _key(known) == key:
            return card
    near = difflib.get_close_matches(name.lower(), CARDS, n=3, cutoff=0.4)
    meant = f"did you mean {' or '.join(near)}? Known" if near else "known"
    raise UserError(f"no card is called {name!r}: {meant} are {', '.join(CARDS)}; or give --budget-gib")


def choose_card(name: str | None = None, budget_gib: float | None = None) -> Card:
    """A card by its name, else of a budget, else this machine's, else a T4.

    Raises:
        UserError: as `find_card` and `card_of_budget`.
    """
    if budget_gib is not None:
        return card_of_budget(budget_gib)
    if name is not None:
        return find_card(name)
    return card_here() or CARDS["t4"]


def card_of_budget(gib: float) -> Card:
    """A stand-in for a card of which only the memory is known: a T4 in all else.

    Raises:
        UserError: the budget is not above 0.
    """
    if not 0 < gib <= _MOST_GIB:
        raise UserError(f"a budget of {gib:g} GiB: give a number above 0, up to {_MOST_GIB:g}")
    like = CARDS["t4"]
    return replace(like, name="given budget", memory_gib=gib)


def card_here() -> Card | None:
    """The first card of this machine, as its driver tells; None where there is none. torch is not asked.

    A card that CARDS lacks is taken for the nearest one of it in speed, with its own memory.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    found = [line.rpartition(",") for line in answer.stdout.splitlines() if line.count(",") == 1]
    if answer.returncode != 0 or not found:
        return None
    name, _, mebibytes = found[0]
    key = _key(name.removeprefix("Tesla ").removeprefix("NVIDIA "))
    like = next((card for known, card in CARDS.items() if _key(known) in key), CARDS["t4"])
    memory_gib = float(mebibytes) / 1024
    return replace(like, name=name.strip(), memory_gib=memory_gib, num_cards=len(found))


def _key(name: str) -> str:
    """Letters and digits alone."""
    return "".join(letter for letter in name.lower() if letter.isalnum())

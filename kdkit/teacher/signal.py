"""What a loss may know of the teacher: live or cached, dense or top-k, behind one protocol.

A signal speaks of N positions laid end to end. `rows` cuts a few of them out, on the student's device; `logprobs_at`
gives their log-probabilities over C columns: all V ids, or K kept ids and one bucket that holds the rest. Signals of
what was written down of a teacher are in `kept`.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands for an id that is left out of a sum: log-probabilities never come near it, and unlike −inf it has gradients.
_LEFT_OUT = -1e30
PIECE_ENTRIES, LEAST_PIECE = 2**20, 256
"""Entries of a head's weight in a piece of its product, and its least ids: 4 MiB measured fastest of 1 to 16."""


@dataclass(frozen=True, eq=False)
class Head:
    """A language-model head: hidden states to logits, `softcap · tanh(scale · (W h + b) / softcap)`.

    Holds views of live parameters, on whatever device they are.
    """

    weight: Tensor
    """(V, H)"""
    bias: Tensor | None = None
    """(V,)"""
    scale: float = 1.0
    """Factor on the logits."""
    softcap: float | None = None
    """Bound that logits approach through tanh; None for no bound."""
    vocab_size: int | None = None
    """Number V' of leading ids to keep, where two models agree on these and pad differently; None for all V."""

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        if self.vocab_size is not None and not 0 < self.vocab_size <= rows:
            raise ValueError(f"vocab_size={self.vocab_size}: the head has {rows} rows; give 1 to {rows}, or None")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap}: give a number above 0, or None for no cap")

    @property
    def num_ids(self) -> int:
        """V', the width of the logits."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    def logits(self, hidden: Tensor, room: "Room | None" = None) -> Tensor:
        """Logits in the compute dtype, as the model itself returns them.

        Args:
            hidden: (N, H) final hidden states, on the head's device.
            room: where the product is put, under no_grad; None for memory of its own.
        Returns:
            (N, V') in `compute_dtype(hidden, weight)`.
        """
        dtype = compute_dtype(hidden, self.weight)
        weight, bias = self.weight[: self.num_ids].to(dtype), self.bias
        bias = None if bias is None else bias[: self.num_ids].to(dtype)
        hidden = hidden.to(dtype)
        return self.finish(F.linear(hidden, weight, bias) if room is None else room.product(hidden, weight, bias))

    def finish(self, product: Tensor) -> Tensor:
        """Scale and softcap on top of the matrix product, in its dtype.

        Args:
            product: (N, V') `W h + b`.
        Returns:
            (N, V') logits; `product` itself where there is neither scale nor softcap.
        """
        if self.scale != 1.0:
            product = product * self.scale
        if self.softcap is not None:
            product = self.softcap * torch.tanh(product / self.softcap)
        return product


class Room:
    """Memory for one product after another, each of which ends the life of the one before.

    A fresh tensor of this size is a fresh piece of memory to a CPU's allocator, and the first touch of its pages costs
    a fifth of the product.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear map of a head, without gradient.

        Args:
            hidden: (n, H)
            weight: (V, H) of the same dtype.
            bias: (V,) or None.
        Returns:
            (n, V), overwritten by the next call.
        """
        size = len(hidden), len(weight)
        if self._memory is None or self._memory.numel() < math.prod(size):
            self._memory = None  # the old one goes before the new one comes
            self._memory = hidden.new_empty(math.prod(size))
        out = self._memory[: math.prod(size)].view(size)
        for ids in _pieces_of_ids(weight):
            if bias is None:
                torch.mm(hidden, weight[ids].T, out=out[:, ids])
            else:
                torch.addmm(bias[ids], hidden, weight[ids].T, out=out[:, ids])
        return out


def _pieces_of_ids(weight: Tensor) -> list[slice]:
    """Rows of a head's weight that a product takes at a time, the fastest way.

    MKL shares few positions by many ids out among its threads by positions: each reads and packs all of the weight for
    itself. A piece that stays in the cache is read from memory once. One thread is faster with the whole.
    """
    num_ids, size = weight.shape
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.get_num_threads() == 1:
        return [slice(0, num_ids)]
    step = max(LEAST_PIECE, PIECE_ENTRIES // size)
    return [slice(start, min(start + step, num_ids)) for start in range(0, num_ids, step)]


@dataclass(frozen=True, eq=False)
class UnitExperts:
    """The k most likely experts of each unit, the same k for all of its tokens; 0 for a unit without tokens."""

    ids: Tensor
    """(B, U, k) most likely first."""
    probs: Tensor
    """(B, U, k) float32: the router's probability among all experts, mean over the unit's tokens."""
    outputs: Tensor
    """(B, U, k, H) float32: each expert's own output, mean over the unit's tokens."""
    num_experts: int
    """E, all experts of the block."""


@dataclass(frozen=True)
class Views:
    """What of the inside of a model is asked for besides its last hidden states."""

    layers: bool = False
    """The hidden states of every layer."""
    attentions: bool = False
    """The attention maps of every layer."""
    experts: tuple[int, int] | None = None
    """MoE layer of the teacher, from the end where negative, and how many experts of each unit."""

    def __or__(self, other: "Views") -> "Views":
        """Both together."""
        return Views(self.layers or other.layers, self.attentions or other.attentions, self.experts or other.experts)


NO_VIEWS = Views()
"""Last hidden states alone."""


@dataclass(frozen=True, eq=False)
class Features:
    """What was asked for by `Views`, on the teacher's device; None for what was not."""

    layers: tuple[Tensor, ...] | None = None
    """(B, S, H) each, the embeddings first, the last one after the final norm."""
    attentions: tuple[Tensor, ...] | None = None
    """(B, heads, S, S) each, probabilities."""
    experts: UnitExperts | None = None
    """The experts' own outputs for each unit."""


NO_FEATURES = Features()
"""Nothing was asked for."""


class TeacherSignal(Protocol):
    """The teacher at N positions, as head pass and objective see it."""

    @property
    def hidden_states(self) -> Tensor | None:
        """(B, T, H) final hidden states of the whole batch for terms over features, or None."""
        ...

    @property
    def features(self) -> Features:
        """What else of the teacher's inside was asked for."""
        ...

    @property
    def num_positions(self) -> int:
        """N."""
        ...

    @property
    def num_ids(self) -> int:
        """V, the ids that the teacher's distribution is over; not K."""
        ...

    @property
    def support(self) -> Tensor | None:
        """(N, K) kept ids, or None for the whole vocabulary."""
        ...

    def rows(self, start: int, stop: int, device: torch.device) -> "TeacherSignal":
        """Positions start to stop on a device, computed where the teacher is; what is costly is computed once, here."""
        ...

    def logprobs_at(self, temperature: float) -> Tensor:
        """(N, C) float32 log-probabilities, C = V or K + 1 with the rest as last column; no gradient."""
        ...


@dataclass(frozen=True, eq=False)
class DenseSignal:
    """Logits of every id at every position; for small vocabularies, tests, and heads that cannot be had apart."""

    logits: Tensor
    """(N, V)"""
    hidden_states: Tensor | None = None
    """(B, T, H)"""
    features: Features = Features()

    @property
    def num_positions(self) -> int:
        """N."""
        return self.logits.shape[0]

    @property
    def num_ids(self) -> int:
        """V."""
        return self.logits.shape[-1]

    @property
    def support(self) -> None:
        """The whole vocabulary."""
        return None

    def rows(self, start: int, stop: int, device: torch.device) -> "DenseSignal":
        """Positions start to stop, on a device."""
        return DenseSignal(moved(self.logits[start:stop].detach(), device))

    def logprobs_at(self, temperature: float) -> Tensor:
        """(N, V) float32 log-probabilities at a temperature; no gradient."""
        return tempered_logprobs(self.logits.detach(), temperature)


@dataclass(frozen=True, eq=False)
class LiveSignal:
    """Hidden states and head of a teacher that was asked just now; logits come into being a few rows at a time."""

    hidden: Tensor
    """(N, H)"""
    head: Head
    hidden_states: Tensor | None = None
    """(B, T, H)"""
    features: Features = Features()

    @property
    def num_positions(self) -> int:
        """N."""
        return self.hidden.shape[0]

    @property
    def num_ids(self) -> int:
        """V', the width of the head's logits."""
        return self.head.num_ids

    @property
    def support(self) -> None:
        """The whole vocabulary."""
        return None

    @torch.no_grad()
    def rows(self, start: int, stop: int, device: torch.device, room: Room | None = None) -> DenseSignal:
        """Logits of positions start to stop, in `room` if given: the head computes where it is, then they move."""
        return DenseSignal(self._logits(self.hidden[start:stop], room)).rows(0, stop - start, device)

    @torch.no_grad()
    def logprobs_at(self, temperature: float) -> Tensor:
        """(N, V) float32 log-probabilities of all positions at once; no gradient."""
        return tempered_logprobs(self._logits(self.hidden), temperature)

    def _logits(self, hidden: Tensor, room: Room | None = None) -> Tensor:
        """In the teacher's own dtype: the student's autocast would overflow it, and cast its head for every chunk."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head.logits(hidden, room)


@dataclass(frozen=True, eq=False)
class SparseSignal:
    """A dense signal looked at through the teacher's K most likely ids, a few rows at a time and at any temperature."""

    source: "DenseSignal | LiveSignal"
    k: int
    """Number of kept ids, 1 to V."""
    ids: Tensor | None = None
    """(N, K), known once rows have been cut out"""

    @property
    def hidden_states(self) -> Tensor | None:
        """Those of the source."""
        return self.source.hidden_states

    @property
    def features(self) -> Features:
        """Those of the source."""
        return self.source.features

    @property
    def num_positions(self) -> int:
        """N."""
        return self.source.num_positions

    @property
    def num_ids(self) -> int:
        """That of the source."""
        return self.source.num_ids

    @property
    def support(self) -> Tensor:
        """(N, K) int64 kept ids."""
        if self.ids is None:
            raise ValueError("the kept ids of a sparse signal are known for cut-out rows alone: call rows() first")
        return self.ids

    @torch.no_grad()
    def rows(self, start: int, stop: int, device: torch.device) -> "SparseSignal":
        """Positions start to stop, on a device.

        Raises:
            ValueError: there are fewer than k ids.
        """
        dense = self.source.rows(start, stop, device)
        if self.ids is not None:  # a block of a chunk: its ids are known
            return SparseSignal(dense, self.k, moved(self.ids[start:stop], device))
        if not 1 <= self.k <= dense.logits.shape[-1]:
            raise ValueError(f"k={self.k}: give 1 to {dense.logits.shape[-1]}, the number of ids")
        return SparseSignal(dense, self.k, dense.logits.topk(self.k, dim=-1).indices)

    @torch.no_grad()
    def logprobs_at(self, temperature: float) -> Tensor:
        """(N, K + 1) float32 log-probabilities, the tail last; no gradient."""
        return bucket_logprobs(self.source.logprobs_at(temperature), self.support)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """On a device, without waiting where that is safe: what a CPU gets unawaited may be read before it is there.

    Args:
        values: any tensor.
        device: where to.
    Returns:
        The same values there.
    """
    return values.to(device, non_blocking=device.type != "cpu")


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the head's matrix product.

    Args:
        hidden: the product's left side; its device decides whose autocast counts.
        weight: the product's right side.
    Returns:
        The autocast dtype where autocast is on for the device, else the one that both promote to.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are.

    Args:
        values: any floating tensor.
    Returns:
        The same values.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def tempered_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of softened logits, log softmax(logits / temperature).

    Args:
        logits: (..., V); gradient flows.
        temperature: above 0; above 1 flattens.
    Returns:
        (..., V) float32, float64 for float64.
    Raises:
        ValueError: temperature is not above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature}: give a finite number above 0")
    logits = at_least_float32(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def bucket_logprobs(logprobs: Tensor, ids: Tensor | None) -> Tensor:
    """Log-probabilities over a signal's columns: kept ids, then all others as one.

    Args:
        logprobs: (N, V) log-probabilities; gradient flows, also where nothing is left for the last column.
        ids: (N, K) int64, no id twice in a row; None for the whole vocabulary.
    Returns:
        (N, K + 1), the last column −inf where K = V; `logprobs` itself for None.
    """
    if ids is None:
        return logprobs
    kept = logprobs.gather(-1, ids)  # (N, K)
    tail = _log_mass(logprobs.scatter(-1, ids, _LEFT_OUT))  # (N, 1)
    return torch.cat([kept, tail], dim=-1)


def log_mass(logprobs: Tensor) -> Tensor:
    """Log of the mass of all columns together.

    Args:
        logprobs: (N, C) log-probabilities, C may be 0; gradient flows, also where nothing has mass.
    Returns:
        (N, 1), −inf where nothing has mass.
    """
    return _log_mass(logprobs.clamp_min(_LEFT_OUT))


def _log_mass(logprobs: Tensor) -> Tensor:
    """`log_mass` of rows that are not −inf throughout, of which logsumexp has no gradient."""
    mass = logprobs.logsumexp(-1, keepdim=True)  # (N, 1)
    return mass.masked_fill(mass < 0.5 * _LEFT_OUT, -math.inf)

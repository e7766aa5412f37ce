"""Bytes of all tensor storages that are alive, by part and phase, and the most there were.

`LiveBytes` sees every operation of torch, of real tensors as of fake ones, which have a shape, a dtype and no memory:

    with LiveBytes(fake=FakeTensorMode(allow_non_fake_inputs=True)) as count:
        with count.part("student weights"):
            model = ...
        with count.phase("student"), count.part("student's activations"):
            loss = model(...)
    count.peaks["student"].parts

Under fake tensors whole numbers stay real: ids, masks and lengths decide how much the step makes of everything else,
and cost next to nothing themselves.
"""

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK_BYTES = 512
"""What the CUDA allocator rounds every tensor up to."""
OTHER = "other"
"""The part of what is allocated outside of any."""

_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put.default}
_GIVES_INTEGERS = {_aten.arange.default, _aten.arange.start, _aten.arange.start_step}
_WHOLE_NUMBERS = (torch.bool, torch.int32, torch.int64)  # of 8 bits are quantized weights, which are large
_FILLS = {_aten.full.default: 1, _aten.scalar_tensor.default: 0}  # -> place of the value that decides the dtype


@dataclass(frozen=True)
class Peak:
    """The most that was alive at once, on the student's device and elsewhere."""

    num_bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    """By part, on the student's device; they sum to `num_bytes`."""
    elsewhere_bytes: int = 0
    """The most there was on the other device, be it at another time."""


class LiveBytes(TorchDispatchMode):
    """Counts storages from the operation that makes them until nobody holds them.

    Args:
        fake: the mode that fake tensors live in; None: tensors are real.
        elsewhere: parts that lie on another device.
        num_experts: of a mixture of experts, which are then taken to get as many tokens each.
    """

    def __init__(
        self, fake: FakeTensorMode | None = None, *, elsewhere: Collection[str] = (), num_experts: int = 1
    ) -> None:
        super().__init__()
        self.fake = fake
        self.elsewhere = frozenset(elsewhere)
        self.num_experts = num_experts
        self.live_parts: dict[str, int] = {}
        self.peaks: dict[str, Peak] = {}
        self._here = self._there = 0
        self._part = OTHER
        self._phase: str | None = None
        self._storages: dict[int, tuple[str, int]] = {}
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> "LiveBytes":
        stack = ExitStack()
        if self.fake is not None:
            stack.enter_context(self.fake)
        self._stacks.append(stack)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stacks.pop().close()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # of fake tensors asked for all the time
            return args[0].fake_device
        made = self._run(func, args, kwargs or {})
        self.hold(leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        return made

    @property
    def live_bytes(self) -> int:
        """What is alive now, on the student's device."""
        return self._here

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is allocated inside belongs to this part, also after it; the innermost part counts."""
        outer, self._part = self._part, name
        try:
            yield
        finally:
            self._part = outer

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The most that is alive inside is a peak of this phase; a phase may come several times."""
        outer, self._phase = self._phase, name
        self._note_peak()
        try:
            yield
        finally:
            self._phase = outer

    def hold(self, tensors: Iterable[Tensor], part: str | None = None) -> None:
        """Count tensors that were made elsewhere, or put those that are counted already into a part.

        Args:
            tensors: several may share a storage.
            part: None: the present one, and nothing changes where they have one.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._storages:
                num_bytes = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
                self._storages[key] = (part or self._part, num_bytes)
                self._add(part or self._part, num_bytes)
                weakref.finalize(storage, self._free, key)
            elif part is not None and self._storages[key][0] != part:
                was, num_bytes = self._storages[key]
                self._storages[key] = (part, num_bytes)
                self._add(was, -num_bytes)
                self._add(part, num_bytes)

    def _free(self, key: int) -> None:
        part, num_bytes = self._storages.pop(key)
        self._add(part, -num_bytes)

    def _add(self, part: str, num_bytes: int) -> None:
        self.live_parts[part] = self.live_parts.get(part, 0) + num_bytes
        if part in self.elsewhere:
            self._there += num_bytes
        else:
            self._here += num_bytes
        if num_bytes > 0:
            self._note_peak()

    def _note_peak(self) -> None:
        if self._phase is None:
            return
        peak = self.peaks.get(self._phase, Peak())
        is_higher = self._here > peak.num_bytes
        if is_higher or self._there > peak.elsewhere_bytes:
            here = {name: size for name, size in self.live_parts.items() if size and name not in self.elsewhere}
            self.peaks[self._phase] = Peak(
                max(self._here, peak.num_bytes),
                here if is_higher else peak.parts,
                max(self._there, peak.elsewhere_bytes),
            )

    # ---- fake and real tensors side by side --------------------------------------------------------------------

    def _run(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The operation, for real where only whole numbers take part in it."""
        if self.fake is None:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._run_fake(func, args, kwargs)
        makes_numbers = _makes_integers(func, args, kwargs) if _is_factory(func, tensors) else bool(tensors)
        if not makes_numbers:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _run_fake(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """An operation on fake tensors; what depends on their values is decided in the costliest way."""
        if func is _aten.bincount.default:
            with unset_fake_temporarily():
                return torch.full((self.num_experts,), args[0].numel() // self.num_experts)
        if _changes_values_alone(func):
            return kwargs.get("out", args[0]) if func._schema.returns else None
        if func is _aten.slice.Tensor:
            args = _from_the_start(*args)
        elif func in _INDEXED:
            args = (args[0], _without_masks(args[1]), *args[2:])
        return func(*args, **kwargs)


@cache
def _changes_values_alone(func: Any) -> bool:
    """Whether an operation writes into what there is: of fake tensors nothing changes, and skipping it is faster."""
    if torch.Tag.inplace_view in func.tags:
        return False
    written = [argument for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    name = func.overloadpacket.__name__
    return len(written) == 1 and (written[0].name == "out" or (name.endswith("_") and not name.endswith("__")))


def _is_factory(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether an operation makes a tensor from sizes."""
    return not tensors or func.overloadpacket.__name__.startswith("new_")


def _makes_integers(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a factory makes whole numbers on the host."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return dtype in _WHOLE_NUMBERS
    if func in _GIVES_INTEGERS:
        return all(isinstance(arg, int) for arg in args)
    if func in _FILLS:
        return isinstance(args[_FILLS[func]], int)
    return any(isinstance(arg, Tensor) and not arg.is_floating_point() for arg in args)  # new_zeros of one like it


def _from_the_start(
    tensor: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> tuple[Tensor, int, int, int, int]:
    """A slice of as many rows from the first on: fake tensors remember what they met before, offsets and all."""
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    return tensor, dim, 0, max(last - first, 0), step


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Places in the stead of masks; a mask without values lets everything through."""
    places: list[Tensor | None] = []
    with unset_fake_temporarily():
        for index in indices:
            if index is None or index.dtype != torch.bool:
                places.append(index)
            elif isinstance(index, FakeTensor):
                places += torch.ones(index.shape, dtype=torch.bool).nonzero(as_tuple=True)
            else:
                places += index.nonzero(as_tuple=True)
    return places

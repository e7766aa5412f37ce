"""Tiles of TILE x TILE float32 turned over in registers: columns become rows.

LLVM does not find the shuffles by itself, and number by number this takes longer than the recursion. Written as vectors
of LLVM they are its best for any processor. Imported with the loops that use it.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.errors import TypingError
from numba.core.typing import Signature
from numba.core.typing.context import Context
from numba.extending import intrinsic

from kdkit.softdtw._lanes import FLOATS, INTEGERS, LANES, in_every_lane

TILE = LANES
INT32, INT64, VECTOR = ir.IntType(32), ir.IntType(64), FLOATS.vector


def _turned(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of a tile: log2(TILE) rounds, each of which swaps the two off-diagonal quarters of ever smaller
    squares."""
    half = TILE // 2
    while half:
        low = [lane if not lane & half else TILE + lane - half for lane in range(TILE)]
        high = [lane + half if not lane & half else TILE + lane for lane in range(TILE)]
        swapped = list(rows)
        for index in range(TILE):
            if not index & half:
                pair = rows[index], rows[index + half]
                for place, lanes in ((index, low), (index + half, high)):
                    mask = ir.Constant(INTEGERS.vector, lanes)
                    swapped[place] = builder.shuffle_vector(*pair, mask)
        rows, half = swapped, half // 2
    return rows


def _check(array: types.Type, places: list[types.Type], block: types.Type) -> None:
    """What is stepped over as float32 must be that."""
    for given, allowed in ((array, types.float32), *((place, types.int64) for place in places), (block, types.float32)):
        if given != types.Array(allowed, 1, "C"):
            raise TypingError(f"an array is {given}; allowed: {allowed} of one dimension, C order")


class _Tile:
    """TILE rows of an array, each with its own place, and the lines of a block that hold their columns."""

    def __init__(self, context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: tuple) -> None:
        _, _, _, _, row, shift, _, at, width = arguments
        self.builder = builder
        data, bases, begins, ends, block = (
            context.make_array(signature.args[position])(context, builder, arguments[position]).data
            for position in (0, 1, 2, 3, 6)
        )
        self.rows, self.lines, self.flags = [], [], []
        for k in range(TILE):
            base, begin, end = (
                builder.load(builder.gep(of_rows, [builder.add(row, INT64(k))])) for of_rows in (bases, begins, ends)
            )
            self.rows.append(self._vector_at(data, builder.add(base, shift)))
            self.lines.append(self._vector_at(block, builder.add(at, builder.mul(width, INT64(k)))))
            self.flags.append(self._inside(builder.sub(shift, begin), builder.sub(end, begin)))

    def _vector_at(self, data: ir.Value, index: ir.Value) -> ir.Value:
        """Pointer to TILE neighbours."""
        return self.builder.bitcast(self.builder.gep(data, [index]), VECTOR.as_pointer())

    def _inside(self, first: ir.Value, count: ir.Value) -> ir.Value:
        """Which of first, first + 1, ... are 0 to count - 1: below count as numbers without a sign."""
        first, count = (
            in_every_lane(self.builder, self.builder.trunc(number, INT32), INTEGERS) for number in (first, count)
        )
        own = self.builder.add(first, ir.Constant(INTEGERS.vector, list(range(TILE))))
        return self.builder.icmp_unsigned("<", own, count)

    def take(self, whole: bool) -> None:
        """The rows' columns into the lines; what is not inside is 0."""
        zero, rows = ir.Constant(VECTOR, [0.0] * TILE), []
        for pointer, flags in zip(self.rows, self.flags, strict=True):
            arguments = [pointer, INT32(4), flags, zero]
            rows.append(self.builder.load(pointer, align=4) if whole else self._call("load", VECTOR, arguments))
        for pointer, column in zip(self.lines, _turned(self.builder, rows), strict=True):
            self.builder.store(column, pointer, align=4)

    def put(self, whole: bool) -> None:
        """The way back; what is not inside stays as it is."""
        lines = [self.builder.load(pointer, align=4) for pointer in self.lines]
        for pointer, flags, row in zip(self.rows, self.flags, _turned(self.builder, lines), strict=True):
            if whole:
                self.builder.store(row, pointer, align=4)
            else:
                self._call("store", ir.VoidType(), [row, pointer, INT32(4), flags])

    def _call(self, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.masked.{name}.v{TILE}f32.p0")
        return self.builder.call(function, arguments)


def _moving(move: Callable[[_Tile, bool], None], *, whole: bool) -> Any:
    def moved(_: Context, array, bases, begins, ends, row, shift, block, at, width):  # type: ignore[no-untyped-def]
        _check(array, [bases, begins, ends], block)

        def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: tuple) -> ir.Value:
            move(_Tile(context, builder, signature, arguments), whole)
            return context.get_dummy_value()

        numbers = (types.int64, types.int64, block, types.int64, types.int64)
        return types.void(array, bases, begins, ends, *numbers), generate

    return intrinsic(moved)


take_tile, take_part = _moving(_Tile.take, whole=True), _moving(_Tile.take, whole=False)
"""block[at + width * c + k] = array[bases[row + k] + shift + c] for k and c below TILE; flat arrays. The part: where
begins[row + k] <= shift + c < ends[row + k], else 0."""
put_tile, put_part = _moving(_Tile.put, whole=True), _moving(_Tile.put, whole=False)
"""The way back; the part leaves all else as it is."""


def _fetching(to_write: bool) -> Any:
    def fetch(_: Context, array, index):  # type: ignore[no-untyped-def]
        def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: tuple) -> ir.Value:
            array, index = arguments
            data = context.make_array(signature.args[0])(context, builder, array).data
            pointer = builder.bitcast(builder.gep(data, [index]), ir.IntType(8).as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT32, INT32, INT32])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [pointer, INT32(int(to_write)), INT32(3), INT32(1)])  # to keep, data
            return context.get_dummy_value()

        return types.void(array, types.int64), generate

    return intrinsic(fetch)


fetch_to_read, fetch_to_write = _fetching(False), _fetching(True)
"""Have the cache line of array[index] fetched, needed some microseconds later; index may be out of bounds."""

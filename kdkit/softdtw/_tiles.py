"""Tiles of TILE x TILE float32 turned over in registers: columns become rows.

LLVM does not find the shuffles by itself, and number by number this takes longer than the recursion. Written as vectors
of LLVM they are its best for any processor. Imported with the loops that use it.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.errors import TypingError
from numba.core.typing import Signature
from numba.core.typing.context import Context
from numba.extending import intrinsic

TILE = 8
INT64, FLOAT32 = ir.IntType(64), ir.FloatType()
VECTOR = ir.VectorType(FLOAT32, TILE)


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
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), TILE), lanes)
                    swapped[place] = builder.shuffle_vector(*pair, mask)
        rows, half = swapped, half // 2
    return rows


def _vector_at(builder: ir.IRBuilder, data: ir.Value, index: ir.Value) -> ir.Value:
    """Pointer to TILE neighbours."""
    return builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer())


def _check(array: types.Type, bases: types.Type, block: types.Type) -> None:
    """What is stepped over as float32 must be that."""
    for given, allowed in ((array, types.float32), (bases, types.int64), (block, types.float32)):
        if given != types.Array(allowed, 1, "C"):
            raise TypingError(f"an array is {given}; allowed: {allowed} of one dimension, C order")


class _Tile:
    """The two sides of a tile: rows in the one array begin at `bases[row + k] + shift`, in the other `width` apart."""

    def __init__(self, context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: tuple) -> None:
        array, bases, row, shift, block, at, width = arguments
        data, places, lines = (
            context.make_array(signature.args[position])(context, builder, value).data
            for position, value in ((0, array), (1, bases), (4, block))
        )
        self.scattered, self.stacked = [], []
        for k in range(TILE):
            base = builder.load(builder.gep(places, [builder.add(row, INT64(k))]))
            self.scattered.append(_vector_at(builder, data, builder.add(base, shift)))
            self.stacked.append(_vector_at(builder, lines, builder.add(at, builder.mul(width, INT64(k)))))
        self.builder = builder

    def move(self, source: list[ir.Value], target: list[ir.Value]) -> None:
        """One side turned over into the other."""
        rows = [self.builder.load(pointer, align=4) for pointer in source]
        for pointer, column in zip(target, _turned(self.builder, rows), strict=True):
            self.builder.store(column, pointer, align=4)


@intrinsic
def take_tile(_: Context, array, bases, row, shift, block, at, width):  # type: ignore[no-untyped-def]
    """block[at + width * c + k] = array[bases[row + k] + shift + c] for k and c below TILE; flat arrays."""
    _check(array, bases, block)

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: tuple) -> ir.Value:
        tile = _Tile(context, builder, signature, arguments)
        tile.move(tile.scattered, tile.stacked)
        return context.get_dummy_value()

    return types.void(array, bases, types.int64, types.int64, block, types.int64, types.int64), generate


@intrinsic
def put_tile(_: Context, array, bases, row, shift, block, at, width):  # type: ignore[no-untyped-def]
    """The way back: array[bases[row + k] + shift + c] = block[at + width * c + k]."""
    _check(array, bases, block)

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: tuple) -> ir.Value:
        tile = _Tile(context, builder, signature, arguments)
        tile.move(tile.stacked, tile.scattered)
        return context.get_dummy_value()

    return types.void(array, bases, types.int64, types.int64, block, types.int64, types.int64), generate


@intrinsic
def fetch(_: Context, array, index):  # type: ignore[no-untyped-def]
    """Have the cache line of array[index] fetched, to be written to some microseconds later."""

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: tuple) -> ir.Value:
        array, index = arguments
        data = context.make_array(signature.args[0])(context, builder, array).data
        pointer = builder.bitcast(builder.gep(data, [index]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, number(1), number(3), number(1)])  # to write, to keep, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate

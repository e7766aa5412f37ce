"""LANES numbers side by side, as a type of numba's: its operators work on all of them at once.

LLVM finds such vectors in plain loops too, but before each of these short ones it would ask of every pair of arrays
whether they overlap, and inside fetch each constant from far away. Imported with the loops that use it.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.base import BaseContext
from numba.core.errors import TypingError
from numba.core.typing import Signature
from numba.core.typing.context import Context
from numba.extending import intrinsic, lower_builtin, register_model, type_callable
from numba.extending import models as data_models

from kdkit.compiled import IN_ORDER

LANES = 8


class Lanes(types.Type):
    """LANES numbers of a scalar type."""

    def __init__(self, of: types.Type, vector: ir.VectorType) -> None:
        super().__init__(name=f"{LANES} x {of}")
        self.of, self.vector = of, vector


FLOATS = Lanes(types.float32, ir.VectorType(ir.FloatType(), LANES))
INTEGERS = Lanes(types.int32, ir.VectorType(ir.IntType(32), LANES))
FLAGS = Lanes(types.boolean, ir.VectorType(ir.IntType(1), LANES))
ALL = {kind.of: kind for kind in (FLOATS, INTEGERS, FLAGS)}


@register_model(Lanes)
class _LanesModel(data_models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, kind.vector)


def _define(name: Callable[..., Any], kind: Lanes, result: Lanes, method: str, *leading: str, **more: Any) -> None:
    """An operator on two of a kind, by a method of LLVM's builder."""

    @type_callable(name)
    def _type(_: Context) -> Callable[..., Lanes | None]:
        return lambda x, y: result if x == y == kind else None

    @lower_builtin(name, kind, kind)
    def _lower(_: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: tuple[ir.Value, ir.Value]) -> ir.Value:
        return getattr(builder, method)(*leading, *arguments, **more)


for _name, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_name, FLOATS, FLOATS, _method, flags=sorted(IN_ORDER))
for _name, _method in ((operator.add, "add"), (operator.sub, "sub"), (operator.and_, "and_"), (operator.or_, "or_")):
    _define(_name, INTEGERS, INTEGERS, _method)
_define(operator.lshift, INTEGERS, INTEGERS, "shl")
_define(operator.rshift, INTEGERS, INTEGERS, "ashr")
_define(operator.or_, FLAGS, FLAGS, "or_")
_define(operator.gt, INTEGERS, FLAGS, "icmp_signed", ">")
_define(operator.gt, FLOATS, FLAGS, "fcmp_ordered", ">")
_define(operator.ne, FLOATS, FLAGS, "fcmp_unordered", "!=")  # NaN differs from all


def in_every_lane(builder: ir.IRBuilder, number: ir.Value, kind: Lanes) -> ir.Value:
    """For those who write LLVM's instructions themselves."""
    unset, first = ir.Constant(kind.vector, ir.Undefined), ir.IntType(32)(0)
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(unset, number, first), unset, lanes)


@intrinsic
def every(_: Context, number):  # type: ignore[no-untyped-def]
    """The number in each lane."""
    kind = ALL[number]

    def generate(_: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: tuple) -> ir.Value:
        return in_every_lane(builder, arguments[0], kind)

    return kind(number), generate


@intrinsic
def constant(_: Context, number):  # type: ignore[no-untyped-def]
    """The same of a number that LLVM is not to know: one that it knows it would load anew in each round of a loop."""
    kind = ALL[number]

    def generate(_: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: tuple) -> ir.Value:
        bits = ir.IntType(32)
        through = builder.asm(
            ir.FunctionType(bits, [bits]), "", "=r,0", [builder.bitcast(arguments[0], bits)], side_effect=False
        )
        return in_every_lane(builder, builder.bitcast(through, kind.vector.element), kind)

    return kind(number), generate


def _pointer(
    context: BaseContext, builder: ir.IRBuilder, array: types.Array, value: ir.Value, at: ir.Value
) -> ir.Value:
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [at]), ALL[array.dtype].vector.as_pointer())


def _lanes_of(array: types.Type) -> Lanes:
    """What an array of these is made of."""
    if (
        isinstance(array, types.Array)
        and array.ndim == 1
        and array.layout == "C"
        and ALL.get(array.dtype) in (FLOATS, INTEGERS)
    ):
        return ALL[array.dtype]
    raise TypingError(f"an array is {array}; allowed: float32 or int32 of one dimension, C order")


@intrinsic
def load(_: Context, array, index):  # type: ignore[no-untyped-def]
    """array[index : index + LANES]."""

    def generate(context: BaseContext, builder: ir.IRBuilder, own: Signature, arguments: tuple) -> ir.Value:
        return builder.load(_pointer(context, builder, own.args[0], *arguments), align=4)

    return _lanes_of(array)(array, types.uint64), generate


@intrinsic
def store(_: Context, array, index, lanes):  # type: ignore[no-untyped-def]
    """array[index : index + LANES] = lanes."""
    if lanes != _lanes_of(array):
        raise TypingError(f"{lanes} cannot be stored in {array}")

    def generate(context: BaseContext, builder: ir.IRBuilder, own: Signature, arguments: tuple) -> ir.Value:
        builder.store(arguments[2], _pointer(context, builder, own.args[0], *arguments[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.uint64, lanes), generate


@intrinsic
def where(_: Context, flags, yes, no):  # type: ignore[no-untyped-def]
    """yes where the flag is set, else no."""

    def generate(_: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: tuple) -> ir.Value:
        return builder.select(*arguments)

    return yes(FLAGS, yes, yes), generate


@intrinsic
def bits_of(_: Context, floats):  # type: ignore[no-untyped-def]
    """The same bits as integers."""

    def generate(_: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: tuple) -> ir.Value:
        return builder.bitcast(arguments[0], INTEGERS.vector)

    return INTEGERS(FLOATS), generate


@intrinsic
def floats_of(_: Context, bits):  # type: ignore[no-untyped-def]
    """The float32 numbers that have these bits."""

    def generate(_: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: tuple) -> ir.Value:
        return builder.bitcast(arguments[0], FLOATS.vector)

    return FLOATS(INTEGERS), generate


@intrinsic
def any_of(_: Context, flags):  # type: ignore[no-untyped-def]
    """Whether a flag is set."""

    def generate(_: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: tuple) -> ir.Value:
        whole = ir.IntType(LANES)
        return builder.icmp_unsigned("!=", builder.bitcast(arguments[0], whole), whole(0))

    return types.boolean(FLAGS), generate

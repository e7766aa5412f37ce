"""Whose turn it is: items that several threads of compiled loops take one by one, without Python in between.

Python's own lock lets one thread go on at a time and takes some 0.1 ms to change hands where a processor has gone to
sleep, as long as a whole sample of soft-DTW. Here it is needed once for a thread. Imported with the loops that use it:
numba takes its time to load.
"""

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.base import BaseContext
from numba.core.errors import TypingError
from numba.core.typing import Signature
from numba.core.typing.context import Context
from numba.extending import intrinsic

from kdkit.compiled import compiled, help_with, part

Array = np.ndarray

TAKEN, DONE, SIZE = 0, 8, 16
"""Two counters, each in a cache line of its own."""

LOOKS = 20_000
"""How often a thread that is done looks whether the others are, before it sleeps: some 0.1 ms."""
LOOKS_AFTER = 1_000
"""How often it looks after that, some 0.01 ms: helpers need Python's lock for a moment to go back to waiting. Who wants
it in that moment sleeps until it is free, and to wake up takes longer than all of this."""


def take_turns(task: Callable[[Array, int], None], num_items: int, num_threads: int) -> None:
    """Run task(turns, thread) on some threads until all items are done; for short ones, of some 0.01 ms.

    A helper that finds no item left may end a moment later than this returns. What goes wrong in one is raised where
    an item stays undone.

    Args:
        task: a compiled loop that takes its items by `next_turn` and runs without the GIL; thread counts from 0.
        num_items: how many there are.
        num_threads: at least 1, the caller's own included.
    """
    turns = np.zeros(SIZE, np.int64)
    helpers = help_with(task, num_threads, turns)
    task(turns, 0)
    begun = [helper for helper in helpers if not helper.cancel()]
    # To wait for the helpers themselves is to wait for Python's lock to change hands.
    if not _are_done(turns, num_items, len(begun) > 0):
        for helper in begun:
            helper.result()


@intrinsic
def _add(_: Context, counters: types.Array, index: types.Integer, amount: types.Integer):  # type: ignore[no-untyped-def]
    """counters[index] += amount in one piece; what it was. All that a thread wrote before is seen by who reads it."""
    if counters != types.Array(types.int64, 1, "C"):
        raise TypingError(f"the counters are {counters}; allowed: int64 of one dimension, C order")

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: tuple[ir.Value, ...]
    ) -> ir.Value:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", builder.gep(array.data, [arguments[1]]), arguments[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), generate


@part()
def next_turn(turns: Array) -> int:
    """The item that is this thread's; beyond the last one when there is none left."""
    return _add(turns, TAKEN, 1)


@part()
def finish(turns: Array) -> None:
    """One item is done."""
    _add(turns, DONE, 1)


@compiled()
def _are_done(turns: Array, num_items: int, helped: bool) -> bool:
    """Whether all items were found done at one of so many looks, each some nanoseconds after the last."""
    for _ in range(LOOKS):
        if _add(turns, DONE, 0) == num_items:
            for _ in range(LOOKS_AFTER if helped else 0):
                _add(turns, DONE, 0)
            return True
    return False

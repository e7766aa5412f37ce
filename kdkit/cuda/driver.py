"""Launches of compiled kernels on a CUDA device, by the calls of NVIDIA's driver; beside torch, in torch's context."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from kdkit.cuda.nvrtc import CudaUnavailable

DRIVER = "libcuda.so.1"
Argument = Tensor | ctypes.Structure | float | None
"""Of a kernel: a tensor or None for a pointer, a float for a double, a structure as it is."""


class Module:
    """Kernels of one cubin on one device.

    Args:
        cubin: machine code for that device.
        device: its index, as torch counts.
        driver: path or name of the driver's library.
    Raises:
        CudaUnavailable: there is no driver, or it refuses the code.
    """

    def __init__(self, cubin: bytes, *, device: int, driver: str = DRIVER) -> None:
        try:
            self._calls = ctypes.CDLL(driver)
        except OSError as error:
            raise CudaUnavailable(f"the CUDA driver's library {driver} cannot be loaded: {error}") from error
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._module = ctypes.c_void_p()
        self._context = ctypes.c_void_p()  # the primary one, which torch works in
        number = ctypes.c_int()
        try:
            self._check("cuInit", self._calls.cuInit(0))
            self._check("cuDeviceGet", self._calls.cuDeviceGet(ctypes.byref(number), device))
            retain = self._calls.cuDevicePrimaryCtxRetain
            self._check("cuDevicePrimaryCtxRetain", retain(ctypes.byref(self._context), number))
            with self._current():
                self._check("cuModuleLoadData", self._calls.cuModuleLoadData(ctypes.byref(self._module), cubin))
        except RuntimeError as error:
            raise CudaUnavailable(str(error)) from error

    def launch(
        self, kernel: str, *arguments: Argument, grid: Sequence[int], threads: int, shared_bytes: int, stream: int
    ) -> None:
        """Hand a kernel to the device; returns before it has run.

        Args:
            kernel: its name in the source.
            arguments: in the kernel's order.
            grid: blocks in x, y and z.
            threads: of a block.
            shared_bytes: dynamic shared memory of a block.
            stream: as torch numbers it.
        Raises:
            RuntimeError: the driver refuses; its own words follow.
        """
        values = [_as_c(argument) for argument in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        with self._current():
            function = self._function(kernel)
            status = self._calls.cuLaunchKernel(
                function, *grid, threads, 1, 1, shared_bytes, ctypes.c_void_p(stream), places, None
            )
        self._check(f"cuLaunchKernel of {kernel}", status)

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            status = self._calls.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
            self._check(f"cuModuleGetFunction of {name}", status)
            self._functions[name] = function
        return self._functions[name]

    @contextmanager
    def _current(self) -> Iterator[None]:
        """In the device's context, whatever this thread worked in before: autograd's threads may have none."""
        self._check("cuCtxPushCurrent", self._calls.cuCtxPushCurrent_v2(self._context))
        try:
            yield
        finally:
            self._calls.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _check(self, call: str, status: int) -> None:
        if status != 0:
            words = ctypes.c_char_p()
            self._calls.cuGetErrorString(status, ctypes.byref(words))
            raise RuntimeError(f"CUDA driver, {call}: {(words.value or b'unknown error').decode()} ({status})")


def _as_c(argument: Argument) -> ctypes._SimpleCData | ctypes.Structure:
    if isinstance(argument, ctypes.Structure):
        return argument
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())

"""Kernels of kdkit's own on a CUDA card, without nvcc or Triton; knows torch only.

nvrtc     CUDA source to machine code, kept on disk
driver    machine code to launches, beside torch
kernels   both in one: a source file's kernels, ready on a device of torch's
"""

from kdkit.cuda.driver import Argument, Module
from kdkit.cuda.kernels import SHARED_BYTES, load_kernels, stream_of, why_not
from kdkit.cuda.nvrtc import CudaUnavailable

__all__ = ["SHARED_BYTES", "Argument", "CudaUnavailable", "Module", "load_kernels", "stream_of", "why_not"]

"""Soft-DTW: a differentiable cost of aligning two sequences, batched and ragged; knows torch only.

From the ground up:

    band            which cells an alignment may use
    cost            pairwise costs of two sequences of vectors
    api             soft_dtw and its gradient, the expected alignment; checks and dispatch
    divergence      soft-DTW without its bias
    reference       backend "reference": naive float64 loops, the definition
    anti_diagonal   backend "torch": CPU and CUDA (MPS has no float64)
    native          backend "native": compiled by numba for the CPU; `_kernels` has the loops
    cuda            backend "cuda": compiled for the card at hand; `cuda.cu` has the kernels
    packed          what a backend may keep of an alignment instead of (B, N, M)
"""

from kdkit.softdtw.api import (
    BACKENDS,
    Backend,
    expected_alignment,
    fastest_backend,
    soft_dtw,
    soft_dtw_and_alignment,
)
from kdkit.softdtw.band import diagonal_path
from kdkit.softdtw.cost import METRICS, pairwise_cost
from kdkit.softdtw.divergence import soft_dtw_divergence

__all__ = [
    "BACKENDS",
    "METRICS",
    "Backend",
    "diagonal_path",
    "expected_alignment",
    "fastest_backend",
    "pairwise_cost",
    "soft_dtw",
    "soft_dtw_and_alignment",
    "soft_dtw_divergence",
]

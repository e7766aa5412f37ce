"""What callers use: checks, dtypes, gradient and dispatch, the same for every backend."""

import logging
import math
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kdkit import compiled
from kdkit.softdtw import anti_diagonal, cuda, native, reference
from kdkit.softdtw.packed import PackedAlignment, dense

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """One implementation of the recursion. It sees checked input and no autograd."""

    def __call__(
        self,
        cost: Tensor,
        lengths_n: Tensor,
        lengths_m: Tensor,
        *,
        gamma: float,
        band: int | None,
        with_alignment: bool,
    ) -> tuple[Tensor, Tensor | PackedAlignment | None]:
        """Soft-DTW values and, if asked for, their gradient with respect to the cost.

        Args:
            cost: (B, N, M) float32 or float64, CPU or CUDA; never written to, and never read
                beyond a sample's lengths or outside its band.
            lengths_n: (B,) int64 on the CPU, 0..N.
            lengths_m: (B,) int64 on the CPU, 0..M.
            gamma: > 0.
            band: >= 1, or None.
            with_alignment: whether to compute the second result.
        Returns:
            values (B,) in the cost's dtype: 0 for an empty sample, inf for one with no allowed
            path, NaN for one with a NaN cost; and E (B, N, M), or what it can be made of, or None:
            0 for the first two, 0 outside lengths and band, NaN inside where the value is.
        """


def soft_dtw(
    cost: Tensor,
    lengths_n: Tensor | None = None,
    lengths_m: Tensor | None = None,
    *,
    gamma: float,
    band: int | None = None,
    backend: str | Backend | None = None,
) -> Tensor:
    """Soft minimum, over all monotone alignments, of the summed cost; in units of the cost.

    value = -gamma log sum over paths exp(-(cost of the path) / gamma). It lies in
    [hard DTW - gamma log #paths, hard DTW] and so may be negative; as a loss for two sequences
    that can become equal, prefer `soft_dtw_divergence`, which is least where they are.

    Args:
        cost: (B, N, M) float; gradient flows, and is exactly 0 outside lengths and band. Cells
            beyond the lengths are never read. +inf forbids a cell. Never written to.
        lengths_n: (B,) integer, rows of each sample, 0..N; None = all N.
        lengths_m: (B,) integer, columns of each sample, 0..M; None = all M.
        gamma: smoothing, in units of the cost, > 0; -> 0 is hard DTW.
        band: half-width >= 1 of the slope-corrected band of `kdkit.softdtw.band`, in rows or
            columns; None = every cell.
        backend: a name of `BACKENDS` or a callable like one; None = for float32 "native" on the CPU
            where numba is installed and "cuda" on CUDA where its kernels can be compiled, else
            "torch"; the log says so once.
    Returns:
        (B,) float32 (float64 for a float64 cost), not normalised by length. 0 with gradient 0
        for a sample with an empty side; inf with gradient 0 where +inf costs leave no path; NaN
        with gradient NaN where a cost is NaN. Differentiable once.
    Raises:
        ValueError: gamma <= 0, band < 1, lengths that do not fit, an unknown backend.
    Source: Cuturi & Blondel 2017, arXiv:1703.01541, equation 1. Differs: none.
    """
    solve = _solver(gamma, band=band, backend=backend)
    cost, lengths_n, lengths_m = _checked(cost, lengths_n, lengths_m)
    if torch.is_grad_enabled() and cost.requires_grad:
        value = _SoftDTW.apply(cost, lengths_n, lengths_m, solve)
    else:
        value, _ = solve(cost, lengths_n, lengths_m, with_alignment=False)
    return value


def expected_alignment(
    cost: Tensor,
    lengths_n: Tensor | None = None,
    lengths_m: Tensor | None = None,
    *,
    gamma: float,
    band: int | None = None,
    backend: str | Backend | None = None,
) -> Tensor:
    """How often each cell is visited by a path drawn with probability ~ exp(-cost / gamma).

    It is the gradient of `soft_dtw` with respect to the cost.

    Args:
        cost, lengths_n, lengths_m, gamma, band, backend: as for `soft_dtw`.
    Returns:
        (B, N, M) in the value's dtype, detached, in [0, 1]: both corners 1, every row and column
        of a sample sums to >= 1, the total lies in [max(n, m), n + m - 1]. All 0 for a sample
        with an empty side or no allowed path.
    Raises:
        ValueError: as `soft_dtw`.
    Source: Cuturi & Blondel 2017, arXiv:1703.01541, section 2. Differs: none.
    """
    _, alignment = soft_dtw_and_alignment(cost.detach(), lengths_n, lengths_m, gamma=gamma, band=band, backend=backend)
    return alignment


def soft_dtw_and_alignment(
    cost: Tensor,
    lengths_n: Tensor | None = None,
    lengths_m: Tensor | None = None,
    *,
    gamma: float,
    band: int | None = None,
    backend: str | Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`soft_dtw` and `expected_alignment` for the price of one.

    Args:
        cost, lengths_n, lengths_m, gamma, band, backend: as for `soft_dtw`.
    Returns:
        The (B,) value of `soft_dtw`, with gradient, and the (B, N, M) of `expected_alignment`.
    Raises:
        ValueError: as `soft_dtw`.
    """
    solve = _solver(gamma, band=band, backend=backend)
    cost, lengths_n, lengths_m = _checked(cost, lengths_n, lengths_m)
    return _SoftDTWAndAlignment.apply(cost, lengths_n, lengths_m, solve)


class _SoftDTW(Function):
    """The gradient does not depend on what comes after, so the forward pass computes it too."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, lengths_n: Tensor, lengths_m: Tensor, solve: partial) -> Tensor:
        """Values; the alignment is kept for the backward pass as the backend packs it."""
        value, alignment = _solved(solve, cost, lengths_n, lengths_m)
        ctx.save_for_backward(alignment.cells)
        ctx.spread = alignment.spread
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None, None]:
        """Alignment times the incoming gradient."""
        (cells,) = ctx.saved_tensors
        # Dividing by a length of 0 after us sends inf or NaN back: 0 mass stays gradient 0.
        return ctx.spread(cells, grad_value), None, None, None


class _SoftDTWAndAlignment(Function):
    """As `_SoftDTW`, with the alignment laid out besides; what is kept is the smaller of it and the packed one."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, lengths_n: Tensor, lengths_m: Tensor, solve: partial) -> tuple[Tensor, Tensor]:
        """Values and alignment."""
        value, packed = _solved(solve, cost, lengths_n, lengths_m)
        alignment = packed.laid_out(len(cost))
        kept = packed if packed.cells.numel() <= alignment.numel() // 2 else dense(alignment)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(alignment)
        ctx.save_for_backward(kept.cells)
        ctx.spread = kept.spread
        return value, alignment

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor | None, _grad_alignment: None) -> tuple[Tensor | None, None, None, None]:
        """Alignment times the incoming gradient."""
        if grad_value is None:
            return None, None, None, None
        (cells,) = ctx.saved_tensors
        return ctx.spread(cells, grad_value), None, None, None


def _solved(solve: partial, cost: Tensor, lengths_n: Tensor, lengths_m: Tensor) -> tuple[Tensor, PackedAlignment]:
    """Values and alignment, whichever way the backend returns it."""
    value, alignment = solve(cost.detach(), lengths_n, lengths_m, with_alignment=True)
    return value, dense(alignment) if isinstance(alignment, Tensor) else alignment


def _solver(gamma: float, *, band: int | None, backend: str | Backend | None) -> partial:
    """The backend with its checked options filled in."""
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma is {gamma!r}; allowed: a finite number > 0, in units of the cost.")
    if band is not None and (not isinstance(band, int) or band < 1):
        raise ValueError(f"band is {band!r}; allowed: a whole number >= 1, or None for no band.")
    if isinstance(backend, str) and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}, or None.")
    if backend is None:
        backend = _fastest
    function = BACKENDS[backend] if isinstance(backend, str) else backend
    return partial(function, gamma=float(gamma), band=band)


def _fastest(
    cost: Tensor,
    lengths_n: Tensor,
    lengths_m: Tensor,
    *,
    gamma: float,
    band: int | None,
    with_alignment: bool,
) -> tuple[Tensor, Tensor | PackedAlignment | None]:
    """The backend that is the fastest for such a cost on this machine."""
    # A subclass, such as a tensor without values, may have no memory for compiled loops to read.
    name = _fastest_name(cost.device, cost.dtype) if type(cost) is Tensor else "torch"
    return BACKENDS[name](cost, lengths_n, lengths_m, gamma=gamma, band=band, with_alignment=with_alignment)


@cache
def _fastest_name(device: torch.device, dtype: torch.dtype) -> str:
    """A name of `BACKENDS`; the log says which and why, once for each device and dtype."""
    name, reason = fastest_backend(device, dtype)
    logger.info("soft-DTW runs on backend %r: %s", name, reason)
    return name


def fastest_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Which backend `backend=None` takes on a device, and why.

    Args:
        device: of the cost. On CUDA this compiles and loads the kernels, which the first call would do.
        dtype: of the cost; half precision counts as float32.
    Returns:
        A name of `BACKENDS` and the reason.
    """
    if dtype != torch.float32 or device.type not in ("cpu", "cuda"):
        return "torch", f"the compiled ones are for float32 on the CPU or CUDA, not {dtype} on {device.type}"
    if device.type == "cuda":
        problem = cuda.problem(device)
        return ("cuda", "its kernels are compiled for this card") if problem is None else ("torch", problem)
    if compiled.is_installed():
        return "native", "numba is installed; its first call on a machine compiles for some seconds"
    return "torch", 'numba is missing, which makes the faster "native": pip install "kdkit[fast]"'


def _checked(cost: Tensor, lengths_n: Tensor | None, lengths_m: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The cost in float32 or float64 and both lengths on the CPU."""
    if cost.dim() != 3 or not cost.is_floating_point():
        raise ValueError(f"cost is {cost.dtype} of shape {tuple(cost.shape)}; allowed: floats of shape (B, N, M).")
    batch, n, m = cost.shape
    return (
        cost.to(torch.promote_types(cost.dtype, torch.float32)),
        checked_lengths(lengths_n, "lengths_n", (batch, n)),
        checked_lengths(lengths_m, "lengths_m", (batch, m)),
    )


def checked_lengths(lengths: Tensor | None, name: str, size: tuple[int, int]) -> Tensor:
    """Lengths of a padded batch as (B,) int64 on the CPU.

    Args:
        lengths: (B,) integer, any device; None = every sample is as long as the padding.
        name: what to call them in an error.
        size: batch size and padded length.
    Returns:
        (B,) int64, CPU, each 0..padded length.
    Raises:
        ValueError: not one whole number 0..padded length for each sample.
    """
    batch, longest = size
    if lengths is None:
        return torch.full((batch,), longest)
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(
            f"{name} is {lengths.dtype} of shape {tuple(lengths.shape)}; allowed: one whole number "
            f"for each of the {batch} samples."
        )
    host = lengths.detach().to("cpu", torch.int64)
    if batch and (int(host.min()) < 0 or int(host.max()) > longest):
        raise ValueError(
            f"{name} runs from {int(host.min())} to {int(host.max())}; allowed: 0 to {longest}, the padded length."
        )
    return host


BACKENDS: dict[str, Backend] = {
    "reference": reference.align,
    "torch": anti_diagonal.align,
    "native": native.align,
    "cuda": cuda.align,
}
"""Every backend by name; "native" needs numba, "cuda" a CUDA device and NVRTC."""

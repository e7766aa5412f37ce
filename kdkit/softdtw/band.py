"""Which cells of the (n, m) grid an alignment may use: the slope-corrected Sakoe-Chiba band.

Cell (i, j), 0-based, of a sample with lengths n and m is admissible at half-width w when

    |i (m - 1) - j (n - 1)| <= w (max(n, m) - 1)

in whole numbers. For n = m that is |i - j| <= w. Both corners are inside and the cells are
connected for every n and m, so no pair of lengths is infeasible.

Source: Sakoe & Chiba 1978, the adjustment window. Differs: it follows the line between the two
corners instead of i = j.
"""

import torch
from torch import Tensor


def band_limits(lengths_n: Tensor, lengths_m: Tensor, *, band: int | None, num_diagonals: int) -> tuple[Tensor, Tensor]:
    """First and last admissible row of every anti-diagonal i + j = a, for every sample.

    Args:
        lengths_n: (B,) int64, rows of each sample; 0 leaves the sample without cells.
        lengths_m: (B,) int64, columns of each sample.
        band: half-width >= 1 in rows or columns, or None for the whole rectangle.
        num_diagonals: A, how many anti-diagonals to describe, counted from a = 0.
    Returns:
        first, last: (A, B) int64 each; first > last where the sample has no cell.
    Source: the module's formula, solved for i with j = a - i.
    """
    n, m = lengths_n[None, :], lengths_m[None, :]  # (1, B)
    a = torch.arange(num_diagonals, device=lengths_n.device)[:, None]  # (A, 1)
    first = (a - m + 1).clamp(min=0)  # (A, B)
    last = torch.minimum(n - 1, a)  # (A, B)
    if band is None:
        return first, last
    slack = band * (torch.maximum(n, m) - 1)
    steps = (n + m - 2).clamp(min=1)
    centre = a * (n - 1)  # (A, B), in units of 1 / steps rows
    band_first = -torch.div(slack - centre, steps, rounding_mode="floor")
    band_last = torch.div(slack + centre, steps, rounding_mode="floor")
    return torch.maximum(first, band_first), torch.minimum(last, band_last)


def diagonal_path(lengths_n: Tensor, lengths_m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The alignment that does not warp: the straight line between the corners, rounded to cells.

    It has max(n, m) cells, one for each index of the longer side, and lies inside every band.

    Args:
        lengths_n: (B,) int64, rows of each sample.
        lengths_m: (B,) int64, columns of each sample.
    Returns:
        rows, columns: (B, L) int64, L the largest max(n, m) of the batch, 0 past a path's end;
        on_path: (B, L) bool, False past a path's end and for samples with an empty side.
    """
    longer = torch.maximum(lengths_n, lengths_m)
    num_cells = torch.where(torch.minimum(lengths_n, lengths_m) > 0, longer, 0)
    step = torch.arange(int(num_cells.max()) if num_cells.numel() else 0, device=longer.device)
    on_path = step[None, :] < num_cells[:, None]  # (B, L)
    last_step = (longer[:, None] - 1).clamp(min=1)

    def rounded(lengths: Tensor) -> Tensor:
        position = 2 * step[None, :] * (lengths[:, None] - 1) + last_step
        return torch.div(position, 2 * last_step, rounding_mode="floor").where(on_path, 0)

    return rounded(lengths_n), rounded(lengths_m), on_path

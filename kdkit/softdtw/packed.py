"""An alignment as a backend keeps it until the backward pass, which may be smaller than (B, N, M)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedAlignment:
    """Expected alignments of a batch and how to lay them out."""

    cells: Tensor
    """What is kept, in the backend's own order."""
    spread: Callable[[Tensor, Tensor], Tensor]
    """(cells, factors (B,)) -> (B, N, M), a new tensor: each sample's alignment times its factor. Exactly 0 where the
    alignment is, whatever the factor."""

    def laid_out(self, batch: int) -> Tensor:
        """The alignment itself, (B, N, M); `cells` where they are that already."""
        if self.spread is _scaled:
            return self.cells
        return self.spread(self.cells, torch.ones(batch, dtype=self.cells.dtype, device=self.cells.device))


def dense(alignment: Tensor) -> PackedAlignment:
    """An alignment (B, N, M) that is kept as it is."""
    return PackedAlignment(alignment, _scaled)


def _scaled(alignment: Tensor, factors: Tensor) -> Tensor:
    """Alignment times factor; 0 where the alignment is 0 though the factor be inf or NaN."""
    return (alignment * factors[:, None, None]).masked_fill_(alignment == 0, 0.0)

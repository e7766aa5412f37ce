"""The accumulation windows of an epoch, some of which are looked at before their turn."""

from collections import deque
from collections.abc import Iterator
from itertools import islice

from kdkit.data.batch import Batch


class Windows:
    """Hands out windows in their order; those that were looked at come from memory."""

    def __init__(self) -> None:
        self._epoch: Iterator[Batch] | None = None
        self._held: deque[list[Batch]] = deque()

    def next_of(self, epoch: Iterator[Batch], num_batches: int) -> list[Batch]:
        """The batches of the next window.

        Args:
            epoch: batches of the epoch; another one forgets what was held of the last.
            num_batches: of a window.
        Returns:
            Fewer batches at the end of the epoch.
        """
        if epoch is not self._epoch:
            self._epoch = epoch
            self._held.clear()
        return self._held.popleft() if self._held else list(islice(epoch, num_batches))

    def peek(self, epoch: Iterator[Batch], num_batches: int, num_windows: int) -> list[list[Batch]]:
        """The windows after the one that was handed out last, which stay to be handed out.

        Args:
            epoch: as in `next_of`.
            num_batches: as in `next_of`.
            num_windows: how many; fewer at the end of the epoch.
        """
        while len(self._held) < num_windows:
            window = list(islice(epoch, num_batches))
            if not window:
                break
            self._held.append(window)
        return list(self._held)[:num_windows]

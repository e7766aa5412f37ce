"""An exponential moving average of all that is trained, put in the weights' place where it is evaluated or written.

torch's AveragedModel is a deep copy of the whole module: frozen weights twice, an objective that no longer follows
what a person changes, and a second model to wrap for autocast and several processes. Here the averages are tensors
alone, and the one model that everything holds shows them for a while. The arithmetic is torch's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kdkit.config import EmaConfig


def decay_at(num_updates: int, config: EmaConfig) -> float:
    """How much of the average stays at an update.

    min(decay, (1 + n) / (10 + n)) after n updates, or decay without a warm-up.

    Args:
        num_updates: n, updates before this one.
        config: decay and warm-up.
    Returns:
        0..1; 0.1 at the first update under warm-up.
    Source: tf.train.ExponentialMovingAverage, with its num_updates. Differs: none.
    """
    return min(config.decay, (1 + num_updates) / (10 + num_updates)) if config.warmup else config.decay


class WeightAverage:
    """avg <- d avg + (1 - d) weights over the trained parameters of a model, which starts as the weights themselves.

    A parameter that two modules share is averaged once and stays shared; buffers and frozen weights are not averaged.

    Args:
        model: on its device; its parameters are float32 and keep their identity, since an optimizer holds them.
        config: decay and warm-up.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.num_updates = 0
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._averages = self._copies()

    def update(self) -> None:
        """Take up the weights as an optimizer step left them."""
        average = get_ema_multi_avg_fn(decay_at(self.num_updates, self.config))
        average(self._averages, [parameter.detach() for parameter in self._parameters], self.num_updates)
        self.num_updates += 1

    def take(self) -> None:
        """Make what the model holds now the average."""
        self._averages = self._copies()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the weights' place; afterwards, whatever happens, they are what they were, bit for bit.

        Takes a further copy of the weights while it lasts, when no gradients are held.
        """
        kept = self._copies()
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(kept)

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.detach().copy_(value)

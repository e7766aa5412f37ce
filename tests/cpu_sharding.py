"""FSDP on CPU processes: accelerate itself falls back to DDP there without a word, so a test would shard nothing."""

from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp._flat_param import FlatParamHandle


def shard_on_cpu() -> None:
    """Let accelerate take this process's CPU for a device that it shards over; before any state of it is made."""
    begin = PartialState.__init__

    def begin_as_a_card(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.device = DistributedType.MULTI_GPU, torch.device("cpu")

    PartialState.__init__ = begin_as_a_card
    FlatParamHandle.to_cpu = _stay_on_cpu


@contextmanager
def _stay_on_cpu(handle):
    """To save, torch moves what it has gathered to the CPU and frees the original: here the two are one."""
    handle.flat_param_to(torch.device("cpu"))
    yield

"""The losses over a chunk's logits by plain torch and autograd: backend "torch" of the head pass, for any loss."""

import torch
from torch import Tensor

from kdkit.losses.terms import Tally, Task, block_objective
from kdkit.teacher.signal import TeacherSignal, at_least_float32


def block_gradient(
    product: Tensor, teacher: TeacherSignal | None, task: Task, *, rows: slice, tally: Tally, form: bool
) -> Tensor | None:
    """As `kdkit.losses.blocks.BlockGradient`; the product stays as it is."""
    leaf = at_least_float32(product).detach().requires_grad_(form)  # (r, V')
    with torch.set_grad_enabled(form):
        objective = block_objective(task.head.finish(leaf), teacher, task, rows=rows, tally=tally)
    return torch.autograd.grad(objective, leaf)[0] if form else None

"""Which part of a full card to blame, and what makes it smaller."""

from kdkit.memory.estimate import Parts
from kdkit.runtime import GIB

REMEDIES = {
    "teacher weights": "teacher.quantization=nf4, teacher.device of another card, or a cached teacher",
    "teacher's pass": "a smaller evaluation.batch_size, or a cached teacher",
    "student's activations": "a smaller optim.batch_size with a larger optim.accumulation, or "
    "student.gradient_checkpointing=true",
    "half-precision copies": "student.gradient_checkpointing=true",
    "divergence": "a smaller objective.chunk_tokens",
    "dtw": "a smaller optim.batch_size, or longer units (objective.unit=word)",
    "feature terms": "a smaller optim.batch_size, or fewer terms",
    "optimizer states": "optim.optimizer=adamw_8bit",
    "gradients": "optim.accumulation=1, where the batch leaves room for it",
    "average of the weights": "optim.ema=null",
    "backward": "a smaller optim.batch_size with a larger optim.accumulation",
    "KV cache": "a smaller evaluation.batch_size or rollout.batch_size",
    "generation": "a smaller evaluation.batch_size or rollout.batch_size",
}
"""Part -> what to set; parts that nothing makes smaller are left out."""


def blame(parts: Parts) -> str:
    """The largest part that a setting makes smaller, its size, and the setting.

    Args:
        parts: what is planned to be on a card at its fullest.
    Returns:
        Half a sentence.
    """
    part = max(REMEDIES, key=lambda name: parts.get(name, 0))
    size = parts.get(part, 0) / GIB
    return f"the largest part that a setting makes smaller is {part}, {size:.1f} GiB as planned: {REMEDIES[part]}"

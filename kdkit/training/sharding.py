"""What FSDP, which cuts the student into shards, cannot give."""

from accelerate.utils import FullyShardedDataParallelPlugin

from kdkit.errors import UserError


def check_sharding(
    plugin: FullyShardedDataParallelPlugin,
    *,
    has_rollout: bool,
    has_average: bool,
    has_lora: bool,
    watches_rouge_l: bool,
) -> None:
    """Refuse what needs the whole student in each process, and the ways of FSDP that lose weights or rates.

    Args:
        plugin: how the student is cut.
        has_rollout: whether the student's own text is trained on.
        has_average: whether an average of the weights is kept.
        has_lora: whether LoRA layers are trained in a frozen student.
        watches_rouge_l: whether the stage may end by its ROUGE-L.
    Raises:
        UserError: says which setting, and what to set instead.
    """
    if has_rollout:
        raise UserError("rollout needs the whole student in each process, and FSDP cuts it: use DDP, or mode off")
    if has_average:
        raise UserError("optim.ema averages the whole student in each process, and FSDP cuts it: use DDP, or ema=null")
    if has_lora:
        raise UserError("student.lora is small enough for each process, and FSDP cuts it: use DDP, or lora=null")
    if watches_rouge_l:
        raise UserError(
            "evaluation.early_stopping waits for a ROUGE-L, and under FSDP no answers are generated while training: "
            "use DDP, or early_stopping.metric=cross_entropy"
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise UserError("FSDP with sharded checkpoints saves no student: set fsdp_state_dict_type: FULL_STATE_DICT")
    if plugin.fsdp_version == 1 and not plugin.use_orig_params:
        raise UserError("FSDP merges adapters into the student's parameters: set fsdp_use_orig_params: true")

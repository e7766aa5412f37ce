"""How large a teacher is in each dtype, by part, before any weight is read; and what half precision does to its logits.

In 4 bits (bitsandbytes' nf4, as transformers loads it) linear layers alone are packed: embeddings, the head, and the
experts of an MoE block, which transformers keep as one stacked parameter, stay in half precision.
"""

import math
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdkit.data.batch import Batch
from kdkit.errors import UserError
from kdkit.loading import check_finite_logits, describe_model, load_model
from kdkit.loading.places import locate, one_message
from kdkit.losses import divergence
from kdkit.plots import Row
from kdkit.runtime import GIB, NF4_BLOCK, NF4_CAPABILITY, Preflight

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
PARTS = ("embeddings", "experts", "other")
"""Head and embeddings; what only some tokens go through; attention, dense and shared layers, norms, routers."""


def read_config(path: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """The config of a model, and nothing else of it.

    Args:
        path: folder or hub name.
        revision: branch, tag or commit on the hub.
    Returns:
        The config.
    Raises:
        UserError: there is none, or the hub is out of reach.
    """
    place = locate(path, revision=revision)
    with one_message("config", place):
        return AutoConfig.from_pretrained(place.name, **place.read_arguments())


def weight_rows(config: PreTrainedConfig) -> list[Row]:
    """The bytes of a model's weights in each dtype, counted on shapes alone.

    Args:
        config: of a causal language model of any size; no weight is read or made.
    Returns:
        For float32, float16, bfloat16 and nf4 a row: `dtype`, and the bytes of each of PARTS; tied weights count once.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    packed = {id(weight) for weight in _packed_weights(model)}
    rows: list[Row] = []
    for dtype in (*DTYPE_BYTES, "nf4"):
        sizes = Counter(dict.fromkeys(PARTS, 0))
        for name, parameter in model.named_parameters():
            count, in_4_bits = parameter.numel(), dtype == "nf4" and id(parameter) in packed
            sizes[_part_of(name, parameter, model)] += (
                nf4_bytes(count) if in_4_bits else count * DTYPE_BYTES.get(dtype, 2)
            )
        rows.append({"dtype": dtype, **sizes})
    return rows


def nf4_bytes(num_weights: int) -> int:
    """Bytes of weights packed in 4 bits, with the scale of each block in float32."""
    return math.ceil(num_weights / 2) + 4 * math.ceil(num_weights / NF4_BLOCK)


def nf4_obstacle(machine: Preflight) -> str | None:
    """Why a teacher cannot be loaded in 4 bits here, as a sentence; None where it can.

    Args:
        machine: what `preflight` found.
    """
    if machine.device != "cuda":
        return "there is no GPU: 4 bits are for a card's memory, and cost time in every layer"
    if machine.capability is not None and machine.capability < NF4_CAPABILITY:
        return f"nf4 needs compute capability {NF4_CAPABILITY[0]}.{NF4_CAPABILITY[1]}, and {machine.name} is older"
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is missing: pip install bitsandbytes"
    return None


@torch.no_grad()
def precision_rows(
    path: str | Path,
    batch: Batch,
    machine: Preflight,
    *,
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16"),
    revision: str | None = None,
) -> list[Row]:
    """A teacher asked the same in several dtypes: how far its answers move away from those of float32.

    Args:
        path: folder or hub name of the teacher; loaded once for each dtype, one at a time.
        batch: rows with answers, as it reads them.
        machine: where it runs.
        dtypes: float32 first; float16, bfloat16, and nf4 where `nf4_obstacle` says None.
        revision: branch, tag or commit on the hub.
    Returns:
        A row for each dtype: `dtype`, `gib` of what was loaded, `finite`, and over the counted positions
        `largest_error` of a logit, `mean_kl` from float32 in nats, `same_top_fraction` of equal most likely ids; only
        `dtype`, `gib`, `finite` and `problem` where logits are not finite.
    Raises:
        UserError: as `load_model`; or float32 is not the first.
    """
    if list(dtypes)[:1] != ["float32"]:
        raise UserError(f"the dtypes are {', '.join(dtypes) or 'none'}: float32 has to be the first, to compare with")
    rows: list[Row] = []
    exact = torch.empty(0)
    for dtype in dtypes:
        is_packed = dtype == "nf4"
        model = load_model(
            path,
            dtype=torch.float16 if is_packed else getattr(torch, dtype),
            device=machine.device,
            quantization="nf4" if is_packed else None,
            revision=revision,
        )
        about = {"dtype": dtype, "gib": describe_model(model).size_bytes / GIB}
        try:
            check_finite_logits(model, {**batch})
        except UserError as error:
            rows.append({**about, "finite": False, "problem": str(error)})
            continue
        logits = _counted_logits(model, batch)  # (N, V)
        exact = logits if dtype == "float32" else exact
        rows.append({**about, "finite": True, **_deviation(logits, exact)})
    return rows


def _deviation(logits: Tensor, exact: Tensor) -> dict[str, float]:
    """How far logits (N, V) lie from the exact ones."""
    return {
        "largest_error": (logits - exact).abs().max().item(),
        "mean_kl": divergence("forward_kl", logits, exact).mean().item(),
        "same_top_fraction": (logits.argmax(-1) == exact.argmax(-1)).float().mean().item(),
    }


def _counted_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(N, V) float32 on the CPU, at the positions that predict an answer's token; one row is computed at a time."""
    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    kept, length = batch["positions"], ids.shape[1]
    found = []
    for row in range(len(ids)):
        own = kept[(kept >= row * length) & (kept < (row + 1) * length)] - row * length
        logits = model(input_ids=ids[[row]], attention_mask=mask[[row]], use_cache=False).logits[0]
        found.append(logits[own.to(logits.device)].float().cpu())
    return torch.cat(found)


def _packed_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """What transformers hands to bitsandbytes: linear layers, but not the head."""
    head = model.get_output_embeddings()
    modules = [m for m in model.modules() if type(m) is nn.Linear or isinstance(m, Conv1D)]
    return [module.get_parameter("weight") for module in modules if module is not head]


def _part_of(name: str, parameter: nn.Parameter, model: PreTrainedModel) -> str:
    """Which of PARTS a parameter belongs to; all experts of a block are one stacked parameter, or modules in a list."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(parameter is own for module in ends if module is not None for own in module.parameters()):
        return "embeddings"
    return "experts" if ".experts." in name else "other"

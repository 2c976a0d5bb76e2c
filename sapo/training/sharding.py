"""Weights that are spread over processes, each of which holds a part of every layer (PyTorch's FSDP2).

Training gathers a layer when it is read, by all processes at once. Rollouts cannot: each process reads as often as its
own completions are long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sapo.errors import InputError
from sapo.policy.shared_prompt import share_prompts

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

FSDP = (  # options of accelerate launch
    "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_state_dict_type FULL_STATE_DICT --fsdp_cpu_ram_efficient_loading false"
)


def check_sharding(accelerator: "Accelerator", needs_all: str | None = None) -> None:
    """Refuse ways of spreading weights that training here does not know.

    Args:
        needs_all: what is trained that is not to be spread.

    Raises:
        InputError: DeepSpeed, the first FSDP, checkpoints in pieces, a model that is loaded by one process alone, or
            weights that are spread though something needs all of them.
    """
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return
    if kind != DistributedType.FSDP:
        raise InputError(
            f"{kind.value} is not known here: launch with DDP (--multi_gpu) or FSDP2 (accelerate launch {FSDP})."
        )
    plugin = accelerator.state.fsdp_plugin
    whole = "FULL_STATE_DICT" in str(plugin.state_dict_type)
    if plugin.fsdp_version != 2 or not whole or plugin.cpu_ram_efficient_loading:
        raise InputError(
            f"FSDP {plugin.fsdp_version} with {plugin.state_dict_type} and cpu_ram_efficient_loading "
            f"{plugin.cpu_ram_efficient_loading} is not known here: accelerate launch {FSDP}."
        )
    if needs_all is not None:
        raise InputError(f"{needs_all} need the whole model on each GPU: launch with DDP (--multi_gpu).")


@contextmanager
def whole_weights(model: "PreTrainedModel") -> Iterator[None]:
    """All weights on every process for a while, in the precision that they are computed with."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def gathered(model: "PreTrainedModel") -> "PreTrainedModel":
    """A plain model with all weights, on every process; the model itself where it is whole."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not isinstance(model, FSDPModule):
        return model
    parts: PreTrainedModel = model
    (plain_class,) = (base for base in type(parts).__bases__ if base is not FSDPModule)
    with torch.random.fork_rng(), torch.device(parts.device):  # its random weights are overwritten
        plain = plain_class(parts.config)
    own = plain.state_dict()
    with torch.no_grad():
        for name, value in parts.state_dict().items():
            own[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)
    share_prompts(plain)
    return plain.train(parts.training)

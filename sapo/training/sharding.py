"""Weights that are spread over processes, each of which holds a part of every layer (PyTorch's FSDP2).

Training gathers a layer when it is read, by all processes at once. Rollouts cannot: each process reads as often as its
own completions are long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from sapo.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

FSDP = (  # options of accelerate launch
    "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_state_dict_type FULL_STATE_DICT --fsdp_cpu_ram_efficient_loading false"
)
_whole: "WeakSet[PreTrainedModel]" = WeakSet()  # within `whole_weights`


def prepare_sharding(accelerator: "Accelerator", needs_all: str | None = None) -> None:
    """Where weights are to be spread, have gradients spread too, and add them up in float32, as without.

    Args:
        needs_all: what is trained that is not to be spread.

    Raises:
        InputError: DeepSpeed, the first FSDP, checkpoints in pieces, a model that is loaded by one process alone, or
            weights that are spread though something needs all of them.
    """
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import MixedPrecisionPolicy

    kind = accelerator.distributed_type
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return
    if kind != DistributedType.FSDP:
        raise InputError(
            f"{kind.value} is not known here: launch with DDP (--multi_gpu) or FSDP2 (accelerate launch {FSDP})."
        )
    plugin = accelerator.state.fsdp_plugin
    settings = {
        "fsdp_version": plugin.fsdp_version,
        "state_dict_type": plugin.state_dict_type.name,
        "cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    known = dict(zip(settings, (2, "FULL_STATE_DICT", False, True), strict=True))
    if other := [f"{name} {value}" for name, value in settings.items() if value != known[name]]:
        raise InputError(f"FSDP with {', '.join(other)} is not known here: accelerate launch {FSDP}.")
    if needs_all is not None:
        raise InputError(f"{needs_all} need the whole model on each GPU: launch with DDP (--multi_gpu).")
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, torch.float32)
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True  # else each process would gather all gradients


@contextmanager
def whole_weights(model: "PreTrainedModel") -> Iterator[None]:
    """All weights on every process for a while, in the precision that they are computed with."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not parts or model in _whole:
        yield
        return
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    _whole.add(model)
    try:
        yield
    finally:
        _whole.discard(model)
        layers = set(model._no_split_modules or ())
        for part in parts:  # tables stay between forward and backward, as accelerate has them
            is_layer = any(base.__name__ in layers for base in type(part).__mro__)
            part.set_reshard_after_forward(is_layer, recurse=False)
            part.reshard()


def gathered(model: "PreTrainedModel") -> "PreTrainedModel":
    """A plain model with all weights, on every process; the model itself where it is whole."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not isinstance(model, FSDPModule):
        return model
    parts: PreTrainedModel = model
    (plain_class,) = (base for base in type(parts).__bases__ if base is not FSDPModule)
    devices = [parts.device] if parts.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(parts.device):  # its random weights are overwritten
        plain = plain_class(parts.config)
    own = plain.state_dict()
    with torch.no_grad():
        for name, value in parts.state_dict().items():
            own[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)
    return plain.train(parts.training)

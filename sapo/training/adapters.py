"""Training a part of a pretrained model: low-rank adapters (peft), and the rows of the tokens that name items."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sapo.errors import InputError
from sapo.policy.policy import Policy

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def lora_config(rank: int, rows: dict[str, list[int]] | None = None) -> "LoraConfig":
    """Adapters of every linear layer but the head, scaled by 2; and some rows of tables.

    Args:
        rows: by the name of the table.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("adapters need peft: pip install sapo[lora].") from error
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        trainable_token_indices=rows,
    )


def adapted(policy: Policy, rank: int, seed: int) -> "PreTrainedModel":
    """The policy's model with adapters, of which they and the rows that name items are trained.

    Args:
        seed: of the matrices that adapters start from.
    """
    model, rows = policy.model, item_rows(policy)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    config = lora_config(rank, {"embed_tokens": rows} if tied else {"embed_tokens": rows, "lm_head": rows})
    from peft import get_peft_model

    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merged(model: "PreTrainedModel") -> "PreTrainedModel":
    """A model with its adapters added to its weights; one without adapters as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def item_rows(policy: Policy) -> list[int]:
    """Tokens that a pretrained model is taught: SIDs, and the delimiters of blocks."""
    layout = policy.layout
    return sorted([layout.think_start_id, layout.think_end_id, *layout.sid_ids.tolist()])


@contextmanager
def rows_alone(model: "PreTrainedModel", rows: list[int]) -> Iterator[None]:
    """For a while nothing is trained but some rows of the embeddings and of the head.

    The other rows of a table get a gradient of 0, which leaves them alone unless weights decay.
    """
    tables = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    handles = []
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is table for table in tables))
    for table in tables:
        chosen = torch.zeros(len(table), 1, device=table.device)
        chosen[rows] = 1
        handles.append(table.register_hook(chosen.mul))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(True)

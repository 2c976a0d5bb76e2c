"""Rewards of a generated semantic ID. They compare codes, never text: a completion is right where its codes are.

A malformed completion arrives here as a row of -1 (`ReasoningLayout.parse`), and targets are never negative, so every
reward of it is 0 without a special case.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.errors import InputError


def _check_shapes(predicted: Tensor, target: Tensor) -> None:
    if predicted.shape != target.shape:
        raise InputError(f"predicted has shape {tuple(predicted.shape)}, target {tuple(target.shape)}: give one each.")


def exact_match(predicted: Int[Tensor, "B K"], target: Int[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """1 where the whole SID is right, else 0: the outcome reward."""
    _check_shapes(predicted, target)
    return (predicted == target).all(dim=1).float()


def step_match(predicted: Int[Tensor, "B K"], target: Int[Tensor, "B K"], gated: bool = False) -> Float[Tensor, "B K"]:
    """m_{i,k}: 1 where code k is right (arXiv 2605.17648).

    A residual code means something only under its prefix. `gated=True` asks for all earlier codes to be right too, and
    so does not pay for the right code under a wrong parent.
    """
    _check_shapes(predicted, target)
    match = (predicted == target).float()
    return match.cumprod(dim=1) if gated else match


def graded_match(predicted: Int[Tensor, "B K"], target: Int[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """2^-(K-m) for m > 0 leading codes right, else 0; with K = 3: 1/4, 1/2, 1 (SIDReasoner, arXiv 2603.23183)."""
    leading = step_match(predicted, target, gated=True).sum(dim=1)
    return torch.where(leading > 0, 2.0 ** (leading - target.shape[1]), 0.0)


def first_error(predicted: Int[Tensor, "B K"], target: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """1 at every step of a right SID; of a wrong one 1/2 at the steps before its first error, 0 from it on.

    The value that VPPO (arXiv 2601.18984, alpha = 1/2) gives to the good prefix of a wrong answer. The verifier that
    it learns is exact here: the first wrong code is the first error.
    """
    prefix = step_match(predicted, target, gated=True)
    return torch.where(prefix[:, -1:] > 0, 1.0, 0.5 * prefix)


def ranking_reward(exact: Float[Tensor, "B"], group_size: int) -> Float[Tensor, "B"]:
    """1 for a hit; for a miss at beam r = 0, 1, ... minus w_r if the group has a hit, else 0; w_r is proportional to
    1 / log2(r + 2) and sums to 1 over the group (MiniOneRec, arXiv 2510.24431).

    Args:
        exact: exact matches of whole groups in beam order, best first.

    Raises:
        InputError: a group size that does not divide B: ranks need whole groups.
    """
    if len(exact) % group_size:
        raise InputError(f"group_size {group_size} does not divide {len(exact)} completions: ranks need whole groups.")
    groups = exact.view(-1, group_size)
    weights = 1 / torch.arange(2, group_size + 2, device=exact.device).log2()
    hit = groups.amax(1, keepdim=True)
    return (groups - hit * (1 - groups) * weights / weights.sum()).flatten()


def best_of_beam(beams: Int[Tensor, "B W K"], target: Int[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """The most codes that any SID of a completion's own beam has right, position by position (OneRec-Think, arXiv
    2510.11639, eq. 6). With one beam it is the sum of `step_match`."""
    return (beams == target[:, None]).sum(2).amax(1).float()

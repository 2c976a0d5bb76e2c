"""Group-relative advantages. SAPO is GRPO with one change: the group statistics are taken per reasoning step.

A group is the G completions of one prompt; they are contiguous in the batch. B = prompts x G completions, K steps, T
completion tokens.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.errors import InputError

STD_EPSILON = 1e-4  # added to the sample std, as TRL does


def step_advantages(
    step_rewards: Float[Tensor, "B K"],
    group_size: int,
    scale: str = "group",
    baseline: str = "group",
    across_steps: bool = False,
) -> Float[Tensor, "B K"]:
    """A_{i,k} = (r_{i,k} - mean_j r_{j,k}) / std_j r_{j,k}, the mean and std over the group at fixed step k.

    That is SAPO (arXiv 2605.17648). `across_steps=True` takes both over all G x K rewards of the group instead: the
    process supervision of GRPO (arXiv 2402.03300, section 4.1.3) before its suffix sum.

    Args:
        scale: what divides: "group" (std of the group), "batch" (std of the step over the whole batch),
            "batch_centred" (the same of what is left once the baseline is subtracted) or "none".
        baseline: what is subtracted: the mean of the "group", of its other members ("leave_one_out"), of the
            "batch", or "none".

    The std is the sample std plus 1e-4. Where a group has no spread, every advantage that is relative to the group is
    exactly 0, and where the batch has none, every one that is relative to the batch. Spread is max != min: the float
    mean of equal rewards can differ from them in the last bit, and that difference over 1e-4 is an advantage Adam turns
    into a full step.

    Raises:
        InputError: group_size below 2 or not a divisor of B; an unknown scale or baseline.
    """
    groups = _groups(step_rewards, group_size, across_steps)  # (prompts, G, K)
    centred = _less_baseline(groups, baseline)
    return (centred / _divisor(groups, centred, scale)).reshape(step_rewards.shape)


def trajectory_advantages(
    rewards: Float[Tensor, "B"], group_size: int, scale: str = "group", baseline: str = "group"
) -> Float[Tensor, "B"]:
    """A_i, one scalar a completion: the same with a single step (GRPO, arXiv 2402.03300)."""
    return step_advantages(rewards[:, None], group_size, scale, baseline)[:, 0]


def _groups(rewards: Float[Tensor, "B K"], group_size: int, across_steps: bool) -> Float[Tensor, "N G C"]:
    """In at least float32; a column a step, or one for all steps together."""
    batch, steps = rewards.shape
    if group_size < 2:
        raise InputError(
            f"group_size is {group_size}: a group-relative advantage needs at least 2 completions a prompt."
        )
    if batch % group_size:
        raise InputError(f"group_size {group_size} does not divide the batch of {batch} completions into whole groups.")
    values = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    return values.reshape((-1, group_size * steps, 1) if across_steps else (-1, group_size, steps))


def _less_baseline(groups: Float[Tensor, "N G C"], baseline: str) -> Float[Tensor, "N G C"]:
    if baseline == "none":
        return groups
    if baseline not in ("group", "leave_one_out", "batch"):
        raise InputError(f"baseline is {baseline!r}: use 'group', 'leave_one_out', 'batch' or 'none'.")
    compared = (0, 1) if baseline == "batch" else 1
    centred = groups - groups.mean(compared, keepdim=True)
    if baseline == "leave_one_out":
        members = groups.shape[1]
        centred = centred * (members / (members - 1))
    no_spread = groups.amax(compared, keepdim=True) == groups.amin(compared, keepdim=True)
    return centred.masked_fill(no_spread, 0.0)


def _divisor(
    groups: Float[Tensor, "N G C"], centred: Float[Tensor, "N G C"], scale: str
) -> Float[Tensor, "..."] | float:
    if scale == "none":
        return 1.0
    if scale not in ("group", "batch", "batch_centred"):
        raise InputError(f"scale is {scale!r}: use 'group', 'batch', 'batch_centred' or 'none'.")
    if scale == "group":
        return groups.std(1, keepdim=True) + STD_EPSILON
    return (centred if scale == "batch_centred" else groups).flatten(0, 1).std(0) + STD_EPSILON


def zero_variance(advantages: Float[Tensor, "B C"], group_size: int) -> Bool[Tensor, "B C"]:
    """Whether a completion's group gives no credit in a column (a step, or the one of trajectories): every advantage
    of the group is 0. With a baseline of the group that is exactly where its rewards are all equal."""
    silent = (advantages == 0).view(-1, group_size, advantages.shape[1]).all(1)
    return silent.repeat_interleave(group_size, 0)


def kept_share(left_out: Bool[Tensor, "B C"], sizes: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """Share of `sizes` that is not left out; 1 where nothing would be kept, so that it can divide."""
    share = (sizes * ~left_out).sum() / sizes.sum().clamp(min=1)
    return torch.where(share > 0, share, 1.0)


def suffix_sum(values: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Sum over steps k, k+1, ..., K: what step k can still influence."""
    return values.flip(1).cumsum(1).flip(1)


def to_tokens(step_values: Float[Tensor, "B K"], token_steps: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Give every token the value of its step; 0 where `token_steps` is -1."""
    # a column of zeros before the first step answers to -1
    return torch.nn.functional.pad(step_values, (1, 0)).gather(1, token_steps + 1)

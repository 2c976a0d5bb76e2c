"""What a batch of rollouts tells of its credit: how much there is, where it is silent, and how it is spread."""

import torch
from jaxtyping import Float
from torch import Tensor


def credit_metrics(
    rewards: Float[Tensor, "B K"] | Float[Tensor, "B"],
    advantages: Float[Tensor, "B C"],
    match: Float[Tensor, "B K"],
    lengths: Float[Tensor, "B K"],
    trained: Float[Tensor, "B K"],
    group_size: int,
) -> dict[str, float]:
    """Numbers of whole groups, by the names of the log.

    Args:
        rewards: of steps, or of trajectories.
        advantages: a column a step, or one.
        match: 1 where a step's SID token is the target's.
        lengths: tokens of each step; `trained` those of them that get a gradient.
    """
    trajectory = rewards.sum(1) if rewards.dim() == 2 else rewards
    silent = (advantages == 0).view(-1, group_size * advantages.shape[1]).all(1)
    metrics = {
        "reward": trajectory.mean(),
        "reward_std": trajectory.std(),
        "frac_reward_zero_std": no_spread(trajectory[:, None], group_size).mean(),
        "frac_zero_credit": silent.float().mean(),
        "signs_differ": ((advantages > 0).any(1) & (advantages < 0).any(1)).float().mean(),
        "exact/frac_zero_spread": no_spread(match.prod(1, keepdim=True), group_size).mean(),
        "response_length": lengths.sum(1).mean(),  # TRL's completions/mean_length skips forced tokens
        "weight_moved": weight_moved(trained).mean(),
    }
    flat = no_spread(match, group_size).mean(0)
    for k in range(match.shape[1]):
        metrics[f"rewards/sid_level_{k + 1}/mean"] = match[:, k].mean()
        metrics[f"step/{k + 1}/frac_zero_spread"] = flat[k]
        metrics[f"step/{k + 1}/length"] = lengths[:, k].mean()
        metrics[f"step/{k + 1}/trained"] = trained[:, k].mean()
    for k, share in enumerate(own_credit(advantages, match, group_size)):
        if not share.isnan():  # of a batch without credit at this step nothing can be said
            metrics[f"step/{k + 1}/own_credit"] = share
    return {name: value.item() for name, value in metrics.items()}


def own_credit(advantages: Float[Tensor, "B C"], match: Float[Tensor, "B K"], group_size: int) -> Float[Tensor, "K"]:
    """Share of the variance of a step's advantage, within a group, that the step's own match explains.

    The squared correlation of the two over a group; 0 where all matches are alike, since all of the credit then comes
    from other steps. The mean over groups whose advantages differ, NaN where none do. Under SAPO it is 1; summed step
    rewards of K equally likely, independent steps give 1/K: the rest is noise to the step.
    """
    groups, credit = match.view(-1, group_size, match.shape[1]), advantages.view(-1, group_size, advantages.shape[1])
    credit = credit.expand(groups.shape)
    uneven = credit.amax(1) != credit.amin(1)
    known = uneven & (groups.amax(1) != groups.amin(1))
    groups, credit = groups - groups.mean(1, keepdim=True), credit - credit.mean(1, keepdim=True)
    spread = (groups.square().sum(1) * credit.square().sum(1)).masked_fill(~known, 1.0)
    explained = ((groups * credit).sum(1).square() / spread).masked_fill(~known, 0.0)
    return torch.where(uneven.any(0), explained.sum(0) / uneven.sum(0).clamp(min=1), torch.nan)


def weight_moved(counts: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """Half the distance between the weights of a completion's steps under the step mean and the mean over its tokens.

    The one weighs a step with trained tokens by 1/K, the other by its share of them: where all steps have some, it is
    the share of weight that moves. 0 where nothing is trained.
    """
    total = counts.sum(1, keepdim=True)
    shares = counts / total.clamp(min=1)
    return ((shares - (counts > 0) / counts.shape[1]).abs().sum(1) / 2) * (total[:, 0] > 0)


def no_spread(values: Float[Tensor, "B C"], group_size: int) -> Float[Tensor, "P C"]:
    """1 for every group and column whose values are all equal."""
    groups = values.view(-1, group_size, values.shape[1])
    return (groups.amax(1) == groups.amin(1)).float()

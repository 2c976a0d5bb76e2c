"""Every policy objective of the field as a point in a small space; one loss reads it (`sapo.credit.loss`).

An objective is a reward, the unit that gets credit, how credit is normalised, the unit of the importance ratio, and how
token losses are averaged. SAPO is GRPO with three of these changed:

    GRPO   reward exact   credit trajectory   average sequence
    SAPO   reward match   credit step         average step

B completions = prompts x G with each group contiguous, K steps, T completion tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.credit.advantages import step_advantages, suffix_sum, to_tokens, trajectory_advantages
from sapo.credit.rewards import (
    best_of_beam,
    exact_match,
    first_error,
    graded_match,
    ranking_reward,
    step_match,
)
from sapo.errors import InputError

VALID_SID_BONUS = 0.1  # SIDReasoner's reward for a SID of the catalogue
VERIFIED = 10.0  # Tulu 3's reward for a verified answer
# Of step credit in groups whose outcome says nothing: chosen among 1, 1/2 and 1/4 in two worlds of the laboratory.
SILENT_WEIGHT = 0.5
STEP_REWARDS = ("match", "gated", "first_error")  # one number a step; the others are one a completion
CHOICES = {
    "reward": ("exact", "verified", "sign", "ranking", "graded", "match", "gated", "first_error", "best_of_beam"),
    "credit": ("trajectory", "step", "token"),
    "baseline": ("group", "leave_one_out", "batch", "none", "value"),
    "scale": ("group", "batch", "batch_centred", "none"),
    "ratio": ("token", "step", "sequence", "sequence_sum"),
    "average": ("sequence", "token", "constant", "step"),
}
EXTRAS = (
    *("valid_bonus", "dynamic_sampling"),
    *("suffix_rewards", "suffix_advantages", "across_steps", "per_level", "beam_rollouts", "thinking_only"),
    *("kl_in_reward", "outcome_first"),
)


@dataclass(frozen=True)
class Objective:
    """A point in the space. `OBJECTIVES` names the points that papers made known.

    Args:
        reward: "exact", "verified" (10 for an exact match), "sign" (exact match as 1 and -1), "ranking", "graded" and
            "best_of_beam" are one number a completion; "match", "gated" and "first_error" one a step.
        credit: "trajectory" spreads one advantage over all tokens, "step" gives each step its own, "token" each token
            (`generalized_advantages`, from a learned value). A step reward under trajectory credit is summed over the
            steps; an outcome reward under step credit is repeated at every step.
        baseline, scale: see `step_advantages`; "value" is a learned one, which token credit takes.
        ratio: unit of the importance ratio: "token", the geometric mean over a "step" or the "sequence", or the whole
            sequence's own ("sequence_sum": log-ratios are summed, not averaged).
        average: "sequence" (mean over a completion's tokens, then over completions), "token" (over all tokens),
            "constant" (sum over tokens / maximal length, then over completions), "step" (mean over a step's tokens,
            divided by K, then over completions).
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high].
        beta: weight of the KL to the reference policy.
        extras: "valid_bonus" adds 0.1 for a SID of the catalogue; "dynamic_sampling" resamples groups without spread;
            "suffix_rewards" and "suffix_advantages" give step k the sum over steps k..K, before or after normalising;
            "across_steps" normalises over all G x K values at once; "per_level" normalises every level over the group
            and sums them before anything else; "beam_rollouts" makes a group of the G likeliest SIDs after one thought,
            which is part of their prompt and not trained; "thinking_only" trains no SID token; "kl_in_reward" takes the
            KL from every token's reward, not the loss; "outcome_first" gives every step the advantage of the exact
            match, and step credit, at half its size, only to groups whose exact matches are all alike.
        label: its name in figures and tables; its key where empty.
        source: where the objective was published.
    """

    reward: str
    credit: str
    baseline: str = "group"
    scale: str = "group"
    ratio: str = "token"
    average: str = "sequence"
    epsilon: float | int = 0.2
    epsilon_high: float | int = 0.2
    beta: float | int = 0.0
    extras: tuple[str, ...] = ()
    label: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name, words in CHOICES.items():
            if getattr(self, name) not in words:
                raise InputError(f"{name} is {getattr(self, name)!r}; an objective knows {', '.join(words)}.")
        if unknown := set(self.extras) - set(EXTRAS):
            raise InputError(f"extras holds {sorted(unknown)}; known are {', '.join(EXTRAS)}.")
        if (self.credit == "token") != (self.baseline == "value"):
            raise InputError(
                f"credit {self.credit!r} with baseline {self.baseline!r}: token credit is that of a learned value, and "
                f"a learned value gives credit to tokens."
            )
        if self.credit == "token" and (self.scale != "batch" or "kl_in_reward" not in self.extras):
            raise InputError("token credit is scaled over the batch and has the KL in its reward: add both.")
        if "outcome_first" in self.extras and (
            len(self.extras) > 1
            or self.baseline not in ("group", "leave_one_out")
            or self.scale in ("batch", "batch_centred")
        ):
            raise InputError("outcome_first compares the completions of a group, and goes with no other extra.")
        by_step, stepwise = self.credit == "step", self.reward in STEP_REWARDS
        by_trajectory = self.credit == "trajectory"
        for name, fits, what in (
            ("across_steps", by_step, "step credit"),
            ("suffix_advantages", by_step, "step credit"),
            ("suffix_rewards", by_step and stepwise, "step credit and a step reward"),
            ("per_level", by_trajectory and stepwise, "trajectory credit and a step reward"),
            ("valid_bonus", not stepwise, "an outcome reward"),
            ("kl_in_reward", self.credit == "token", "token credit"),
            ("outcome_first", by_step and self.reward in ("match", "gated"), "step credit of matches"),
        ):
            if name in self.extras and not fits:
                raise InputError(f"{name} needs {what}; this is reward {self.reward!r} with {self.credit} credit.")

    def rewards(
        self,
        predicted: Int[Tensor, "B K"],
        target: Int[Tensor, "B K"],
        in_catalogue: Bool[Tensor, "B"],
        group_size: int | None = None,
        beams: Int[Tensor, "B W K"] | None = None,
    ) -> Float[Tensor, "B K"] | Float[Tensor, "B"]:
        """The reward as this objective normalises it: (B, K) for step credit and "per_level", else (B,).

        Args:
            group_size: what "ranking" compares within; completions are in beam order.
            beams: the SIDs that "best_of_beam" looks at, W after the thought of each completion.

        Raises:
            InputError: a reward without what it needs.
        """
        if self.reward == "best_of_beam":
            if beams is None:
                raise InputError("the reward 'best_of_beam' needs beams: the SIDs after each completion's thought.")
            return best_of_beam(beams, target)
        if self.reward in STEP_REWARDS:
            reward = (
                first_error(predicted, target)
                if self.reward == "first_error"
                else step_match(predicted, target, gated=self.reward == "gated")
            )
            if "suffix_rewards" in self.extras:
                reward = suffix_sum(reward)
            return reward if self.credit == "step" or "per_level" in self.extras else reward.sum(dim=1)
        reward = graded_match(predicted, target) if self.reward == "graded" else exact_match(predicted, target)
        if self.reward == "sign":
            reward = 2 * reward - 1
        if self.reward == "verified":
            reward = VERIFIED * reward
        if self.reward == "ranking":
            if group_size is None:
                raise InputError("the reward 'ranking' needs group_size: a miss is punished by its rank in its group.")
            reward = ranking_reward(reward, group_size)
        if "valid_bonus" in self.extras:
            reward = reward + VALID_SID_BONUS * in_catalogue.float()
        return reward[:, None].expand(predicted.shape) if self.credit == "step" else reward

    def advantages(
        self, rewards: Float[Tensor, "B K"] | Float[Tensor, "B"], group_size: int
    ) -> Float[Tensor, "B K"] | Float[Tensor, "B"]:
        """One advantage for each credit unit: (B, K) for step credit, (B,) for trajectory.

        Raises:
            InputError: token credit, which needs a value of every state (`sapo.credit.gae`).
        """
        if self.credit == "token":
            raise InputError("token credit comes from learned values: see generalized_advantages in sapo.credit.gae.")
        if self.credit == "trajectory":
            if "per_level" in self.extras:
                rewards = step_advantages(rewards, group_size).sum(dim=1)
            return trajectory_advantages(rewards, group_size, self.scale, self.baseline)
        across = "across_steps" in self.extras
        advantages = step_advantages(rewards, group_size, self.scale, self.baseline, across)
        if "outcome_first" in self.extras:
            outcome = trajectory_advantages(rewards.prod(1), group_size, self.scale, self.baseline)[:, None]
            heard = (outcome != 0).view(-1, group_size).any(1).repeat_interleave(group_size)[:, None]
            advantages = torch.where(heard, outcome, SILENT_WEIGHT * advantages)
        return suffix_sum(advantages) if "suffix_advantages" in self.extras else advantages

    @property
    def separates_columns(self) -> bool:
        """Whether each column of the rewards is normalised without looking at the others."""
        return not {"across_steps", "suffix_advantages", "per_level", "outcome_first"} & set(self.extras)

    def to_tokens(
        self, advantages: Float[Tensor, "B K"] | Float[Tensor, "B"], token_steps: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """The advantage of every token. Trajectory credit reaches all T, also the tokens outside the steps."""
        if self.credit == "step":
            return to_tokens(advantages, token_steps)
        return advantages[:, None].expand(token_steps.shape)


OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective("exact", "trajectory", beta=1e-3, label="GRPO", source="2402.03300"),
    "grpo_graded": Objective(
        "graded", "trajectory", beta=1e-3, extras=("valid_bonus",), label="GRPO, graded reward", source="2603.23183"
    ),
    "dr_grpo": Objective(
        "exact", "trajectory", scale="none", average="constant", label="Dr. GRPO", source="2503.20783"
    ),
    "dapo": Objective(
        "exact",
        "trajectory",
        average="token",
        epsilon_high=0.28,
        extras=("dynamic_sampling",),
        label="DAPO",
        source="2503.14476",
    ),
    # Its clip range is narrower than what one update moves: with two updates a batch about a fifth of all tokens are
    # clipped, nearly all in the second, so that its row there compares one update with the others' two.
    "gspo": Objective(
        "exact", "trajectory", ratio="sequence", epsilon=3e-4, epsilon_high=4e-4, label="GSPO", source="2507.18071"
    ),
    # The paper, and TRL with beta 0.05, also take beta x log(policy / reference), summed over a completion, from its
    # reward. Here the reward is the exact match alone.
    "rloo": Objective(
        "exact",
        "trajectory",
        baseline="leave_one_out",
        scale="none",
        ratio="sequence_sum",
        label="RLOO",
        source="2402.14740",
    ),
    "rlvr": Objective(
        *("verified", "token"),
        baseline="value",
        scale="batch",
        average="token",
        beta=0.05,
        extras=("kl_in_reward",),
        label="RLVR (PPO)",
        source="2411.15124",
    ),
    # REINFORCE++-baseline, the paper's variant for several completions a prompt: less the group's mean, over the
    # batch's std of what is left. Up to the 1e-4 beside the std these are the advantages of TRL's RLOO with
    # `normalize_advantages`, whose factor G / (G - 1) cancels. Both are over completions; verl whitens over their
    # tokens, the same where all have equally many. The paper also has a KL to the reference; here there is none.
    "reinforce_plus_plus": Objective(
        "exact", "trajectory", scale="batch_centred", label="REINFORCE++-baseline", source="2501.03262"
    ),
    "gdpo": Objective(
        "match", "trajectory", baseline="batch", scale="batch", extras=("per_level",), label="GDPO", source="2601.05242"
    ),
    "process_grpo": Objective(
        "match",
        "step",
        beta=1e-3,
        extras=("across_steps", "suffix_advantages"),
        label="Process GRPO",
        source="2402.03300",
    ),
    # MiniOneRec does not think: what its beams share is the prompt, and all have equally many tokens. So the thought
    # that they share here is not trained, and the step mean counts every beam's SID as K tokens, also where some are
    # forced: whatever prefix all beams share then gets the sum of their advantages, which is 0.
    "rank_reward": Objective(
        "ranking",
        "trajectory",
        average="step",
        beta=1e-3,
        extras=("beam_rollouts",),
        label="Ranking reward",
        source="2510.24431",
    ),
    "best_of_beam": Objective(
        "best_of_beam", "trajectory", beta=1e-3, extras=("thinking_only",), label="Best of beam", source="2510.11639"
    ),
    "sign": Objective(
        "sign", "trajectory", baseline="none", scale="none", label="Sign advantage", source="2601.18984, compared there"
    ),
    "vppo": Objective(
        "first_error", "step", scale="none", average="step", extras=("across_steps",), label="VPPO", source="2601.18984"
    ),
    "rank_grpo": Objective(
        "match",
        "step",
        ratio="step",
        average="step",
        epsilon=0.06,
        epsilon_high=0.08,
        beta=1e-3,
        label="Rank-GRPO",
        source="2510.20150",
    ),
    "sapo": Objective("match", "step", average="step", beta=1e-3, label="SAPO (step-aligned)", source="2605.17648"),
    "sapo_gated": Objective(
        "gated", "step", average="step", beta=1e-3, label="SAPO, gated", source="ours, after 2605.17648"
    ),
    "sapo_suffix": Objective(
        "gated",
        "step",
        average="step",
        beta=1e-3,
        extras=("suffix_rewards",),
        label="SAPO, suffix",
        source="ours, after 2605.17648",
    ),
    # Step credit where the outcome is silent: it then cannot lead away from what is wanted where that is known.
    "sapo_fallback": Objective(
        "match",
        "step",
        average="step",
        beta=1e-3,
        extras=("outcome_first",),
        label="SAPO where GRPO is silent",
        source="ours, after 2605.17648",
    ),
    # SAPO's other scales. Without the std, a group counts by how much its rewards differ; a leave-one-out baseline
    # would give G / (G - 1) times the same. The batch's std puts the steps on one scale, but not the groups of a step.
    "sapo_no_std": Objective(
        "match",
        "step",
        scale="none",
        average="step",
        beta=1e-3,
        label="SAPO, no std",
        source="ours, after 2605.17648 and 2503.20783",
    ),
    "sapo_batch_std": Objective(
        "match",
        "step",
        scale="batch",
        average="step",
        beta=1e-3,
        label="SAPO, batch std",
        source="ours, after 2605.17648 and 2508.08221",
    ),
    # The two remaining cells of the ablation: step reward without step advantage, and the other way round. With the
    # sequence mean, SAPO's credit stands without its weights; the outcome reward with that mean would be GRPO again.
    "grpo_step_reward": Objective(
        "match", "trajectory", beta=1e-3, label="GRPO, step reward", source="2605.17648, ablation"
    ),
    "sapo_sequence_mean": Objective(
        "match", "step", beta=1e-3, label="SAPO, sequence mean", source="ours, after 2605.17648"
    ),
    "sapo_outcome_reward": Objective(
        "exact", "step", average="step", beta=1e-3, label="SAPO, outcome reward", source="2605.17648, ablation"
    ),
}

"""Steps and their rewards in the one tensor that other trainers hand on: a number a token.

A trainer like verl gives an advantage estimator the rewards of tokens, a mask and which rows are a group, but no token
ids, from which steps could be read. So the last token of every run of tokens of one step carries that step and K, as a
multiple of 2^-20, on top of its reward, which is a whole number. Both are exact in float32, and the sum over a
completion is still its reward to within a few thousandths.

    tokens    <think> a  b </think> \\n  <think> c </think>  <a_1>   <b_2>
    step         1    1  1    1     -      2    2     2       1       2
    code         0    0  0    2     1      0    0     3       2       3       + 64 K where it is not 0, x 2^-20
    reward       0    0  0    0     0      0    0     0       1       0
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.errors import InputError

UNIT = 2.0**-20
ROOM = 64  # codes of one K
MOST_STEPS = 15


class Decoded(NamedTuple):
    """What token rewards say."""

    steps: Int[Tensor, "B T"]  # 0-based, -1 for none
    rewards: Float[Tensor, "B T"]
    num_steps: int


def encode_steps(steps: Int[Tensor, "B T"], rewards: Float[Tensor, "B T"], num_steps: int) -> Float[Tensor, "B T"]:
    """Rewards of tokens with the steps in them.

    Args:
        steps: 0-based, -1 for tokens of no step.
        rewards: whole numbers, at most 7 in size.
        num_steps: K.

    Raises:
        InputError: a reward that is none of these, a step outside 0..K-1, or more than 15 steps.
    """
    whole = torch.equal(rewards, rewards.round()) and rewards.abs().max() <= 7
    if not (1 <= num_steps <= MOST_STEPS and steps.min() >= -1 and steps.max() < num_steps and whole):
        raise InputError(
            f"{num_steps} steps from {int(steps.min())} to {int(steps.max())} and rewards up to "
            f"{float(rewards.abs().max()):g} cannot be coded: at most {MOST_STEPS} steps, and whole numbers up to 7."
        )
    following = torch.nn.functional.pad(steps[:, 1:], (0, 1), value=-2)  # no step's number: the last token ends a run
    code = torch.where(steps != following, steps + 2 + ROOM * num_steps, 0)
    return rewards.float() + code * UNIT


def decode_steps(values: Float[Tensor, "B T"]) -> Decoded:
    """Steps and rewards of tokens; those after a row's last code, which are padding, are of no step.

    Raises:
        InputError: values that no `encode_steps` made, as where a KL penalty was taken off them.
    """
    rewards = values.float().round()
    code = (values.float() - rewards) / UNIT
    number = code.round().long()
    coded = number > 0
    num_steps = int(number.max()) // ROOM
    steps_of = number - ROOM * num_steps - 2
    whole = (code - number).abs().max() < 1e-3 and bool(coded.any()) and bool((number >= 0).all())
    whole &= bool(coded[rewards != 0].all())  # what is paid ends a run: in bfloat16 its code is lost
    if not whole or not ((steps_of >= -1) & (steps_of < num_steps))[coded].all():
        raise InputError(
            "token rewards carry no steps: they must come from the agent loop or the reward manager of "
            "sapo.integrations.verl, in float32, and nothing may be taken off them (algorithm.use_kl_in_reward=False)."
        )
    # a code holds for the tokens before it, up to the one before: the code that stands at or after each token
    width = values.shape[1]
    place = torch.where(coded, torch.arange(width, device=values.device), width).flip(1).cummin(1).values.flip(1)
    padded = torch.nn.functional.pad(steps_of, (0, 1), value=-1)
    return Decoded(padded.gather(1, place), rewards, num_steps)

"""The laboratory against brute force: every group written out, with the loss that training minimises."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES, Objective
from sapo.credit.rewards import step_match
from sapo.errors import InputError
from sapo.lab.exact import (
    efficiency,
    expected_update,
    improvement,
    mixed_share,
    sampled_updates,
    second_moment,
    silent_share,
    true_gradient,
)
from sapo.lab.world import SidWorld

# 8 trajectories, 512 groups of 3. Both second codes are only children, so no second token is trained.
TINY = SidWorld(
    level_sizes=(2, 2),
    num_words=2,
    targets=((0, 0), (1, 1)),
    target_probs=(0.7, 0.3),
    catalogue=((0, 0), (1, 1)),
    coupling=0.5,
    seed=3,
)
FREE = SidWorld(level_sizes=(2, 2), num_words=2, targets=((0, 1), (1, 1)), coupling=0.7, layout="interleaved", seed=1)
RAGGED = SidWorld(
    level_sizes=(2, 3), num_words=2, targets=((0, 1),), catalogue=((0, 0), (0, 1), (1, 2)), coupling=0.3, seed=2
)
ONE = SidWorld(level_sizes=(3,), num_words=2, targets=((1,),), seed=5)
WIDE = SidWorld(level_sizes=(3, 3, 3), num_words=2, targets=((0, 1, 2), (2, 1, 0)), coupling=0.4, seed=4)


def groups_written_out(objective, world, size):
    """(probability, update, whether all advantages are 0) of every group, by the shipped loss at ratio 1."""
    members = torch.tensor(list(itertools.product(range(len(world.sids)), repeat=size)))
    probs, updates, silent = [], [], []
    for target, share in zip(world.target_sids, world.goal_probs, strict=True):
        advantages = []  # group by group: some objectives normalise over the batch, which is one group here
        for group in members:
            sids = world.sids[group]
            rewards = objective.rewards(sids, target.expand(size, -1), torch.ones(size, dtype=torch.bool)).double()
            advantages.append(objective.advantages(rewards, size))
        flat, advantages = members.flatten(), torch.stack(advantages)
        logps = world.log_probs(world.theta)[flat].requires_grad_()
        steps = world.token_steps[flat]
        loss = policy_loss(  # the mean over all groups
            objective,
            logps,
            logps.detach(),
            objective.to_tokens(advantages.flatten(0, 1), steps),
            steps,
            world.trained[flat],
            num_steps=world.num_steps,
            beta=0.0,
            max_length=2 * world.num_steps,
        ).loss
        by_token = -len(members) * torch.autograd.grad(loss, logps)[0]
        by_member = torch.einsum("yt,ytp->yp", by_token, world.scores[flat])
        probs.append(share * world.probs[members].prod(1))
        updates.append(by_member.unflatten(0, members.shape).sum(1))
        silent.append((advantages == 0).flatten(1).all(1))
    return torch.cat(probs), torch.cat(updates), torch.cat(silent)


NO_CLOSED_FORM = ("rank_reward", "best_of_beam", "rlvr")  # rewards that are not of a completion, a learned value
CLOSED = [key for key in OBJECTIVES if key not in ("dapo", *NO_CLOSED_FORM)]


@pytest.mark.parametrize("key", CLOSED)
@pytest.mark.parametrize(
    ("world", "size"), [(TINY, 3), (FREE, 2), (RAGGED, 2), (ONE, 3)], ids=["trie", "free", "ragged", "one step"]
)
def test_expected_update_is_the_mean_over_all_groups(key, world, size):
    objective = OBJECTIVES[key]
    probs, updates, silent = groups_written_out(objective, world, size)
    assert float(probs.sum()) == pytest.approx(1)
    torch.testing.assert_close(expected_update(key, world, size), probs @ updates, atol=1e-10, rtol=0)
    moment = probs @ updates.square().sum(1)
    torch.testing.assert_close(second_moment(objective, world, size), moment, atol=1e-10, rtol=0)
    assert moment > 1e-6
    assert silent_share(key, world, size) == pytest.approx(float(probs @ silent.double()))


@pytest.mark.parametrize(("world", "size"), [(TINY, 3), (FREE, 2)], ids=["trie", "free"])
def test_signs_within_a_completion(world, size):
    """Against all groups written out: some step of a completion is credited and another is blamed."""
    members = torch.tensor(list(itertools.product(range(len(world.sids)), repeat=size)))
    expected = 0.0
    for target, share in zip(world.target_sids, world.goal_probs, strict=True):
        match = step_match(world.sids, target.expand(world.sids.shape)).double()
        for group in members:
            credit = OBJECTIVES["sapo"].advantages(match[group], size)
            mixed = ((credit > 0).any(1) & (credit < 0).any(1)).double().mean()
            expected += float(share * world.probs[group].prod() * mixed)
    assert expected > 0.01 or world is TINY  # whose second code follows from the first
    assert mixed_share(world, size) == pytest.approx(expected)


@pytest.mark.parametrize(("world", "size"), [(TINY, 3), (FREE, 2)], ids=["trie", "free"])
def test_dynamic_sampling_is_the_mean_over_groups_with_signal(world, size):
    probs, updates, silent = groups_written_out(OBJECTIVES["dapo"], world, size)
    probs = probs * ~silent
    expected = probs @ updates / probs.sum()
    torch.testing.assert_close(expected_update("dapo", world, size, given_signal=True), expected, atol=1e-10, rtol=0)
    moment = probs @ updates.square().sum(1) / probs.sum()
    torch.testing.assert_close(second_moment("dapo", world, size, given_signal=True), moment, atol=1e-10, rtol=0)


@pytest.mark.parametrize("key", [key for key in OBJECTIVES if key not in NO_CLOSED_FORM])
def test_expected_update_is_the_mean_of_sampled_ones(key):
    """G = 16, K = 3: within 4 standard errors in every component."""
    sampled = sampled_updates(key, WIDE, 16, 4000, torch.Generator().manual_seed(0))
    error = sampled.std(0) / math.sqrt(len(sampled))
    objective = OBJECTIVES[key]
    if objective.scale == "batch":  # one group a batch, whose constant groups divide by 1e-4 alike
        objective = replace(objective, baseline="group", scale="group")
    gap = (sampled.mean(0) - expected_update(objective, WIDE, 16)).abs()
    assert (gap <= 4 * error + 1e-12).all()
    if "per_level" not in objective.extras:  # two minutes: 8 kinds of completions are 116,280 sets of 14
        moment = sampled.square().sum(1)
        assert abs(moment.mean() - second_moment(objective, WIDE, 16)) <= 4 * moment.std() / math.sqrt(len(moment))


@pytest.mark.parametrize("world", [TINY, FREE, RAGGED, WIDE])
@pytest.mark.parametrize("goal", ["exact", "match", "gated"])
def test_true_gradients_are_those_of_autograd(world, goal):
    theta = world.theta.clone().requires_grad_()
    by_autograd = torch.autograd.grad(world.value(goal, theta), theta)[0]
    torch.testing.assert_close(true_gradient(world, goal), by_autograd, atol=1e-10, rtol=0)
    assert by_autograd.norm() > 1e-3


@pytest.mark.parametrize("world", [TINY, FREE, RAGGED, WIDE])
def test_scores_are_those_of_autograd(world):
    theta = world.theta.clone().requires_grad_()
    logps = world.log_probs(theta)
    for row, column in ((0, 0), (3, 1), (5, -1), (7, -2)):
        by_autograd = torch.autograd.grad(logps[row, column], theta, retain_graph=True)[0]
        torch.testing.assert_close(world.scores[row, column], by_autograd, atol=1e-12, rtol=0)


def test_values_by_hand():
    """Uniform policy, K = 2, two codes a level: each of 4 SIDs has probability 1/4."""
    world = SidWorld(
        level_sizes=(2, 2), num_words=2, targets=((0, 0), (0, 1)), target_probs=(0.75, 0.25), sharpness=0.0
    )
    assert float(world.value("exact")) == pytest.approx(1 / 4)  # whichever the target is
    assert float(world.value("match")) == pytest.approx(1)  # 1/2 a level
    assert float(world.value("gated")) == pytest.approx(3 / 4)  # 1/2 + 1/4
    # G = 2: silent when both are right or both wrong, 1/16 + 9/16
    assert silent_share("grpo", world, 2) == pytest.approx(10 / 16)
    # SAPO: only when both completions have the same matches at both levels, 4 x 1/16
    assert silent_share("sapo", world, 2) == pytest.approx(4 / 16)


def test_outcome_reward_makes_step_credit_the_trajectory_credit():
    """The objection to SAPO, exactly: with one trained token in each block and code, even the weights agree."""
    grpo, outcome = (expected_update(key, WIDE, 8) for key in ("grpo", "sapo_outcome_reward"))
    torch.testing.assert_close(outcome, grpo, atol=1e-15, rtol=0)


def test_one_step_makes_sapo_grpo():
    torch.testing.assert_close(expected_update("sapo", ONE, 6), expected_update("grpo", ONE, 6), atol=1e-15, rtol=0)
    torch.testing.assert_close(second_moment("sapo", ONE, 6), second_moment("grpo", ONE, 6), atol=1e-15, rtol=0)


def test_worlds_share_what_they_have_in_common():
    """Another coupling or layout leaves every table that both have as it was, so that the two can be paired."""

    def tables(world):
        sizes = [math.prod(shape) for shape in world._shapes.values()]
        return dict(zip(world._shapes, world.theta.split(sizes), strict=True))

    first = tables(WIDE)
    for other in (replace(WIDE, coupling=0.0), replace(WIDE, layout="interleaved"), replace(WIDE, coupling=0.9)):
        common = [name for name, table in tables(other).items() if name in first and "block1|previous" not in name]
        assert len(common) > 8
        for name in common:
            if first[name].shape == tables(other)[name].shape:
                assert torch.equal(first[name], tables(other)[name])
    moved = WIDE.at(WIDE.theta * 0)
    assert float(moved.value("exact")) == pytest.approx(1 / 27)
    assert float(WIDE.value("exact")) != pytest.approx(1 / 27)


def test_blocks_reach_other_tokens_only_through_the_coupling():
    loose = replace(WIDE, coupling=0.0)
    steps, theta = loose.num_steps, loose.theta.clone()
    logps = loose.log_probs(theta)
    other = (loose.words[:, None, 0] != loose.words[None, :, 0]) & (loose.sids[:, None] == loose.sids[None]).all(-1)
    other &= (loose.words[:, None, 1:] == loose.words[None, :, 1:]).all(-1)
    first, second = (index[0] for index in other.nonzero(as_tuple=True))
    assert torch.equal(logps[first, steps + 1 :], logps[second, steps + 1 :])  # codes 2 and 3 do not see block 1
    assert not torch.isclose(logps[first, steps], logps[second, steps])
    coupled = WIDE.log_probs(WIDE.theta)
    assert not torch.isclose(coupled[first, steps + 1 :], coupled[second, steps + 1 :]).any()


@pytest.mark.parametrize("layout", ["blocks_first", "interleaved"])
def test_trajectories_are_all_there_is(layout):
    world = replace(RAGGED, layout=layout)
    assert float(world.probs.sum()) == pytest.approx(1)
    assert len(torch.cat([world.words, world.sids], 1).unique(dim=0)) == len(world.sids) == 4 * 3
    assert world.trained.sum(1).unique().tolist() == [3, 4]  # (1, 2) is an only child
    # in the interleaved layout token 1 cannot see block 2
    seen = world.log_probs(world.theta)[:, 2].view(4, 3)
    same = torch.equal(seen[0], seen[1])  # words (0, 0) and (0, 1)
    assert same == (layout == "interleaved")


def test_efficiency_is_a_share_and_knows_a_noiseless_update():
    gradient = true_gradient(WIDE)
    assert efficiency(gradient, gradient @ gradient, gradient) == pytest.approx(1)
    update, moment = expected_update("sapo", WIDE, 8), second_moment("sapo", WIDE, 8)
    assert 0 < efficiency(update, moment, gradient) < 1
    # the mean of many groups has no noise left, only bias
    many = efficiency(update, moment, gradient, groups=10**9)
    assert many == pytest.approx(float(torch.cosine_similarity(update, gradient, dim=0)) ** 2)
    # noise falls with the group: twice the completions, less second moment
    assert second_moment("dr_grpo", WIDE, 16) < second_moment("dr_grpo", WIDE, 8)


def test_improvement_of_a_short_step_is_the_directional_derivative():
    gradient = true_gradient(WIDE)
    length = 1e-4
    moved = WIDE.log_probs(WIDE.theta + length * gradient / gradient.norm()).sum(1)
    before = WIDE.log_probs(WIDE.theta).sum(1)
    kl = float(before.exp() @ (before - moved))
    assert improvement(WIDE, gradient, kl=kl) == pytest.approx(length * float(gradient.norm()), rel=1e-2)
    assert improvement(WIDE, -gradient, kl=kl) < 0


def test_skill_is_found():
    for probability in (0.2, 1e-5):
        world = WIDE.with_exact_match(probability)
        assert float(world.value("exact")) == pytest.approx(probability, rel=1e-5)
        assert world.coupling == WIDE.coupling
    with pytest.raises(InputError, match="no skill makes an exact match as likely as 0"):
        WIDE.with_exact_match(0.999)  # two targets: a policy that always names one is right half of the time


def test_large_worlds_are_enumerated_in_one_go():
    world = SidWorld(level_sizes=(9, 9, 9), num_words=3, targets=((0, 1, 2),), seed=0)
    assert len(world.sids) == 19_683
    update = expected_update("sapo", world, 16)
    assert update.norm() > 0
    torch.testing.assert_close(float(update @ true_gradient(world)) > 0, True)


def test_bad_worlds_say_so():
    for options, message in (
        ({"targets": ((0, 0, 0),)}, "K = 2"),
        ({"targets": ((0, 2),), "catalogue": ((0, 0),)}, "not in the catalogue"),
        ({"targets": ((0, 3),)}, "outside level_sizes"),
        ({"target_probs": (0.5,)}, "together 1"),
        ({"layout": "mixed"}, "blocks_first"),
        ({"num_words": 400}, "trajectories"),
    ):
        with pytest.raises(InputError, match=message):
            SidWorld(**options)
    with pytest.raises(InputError, match="known are grpo"):
        expected_update("sap", TINY, 2)
    with pytest.raises(InputError, match="at least 2"):
        expected_update("sapo", TINY, 1)
    with pytest.raises(InputError, match="'ranking' is of beams"):
        expected_update("rank_reward", TINY, 2)
    with pytest.raises(InputError, match="mixes the credit of its steps"):
        expected_update(Objective("match", "step", ratio="sequence_sum"), TINY, 2)
    never = SidWorld((1, 1), 2, targets=((0, 0),))  # one SID: always right
    with pytest.raises(InputError, match="no group of this world has any signal"):
        expected_update("dapo", never, 2, given_signal=True)
    with pytest.raises(InputError, match="at least one word"):
        SidWorld(num_words=0)
    with pytest.raises(InputError, match="together 1"):
        SidWorld(target_probs=(math.nan,))
    with pytest.raises(InputError, match="'token' average"):
        expected_update("dapo", RAGGED, 2)
    with pytest.raises(InputError, match="goal is 'outcome'"):
        TINY.value("outcome")
    with pytest.raises(InputError, match="direction is 0"):
        improvement(TINY, torch.zeros_like(TINY.theta))

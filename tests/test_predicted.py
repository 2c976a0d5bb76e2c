"""The predicted worth of a step: by hand, against all groups written out, samples, and the laboratory."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from sapo.credit.objectives import OBJECTIVES
from sapo.errors import InputError
from sapo.lab.exact import efficiency, expected_update, second_moment, true_gradient
from sapo.lab.predicted import (
    MOST_GROUPS,
    count_outcomes,
    dependence,
    draw_probs,
    goal_gradient,
    group_moments,
    has_closed_form,
    independent_steps,
    num_groups,
    outcomes,
    predict,
    sample_joint,
    sampled_moments,
    step_scores,
    step_worth,
)
from sapo.lab.world import SidWorld

CLOSED = [key for key, objective in OBJECTIVES.items() if has_closed_form(objective)]
OF_BATCH = [key for key in CLOSED if OBJECTIVES[key].scale in ("batch", "batch_centred")]
STD_PAIR = math.sqrt(0.5) + 1e-4  # of the rewards 0 and 1


def random_joint(prompts: int, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(2**steps), prompts))


def groups_written_out(objective, joint, size):
    """E[g], E ||g||^2 and the share of groups with credit of one prompt, group by group through the objective."""
    right, scores = outcomes(len(joint).bit_length() - 1), step_scores(joint[None])[0]
    mean, second, signal = torch.zeros(right.shape[1], dtype=torch.float64), 0.0, 0.0
    target = torch.zeros(size, right.shape[1], dtype=torch.long)
    for members in itertools.product(range(len(right)), repeat=size):
        group = list(members)
        rewards = objective.rewards((~right[group]).long(), target, torch.ones(size, dtype=torch.bool)).double()
        credit = objective.advantages(rewards, size).view(size, -1)
        update, prob = (credit * scores[group]).mean(0), float(joint[group].prod())
        heard = "dynamic_sampling" not in objective.extras or bool(credit.any())
        mean, second = mean + prob * update, second + prob * float(update @ update)
        signal += prob * heard
    return mean, second, signal


def test_one_step_and_two_completions_by_hand():
    """p = 1/4. A pair differs with probability 2 p (1 - p) = 3/8; its rewards 1 and 0 have std 0.7071, so that
    advantages are +-a, a = 0.5 / (0.7071 + 1e-4), and g = (a (1 - p) + (-a) (0 - p)) / 2 = a / 2. Others give 0."""
    joint = independent_steps(torch.tensor([[0.25]], dtype=torch.float64))
    assert joint.tolist() == [[0.75, 0.25]]
    credit = 0.5 / STD_PAIR
    for key in ("sapo", "grpo"):  # the same with one step
        mean, second, signal = group_moments(key, joint, 2)
        assert mean.tolist() == [[pytest.approx(3 / 8 * credit / 2)]]
        assert second.tolist() == [pytest.approx(3 / 8 * credit**2 / 4)]
        assert signal.tolist() == [1]
    assert goal_gradient(joint).tolist() == [[pytest.approx(3 / 16)]]  # p (1 - p)
    # (3/8 a/2 x 3/16)^2 / (3/8 a^2/4) = 3/8 (3/16)^2, whichever a
    moments = group_moments("grpo", joint, 2)
    assert step_worth(moments, goal_gradient(joint), 1, "own") == pytest.approx(3 / 8 * (3 / 16) ** 2)
    # With two prompts an update, g^2 = (3/8 a/2)^2 + (3/8 - 9/64) a^2/4 / 2: worth (3/8)^2 / (9/64 + 15/128) (3/16)^2
    assert step_worth(moments, goal_gradient(joint), 2) == pytest.approx((9 / 64) / (33 / 128) * (3 / 16) ** 2)


def test_two_steps_and_two_completions_by_hand():
    """p = (1/2, 1/4), G = 2, a = 0.5 / (0.7071 + 1e-4).

    SAPO: E[g_k] = 2 p_k (1 - p_k) a / 2: a/4 and 3a/16; E g_k^2 = 2 p_k (1 - p_k) a^2 / 4: a^2/8 and 3a^2/32.
    GRPO: right with q = 1/8. The other completion is one of 7 kinds of misses. For a pair of a hit and a miss that has
    step k right or not, g_k = a (m_hit,k - m_miss,k) / 2 = a/2 where the miss lacks step k, else 0. Step 1 is lacking
    with probability 1/2, step 2 with 3/4, so E[g] = 2 q a/2 (1/2, 3/4) = a (1/16, 3/32), and E ||g||^2 =
    2 q a^2/4 (1/2 + 3/4) = 5 a^2 / 64.
    """
    joint = independent_steps(torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    assert joint.tolist() == [[0.375, 0.125, 0.375, 0.125]]
    a = 0.5 / STD_PAIR
    mean, second, _ = group_moments("sapo", joint, 2)
    assert mean[0].tolist() == pytest.approx([a / 4, 3 * a / 16])
    assert second.tolist() == [pytest.approx(a**2 * (1 / 8 + 3 / 32))]
    mean, second, _ = group_moments("grpo", joint, 2)
    assert mean[0].tolist() == pytest.approx([a / 16, 3 * a / 32])
    assert second.tolist() == [pytest.approx(5 * a**2 / 64)]
    # d (p1 p2) / d logit_k = p1 p2 (1 - p_k); d (p1 + p2) = p_k (1 - p_k); gated, p1 + p1 p2: p1 (1 - p1) (1 + p2)
    assert goal_gradient(joint)[0].tolist() == pytest.approx([1 / 16, 3 / 32])
    assert goal_gradient(joint, "match")[0].tolist() == pytest.approx([1 / 4, 3 / 16])
    assert goal_gradient(joint, "gated")[0].tolist() == pytest.approx([5 / 16, 3 / 32])


def test_shared_and_own_parameters_by_hand():
    """Prompts with E[g] = 1 and 3, E g^2 = 2 and 12, grad J = 1 and 1.

    Shared, 5 an update: 2^2 + (7 - 2^2) / 5 = 4.6, worth (2 x 1)^2 / 4.6. Own: mean of E[g] grad J is 2, 4 / 7."""
    moments = group_moments("sapo", random_joint(2, 1), 2)._replace(
        mean=torch.tensor([[1.0], [3.0]]), second=torch.tensor([2.0, 12.0])
    )
    gradient = torch.ones(2, 1)
    assert step_worth(moments, gradient, 5) == pytest.approx(4 / 4.6)
    assert step_worth(moments, gradient, 5, "own") == pytest.approx(4 / 7)
    # Prompts that pull one parameter opposite ways undo each other; with parameters of their own they do not.
    opposed = moments._replace(mean=torch.tensor([[1.0], [-1.0]]))
    assert step_worth(opposed, torch.tensor([[1.0], [-1.0]]), 5) == 0
    assert step_worth(opposed, torch.tensor([[1.0], [-1.0]]), 5, "own") == pytest.approx(1 / 7)


@pytest.mark.parametrize("key", [key for key in CLOSED if key not in OF_BATCH])
@pytest.mark.parametrize(("steps", "size"), [(2, 3), (3, 2)])
def test_moments_are_those_of_all_groups(key, steps, size):
    objective, joint = OBJECTIVES[key], random_joint(2, steps, seed=1)
    moments = group_moments(key, joint, size)
    for prompt, row in enumerate(joint):
        mean, second, signal = groups_written_out(objective, row, size)
        torch.testing.assert_close(moments.mean[prompt], mean, atol=1e-12, rtol=0)
        assert float(moments.second[prompt]) == pytest.approx(second, abs=1e-12)
        assert second > 1e-4
        assert float(moments.signal[prompt]) == pytest.approx(signal)


@pytest.mark.parametrize("key", CLOSED)
def test_moments_are_the_means_of_sampled_groups(key):
    """G = 8, one large batch through `Objective.advantages`: within 4 standard errors, found from 20 parts of it.

    A part of 2,500 groups a prompt also has the batch's std to within a percent."""
    joint = random_joint(4, 3, seed=2)
    rng = np.random.default_rng(0)
    parts = [sampled_moments(key, joint, 8, rng, 500) for _ in range(20)]
    exact = group_moments(key, joint, 8)
    scale = 1.0
    for name in ("mean", "second", "signal"):
        values = torch.stack([getattr(part, name) for part in parts])
        expected = getattr(exact, name)
        if key in OF_BATCH and OBJECTIVES[key].credit == "trajectory" and name != "signal":
            # up to the std of the batch, one number that no worth depends on
            scale = float((values.mean(0) * expected).sum() / expected.square().sum()) if name == "mean" else scale**2
            expected = expected * scale
        error = values.std(0) / math.sqrt(len(values))
        slack = 0.01 * expected.abs() if key in OF_BATCH else 0.0
        assert ((values.mean(0) - expected).abs() <= 4 * error + slack + 1e-12).all()


@pytest.mark.parametrize("key", ["sapo", "grpo", "grpo_step_reward", "sapo_gated", "process_grpo", "sapo_fallback"])
def test_one_step_is_the_laboratory_of_two_codes(key):
    """Whatever tables its logit is the sum of, there is one direction, and the efficiency is (E[g])^2 / E g^2."""
    world = SidWorld(level_sizes=(2,), num_words=1, targets=((1,),), seed=3)
    prob = float(world.value("exact"))
    joint = torch.tensor([[1 - prob, prob]], dtype=torch.float64)
    mean, second, _ = group_moments(key, joint, 6)
    wanted = efficiency(expected_update(key, world, 6), second_moment(key, world, 6), true_gradient(world))
    assert float(mean[0, 0] ** 2 / second[0]) == pytest.approx(wanted)
    assert 0.01 < prob < 0.99


@pytest.mark.parametrize("key", [key for key in CLOSED if key not in (*OF_BATCH, "dapo")])
def test_steps_are_those_of_the_laboratory(key):
    """Two codes a level, no thoughts, code k depending on code k - 1: the bias of the target's code is the logit of the
    step. Every token of the laboratory has weight 1/K."""
    world = SidWorld(level_sizes=(2, 2, 2), num_words=1, targets=((0, 1, 0),), seed=4)
    right = world.sids == world.target_sids[0]
    place = right.long() @ torch.tensor([4, 2, 1])
    joint = torch.zeros(1, 8, dtype=torch.float64).index_add_(1, place, world.probs[None])
    scores = step_scores(joint)[0][place]  # (Y, K)
    biases = [
        int((world.scores[:, 3 + k] - scores[:, k, None]).abs().sum(0).argmin()) for k in range(3)
    ]  # the parameter whose score it is
    assert all(torch.allclose(world.scores[:, 3 + k, bias], scores[:, k]) for k, bias in enumerate(biases))
    torch.testing.assert_close(goal_gradient(joint)[0], true_gradient(world)[biases])
    torch.testing.assert_close(goal_gradient(joint, "match")[0], true_gradient(world, "match")[biases])
    torch.testing.assert_close(goal_gradient(joint, "gated")[0], true_gradient(world, "gated")[biases])
    update = 3 * expected_update(key, world, 4)[biases]
    if OBJECTIVES[key].average == "constant":  # divides by 2K tokens, of which the blocks are forced
        update = 2 * update
    if OBJECTIVES[key].ratio == "sequence_sum":  # K times the gradient of their mean
        update = update / 3
    torch.testing.assert_close(group_moments(key, joint, 4).mean[0], update)


def test_dynamic_sampling_is_worth_what_its_groups_with_credit_are():
    """Both moments over P(credit): the same direction of one prompt, and so 1 / P(credit) times the worth with own
    parameters."""
    joint = independent_steps(torch.tensor([[0.3, 0.2]], dtype=torch.float64))
    gradient = goal_gradient(joint)
    silent = 0.06**8 + 0.94**8
    plain = step_worth(group_moments("grpo", joint, 8), gradient, 4, "own")
    kept = step_worth(group_moments("dapo", joint, 8), gradient, 4, "own")
    assert kept == pytest.approx(plain / (1 - silent))


def made_up(rng: np.random.Generator, prompts: int, factor: float = 1.0) -> torch.Tensor:
    """Prompts with Beta-distributed steps; an exact match is `factor` times likelier than if they were independent."""
    means, concentration = np.array([0.3, 0.5, 0.7]), 2.0
    joint = independent_steps(
        torch.from_numpy(rng.beta(means * concentration, (1 - means) * concentration, (prompts, 3)))
    )
    joint[:, -1] *= factor
    return joint / joint.sum(1, keepdim=True)


@pytest.mark.parametrize("parameters", ["shared", "own"])
def test_worth_from_16_samples_is_that_of_the_true_probabilities(parameters):
    """3,000 prompts: within 15 % and their ratio within 5 %; add-half smoothing of the outcomes is off by more."""

    def worths(joint):
        gradient = goal_gradient(joint)
        return np.array(
            [step_worth(group_moments(key, joint, 16), gradient, 32, parameters) for key in ("sapo", "grpo")]
        )

    rng = np.random.default_rng(0)
    joint = made_up(rng, 3000)
    counts = np.array([rng.multinomial(16, row) for row in joint.numpy()])
    truth, found = worths(joint), worths(sample_joint(counts, "independent", rng, 2))
    smoothed = worths(torch.from_numpy((counts + 0.5) / 20))
    assert np.abs(np.log(found / truth)).max() < 0.15
    assert abs(math.log(found[0] / found[1] * truth[1] / truth[0])) < 0.05
    assert np.abs(np.log(smoothed / truth)).max() > 0.15


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_dependence_of_steps_is_found(factor):
    """Against the true probabilities of outcomes and of the steps of every prompt, of 4,000 prompts."""
    rng = np.random.default_rng(1)
    joint = made_up(rng, 4000, factor)
    true = joint.sum(0) / independent_steps(joint @ outcomes(3).double()).sum(0)
    found = dependence(np.array([rng.multinomial(16, row) for row in joint.numpy()]))
    np.testing.assert_allclose(found, true, atol=0.04)
    assert float(true.max() - true.min()) > 0.4 or factor == 1.0


def test_dependence_by_hand():
    """Two prompts of two completions, both right or both wrong: seen 1 x each corner, twice. Expected of a prompt with
    one of each: 2 x 1/4 of every outcome. (2 + 10) / (1 + 10) for corners, (0 + 10) / (1 + 10) for the others."""
    counts = np.array([[1, 0, 0, 1], [1, 0, 0, 1]])
    assert dependence(counts) == pytest.approx(np.array([12, 10, 10, 12]) / 11)


def test_draws_differ_as_much_as_prompts_do():
    """Beta(0.6, 1.4): mean .3, variance .3 x .7 / 3 = .07; prompts all alike: none but their own mean."""
    rng = np.random.default_rng(2)
    probs = rng.beta(0.6, 1.4, 20_000)
    hits = rng.binomial(16, probs)
    drawn = draw_probs(np.column_stack([16 - hits, hits]), rng)[:, 1]
    assert drawn.mean() == pytest.approx(0.3, abs=0.01)
    assert drawn.var() == pytest.approx(0.07, abs=0.003)
    assert np.corrcoef(drawn, probs)[0, 1] > 0.8
    alike = draw_probs(np.tile([12, 4], (10, 1)), rng)
    assert alike[:, 1] == pytest.approx(np.full(10, 0.25), abs=0.01)


def rollouts_of(matches) -> pd.DataFrame:
    """From (N, G, K) matches."""
    prompt, rollout, level = np.indices(np.shape(matches)).reshape(3, -1)
    return pd.DataFrame({"prompt": prompt, "rollout": rollout, "level": level + 1, "match": np.ravel(matches)})


def test_outcomes_are_counted():
    """Of prompt 0 right in (1, 0) and (1, 1), outcomes 2 and 3; of prompt 1 twice (0, 1), outcome 1."""
    table = rollouts_of([[[1, 0], [1, 1]], [[0, 1], [0, 1]]])
    assert count_outcomes(table).tolist() == [[0, 0, 1, 1], [0, 2, 0, 0]]
    assert count_outcomes(table.sample(frac=1, random_state=0)).tolist() == [[0, 0, 1, 1], [0, 2, 0, 0]]
    with pytest.raises(InputError, match="same completions"):
        count_outcomes(table.iloc[:-1])


def test_predictions_of_a_start():
    rng = np.random.default_rng(3)
    table = rollouts_of((rng.random((24, 16, 3)) < [0.3, 0.5, 0.7]).astype(int))
    found = predict(table, ["sapo", "grpo", "sapo_outcome_reward", "process_grpo"], 32, draws=1)
    assert len(found) == 4 * 2 * 2 * 2
    assert (found["worth"] > 0).all()
    pd.testing.assert_frame_equal(found, predict(table, found["objective"].unique(), 32, draws=1))
    wide = found.pivot(index=["steps", "parameters", "goal"], columns="objective", values="worth")
    # with one token a step, the outcome repeated at every step is GRPO
    np.testing.assert_allclose(wide["grpo"], wide["sapo_outcome_reward"], rtol=1e-9)
    assert num_groups(OBJECTIVES["process_grpo"], 3, 16) > MOST_GROUPS  # whose moments were sampled
    nothing = predict(rollouts_of(np.zeros((4, 4, 2), int)), ["sapo", "grpo"], 32)
    assert (nothing["worth"] == 0).all()


def test_bad_input():
    joint = random_joint(2, 2)
    for wrong, word in (
        (lambda: group_moments("rlvr", joint, 4), "no closed form"),
        (lambda: group_moments("rank_reward", joint, 4), "no closed form"),
        (lambda: group_moments("nobody", joint, 4), "known are"),
        (lambda: group_moments("sapo", joint, 1), "group_size"),
        (lambda: group_moments("sapo", joint[:, :3], 4), "outcomes"),
        (lambda: group_moments("process_grpo", random_joint(1, 4), 16), "kinds of groups"),
        (lambda: goal_gradient(joint, "ndcg"), "goal"),
        (lambda: sample_joint(np.ones((1, 4), int), "some", np.random.default_rng(0)), "steps"),
        (lambda: step_worth(group_moments("sapo", joint, 4), goal_gradient(joint), 0), "prompts"),
        (lambda: step_worth(group_moments("sapo", joint, 4), goal_gradient(joint), 1, "all"), "parameters"),
    ):
        with pytest.raises(InputError, match=word):
            wrong()

"""The reasoning world: its states by hand, its distribution by brute force, its optimum, its traces, its knobs."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sapo.data.interactions import Rows
from sapo.data.reasoning import WORDS, ReasoningConfig, ReasoningWorld
from sapo.errors import InputError
from sapo.evaluation.evaluate import ranking_metrics

SMALL = ReasoningConfig(levels=2, codes=3, window=2, num_users=40, lengths=(5, 6), predictability=0.7)
CONFIGS = [
    SMALL,
    ReasoningConfig(levels=2, codes=3, window=2, num_users=40, lengths=(5, 6), coupled=True, seed=1),
    ReasoningConfig(levels=3, codes=2, window=3, num_users=40, lengths=(6, 6), item_share=0.5, coupled=True),
    ReasoningConfig(levels=3, codes=3, window=1, num_users=40, lengths=(4, 5), item_share=0.3, predictability=1.0),
]


def rows_of(*histories) -> Rows:
    """Rows of these histories; targets do not count."""
    return Rows(["u"] * len(histories), [list(history) for history in histories], [0] * len(histories))


def windows(world: ReasoningWorld) -> list[list[int]]:
    """Every window there is."""
    return [list(items) for items in itertools.product(range(len(world.codes)), repeat=world.config.window)]


def brute_force(world: ReasoningWorld, history) -> np.ndarray:
    """P(next item) by walking: one automaton after the other, then one level after the other."""
    config, codes = world.config, world.codes
    finals: list[int] = []
    for level in range(config.levels):
        state = finals[-1] if config.coupled and level else 0
        for item in history[-config.window :]:
            state = int(world.automata[level][codes[item][level]][state])
        finals.append(state)
    probabilities = []
    for sid in codes.tolist():
        chance = 1.0
        for level, code in enumerate(sid):
            children = {other[level] for other in codes.tolist() if other[:level] == sid[:level]}
            any_child = 1 / len(children)
            followed = config.predictability * (code == finals[level]) + (1 - config.predictability) * any_child
            chance *= followed if finals[level] in children else any_child
        probabilities.append(chance)
    return np.array(probabilities)


def items_with_the_sids_of(world: ReasoningWorld, items: list[int], other: ReasoningWorld) -> list[int]:
    number = {tuple(sid): place for place, sid in enumerate(other.codes.tolist())}
    return [number[tuple(world.codes[item].tolist())] for item in items]


# ------------------------------------------------------------------------------------------------- the distribution


def test_two_states_by_hand():
    """Two levels of two codes, two items read. On both levels code 0 keeps the state and code 1 swaps it.

    After the items (1, 0), (1, 1) automaton 1 went from 0 to 1, then 0; automaton 2 stayed at 0, then went to 1. So
    each code of (0, 1) comes with .6 + .4 / 2 = .8, the other one with .2. Who reads the last item alone does not know
    where the first one led: to 0 or 1 alike.
    """
    world = ReasoningWorld(ReasoningConfig(2, 2, window=2, predictability=0.6, num_users=3, lengths=(5, 5)))
    world.automata = np.array([[[0, 1], [1, 0]]] * 2)  # (level, code, state)
    item = {tuple(sid): number for number, sid in enumerate(world.codes.tolist())}
    history = [item[1, 0], item[1, 1]]
    assert world.states([history]).tolist() == [[[1, 0], [0, 1]]]
    order = [item[0, 1], item[0, 0], item[1, 1], item[1, 0]]
    assert world.next_item_probabilities([history])[0, order] == pytest.approx([0.64, 0.16, 0.16, 0.04])
    assert world.next_item_probabilities([history], reads=1)[0] == pytest.approx([0.25] * 4)
    (first, second), words = world.words[0], world.words[1]
    assert world.traces.of_row(history, 0) == [f"{second} {first}", f"{words[0]} {words[1]}"]
    assert world.optimum(rows_of(history), ks=(1, 3)) == pytest.approx(
        {
            "recall@1": 0.64,
            "ndcg@1": 0.64,
            "recall@3": 0.96,
            "ndcg@3": 0.64 + 0.16 / math.log2(3) + 0.16 / 2,
            "exact_match_greedy": 0.64,
            "exact_match_sampled": 0.64**2 + 2 * 0.16**2 + 0.04**2,
            "match_level_1": 0.8,
            "match_level_2": 0.8,
        }
    )
    # coupled, automaton 2 starts where automaton 1 ended, in state 0 here; after (1, 0), (0, 1) in state 1
    coupled = ReasoningWorld(replace(world.config, coupled=True))
    coupled.automata, other = world.automata, [item[1, 0], item[0, 1]]
    for items, states in ((history, [[1, 0], [0, 1]]), (other, [[1, 1], [1, 0]])):
        assert coupled.states([items_with_the_sids_of(world, items, coupled)]).tolist() == [states]


@pytest.mark.parametrize("config", CONFIGS)
def test_distribution_is_that_of_walking_through_the_automata(config):
    world = ReasoningWorld(config)
    histories = world.interactions.leave_one_out().test.history[:20]
    expected = np.stack([brute_force(world, history) for history in histories])
    found = world.next_item_probabilities(histories)
    assert found.dtype == np.float64
    assert found == pytest.approx(expected, abs=1e-12)
    assert np.abs(found.sum(1) - 1).max() < 1e-12


@pytest.mark.parametrize("config", CONFIGS)
def test_what_fewer_items_tell_is_the_mean_over_those_before(config):
    """By the law of total probability, over all windows that end alike; codes of items are uniform where all are."""
    if config.item_share < 1:
        pytest.skip("the codes of a uniform item are not uniform where some SIDs are no items")
    world = ReasoningWorld(config)
    everything = windows(world)
    whole = world.next_item_probabilities(everything)
    for reads in range(config.window + 1):
        known = world.next_item_probabilities(everything, reads)
        ends = [tuple(window[config.window - reads :]) for window in everything]
        for end in set(ends):
            alike = [row for row, other in enumerate(ends) if other == end]
            assert known[alike] == pytest.approx(np.broadcast_to(whole[alike].mean(0), known[alike].shape), abs=1e-12)


def test_drawn_items_follow_the_distribution():
    config = ReasoningConfig(levels=2, codes=2, window=2, num_users=6000, lengths=(5, 5), predictability=0.6, seed=2)
    world = ReasoningWorld(config)
    items = np.array(world.interactions.items)
    assert stats.chisquare(np.bincount(items[:, :2].ravel(), minlength=4)).pvalue > 1e-3
    values = []
    for window in windows(world):
        follows = np.concatenate(
            [items[(items[:, at : at + 2] == window).all(1), at + 2] for at in range(3)]
        )  # nothing but the last two items counts, wherever they stand
        probabilities = world.next_item_probabilities([window])[0]
        values.append(stats.chisquare(np.bincount(follows, minlength=4), len(follows) * probabilities).pvalue)
    assert min(values) > 1e-3 / len(values)
    assert np.median(values) > 0.1


# ------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("config", CONFIGS)
def test_a_policy_that_knows_the_states_reaches_the_optimum(config):
    """Ranking by the brute force's probabilities, in expectation over every possible target."""
    world = ReasoningWorld(config)
    histories = world.interactions.leave_one_out().test.history[:15]
    probabilities = torch.tensor(np.stack([brute_force(world, history) for history in histories]))
    items = len(world.codes)
    ranked = probabilities.argsort(dim=1, descending=True, stable=True).repeat_interleave(items, 0)
    targets = torch.arange(items).repeat(len(histories))
    weights = probabilities.flatten() / len(histories)
    optimum = world.optimum(rows_of(*histories), ks=(1, 2))
    for name, values in ranking_metrics(ranked, targets, (1, 2), per_user=True).items():
        assert optimum[name] == pytest.approx(float(values @ weights))
    drawn = (probabilities**2).sum(1).mean()
    assert optimum["exact_match_sampled"] == pytest.approx(float(drawn))


def test_the_optimum_is_the_best_of_all_rankings():
    config = ReasoningConfig(levels=2, codes=2, window=2, num_users=5, lengths=(5, 5), predictability=0.5, seed=3)
    world = ReasoningWorld(config)
    rankings = np.array(list(itertools.permutations(range(4))))
    discounts = 1 / np.log2(np.arange(2, 6))
    for window in windows(world):
        gains = brute_force(world, window)[rankings]
        optimum = world.optimum(rows_of(window), ks=(1, 3))
        for k in (1, 3):
            assert optimum[f"ndcg@{k}"] == pytest.approx((gains * discounts)[:, :k].sum(1).max())


@pytest.mark.parametrize("config", [SMALL, CONFIGS[1]])
def test_nobody_who_leaves_an_item_out_scores_above_the_bound(config):
    """Over all windows, each as likely: of all that rank by the last items alone, the bound is the best."""
    world = ReasoningWorld(config)
    everything = windows(world)
    whole = world.next_item_probabilities(everything)
    rng = np.random.default_rng(0)
    for reads in range(config.window):
        bound = world.optimum(rows_of(*everything), ks=(1, 3), reads=reads)
        ends = [tuple(window[config.window - reads :]) for window in everything]
        number = {end: place for place, end in enumerate(sorted(set(ends)))}
        for _ in range(50):  # somebody names an item for each end of a window
            named = rng.integers(len(world.codes), size=len(number))[[number[end] for end in ends]]
            assert whole[np.arange(len(whole)), named].mean() <= bound["recall@1"] + 1e-12
        if reads:
            assert bound["ndcg@3"] >= world.optimum(rows_of(*everything), ks=(3,), reads=reads - 1)["ndcg@3"] - 1e-12
    assert bound["ndcg@3"] < world.optimum(rows_of(*everything), ks=(3,))["ndcg@3"]


def test_drawn_targets_agree_with_the_optimum():
    world = ReasoningWorld(ReasoningConfig(levels=2, codes=4, num_users=5000))
    rows = world.split.test
    ranked = torch.from_numpy(world.next_item_probabilities(rows.history)).topk(10).indices
    optimum = world.optimum(rows, (1, 10))
    for name, value in ranking_metrics(ranked, torch.tensor(rows.target), (1, 10)).items():
        assert abs(value - optimum[name]) < 4 * 0.5 / math.sqrt(len(rows))  # four standard errors at most


# ------------------------------------------------------------------------------------------------- traces


@given(seed=st.integers(0, 50), coupled=st.booleans(), error=st.sampled_from([0.0, 0.4]))
def test_traces_are_functions_of_the_history_alone(seed, coupled, error):
    world = ReasoningWorld(
        ReasoningConfig(levels=2, codes=4, num_users=3, seed=seed, coupled=coupled, teacher_error=error)
    )
    history = world.interactions.items[0][-4:]
    blocks = world.traces.of_row(history, 0)
    assert blocks == world.traces.of_row(history, 7)  # whatever came next
    assert blocks == world.traces.of_row([5, *history], 0)  # and whatever was before the window
    assert [len(block.split()) for block in blocks] == [3, 3]
    for words, block in zip(world.words, blocks, strict=True):
        assert set(block.split()) <= set(words)


def test_the_last_words_of_a_thought_are_the_title_of_the_likeliest_item():
    world = ReasoningWorld(ReasoningConfig(coupled=True, num_users=20))
    for history in world.split.test.history:
        thought = " ".join(block.split()[-1] for block in world.traces.of_row(history, 0))
        assert thought == world.catalog.titles[int(world.next_item_probabilities([history])[0].argmax())]


def test_a_teacher_errs_as_often_as_told():
    """A wrong word is drawn from all 8, and so is right by luck once in 8: .4 x 7/8 of the words differ."""
    truthful, erring = (ReasoningWorld(ReasoningConfig(num_users=400, teacher_error=error)) for error in (0.0, 0.4))
    words = [
        [" ".join(world.traces.of_row(history, 0)).split() for history in truthful.split.test.history]
        for world in (truthful, erring)
    ]
    differ = np.array(words[0]) != np.array(words[1])  # (400, 9)
    assert abs(differ.mean() - 0.35) < 4 * 0.5 / math.sqrt(differ.size)


def test_the_teacher_explains_the_share_of_rows_that_is_asked_for():
    world = ReasoningWorld(ReasoningConfig(num_users=200, traced_share=0.25))
    train = world.split.train
    rows = world.traces.rows(train)
    assert len(rows) == round(0.25 * len(train))
    everything = set(zip(train.user, map(tuple, train.history), strict=True))
    assert set(zip(rows.user, map(tuple, rows.history), strict=True)) < everything
    assert world.traces.rows(train).history == rows.history


# ------------------------------------------------------------------------------------------------- rows and knobs


def test_training_rows_fill_the_window():
    world = ReasoningWorld(ReasoningConfig(num_users=50))
    unfiltered = world.interactions.leave_one_out()
    assert min(map(len, world.split.train.history)) == 3
    assert len(world.split.train) == sum(len(history) >= 3 for history in unfiltered.train.history)
    assert world.split.test == unfiltered.test
    assert world.split.data_hash != unfiltered.data_hash


@pytest.mark.parametrize("config", CONFIGS)
def test_items_are_the_share_of_sids_that_is_asked_for(config):
    world = ReasoningWorld(config)
    codes = world.codes
    assert len(codes) == round(config.item_share * config.codes**config.levels)
    assert len(np.unique(codes, axis=0)) == len(codes)
    assert set(codes[:, 0]) == set(range(config.codes))
    assert all(len(words) == len(set(words)) for words in world.words)
    assert len(set(world.catalog.titles)) == len(codes)


def test_words_say_of_what_automaton_a_state_is():
    lists = [line.split() for line in WORDS]
    assert len({word for words in lists for word in words}) == sum(map(len, lists)) == 4 * 16


def test_the_same_seed_gives_the_same_world():
    one, same, other = (ReasoningWorld(ReasoningConfig(num_users=30, seed=seed)) for seed in (4, 4, 5))
    assert one.split.data_hash == same.split.data_hash != other.split.data_hash
    assert one.catalog.content_hash == same.catalog.content_hash
    assert (one.automata == same.automata).all()


def test_the_name_says_which_knobs_are_turned():
    assert ReasoningConfig().name == "reasoning"
    assert ReasoningConfig(coupled=True, item_share=0.25).name == "reasoning-item_share0.25-coupled"
    assert ReasoningConfig(window=4, lengths=(7, 9)).name == "reasoning-window4-lengths7-9"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"window": 4}, r"lengths is \(6, 9\) and window 4; the shortest sequence needs 7 items"),
        ({"predictability": 0.0}, "at 0 there is nothing to predict"),
        ({"codes": 17}, "a level has 2 to 16 codes, as there are words for states"),
        ({"levels": 5}, "at least 2, and there are words for 4"),
        ({"levels": 4, "codes": 16}, r"makes 65,536 SIDs; at most 10,000 fit"),
        ({"item_share": 0.01}, "at least an item for each of 8 codes"),
        ({"traced_share": 0.0}, "there would be none"),
        ({"teacher_error": 1.5}, "a share from 0 to 1"),
        ({"window": 0}, "at least 1"),
        ({"num_users": 0}, "at least 1 fits"),
    ],
)
def test_knobs_that_make_no_world_are_refused(knobs, message):
    with pytest.raises(InputError, match=message):
        ReasoningConfig(**knobs)


def test_short_histories_and_impossible_readers_are_refused():
    world = ReasoningWorld(SMALL)
    with pytest.raises(InputError, match="history 1 has 1 items; the next item depends on the last 2"):
        world.states([[0, 1], [2]])
    with pytest.raises(InputError, match="reads is 3"):
        world.next_item_probabilities([[0, 1]], reads=3)

"""The synthetic world: its distribution against hand-made numbers and drawn items, its optimum against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from sapo.data.interactions import Rows
from sapo.data.synthetic import SyntheticCatalogue, SyntheticConfig
from sapo.errors import InputError
from sapo.evaluation.evaluate import ranking_metrics

SMALL = SyntheticConfig(branching=(3, 2, 2), num_items=9, num_users=50, predictability=(0.6, 0.4, 0.7))


def rows_of(*last: int) -> Rows:
    """Histories that end in the given items; targets do not count."""
    return Rows(["u"] * len(last), [[0, item] for item in last], [0] * len(last))


# ------------------------------------------------------------------------------------------------- the distribution


def test_two_items_by_hand():
    """One item under each of two level-1 codes, so level 2 is certain. Popularity 1 : 1/2, that is 2/3 and 1/3.

    Level 1 follows its rule, a permutation, with 0.6. So one last item has
        P(a) = 0.6 + 0.4 x 2/3 = 13/15, P(b) = 0.4 x 1/3 = 2/15, and the other one
        P(a) = 0.4 x 2/3 = 4/15,        P(b) = 0.6 + 0.4 x 1/3 = 11/15.
    """
    world = SyntheticCatalogue(
        SyntheticConfig(branching=(2, 1), num_items=2, num_users=3, predictability=(0.6, 0.3), skew=1.0)
    )
    transitions = world.next_item_probabilities([[0], [1]])
    assert np.allclose(np.sort(transitions.ravel()) * 15, [2, 4, 11, 13])
    first = int(transitions.max(1).argmax())  # the item after which a = the popular one comes with 13/15
    assert np.allclose(np.sort(transitions[first]) * 15, [2, 13])

    # one history of the first kind, three of the other
    optimum = world.optimum(rows_of(first, 1 - first, 1 - first, 1 - first), ks=(1, 2))
    greedy = (13 + 3 * 11) / 60
    assert optimum == pytest.approx(
        {
            "recall@1": greedy,
            "ndcg@1": greedy,
            "recall@2": 1.0,
            "ndcg@2": greedy + (1 - greedy) / math.log2(3),
            "exact_match_greedy": greedy,
            "exact_match_sampled": ((13**2 + 2**2) + 3 * (11**2 + 4**2)) / (4 * 15**2),
            "match_level_1": greedy,
            "match_level_2": 1.0,  # both items have code 0 there
        }
    )


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SyntheticConfig(),
        SyntheticConfig(branching=(4, 4, 4, 4, 4), num_items=60, num_users=20, predictability=(0.9, 0, 1, 0.3, 0.5)),
    ],
)
def test_probabilities_sum_to_one(config):
    world = SyntheticCatalogue(config)
    probabilities = world.next_item_probabilities([[item] for item in range(config.num_items)])
    assert probabilities.shape == (config.num_items, config.num_items)
    assert probabilities.dtype == np.float64
    assert (probabilities >= 0).all()
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-12
    assert world.popularity.sum() == pytest.approx(1, abs=1e-12)


def test_only_the_last_item_counts():
    world = SyntheticCatalogue(SMALL)
    one, other = world.next_item_probabilities([[1, 2, 3], [8, 3]])
    assert (one == other).all()
    assert not np.allclose(one, world.next_item_probabilities([[3, 2, 1]])[0])
    with pytest.raises(InputError, match="a history is empty"):
        world.next_item_probabilities([[1], []])


def test_every_level_is_a_mixture_of_its_rule_and_popularity():
    """Where the rule of a level moves from one child to another, exactly p_k moves with it and nothing else changes."""
    config = SyntheticConfig(branching=(4, 3, 3), num_items=30, num_users=1, predictability=(0.6, 0.4, 0.7))
    world = SyntheticCatalogue(config)
    codes = world.catalog.sids.numpy()
    transitions = world.next_item_probabilities([[item] for item in range(30)])
    for level, p in enumerate(config.predictability):
        moved = 0
        for prefix in np.unique(codes[:, :level], axis=0):
            under = (codes[:, :level] == prefix).all(1)
            chance = np.stack(
                [transitions[:, under & (codes[:, level] == code)].sum(1) for code in np.unique(codes[under, level])], 1
            )
            chance /= transitions[:, under].sum(1, keepdims=True)  # of each child, given the last item and the prefix
            for one, other in itertools.combinations(range(30), 2):
                change = np.sort(chance[one] - chance[other])
                if np.abs(change).max() < 1e-9:
                    continue
                assert codes[one, level] != codes[other, level]
                assert np.allclose(change, [-p, *[0] * (len(change) - 2), p])
                moved += 1
        assert moved
    first = np.stack([transitions[:, codes[:, 0] == code].sum(1) for code in range(4)], 1)
    favourite = {code: int((first - first.min(0))[codes[:, 0] == code][0].argmax()) for code in range(4)}
    assert sorted(favourite.values()) == [0, 1, 2, 3]  # the rule of level 1 is a permutation


def test_drawn_items_follow_the_distribution():
    config = SyntheticConfig(
        branching=(3, 2), num_items=6, num_users=4000, lengths=(8, 8), predictability=(0.5, 0.4), seed=3
    )
    world = SyntheticCatalogue(config)
    items = np.array(world.interactions.items)
    transitions = world.next_item_probabilities([[item] for item in range(6)])

    def p_value(drawn, probabilities):
        return stats.chisquare(np.bincount(drawn, minlength=6), len(drawn) * probabilities).pvalue

    assert p_value(items[:, 0], world.popularity) > 1e-3
    values = []
    for last in range(6):
        follows = items[:, 2:][items[:, 1:-1] == last]
        values.append(p_value(follows, transitions[last]))
        assert p_value(follows, transitions[(last + 1) % 6]) < 1e-12  # the test would see another distribution
        for before in range(6):  # what came before the last item changes nothing
            both = (items[:, 1:-1] == last) & (items[:, :-2] == before)
            values.append(p_value(items[:, 2:][both], transitions[last]))
    assert min(values) > 1e-3 / len(values)
    assert np.median(values) > 0.2


# ------------------------------------------------------------------------------------------------- the optimum


def test_optimum_is_the_best_of_all_rankings():
    """All 720 rankings of six items, for every last item."""
    world = SyntheticCatalogue(
        SyntheticConfig(branching=(3, 2), num_items=6, num_users=5, predictability=(0.5, 0.4), seed=1)
    )
    rankings = np.array(list(itertools.permutations(range(6))))
    discounts = 1 / np.log2(np.arange(2, 8))
    for last in range(6):
        gains = world.next_item_probabilities([[last]])[0][rankings]  # (720, 6)
        optimum = world.optimum(rows_of(last), ks=(1, 3, 6))
        for k in (1, 3, 6):
            assert optimum[f"recall@{k}"] == pytest.approx(gains[:, :k].sum(1).max())
            assert optimum[f"ndcg@{k}"] == pytest.approx((gains * discounts)[:, :k].sum(1).max())


def test_optimum_is_the_expectation_over_targets():
    """Evaluation's own metrics of the Bayes ranking, one row for every history and possible target, weighted by P."""
    world = SyntheticCatalogue(SMALL)
    last = [4, 0, 4, 7]
    probabilities = torch.from_numpy(world.next_item_probabilities([[item] for item in last]))
    ranked = probabilities.argsort(dim=1, descending=True).repeat_interleave(9, 0)
    targets = torch.arange(9).repeat(len(last))
    weights = probabilities.flatten() / len(last)
    optimum = world.optimum(rows_of(*last), ks=(1, 5))
    for name, values in ranking_metrics(ranked, targets, (1, 5), per_user=True).items():
        assert optimum[name] == pytest.approx(float(values @ weights))
    match = (world.catalog.sids[ranked[:, 0]] == world.catalog.sids[targets]).double()
    assert [optimum[f"match_level_{level}"] for level in (1, 2, 3)] == pytest.approx((weights @ match).tolist())
    assert optimum["exact_match_greedy"] == optimum["recall@1"]
    drawn = (probabilities**2).sum(1).mean()  # a guess and a target drawn alike agree with probability sum p^2
    assert optimum["exact_match_sampled"] == pytest.approx(float(drawn))


def test_drawn_targets_agree_with_the_optimum():
    world = SyntheticCatalogue(SyntheticConfig(num_users=6000))
    rows = world.interactions.leave_one_out().test
    probabilities = torch.from_numpy(world.next_item_probabilities(rows.history))
    ranked = probabilities.topk(10).indices
    measured = ranking_metrics(ranked, torch.tensor(rows.target), (1, 10))
    optimum = world.optimum(rows, (1, 10))
    for name, value in measured.items():
        assert abs(value - optimum[name]) < 4 * 0.5 / math.sqrt(len(rows))  # four standard errors at most


# ------------------------------------------------------------------------------------------------- knobs


def test_the_default_world_is_neither_trivial_nor_hopeless():
    world = SyntheticCatalogue()
    optimum = world.optimum(world.interactions.leave_one_out().test)
    assert 0.6 < optimum["recall@10"] < 0.85
    assert 0.15 < optimum["exact_match_greedy"] < 0.6


def test_same_seed_same_bytes():
    one, two = SyntheticCatalogue(SMALL), SyntheticCatalogue(SMALL)
    other = SyntheticCatalogue(SyntheticConfig(**{**vars(SMALL), "seed": 1}))
    assert one.catalog.content_hash == two.catalog.content_hash != other.catalog.content_hash
    assert one.interactions.content_hash == two.interactions.content_hash != other.interactions.content_hash
    histories = [[item] for item in range(9)]
    assert one.next_item_probabilities(histories).tobytes() == two.next_item_probabilities(histories).tobytes()


def test_full_predictability_leaves_nothing_to_chance():
    world = SyntheticCatalogue(SyntheticConfig(predictability=(1, 1, 1), num_users=50))
    optimum = world.optimum(world.interactions.leave_one_out().test, ks=(1,))
    assert all(value == pytest.approx(1) for value in optimum.values())
    for items in world.interactions.items:
        assert world.next_item_probabilities([[item] for item in items[:-1]]).argmax(1).tolist() == items[1:]


def test_no_predictability_makes_the_history_useless():
    world = SyntheticCatalogue(SyntheticConfig(predictability=(0, 0, 0), num_users=1))
    probabilities = world.next_item_probabilities([[item] for item in range(world.catalog.num_items)])
    assert np.allclose(probabilities, world.popularity)


def test_no_skew_makes_a_full_tree_uniform():
    config = SyntheticConfig(branching=(3, 4), num_items=12, num_users=1, predictability=(0, 0), skew=0)
    assert np.allclose(SyntheticCatalogue(config).popularity, 1 / 12)


def test_predictability_is_per_level():
    def optimum(*predictability):
        world = SyntheticCatalogue(SyntheticConfig(num_users=100, predictability=predictability))
        return world.optimum(rows_of(*range(world.catalog.num_items)))

    base, second = optimum(0.5, 0.3, 0.3), optimum(0.5, 0.8, 0.3)
    assert second["match_level_1"] == pytest.approx(base["match_level_1"], abs=0.05)
    assert second["match_level_2"] > base["match_level_2"] + 0.15
    assert optimum(0.9, 0.3, 0.3)["match_level_1"] > base["match_level_1"] + 0.2


@pytest.mark.parametrize(
    ("branching", "num_items"), [((5, 7), 12), ((8, 8, 8), 8), ((4, 4, 4, 4), 256), ((3, 2, 2, 2, 2), 20)]
)
def test_the_catalogue(branching, num_items):
    levels = len(branching)
    config = SyntheticConfig(
        branching=branching, num_items=num_items, num_users=40, lengths=(3, 6), predictability=(0.5,) * levels
    )
    world = SyntheticCatalogue(config)
    catalog, interactions = world.catalog, world.interactions
    assert (catalog.num_items, catalog.num_levels, catalog.name) == (num_items, levels, "synthetic")
    assert catalog.collision_rate == 0
    assert catalog.codes_in_use[0] == branching[0]
    assert all(size <= limit for size, limit in zip(catalog.level_sizes, branching, strict=True))
    assert interactions.num_items == num_items
    assert len(interactions.items) == 40
    assert {len(items) for items in interactions.items} == {3, 4, 5, 6}


def test_item_numbers_say_nothing_of_the_tree():
    codes = SyntheticCatalogue(SyntheticConfig(num_users=1)).catalog.sids[:, 0]
    # neighbours in number share a level-1 code about 1/8 of the time; in the order of the tree it would be 292 of 299
    assert (codes[1:] == codes[:-1]).double().mean() < 0.2
    assert codes[:8].tolist() != list(range(8))  # the one leaf that every level-1 code is sure of


def test_words_narrow_an_item_down():
    """Every level-1 code has a word; below, codes 2c and 2c + 1 share one. The last word means nothing."""
    catalog = SyntheticCatalogue(SyntheticConfig(num_users=1)).catalog
    titles = [title.split() for title in catalog.titles]
    filler = [title[-1] for title in titles]
    assert len(set(filler)) == 240
    for level, codes in enumerate(catalog.sids.T.tolist()):
        kinds = codes if level == 0 else [code // 2 for code in codes]
        pairs = {(title[2 - level], kind) for title, kind in zip(titles, kinds, strict=True)}  # last level first
        assert len(pairs) == len({word for word, _ in pairs}) == len(set(kinds)) == (8 if level == 0 else 4)
    assert catalog.categories == [title[2] for title in titles]
    assert len({word for title in titles for word in title}) == 8 + 4 + 4 + 240
    assert all(word.isalpha() and word.islower() and 4 <= len(word) <= 6 for title in titles for word in title)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"branching": (8,)}, "branching is"),
        ({"branching": (2,) * 6, "predictability": (0.5,) * 6}, "branching is"),
        ({"branching": (8, 0, 8)}, "branching is"),
        ({"branching": (256,) * 4, "predictability": (0.5,) * 4}, "at most 10 million leaves"),
        ({"num_items": 7}, r"num_items is 7; .* 8 .* to 512"),
        ({"num_items": 513}, "num_items is 513"),
        ({"predictability": (0.5, 0.5)}, "give 3 probabilities"),
        ({"predictability": (0.5, 0.5, 1.1)}, "give 3 probabilities"),
        ({"lengths": (2, 5)}, "at least 3"),
        ({"lengths": (6, 5)}, "lengths is"),
        ({"num_users": 0}, "num_users is 0"),
    ],
)
def test_knobs_that_do_not_fit(knobs, message):
    with pytest.raises(InputError, match=message):
        SyntheticConfig(**knobs)

"""Ranks of the same test rows: metrics and gains that follow from them."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo.analysis.ranks import Ranks, add_ranks, merge_ranks
from sapo.analysis.statistics import paired_difference
from sapo.errors import InputError


def run(method, seed, ranks, users=None, split="published_test"):
    """What `add_ranks` takes of one run."""
    names = users or [f"u{row}" for row in range(len(ranks))]
    row = {"dataset": "shop", "split": split, "preset": "p", "method": method, "seed": seed}
    return pd.DataFrame({"user": names, "rank": ranks}), row


def key(method, split="published_test"):
    return ("shop", split, "p", method)


def test_values_by_hand(tmp_path):
    add_ranks([run("a", 0, [1, 0, 3, 10]), run("a", 1, [0, 0, 1, 0]), run("none", 0, [0, 0, 0, 0])], tmp_path)
    ranks = Ranks(tmp_path)
    assert ranks.values(key("a"), "recall@10").tolist() == [0.5, 0, 1, 0.5]
    assert ranks.values(key("a"), "recall@5").tolist() == [0.5, 0, 1, 0]
    # at rank 3 a hit gains 1 / log2 4
    expected = [0.5, 0, (0.5 + 1) / 2, 0.5 / math.log2(11)]
    assert ranks.values(key("a"), "ndcg@10").tolist() == pytest.approx(expected)
    assert ranks.values(key("none"), "ndcg@10").tolist() == [0] * 4  # a run without a hit was one all the same
    assert key("a") in ranks
    assert key("b") not in ranks


@given(st.lists(st.integers(0, 10), min_size=1, max_size=20))
def test_ranks_come_back(tmp_path_factory, given_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    add_ranks([run("a", 0, given_ranks)], folder)
    for k in (1, 5, 10):
        assert Ranks(folder).values(key("a"), f"recall@{k}").tolist() == [0 < rank <= k for rank in given_ranks]


def test_gains_are_over_users_with_all_their_rows(tmp_path):
    users = ["ann", "bob", "ann", "cy", "bob", "ann"]
    one, other = [1, 0, 1, 0, 2, 1], [0, 0, 1, 1, 0, 0]
    add_ranks([run("a", 0, one, users), run("b", 0, other, users)], tmp_path)
    gain = Ranks(tmp_path).gain(key("a"), key("b"), "recall@10")
    assert gain == paired_difference([np.sign(one) - np.sign(other)], users)
    assert gain.value == pytest.approx((4 - 2) / 6)
    assert (gain.users, gain.seeds) == (3, 1)


def test_gains_are_over_the_seeds_that_both_have(tmp_path):
    """Seed by seed: a is first on rows 0 and 1, then on row 1; b on row 2, then never; c has neither of its seeds."""
    of_a, of_b = [[1, 1, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 0]]
    runs = [run("a", seed, ranks) for seed, ranks in enumerate(of_a)] + [run("a", 7, [1, 1, 1])]
    runs += [run("b", seed, ranks) for seed, ranks in enumerate(of_b)] + [run("c", 5, [1, 0, 0])]
    add_ranks(runs, tmp_path)
    ranks = Ranks(tmp_path)
    gain = ranks.gain(key("a"), key("b"), "recall@1")
    assert gain == paired_difference([[1, 1, -1], [0, 1, 0]])
    assert (gain.users, gain.seeds) == (3, 2)
    assert ranks.by_seed(key("a"), "recall@1").loc[7].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="p, a and shop, published_test, p, c share no seed"):
        ranks.gain(key("a"), key("c"), "recall@1")


def test_what_has_no_seeds_is_the_same_for_all_of_the_others(tmp_path):
    add_ranks([run("a", 1, [1, 1, 0]), run("a", 2, [0, 1, 0]), run("cooccurrence", 0, [0, 1, 1])], tmp_path)
    ranks = Ranks(tmp_path)
    gain = ranks.gain(key("a"), key("cooccurrence"), "recall@1")
    assert gain == paired_difference([[1, 0, -1], [0, 0, -1]])
    turned = ranks.gain(key("cooccurrence"), key("a"), "recall@1")
    assert (turned.value, turned.low, turned.high) == pytest.approx((-gain.value, -gain.high, -gain.low))


def test_like_beside_like(tmp_path):
    """A policy ranks SIDs, of which items share some; the other recommender ranks items.

    Row 0: the target's SID is first, and it is one of two items, at rank 1 or 2. Row 1: the SID is second, its three
    items are at ranks 9 to 11. Row 2: the SID is third, behind more than ten items. The other one names the item of row
    0 third, after another one of its SID, and of row 1 only an item of the same SID."""
    policy, row = run("policy", 0, [1, 2, 3])
    policy = policy.assign(**{"item/rank": [1, 9, 0], "item/sharers": [2, 3, 1]})
    fitted, fitted_row = run("fitted", 0, [3, 0, 0])
    fitted["sid/rank"] = [2, 5, 0]
    add_ranks([(policy, row), (fitted, fitted_row), run("old", 0, [0, 1, 0])], tmp_path)
    ranks = Ranks(tmp_path)
    assert ranks.values(key("policy"), "item/recall@10").tolist() == [1, pytest.approx(2 / 3), 0]
    assert ranks.values(key("policy"), "item/recall@1").tolist() == [0.5, 0, 0]
    expected = [(1 + 1 / math.log2(3)) / 2, (1 / math.log2(10) + 1 / math.log2(11)) / 3, 0]
    assert ranks.values(key("policy"), "item/ndcg@10").tolist() == pytest.approx(expected)
    for metric in ("recall@1", "ndcg@10"):
        plain, by_sid = (ranks.values(key("policy"), name) for name in (metric, f"sid/{metric}"))
        assert (plain == by_sid).all()
    assert ranks.values(key("fitted"), "item/ndcg@10") == pytest.approx([0.5, 0, 0])  # 1 / log2(3 + 1)
    assert ranks.values(key("fitted"), "sid/recall@5").tolist() == [1, 1, 0]
    assert ranks.gain(key("policy"), key("fitted"), "sid/recall@10").value == pytest.approx(1 / 3)
    assert ranks.gain(key("policy"), key("fitted"), "item/recall@10").value == pytest.approx(2 / 9)
    # of one rank alone nothing says what it counts, but rows of results do
    assert ranks.holds(key("old"), "recall@1")
    assert not ranks.holds(key("old"), "item/recall@1")
    with pytest.raises(InputError, match="no ranks by item of shop, published_test, p, old"):
        ranks.values(key("old"), "item/recall@1")
    results = pd.DataFrame([{**run("old", 0, [0])[1], "source": "measured", "metric": "ndcg@10", "value": 0.1}])
    ranks = Ranks(tmp_path, results)
    assert ranks.values(key("old"), "item/recall@1").tolist() == [0, 1, 0]
    assert not ranks.holds(key("old"), "sid/recall@1")
    assert not ranks.holds(key("none"), "recall@1")


def test_many_gains_are_those_of_each_pair(tmp_path):
    users = ["u", "v", "v", "w", "x", "x"]
    lists = {"a": [1, 0, 1, 0, 2, 1], "b": [0, 0, 1, 1, 0, 0], "c": [3, 3, 0, 0, 0, 1]}
    add_ranks([run(name, 0, ranks, users) for name, ranks in lists.items()], tmp_path)
    ranks = Ranks(tmp_path)
    asked = [(key("a"), key("b"), "recall@10"), (key("b"), key("c"), "ndcg@5"), (key("c"), key("a"), "recall@1")]
    for pair, gain in zip(asked, ranks.gains(asked), strict=True):
        assert gain == pytest.approx(ranks.gain(*pair))


def test_rows_of_a_method_are_replaced_and_of_others_kept(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    add_ranks([run("a", 0, [1, 1]), run("a", 1, [1, 1]), run("b", 0, [1, 0])], first)
    add_ranks([run("a", 0, [0, 1])], second)
    add_ranks([run("a", 0, [0, 0, 1], split="leave_one_out")], second)
    merge_ranks(second, first)
    ranks = Ranks(first)
    assert ranks.values(key("a"), "recall@1").tolist() == [0, 1]
    assert ranks.values(key("b"), "recall@1").tolist() == [1, 0]
    assert ranks.values(key("a", "leave_one_out"), "recall@1").tolist() == [0, 0, 1]
    before = (first / "ranks.csv.gz").read_bytes()
    merge_ranks(second, first)
    assert (first / "ranks.csv.gz").read_bytes() == before


def test_what_cannot_be_compared_says_so(tmp_path):
    with pytest.raises(InputError, match=r"holds no ranks\.csv\.gz"):
        Ranks(tmp_path)
    add_ranks([run("a", 0, [1, 1]), run("b", 0, [1, 0, 0])], tmp_path)
    ranks = Ranks(tmp_path)
    with pytest.raises(InputError, match="were not tested on the same rows"):
        ranks.gain(key("a"), key("b"), "recall@1")
    pairs = [(key(name), key(name), "recall@1") for name in ("a", "b")]
    with pytest.raises(InputError, match=r"p, a and shop, published_test, p, b were not tested on the same rows"):
        ranks.gains(pairs)
    with pytest.raises(InputError, match="no pair of methods to compare"):
        ranks.gains([])
    with pytest.raises(InputError, match="no ranks of shop, published_test, p, c"):
        ranks.values(key("c"), "recall@1")
    for metric in ("recall@11", "mrr", "ndcg@x", "full/ndcg@10"):
        with pytest.raises(InputError, match="does not follow from ranks up to 10"):
            ranks.values(key("a"), metric)

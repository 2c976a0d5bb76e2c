"""Ranks of the same test rows: metrics and gains that follow from them."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo.analysis.ranks import Ranks, add_ranks, merge_ranks
from sapo.analysis.statistics import paired_bootstrap
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
    assert gain == paired_bootstrap(np.sign(one), np.sign(other), users)
    assert gain.value == pytest.approx((4 - 2) / 6)


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
    for metric in ("recall@11", "mrr", "ndcg@x"):
        with pytest.raises(InputError, match="does not follow from ranks up to 10"):
            ranks.values(key("a"), metric)

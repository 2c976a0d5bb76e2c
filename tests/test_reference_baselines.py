"""Popularity and co-occurrence: rankings by hand, and an oracle in exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapo.baselines.cooccurrence import CoOccurrence
from sapo.baselines.knn import ItemKNN
from sapo.baselines.popularity import Popularity
from sapo.data.interactions import Interactions
from sapo.errors import InputError
from sapo.evaluation.evaluate import ranking_metrics

# From an item to those that follow it at distance 1, 2, 3, with weight 1, 1/2, 1/3:
#   0: 1 -> 1, 2 -> 1/2 + 1, 3 -> 1/3     1: 2 -> 1, 3 -> 1/2, 4 -> 1/3     2: 3 -> 1, 4 -> 1/2     3: 4 -> 1
# Popularity: 0 and 2 occur twice, 1, 3, 4 once, 5 never.
TRAIN = [[0, 1, 2, 3, 4], [0, 2]]


def oracle(sequences, num_items, history, order):
    """Items by score in exact fractions, then by their place in `order`."""
    scores = [Fraction(0)] * num_items
    for age, item in enumerate(reversed(history[-5:])):
        for sequence in sequences:
            for position, earlier in enumerate(sequence):
                for distance, later in enumerate(sequence[position + 1 : position + 4], start=1):
                    if earlier == item:
                        scores[later] += Fraction(4, 5) ** age * Fraction(1, distance)
    return sorted(range(num_items), key=lambda item: (-scores[item], order.index(item)))


# ------------------------------------------------------------------------------------------------- popularity


def test_popularity_by_hand():
    ranked = Popularity().fit([[2, 2, 1], [2, 1, 0], []], num_items=4).rank([[0], [3, 1]], 4)
    assert ranked.tolist() == [[2, 1, 0, 3]] * 2  # 3, 2, 1 and 0 times
    assert ranked.dtype == torch.long


def test_ties_are_random_and_the_seed_fixes_them():
    def order(seed):
        return Popularity(seed).fit([[0, 0, *range(50)]], 100).rank([[0]], 100)[0].tolist()

    assert order(0) == order(0) != order(1)
    for seed in (0, 1):
        assert order(seed)[0] == 0
        assert set(order(seed)[1:50]) == set(range(1, 50))
        assert set(order(seed)[50:]) == set(range(50, 100))
        assert order(seed)[1:50] != sorted(order(seed)[1:50])  # the number of an item must not decide


# ------------------------------------------------------------------------------------------------- co-occurrence


@pytest.mark.parametrize(
    ("history", "ranking"),
    [
        ([0], [2, 1, 3, 0]),  # 3/2, 1, 1/3; then the more popular of what has no score; 4 is 4 items away
        ([0, 1], [2, 1, 3, 4]),  # 1 + 0.8 x 3/2 = 2.2; 0.8; 1/2 + 0.8 / 3 = 0.77; 1/3
        ([1, 0], [2, 1, 3, 4]),  # 3/2 + 0.8 = 2.3; 1; 1/3 + 0.4 = 0.73; 0.8 / 3 = 0.27
        ([3, 0], [2, 1, 4, 3]),  # 3/2; 1; 0.8; 1/3
        ([3, 5, 5, 5, 5], [4]),  # the oldest of five still votes
        ([0, 1], [2, 1]),  # items of the history stay in
    ],
)
def test_cooccurrence_by_hand(history, ranking):
    assert CoOccurrence().fit(TRAIN, 6).rank([history], len(ranking)).tolist() == [ranking]


def test_without_votes_popularity_decides():
    popular = Popularity(seed=5).fit(TRAIN, 6).order.tolist()
    assert popular[-1] == 5
    histories = [[5], [4], [3, 5, 5, 5, 5, 5], []]  # never seen, never followed, too old, nothing
    assert CoOccurrence(seed=5).fit(TRAIN, 6).rank(histories, 6).tolist() == [popular] * 4


def test_equal_scores_are_ties_whatever_the_order_of_their_terms():
    """3 scores 1/2 + 1/2 + 1/3 + 1/3 + 1/3, 4 scores 1 + 1: both 2, and 4 is the more popular one."""
    train = [[0, 1, 3], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 4], [0, 4], *[[4]] * 9]
    ranked = CoOccurrence().fit(train, 5).rank([[0]], 5)[0].tolist()
    # 1: 1 + 3 = 4 and 2: 1 + 3/2 = 5/2 lead
    assert ranked[:4] == [1, 2, 4, 3]


def test_votes_of_different_ages_tie():
    """1 scores 5 x 0.8^4 by the oldest vote, 3 scores 4 x 0.8^3 by the next: both 2.048."""
    train = [*[[0, 1]] * 5, *[[2, 3]] * 4]
    assert CoOccurrence().fit(train, 5).rank([[0, 2, 4, 4, 4]], 2).tolist() == [[1, 3]]
    assert CoOccurrence().fit([*train, [3], [3]], 5).rank([[0, 2, 4, 4, 4]], 2).tolist() == [[3, 1]]


def test_pairs_end_at_the_end_of_a_sequence():
    # nothing follows 1, so 0 leads by popularity; were the sequences joined, 2 and 3 would
    assert CoOccurrence().fit([[0, 1], [2, 3], [0]], 4).rank([[1]], 1).tolist() == [[0]]


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=7), min_size=1, max_size=6).filter(any),
    st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=5),
    st.integers(1, 7),
)
def test_cooccurrence_equals_the_oracle(sequences, histories, k):
    model = CoOccurrence(seed=1).fit(sequences, 7)
    order = Popularity(seed=1).fit(sequences, 7).order.tolist()
    expected = [oracle(sequences, 7, history, order)[:k] for history in histories]
    assert model.rank(histories, k).tolist() == expected
    assert model.rank(histories, k, batch_size=2).tolist() == expected


def test_no_histories():
    assert CoOccurrence().fit(TRAIN, 6).rank([], 3).shape == (0, 3)
    assert Popularity().fit(TRAIN, 6).rank([], 3).shape == (0, 3)


@pytest.mark.parametrize("model", [Popularity(), CoOccurrence()])
def test_input_that_does_not_fit(model):
    for sequences in ([], [[]], [[0, 6]], [[0, -1]]):
        with pytest.raises(InputError, match="from 0 to 5"):
            model.fit(sequences, 6)
    model.fit(TRAIN, 6)
    for k in (0, 7):
        with pytest.raises(InputError, match=f"k is {k}; there are 6 items"):
            model.rank([[0]], k)


# ------------------------------------------------------------------------------------------------- real data


def test_real_data(shared_data):
    interactions = Interactions.load(shared_data / "industrial")
    split = interactions.published()
    model = CoOccurrence().fit(split.sequences, interactions.num_items)
    popularity = Popularity().fit(split.sequences, interactions.num_items)
    order = popularity.order.tolist()
    rows = split.test.take(range(0, len(split.test), 500))
    for history, ranked in zip(rows.history, model.rank(rows.history, 10).tolist(), strict=True):
        near = [sequence for sequence in split.sequences if not set(sequence).isdisjoint(history)]
        assert ranked == oracle(near, interactions.num_items, history, order)[:10]
    target = torch.tensor(split.test.target)
    recall = {
        name: ranking_metrics(method.rank(split.test.history, 10), target)["recall@10"]
        for name, method in (("co-occurrence", model), ("popularity", popularity))
    }
    assert recall["co-occurrence"] > recall["popularity"]


# ------------------------------------------------------------------------------------------------- item kNN


def test_item_knn_by_hand():
    # users of 0: a, b; of 1: a, b (twice, which counts once); of 2: b; of 3: c
    model = ItemKNN(damping=0.0).fit([[0, 1], [1, 0, 1, 2], [3]], num_items=4)
    cosines = {(0, 1): 2 / 2, (0, 2): 1 / 2**0.5, (1, 2): 1 / 2**0.5}
    for (left, right), cosine in cosines.items():
        for item, other in ((left, right), (right, left)):  # order says nothing
            place = model.order.tolist().index(other)
            assert model.counts[item, place] == pytest.approx(cosine)
    assert model.counts.nnz == 6
    assert model.rank([[0]], 2).tolist() == [[1, 2]]
    # 2 was taken last: .707 for either; 1 gets .8 x 1 more from 0 before it
    assert model.rank([[0, 2]], 1).tolist() == [[1]]
    damped = ItemKNN(damping=1.0).fit([[0, 1], [1, 0, 1, 2], [3]], num_items=4)
    assert damped.counts[0, damped.order.tolist().index(1)] == pytest.approx(2 / 3)
    assert damped.counts[0, damped.order.tolist().index(2)] == pytest.approx(1 / (2**0.5 + 1))  # taken by 2 and by 1

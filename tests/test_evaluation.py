"""Ranking metrics against hand cases and against every order of the items behind the ranked SIDs."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data.interactions import Rows
from sapo.errors import InputError
from sapo.evaluation.evaluate import (
    duplicate_share,
    evaluate_ranking,
    item_ranks,
    match_rates,
    places,
    rank_of_hit,
    rank_sids,
    ranking_metrics,
    sid_ranking_metrics,
    valid_share,
)

CATALOGUE = torch.tensor([[0, 0], [0, 1], [0, 1], [1, 0], [0, 1], [2, 3]])  # (0, 1) names the items 1, 2 and 4
INTS = partial(torch.zeros, dtype=torch.long)


def test_hand_case():
    ranked = torch.tensor([[7, 3, 9], [7, 3, 9], [7, -1, -1], [4, 5, 6]])
    metrics = ranking_metrics(ranked, torch.tensor([7, 9, 3, 8]), ks=(1, 2, 3), per_user=True)
    assert metrics["recall@1"].tolist() == [1, 0, 0, 0]
    assert metrics["recall@3"].tolist() == [1, 1, 0, 0]
    assert metrics["ndcg@2"].tolist() == [1, 0, 0, 0]
    assert metrics["ndcg@3"].tolist() == pytest.approx([1, 0.5, 0, 0])  # third place: 1 / log2(3 + 1)
    mean = ranking_metrics(ranked, torch.tensor([7, 9, 3, 8]), ks=(3,))
    assert mean == {"recall@3": 0.5, "ndcg@3": pytest.approx(0.375)}


def test_a_ranking_counts_with_and_without_the_items_of_a_history():
    """Row 0: 7 was there before, so 3 moves up to place 1. Row 1: the target was there before. Row 2: 9 stays third of
    the ranking, second of the first two new ones. Row 3 has nothing new but what is not the target."""
    rows = Rows(history=[[7], [1, 9], [5], [4, 5]], target=[3, 9, 9, 8], user=list("abcd"))
    ranked = torch.tensor([[7, 3, 9, 1], [9, 2, 1, 4], [7, 5, 9, 1], [4, 5, 6, -1]])
    sids = torch.arange(10)[:, None]
    metrics, users = evaluate_ranking(ranked, rows, (1, 2), sids)
    assert users["rank"].tolist() == [2, 1, 0, 0]
    assert (metrics["recall@1"], metrics["recall@2"]) == (0.25, 0.5)
    assert (metrics["new/recall@1"], metrics["new/recall@2"]) == (0.25, 0.5)
    assert metrics["new/ndcg@2"] == pytest.approx((1 + 1 / math.log2(3)) / 4)  # row 0 first, row 2 second
    assert places(rows, (1, 2), sids) == 4
    few, _ = evaluate_ranking(torch.tensor([[7], [9], [5], [4]]), rows, (1, 2), sids)
    assert few["new/recall@2"] == 0


def test_a_ranking_of_items_also_counts_by_sid():
    """Items 1, 2 and 4 share a SID. Row 0: SIDs (0, 1), (0, 1), (0, 0), of which the second takes no place, so that the
    target, item 2, is at place 1 by its SID and missed by item among the first two. Row 1: item 3 is third by item,
    second by SID. Row 2: neither the item nor its SID is ranked."""
    rows = Rows(history=[[5], [5], [5]], target=[2, 3, 5], user=list("abc"))
    ranked = torch.tensor([[1, 4, 0], [1, 2, 3], [1, 0, -1]])
    metrics, users = evaluate_ranking(ranked, rows, (1, 2), CATALOGUE)
    assert users["rank"].tolist() == [0, 0, 0]
    assert users["sid/rank"].tolist() == [1, 2, 0]
    assert (metrics["recall@2"], metrics["sid/recall@1"], metrics["sid/recall@2"]) == (0, 1 / 3, 2 / 3)
    assert metrics["sid/ndcg@2"] == pytest.approx((1 + 1 / math.log2(3)) / 3)


def test_places_are_enough_for_as_many_sids():
    """However a ranking begins: the three items of one SID and one of another are four places of two SIDs."""
    rows = Rows(history=[[5]], target=[0], user=["a"])
    assert (
        places(rows, (1, 2), CATALOGUE) == 4
    )  # three of (0, 1), then any other; without the history, 2 + 1 are enough
    assert places(rows, (3,), CATALOGUE) == 3 + 1 + 1
    for first in itertools.permutations(range(6), 4):
        assert (rank_sids(torch.tensor([first]), INTS(6) + torch.tensor([0, 1, 1, 2, 1, 3]))[0] >= 0).sum() >= 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sids_of_a_ranking_of_items_against_a_loop(data):
    label = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    items = st.lists(st.integers(-1, len(label) - 1), min_size=5, max_size=5)
    ranked = data.draw(st.lists(items, min_size=1, max_size=3))
    expected = [list(dict.fromkeys(label[item] for item in line if item >= 0)) for line in ranked]
    found = rank_sids(torch.tensor(ranked), torch.tensor(label)).tolist()
    assert found == [line + [-1] * (5 - len(line)) for line in expected]


def test_items_written_out_count_by_sid_as_the_sids_did():
    """A policy, and a recommender that names the items of the policy's SIDs one after the other, are alike by SID."""
    generator = torch.Generator().manual_seed(1)
    sids = torch.randint(3, (30, 2), generator=generator)
    distinct = sids.unique(dim=0)
    target = torch.randint(30, (20,), generator=generator)
    of_sids = torch.stack([distinct[torch.randperm(len(distinct), generator=generator)] for _ in range(20)])
    of_items = [[item for sid in line for item in (sids == sid).all(1).nonzero()[:, 0].tolist()] for line in of_sids]
    rows = Rows(history=[[0]] * 20, target=target.tolist(), user=list(map(str, range(20))))
    metrics, _ = evaluate_ranking(torch.tensor(of_items), rows, (1, 3, 5), sids)
    by_sid = sid_ranking_metrics(of_sids, target, sids, (1, 3, 5))
    assert {name: metrics[f"sid/{name}"] for name in by_sid} == pytest.approx(by_sid)
    first, sharers = item_ranks(of_sids, target, sids)  # and the place of the item lies in the stretch it may be in
    rank = rank_of_hit(torch.tensor(of_items) == target[:, None])
    assert ((first <= rank) & (rank < first + sharers)).all()


def test_second_place_of_a_repeated_label_adds_nothing():
    assert ranking_metrics(torch.tensor([[1, 5, 5]]), torch.tensor([5]), ks=(3,)) == {
        "recall@3": 1.0,
        "ndcg@3": pytest.approx(1 / math.log2(3)),
    }


def test_k_beyond_the_ranking_names_both():
    with pytest.raises(InputError, match=r"k = 10 .* R = 3"):
        ranking_metrics(INTS(2, 3), INTS(2), ks=(10,))


@pytest.mark.parametrize(
    ("ranked", "target", "ks", "message"),
    [
        (INTS(2, 3), INTS(3), (1,), "one target a row"),
        (INTS(0, 3), INTS(0), (1,), "one target a row"),
        (INTS(2, 3), INTS(2), (0,), "at least 1"),
        (INTS(2, 3), torch.tensor([0, -1]), (1,), "padding"),
    ],
)
def test_bad_input(ranked, target, ks, message):
    with pytest.raises(InputError, match=message):
        ranking_metrics(ranked, target, ks)


def test_bad_sid_input():
    ranked, target = CATALOGUE[None, :3], torch.tensor([1])
    with pytest.raises(InputError, match="2 levels, the catalogue of 1"):
        sid_ranking_metrics(ranked, target, CATALOGUE[:, :1], ks=(1,))
    with pytest.raises(InputError, match=r"outside 0\.\.5"):
        sid_ranking_metrics(ranked, torch.tensor([6]), CATALOGUE, ks=(1,))
    with pytest.raises(InputError, match="'random'"):
        sid_ranking_metrics(ranked, target, CATALOGUE, ks=(1,), collisions="random")
    with pytest.raises(InputError, match="R = 3"):
        sid_ranking_metrics(ranked, target, CATALOGUE, ks=(4,), collisions="item")


def test_collision_policies_by_hand():
    ranked = torch.tensor([[[1, 0], [0, 1], [0, 0]]])
    sid = sid_ranking_metrics(ranked, torch.tensor([2]), CATALOGUE, ks=(2, 3))
    assert sid["recall@2"] == 1
    assert sid["ndcg@2"] == pytest.approx(1 / math.log2(3))
    # Item 3 fills place 1, then items 1, 2, 4 in random order: item 2 is at place 2, 3 or 4, each with 1/3.
    item = sid_ranking_metrics(ranked, torch.tensor([2]), CATALOGUE, ks=(2, 3), collisions="item")
    assert item["recall@2"] == pytest.approx(1 / 3)
    assert item["recall@3"] == pytest.approx(2 / 3)
    assert item["ndcg@3"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 3)
    assert [found.tolist() for found in item_ranks(ranked, torch.tensor([2]), CATALOGUE)] == [[2], [3]]
    assert [found.tolist() for found in item_ranks(ranked, torch.tensor([5]), CATALOGUE)] == [[0], [1]]
    # Item 0 comes after all of them, at place 5.
    assert sid_ranking_metrics(ranked, torch.tensor([0]), CATALOGUE, ks=(3,), collisions="item")["recall@3"] == 0


def expectation_over_orders(ranked: list[tuple], target: int, sids: list[tuple], k: int) -> tuple[float, float]:
    """Write every order of the items out and average."""
    blocks = [[item for item, sid in enumerate(sids) if sid == place] or [-1] for place in ranked]
    hits = gain = count = 0.0
    for orders in itertools.product(*(itertools.permutations(block) for block in blocks)):
        shown = list(itertools.chain(*orders))[:k]
        count += 1
        if target in shown:
            hits += 1
            gain += 1 / math.log2(shown.index(target) + 2)
    return hits / count, gain / count


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_item_policy_is_the_expectation_over_all_orders(data):
    sids = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=5))
    ranked = data.draw(st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 2)), min_size=1, max_size=3))
    target = data.draw(st.integers(0, len(sids) - 1))
    k = data.draw(st.integers(1, len(ranked)))
    metrics = sid_ranking_metrics(
        torch.tensor([ranked]), torch.tensor([target]), torch.tensor(sids), ks=(k,), collisions="item"
    )
    recall, ndcg = expectation_over_orders(ranked, target, sids, k)
    assert metrics[f"recall@{k}"] == pytest.approx(recall, abs=1e-12)
    assert metrics[f"ndcg@{k}"] == pytest.approx(ndcg, abs=1e-12)


def test_policies_agree_without_collisions():
    generator = torch.Generator().manual_seed(0)
    sids = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    ranked = torch.stack([sids[torch.randperm(12, generator=generator)[:6]] for _ in range(40)])
    ranked[::3, 2] = torch.tensor([2, 9])  # not in the catalogue
    ranked[::4, 4:] = -1
    target = torch.randint(12, (40,), generator=generator)
    by_sid = sid_ranking_metrics(ranked, target, sids, ks=(1, 3, 6), per_user=True)
    by_item = sid_ranking_metrics(ranked, target, sids, ks=(1, 3, 6), collisions="item", per_user=True)
    labels = torch.where((ranked < 0).any(-1) | (ranked[..., 1] > 3), -1, ranked[..., 0] * 4 + ranked[..., 1])
    by_label = ranking_metrics(labels, target, ks=(1, 3, 6), per_user=True)
    for name in by_label:
        torch.testing.assert_close(by_sid[name], by_label[name])
        torch.testing.assert_close(by_item[name], by_label[name])


def test_codes_of_a_large_vocabulary_do_not_overflow():
    large = 2**20
    sids = torch.tensor([[large] * 5, [large] * 4 + [0]])  # 2^100 possible SIDs
    ranked = torch.tensor([[[large] * 4 + [0], [large] * 5]])
    assert sid_ranking_metrics(ranked, torch.tensor([0]), sids, ks=(1, 2))["recall@2"] == 1
    assert sid_ranking_metrics(ranked, torch.tensor([0]), sids, ks=(1, 2))["recall@1"] == 0


def test_valid_and_duplicate_share():
    ranked = torch.tensor(
        [
            [[0, 1], [0, 1], [1, 0], [0, 1]],  # two repeats
            [[2, 3], [2, 2], [2, -1], [2, -1]],  # (2, 2) and the malformed ones name nothing; one repeat
            [[0, 0], [-1, -1], [-1, -1], [-1, -1]],  # one SID returned
        ]
    )
    assert valid_share(ranked, CATALOGUE) == pytest.approx(6 / 9)
    assert duplicate_share(ranked) == pytest.approx(3 / 9)
    assert math.isnan(valid_share(torch.full((1, 2, 2), -1), CATALOGUE))
    assert math.isnan(duplicate_share(torch.full((1, 2, 2), -1)))


def test_match_rates_count_a_right_code_under_a_wrong_prefix():
    first = torch.tensor([[0, 1, 2], [5, 1, 2], [-1, -1, -1], [0, 0, 0]])
    target = torch.tensor([[0, 1, 2]] * 4)
    assert match_rates(first, target) == {"match_level_1": 0.5, "match_level_2": 0.5, "match_level_3": 0.5}


def test_rank_of_the_first_hit():
    hit = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1]]).bool()
    assert rank_of_hit(hit).tolist() == [2, 1, 0, 3]

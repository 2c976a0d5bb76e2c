"""Fused rankings by hand, and that validation finds who is worth listening to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.baselines import fusion
from sapo.baselines.fusion import Fusion
from sapo.errors import InputError
from sapo.evaluation.evaluate import ranking_metrics


def test_fused_ranks_by_hand():
    """Offset 1. Item 0: 2/2; item 1: 2/3 + 1/2; item 2: 2/4 + 1/3; item 3: 1/4."""
    lists = {"a": torch.tensor([[0, 1, 2]]), "b": torch.tensor([[1, 2, 3]])}
    fusion = Fusion(5, offset=1, weights={"a": 2.0, "b": 1.0})
    assert fusion.rank(lists, 4).tolist() == [[1, 0, 2, 3]]  # 1.167, 1, 0.833, 0.25
    assert Fusion(5, 1, {"a": 1.0, "b": 0.0}).rank(lists, 5).tolist() == [[0, 1, 2, -1, -1]]  # nobody named 3 and 4


def test_the_number_of_an_item_breaks_no_tie():
    """Items in each other's places in two lists have the same score; which comes first is drawn, for each catalogue."""
    firsts = set()
    for items in range(2, 20):
        lists = {"a": torch.tensor([[0, 1]]), "b": torch.tensor([[1, 0]])}
        made = [Fusion(items, 5, {"a": 1.0, "b": 1.0}).rank(lists, 2)[0].tolist() for _ in range(2)]
        assert made[0] == made[1]
        firsts.add(tuple(made[0]))
    assert firsts == {(0, 1), (1, 0)}
    with pytest.raises(InputError, match="a list ends early"):
        Fusion(5, 1, {"a": 1.0}).rank({"a": torch.tensor([[0, -1]])}, 1)


@given(st.integers(0, 2**31), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_more_places_go_on_from_fewer(seed, k):
    """Twenty items that two lists of one weight name: there are ties at every place."""
    generator = torch.Generator().manual_seed(seed)
    lists = {name: torch.randperm(20, generator=generator)[None, :12] for name in ("a", "b")}
    fusion = Fusion(20, 1, {"a": 1.0, "b": 1.0})
    ranked = fusion.rank(lists, 30)[0]
    assert fusion.rank(lists, k)[0].tolist() == ranked[:k].tolist()
    named = {*lists["a"][0].tolist(), *lists["b"][0].tolist()}
    assert sorted(ranked[: len(named)].tolist()) == sorted(named)
    assert ranked[len(named) :].tolist() == [-1] * (30 - len(named))


@given(st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_what_is_chosen_is_best_among_all_when_ranked(seed):
    """With weights of 0 and 1 there are three ways to listen to two, which the search tries all; ties count as `rank`
    has them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.stack([torch.randperm(15, generator=generator)[:12] for _ in range(8)])  # noqa: E731
    lists, target = {"a": draw(), "b": draw()}, torch.randint(15, (8,), generator=generator)
    worth = lambda fusion: ranking_metrics(fusion.rank(lists, 10), target, (10,))["ndcg@10"]  # noqa: E731
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fusion, "OFFSETS", (1,))
        patched.setattr(fusion, "WEIGHTS", (0.0, 1.0))
        chosen = Fusion(15).fit(lists, target)
    all_three = [worth(Fusion(15, 1, dict(zip("ab", pair, strict=True)))) for pair in ((1, 0), (0, 1), (1, 1))]
    assert worth(chosen) == pytest.approx(max(all_three), abs=1e-6)


@pytest.mark.parametrize(("agreed", "offset"), [(True, 5), (False, 1)])
def test_validation_chooses_the_offset(monkeypatch, agreed, offset):
    """Whether it is right to listen to one list that has an item first, or to two that have another third.

    One is at places 0 and 9: 1/2 + 1/11 = .59 with an offset of 1, 1/6 + 1/15 = .23 with 5. The other is at 2 and 2:
    1/4 + 1/4 = .5 and 1/8 + 1/8 = .25. What stands around them is in one list only, so at most 1/2 and 1/6.
    """
    monkeypatch.setattr(fusion, "WEIGHTS", (1.0,))
    first, third = (1, 0) if agreed else (0, 1)  # 0 is right
    one = [first, 2, third, *range(3, 12)]
    two = [20, 21, third, *range(22, 28), first, 28, 29]
    lists = {"a": torch.tensor([one, two]), "b": torch.tensor([two, one])}  # neither list is the better one
    made = Fusion(40).fit(lists, torch.tensor([0, 0]))
    assert made.offset == offset
    assert made.rank(lists, 1).tolist() == [[0], [0]]


def test_rows_are_ranked_alike_in_pieces(monkeypatch):
    target = torch.arange(10)
    lists = {"good": lists_for(target, 0.5, 1), "other": lists_for(target, 0.3, 2)}
    made = Fusion(40, 5, {"good": 2.0, "other": 1.0})
    whole = made.rank(lists, 7)
    monkeypatch.setattr(fusion, "TOGETHER", 3)
    assert torch.equal(made.rank(lists, 7), whole)


def lists_for(target, skill, seed, items=40, length=20):
    """Random lists that put the target at their top for a share of the rows."""
    generator = torch.Generator().manual_seed(seed)
    ranked = torch.stack([torch.randperm(items, generator=generator) for _ in target])
    knows = torch.rand(len(target), generator=generator) < skill
    score = -ranked.argsort(1).float()
    score[knows, target[knows]] = 1.0
    return score.argsort(dim=1, descending=True)[:, :length]


def test_validation_chooses_whom_to_listen_to():
    target = torch.randint(40, (800,), generator=torch.Generator().manual_seed(0))
    skills = {"good": 0.5, "other": 0.45, "noise": 0.0}
    valid, test = (
        {name: lists_for(target, skill, seed + at) for at, (name, skill) in enumerate(skills.items())}
        for seed in (1, 11)
    )
    fusion = Fusion(40).fit(valid, target)
    worth = lambda ranked: ranking_metrics(ranked, target, (10,))["ndcg@10"]  # noqa: E731
    assert fusion.weights["noise"] < min(fusion.weights["good"], fusion.weights["other"])
    for lists in (valid, test):  # two that know different rows know more together
        assert worth(fusion.rank(lists, 10)) > 0.1 + max(worth(ranked) for ranked in lists.values())


def test_it_is_never_worse_on_validation_than_the_best_alone():
    target = torch.randint(40, (200,), generator=torch.Generator().manual_seed(3))
    lists = {"good": lists_for(target, 0.9, 1), **{f"noise {n}": lists_for(target, 0.0, n + 2) for n in range(4)}}
    worth = lambda ranked: ranking_metrics(ranked, target, (10,))["ndcg@10"]  # noqa: E731
    assert worth(Fusion(40).fit(lists, target).rank(lists, 10)) >= worth(lists["good"])
    assert Fusion(40).fit({"good": lists["good"]}, target).rank(lists, 20).tolist() == lists["good"].tolist()
    with pytest.raises(InputError, match="no recommender to fuse"):
        Fusion(40).fit({}, target)
    with pytest.raises(InputError, match="no recommender has a weight"):
        Fusion(40).rank(lists, 10)

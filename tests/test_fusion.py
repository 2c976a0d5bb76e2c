"""Fused rankings by hand, and that validation finds who is worth listening to."""

import pytest
import torch

from sapo.analysis.evaluation import ranking_metrics
from sapo.baselines import fusion
from sapo.baselines.fusion import Fusion
from sapo.errors import InputError


def test_fused_ranks_by_hand():
    """Offset 1. Item 0: 2/2; item 1: 2/3 + 1/2; item 2: 2/4 + 1/3; item 3: 1/4."""
    lists = {"a": torch.tensor([[0, 1, 2]]), "b": torch.tensor([[1, 2, 3]])}
    fusion = Fusion(5, offset=1, weights={"a": 2.0, "b": 1.0})
    assert fusion.rank(lists, 4).tolist() == [[1, 0, 2, 3]]  # 1.167, 1, 0.833, 0.25
    assert Fusion(5, 1, {"a": 1.0, "b": 0.0}).rank(lists, 5).tolist() == [[0, 1, 2, -1, -1]]  # nobody named 3 and 4


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
    with pytest.raises(InputError, match="no recommender"):
        Fusion(40).fit({}, target)

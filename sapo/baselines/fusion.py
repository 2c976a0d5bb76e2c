"""Several recommenders as one: weighted reciprocal ranks (Cormack et al., SIGIR 2009).

    score of an item = sum over recommenders of weight / (offset + its rank there)

Ranks are all it asks for, so counting, item models and models of SIDs go together as they are. Weights and offset are
chosen on validation rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sapo.errors import InputError

OFFSETS = (1, 5, 20)
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
ROUNDS = 2  # of choosing each weight in turn
CUT = 10  # of the NDCG by which they are chosen
TOGETHER = 4096  # rows that are ranked at a time


@dataclass
class Fusion:
    """Recommenders by name, each by its first R items for every row.

    Args:
        num_items: N.
        offset: of ranks; the smaller, the more the first places count.
        weights: of the recommenders.

    Items of one score, such as two that two recommenders of one weight name in each other's places, come in an order
    that is drawn once.
    """

    num_items: int
    offset: int = 1
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Item numbers follow first appearance, so they must never break a tie.
        self._items = torch.randperm(self.num_items, generator=torch.Generator().manual_seed(0))
        self._turns = self._items.argsort()  # of the items in that order

    def fit(self, lists: Mapping[str, Int[Tensor, "U R"]], target: Int[Tensor, "U"]) -> Self:
        """Choose offset and weights by NDCG@10: from the best recommender alone, and from all alike, one weight after
        the other.

        Raises:
            InputError: no recommender; a list that holds -1, as `rank` may give.
        """
        if not lists:
            raise InputError("there is no recommender to fuse.")
        named, turns = self._named(lists), self._turns[target][:, None]
        worth = lambda scores: _ndcg(named, scores, turns)  # noqa: E731
        alone = {name: worth(self._gains(named, ranked, 1)) for name, ranked in lists.items()}
        first = max(alone, key=lambda name: alone[name])
        best = alone[first]
        self.offset, self.weights = OFFSETS[0], {name: float(name == first) for name in lists}
        for offset in OFFSETS:
            gains = {name: self._gains(named, ranked, offset) for name, ranked in lists.items()}
            for start in ({name: float(name == first) for name in lists}, dict.fromkeys(lists, 1.0)):
                weights = start
                scores = _sum(gains, weights)
                reached = worth(scores)
                for name in [*lists] * ROUNDS:
                    others = scores - weights[name] * gains[name]
                    for weight in WEIGHTS:
                        if weight == 0 and not any(w for other, w in weights.items() if other != name):
                            continue
                        tried = worth(others + weight * gains[name])
                        if tried > reached:
                            reached, weights = tried, weights | {name: weight}
                    scores = others + weights[name] * gains[name]
                if reached > best:
                    best, self.offset, self.weights = reached, offset, weights
        return self

    def rank(self, lists: Mapping[str, Int[Tensor, "U R"]], k: int) -> Int[Tensor, "U k"]:
        """The k best items for every row; -1 where no recommender with a weight names so many.

        Raises:
            InputError: a list that holds -1; nobody has a weight.
        """
        heard = {name: lists[name] for name, weight in self.weights.items() if weight}
        if not heard:
            raise InputError("no recommender has a weight; `fit` chooses them.")
        ranked = []
        for start in range(0, len(next(iter(heard.values()))), TOGETHER):
            part = {name: of_name[start : start + TOGETHER] for name, of_name in heard.items()}
            named = self._named(part)
            scores = _sum({name: self._gains(named, of, self.offset) for name, of in part.items()}, self.weights)
            best = scores.sort(dim=1, descending=True, stable=True)
            items = self._items[named.gather(1, best.indices)].masked_fill(best.values <= 0, -1)
            ranked.append(pad(items, (0, max(k - items.shape[1], 0)), value=-1)[:, :k])
        return torch.cat(ranked)

    def _named(self, lists: Mapping[str, Int[Tensor, "U R"]]) -> Int[Tensor, "U C"]:
        """The turns of all items that recommenders name for each row, ascending, as often as they are named."""
        if any((ranked < 0).any() for ranked in lists.values()):
            raise InputError("a list ends early: a recommender names as many items for every row.")
        return torch.cat([self._turns[ranked] for ranked in lists.values()], 1).sort(dim=1).values

    def _gains(self, named: Int[Tensor, "U C"], ranked: Int[Tensor, "U R"], offset: int) -> Float[Tensor, "U C"]:
        """1 / (offset + rank) at the first place of each item that a recommender names, 0 elsewhere."""
        gains = 1 / (offset + torch.arange(1.0, ranked.shape[1] + 1))
        return torch.zeros(named.shape).scatter_(1, _places(named, self._turns[ranked]), gains.expand(ranked.shape))


def _places(named: Int[Tensor, "U C"], turns: Int[Tensor, "U M"]) -> Int[Tensor, "U M"]:
    """The first place where each turn stands, or one where it would."""
    return torch.searchsorted(named, turns).clamp(max=named.shape[1] - 1)


def _ndcg(named: Int[Tensor, "U C"], scores: Float[Tensor, "U C"], turns: Int[Tensor, "U 1"]) -> float:
    """NDCG@10 of the items of these turns: what stands before one is counted, nothing is sorted."""
    places = _places(named, turns)
    own = scores.gather(1, places)
    earlier = (scores == own) & (torch.arange(named.shape[1]) < places)
    rank = 1 + ((scores > own) | earlier).sum(1, keepdim=True)
    found = (named.gather(1, places) == turns) & (own > 0) & (rank <= CUT)
    return float(torch.where(found, 1 / torch.log2(rank + 1.0), 0.0).double().mean())


def _sum(gains: Mapping[str, Float[Tensor, "U C"]], weights: Mapping[str, float]) -> Float[Tensor, "U C"]:
    total = torch.zeros_like(next(iter(gains.values())))
    for name, weight in weights.items():
        if weight:
            total += weight * gains[name]
    return total

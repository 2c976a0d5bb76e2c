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

from sapo.analysis.evaluation import ranking_metrics
from sapo.errors import InputError

OFFSETS = (1, 5, 20)
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
ROUNDS = 2  # of choosing each weight in turn
TOGETHER = 4096  # rows that are ranked at a time: each holds a number for every item


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
        self._columns = self._items.argsort()  # of the items in the tables of scores

    def fit(self, lists: Mapping[str, Int[Tensor, "U R"]], target: Int[Tensor, "U"]) -> Self:
        """Choose offset and weights by NDCG@10: from the best recommender alone, and from all alike, one weight after
        the other.

        Raises:
            InputError: no recommender; a list that holds -1, as `rank` may give.
        """
        if not lists:
            raise InputError("there is no recommender to fuse.")
        places = min(10, self.num_items)
        first_items = lambda scores: self._items[scores.topk(places).indices]  # noqa: E731
        worth = lambda scores: ranking_metrics(first_items(scores), target, (places,))[f"ndcg@{places}"]  # noqa: E731
        alone = {name: worth(self._gains(ranked, 1)) for name, ranked in lists.items()}
        first = max(alone, key=lambda name: alone[name])
        best = alone[first]
        self.offset, self.weights = OFFSETS[0], {name: float(name == first) for name in lists}
        for offset in OFFSETS:
            for start in ({name: float(name == first) for name in lists}, dict.fromkeys(lists, 1.0)):
                weights = start
                scores = self._sum(lists, weights, offset)
                reached = worth(scores)
                for name in [*lists] * ROUNDS:
                    gains = self._gains(lists[name], offset)
                    others = scores - weights[name] * gains
                    for weight in WEIGHTS:
                        if weight == 0 and not any(w for other, w in weights.items() if other != name):
                            continue
                        tried = worth(others + weight * gains)
                        if tried > reached:
                            reached, weights = tried, weights | {name: weight}
                    scores = others + weights[name] * gains
                if reached > best:
                    best, self.offset, self.weights = reached, offset, weights
        return self

    def rank(self, lists: Mapping[str, Int[Tensor, "U R"]], k: int) -> Int[Tensor, "U k"]:
        """The k best items for every row; -1 where no recommender with a weight names so many.

        Raises:
            InputError: a list that holds -1.
        """
        ranked = []
        for start in range(0, len(next(iter(lists.values()))), TOGETHER):
            part = {name: of_name[start : start + TOGETHER] for name, of_name in lists.items()}
            best = self._sum(part, self.weights, self.offset).topk(k)
            ranked.append(self._items[best.indices].masked_fill(best.values <= 0, -1))
        return torch.cat(ranked)

    def _sum(
        self, lists: Mapping[str, Int[Tensor, "U R"]], weights: Mapping[str, float], offset: int
    ) -> Float[Tensor, "U N"]:
        rows = len(next(iter(lists.values())))
        scores = torch.zeros(rows, self.num_items)
        for name, weight in weights.items():
            if weight:
                scores += weight * self._gains(lists[name], offset)
        return scores

    def _gains(self, ranked: Int[Tensor, "U R"], offset: int) -> Float[Tensor, "U N"]:
        if (ranked < 0).any():
            raise InputError("a list ends early: a recommender names as many items for every row.")
        gains = 1 / (offset + torch.arange(1.0, ranked.shape[1] + 1))
        return torch.zeros(len(ranked), self.num_items).scatter_(1, self._columns[ranked], gains.expand(ranked.shape))

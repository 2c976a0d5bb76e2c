"""Rec-R1 (arXiv 2503.24289): a policy writes a query, and the quality of what a frozen retriever finds is its reward.

The retriever ranks items by the cosine of TF-IDF vectors of their texts and the query, ties by popularity. The target
at rank r pays 0.1 + 1 / log2(r + 1) if it is among the first 1000 and shares a word with the query, else nothing. The
authors' policy may also break the format of a query, which costs 2; ours cannot, and its query is its thought. Theirs
asks BM25 or a dense retriever, samples 12 queries at temperature 0.6 and is held back by a KL of weight 0.001.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.baselines.fitting import FitConfig
from sapo.baselines.popularity import Popularity
from sapo.baselines.thinking import ThinkingRecommender
from sapo.credit.advantages import trajectory_advantages
from sapo.data.interactions import Split
from sapo.policy.policy import Policy
from sapo.policy.prompts import split_words

FOUND = 0.1  # for any hit
DEEPEST = 1000  # rank that is still a hit


class Retriever:
    """Items by the words of a query.

    Args:
        texts: one an item.
        order: items from popular to rare, which breaks ties.
    """

    def __init__(self, texts: Sequence[str], order: Int[Tensor, "N"]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.order = order.numpy()
        self.vectors = TfidfVectorizer(tokenizer=split_words, token_pattern=None, lowercase=False)
        self.items = self.vectors.fit_transform(texts)[self.order].T.tocsr()  # (words, N), popular items first

    def scores(self, queries: Sequence[str]) -> Float[Tensor, "Q N"]:
        """Cosines of queries and items, in the order of popularity."""
        found = self.vectors.transform(queries) @ self.items
        return torch.from_numpy(found.toarray())

    def rank(self, queries: Sequence[str], k: int) -> Int[Tensor, "Q k"]:
        """The k best items of every query."""
        places = self.scores(queries).argsort(dim=1, descending=True, stable=True)[:, :k]
        return torch.from_numpy(self.order[places.numpy()])

    def rewards(self, queries: Sequence[str], targets: Sequence[int]) -> Float[Tensor, "Q"]:
        """What queries earn."""
        scores = self.scores(queries)
        place = np.argsort(self.order)[np.asarray(targets)]
        own = scores[torch.arange(len(scores)), place][:, None]
        earlier = (scores == own) & (torch.arange(scores.shape[1]) < torch.from_numpy(place)[:, None])
        rank = 1 + ((scores > own) | earlier).sum(1)
        gain = FOUND + 1 / torch.log2(rank + 1.0)
        return torch.where((own[:, 0] > 0) & (rank <= DEEPEST), gain, 0.0)


class RecR1(ThinkingRecommender):
    """A ThinkingRecommender whose thought is a query.

    Args:
        split: whose training sequences say what is popular.
    """

    losses = ("reward",)

    def __init__(self, policy: Policy, split: Split, group_size: int = 8):
        super().__init__(policy, group_size)
        order = Popularity().fit(split.sequences, policy.catalog.num_items).order
        texts = zip(policy.catalog.titles, policy.catalog.categories, strict=True)
        self.retriever = Retriever([" ".join(text) for text in texts], order)

    def loss(self, split: Split, examples: list[int], config: FitConfig) -> Float[Tensor, ""]:
        """GRPO on the rewards of G queries a history."""
        rows = split.train.take(examples)
        drawn = self.draw(rows.history, self.group_size, greedy=False)
        targets = [target for target in rows.target for _ in range(self.group_size)]
        rewards = self.retriever.rewards(self.words(drawn), targets).to(drawn.ids.device)
        advantages = trajectory_advantages(rewards, self.group_size)
        return self.thought_loss(drawn, self.read(drawn)[0], advantages)

    def best(self, histories: Sequence[Sequence[int]], users: Sequence[str], k: int) -> Int[Tensor, "B k"]:
        """What the retriever finds by the likeliest query."""
        return self.retriever.rank(self.words(self.draw(histories)), k)

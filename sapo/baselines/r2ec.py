"""R2ec (arXiv 2505.16994): one model that reasons and recommends, by a second head beside that of language.

The model thinks after a history; its state at a mark after the thought is the user. It reads every item's SID and title
too, and its state at the same mark is the item. A user's items are ranked by cosine / temperature.

RecPO trains both: of G thoughts each earns 0.95 NDCG@1000 of the target + 0.05 of the target's share of the softmax
over all items. Group-relative advantages weigh the tokens of all thoughts; the share of the target among the targets of
the batch is raised by the advantage of each history's best thought alone. Vectors of all items, by which rewards are
found, are made again every `refresh` losses.

The authors begin with a pretrained language model. States of a small policy match nothing yet, so it first learns to
match after its own thoughts (the loop's "softmax" loss), and then by rewards. They mask the history; here nothing is
masked, as in all our tables. They sample at temperature 2 from the 50 likeliest tokens and divide cosines by 0.02.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sapo.baselines.fitting import FitConfig
from sapo.baselines.thinking import ThinkingRecommender
from sapo.credit.advantages import trajectory_advantages
from sapo.data.interactions import Split
from sapo.errors import InputError
from sapo.policy.policy import Policy
from sapo.policy.prompts import BOS, ITEM_OF, TITLE_OF, sid_text, title_words

NDCG_SHARE = 0.95  # of the reward
DEEPEST = 1000  # rank that NDCG still counts


class R2ec(ThinkingRecommender):
    """A ThinkingRecommender.

    Args:
        temperature: cosines are divided by it.
        refresh: losses from one table of all items to the next.
    """

    losses = ("softmax", "reward")

    def __init__(self, policy: Policy, split: Split, group_size: int = 4, temperature: float = 0.05, refresh: int = 20):
        super().__init__(policy, group_size)
        if refresh < 1:
            raise InputError(f"refresh is {refresh}; at least 1 fits.")
        self.temperature, self.refresh = temperature, refresh
        vocabulary, catalog = policy.tokenizer.get_vocab(), policy.catalog
        self.mark = vocabulary[ITEM_OF]
        self.texts = [
            " ".join([BOS, sid_text(catalog, item), TITLE_OF, *title_words(title, vocabulary), ITEM_OF])
            for item, title in enumerate(catalog.titles)
        ]
        # both are saved: a fit that goes on after a stop refreshes when it would have
        self.register_buffer("table", torch.zeros(self.num_items, self.model.config.hidden_size))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.table: Float[Tensor, "N D"]
        self.count: Int[Tensor, ""]  # losses by rewards so far

    def items(self, which: Sequence[int]) -> Float[Tensor, "M D"]:
        """Vectors of items, of length 1."""
        batch = self.policy.encode([self.texts[item] for item in which])
        return normalize(self.states(batch["input_ids"], batch["attention_mask"].bool())[:, -1], dim=-1)

    @torch.no_grad()
    def read_all_items(self) -> None:
        """Make the table."""
        parts = torch.arange(self.num_items).split(1024)
        self.table = torch.cat([self.items(part.tolist()) for part in parts])

    def rewards(self, users: Float[Tensor, "R D"], targets: Int[Tensor, "R"]) -> Float[Tensor, "R"]:
        """What thoughts earn by the users that they lead to."""
        scores = users @ self.table.T / self.temperature
        own = scores.gather(1, targets[:, None])
        rank = 1 + (scores > own).sum(1)
        ndcg = torch.where(rank <= DEEPEST, 1 / torch.log2(rank + 1.0), 0.0)
        share = scores.softmax(-1).gather(1, targets[:, None])[:, 0]
        return NDCG_SHARE * ndcg + (1 - NDCG_SHARE) * share

    def loss(self, split: Split, examples: list[int], config: FitConfig) -> Float[Tensor, ""]:
        """RecPO; or, of the loop's "softmax", the target's share after one thought."""
        rows = split.train.take(examples)
        group = 1 if config.loss == "softmax" else self.group_size
        drawn = self.draw(rows.history, group, greedy=False)
        logps, states = self.read(drawn, self.mark)
        users, targets = normalize(states, dim=-1), torch.tensor(rows.target, device=states.device)
        different, place = targets.unique(return_inverse=True)
        vectors = self.items(different.tolist())
        if config.loss == "softmax":
            return cross_entropy(users @ vectors.T / self.temperature, place)
        if self.count % self.refresh == 0:
            self.read_all_items()
        self.count += 1
        with torch.no_grad():
            rewards = self.rewards(users, targets.repeat_interleave(group))
        advantages = trajectory_advantages(rewards, group)
        best = rewards.view(-1, group).argmax(1) + group * torch.arange(len(targets), device=targets.device)
        missed = cross_entropy(users[best] @ vectors.T / self.temperature, place, reduction="none")
        ratio = (missed.detach() - missed).exp()  # of the share and itself before this update: 1, with its gradient
        return self.thought_loss(drawn, logps, advantages) - (ratio * advantages[best]).mean()

    def rank(
        self, histories: Sequence[Sequence[int]], k: int, users: Sequence[str] | None = None
    ) -> Int[Tensor, "R k"]:
        """As every Recommender, by a table of the model as it is."""
        self.read_all_items()
        return super().rank(histories, k, users)

    def best(self, histories: Sequence[Sequence[int]], users: Sequence[str], k: int) -> Int[Tensor, "B k"]:
        """The nearest items after the likeliest thought."""
        _, states = self.read(self.draw(histories), self.mark)
        return (normalize(states, dim=-1) @ self.table.T).topk(k).indices

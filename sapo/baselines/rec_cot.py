"""RecCoT (arXiv 2506.21032): a chain of thought as one more input of a recommender, which it does not train.

The authors let a language model explain a user's review of an item, embed the text, and recommend by two towers that
read the embedding, for predicting ratings. There are no reviews here and the next item is asked for, so what is adapted
is the shape: a policy writes its thought after a history, once; the user's tower is a SASRec and the thought's vector,
the item's an embedding and the vector of its text; and their product is trained to tell the next item from all others.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sapo.baselines.fitting import FitConfig, Recommender
from sapo.baselines.sasrec import SASRec
from sapo.data.interactions import Split
from sapo.errors import InputError
from sapo.policy.policy import Policy, think
from sapo.policy.prompts import THINK_END, THINK_START
from sapo.semantic_ids.vectors import TextVectors, item_texts


class RecCoT(Recommender):
    """A Recommender.

    Args:
        policy: what thinks, and whose catalogue and length of histories this has; it stays as it is.
        size, dropout: of the SASRec.
        explained: whether the thought is read; without it the same towers remain, which says what it is worth, and
            there is no policy.
    """

    def __init__(self, policy: Policy, split: Split, size: int = 64, dropout: float = 0.5, explained: bool = True):
        super().__init__(policy.catalog.num_items, policy.max_history)
        self.policy = policy if explained else None
        self.sequence = SASRec(self.num_items, max_history=policy.max_history, size=size, heads=2, dropout=dropout)
        self.text = TextVectors()
        of_items = torch.from_numpy(self.text.fit(item_texts(policy.catalog.texts))).float()
        self.register_buffer("of_items", of_items, persistent=False)
        self.of_items: Float[Tensor, "N V"]
        self.thought, self.item = (nn.Linear(of_items.shape[1], size, bias=False) for _ in range(2))
        if not explained:
            del self.thought  # was drawn, so that the other weights start as those of a model that reads thoughts
        self._vectors: dict[tuple[int, ...], Tensor] = {}  # (V,)

    def loss(self, split: Split, examples: list[int], config: FitConfig) -> Float[Tensor, ""]:
        """Cross-entropy of the next items over all."""
        rows = split.train.take(examples)
        scores = self.users(rows.history) @ self.table().T
        return cross_entropy(scores, torch.tensor(rows.target, device=scores.device))

    def users(self, histories: Sequence[Sequence[int]]) -> Float[Tensor, "B D"]:
        """The user's tower."""
        items, nobody = self.sequence.tensors(histories, [""] * len(histories))
        last = (items != self.num_items).sum(1) - 1
        states = self.sequence(items, nobody)[torch.arange(len(items), device=items.device), last]
        if self.policy is None:
            return states
        self.explain(histories)
        vectors = torch.stack([self._vectors[self._shown(history)] for history in histories])
        return states + self.thought(vectors.to(states.device))

    def table(self) -> Float[Tensor, "N D"]:
        """The items' tower."""
        return self.sequence.table() + self.item(self.of_items)

    def explain(self, histories: Sequence[Sequence[int]]) -> None:
        """Keep the vector of the thought after each history that has none yet.

        Raises:
            InputError: there is no policy that thinks.
        """
        if self.policy is None:
            raise InputError("this RecCoT was made with explained=False: nobody thinks.")
        shown = dict.fromkeys(map(self._shown, histories))
        fresh = [history for history in shown if history not in self._vectors]
        for some in think(self.policy, fresh, thinking=True) if fresh else ():
            texts = [text.replace(THINK_START, "").replace(THINK_END, "") for text in some.thinking]
            vectors = torch.from_numpy(self.text.encode(texts)).float()
            self._vectors |= {fresh[row]: vector for row, vector in zip(some.rows, vectors, strict=True)}

    def best(self, histories: Sequence[Sequence[int]], users: Sequence[str], k: int) -> Int[Tensor, "B k"]:
        """The items with the largest products."""
        return (self.users(histories) @ self.table().T).topk(k).indices

    def _shown(self, history: Sequence[int]) -> tuple[int, ...]:
        return tuple(history[-self.max_history :])

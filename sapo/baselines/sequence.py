"""What recommenders that read a history item by item have in common.

A model says at every position of a sequence what it expects next, as a state; the score of an item is the product of
the state and the item's row of a table. All positions of a training sequence are trained at once.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.nn.utils.rnn import pad_sequence

from sapo.baselines.fitting import FitConfig, Recommender
from sapo.data.interactions import Split
from sapo.errors import InputError


class SequenceModel(Recommender):
    """Sequences are padded at their ends with N; what a state knows must not depend on items after it.

    Args:
        num_items: N.
        users: names of users that a model may tell apart, by 1, 2, ...; 0 stands for anybody else.
        max_history: the longest sequence; of longer histories the last items are read.
        size: width of the items' embeddings.
    """

    def __init__(self, num_items: int, users: Sequence[str], max_history: int, size: int):
        super().__init__(num_items, max_history)
        self.user_numbers = {user: number for number, user in enumerate(users, start=1)}
        self.items = nn.Embedding(num_items + 1, size, padding_idx=num_items)

    losses: ClassVar[tuple[str, ...]] = ("softmax", "bce")

    @abstractmethod
    def forward(self, items: Int[Tensor, "B T"], users: Int[Tensor, "B"]) -> Float[Tensor, "B T D"]:
        """States."""

    def table(self) -> Float[Tensor, "N D"]:
        """A row for every item: the embedding by which it is read, unless a model says otherwise."""
        return self.items.weight[: self.num_items]

    def lengths(self, split: Split) -> list[int]:
        """An example is a user's training sequence; one of a single item teaches nothing."""
        return [len(sequence) if len(sequence) > 1 else 0 for sequence in split.sequences]

    def loss(self, split: Split, examples: list[int], config: FitConfig) -> Float[Tensor, ""]:
        """Of all positions of the sequences, cut to their last items."""
        whole = [split.sequences[row] for row in examples]
        sequences = [sequence[-self.max_history - 1 :] for sequence in whole]
        items, users = self.tensors([s[:-1] for s in sequences], [split.users[row] for row in examples])
        targets, _ = self.tensors([s[1:] for s in sequences], [])
        return loss_of(self, items, users, targets, whole, config.loss)

    def tensors(self, histories: Sequence[Sequence[int]], users: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Items (B, T) and users (B,) on the model's device."""
        device = next(self.parameters()).device
        items = [torch.tensor(history[-self.max_history :], dtype=torch.long) for history in histories]
        numbers = torch.tensor([self.user_numbers.get(user, 0) for user in users])
        return pad_sequence(items, batch_first=True, padding_value=self.num_items).to(device), numbers.to(device)

    def best(self, histories: Sequence[Sequence[int]], users: Sequence[str], k: int) -> Int[Tensor, "B k"]:
        """The items with the largest products of their rows and the last states."""
        items, numbers = self.tensors(histories, users)
        last = (items != self.num_items).sum(1) - 1
        states = self(items, numbers)[torch.arange(len(items), device=items.device), last]
        return (states @ self.table().T).topk(k).indices


def loss_of(
    model: SequenceModel,
    items: Int[Tensor, "B T"],
    users: Int[Tensor, "B"],
    targets: Int[Tensor, "B T"],
    sequences: list[list[int]],
    kind: str,
) -> Float[Tensor, ""]:
    """Mean over all positions that have a target."""
    real = targets != model.num_items
    states, table, following = model(items, users)[real], model.table(), targets[real]
    if kind == "softmax":
        return cross_entropy(states @ table.T, following)
    others = negatives(real, sequences, model.num_items).to(following.device)
    score = lambda item: (states * table[item]).sum(1)  # noqa: E731
    return (softplus(-score(following)) + softplus(score(others))).mean()


def negatives(real: Bool[Tensor, "B T"], sequences: list[list[int]], num_items: int) -> Int[Tensor, "P"]:
    """An item for each real position, uniform over those that the user's sequence does not hold.

    Raises:
        InputError: a sequence that holds every item.
    """
    if max(len(set(sequence)) for sequence in sequences) >= num_items:
        raise InputError("a training sequence holds every item, so none is left to be told from; use the softmax loss.")
    users = real.nonzero()[:, 0].cpu().numpy()
    taken = np.unique(np.concatenate([np.asarray(s) + num_items * user for user, s in enumerate(sequences)]))
    drawn = torch.randint(num_items, (len(users),)).numpy()
    while len(again := np.flatnonzero(np.isin(drawn + num_items * users, taken))):
        drawn[again] = torch.randint(num_items, (len(again),)).numpy()
    return torch.from_numpy(drawn)


def xavier(model: nn.Module) -> None:
    """Start all matrices, embeddings too, from Xavier's normal distribution."""
    for weights in model.parameters():
        if weights.dim() > 1:
            nn.init.xavier_normal_(weights)

"""What recommenders that read a history item by item have in common, and the one loop that fits any of them.

A model says at every position of a sequence what it expects next, as a state; the score of an item is the product of
the state and the item's row of a table. All positions of a training sequence are trained at once.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.nn.utils.rnn import pad_sequence

from sapo.analysis.evaluation import ranking_metrics
from sapo.data.interactions import Split
from sapo.errors import InputError
from sapo.progress import progress_bar

POOL = 64  # batches whose sequences are sorted by length together, so that little is padded


class SequenceModel(nn.Module, ABC):
    """Sequences are padded at their ends with N; what a state knows must not depend on items after it.

    Args:
        num_items: N.
        users: names of users that a model may tell apart, by 1, 2, ...; 0 stands for anybody else.
        max_history: the longest sequence; of longer histories the last items are read.
        size: width of the items' embeddings.
    """

    def __init__(self, num_items: int, users: Sequence[str], max_history: int, size: int):
        super().__init__()
        self.num_items, self.max_history = num_items, max_history
        self.user_numbers = {user: number for number, user in enumerate(users, start=1)}
        self.items = nn.Embedding(num_items + 1, size, padding_idx=num_items)

    @abstractmethod
    def forward(self, items: Int[Tensor, "B T"], users: Int[Tensor, "B"]) -> Float[Tensor, "B T D"]:
        """States."""

    def table(self) -> Float[Tensor, "N D"]:
        """A row for every item: the embedding by which it is read, unless a model says otherwise."""
        return self.items.weight[: self.num_items]

    def tensors(self, histories: Sequence[Sequence[int]], users: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Items (B, T) and users (B,) on the model's device."""
        device = next(self.parameters()).device
        items = [torch.tensor(history[-self.max_history :], dtype=torch.long) for history in histories]
        numbers = torch.tensor([self.user_numbers.get(user, 0) for user in users])
        return pad_sequence(items, batch_first=True, padding_value=self.num_items).to(device), numbers.to(device)

    @torch.no_grad()
    def rank(
        self, histories: Sequence[Sequence[int]], k: int, users: Sequence[str] | None = None, batch_size: int = 512
    ) -> Int[Tensor, "R k"]:
        """The k best items for every history, best first; items of the history are not removed.

        Args:
            users: whose histories they are; nobody that is known where None.

        Raises:
            InputError: k outside 1..N; a history without an item.
        """
        if not 1 <= k <= self.num_items:
            raise InputError(f"k is {k}; there are {self.num_items} items to rank.")
        if not all(histories):
            raise InputError("a history is empty; what comes next is read from its items.")
        names = [""] * len(histories) if users is None else users
        training = self.training
        self.eval()
        table = self.table()
        order = sorted(range(len(histories)), key=lambda row: len(histories[row]))
        ranked = torch.empty(len(histories), k, dtype=torch.long)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            items, numbers = self.tensors([histories[row] for row in part], [names[row] for row in part])
            last = (items != self.num_items).sum(1) - 1
            states = self(items, numbers)[torch.arange(len(part)), last]
            ranked[part] = (states @ table.T).topk(k).indices.cpu()
        self.train(training)
        return ranked


@dataclass(frozen=True)
class FitConfig:
    """How a model is fitted. An epoch is every training sequence once, cut to its last items."""

    loss: Literal["softmax", "bce"] = "softmax"
    """softmax: cross-entropy over all items. bce: binary cross-entropy of the next item and of one that is drawn from
    those that the user's training sequence does not hold."""
    epochs: int = 200
    """At most."""
    patience: int = 10
    """Validations in a row without a better NDCG@10 that end it."""
    validate_every: int = 1
    """Epochs from one to the next."""
    batch_size: int = 128
    """Sequences."""
    learning_rate: float = 1e-3
    """Of Adam, constant."""
    beta2: float = 0.999
    """Of Adam."""
    weight_decay: float = 0.0
    """Of Adam, as an L2 penalty."""


def fit(
    model: SequenceModel, split: Split, config: FitConfig, seed: int, title: str = "fit", valid_rows: int | None = None
) -> list[dict[str, float]]:
    """Train until validation NDCG@10 stops rising, and leave the model as it was at its best.

    Args:
        seed: of batches, negatives and dropout; weights are drawn before.
        valid_rows: how many rows validation reads (`Rows.sample`); all where None.

    Returns:
        epoch, loss and ndcg@10 of every validation.

    Raises:
        InputError: no training sequence of two items.
        FloatingPointError: the loss is not finite.
    """
    numbers = [row for row, sequence in enumerate(split.sequences) if len(sequence) > 1]
    if not numbers:
        raise InputError("no training sequence holds two items.")
    valid, places = split.valid.sample(valid_rows), min(10, model.num_items)
    optimizer = torch.optim.Adam(
        model.parameters(), config.learning_rate, betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )
    history: list[dict[str, float]] = []
    best, best_epoch, weights = -1.0, 0, model.state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        epochs = progress_bar(title, range(1, config.epochs + 1))
        for epoch in epochs:
            model.train()
            total = count = 0.0
            for rows in _batches([len(split.sequences[row]) for row in numbers], config.batch_size):
                chosen = [numbers[row] for row in rows]
                sequences = [split.sequences[row][-model.max_history - 1 :] for row in chosen]
                items, users = model.tensors([s[:-1] for s in sequences], [split.users[row] for row in chosen])
                targets, _ = model.tensors([s[1:] for s in sequences], [])
                loss = loss_of(model, items, users, targets, [split.sequences[row] for row in chosen], config.loss)
                if not loss.isfinite():
                    raise FloatingPointError(f"{title}: the loss is {loss.item()} in epoch {epoch}; use a lower rate.")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, count = total + loss.item() * len(rows), count + len(rows)
            if epoch % config.validate_every and epoch != config.epochs:
                continue
            ranked = model.rank(valid.history, places, valid.user)
            ndcg = ranking_metrics(ranked, torch.tensor(valid.target), (places,))[f"ndcg@{places}"]
            history.append({"epoch": epoch, "loss": total / count, "ndcg@10": ndcg})
            epochs.set_postfix_str(f"NDCG@10 {ndcg:.4f}", refresh=False)
            if ndcg > best:
                best, best_epoch, weights = ndcg, epoch, copy.deepcopy(model.state_dict())
            elif epoch - best_epoch >= config.patience * config.validate_every:
                break
    model.load_state_dict(weights)
    return history


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Every sequence once, in random batches of similar lengths."""
    order = torch.randperm(len(lengths)).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), POOL * batch_size):
        pool = sorted(order[start : start + POOL * batch_size], key=lambda row: lengths[row])
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    for batch in torch.randperm(len(batches)).tolist():
        yield batches[batch]


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

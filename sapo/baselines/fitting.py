"""The one loop that fits any recommender, and what it asks of one."""

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sapo.common.files import disk_errors, write_atomically
from sapo.common.progress import progress_bar
from sapo.data.interactions import Split
from sapo.errors import InputError
from sapo.evaluation.evaluate import ranking_metrics

POOL = 64  # batches whose examples are sorted by length together, so that little is padded


class Recommender(nn.Module, ABC):
    """A model that ranks all items after a history.

    Args:
        num_items: N.
        max_history: of longer histories the last items are read.

    Attributes:
        reach: how many items `rank` gives without a wider search.
    """

    ranked_together = 512  # histories of similar lengths
    losses: ClassVar[tuple[str, ...]] = ("softmax",)  # that it knows

    def __init__(self, num_items: int, max_history: int):
        super().__init__()
        self.num_items, self.max_history, self.reach = num_items, max_history, num_items

    def lengths(self, split: Split) -> list[int]:
        """Length of every training example, 0 where there is nothing to learn; an example is a training row unless a
        model says otherwise."""
        return [min(len(history), self.max_history) for history in split.train.history]

    @abstractmethod
    def loss(self, split: Split, examples: list[int], config: "FitConfig") -> Float[Tensor, ""]:
        """Of a batch of examples, by their numbers."""

    @abstractmethod
    def best(self, histories: Sequence[Sequence[int]], users: Sequence[str], k: int) -> Int[Tensor, "B k"]:
        """The k best items of a batch, as `rank` gives them for any number of histories."""

    @torch.no_grad()
    def rank(
        self, histories: Sequence[Sequence[int]], k: int, users: Sequence[str] | None = None
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
        order = sorted(range(len(histories)), key=lambda row: len(histories[row]))
        ranked = torch.empty(len(histories), k, dtype=torch.long)
        for start in range(0, len(order), self.ranked_together):
            part = order[start : start + self.ranked_together]
            ranked[part] = self.best([histories[row] for row in part], [names[row] for row in part], k).cpu()
        self.train(training)
        return ranked


@dataclass(frozen=True)
class FitConfig:
    """How a model is fitted. An epoch is every training example once."""

    loss: Literal["softmax", "bce", "reward"] = "softmax"
    """softmax: cross-entropy over all items, or what a model has for it. bce, of models that read item by item: binary
    cross-entropy of the next item and of one that is drawn from those that the user's training sequence does not hold.
    reward, of models that think: policy gradients."""
    epochs: int = 200
    """At most."""
    patience: int = 10
    """Validations in a row without a better NDCG@10 that end it."""
    examples: int | None = None
    """How many an epoch has, drawn anew; all where None."""
    keep_start: bool = False
    """Validate before the first epoch too, so that a model that only gets worse stays as it came."""
    validate_every: int = 1
    """Epochs from one to the next."""
    valid_rows: int | None = None
    """How many rows validation reads (`Rows.sample`); all where None."""
    batch_size: int = 128
    """Examples."""
    learning_rate: float = 1e-3
    """Of Adam, at its highest."""
    schedule: Literal["constant", "linear"] = "constant"
    """linear: the rate rises over the first tenth of the updates of all `epochs`, then falls, to 0 after the last."""
    beta2: float = 0.999
    """Of Adam."""
    weight_decay: float = 0.0
    """Of Adam, as an L2 penalty."""
    half: bool = False
    """Multiply matrices in bfloat16 while training (`torch.autocast`), up to three times as fast, where the processor
    has instructions for it (`multiplies_half`); weights and validation stay in float32."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "examples", "validate_every", "valid_rows", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; at least 1 fits.")
        if self.schedule not in ("constant", "linear"):
            raise InputError(f"schedule is {self.schedule!r}; constant or linear fits.")


def fit(
    model: Recommender,
    split: Split,
    config: FitConfig,
    seed: int,
    title: str = "fit",
    checkpoint: str | Path | None = None,
) -> list[dict[str, float]]:
    """Train until validation NDCG@10 stops rising, and leave the model as it was at its best.

    Args:
        seed: of batches, negatives and dropout; weights are drawn before.
        checkpoint: file that is written at every validation. Where it is there, the fit goes on from it, to the weights
            of one that was never stopped.

    Returns:
        epoch, updates and seconds so far, mean loss since the last one and ndcg@10 of every validation.

    Raises:
        InputError: nothing to learn from; a loss that the model does not know; a checkpoint that is none of this fit.
        FloatingPointError: the loss is not finite.
    """
    began = time.monotonic()
    if config.loss not in model.losses:
        raise InputError(f"{type(model).__name__} has no loss {config.loss!r}; it knows {', '.join(model.losses)}.")
    lengths = model.lengths(split)
    examples = [row for row, length in enumerate(lengths) if length]
    if not examples:
        raise InputError("no training sequence holds two items.")
    valid, places = split.valid.sample(config.valid_rows), min(10, model.num_items)
    optimizer = torch.optim.Adam(
        model.parameters(), config.learning_rate, betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )
    device = next(model.parameters()).device.type
    half = config.half and multiplies_half(device)
    all_updates = config.epochs * math.ceil(min(len(examples), config.examples or len(examples)) / config.batch_size)
    identity = {"config": asdict(config), "seed": seed, "data": split.data_hash}
    history: list[dict[str, float]] = []
    weights = model.state_dict()
    total, count = 0.0, 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if checkpoint is not None and Path(checkpoint).is_file():
            history, weights = _resume(Path(checkpoint), identity, model, optimizer)
        updates, earlier = (int(history[-1]["updates"]), history[-1]["seconds"]) if history else (0, 0.0)
        first = int(history[-1]["epoch"]) + 1 if history else 1 - config.keep_start
        epochs = progress_bar(title, range(first, config.epochs + 1), config.epochs, max(first - 1, 0))
        for epoch in epochs:
            if history and history[-1]["epoch"] - _best(history)["epoch"] >= config.patience * config.validate_every:
                break
            model.train()
            drawn = _batches([lengths[row] for row in examples], config.batch_size, config.examples)
            for batch in drawn if epoch else ():
                with torch.autocast(device, torch.bfloat16, enabled=half):
                    loss = model.loss(split, [examples[place] for place in batch], config)
                if not loss.isfinite():
                    raise FloatingPointError(f"{title}: the loss is {loss.item()} in epoch {epoch}; use a lower rate.")
                if config.schedule == "linear":
                    optimizer.param_groups[0]["lr"] = config.learning_rate * _linear(updates, all_updates)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                updates, total, count = updates + 1, total + loss.item() * len(batch), count + len(batch)
            if epoch % config.validate_every and epoch != config.epochs:
                continue
            ranked = model.rank(valid.history, places, valid.user)
            ndcg = ranking_metrics(ranked, torch.tensor(valid.target), (places,))[f"ndcg@{places}"]
            mean, seconds = total / count if count else math.nan, earlier + time.monotonic() - began
            row = {"epoch": epoch, "updates": updates, "seconds": seconds, "loss": mean, "ndcg@10": ndcg}
            history.append(row)
            total, count = 0.0, 0
            epochs.set_postfix_str(f"NDCG@10 {ndcg:.4f}", refresh=False)
            if _best(history) is row:
                weights = copy.deepcopy(model.state_dict())
            if checkpoint is not None:
                _save(Path(checkpoint), identity, history, weights, model, optimizer)
    model.load_state_dict(weights)
    return history


def multiplies_half(device: str) -> bool:
    """Whether a kind of device has instructions for products of bfloat16. A CPU without them takes many times as long
    as in float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def _linear(update: int, updates: int) -> float:
    """Of the highest learning rate, for an update, counted from 0, of so many: (update + 1) / rise up to the top, then
    down to 1 / (updates - rise + 1) of it."""
    rise = max(updates // 10, 1)
    return min((update + 1) / rise, (updates - update) / (updates - rise + 1))


def _best(history: list[dict[str, float]]) -> dict[str, float]:
    return max(history, key=lambda row: row["ndcg@10"])  # of equal ones the first


def _save(
    path: Path,
    identity: dict[str, Any],
    history: list[dict[str, float]],
    best: dict[str, Tensor],
    model: Recommender,
    optimizer: torch.optim.Adam,
) -> None:
    state = {
        "identity": identity,
        "history": history,
        "best": best,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with write_atomically(path) as partial, disk_errors(path):
        torch.save(state, partial)


def _resume(
    path: Path, identity: dict[str, Any], model: Recommender, optimizer: torch.optim.Adam
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """History and best weights so far; the rest is put where it belongs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state["identity"] != identity:
            raise ValueError(f"it is not of {identity}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return state["history"], state["best"]
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError, UnpicklingError) as error:
        raise InputError(f"{path} is no checkpoint of this fit; remove it, and the fit starts over.") from error


def _batches(lengths: list[int], batch_size: int, most: int | None = None) -> Iterator[list[int]]:
    """Every example once, or so many of them, in random batches of similar lengths."""
    order = torch.randperm(len(lengths)).tolist()[:most]
    batches: list[list[int]] = []
    for start in range(0, len(order), POOL * batch_size):
        pool = sorted(order[start : start + POOL * batch_size], key=lambda row: lengths[row])
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    for batch in torch.randperm(len(batches)).tolist():
        yield batches[batch]

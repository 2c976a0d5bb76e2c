"""RQ-VAE: an autoencoder whose bottleneck is a sum of K codes (arXiv 2203.01941; for semantic IDs TIGER, 2305.05065).

    z = Enc(x);  r_1 = z;  c_k = argmin_c |r_k - e_kc|;  r_{k+1} = r_k - e_k c_k;  z' = sum_k e_k c_k;  x' = Dec(z')
    loss = mse(x', x) + mean over k of [ mse(sg(r_k), e) + beta mse(r_k, sg(e)) ]

The decoder sees z + sg(z' - z), so that its gradient reaches the encoder. Two things keep codes from dying, which is
how RQ-VAEs fail: codebooks start as centroids of all encoded items, and a code that no item of an epoch took starts
again at what some item has left over.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sapo.common.progress import progress_bar
from sapo.errors import InputError
from sapo.semantic_ids.collisions import sinkhorn
from sapo.semantic_ids.residual_kmeans import distances, kmeans, last_distances, nearest, residual_codes


@dataclass
class RQVAE:
    """A tokenizer: `fit` gives the codes of its vectors, `encode` those of others.

    Args:
        level_sizes: codes of each level, at most as many as items.
        hidden: widths of the encoder's layers, of the decoder's in reverse.
        size: width of the bottleneck and the codebooks.
        commitment: beta.
        epochs, batch_size, learning_rate, weight_decay: of AdamW, the rate falling linearly to 0.
        sinkhorn_epsilon: in training the last level's codes are taken in equal shares, the more strictly the smaller it
            is (LC-Rec, arXiv 2311.09049); 0 takes the nearest.
        seed: of weights, batches and restarts.
    """

    level_sizes: tuple[int, ...] = (256, 256, 256)
    hidden: tuple[int, ...] = (512, 256, 128)
    size: int = 32
    commitment: float = 0.25
    epochs: int = 100
    batch_size: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    sinkhorn_epsilon: float = 0.0
    seed: int = 0
    network: "Autoencoder | None" = field(default=None, repr=False)

    def fit(self, vectors: Float[Tensor, "N D"], progress: bool = False) -> Int[Tensor, "N K"]:
        """Learn the network and its codebooks.

        Raises:
            InputError: fewer items than codes; a vector that is not finite.
            FloatingPointError: the loss is not finite.
        """
        if len(vectors) < max(self.level_sizes):
            raise InputError(f"{len(vectors)} items are fewer than {max(self.level_sizes)} codes; use fewer codes.")
        if not vectors.isfinite().all():
            raise InputError(f"the vector of item {int((~vectors.isfinite()).any(1).nonzero()[0])} is not finite.")
        vectors = vectors.float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = Autoencoder(vectors.shape[1], self.hidden, self.size, self.level_sizes)
            self._start_codebooks(vectors)
            self._train(vectors, progress)
        return self.encode(vectors)

    @torch.no_grad()
    def encode(self, vectors: Float[Tensor, "N D"]) -> Int[Tensor, "N K"]:
        """Codes of any vectors: the nearest of each level."""
        return residual_codes(self._trained.encoder(vectors.float()), list(self._trained.codebooks))

    @torch.no_grad()
    def reconstruct(self, codes: Int[Tensor, "N K"]) -> Float[Tensor, "N D"]:
        """The vectors that codes stand for."""
        books = zip(self._trained.codebooks, codes.T, strict=True)
        return self._trained.decoder(torch.stack([book[column] for book, column in books]).sum(0))

    @torch.no_grad()
    def last_costs(self, vectors: Float[Tensor, "N D"], codes: Int[Tensor, "N K"]) -> Float[Tensor, "N C"]:
        """Squared distances of what is left for the last level to each of its codes."""
        return last_distances(self._trained.encoder(vectors.float()), list(self._trained.codebooks), codes)

    def state(self) -> dict[str, Tensor]:
        """What `restored` needs beside the arguments."""
        return dict(self._trained.state_dict())

    def restored(self, state: dict[str, Tensor]) -> Self:
        """Itself, with what was learnt before."""
        width = state["encoder.0.weight"].shape[1]
        self.network = Autoencoder(width, self.hidden, self.size, self.level_sizes)
        self.network.load_state_dict(state)
        return self

    @property
    def _trained(self) -> "Autoencoder":
        if self.network is None:
            raise InputError("this tokenizer has not been fitted.")
        return self.network

    @torch.no_grad()
    def _start_codebooks(self, vectors: Float[Tensor, "N D"]) -> None:
        residual = self._trained.encoder(vectors)
        for level, book in enumerate(self._trained.codebooks):
            centroids, codes = kmeans(residual, len(book), iterations=100, seed=self.seed + level)
            book.copy_(centroids)
            residual = residual - centroids[codes]

    def _train(self, vectors: Float[Tensor, "N D"], progress: bool) -> None:
        optimizer = torch.optim.AdamW(self._trained.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        batches = -(-len(vectors) // self.batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.epochs * batches)
        used = [torch.zeros(len(book), dtype=torch.bool) for book in self._trained.codebooks]
        epochs = range(self.epochs)
        for epoch in progress_bar(type(self).__name__, epochs) if progress else epochs:
            self._begin_epoch()
            for rows in torch.randperm(len(vectors)).tensor_split(
                batches
            ):  # even: equal shares of few items mean little
                loss, quantized = self._loss(vectors, rows)
                if not loss.isfinite():
                    raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch + 1}; use a lower rate.")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                for level_used, codes in zip(used, quantized.codes.T, strict=True):
                    level_used[codes] = True
            if epoch < 0.8 * self.epochs:  # what starts again later would not settle
                self._restart(used, vectors)
            for level_used in used:
                level_used.zero_()

    def _begin_epoch(self) -> None:
        """Nothing here; LETTER groups its codes."""

    def _loss(self, vectors: Float[Tensor, "N D"], rows: Int[Tensor, "B"]) -> tuple[Float[Tensor, ""], "Quantized"]:
        batch = vectors[rows]
        quantized = self._trained.quantize(self._trained.encoder(batch), self.sinkhorn_epsilon)
        loss = mse_loss(self._trained.decoder(quantized.straight_through), batch)
        return loss + quantized.loss(self.commitment), quantized

    @torch.no_grad()
    def _restart(self, used: list[Tensor], vectors: Float[Tensor, "N D"]) -> None:
        """Codes that no item took go to what items have left over, a different one each."""
        if all(level_used.all() for level_used in used):
            return
        residual = self._trained.encoder(vectors)
        for book, level_used in zip(self._trained.codebooks, used, strict=True):
            dead = (~level_used).nonzero()[:, 0]
            book[dead] = residual[torch.randperm(len(residual))[: len(dead)]]
            residual = residual - book[nearest(residual, book)]


@dataclass
class Quantized:
    """What each level does to a batch: its residuals, the code vectors they got, and which."""

    residuals: list[Float[Tensor, "B d"]]
    vectors: list[Float[Tensor, "B d"]]
    codes: Int[Tensor, "B K"]
    straight_through: Float[Tensor, "B d"]

    def loss(self, commitment: float) -> Float[Tensor, ""]:
        """Codes move to residuals, and residuals, by `commitment`, to codes."""
        levels = [
            mse_loss(vector, residual.detach()) + commitment * mse_loss(residual, vector.detach())
            for residual, vector in zip(self.residuals, self.vectors, strict=True)
        ]
        return torch.stack(levels).mean()


class Autoencoder(nn.Module):
    """Encoder, codebooks and decoder."""

    def __init__(self, width: int, hidden: tuple[int, ...], size: int, level_sizes: tuple[int, ...]):
        super().__init__()
        self.encoder = _layers((width, *hidden, size))
        self.decoder = _layers((size, *reversed(hidden), width))
        self.codebooks = nn.ParameterList([torch.zeros(codes, size) for codes in level_sizes])

    def quantize(self, encoded: Float[Tensor, "B d"], sinkhorn_epsilon: float = 0.0) -> Quantized:
        """Residuals and codes; a residual carries the gradient of what was encoded, not that of codes before it."""
        residual, residuals, vectors, codes = encoded, [], [], []
        for level, book in enumerate(self.codebooks):
            with torch.no_grad():
                if sinkhorn_epsilon and level == len(self.codebooks) - 1:
                    chosen = sinkhorn(distances(residual, book), sinkhorn_epsilon).argmax(1)
                else:
                    chosen = nearest(residual, book)
            residuals.append(residual)
            vectors.append(book[chosen])
            codes.append(chosen)
            residual = residual - vectors[-1].detach()
        total = torch.stack(vectors).sum(0)
        return Quantized(residuals, vectors, torch.stack(codes, 1), encoded + (total - encoded).detach())


def _layers(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[Any] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
        nn.init.xavier_normal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])

"""LETTER (arXiv 2405.07314): an RQ-VAE whose sums of codes look like who takes items together, with diverse codes.

loss of RQ-VAE + alpha L_CF + beta mean over levels of L_Div
L_CF  = cross-entropy of <z'_i, h_j> over the items j of the batch, target i; h are frozen collaborative vectors;
        no temperature and no normalisation, and the gradient goes straight through to the encoder
L_Div = cross-entropy of <e_c, e_k> over the other codes k of the level, target another code of the group of c;
        groups are balanced clusters of the code vectors, anew each epoch

Where the authors' code differs: its groups hold 10 to 60 of 256 codes each, and ours are equal; its codebooks start as
size-constrained centroids, ours as k-means'; its collaborative vectors are SASRec's embeddings, ours have length 1; it
learns for 20,000 epochs at a rate of .001 from vectors of a language model, and so does LC-Rec for 10,000. An index
of either is made by rounds of equal shares among items that collide (`collisions.share_out`).
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sapo.errors import InputError
from sapo.semantic_ids.residual_kmeans import balanced_kmeans
from sapo.semantic_ids.rqvae import RQVAE, Quantized


@dataclass
class Letter(RQVAE):
    """A tokenizer with RQVAE's arguments and these.

    Args:
        collaborative: a vector of `size` numbers for each item that is fitted, of training sequences only.
        alpha, beta: weights of the collaborative and of the diversity loss.
        groups: clusters of a level's codes.
    """

    level_sizes: tuple[int, ...] = (256, 256, 256, 256)
    sinkhorn_epsilon: float = 0.003
    alpha: float = 0.02
    beta: float = 1e-4
    groups: int = 10
    collaborative: Float[Tensor, "N d"] | None = field(default=None, repr=False)

    def fit(self, vectors: Float[Tensor, "N D"], progress: bool = False) -> Int[Tensor, "N K"]:
        """Learn the network and its codebooks.

        Raises:
            InputError: as RQVAE; no collaborative vectors, or others than (N, size).
        """
        expected = (len(vectors), self.size)
        if self.collaborative is None or tuple(self.collaborative.shape) != expected:
            shape = None if self.collaborative is None else tuple(self.collaborative.shape)
            raise InputError(
                f"collaborative is {shape}; LETTER needs a vector of the bottleneck's size each: {expected}."
            )
        return super().fit(vectors, progress)

    def _begin_epoch(self) -> None:
        self._groups = [
            balanced_kmeans(book.detach(), max(1, min(self.groups, len(book) // 2)), iterations=10, seed=self.seed)[1]
            for book in self._trained.codebooks
        ]

    def _loss(self, vectors: Float[Tensor, "N D"], rows: Int[Tensor, "B"]) -> tuple[Float[Tensor, ""], Quantized]:
        assert self.collaborative is not None
        loss, quantized = super()._loss(vectors, rows)
        loss = loss + self.alpha * collaborative_loss(quantized.straight_through, self.collaborative[rows])
        diversity = [
            diversity_loss(book, codes, groups)
            for book, codes, groups in zip(self._trained.codebooks, quantized.codes.T, self._groups, strict=True)
        ]
        return loss + self.beta * torch.stack(diversity).mean(), quantized


def collaborative_loss(sums: Float[Tensor, "B d"], vectors: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
    """Tells by an item's sum of codes which of the batch's collaborative vectors is its own. Items that no training
    sequence holds have none (zeros), and take no part."""
    known = vectors.any(1)
    if not known.any():
        return sums.new_zeros(())
    return cross_entropy(sums[known] @ vectors[known].T, torch.arange(int(known.sum())))


def diversity_loss(book: Float[Tensor, "C d"], codes: Int[Tensor, "B"], groups: Int[Tensor, "C"]) -> Float[Tensor, ""]:
    """Pulls each item's code towards a random other one of its group, and away from all the rest. A code that is alone
    in its group has nothing to be pulled to."""
    together = groups[codes][:, None] == groups[None]  # (B, C)
    together[torch.arange(len(codes)), codes] = False
    kept = together.any(1)
    if not kept.any():
        return book.new_zeros(())
    codes, together = codes[kept], together[kept]
    target = together.float().multinomial(1)[:, 0]
    logits = (book[codes] @ book.T).scatter(1, codes[:, None], float("-inf"))
    return cross_entropy(logits, target)

"""Residual k-means: a code is the nearest centroid of what the codes before it have left over.

Plain, or balanced as in OneRec (arXiv 2502.18965, alg. 1), where every code of a level has as many items.
"""

import warnings
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.common.progress import progress_bar
from sapo.errors import InputError


@dataclass
class ResidualKMeans:
    """A tokenizer: `fit` gives the codes of its vectors, `encode` those of others.

    Args:
        level_sizes: codes of each level, at most as many as items.
        balanced: whether codes of a level have equally many items, give or take one.
        iterations: of Lloyd's algorithm, at most.
        starts: of plain k-means on each level, of which the one with the least error is kept.
        seed: of the first centroids.
    """

    level_sizes: tuple[int, ...] = (256, 256, 256)
    balanced: bool = False
    iterations: int = 50
    starts: int = 4
    seed: int = 0
    codebooks: list[Float[Tensor, "C D"]] = field(default_factory=list, repr=False)

    def fit(self, vectors: Float[Tensor, "N D"], progress: bool = False) -> Int[Tensor, "N K"]:
        """Learn the centroids of every level.

        Raises:
            InputError: fewer items than codes.
        """
        if len(vectors) < max(self.level_sizes):
            raise InputError(f"{len(vectors)} items are fewer than {max(self.level_sizes)} codes; use fewer codes.")
        residual, codes = vectors.float(), []
        self.codebooks = []
        levels = range(len(self.level_sizes))
        for level in progress_bar("residual k-means", levels) if progress else levels:
            settings = (residual, self.level_sizes[level], self.iterations, self.seed + level)
            centroids, assigned = balanced_kmeans(*settings) if self.balanced else kmeans(*settings, self.starts)
            self.codebooks.append(centroids)
            codes.append(assigned)
            residual = left_over(residual, centroids[assigned])
        return torch.stack(codes, 1)

    def encode(self, vectors: Float[Tensor, "N D"]) -> Int[Tensor, "N K"]:
        """Codes of any vectors: the nearest centroid of each level, balanced or not."""
        return residual_codes(vectors.float(), self.codebooks)

    def reconstruct(self, codes: Int[Tensor, "N K"]) -> Float[Tensor, "N D"]:
        """The vectors that codes stand for."""
        return torch.stack([book[column] for book, column in zip(self.codebooks, codes.T, strict=True)]).sum(0)

    def last_costs(self, vectors: Float[Tensor, "N D"], codes: Int[Tensor, "N K"]) -> Float[Tensor, "N C"]:
        """Squared distances of what is left for the last level to each of its codes."""
        return last_distances(vectors.float(), self.codebooks, codes)

    def state(self) -> dict[str, Tensor]:
        """What `restored` needs beside the arguments."""
        return {f"codebook_{level}": book for level, book in enumerate(self.codebooks)}

    def restored(self, state: dict[str, Tensor]) -> Self:
        """Itself, with what was learnt before."""
        self.codebooks = [state[f"codebook_{level}"] for level in range(len(self.level_sizes))]
        return self


def residual_codes(vectors: Float[Tensor, "N D"], codebooks: list[Float[Tensor, "C D"]]) -> Int[Tensor, "N K"]:
    """The nearest code of each level for what the levels before have left over."""
    codes, residual = [], vectors
    for book in codebooks:
        codes.append(nearest(residual, book))
        residual = left_over(residual, book[codes[-1]])
    return torch.stack(codes, 1)


def left_over(vectors: Float[Tensor, "N D"], centroids: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """What their centroids leave of vectors: nothing, rather than its rounding, of those that are theirs alone."""
    residual = vectors - centroids
    rounding = residual.norm(dim=1, keepdim=True) < 1e-5 * vectors.norm(dim=1, keepdim=True)
    return residual.masked_fill(rounding, 0)


def last_distances(
    vectors: Float[Tensor, "N D"], codebooks: list[Float[Tensor, "C D"]], codes: Int[Tensor, "N K"]
) -> Float[Tensor, "N C"]:
    """Distances to the last level's codes, of what the codes before have left over."""
    for book, column in zip(codebooks[:-1], codes.T, strict=False):
        vectors = left_over(vectors, book[column])
    return distances(vectors, codebooks[-1])


def nearest(vectors: Float[Tensor, "N D"], centroids: Float[Tensor, "C D"]) -> Int[Tensor, "N"]:
    """The closest centroid of each vector; of equally close ones, the first."""
    norms = centroids.pow(2).sum(1)  # |vector|^2 is the same for all of them
    return torch.cat([(norms - 2 * part @ centroids.T).argmin(1) for part in vectors.split(8192)])


def distances(vectors: Float[Tensor, "N D"], centroids: Float[Tensor, "C D"]) -> Float[Tensor, "N C"]:
    """Squared Euclidean distances."""
    return centroids.pow(2).sum(1) - 2 * vectors @ centroids.T + vectors.pow(2).sum(1, keepdim=True)


def kmeans(
    vectors: Float[Tensor, "N D"], clusters: int, iterations: int, seed: int, starts: int = 1
) -> tuple[Float[Tensor, "C D"], Int[Tensor, "N"]]:
    """Lloyd's algorithm from k-means++ centroids (scikit-learn's), the best of so many starts; the centroids, and the
    nearest of each vector."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # items that are alike leave codes over
        model = KMeans(clusters, n_init=starts, max_iter=iterations, random_state=seed).fit(vectors.numpy())
    centroids = torch.from_numpy(model.cluster_centers_.astype(np.float32))
    return centroids, nearest(vectors, centroids)


def balanced_kmeans(
    vectors: Float[Tensor, "N D"], clusters: int, iterations: int, seed: int
) -> tuple[Float[Tensor, "C D"], Int[Tensor, "N"]]:
    """Clusters whose sizes differ by one at most (OneRec, alg. 1).

    In turn, each takes the nearest of the vectors that are left; then all move to their means, until nothing changes.
    The order of clusters is part of it.
    """
    centroids, assigned = kmeans(vectors, clusters, iterations, seed)
    for _ in range(iterations):
        before, free = assigned, torch.ones(len(vectors), dtype=torch.bool)
        assigned = torch.empty_like(assigned)
        for cluster, away in enumerate(distances(vectors, centroids).T.contiguous()):
            # rounded up, so that the last ones are not the larger
            share = -(-int(free.sum()) // (clusters - cluster))
            taken = away.masked_fill_(~free, float("inf")).topk(share, largest=False, sorted=False).indices
            assigned[taken], free[taken] = cluster, False
        sums = torch.zeros_like(centroids).index_add_(0, assigned, vectors)
        centroids = sums / torch.bincount(assigned, minlength=clusters)[:, None]
        if torch.equal(assigned, before):
            break
    return centroids, assigned

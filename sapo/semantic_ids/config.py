"""How items get their SIDs: the settings alone, so that the command line need not load what they set.

rkmeans            residual k-means
rkmeans_balanced   the same with equal shares (OneRec, arXiv 2502.18965)
rqvae              RQ-VAE (TIGER, arXiv 2305.05065)
lcrec              RQ-VAE whose last level is shared equally (LC-Rec, arXiv 2311.09049)
letter             RQ-VAE that also looks at who takes what together, with diverse codes (arXiv 2405.07314)
"""

from dataclasses import dataclass
from typing import Literal

Method = Literal["rkmeans", "rkmeans_balanced", "rqvae", "lcrec", "letter"]


@dataclass(frozen=True)
class TokenizerConfig:
    """How items get their SIDs."""

    method: Method = "rqvae"
    """rkmeans, rkmeans_balanced, rqvae, lcrec or letter."""
    levels: tuple[int, ...] | None = None
    """Codes of each level, without an extra one for collisions; three levels of 256, or of fewer for a small catalogue,
    where left out."""
    vectors: str = "tfidf"
    """tfidf, or the name or folder of a sentence-transformers model."""
    collisions: Literal["reassign", "extra_token", "leave"] = "reassign"
    """What happens to items that would share a SID: the nearest free code of the last level, a level that counts them,
    or nothing."""
    epochs: int = 100
    """Of the methods that learn by gradients."""
    seed: int = 0
    """Of everything drawn."""

"""How items get their SIDs: the settings alone, so that the command line need not load what they set.

rkmeans            residual k-means
rkmeans_balanced   the same with equal shares (OneRec, arXiv 2502.18965)
rqvae              RQ-VAE (TIGER, arXiv 2305.05065)
lcrec              RQ-VAE whose last level is shared equally (LC-Rec, arXiv 2311.09049)
letter             RQ-VAE that also looks at who takes what together, with diverse codes (arXiv 2405.07314)
"""

from dataclasses import dataclass
from typing import Literal

from sapo.errors import InputError

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
    collisions: Literal["reassign", "share_out", "extra_token", "leave"] = "reassign"
    """What happens to items that would share a SID: the nearest free code of the last level, equal shares of its codes
    as LC-Rec and LETTER give them, a level that counts them, or nothing."""
    epochs: int = 100
    """Of the methods that learn by gradients."""
    seed: int = 0
    """Of everything drawn."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError(f"epochs is {self.epochs}; at least 1 fits.")
        if self.levels is None:
            return
        most = 4 if self.collisions == "extra_token" else 5
        if not 2 <= len(self.levels) <= most or min(self.levels) < 2:
            more = ", one of which is the extra token" if most == 4 else ""
            raise InputError(f"levels is {self.levels}; a SID has 2 to 5 levels{more}, of at least 2 codes each.")

"""GRU4Rec (arXiv 1511.06939): a recurrent net over the history, in the form that RecBole runs and most tables report.

The authors' own code trains on sessions side by side, scores sampled items and has losses of its own; this one reads
each sequence from its start and trains all positions with a softmax over all items. So it is not their program, and
2307.14956 tells how much third-party versions differ from it.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from sapo.baselines.sequence import SequenceModel, xavier


class GRU4Rec(SequenceModel):
    """A SequenceModel.

    Args:
        size: width of items' embeddings.
        hidden: width of the recurrent state, which a dense layer brings down to `size`.
        dropout: of what is read.
    """

    def __init__(
        self,
        num_items: int,
        users: Sequence[str] = (),
        max_history: int = 50,
        size: int = 64,
        hidden: int = 128,
        dropout: float = 0.3,
    ):
        super().__init__(num_items, users, max_history, size)
        self.dropout = nn.Dropout(dropout)
        self.recurrent = nn.GRU(size, hidden, bias=False, batch_first=True)
        self.dense = nn.Linear(hidden, size)
        xavier(self)

    def forward(self, items: Int[Tensor, "B T"], users: Int[Tensor, "B"]) -> Float[Tensor, "B T D"]:
        """States."""
        states, _ = self.recurrent(self.dropout(self.items(items)))
        return self.dense(states)

"""Caser (WSDM 2018): convolutions over the last items as over an image of L rows and D columns, and the user.

Horizontal filters see h whole items in a row, for every h up to L, and keep their largest answer; vertical ones are
weighted sums over the L items. Both, through a dense layer, and the user's embedding meet an item's row of twice the
width. Users without training sequences, whom a cut in time brings, share one embedding, which is never trained and 0;
where they are many the model does better without users (`personal=False`), which is how MiniOneRec's row is made.

The authors start all embeddings at N(0, 1/D). What is read starts at N(0, 1) here: from a start so small the model
learns what is popular, and then for many epochs nothing more, so that whoever watches validation stops it there.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from sapo.baselines.sequence import SequenceModel


class Caser(SequenceModel):
    """A SequenceModel.

    Args:
        window: L, items that are seen.
        size: D.
        horizontal, vertical: filters of each height, and of full height.
        dropout: of what the filters say.
        personal: whether users have embeddings.
    """

    def __init__(
        self,
        num_items: int,
        users: Sequence[str] = (),
        max_history: int = 50,
        window: int = 5,
        size: int = 64,
        horizontal: int = 16,
        vertical: int = 4,
        dropout: float = 0.5,
        personal: bool = True,
    ):
        super().__init__(num_items, users, max_history, size)
        self.window = window
        self.people = nn.Embedding(len(users) + 1, size, padding_idx=0) if personal else None
        self.across = nn.ModuleList([nn.Conv2d(1, horizontal, (height, size)) for height in range(1, window + 1)])
        self.along = nn.Conv2d(1, vertical, (window, 1))
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(horizontal * window + vertical * size, size)
        self.scores = nn.Embedding(num_items, 2 * size if personal else size)
        self.bias = nn.Parameter(torch.zeros(num_items, 1))
        for embedding in filter(None, (self.people, self.scores)):
            nn.init.normal_(embedding.weight, std=1 / embedding.embedding_dim)
        if self.people is not None:
            self.people.weight.data[0] = 0

    def forward(self, items: Int[Tensor, "B T"], users: Int[Tensor, "B"]) -> Float[Tensor, "B T S"]:
        """States: what the filters say of the items up to a position, the user, and 1 for the bias."""
        windows = pad(items, (self.window - 1, 0), value=self.num_items).unfold(1, self.window, 1)
        seen = windows != self.num_items
        image = self.items(windows).flatten(0, 1)[:, None]  # (B T, 1, L, D)
        said = [self._largest(filters(image)[..., 0], seen.flatten(0, 1)) for filters in self.across]
        said.append(self.along(image).flatten(1))
        states = relu(self.dense(self.dropout(torch.cat(said, 1)))).unflatten(0, items.shape)
        parts = [states, torch.ones_like(states[..., :1])]
        if self.people is not None:
            parts.insert(1, self.people(users)[:, None].expand(-1, items.shape[1], -1))
        return torch.cat(parts, -1)

    def table(self) -> Float[Tensor, "N S"]:
        """Rows of their own, with the bias as the last column."""
        return torch.cat([self.scores.weight, self.bias], 1)

    @staticmethod
    def _largest(answers: Float[Tensor, "P F H"], seen: Tensor) -> Float[Tensor, "P F"]:
        """Over places that hold an item; a filter's last item is one wherever the window has an item there."""
        places = seen[:, seen.shape[1] - answers.shape[2] :]  # of the last item under the filter
        return relu(answers).masked_fill(~places[:, None], 0).amax(2)

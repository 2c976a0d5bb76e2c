"""SASRec (arXiv 1808.09781): self-attention over the history.

As its authors' code has it: LayerNorm of the query alone, whose normed values also go around the attention; attention
without a projection at its end; a feed-forward net as wide as the states; one table for items read and scored; and
positions that count back from the end of a sequence. Its loss is binary cross-entropy; with a softmax over all items,
which costs more, it is much stronger, and both are rows of our tables.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout, relu, scaled_dot_product_attention

from sapo.baselines.sequence import SequenceModel, xavier


class SASRec(SequenceModel):
    """A SequenceModel.

    Args:
        size: width of states.
        layers, heads: blocks, and heads of each.
        dropout: of inputs, attention weights and feed-forward nets.
    """

    def __init__(
        self,
        num_items: int,
        users: Sequence[str] = (),
        max_history: int = 50,
        size: int = 64,
        layers: int = 2,
        heads: int = 1,
        dropout: float = 0.5,
    ):
        super().__init__(num_items, users, max_history, size)
        self.positions = nn.Embedding(max_history, size)
        self.blocks = nn.ModuleList([Block(size, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(size, eps=1e-8)
        self.dropout = dropout
        xavier(self)

    def forward(self, items: Int[Tensor, "B T"], users: Int[Tensor, "B"]) -> Float[Tensor, "B T D"]:
        """States."""
        real = items != self.num_items
        back = (real.sum(1, keepdim=True) - 1 - torch.arange(items.shape[1], device=items.device)).clamp(min=0)
        states = self.items(items) * self.items.embedding_dim**0.5 + self.positions(back)
        states = dropout(states, self.dropout, self.training) * real[..., None]
        for block in self.blocks:
            states = block(states)
        return self.norm(states)


class Block(nn.Module):
    """Causal attention and a feed-forward net."""

    def __init__(self, size: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_net = nn.LayerNorm(size, eps=1e-8), nn.LayerNorm(size, eps=1e-8)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.inner, self.outer = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What the next block reads."""
        rate = self.dropout if self.training else 0.0
        normed = self.before_attention(states)
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        query, key, value = split(self.query(normed)), split(self.key(states)), split(self.value(states))
        heads = scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=rate)
        states = normed + heads.transpose(1, 2).flatten(2)
        normed = self.before_net(states)
        inner = dropout(relu(self.inner(normed)), rate, self.training)
        return normed + dropout(self.outer(inner), rate, self.training)

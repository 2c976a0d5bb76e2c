"""HSTU (arXiv 2402.17152): attention without a softmax, gated, in place of attention and feed-forward net.

    U, V, Q, K = SiLU(norm(x) W);   A_ij = SiLU(q_i . k_j + P[i - j]) / n for j <= i, else 0
    x' = x + W_o dropout(U * norm(A V)) + b_o

No 1/sqrt(d), norms without parameters, n the longest history, whatever the length of a sequence: how strong a history's
evidence is stays visible, which a softmax hides. Its bias of elapsed time is left out, because most of the data say
nothing of time; the authors sample negatives for their softmax, ours is over all items.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm, normalize, silu

from sapo.baselines.sequence import SequenceModel


class HSTU(SequenceModel):
    """A SequenceModel whose states and rows have length 1, up to the temperature.

    Args:
        size: width of states.
        layers, heads: blocks, and heads of each; queries and values are size / heads wide.
        dropout: of inputs and gated outputs.
        temperature: cosines are divided by it.
    """

    def __init__(
        self,
        num_items: int,
        users: Sequence[str] = (),
        max_history: int = 50,
        size: int = 64,
        layers: int = 2,
        heads: int = 1,
        dropout: float = 0.2,
        temperature: float = 0.05,
    ):
        super().__init__(num_items, users, max_history, size)
        self.temperature, self.dropout = temperature, dropout
        self.positions = nn.Embedding(max_history, size)
        self.blocks = nn.ModuleList([Block(size, heads, dropout, max_history) for _ in range(layers)])
        nn.init.trunc_normal_(self.items.weight, std=0.02)
        self.items.weight.data[num_items] = 0
        nn.init.trunc_normal_(self.positions.weight, std=size**-0.5)

    def forward(self, items: Int[Tensor, "B T"], users: Int[Tensor, "B"]) -> Float[Tensor, "B T D"]:
        """States."""
        states = self.items(items) * self.items.embedding_dim**0.5 + self.positions.weight[: items.shape[1]]
        real = (items != self.num_items)[..., None]
        states = dropout(states, self.dropout, self.training) * real
        for block in self.blocks:
            states = block(states) * real
        return normalize(states, dim=-1) / self.temperature

    def table(self) -> Float[Tensor, "N D"]:
        """The embeddings that are read, of length 1."""
        return normalize(self.items.weight[: self.num_items], dim=-1)


class Block(nn.Module):
    """One layer."""

    def __init__(self, size: int, heads: int, dropout: float, max_history: int):
        super().__init__()
        self.heads, self.dropout, self.longest = heads, dropout, max_history
        self.project = nn.Parameter(torch.empty(size, 4 * size).normal_(std=0.02))
        self.bias = nn.Parameter(torch.empty(max_history).normal_(std=0.02))  # of i - j
        self.out = nn.Linear(size, size)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What the next layer reads."""
        size, length = states.shape[-1:], states.shape[1]
        gate, *rest = silu(layer_norm(states, size, eps=1e-6) @ self.project).chunk(4, -1)
        value, query, key = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in rest)
        apart = torch.arange(length, device=states.device)
        apart = apart[:, None] - apart  # i - j
        weights = silu(query @ key.transpose(2, 3) + self.bias[apart.clamp(min=0)]) / self.longest
        heads = (weights * (apart >= 0)) @ value
        gated = gate * layer_norm(heads.transpose(1, 2).flatten(2), size, eps=1e-6)
        return states + self.out(dropout(gated, self.dropout, self.training))

"""ReaRec (arXiv 2503.22675): a self-attentive encoder that thinks in latent steps before it recommends.

The state h_0 of the last item goes in once more, with an embedding that says "step 1", the same encoder reads on, and
so K times: h_0, h_1, ..., h_K. Two ways of learning from them:

    ERL   recommends with the mean of all states, and pushes what they recommend apart:
          CE(mean) - diversity * mean over s != t of KL(p_s || p_t), without a gradient to p_t
    PRL   recommends with the last state, and trains every state at a temperature that falls to its own from step to
          step: CE(h_K; T) + mean over k < K of CE(h_k; T anneal^(K - k)), and tells every noisy step's state from the
          batch's others: CE over products of noisy and clean states / T

An example is a history with its next item. The authors wait two epochs before they add noise; here it is there from the
first, and tune the temperature down to 0.05.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, gelu, kl_div, scaled_dot_product_attention

from sapo.baselines.fitting import FitConfig, Recommender
from sapo.baselines.sequence import SequenceModel
from sapo.data.interactions import Split
from sapo.errors import InputError


class Memory(NamedTuple):
    """What later inputs attend to: keys and values of every layer, and which of them a row has."""

    layers: list[tuple[Float[Tensor, "B H L d"], Float[Tensor, "B H L d"]]]
    real: Bool[Tensor, "B L"]


class ReaRec(SequenceModel):
    """A SequenceModel; `forward` gives the states before any step.

    Args:
        way: "erl" or "prl".
        steps: K; 0 is the encoder alone.
        size, layers, heads, feed_forward: of the encoder.
        dropout: of attention and feed-forward nets; `input_dropout` of items and steps going in.
        temperature: T; products of states and items are divided by it.
        diversity: weight of what pushes apart, in ERL.
        anneal: how much hotter each earlier step is, in PRL; noise: standard deviation of what is added to its steps.
    """

    losses = ("softmax",)

    def __init__(
        self,
        num_items: int,
        users: Sequence[str] = (),
        max_history: int = 50,
        way: Literal["erl", "prl"] = "erl",
        steps: int = 2,
        size: int = 64,
        layers: int = 2,
        heads: int = 2,
        feed_forward: int = 256,
        dropout: float = 0.5,
        input_dropout: float = 0.2,
        temperature: float = 1.0,
        diversity: float = 0.05,
        anneal: float = 2.0,
        noise: float = 0.01,
    ):
        super().__init__(num_items, users, max_history, size)
        if way not in ("erl", "prl"):
            raise InputError(f"way is {way!r}; erl or prl fits.")
        self.way, self.temperature, self.diversity, self.anneal, self.noise = way, temperature, diversity, anneal, noise
        self.positions, self.steps = nn.Embedding(max_history, size), nn.Embedding(steps, size)
        self.norm, self.input_dropout = nn.LayerNorm(size), input_dropout
        self.blocks = nn.ModuleList([Block(size, heads, feed_forward, dropout) for _ in range(layers)])
        for name, weights in self.named_parameters():
            if weights.dim() > 1:
                nn.init.normal_(weights, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weights)

    def forward(self, items: Int[Tensor, "B T"], users: Int[Tensor, "B"]) -> Float[Tensor, "B T D"]:
        """States of the items."""
        return self.read(items)[0]

    def read(self, items: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T D"], Memory]:
        """States of the items, and what steps after them attend to."""
        real = items != self.num_items
        causal = torch.ones(items.shape[1], items.shape[1], dtype=torch.bool, device=items.device).tril()
        inputs = self.items(items) + self.positions.weight[: items.shape[1]]
        return self._encode(inputs, causal[None, None], Memory([], real[:, :0]), real)

    def think(self, states: Float[Tensor, "B T D"], memory: Memory, noise: float = 0.0) -> Float[Tensor, "B K+1 D"]:
        """The state of the last item, and those of the steps after it."""
        rows = torch.arange(len(states), device=states.device)
        thoughts = [states[rows, memory.real.sum(1) - 1]]
        for step in self.steps.weight:
            inputs = thoughts[-1] + step
            if noise:
                inputs = inputs + noise * torch.randn_like(inputs)
            here = memory.real.new_ones(len(states), 1)
            seen = torch.cat([memory.real, here], 1)[:, None, None]
            state, memory = self._encode(inputs[:, None], seen, memory, here)
            thoughts.append(state[:, 0])
        return torch.stack(thoughts, 1)

    def lengths(self, split: Split) -> list[int]:
        """An example is a training row, not a sequence."""
        return Recommender.lengths(self, split)

    def loss(self, split: Split, examples: list[int], config: FitConfig) -> Float[Tensor, ""]:
        """Of the way."""
        rows = split.train.take(examples)
        items, _ = self.tensors(rows.history, [])
        states, memory = self.read(items)
        clean = self.think(states, memory)
        noisy = self.think(states, memory, self.noise) if self.way == "prl" and self.noise else None
        return self.loss_of(clean, noisy, torch.tensor(rows.target, device=items.device))

    def loss_of(
        self, clean: Float[Tensor, "B K+1 D"], noisy: Float[Tensor, "B K+1 D"] | None, target: Int[Tensor, "B"]
    ) -> Float[Tensor, ""]:
        """The loss of states, and of those of noisy steps where there are any."""
        steps, table = clean.shape[1] - 1, self.table()
        if self.way == "erl":
            loss = cross_entropy(clean.mean(1) @ table.T / self.temperature, target)
            if not steps or not self.diversity:
                return loss
            scores = clean @ table.T / self.temperature
            exact = torch.promote_types(scores.dtype, torch.float32)  # rounding is no difference between states
            logps = scores.log_softmax(-1, dtype=exact).transpose(0, 1)
            apart = [
                kl_div(other.detach(), logp, reduction="batchmean", log_target=True)
                for s, logp in enumerate(logps)
                for t, other in enumerate(logps)
                if s != t
            ]
            return loss - self.diversity * torch.stack(apart).mean()
        losses = [
            cross_entropy(states @ table.T / (self.temperature * self.anneal ** (steps - k)), target)
            for k, states in enumerate(clean.unbind(1))
        ]
        loss = losses[-1] + (torch.stack(losses[:-1]).mean() if steps else 0.0)
        if noisy is not None and steps:
            own = torch.arange(len(target), device=target.device)
            products = noisy[:, 1:].transpose(0, 1) @ clean[:, 1:].permute(1, 2, 0) / self.temperature  # (K, B, B)
            loss = loss + cross_entropy(products.flatten(0, 1), own.repeat(steps))
        return loss

    def best(self, histories: Sequence[Sequence[int]], users: Sequence[str], k: int) -> Int[Tensor, "B k"]:
        """By the mean of all states, or the last one."""
        thoughts = self.think(*self.read(self.tensors(histories, [])[0]))
        states = thoughts.mean(1) if self.way == "erl" else thoughts[:, -1]
        return (states @ self.table().T).topk(k).indices

    def _encode(
        self, inputs: Float[Tensor, "B T D"], seen: Bool[Tensor, "B 1 T L"], memory: Memory, real: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], Memory]:
        states, layers = dropout(self.norm(inputs), self.input_dropout, self.training), []
        for at, block in enumerate(self.blocks):
            states, kept = block(states, seen, memory.layers[at] if memory.layers else None)
            layers.append(kept)
        return states, Memory(layers, torch.cat([memory.real, real], 1))


class Block(nn.Module):
    """Attention and a feed-forward net, each normed after it is added."""

    def __init__(self, size: int, heads: int, feed_forward: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attend, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.inner, self.outer = nn.Linear(size, feed_forward), nn.Linear(feed_forward, size)
        self.after_attention, self.after_net = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(
        self, states: Float[Tensor, "B T D"], seen: Bool[Tensor, "B 1 T L"], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor]]:
        """What the next block reads, and all keys and values so far."""
        rate = self.dropout if self.training else 0.0
        parts = self.attend(states).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        heads = scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=rate)
        mixed = dropout(self.out(heads.transpose(1, 2).flatten(2)), self.dropout, self.training)
        states = self.after_attention(states + mixed)
        net = dropout(self.outer(gelu(self.inner(states))), self.dropout, self.training)
        return self.after_net(states + net), (key, value)

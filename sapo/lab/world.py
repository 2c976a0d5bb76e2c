"""A world of items that is small enough to be exact: all of its completions are written out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from zlib import crc32

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.credit.rewards import exact_match, step_match
from sapo.errors import InputError

MOST_TRAJECTORIES = 100_000


@dataclass(eq=False)
class SidWorld:
    """One prompt and a softmax policy that thinks in K one-word blocks, then names a SID.

    The logits of SID token k are a bias, plus what its own block says, plus `coupling` times what every other block
    that stands before it says, plus what the previous code says; those of a block are a bias plus what the previous
    decision says. All of these are parameters, drawn from a normal distribution of standard deviation `sharpness`.

    Args:
        level_sizes: codes of each level; their number is K.
        num_words: words a block chooses from.
        targets: (M, K) codes of the items that may come next; a group draws one of them.
        target_probs: their probabilities, uniform where None.
        catalogue: (N, K) codes of the items; tokens are constrained to them. None for no constraint.
        coupling: weight of block j in the logits of token k, j != k, against 1 for j = k.
        sharpness: how far the policy is from uniform.
        skill: added to the logit of every code of the first target. `with_exact_match` finds the one that is wanted.
        layout: "blocks_first" as in the paper, or "interleaved": block k right before token k, which then sees no later
            block, while a block sees the code before it.
        seed: of the parameters.

    Raises:
        InputError: codes that do not fit `level_sizes`, a target outside the catalogue, probabilities that are not
            any, a world of more than 100,000 trajectories.
    """

    level_sizes: Sequence[int] = (3, 3)
    num_words: int = 2
    targets: Sequence[Sequence[int]] = ((0, 0),)
    target_probs: Sequence[float] | None = None
    catalogue: Sequence[Sequence[int]] | None = None
    coupling: float = 0.0
    sharpness: float = 1.0
    skill: float = 0.0
    layout: str = "blocks_first"
    seed: int = 0
    theta: Float[Tensor, "P"] = field(init=False, repr=False)
    """The parameters, one flat vector; `log_probs` reads any vector of this shape."""

    def __post_init__(self) -> None:
        if self.layout not in ("blocks_first", "interleaved"):
            raise InputError(f"layout is {self.layout!r}: use 'blocks_first' or 'interleaved'.")
        steps = self.num_steps
        self.target_sids = torch.tensor(self.targets)
        items = torch.tensor(list(product(*map(range, self.level_sizes))) if self.catalogue is None else self.catalogue)
        for name, sids in (("targets", self.target_sids), ("catalogue", items)):
            if sids.dim() != 2 or sids.shape[1] != steps:
                raise InputError(f"{name} has shape {tuple(sids.shape)}; level_sizes says K = {steps} codes a SID.")
            if (sids < 0).any() or (sids >= torch.tensor(self.level_sizes)).any():
                raise InputError(f"{name} holds a code outside level_sizes {tuple(self.level_sizes)}.")
        items = items.unique(dim=0)
        if not (items == self.target_sids[:, None]).all(2).any(1).all():
            raise InputError("targets holds a SID that is not in the catalogue, so that no completion can be right.")
        probs = [1 / len(self.targets)] * len(self.targets) if self.target_probs is None else self.target_probs
        self.goal_probs = torch.tensor(probs, dtype=torch.float64)
        if self.num_words < 1:
            raise InputError(f"num_words is {self.num_words}; a block chooses from at least one word.")
        if len(probs) != len(self.targets) or not min(probs) >= 0 or not abs(sum(probs) - 1) < 1e-9:
            raise InputError(f"target_probs {list(probs)} must be one probability a target, together 1.")
        count = self.num_words**steps * len(items)
        if count > MOST_TRAJECTORIES:
            raise InputError(f"the world has {count:,} trajectories; at most {MOST_TRAJECTORIES:,} are enumerated.")
        words = torch.tensor(list(product(range(self.num_words), repeat=steps)))
        self.words = words.repeat_interleave(len(items), 0)
        self.sids = items.repeat(len(words), 1)
        self._allowed = [_children(items, k, size).repeat(len(words), 1) for k, size in enumerate(self.level_sizes)]
        self.theta = self._draw()

    @property
    def num_steps(self) -> int:
        return len(self.level_sizes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each table in `theta`: what is chosen is the last axis."""
        shapes: dict[str, tuple[int, ...]] = {}
        for k, size in enumerate(self.level_sizes):
            shapes[f"block{k}"] = (self.num_words,)
            shapes[f"token{k}"] = (size,)
            if k:
                before = self.num_words if self.layout == "blocks_first" else self.level_sizes[k - 1]
                shapes[f"block{k}|previous"] = (before, self.num_words)
                shapes[f"token{k}|previous"] = (self.level_sizes[k - 1], size)
            for j in range(self.num_steps):
                if j == k or (self.coupling and (self.layout == "blocks_first" or j < k)):
                    shapes[f"token{k}|block{j}"] = (self.num_words, size)
        return shapes

    def _draw(self) -> Float[Tensor, "P"]:
        parts = []
        for name, shape in self._shapes.items():
            # A table of its own seed: worlds of another coupling or layout share all that they have in common.
            generator = torch.Generator().manual_seed(crc32(f"{self.seed} {name}".encode()))
            values = self.sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
            if "|" not in name and name.startswith("token"):
                values[self.target_sids[0, int(name[5:])]] += self.skill
            parts.append(values.flatten())
        return torch.cat(parts)

    def log_probs(self, theta: Float[Tensor, "P"]) -> Float[Tensor, "Y T"]:
        """Log-probability of every token of every trajectory under `theta`: K blocks, then K SID tokens."""
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        parts = theta.split(sizes)
        tables = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
        columns = []
        for k in range(self.num_steps):
            logits = tables[f"block{k}"].expand(len(self.words), -1)
            if k:
                previous = self.words if self.layout == "blocks_first" else self.sids
                logits = logits + tables[f"block{k}|previous"][previous[:, k - 1]]
            columns.append(logits.log_softmax(1).gather(1, self.words[:, k, None]))
        for k in range(self.num_steps):
            logits = tables[f"token{k}"].expand(len(self.sids), -1)
            if k:
                logits = logits + tables[f"token{k}|previous"][self.sids[:, k - 1]]
            for j in range(self.num_steps):
                if (table := tables.get(f"token{k}|block{j}")) is not None:
                    logits = logits + (1.0 if j == k else self.coupling) * table[self.words[:, j]]
            logits = logits.masked_fill(~self._allowed[k], -math.inf)
            columns.append(logits.log_softmax(1).gather(1, self.sids[:, k, None]))
        return torch.cat(columns, 1)

    @cached_property
    def trained(self) -> Bool[Tensor, "Y T"]:
        """Tokens that were a choice: a SID token that is an only child is not."""
        blocks = torch.full(self.words.shape, self.num_words > 1)
        return torch.cat([blocks, torch.stack([allowed.sum(1) > 1 for allowed in self._allowed], 1)], 1)

    @cached_property
    def token_steps(self) -> Int[Tensor, "Y T"]:
        return torch.arange(self.num_steps).repeat(2).expand(len(self.sids), -1)

    @cached_property
    def probs(self) -> Float[Tensor, "Y"]:
        """pi(y) at the world's own parameters."""
        return self.log_probs(self.theta).sum(1).exp()

    @cached_property
    def scores(self) -> Float[Tensor, "Y T P"]:
        """grad log pi(y_t) at the world's own parameters."""
        return torch.func.jacfwd(self.log_probs)(self.theta)

    def pull_back(self, credit: Float[Tensor, "Y T"]) -> Float[Tensor, "P"]:
        """sum_y sum_t credit_t(y) grad log pi(y_t), at the world's own parameters."""
        theta = self.theta.clone().requires_grad_()
        return torch.autograd.grad(self.log_probs(theta), theta, torch.where(self.trained, credit, 0.0))[0]

    def goals(self, goal: str) -> Float[Tensor, "Y"]:
        """What a trajectory is worth, in expectation over targets: "exact" match, or the number of codes that "match",
        of all or, "gated", of those under a right prefix.

        Raises:
            InputError: another goal.
        """
        total = torch.zeros(len(self.sids), dtype=torch.float64)
        for target, prob in zip(self.target_sids, self.goal_probs, strict=True):
            wanted = target.expand(self.sids.shape)
            if goal == "exact":
                worth = exact_match(self.sids, wanted)
            elif goal in ("match", "gated"):
                worth = step_match(self.sids, wanted, gated=goal == "gated").sum(1)
            else:
                raise InputError(f"goal is {goal!r}: use 'exact', 'match' or 'gated'.")
            total += prob * worth
        return total

    def value(self, goal: str, theta: Float[Tensor, "P"] | None = None) -> Float[Tensor, ""]:
        """J(theta), the expected worth of a completion."""
        probs = self.probs if theta is None else self.log_probs(theta).sum(1).exp()
        return probs @ self.goals(goal)

    def at(self, theta: Float[Tensor, "P"]) -> "SidWorld":
        """The same world with the policy at other parameters."""
        world = replace(self)
        world.theta = theta
        return world

    def with_exact_match(self, probability: float) -> "SidWorld":
        """The same world with the `skill` at which an exact match has this probability.

        Raises:
            InputError: no skill between -30 and 30 reaches it.
        """
        low, high = -30.0, 30.0
        for _ in range(100):
            middle = (low + high) / 2
            world = replace(self, skill=middle)
            low, high = (middle, high) if world.value("exact") < probability else (low, middle)
        if not math.isclose(float(world.value("exact")), probability, rel_tol=1e-6):
            raise InputError(
                f"no skill makes an exact match as likely as {probability}: it reaches {world.value('exact'):.3g}."
            )
        return world


def _children(items: Int[Tensor, "N K"], level: int, size: int) -> Bool[Tensor, "N S"]:
    """Which codes of a level may follow the prefix of each item."""
    same_everywhere = torch.zeros(len(items), 1, dtype=torch.long)  # so that a prefix of length 0 has a column too
    _, prefix = torch.cat([same_everywhere, items[:, :level]], 1).unique(dim=0, return_inverse=True)
    allowed = torch.zeros(len(items), size, dtype=torch.bool)
    allowed[prefix, items[:, level]] = True
    return allowed[prefix]

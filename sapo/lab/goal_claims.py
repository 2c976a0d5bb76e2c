"""Whether who maximises matches step by step maximises exact matches: worked out, and on real data."""

import math
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.analysis.statistics import seed_interval
from sapo.data.catalog import Catalog
from sapo.data.interactions import Interactions
from sapo.data.synthetic import SyntheticCatalogue
from sapo.lab.findings import PAPER, Finding, as_share, finding

MOST_LIKELY = ((0, 1, 2), (0, 2, 1), (3, 1, 2)), (0.4, 0.3, 0.3)  # items that may come next, sharing codes
FOLLOWED = 20  # times, at least: of an item whose next items count as a distribution


def same_maximiser(record: Path) -> Iterator[Finding]:
    """Claim 4: who maximises the expected matches maximises the expected exact match."""
    cases = (
        ("one target", [(1, 2)], [1.0], None),
        ("two targets, .6 and .4", [(0, 0), (1, 1)], [0.6, 0.4], None),
        ("three targets (0,0) .4, (1,1) .3, (1,2) .3", [(0, 0), (1, 1), (1, 2)], [0.4, 0.3, 0.3], None),
        ("the same three, only items can be named", [(0, 0), (1, 1), (1, 2)], [0.4, 0.3, 0.3], True),
    )
    for goal, (what, targets, probs, constrained) in product(("match", "gated"), cases):
        items = targets if constrained else list(product(range(3), repeat=2))
        distribution = torch.tensor([probs], dtype=torch.float64)
        lost = float(_lost(torch.tensor(items), torch.tensor(targets), distribution, goal))
        yield Finding(
            f"The policy that maximises {'gated ' if goal == 'gated' else ''}step matches maximises exact match",
            f"{PAPER}, proposition",
            f"{what}: exact match that the maximiser of matches gives away",
            *(lost, lost, lost),
            "holds: nothing is lost" if lost < 1e-12 else "fails",
        )
    world = SyntheticCatalogue()
    catalogue = world.catalog.sids
    histories = world.interactions.leave_one_out().test.take(range(200)).history
    given_history = torch.tensor(world.next_item_probabilities(histories)).double()
    for goal in ("match", "gated"):
        given_away = seed_interval(_lost(catalogue, catalogue, given_history, goal).numpy())
        yield finding(
            f"The policy that maximises {'gated ' if goal == 'gated' else ''}step matches maximises exact match",
            f"{PAPER}, proposition",
            "synthetic catalogue, targets as random as 200 histories leave them: exact match given away",
            given_away,
            "holds: nothing is lost" if given_away.value < 1e-12 else "fails",
        )


def same_maximiser_on(folder: Path) -> Iterator[Finding]:
    """Claim 4 under the uncertainty of real data: what came next after the same item, as a distribution."""
    catalogue = Catalog.load(folder)
    pairs = [pair for sequence in Interactions.load(folder).leave_one_out().sequences for pair in pairwise(sequence)]
    followers = pd.DataFrame(pairs, columns=["item", "next"]).groupby("item")["next"]
    contexts = [counts for _, counts in followers if len(counts) >= FOLLOWED]
    if len(contexts) < 2:
        return
    sids, row = catalogue.sids.unique(dim=0, return_inverse=True)
    given_away: dict[str, list[float]] = {"match": [], "gated": []}
    perplexity, best = [], []
    for following in contexts:
        probs = torch.bincount(row[torch.tensor(following.to_numpy())], minlength=len(sids)).double() / len(following)
        seen = probs > 0
        best.append(float(probs.max()))
        perplexity.append(math.exp(float(torch.special.entr(probs).sum())))
        for goal, lost in given_away.items():
            lost.append(float(_lost(sids, sids[seen], probs[None, seen], goal)))
    for goal, lost in given_away.items():
        share = as_share(seed_interval(lost))
        yield finding(
            f"The policy that maximises {'gated ' if goal == 'gated' else ''}step matches maximises exact match",
            f"{PAPER}, proposition",
            f"{folder.resolve().name}, next items after each of the {len(contexts)} items that were followed at least "
            f"{FOLLOWED} times (perplexity {sum(perplexity) / len(contexts):.0f}): exact match given away, of "
            f"{sum(best) / len(contexts):.3f}; interval over these items",
            share,
            "holds: nothing is lost" if share.value < 1e-12 else "fails",
        )


def _lost(
    items: Int[Tensor, "N K"], targets: Int[Tensor, "M K"], probs: Float[Tensor, "R M"], goal: str
) -> Float[Tensor, "R"]:
    """Exact match at its own maximiser less that at the maximiser of the goal, for R distributions of the target.

    The policy may be as sharp as it likes, so that each maximiser is an item.
    """
    pairs = (items[:, None] == targets).double()  # (N, M, K)
    exact = probs @ pairs.prod(2).T
    worth = probs @ (pairs.cumprod(2) if goal == "gated" else pairs).sum(2).T
    best = worth >= worth.amax(1, keepdim=True) - 1e-9
    return exact.amax(1) - exact.masked_fill(~best, -1.0).amax(1)  # a tie is broken in favour of the claim

"""What a choice of SIDs is like, and what it does to step-level credit.

A tree of SIDs decides how much a step says: a level whose codes hardly vary says nothing, a node with one child leaves
no choice (a *forced* step, which is not trained on), and codes that are used again under every parent match by chance
(an ungated match under a wrong prefix).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.semantic_ids.collisions import collision_rate

Sids = Int[Tensor, "N K"]


def sid_report(
    sids: Sids, vectors: Float[Tensor, "N D"] | None = None, categories: Sequence[str] | None = None
) -> dict[str, float]:
    """Everything below, by name; levels count from 1. Entropies are in bits, over items that are equally likely.

    Args:
        vectors: of the items' texts, for what neighbours share. Items whose vector is 0 have no neighbour and are
            nobody's; where fewer than two others are left, nothing is said of neighbours.
        categories: of the items, for what a prefix means; items without one are left out.
    """
    facts: dict[str, float] = {"items": len(sids), "collision_rate": collision_rate(sids)}
    whole = groups(sids)
    described = torch.zeros(len(sids), dtype=torch.bool) if vectors is None else vectors.ne(0).any(1)
    near = nearest_neighbours(vectors[described]) if vectors is not None and described.sum() > 1 else None
    for level in range(1, sids.shape[1] + 1):
        before, upto = groups(sids[:, : level - 1]), groups(sids[:, :level])
        code = groups(sids[:, level - 1 : level])
        facts[f"codes_{level}"] = int(code.max()) + 1
        facts[f"perplexity_{level}"] = 2 ** entropy(code)
        facts[f"conditional_entropy_{level}"] = entropy(upto) - entropy(before)
        children = torch.bincount(upto.new_tensor(first_of(upto, before)))
        facts[f"branching_{level}"] = float(children.float().mean())
        facts[f"forced_{level}"] = float((children[before] == 1).float().mean())
        sids_below = torch.bincount(upto.new_tensor(first_of(whole, upto)))
        facts[f"fixed_after_{level}"] = float((sids_below[upto] == 1).float().mean())
        facts[f"chance_{level}"] = chance_match(before, code)
        if near is not None:
            here = upto[described]
            facts[f"neighbours_share_{level}"] = float((here == here[near]).float().mean())
        if categories is not None:
            facts[f"same_category_{level}"] = same_category(upto, categories)
    if categories is not None:
        facts["same_category_0"] = same_category(torch.zeros(len(sids), dtype=torch.long), categories)
    return facts


WORDS = {
    "codes": "codes in use",
    "perplexity": "codes effectively used",
    "conditional_entropy": "bits that a code says after those before it",
    "branching": "children of a node",
    "forced": "share of items whose prefix leaves one code",
    "fixed_after": "share of items whose codes no other item has",
    "chance": "of equal codes, share after different ones",
    "neighbours_share": "nearest neighbours with the same codes so far",
    "same_category": "pairs with the same codes that share a category",
    "items": "items",
    "collision_rate": "share of items with a SID of another item",
    "collisions_before": "share of items with a SID of another item, as learnt",
    "reconstruction_error": "variance of the vectors that codes leave",
}


def report_table(facts: Mapping[str, float]) -> pd.DataFrame:
    """A report in words: a row a fact, a column a level; what is of no level stands under "all". Level 0 is any two
    items."""
    cells: dict[str, dict[str, float]] = {}
    for name, value in facts.items():
        stem, _, level = name.rpartition("_")
        fact, column = (stem, level) if level.isdigit() else (name, "all")
        cells.setdefault(WORDS[fact], {})[column] = value
    table = pd.DataFrame(cells).T
    order = [*sorted(name for name in table.columns if name != "all"), "all"]
    return table.reindex(columns=[name for name in order if name in table.columns])


def groups(rows: Int[Tensor, "N d"]) -> Int[Tensor, "N"]:
    """Rows that are alike get the same number, from 0 on."""
    if not rows.shape[1]:
        return torch.zeros(len(rows), dtype=torch.long)
    return rows.unique(dim=0, return_inverse=True)[1]


def first_of(inner: Int[Tensor, "N"], outer: Int[Tensor, "N"]) -> list[int]:
    """The outer group of each inner group, which lies in one."""
    order = np.unique(inner.numpy(), return_index=True)[1]
    return outer[torch.from_numpy(order)].tolist()


def entropy(group: Int[Tensor, "N"]) -> float:
    """Of the group of a random item, in bits."""
    share = torch.bincount(group).double() / len(group)
    share = share[share > 0]
    return float(-(share * share.log2()).sum())


def chance_match(before: Int[Tensor, "N"], code: Int[Tensor, "N"]) -> float:
    """Of two random items whose codes of a level are the same, how often the codes before differ: the share of ungated
    matches that a guess without knowledge owes to chance. 0 on the first level."""
    alike = torch.bincount(code).double().pow(2).sum()
    both = torch.bincount(groups(torch.stack([before, code], 1))).double().pow(2).sum()
    return float(1 - both / alike)


def nearest_neighbours(vectors: Float[Tensor, "N D"]) -> Int[Tensor, "N"]:
    """The other item with the largest cosine, for each."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    result = []
    for start in range(0, len(unit), 2048):
        cosine = unit[start : start + 2048] @ unit.T
        rows = torch.arange(len(cosine))
        cosine[rows, start + rows] = -math.inf
        result.append(cosine.argmax(1))
    return torch.cat(result)


def same_category(group: Int[Tensor, "N"], categories: Sequence[str], depth: int = 2) -> float:
    """How often two different items of a group have the same category, down to `depth` names of its path."""
    path = [",".join(category.split(",")[:depth]) for category in categories]
    known = torch.tensor([bool(name) for name in path])
    numbers = {name: number for number, name in enumerate(sorted(set(path)))}
    category = torch.tensor([numbers[name] for name in path])[known]
    group = group[known]
    if not len(group):
        return math.nan
    pairs = lambda sizes: (sizes.double() * (sizes.double() - 1)).sum()  # noqa: E731
    of_group = pairs(torch.bincount(group))
    of_both = pairs(torch.bincount(groups(torch.stack([group, category], 1))))
    return float(of_both / of_group) if of_group else math.nan

"""Items that would share a SID: counted apart by another token, moved to a free code, shared out, or left.

extra_token    one more level that counts the items of a SID (TIGER, arXiv 2305.05065)
reassign       colliding items take the nearest codes of the last level that no item of their prefix has
share_out      colliding items share the last level's codes equally, in rounds (LC-Rec, arXiv 2311.09049)
sinkhorn       the equal shares, by which LC-Rec also keeps items apart while it learns
"""

from collections import defaultdict

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sapo.errors import InputError


def collision_rate(codes: Int[Tensor, "N K"]) -> float:
    """Share of items that share their SID with another."""
    _, which, counts = codes.unique(dim=0, return_inverse=True, return_counts=True)
    return float((counts[which] > 1).float().mean())


def extra_token(codes: Int[Tensor, "N K"]) -> Int[Tensor, "N K+1"]:
    """A level more: 0 for the first item of a SID, then 1, 2, ... It says nothing of what items are."""
    seen: dict[tuple[int, ...], int] = defaultdict(int)
    last = []
    for sid in map(tuple, codes.tolist()):
        last.append(seen[sid])
        seen[sid] += 1
    return torch.cat([codes, torch.tensor(last)[:, None]], 1)


def reassign(codes: Int[Tensor, "N K"], costs: Float[Tensor, "N C"]) -> Int[Tensor, "N K"]:
    """Give colliding items other codes of the last level, the ones that cost the least in all.

    Under each prefix with a collision, its items and the C codes are matched one to one (the assignment problem), so an
    item that was alone may move too; with more items than codes, codes are shared as evenly as can be.

    Args:
        costs: what each item pays for each code of the last level, for instance the squared distance.
    """
    from scipy.optimize import linear_sum_assignment

    if len(costs) != len(codes):
        raise InputError(f"costs has {len(costs)} rows for {len(codes)} items; give one each.")
    result = codes.clone()
    prefixes = defaultdict(list)
    for item, sid in enumerate(codes.tolist()):
        prefixes[tuple(sid[:-1])].append(item)
    for items in prefixes.values():
        if len(codes[items, -1].unique()) == len(items):
            continue
        # with more items than codes each code is taken so often, and some once more, which costs more than all else
        often = len(items) // costs.shape[1]
        matrix = costs[items].double().repeat(1, often + 1)
        matrix[:, often * costs.shape[1] :] += (matrix.max() - matrix.min() + 1) * len(items)
        _, columns = linear_sum_assignment(matrix.numpy())
        result[items, -1] = torch.from_numpy(columns) % costs.shape[1]
    return result


def share_out(
    codes: Int[Tensor, "N K"], costs: Float[Tensor, "N C"], epsilon: float = 0.003, rounds: int = 20
) -> Int[Tensor, "N K"]:
    """Give the items that share a SID, and no others, equal shares of the last level's codes; again while some collide.

    This is how LC-Rec's, LETTER's and MiniOneRec's indexes are made. Unlike `reassign` it knows nothing of codes that
    other items of the prefix have, and items that are alike stay together: collisions may be left.

    Args:
        costs: what each item pays for each code of the last level: the squared distance.
        epsilon: as of `sinkhorn`.
    """
    result = codes.clone()
    for _ in range(rounds):
        _, which, counts = result.unique(dim=0, return_inverse=True, return_counts=True)
        if counts.max() == 1:
            break
        for sid in (counts > 1).nonzero()[:, 0]:
            items = (which == sid).nonzero()[:, 0]
            result[items, -1] = sinkhorn(costs[items], epsilon).argmax(1)
    return result


def sinkhorn(costs: Float[Tensor, "B C"], epsilon: float, rounds: int = 50) -> Float64[Tensor, "B C"]:
    """What share of each row goes to each column: rows sum to 1, columns to B / C, and cheap places get the most
    (Cuturi 2013).

    Costs are centred to [-1, 1] first, as LC-Rec does, so that `epsilon` means the same whatever their scale. In
    float64: with its .003 the weights reach from 1e-145 to 1e145.
    """
    costs = costs.double()
    middle = (costs.max() + costs.min()) / 2
    weights = (-(costs - middle) / (costs.max() - middle + 1e-5) / epsilon).exp()
    of_column = weights.shape[0] / weights.shape[1]
    by_column = weights.new_ones(weights.shape[1])
    for _ in range(rounds):
        by_row = 1 / (weights @ by_column)
        by_column = of_column / (weights.T @ by_row)
    shares = weights * by_row[:, None] * by_column
    return shares / shares.sum(1, keepdim=True)

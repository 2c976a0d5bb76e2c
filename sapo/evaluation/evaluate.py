"""Ranking over the whole catalogue, without sampled negatives. One target a row, so the hit rate is the recall.

U rows (one history and its target each), R places of a ranking, K levels of a SID, N items. Rankings are best first; a
place that does not exist is -1.

A hit is the target itself ("by item") or its SID ("by SID"), which a few items may share. What a method ranks gives its
headline ("ndcg@10"), and the other stands beside it: "item/ndcg@10" of policies, which rank SIDs, "sid/ndcg@10" of
recommenders that rank items. `results.name_hits` gives both the same names, whatever a method ranks.
"""

from itertools import chain
from typing import Literal, overload

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sapo.common import distributed
from sapo.common.progress import progress_bar
from sapo.credit.rewards import step_match
from sapo.data.interactions import Rows, Split
from sapo.errors import InputError
from sapo.policy.policy import Policy, search, think

DEFAULT_KS = (5, 10)


@overload
def ranking_metrics(
    ranked: Int[Tensor, "U R"], target: Int[Tensor, "U"], ks: tuple[int, ...] = ..., per_user: Literal[False] = ...
) -> dict[str, float]: ...
@overload
def ranking_metrics(
    ranked: Int[Tensor, "U R"], target: Int[Tensor, "U"], ks: tuple[int, ...] = ..., *, per_user: Literal[True]
) -> dict[str, Float[Tensor, "U"]]: ...
def ranking_metrics(
    ranked: Int[Tensor, "U R"], target: Int[Tensor, "U"], ks: tuple[int, ...] = DEFAULT_KS, per_user: bool = False
) -> dict[str, float] | dict[str, Float[Tensor, "U"]]:
    """recall@k = 1 if the target is among the first k, ndcg@k = 1 / log2(rank + 1) if so, rank counted from 1.

    Args:
        ranked: item indices or labels, padded with -1. Only the first place of a repeated one counts.
        per_user: return one float64 value a row instead of the mean.

    Raises:
        InputError: a k outside 1..R, no rows, shapes that do not fit, a negative target.
    """
    _check(ranked.shape[:1], target, ks, ranked.shape[1])
    if (target < 0).any():
        raise InputError("target holds negative labels; -1 is padding and can only stand in a ranking.")
    hit = ranked == target[:, None]
    return _metrics(_first(hit), torch.ones(len(target), device=target.device), ks, per_user)


def evaluate_ranking(
    ranked: Int[Tensor, "U R"], rows: Rows, ks: tuple[int, ...], sids: Int[Tensor, "N K"]
) -> tuple[dict[str, float], pd.DataFrame]:
    """`ranking_metrics` of items ranked for rows; and a row a user: user, target, rank of the target, "sid/rank" of its
    SID (0: not among the first max(ks)).

    Some papers remove the items of the history from the ranking, others do not; where nobody buys a thing twice they
    only take up places. "new/recall@k", ... are what comes out with them removed. Others compare SIDs, not items:
    "sid/recall@k", ... are those of the ranking that `rank_sids` makes of this one.

    Args:
        ranked: as many places as `places` says, or all there are of a small catalogue, or of a search's beams.
        sids: those of the catalogue.
    """
    target = torch.tensor(rows.target)
    label = _labels(sids, sids)
    new = [
        [item for item in line if item not in held][: max(ks)]
        for line, held in zip(ranked.tolist(), map(set, rows.history), strict=True)
    ]
    rankings = {
        "": (ranked, target),
        "new/": (pad_sequence([torch.tensor(line, dtype=torch.long) for line in new], True, -1), target),
        "sid/": (rank_sids(ranked, label), label[target]),
    }
    metrics: dict[str, float] = {}
    users = pd.DataFrame({"user": rows.user, "target": rows.target})
    for name, (lines, right) in rankings.items():
        first = torch.nn.functional.pad(lines[:, : max(ks)], (0, max(0, max(ks) - lines.shape[1])), value=-1)
        metrics |= {name + key: value for key, value in ranking_metrics(first, right, ks).items()}
        if name != "new/":
            users[f"{name}rank"] = rank_of_hit(first == right[:, None]).tolist()
    return metrics, users


def places(rows: Rows, ks: tuple[int, ...], sids: Int[Tensor, "N K"]) -> int:
    """How long a ranking must be so that max(ks) items remain once the longest history is taken out, and that it names
    max(ks) SIDs of a catalogue whatever items it begins with."""
    sharers = torch.bincount(_labels(sids, sids)).sort(descending=True).values
    same = int(sharers[: max(ks) - 1].sum())  # at most so many items have one SID less
    return max(max(ks) + max((len(set(history)) for history in rows.history), default=0), same + 1)


def rank_sids(ranked: Int[Tensor, "U R"], label: Int[Tensor, "N"]) -> Int[Tensor, "U R"]:
    """The ranking of SIDs that a ranking of items makes: the first place of each counts, later ones take none.

    Args:
        ranked: items, padded with -1.
        label: the number of each item's SID.

    Returns:
        Numbers of SIDs, each at most once a row, padded with -1 at the end.
    """
    named = torch.where(ranked < 0, -1, label.to(ranked.device)[ranked])
    ordered, place = named.sort(dim=1, stable=True)  # equal ones stay in order, so that the first of a run came first
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.zeros_like(starts).scatter(1, place, starts & (ordered >= 0))
    to = first.cumsum(1).sub(1).masked_fill(~first, ranked.shape[1])  # what takes no place goes to one that is cut off
    sids = torch.full_like(torch.nn.functional.pad(named, (0, 1)), -1).scatter(1, to, named)
    return sids[:, :-1]


@overload
def sid_ranking_metrics(
    ranked: Int[Tensor, "U R K"],
    target: Int[Tensor, "U"],
    sids: Int[Tensor, "N K"],
    ks: tuple[int, ...] = ...,
    collisions: str = ...,
    per_user: Literal[False] = ...,
) -> dict[str, float]: ...
@overload
def sid_ranking_metrics(
    ranked: Int[Tensor, "U R K"],
    target: Int[Tensor, "U"],
    sids: Int[Tensor, "N K"],
    ks: tuple[int, ...] = ...,
    collisions: str = ...,
    *,
    per_user: Literal[True],
) -> dict[str, Float[Tensor, "U"]]: ...
def sid_ranking_metrics(
    ranked: Int[Tensor, "U R K"],
    target: Int[Tensor, "U"],
    sids: Int[Tensor, "N K"],
    ks: tuple[int, ...] = DEFAULT_KS,
    collisions: str = "sid",
    per_user: bool = False,
) -> dict[str, float] | dict[str, Float[Tensor, "U"]]:
    """`ranking_metrics` of ranked SIDs, of which an item may share its own with others.

    Args:
        ranked: SIDs, padded with -1. One outside the catalogue is never a hit and takes one place.
        target: item indices into `sids`, the SIDs of the catalogue.
        collisions: "sid" counts the target's SID as a hit, whichever item of it was meant. "item" writes the items of
            every SID out in a random order and takes the exact expectation over it: with c places before the SID of
            the target, which n items share, the target is at each of the places c+1 .. c+n with probability 1/n.

    Raises:
        InputError: as `ranking_metrics`; an unknown policy, K that differs, a target outside the catalogue.
    """
    if ranked.shape[-1] != sids.shape[1]:
        raise InputError(f"ranked holds SIDs of {ranked.shape[-1]} levels, the catalogue of {sids.shape[1]}.")
    _check(ranked.shape[:1], target, ks, ranked.shape[1])
    if (target < 0).any() or (target >= len(sids)).any():
        raise InputError(f"target holds item indices outside 0..{len(sids) - 1}.")
    if collisions == "item":
        first, sharers = item_ranks(ranked, target, sids)
        return _metrics(torch.where(first > 0, first - 1, max(ks)), sharers, ks, per_user)
    if collisions != "sid":
        raise InputError(f"collisions is {collisions!r}: use 'sid' or 'item'.")
    before = _first(_labels(ranked, sids) == _labels(sids, sids)[target][:, None])
    return _metrics(before, torch.ones_like(before), ks, per_user)


def item_ranks(
    ranked: Int[Tensor, "U R K"], target: Int[Tensor, "U"], sids: Int[Tensor, "N K"]
) -> tuple[Int[Tensor, "U"], Int[Tensor, "U"]]:
    """Where the target stands once the items of every ranked SID are written out: the first of its possible ranks,
    counted from 1 (0: its SID is not ranked), and how many there are, one after the other and equally likely.

    Args:
        ranked: SIDs, padded with -1. One outside the catalogue takes one place.
        target: item indices into `sids`, the SIDs of the catalogue.
    """
    place, label = _labels(ranked, sids), _labels(sids, sids)
    before = _first(place == label[target][:, None])
    sharers = torch.bincount(label)
    width = torch.where(place < 0, 1, sharers[place])  # items behind each place
    end = torch.cat([torch.zeros_like(width[:, :1]), width.cumsum(1)], dim=1)
    items_before = end.gather(1, before[:, None])[:, 0]
    return torch.where(before < ranked.shape[1], items_before + 1, 0), sharers[label[target]]


def valid_share(ranked: Int[Tensor, "U R K"], sids: Int[Tensor, "N K"]) -> float:
    """Share of the returned SIDs (places that are not all -1) that the catalogue has; nan if none was returned."""
    returned = (ranked >= 0).any(-1)
    return float((_labels(ranked, sids) >= 0)[returned].double().mean())


def duplicate_share(ranked: Int[Tensor, "U R K"]) -> float:
    """Share of the returned SIDs that repeat an earlier one of the same ranking; nan if none was returned."""
    returned = (ranked >= 0).any(-1)
    shifted = ranked + 1  # a malformed SID may hold -1 too
    label = _labels(shifted, shifted.flatten(0, 1)).masked_fill(~returned, -1)
    label = label.sort(dim=1).values
    repeats = (label[:, 1:] == label[:, :-1]) & (label[:, 1:] >= 0)
    return float(repeats.sum().double() / returned.sum())


def match_rates(first: Int[Tensor, "U K"], target: Int[Tensor, "U K"]) -> dict[str, float]:
    """Share of rows whose best SID has the right code at level k, right prefix or not: "match_level_1", ..."""
    rates = step_match(first, target).double().mean(0).tolist()
    return {f"match_level_{level}": rate for level, rate in enumerate(rates, start=1)}


def rank_of_hit(hit: Bool[Tensor, "U R"]) -> Int[Tensor, "U"]:
    """The first place of a ranking that is right, counted from 1; 0 where none is."""
    before = _first(hit)
    return torch.where(before < hit.shape[1], before + 1, 0)


def _check(rows: torch.Size, target: Tensor, ks: tuple[int, ...], places: int) -> None:
    if target.shape != rows or not len(target):
        raise InputError(f"ranked has {rows[0]} rows and target has shape {tuple(target.shape)}: one target a row.")
    for k in ks:
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1.")
        if k > places:
            raise InputError(f"k = {k} needs at least {k} ranked places a row, and ranked has R = {places}.")


def _first(hit: Tensor) -> Int[Tensor, "U"]:
    """Places before the first hit of each row; R where there is none."""
    return torch.where(hit.any(1), hit.int().argmax(1), hit.shape[1])


def _metrics(
    before: Int[Tensor, "U"], sharers: Tensor, ks: tuple[int, ...], per_user: bool
) -> dict[str, float] | dict[str, Tensor]:
    """Expected metrics of a target that is equally likely at each of the `sharers` places after the first `before`."""
    discounts = 1 / torch.arange(2, max(ks) + 2, device=before.device, dtype=torch.float64).log2()
    gains = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])  # gains[k]: sum of the first k discounts
    values = {}
    for k in ks:
        start, end = before.clamp(max=k), (before + sharers).long().clamp(max=k)
        values[f"recall@{k}"] = (end - start).double() / sharers
        values[f"ndcg@{k}"] = (gains[end] - gains[start]) / sharers
    return values if per_user else {name: float(value.mean()) for name, value in values.items()}


def _labels(queries: Int[Tensor, "... K"], sids: Int[Tensor, "N K"]) -> Int[Tensor, "..."]:
    """Number of each query among the distinct SIDs of `sids`, or -1. Level by level, so that no product overflows."""
    known = sids.new_zeros(len(sids), dtype=torch.long)
    label = queries.new_zeros(queries.shape[:-1], dtype=torch.long)
    for level in range(sids.shape[1]):
        size = int(sids[:, level].max()) + 1
        code = queries[..., level]
        nodes, known = (known * size + sids[:, level]).unique(return_inverse=True)
        key = label * size + code
        node = torch.searchsorted(nodes, key).clamp(max=len(nodes) - 1)
        inside = (label >= 0) & (code >= 0) & (code < size)
        label = torch.where(inside & (nodes[node] == key), node, -1)
    return label


def evaluate_policy(
    policy: Policy,
    split: Split,
    part: Literal["train", "valid", "test"] = "test",
    limit: int | None = None,
    *,
    thinking: bool | None = None,
    beams: tuple[int, ...] = (10, 50),
    batch_size: int = 128,
    title: str = "evaluate",
) -> tuple[dict[str, float], pd.DataFrame]:
    """Rank the catalogue for the rows of a split: think greedily, then search with each number of beams.

    Several processes (`accelerate launch`) share the batches, and each returns what one alone would have found.

    Args:
        part, limit: which rows, and how many of them (`Rows.sample`); all where None.
        thinking: None does as the policy was trained.
        beams: widths of the searches.

    The headline ("recall@10", ...) is the first search, scored by the softmax over allowed codes, as training sees it,
    with the collision policy "sid". Beside it stand "item/..." (the collision policy "item") and, where `beams` has a
    second width, "full/..." (the first search scored by the full softmax; none of policies that contrast) and
    "beams50/..." (the second search).

    Returns:
        The metrics; and a row a user: user, target, rank of the target's SID for each search (0 = not found),
        "item/rank" and "item/sharers" (what `item_ranks` finds in the first search; 0 beyond the tenth), and whether
        the code of each level of the best SID is right.

    Raises:
        InputError: the policy was trained on another split or other data.
        FloatingPointError: logits that are not a number.
    """
    policy.check_split(split)
    rows = getattr(split, part).sample(limit)
    ks = (1, 5, 10)
    sids, target = policy.catalog.sids, torch.tensor(rows.target)
    searches: dict[str, tuple[int, Literal["full", "trie"]]] = {
        f"beams{width}/" if index else "": (width, "trie") for index, width in enumerate(beams)
    }
    if len(beams) > 1 and policy.contrast is None:
        searches["full/"] = (beams[0], "full")
    found: list[tuple[list[int], dict[str, Tensor]]] = []
    share = (distributed.number(), distributed.count())
    bar = progress_bar(title, total=len(rows))
    broken: str | None = None
    try:
        for thought in think(policy, rows.history, thinking=thinking, batch_size=batch_size, share=share):
            best = {
                name: search(policy, thought, width, ks[-1], normalize).sids.cpu()
                for name, (width, normalize) in searches.items()
            }
            found.append((thought.rows, best))
            bar.update(len(thought.rows) * distributed.count())
    except FloatingPointError as error:
        broken = str(error)
    bar.close()
    if problems := list(filter(None, distributed.of_all(broken))):  # all processes stop, or none
        raise FloatingPointError(problems[0])
    ranked = {name: torch.full((len(rows), ks[-1], sids.shape[1]), -1) for name in searches}
    for part_of_rows, best in chain(*distributed.of_all(found)):
        for name, of_name in best.items():
            ranked[name][part_of_rows] = of_name
    metrics: dict[str, float] = {}
    users = pd.DataFrame({"user": rows.user, "target": rows.target})
    for name in searches:
        metrics |= {name + key: value for key, value in sid_ranking_metrics(ranked[name], target, sids, ks).items()}
        hit = (ranked[name] == sids[target][:, None]).all(-1)
        users[f"{name}rank"] = rank_of_hit(hit).numpy()
    by_item = sid_ranking_metrics(ranked[""], target, sids, ks, collisions="item")
    metrics |= {f"item/{key}": value for key, value in by_item.items()}
    first, sharers = item_ranks(ranked[""], target, sids)
    users["item/rank"] = first.masked_fill(first > ks[-1], 0).numpy()
    users["item/sharers"] = sharers.numpy()
    metrics |= match_rates(ranked[""][:, 0], sids[target])
    metrics |= {"valid_share": valid_share(ranked[""], sids), "duplicate_share": duplicate_share(ranked[""])}
    for level, right in enumerate((ranked[""][:, 0] == sids[target]).long().T, start=1):
        users[f"match_{level}"] = right.numpy()
    return metrics, users

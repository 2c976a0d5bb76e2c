"""The rows that stage 3 reads, and what a completion is compared with."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

from sapo.credit.rewards import exact_match
from sapo.decoding.layout import ReasoningLayout
from sapo.errors import InputError
from sapo.semantic_ids.trie import SidTrie


def check_dataset(name: str, dataset: Dataset, trie: SidTrie) -> None:
    """Every row has a prompt and the SID of an item of the catalogue: a -1 would pay malformed completions."""
    if missing := {"prompt", "target_sid"} - set(dataset.column_names):
        raise InputError(f"{name} lacks the columns {sorted(missing)}; it has {dataset.column_names}.")
    if not len(dataset):
        raise InputError(f"{name} has no rows.")
    targets = list(dataset["target_sid"])
    levels = trie.num_levels
    for row, target in enumerate(targets):
        if not isinstance(target, list) or len(target) != levels:
            raise InputError(f"{name}, row {row}: target_sid is {target!r}; the catalogue has K = {levels} levels.")
    known = trie.to("cpu").contains(torch.tensor(targets))
    if not known.all():
        row = int((~known).int().argmax())
        raise InputError(f"{name}, row {row}: target_sid {targets[row]} is no SID of the catalogue.")


def exact_reward(layout: ReasoningLayout) -> Callable:
    """The exact match in TRL's form: TRL asks for a reward function at least, and logs it by its name."""

    def exact(completion_ids: list[list[int]], target_sid: list[list[int]], **columns: Any) -> list[float]:
        filled = torch.tensor(list(zip_longest(*completion_ids, fillvalue=-1))).T
        return exact_match(predicted_sids(layout, filled), torch.tensor(target_sid)).tolist()

    return exact


def predicted_sids(layout: ReasoningLayout, completion_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B K"]:
    """The SIDs that completions name, -1 throughout where one is malformed."""
    parsed = layout.parse(completion_ids)
    return parsed.sids.masked_fill(~parsed.well_formed[:, None], -1)

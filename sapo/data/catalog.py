"""The catalogue: items, their text, and their semantic IDs (SIDs), the K codes by which a policy names an item.

Items are numbered 0..N-1, and the number means nothing: it never is a feature and never breaks a tie. Items may share
a SID.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sapo.data.tsv import Row, Table, fingerprint, write_table
from sapo.errors import InputError

TEXTS = {"title": "titles", "brand": "brands", "category": "categories", "description": "descriptions", "asin": "asins"}
CODE_LIMIT = 2**31


@dataclass(frozen=True, eq=False)
class Catalog:
    """N items on K levels. Texts that are not given are empty; `item_ids` can only be 0..N-1.

    Raises:
        InputError: SIDs of another shape than (N, K), with K outside 2..5, of another dtype than integers, or negative;
            item ids that are not 0..N-1 in order; a text that is not given for every item.
    """

    name: str
    sids: Int[Tensor, "N K"]
    titles: list[str]
    item_ids: list[int] = field(default_factory=list)
    brands: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)  # a path from general to special, joined by commas
    descriptions: list[str] = field(default_factory=list)
    asins: list[str] = field(default_factory=list)  # Amazon's product ids

    def __post_init__(self) -> None:
        sids = self.sids
        if not isinstance(sids, Tensor) or sids.dim() != 2 or not len(sids) or not 2 <= sids.shape[1] <= 5:
            shape = tuple(sids.shape) if isinstance(sids, Tensor) else type(sids).__name__
            raise InputError(f"sids is {shape}; it must be a tensor of shape (N > 0, K) with 2 to 5 levels.")
        if sids.is_floating_point() or sids.is_complex() or sids.dtype == torch.bool:
            raise InputError(f"sids has dtype {sids.dtype}; codes are integers.")
        if sids.min() < 0:
            item, level = (sids < 0).nonzero()[0].tolist()
            raise InputError(
                f"sids: item {item} has code {int(sids[item, level])} on level {level + 1}; codes start at 0."
            )
        object.__setattr__(self, "sids", sids.long())
        if self.item_ids and self.item_ids != list(range(len(sids))):
            raise InputError(f"item_ids must be 0 to {len(sids) - 1} in order, one for every SID.")
        object.__setattr__(self, "item_ids", list(range(len(sids))))
        for attribute in TEXTS.values():
            texts = getattr(self, attribute)
            if attribute != "titles" and not texts:
                object.__setattr__(self, attribute, [""] * len(sids))
            elif len(texts) != len(sids):
                raise InputError(
                    f"{attribute} has {len(texts)} entries for {len(sids)} items; give one each ('' is fine)."
                )

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.sids)

    @property
    def num_levels(self) -> int:
        """K."""
        return self.sids.shape[1]

    @cached_property
    def level_sizes(self) -> tuple[int, ...]:
        """Largest code + 1 of each level."""
        return tuple((self.sids.amax(0) + 1).tolist())

    @cached_property
    def codes_in_use(self) -> tuple[int, ...]:
        """Number of distinct codes of each level."""
        return tuple(len(codes.unique()) for codes in self.sids.T)

    @cached_property
    def collision_rate(self) -> float:
        """Share of items that share their SID with another item."""
        return sum(len(items) for items in self._items.values() if len(items) > 1) / self.num_items

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of SIDs and texts; the name does not count."""
        return fingerprint([self.sids.tolist(), list(self.texts.values())])

    @property
    def texts(self) -> dict[str, list[str]]:
        """Titles, brands, categories, descriptions and product ids, by attribute."""
        return {attribute: getattr(self, attribute) for attribute in TEXTS.values()}

    def items_of(self, sid: Sequence[int] | Int[Tensor, "K"]) -> list[int]:
        """Items with exactly this SID, in order; none for a SID outside the catalogue."""
        return list(self._items.get(tuple(int(code) for code in sid), []))

    @classmethod
    def load(cls, folder: str | Path, sids: str = "sids") -> Self:
        """Read `items.tsv.gz` and `<sids>.tsv.gz` (or the same without .gz); the name is the folder's.

        items has the columns item_id and title, and may have brand, category, description and asin. The SID table has
        item_id, sid_1 .. sid_K. Rows may come in any order.

        Raises:
            InputError: anything that does not fit; the message names the file, the line and the column.
        """
        texts = load_texts(folder)
        codes = Table(folder, sids, required=("item_id", "sid_1", "sid_2"))
        levels = codes.columns[1:]
        if codes.columns[0] != "item_id" or levels != [f"sid_{level}" for level in range(1, len(levels) + 1)]:
            raise InputError(f"{codes.path}, line 1: the columns must be item_id, sid_1, sid_2, ..., in this order.")
        if len(levels) > 5:
            raise InputError(f"{codes.path}, line 1: {len(levels)} levels; a SID has 2 to 5.")
        rows = _by_item(codes, len(texts["titles"]))
        sid = torch.tensor([[row.integer(level, CODE_LIMIT) for level in levels] for row in rows])
        return cls(Path(folder).resolve().name, sid, item_ids=list(range(len(rows))), **texts)

    def save(self, folder: str | Path, sids: str = "sids") -> None:
        """Write what `load` reads. The same catalogue gives the same bytes.

        Raises:
            InputError: a text that holds a tab or a line break.
        """
        write_table(folder, "items", ["item_id", *TEXTS], zip(self.item_ids, *self.texts.values(), strict=True))
        self.save_sids(folder, sids)

    def save_sids(self, folder: str | Path, sids: str = "sids") -> None:
        """Write the SIDs alone, beside the items that are there."""
        levels = [f"sid_{level}" for level in range(1, self.num_levels + 1)]
        write_table(folder, sids, ["item_id", *levels], ([i, *sid] for i, sid in enumerate(self.sids.tolist())))

    def describe(self) -> pd.DataFrame:
        """Size of the catalogue and its SID tree, and how much text there is: one column, "value"."""
        facts: dict[str, float] = {"items": self.num_items, "levels": self.num_levels}
        for level, used in enumerate(self.codes_in_use, start=1):
            facts[f"codes in use, level {level}"] = used
        for depth in range(1, self.num_levels + 1):
            facts[f"distinct prefixes, depth {depth}"] = len(self.sids[:, :depth].unique(dim=0))
        facts["items in a collision"] = round(self.collision_rate * self.num_items)
        facts["collision rate"] = self.collision_rate
        for column, attribute in TEXTS.items():
            facts[f"items with {column}"] = sum(map(bool, getattr(self, attribute)))
        return pd.DataFrame({"value": pd.Series(facts, dtype=object)})  # object: counts stay integers

    @cached_property
    def _items(self) -> dict[tuple[int, ...], list[int]]:
        items = defaultdict(list)
        for item, sid in enumerate(self.sids.tolist()):
            items[tuple(sid)].append(item)
        return dict(items)


def load_texts(folder: str | Path) -> dict[str, list[str]]:
    """Columns of `items.tsv.gz` by the attribute of a catalogue, for items that may have no SIDs yet.

    Raises:
        InputError: as `Catalog.load`.
    """
    rows = _by_item(Table(folder, "items", required=("item_id", "title")))
    return {attribute: [row.fields.get(column, "") for row in rows] for column, attribute in TEXTS.items()}


def _by_item(table: Table, num_items: int | None = None) -> list[Row]:
    """The rows ordered by item_id, which must be each of 0..num_items-1 once; as many items as rows where None."""
    rows = list(table)
    if not rows:
        raise InputError(f"{table.path} has no line after the header; it needs one for every item.")
    num_items = num_items or len(rows)
    found: dict[int, Row] = {}
    for row in rows:
        item = row.integer("item_id", num_items)
        if item in found:
            raise row.error("item_id", f"item {item} already stands in line {found[item].line}.")
        found[item] = row
    missing = [item for item in range(num_items) if item not in found]
    if missing:
        raise InputError(f"{table.path} has no line for item {missing[0]} ({len(missing)} of {num_items} are missing).")
    return [found[item] for item in range(num_items)]

"""Tokenizers compared: SIDs of every method on data folders, beside the ones that came with the data."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sapo.common.progress import progress_bar
from sapo.data.catalog import Catalog
from sapo.data.interactions import Interactions
from sapo.semantic_ids.collisions import collision_rate, reassign, share_out
from sapo.semantic_ids.config import Method, TokenizerConfig
from sapo.semantic_ids.report import sid_report
from sapo.semantic_ids.tokenizer import ItemTokenizer
from sapo.semantic_ids.vectors import TextVectors, item_texts

COLUMNS = ("dataset", "tokenizer", "source", "levels", "seed", "metric", "value")


@dataclass(frozen=True)
class Comparison:
    """Which methods, and with which seeds. Levels are as many as the folder's own SIDs have, of `codes` codes, or of
    half as many as there are items."""

    methods: tuple[Method, ...] = get_args(Method)
    seeds: tuple[int, ...] = (0, 1, 2)
    codes: int = 256
    epochs: int = 100


def compare(folders: Sequence[Path], comparison: Comparison) -> Iterator[pd.DataFrame]:
    """A table a folder, rows of COLUMNS: what `sid_report` says, and of fitted tokenizers

    what `ItemTokenizer.losses` says of codes before items are moved (all else is after), collisions_shared_out (after
    LC-Rec's rounds instead of moving), and seconds of fitting.

    SIDs that came with the folder have the source "published" and are called by their table.
    """
    for folder in folders:
        rows: list[dict[str, object]] = []
        catalog = Catalog.load(folder)
        texts = item_texts(catalog.texts)
        vectors = torch.from_numpy(TextVectors().fit(texts))
        names = {path.name.partition(".")[0] for path in folder.glob("sids*.tsv*")}
        for name in sorted(names):
            if (folder / f"{name}.safetensors").exists():  # ours
                continue
            sids = Catalog.load(folder, name).sids
            facts = sid_report(sids, vectors, catalog.categories)
            rows += _rows(catalog.name, name, "published", sids, 0, facts)
        split = Interactions.load(folder).split()
        levels = (min(comparison.codes, catalog.num_items // 2),) * catalog.num_levels
        cells = [(method, seed) for method in comparison.methods for seed in comparison.seeds]
        for method, seed in progress_bar(catalog.name, cells):
            tokenizer = ItemTokenizer(
                TokenizerConfig(method, levels, collisions="leave", epochs=comparison.epochs, seed=seed)
            )
            start = time.perf_counter()
            codes = tokenizer.fit(texts, split)
            seconds = time.perf_counter() - start
            costs = tokenizer.quantizer.last_costs(tokenizer.vectors, codes)
            moved = reassign(codes, costs)
            facts = sid_report(moved, vectors, catalog.categories)
            facts |= tokenizer.losses()
            facts |= {"collisions_shared_out": collision_rate(share_out(codes, costs)), "seconds": seconds}
            rows += _rows(catalog.name, method, "measured", moved, seed, facts)
        yield pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(
    dataset: str, tokenizer: str, source: str, sids: Int[Tensor, "N K"], seed: int, facts: dict[str, float]
) -> list[dict[str, object]]:
    common = {"dataset": dataset, "tokenizer": tokenizer, "source": source, "levels": sids.shape[1], "seed": seed}
    known = {metric: value for metric, value in facts.items() if not math.isnan(value)}  # categories may be missing
    return [{**common, "metric": metric, "value": value} for metric, value in known.items()]

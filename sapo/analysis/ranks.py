"""The rank of the target in every test row, so that any two methods can be compared on the same rows.

ranks.csv.gz       of every run the rows whose target is among the first 10, and at which rank; the first row too; a row
                   is told by how far `after` the one before it is, which packs into half the bytes
test_rows.csv.gz   whose rows they are; a data set may have been tested on all of its rows, or on n drawn ones

`rank` is that of the SID, of policies, or of the item, of recommenders that rank items. What the other way of counting
gives stands beside it: "item/rank" and "item/sharers" (the target is equally likely at so many ranks from that one on)
of policies, "sid/rank" of the others.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float64
from numpy import ndarray

from sapo.analysis.results import WITHOUT_SEEDS, WORLD, hits_by_sid, others
from sapo.analysis.statistics import Difference, paired_difference
from sapo.common.files import write_csv
from sapo.errors import InputError

RANKS, ROWS = "ranks.csv.gz", "test_rows.csv.gz"
TESTED = ["dataset", "split", "n"]
RUN = [*WORLD, "method", "seed"]
BESIDE = ("item/rank", "item/sharers", "sid/rank")
Method = tuple[str, str, str, str]  # dataset, split, preset, method


def hits(users: pd.DataFrame, run: Mapping[str, object]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of both tables that one run has.

    Args:
        users: user, rank and those of BESIDE of every test row, in order; rank 0 is none.
        run: dataset, split, preset, method and seed.
    """
    n = len(users)
    beside = [name for name in BESIDE if name in users and users[name].notna().any()]
    found = (users[[name for name in ("rank", *beside) if name.endswith("rank")]] > 0).any(axis=1)
    hit = np.union1d(np.flatnonzero(found), [0])  # the first row also tells that there was a run
    ranks = pd.DataFrame({"row": hit} | {name: users[name].to_numpy()[hit] for name in ("rank", *beside)})
    rows = pd.DataFrame({"row": np.arange(n), "user": pd.factorize(users["user"])[0]})
    tested = {name: run[name] for name in ("dataset", "split")} | {"n": n}
    return (
        ranks.assign(**{name: run[name] for name in RUN}, n=n)[[*RUN, "n", "row", "rank", *beside]],
        rows.assign(**tested)[[*TESTED, "row", "user"]],
    )


def add_ranks(runs: Iterable[tuple[pd.DataFrame, Mapping[str, object]]], folder: str | Path) -> None:
    """Write what `hits` says of runs beside what `folder` holds of other methods."""
    ranks, rows = zip(*(hits(*run) for run in runs), strict=True)
    _add(pd.concat(ranks), Path(folder) / RANKS, [*WORLD, "method"])
    _add(pd.concat(rows).drop_duplicates(), Path(folder) / ROWS, TESTED)


def merge_ranks(source: str | Path, folder: str | Path) -> None:
    """Add both tables of one folder to those of another."""
    for name, key in ((RANKS, [*WORLD, "method"]), (ROWS, TESTED)):
        _add(_read(Path(source) / name), Path(folder) / name, key)


class Ranks:
    """Both tables of a folder.

    Args:
        results: rows of results.csv; of methods without any of BESIDE they say what their ranks count.

    Raises:
        InputError: a table is not there.
    """

    def __init__(self, folder: str | Path, results: pd.DataFrame | None = None):
        for name in (RANKS, ROWS):
            if not (Path(folder) / name).is_file():
                raise InputError(f"{folder} holds no {name}: `sapo run` and `sapo baselines` write it.")
        ranks, rows = (_read(Path(folder) / name) for name in (RANKS, ROWS))
        self._ranks = dict(tuple(ranks.groupby([*WORLD, "method"])))
        self._users = {key: of["user"].to_numpy() for key, of in rows.groupby(TESTED)}
        self._counts: dict[Method, str] = {}  # what `rank` counts, where that is known
        if results is not None:
            measured = results[results["source"] == "measured"]
            counts = measured.assign(by_sid=hits_by_sid(measured)).drop_duplicates([*WORLD, "method"])
            keys = counts[[*WORLD, "method"]].itertuples(index=False, name=None)
            self._counts = {
                key: "sid" if by_sid else "item" for key, by_sid in zip(keys, counts["by_sid"], strict=True)
            }
        for beside, own in (("item/rank", "sid"), ("sid/rank", "item")):
            if beside in ranks:
                known = ranks.loc[ranks[beside].notna(), [*WORLD, "method"]].drop_duplicates()
                self._counts |= dict.fromkeys(known.itertuples(index=False, name=None), own)

    def __contains__(self, method: Method) -> bool:
        return method in self._ranks

    def holds(self, method: Method, metric: str) -> bool:
        """Whether `by_seed` knows this metric of this method: not of one without ranks, nor where what is asked for, by
        item or by SID, was not kept of it."""
        hit = metric.rpartition("/")[0]
        return method in self and (hit in ("", self._counts.get(method)) or self._beside(method, f"{hit}/rank"))

    def by_seed(self, method: Method, metric: str) -> pd.DataFrame:
        """A metric of every test row: a row a seed, a column a test row, in order.

        Args:
            method: dataset, split, preset and method.
            metric: recall@k or ndcg@k, k up to 10: by what the method ranks, SIDs or items; with "item/" or "sid/"
                before it by item or by SID, whatever the method ranks.

        Raises:
            InputError: no such method, another metric, or one that was not kept of the method.
        """
        if method not in self:
            raise InputError(f"no ranks of {', '.join(method)}.")
        hit, _, plain = metric.rpartition("/")
        name, _, k = plain.partition("@")
        if hit not in ("", "item", "sid") or name not in ("recall", "ndcg") or not k.isdigit() or not 1 <= int(k) <= 10:
            raise InputError(f"{metric!r} does not follow from ranks up to 10; recall@k and ndcg@k do.")
        if not self.holds(method, metric):
            raise InputError(f"{RANKS} holds no ranks by {hit} of {', '.join(method)}: test its runs again.")
        column = "rank" if hit in ("", self._counts.get(method)) else f"{hit}/rank"
        of = self._ranks[method]
        found = of[of[column] > 0]
        before = found[column].to_numpy(dtype=int) - 1
        sharers = found["item/sharers"].to_numpy(dtype=int) if column == "item/rank" else np.ones_like(before)
        worth = np.ones(int(k)) if name == "recall" else 1 / np.log2(np.arange(2, int(k) + 2))
        first = np.concatenate([[0], worth.cumsum()])  # what the first 0, 1, ..., k places are worth
        gained = (first[np.minimum(before + sharers, int(k))] - first[np.minimum(before, int(k))]) / sharers
        seeds, seed = np.unique(of["seed"], return_inverse=True)
        values = np.zeros((len(seeds), int(of["n"].iloc[0])))
        values[seed[(of[column] > 0).to_numpy()], found["row"]] = gained
        return pd.DataFrame(values, index=seeds)

    def values(self, method: Method, metric: str) -> Float64[ndarray, "n"]:
        """The same, averaged over seeds.

        Raises:
            InputError: as `by_seed`.
        """
        return self.by_seed(method, metric).to_numpy().mean(0)

    def gain(self, one: Method, other: Method, metric: str) -> Difference:
        """What one method has over another on the same rows, over the seeds that both have; a method without seeds is
        the same for all of the other's.

        Raises:
            InputError: as `by_seed`; they were not tested on the same rows, or share no seed.
        """
        return self.gains([(one, other, metric)])[0]

    def gains(self, asked: Sequence[tuple[Method, Method, str]]) -> list[Difference]:
        """`gain` of many pairs and metrics that share their test rows.

        Raises:
            InputError: as `gain`; nothing was asked.
        """
        if not asked:
            raise InputError("no pair of methods to compare.")
        read: dict[tuple[Method, str], pd.DataFrame] = {}
        found, first = [], asked[0][0]
        for one, other, metric in asked:
            for method in (one, other):
                if (method, metric) not in read:
                    read[method, metric] = self.by_seed(method, metric)
                if self._tested(method) != self._tested(first):
                    raise InputError(f"{', '.join(first)} and {', '.join(method)} were not tested on the same rows.")
            a, b = read[one, metric], read[other, metric]
            if one[3] in WITHOUT_SEEDS:
                a = a.iloc[[0] * len(b)].set_axis(b.index)
            elif other[3] in WITHOUT_SEEDS:
                b = b.iloc[[0] * len(a)].set_axis(a.index)
            shared = a.index.intersection(b.index)
            if shared.empty:
                raise InputError(f"{', '.join(one)} and {', '.join(other)} share no seed.")
            differences = a.loc[shared].to_numpy() - b.loc[shared].to_numpy()
            found.append(paired_difference(differences, self._users[self._tested(first)]))
        return found

    def _tested(self, method: Method) -> tuple[str, str, int]:
        return *method[:2], int(self._ranks[method]["n"].iloc[0])

    def _beside(self, method: Method, column: str) -> bool:
        return column in self._ranks[method] and bool(self._ranks[method][column].notna().any())


def _add(table: pd.DataFrame, path: Path, key: list[str]) -> None:
    if path.is_file():
        table = pd.concat([others(_read(path), table, key), table])
    if "rank" in table:
        after = table.groupby(RUN, sort=False)["row"].diff().fillna(table["row"]).astype(int)
        place = table.columns.get_loc("row")
        table = table.drop(columns="row")
        table.insert(place, "after", after)
    write_csv(table.astype({name: "Int64" for name in BESIDE if name in table}), path)


def _read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    if "after" not in table:
        return table
    table["row"] = table.groupby(RUN, sort=False)["after"].cumsum()
    return table.drop(columns="after")

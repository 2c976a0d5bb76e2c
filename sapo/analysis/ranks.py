"""The rank of the target in every test row, so that any two methods can be compared on the same rows.

ranks.csv.gz       of every run the rows whose target is among the first 10, and at which rank; the first row too
test_rows.csv.gz   whose rows they are; a data set may have been tested on all of its rows, or on n drawn ones
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float64
from numpy import ndarray

from sapo.analysis.results import WORLD, others
from sapo.analysis.statistics import Interval, bootstrap_means
from sapo.errors import InputError
from sapo.runs import write_table

RANKS, ROWS = "ranks.csv.gz", "test_rows.csv.gz"
TESTED = ["dataset", "split", "n"]
RUN = [*WORLD, "method", "seed"]
Method = tuple[str, str, str, str]  # dataset, split, preset, method


def hits(users: pd.DataFrame, run: Mapping[str, object]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of both tables that one run has.

    Args:
        users: user and rank of every test row, in order; rank 0 is none.
        run: dataset, split, preset, method and seed.
    """
    n = len(users)
    hit = np.union1d(np.flatnonzero(users["rank"]), [0])  # the first row also tells that there was a run
    ranks = pd.DataFrame({"row": hit, "rank": users["rank"].to_numpy()[hit]})
    rows = pd.DataFrame({"row": np.arange(n), "user": pd.factorize(users["user"])[0]})
    tested = {name: run[name] for name in ("dataset", "split")} | {"n": n}
    return (
        ranks.assign(**{name: run[name] for name in RUN}, n=n)[[*RUN, "n", "row", "rank"]],
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
        _add(pd.read_csv(Path(source) / name), Path(folder) / name, key)


class Ranks:
    """Both tables of a folder.

    Raises:
        InputError: a table is not there.
    """

    def __init__(self, folder: str | Path):
        for name in (RANKS, ROWS):
            if not (Path(folder) / name).is_file():
                raise InputError(f"{folder} holds no {name}: `sapo run` and `sapo baselines` write it.")
        ranks, rows = (pd.read_csv(Path(folder) / name) for name in (RANKS, ROWS))
        self._ranks = dict(tuple(ranks.groupby([*WORLD, "method"])))
        self._users = {key: of["user"].to_numpy() for key, of in rows.groupby(TESTED)}

    def __contains__(self, method: Method) -> bool:
        return method in self._ranks

    def values(self, method: Method, metric: str) -> Float64[ndarray, "n"]:
        """A metric of every test row, averaged over seeds.

        Args:
            method: dataset, split, preset and method.
            metric: recall@k or ndcg@k, k up to 10.

        Raises:
            InputError: no such method, or another metric.
        """
        if method not in self._ranks:
            raise InputError(f"no ranks of {', '.join(method)}.")
        name, _, k = metric.partition("@")
        if name not in ("recall", "ndcg") or not k.isdigit() or not 1 <= int(k) <= 10:
            raise InputError(f"{metric!r} does not follow from ranks up to 10; recall@k and ndcg@k do.")
        of = self._ranks[method]
        of_metric = of[of["rank"].between(1, int(k))]
        gained = np.ones(len(of_metric)) if name == "recall" else 1 / np.log2(of_metric["rank"] + 1)
        return np.bincount(of_metric["row"], gained, minlength=int(of["n"].iloc[0])) / of["seed"].nunique()

    def gain(self, one: Method, other: Method, metric: str) -> Interval:
        """What one method has over another on the same rows, with a bootstrap over users.

        Raises:
            InputError: as `values`; they were not tested on the same rows.
        """
        return self.gains([(one, other, metric)])[0]

    def gains(self, asked: Sequence[tuple[Method, Method, str]]) -> list[Interval]:
        """`gain` of many pairs and metrics that share their test rows, all with the same draws of users.

        Raises:
            InputError: as `gain`; nothing was asked.
        """
        differences, first = [], None
        for one, other, metric in asked:
            a, b = self.values(one, metric), self.values(other, metric)
            first = first or (one, (*one[:2], len(a)))
            for method, values in ((one, a), (other, b)):
                if (*method[:2], len(values)) != first[1]:
                    raise InputError(f"{', '.join(first[0])} and {', '.join(method)} were not tested on the same rows.")
            differences.append(a - b)
        if first is None:
            raise InputError("no pair of methods to compare.")
        return bootstrap_means(np.column_stack(differences), self._users[first[1]])


def _add(table: pd.DataFrame, path: Path, key: list[str]) -> None:
    if path.is_file():
        table = pd.concat([others(pd.read_csv(path), table, key), table])
    write_table(table, path)

"""One tidy table of every number: a row a measurement, each with its source and the run it came from."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from sapo.common.files import write_atomically
from sapo.errors import InputError

COLUMNS = ("source", "dataset", "split", "method", "preset", "seed", "metric", "value", "n", "run")
WORLD = ["dataset", "split", "preset"]
KEY = ["dataset", "split", "method", "preset", "seed", "metric"]
SOURCES = ("published", "measured", "exact")
SPLITS = ("leave_one_out", "published_test")
WITHOUT_SEEDS = {"popularity", "cooccurrence", "item_knn", "optimum"}  # computed: nothing in them is random
METHOD = ["source", *WORLD, "method"]


def read_results(path: str | Path) -> pd.DataFrame:
    """Read and validate a results table.

    Columns: source ("published": someone else's number, and `run` says where it stands; "measured": `run` names our
    run; "exact": computed), dataset, split, method, preset, seed, metric, value, n (rows evaluated), run. Published
    rows have neither preset nor seed: "" and <NA>.

    Raises:
        InputError: naming the file and, where there is one, the line.
    """
    return validate_results(read_csv(path, COLUMNS), str(path))


def read_csv(path: str | Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A CSV as text, with its columns checked.

    Raises:
        InputError: the file is missing, empty, not UTF-8 or not a table, or lacks one of `columns`.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise InputError(f"{path}: not a CSV table in UTF-8: {error}") from None
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; expected {', '.join(columns)}.")
    return table[list(columns)]


def to_numbers(table: pd.DataFrame, columns: list[str], where: str) -> pd.DataFrame:
    """`table` with the given columns of text as finite float64 numbers.

    Raises:
        InputError: naming the first line that holds something else.
    """
    table = table.copy()
    for column in columns:
        numbers = table[column].map(_number).astype("float64")
        wrong = np.flatnonzero(~np.isfinite(numbers))
        if len(wrong):
            found = table[column].iloc[wrong[0]]
            raise InputError(f"{where}, line {wrong[0] + 2}: {column} is {found!r}, not a finite number.")
        table[column] = numbers
    return table


def _number(value: object) -> float:
    """The float that is written, to the last digit, which pandas' parsers do not promise; NaN for what is no number."""
    try:
        return math.nan if "_" in str(value) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def validate_results(table: pd.DataFrame, where: str = "results") -> pd.DataFrame:
    """The table with the types of its columns and in the order of its key; `where` names it in errors.

    Raises:
        InputError: a missing column, an unknown source or split, an empty name, a value that is no number, or two rows
            of one (dataset, split, method, preset, seed, metric).
    """
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise InputError(f"{where}: no column {missing[0]!r}; expected {', '.join(COLUMNS)}.")
    table = table[list(COLUMNS)].reset_index(drop=True)
    for column in ("source", "dataset", "split", "method", "preset", "metric", "run"):
        table[column] = table[column].fillna("").astype(str)
    for column, allowed in (("source", SOURCES), ("split", SPLITS)):
        wrong = np.flatnonzero(~table[column].isin(allowed))
        if len(wrong):
            raise InputError(
                f"{where}, line {wrong[0] + 2}: {column} is {table[column].iloc[wrong[0]]!r}; "
                f"it must be one of {', '.join(allowed)}."
            )
    for column in ("dataset", "method", "metric"):
        wrong = np.flatnonzero(table[column] == "")
        if len(wrong):
            raise InputError(f"{where}, line {wrong[0] + 2}: {column} is empty.")
    table = to_numbers(table, ["value"], where)
    for column in ("seed", "n"):
        numbers = pd.to_numeric(table[column].replace("", None), errors="coerce").astype("Float64")
        given = table[column].notna() & (table[column].astype(str) != "")
        wrong = np.flatnonzero(given & (numbers.isna() | (numbers % 1 != 0)).fillna(True))
        if len(wrong):
            found = table[column].iloc[wrong[0]]
            raise InputError(f"{where}, line {wrong[0] + 2}: {column} is {found!r}, neither a whole number nor empty.")
        table[column] = numbers.astype("Int64")
    repeated = np.flatnonzero(table.duplicated(KEY))
    if len(repeated):
        row = ", ".join(f"{column} {table[column].iloc[repeated[0]]}" for column in KEY)
        raise InputError(f"{where}, line {repeated[0] + 2}: a second row of {row}.")
    return table.sort_values(KEY, na_position="first", kind="stable", ignore_index=True)


def write_results(table: pd.DataFrame, path: str | Path) -> None:
    """Validate, sort and write: the same rows in any order give the same bytes, and reading returns the same floats."""
    table = validate_results(table, str(path))
    table["value"] = table["value"].map(repr)
    with write_atomically(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def add_results(results: pd.DataFrame, path: str | Path) -> None:
    """Write rows beside what a file holds of other data sets, splits, presets and methods.

    All seeds of a method are replaced together: a mean must not mix seeds of two configurations.
    """
    if Path(path).is_file():
        results = pd.concat([others(read_results(path), results, [*WORLD, "method"]), results])
    write_results(results, path)


def others(old: pd.DataFrame, fresh: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """The rows of `old` whose key does not occur in `fresh`."""
    return old[~pd.MultiIndex.from_frame(old[key]).isin(pd.MultiIndex.from_frame(fresh[key]))]


def merge_results(existing: pd.DataFrame, added: pd.DataFrame) -> pd.DataFrame:
    """All rows of both; where both have a row of one key, that of `added`."""
    tables = [validate_results(existing, "existing results"), validate_results(added, "added results")]
    return validate_results(pd.concat(tables).drop_duplicates(KEY, keep="last"))


def hits_by_sid(results: pd.DataFrame) -> pd.Series:
    """Whether the plain metrics of each row's method count SIDs: so do those of policies, which have "item/..." beside
    them, and not those of recommenders that rank items.

    Args:
        results: rows of results.csv, with all metrics of a method, or at least those at k = 10.
    """
    by_item = results["metric"].str.startswith("item/")
    return by_item.groupby([results[name].astype(str) for name in METHOD]).transform("any").astype(bool)


def name_hits(results: pd.DataFrame) -> pd.DataFrame:
    """The rows with names of recall@k and ndcg@k that say what a hit is, "item/..." or "sid/...", whatever a method
    ranks, so that columns put like beside like. Other rows are as they were.

    Exact rows stand under both names: the items of a synthetic catalogue have SIDs of their own. Published ones stand
    under "sid/": papers on SIDs compare strings, and print other recommenders beside them.

    Args:
        results: as of `hits_by_sid`.
    """
    by_sid, plain = hits_by_sid(results), results["metric"].str.match(r"(?:recall|ndcg)@\d+$")
    rows = results[plain]
    published, exact = rows["source"] == "published", rows["source"] == "exact"
    named = [results[~plain]]
    for prefix, which in (("sid/", published | exact | by_sid[plain]), ("item/", ~published & ~by_sid[plain])):
        named.append(rows[which].assign(metric=prefix + rows.loc[which, "metric"]))
    return pd.concat(named).sort_index(kind="stable").reset_index(drop=True)


def paired_gains(rows: pd.DataFrame, metric: str, against: str) -> pd.DataFrame:
    """What every method gains over another one of the same seed: a row a seed, a column a method.

    Args:
        rows: measured rows of one dataset, split and preset.

    Raises:
        InputError: no method that shares a seed with `against` in this metric.
    """
    values = rows[rows["metric"] == metric].pivot(index="seed", columns="method", values="value")
    if against not in values:
        raise InputError(f"no rows of {metric!r} for {against!r}; there are {', '.join(values.columns) or 'none'}.")
    gains = values.drop(columns=against).sub(values[against], axis=0).dropna(axis=1, how="all")
    if gains.empty:
        raise InputError(f"no method shares a seed with {against!r} in {metric!r}.")
    return gains

"""What the figure scripts share: where numbers come from, where artefacts go, and how one is described.

Scripts read tables and never train. OUT holds the tables of the user's own runs; without them the committed record in
`paper_figures/data` is drawn.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sapo.analysis.results import SPLITS, read_csv, to_numbers
from sapo.analysis.tables import write_table
from sapo.common.files import write_atomically
from sapo.errors import InputError

RECORD = Path(__file__).resolve().parent / "data"
PUBLISHED = RECORD / "published.csv"
DECODING = (
    "Policies that think do so greedily; 10 beams, scored by the softmax over the codes that the catalogue allows."
)
BY_ITEM = (
    "By item a hit is the target itself; of policies, which generate SIDs, the items of a SID come in random order, in "
    "expectation."
)
HITS = (
    f"{BY_ITEM} By SID it is the target's SID, which a few items share; of a ranking of items the first place of each "
    "SID counts."
)
AS_PRINTED = (
    "Published numbers stand by SID, as printed: papers compare strings, and print what names items beside them."
)
ABLATION_ONLY = ("grpo_step_reward", "sapo_outcome_reward", "sapo_sequence_mean")  # drawn beside what they differ from
ONE_WORLD = ["dataset", "split", "preset"]  # runs that may be compared


@dataclass(frozen=True)
class Artefact:
    """A figure or table that was written.

    Args:
        files: what was written; figures PDF and PNG, tables CSV and LaTeX.
        source: "measured", "published" and "exact", as far as its numbers are of that kind; "" without numbers.
        read: the table of numbers it was made from.
    """

    name: str
    title: str
    caption: str
    source: str
    files: tuple[Path, ...]
    read: Path | None = None
    table: pd.DataFrame | None = None


def find_input(out: Path, given: Path | None, name: str) -> Path:
    """The file that `--results` names, else OUT's, else the committed one.

    Once OUT has results of its own, nothing of the committed record is mixed in.
    """
    if given is not None:
        return given
    own = out / name
    if own.is_file():
        return own
    if (out / "results.csv").is_file() or not (RECORD / name).is_file():
        raise InputError(f"no {name} in {out} and no record to fall back on: `sapo run --out {out}` writes it.")
    return RECORD / name


def find_recorded(out: Path, given: Path | None, name: str) -> Path:
    """The file that `--results` names, else OUT's, else the committed one, for tables that no run under OUT makes."""
    for path in (given, out / name, RECORD / name):
        if path is not None and (path.is_file() or path is given):
            return path
    raise InputError(f"no {name} in {out} or {RECORD}.")


def find_looks(out: Path, given: Path | None) -> Path | None:
    """What validation looks saw, where `find_input` finds it; None where OUT's runs looked at none.

    Raises:
        InputError: nothing of the kind, and no runs under OUT either.
    """
    if given is None and (out / "results.csv").is_file() and not (out / "looks.csv.gz").is_file():
        return None
    return find_input(out, given, "looks.csv.gz")


def find_exact(out: Path, given: Path | None) -> tuple[Path, pd.DataFrame]:
    """The laboratory's table, which `sapo lab` writes, and where it was found.

    Raises:
        InputError: no such file, a missing column, a value that is no number.
    """
    path = find_recorded(out, given, "exact.csv")
    numbers = ["items", "exact_match", "coupling", "group_size", "seed"]
    numbers += ["efficiency", "efficiency_256", "cosine", "silent"]
    rows = to_numbers(read_csv(path, ("objective", "layout", *numbers)), numbers, str(path))
    if rows.empty:
        raise InputError(f"{path}: no rows.")
    return path, rows.astype({"items": int, "group_size": int, "seed": int})


def find_timing(out: Path, given: Path | None) -> tuple[Path, pd.DataFrame]:
    """What `make bench` measured on one machine, and where it was found.

    Raises:
        InputError: no such file, a missing column, a value that is no number, no rows.
    """
    path = find_recorded(out, given, "timing.csv")
    texts = ("axis", "what", "who", "size", "dtype", "machine", "versions")
    optional = ("value", "low", "high", "peak_bytes")  # a ratio has no range, and not all memory is that of tensors
    rows = read_csv(path, (*texts, "setup", *optional, "seconds", "rounds"))
    rows = to_numbers(rows, ["seconds", "rounds"], str(path))
    if rows.empty:
        raise InputError(f"{path}: no rows.")
    for name in optional:
        rows[name] = to_numbers(rows[rows[name] != ""], [name], str(path))[name].reindex(rows.index)
    return path, rows


def setups(rows: pd.DataFrame) -> str:
    """What stayed the same over timed rows, for a caption."""
    return "; ".join(dict.fromkeys(rows["setup"]))


def how_timed(rows: pd.DataFrame) -> str:
    """Number of calls, machine, precision and versions of timed rows, for a caption."""
    fewest, most = int(rows["rounds"].min()), int(rows["rounds"].max())
    calls = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    machines = rows[["machine", "dtype", "versions"]].drop_duplicates().itertuples()
    where = "; ".join(f"{row.machine}, {row.dtype}, {row.versions}" for row in machines)
    return f"Medians of {calls} calls in turns after one to warm up, freed memory kept; {where}."


def read_worlds(
    path: Path, texts: tuple[str, ...], numbers: tuple[str, ...]
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Split a tidy CSV by data set, split and preset: (suffix for file names, name for captions, rows) of each.

    The suffix is empty where there is only one.

    Raises:
        InputError: as `read_csv`; a value that is no number; no rows; an unknown split.
    """
    table = to_numbers(read_csv(path, (*ONE_WORLD, *texts, *numbers)), list(numbers), str(path))
    if table.empty:
        raise InputError(f"{path}: no rows.")
    if unknown := set(table["split"]) - set(SPLITS):
        raise InputError(f"{path}: unknown split {min(unknown)!r}; known are {', '.join(SPLITS)}.")
    groups = table.groupby(ONE_WORLD, sort=True)
    for (dataset, split, preset), rows in groups:
        suffix = f"-{dataset}-{split}-{preset}" if len(groups) > 1 else ""
        yield suffix, f"{dataset}, {split.replace('_', ' ')}, preset {preset}", rows


def doubtful(results: pd.DataFrame) -> list[str]:
    """Published methods whose numbers contradict each other."""
    rows = results[results["run"].str.contains("cannot both be right")]
    notes = (
        f"As published, recall and NDCG of {', '.join(sorted(methods.unique()))} on {dataset} cannot both be right."
        for dataset, methods in rows.groupby("dataset")["method"]
    )
    return list(notes)


def save_figure(figure: Figure, out: Path, name: str) -> tuple[Path, ...]:
    """Write OUT/figures/name.pdf and .png, without dates, and close the figure. Call it inside `figure_style()`."""
    paths = (out / "figures" / f"{name}.pdf", out / "figures" / f"{name}.png")
    for path, metadata in zip(paths, ({"CreationDate": None}, {"Software": None}), strict=True):
        with write_atomically(path) as temporary:
            figure.savefig(temporary, metadata=metadata)
    plt.close(figure)
    return paths


def save_table(table: pd.DataFrame, out: Path, name: str, notes: str) -> tuple[Path, ...]:
    """Write OUT/tables/name.csv and .tex."""
    return write_table(table, out / "tables" / name, notes)


def command_line(main: Callable[..., list[Artefact]], doc: str | None, takes_results: bool = True) -> None:
    """Run a script's `main`; an error of the input is one line and exit status 1."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RECORD.parent / "out", help="folder of results and artefacts")
    if takes_results:
        parser.add_argument("--results", type=Path, help="the table to read instead of OUT's or the committed one")
    try:
        for artefact in main(**vars(parser.parse_args())):
            print(*artefact.files, sep="\n")
    except InputError as error:
        sys.exit(f"error: {error}")

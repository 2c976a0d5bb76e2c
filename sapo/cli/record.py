"""Commands of the laboratory, the record and its figures."""

import sys
from dataclasses import dataclass
from pathlib import Path

from sapo.cli.options import at_least_one, rounded
from sapo.errors import InputError


@dataclass(frozen=True)
class Figures:
    """Draw all figures and tables from the results under OUT, and an index page. Nothing is trained."""

    out: Path = Path("paper_figures/out")
    """Folder with results.csv; figures, tables and index.html go there."""

    def __call__(self) -> None:
        import runpy

        folder = Path(__file__).resolve().parent.parent.parent / "paper_figures"
        if not (folder / "make_all.py").is_file():
            raise InputError(
                f"no figure scripts in {folder}: this command needs a checkout, installed with `pip install -e`."
            )
        sys.path.insert(0, str(folder))
        runpy.run_path(str(folder / "make_all.py"))["main"](self.out)


@dataclass(frozen=True)
class Publish:
    """Add the finished results under OUT to the committed record that figures fall back on."""

    out: Path = Path("paper_figures/out")
    """Folder with results.csv, dynamics.csv.gz and rollouts.csv.gz."""
    to: Path = Path("paper_figures/data")
    """The record."""

    def __call__(self) -> None:
        from sapo.experiments.runner import publish

        for path in publish(self.out, self.to):
            print(path)


@dataclass(frozen=True)
class Claims:
    """Test the claims of the paper and its critics: each a number with an interval and a computed verdict.

    1 an outcome reward makes step credit trajectory credit, 2 signs differ within a completion, 3 starvation, 4 who
    maximises matches maximises exact match, 5 sparsity, 6 chance matches, 7 division by the std, 8 the layout; of
    training 9 stability, 10 gains over the start, 11 gains where exact matches are rarest, 12 step against outcome
    credit, 13 both components, 14 graded credit, 15 whether thinking pays, 16 gains at equal KL, 17 what the trie
    keeps of the softmax; 18 steps whose number the policy decides.
    """

    only: int | None = None
    """Number of one claim, which is printed and not written; all, into RECORD/claims.csv, where left out."""
    record: Path = Path(__file__).resolve().parent.parent.parent / "paper_figures" / "data"
    """Folder of the recorded rollouts.csv.gz and dynamics.csv.gz, and of claims.csv."""
    data: tuple[Path, ...] = ()
    """Folders of TSV files, for what claim 4 says of real data. Recorded rows of others stay."""

    def __call__(self) -> None:
        import pandas as pd

        from sapo.common.files import write_csv
        from sapo.lab.claims import ledger

        rows = ledger(self.record, self.only, self.data)
        for claim, of_claim in rows.groupby("claim", sort=False):
            print(claim)
            for row in of_claim.itertuples():
                print(f"    {row.experiment}\n        {row.value:.4g} [{row.low:.4g}, {row.high:.4g}]: {row.verdict}")
        if self.only is None:
            path = self.record / "claims.csv"
            if path.is_file():
                old = pd.read_csv(path)
                others = old["command"].str.contains("--data") & ~old["command"].isin(rows["command"])
                rows = pd.concat([rows, old[others]])
            write_csv(rounded(rows, 9), path)
            print(path)


@dataclass(frozen=True)
class Lab:
    """Sweep the laboratory: exact efficiency, bias and silence of objectives, from dense to sparse. Some minutes."""

    to: Path = Path("paper_figures/out")
    """Folder of exact.csv, from which `sapo figures --out` of the same folder draws."""
    worlds: int = 8
    """Worlds a cell, over which intervals are taken."""

    def __call__(self) -> None:
        from sapo.common.files import write_csv
        from sapo.lab.sweep import Sweep, sweep

        at_least_one("worlds", self.worlds)
        rows = sweep(Sweep(seeds=tuple(range(self.worlds))))
        write_csv(rounded(rows, 6), self.to / "exact.csv")
        print(self.to / "exact.csv")

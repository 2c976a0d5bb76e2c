"""`make bench`: a table of ratios, and how cost grows.

Each row alternates ours and theirs in one process, of its own so that no row sees the memory another has left behind,
and takes medians; results are compared in the same run, and a row whose results differ makes the command fail.
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import transformers
import trl
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import growth, rows
from benchmarks.rows import Measured, quiet
from benchmarks.world import LARGE, SMALL, Sizes, World
from sapo.common.files import write_atomically

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Bench:
    """Measure speed and memory against what a user would run instead."""

    out: Path = HERE / "out"
    """Folder of bench.json and timing.csv."""
    rounds: int = 5
    """Calls of each side at least; the median counts. What takes less than half a second gets five times as many."""
    size: Literal["small", "large"] = "small"
    """"small" is a laptop's; "large" is a random model as large as Qwen3-0.6B, for a GPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model. Results are compared in float32 only: bfloat16 rounds each side in its own way."""
    growth: bool = True
    """Measure how cost grows, too."""
    record: Path | None = None
    """Also write timing.csv into this folder (`paper_figures/data` is the committed record)."""


def show(ratios: list[Measured]) -> Table:
    """For people."""
    table = Table(title="ours against what a user would run instead")
    for name in ("what", "against"):
        table.add_column(name)
    for name in ("ratio", "ours, s", "theirs, s", "ours, MB", "theirs, MB", "equal"):
        table.add_column(name, justify="right")
    for row in ratios:
        result = row.result
        table.add_row(
            result.what,
            result.against,
            f"{result.ratio:.1f} x",
            f"{result.ours_seconds:.4f}",
            f"{result.theirs_seconds:.4f}",
            *("–" if held is None else f"{held / 1e6:.0f}" for held in (row.ours_bytes, row.theirs_bytes)),
            {True: "yes", False: "NO", None: "–"}[result.equal],
        )
    return table


def timing_rows(ratios: list[Measured], grown: list[growth.Row], bench: Bench) -> pd.DataFrame:
    """Everything measured, with where it was measured."""
    lines: list[growth.Row] = []
    for row in ratios:
        of = row.result
        for who, seconds, peak in (
            ("ours", of.ours_seconds, row.ours_bytes),
            (of.against, of.theirs_seconds, row.theirs_bytes),
        ):
            lines.append({"axis": "ratio", "what": of.what, "who": who, "seconds": seconds, "peak_bytes": peak})
            lines[-1]["rounds"] = row.rounds
    columns = ["axis", "value", "what", "setup", "who", "seconds", "low", "high", "peak_bytes", "rounds"]
    table = pd.DataFrame(lines + grown, columns=columns)
    gpu = bench.device == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"{processor()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    return table.assign(size=bench.size, dtype=bench.dtype, machine=machine, versions=versions)


def processor() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def main(bench: Bench, sizes: Sizes | None = None, quick: bool = False) -> int:
    """Run everything; returns the exit status. `quick` stays in this process, and looks at two points of each axis."""
    world = World(sizes or (LARGE if bench.size == "large" else SMALL), bench.device, getattr(torch, bench.dtype))
    console = Console(width=None if sys.stdout.isatty() else 140)
    results, start = [], time.perf_counter()
    quiet()
    with tempfile.TemporaryDirectory(prefix="sapo-bench-") as folder:
        for number in range(len(list(rows.cases(world, Path(folder))))):
            job = (world, Path(folder), number, bench.rounds)
            if quick:
                results.append(rows.run_alone(*job))
            else:
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    results.append(process.submit(rows.run_alone, *job).result())
            result = results[-1].result
            console.print(f"[{time.perf_counter() - start:4.0f} s] {result.what}: {result.ratio:.1f} x")
        grown = []
        for row in growth.all_growth(world, Path(folder), quick) if bench.growth else ():
            grown.append(row)
            console.print(
                f"[{time.perf_counter() - start:4.0f} s] {row['axis']} {row['value']}, {row['what']}, {row['who']}: "
                f"{row['seconds']:.4f} s"
            )
    console.print(show(results))
    bench.out.mkdir(parents=True, exist_ok=True)
    with write_atomically(bench.out / "bench.json") as temporary:
        temporary.write_text(json.dumps([asdict(row.result) for row in results], indent=1) + "\n")
    table = timing_rows(results, grown, bench)
    for out in filter(None, (bench.out, bench.record)):
        with write_atomically(out / "timing.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
    console.print(f"{time.perf_counter() - start:.0f} s; {bench.out}/bench.json and timing.csv")
    different = [row.result.what for row in results if row.result.equal is False]
    if different:
        console.print(f"[bold]results differ: {', '.join(different)}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Bench)))

"""kill -9 at random moments: the same command goes on, and ends with the numbers and weights of an undisturbed run.

`SAPO_KILLS=30 pytest tests/test_faults.py` kills that often; a few times otherwise.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from test_experiments import TINY

from sapo.analysis.results import read_results
from sapo.experiments import run
from sapo.runs import Job

KILLS = int(os.environ.get("SAPO_KILLS", "3"))
READY = "ready"
# Long enough to be hit between checkpoints of every stage, and with a system of every kind that goes on alone.
LONGER = replace(
    TINY,
    stage1=replace(TINY.stage1, updates=60),
    stage2=replace(TINY.stage2, updates=40),
    stage3=replace(TINY.stage3, updates=24),
    seeds=(0,),
)


def main(out: str) -> None:
    """What the killed process does."""
    print(READY, flush=True)
    run(Job(LONGER, out), workers=1)


def start(out: Path) -> subprocess.Popen:
    """A process that has imported everything and begins."""
    command = [sys.executable, "-c", f"from test_faults import main; main({str(out)!r})"]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == READY
    return process


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]


def timeless(out: Path) -> pd.DataFrame:
    results = read_results(out / "results.csv")
    return results[results["metric"] != "seconds"].reset_index(drop=True)


def weights(out: Path) -> dict[str, bytes]:
    files = out.glob("runs/**/policy/model.safetensors")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.monotonic()
    finish(start(undisturbed))
    length = time.monotonic() - began
    rng = np.random.default_rng(0)
    hits, stages = 0, set()
    for _ in range(KILLS):
        process = start(killed)
        try:
            process.communicate(timeout=rng.uniform(0, 2 * length / KILLS))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            hits += 1
            newest = max(killed.glob("runs/**/run.json"), key=lambda path: path.stat().st_mtime, default=None)
            stages.add(None if newest is None else newest.parent.name.rsplit("-", 1)[0])
    print(f"{hits} kills, in {sorted(map(str, stages))}; {length:.0f} s undisturbed")
    assert hits
    finish(start(killed))
    pd.testing.assert_frame_equal(timeless(undisturbed), timeless(killed), check_exact=True)
    assert weights(undisturbed) == weights(killed)
    assert len(weights(killed)) >= 5  # stages 1 and 2, the control, SAPO and GRPO
    assert not list(killed.rglob(".partial-*"))

"""kill -9 at random moments: the same command goes on, and ends with the numbers and weights of an undisturbed run.

`SAPO_KILLS=30 pytest tests/test_faults.py` kills that often; a few times otherwise.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_experiments import TINY

from sapo.analysis.results import read_results
from sapo.experiments.run_folder import Job
from sapo.experiments.runner import run

KILLS = int(os.environ.get("SAPO_KILLS", "3"))
AT_ONCE = 3
READY = "ready"
# Long enough to be hit between checkpoints of every stage, and with a system of every kind that goes on alone.
LONGER = replace(
    TINY,
    stage1=replace(TINY.stage1, updates=60),
    stage2=replace(TINY.stage2, updates=40),
    stage3=replace(TINY.stage3, updates=24),
    seeds=(0,),
    systems=("LICD", "Rec-R1"),
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


def where(out: Path) -> str:
    """The run that was written to last, and whether it was done, so that something was evaluated or came next."""
    newest = max(out.glob("runs/**/run.json"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return "nothing"
    done = json.loads(newest.read_text())["status"] == "finished"
    return ("after " if done else "") + newest.parent.name.rsplit("-", 1)[0]


def timeless(out: Path) -> pd.DataFrame:
    results = read_results(out / "results.csv")
    return results[results["metric"] != "seconds"].reset_index(drop=True)


def weights(out: Path) -> dict[str, bytes]:
    files = out.glob("runs/**/policy/model.safetensors")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder of results, and the seconds that they took, without imports."""
    out = tmp_path_factory.mktemp("undisturbed")
    process, began = start(out), time.monotonic()
    finish(process)
    return out, time.monotonic() - began


@pytest.mark.parametrize("seed", range(-(-KILLS // AT_ONCE)))
def test_a_run_that_is_killed_ends_as_one_that_is_not(seed, undisturbed, tmp_path):
    """Each is killed a few times: of many kills on end most would hit the same place, before it is left behind."""
    whole, length = undisturbed
    rng, hits = np.random.default_rng(seed), []
    for _ in range(min(AT_ONCE, KILLS)):
        process = start(tmp_path)
        try:
            process.communicate(timeout=rng.uniform(0, 1.5 * length / AT_ONCE))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            hits.append(where(tmp_path))
    print(f"{len(hits)} kills, in {hits}; {length:.0f} s undisturbed")
    assert hits
    finish(start(tmp_path))
    pd.testing.assert_frame_equal(timeless(whole), timeless(tmp_path), check_exact=True)
    assert weights(whole) == weights(tmp_path)
    assert len(weights(tmp_path)) >= 5  # stages 1 and 2, the control, SAPO and GRPO
    assert not list(tmp_path.rglob(".partial-*"))

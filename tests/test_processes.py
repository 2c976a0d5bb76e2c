"""Two processes share the work of one, as `accelerate launch` and `torchrun` start them, and find what one finds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


def start(work, out, processes, sharded=False):
    """The standard error of a work on so many processes; the work must succeed."""
    out.mkdir()
    launch = []
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = [f"--nproc_per_node={processes}", f"--master_port={port}", f"--log-dir={out.parent}"]
        launch = ["-m", "torch.distributed.run", *options]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, *launch, str(HERE / "shared_work.py"), work, str(out), *["sharded"] * sharded]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize("work", ["supervised", "reinforced", "resumed"])
def test_an_update_of_two_is_that_of_one(work, tmp_path):
    """Whether each process holds the model or half of it; and for halves, whether training was stopped or not."""
    weights = []
    for processes, sharded in ((1, False), (2, False), (2, True)):
        out = tmp_path / f"{processes}{sharded}"
        start(work, out, processes, sharded)
        weights.append(load_file(out / "weights.safetensors"))
    for of_two in weights[1:]:
        assert weights[0].keys() == of_two.keys()
        for name, value in weights[0].items():
            torch.testing.assert_close(of_two[name], value, rtol=1e-5, atol=1e-5, msg=name)
    if work == "reinforced":
        names = {name.split("/")[0] for name in weights[0]}
        moved = {
            one: max((weights[0][f"{one}/{key}"] - weights[0][f"grpo/{key}"]).abs().max() for key in suffixes)
            for one in names - {"grpo"}
            for suffixes in [{name.split("/", 1)[1] for name in weights[0]}]
        }
        assert min(moved.values()) > 1e-4  # each objective went its own way


def test_an_evaluation_of_two_is_that_of_one(tmp_path):
    found = []
    for processes in (1, 2):
        start("evaluated", tmp_path / str(processes), processes)
        found.append(json.loads((tmp_path / str(processes) / "found.json").read_text()))
    assert found[0] == found[1]
    assert len(found[0][1]["user"]) == 2


def test_broken_weights_stop_both(tmp_path):
    start("broken", tmp_path / "2", 2)
    for process in (0, 1):
        assert "weights are broken" in (tmp_path / "2" / f"{process}.txt").read_text()


def test_completions_of_their_own_give_parts_the_update_of_whole_weights(tmp_path):
    """Two processes either way, which draw the same; DAPO lets one sample more often than the other."""
    weights = []
    for sharded in (False, True):
        start("rolled", tmp_path / str(sharded), 2, sharded)
        weights.append(load_file(tmp_path / str(sharded) / "weights.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_weights_in_parts_are_gathered_for_rollouts(tmp_path):
    start("sampled", tmp_path / "2", 2, sharded=True)
    for found in json.loads((tmp_path / "2" / "found.json").read_text()):
        assert max(found["apart"]) < 1e-5
        assert 0.4 < found["share"] < 0.6
        assert found["class"] == "Qwen3ForCausalLM"


def test_other_ways_to_spread_weights_are_refused(tmp_path):
    start("unknown", tmp_path / "2", 2, sharded=True)
    for said in (json.loads((tmp_path / "2" / f"{process}.json").read_text()) for process in (0, 1)):
        found = [text.removeprefix("FSDP with ").partition(" is not known here")[0] for text in said]
        assert found == [
            "fsdp_version 1",
            "state_dict_type SHARDED_STATE_DICT",
            "cpu_ram_efficient_loading True",
            "reshard_after_forward False",
        ]
        assert all("accelerate launch --use_fsdp --fsdp_version 2" in text for text in said)


def test_a_job_of_two_goes_through_all_stages_and_the_first_alone_writes(tmp_path):
    tables = []
    for processes, sharded in ((1, False), (2, False), (2, True)):
        out = tmp_path / f"{processes}{sharded}"
        start("whole", out, processes, sharded)
        results = pd.read_csv(out / "job" / "results.csv")
        results = results[results["metric"] != "seconds"]
        tables.append(results.set_index(["method", "seed", "metric"])["value"].sort_index())
    one, *others = tables
    supervised = [method for method in one.index.unique("method") if method not in ("sapo", "grpo")]
    assert {"stage2", "stage2_no_thinking", "LICD", "RecCoT blind"} <= set(supervised)
    for two in others:
        assert list(one.index) == list(two.index)
        # stage 3 draws other rollouts on other processes; what comes before it differs by rounding
        pd.testing.assert_series_equal(one.loc[supervised], two.loc[supervised], rtol=1e-3, atol=1e-3)
    left = [path for path in tmp_path.rglob("job/**/*") if "checkpoint" in path.name or ".partial" in path.name]
    assert not left


def test_what_does_not_divide_is_refused(tmp_path):
    start("refused", tmp_path / "2", 2)
    for process in (0, 1):
        said = (tmp_path / "2" / f"{process}.txt").read_text()
        assert "7 prompts an update do not divide among 2 processes." in said
        assert "2 workers do tasks side by side; 2 processes share each task." in said

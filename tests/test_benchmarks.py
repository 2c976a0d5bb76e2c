"""The benchmarks at toy size: every comparison holds, and what they write is what figures and readers expect."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from benchmarks.__main__ import Bench, main
from benchmarks.ratios import Case, beam_case, same_lists, update_case
from benchmarks.rows import cases
from benchmarks.world import SMALL, World, peak_bytes
from sapo.decoding.beam_search import Beams

TOY = replace(
    SMALL, prompts=3, group_size=4, prompt_tokens=9, new_tokens=6, items=300, codes=8, vocabulary=400, hidden=16, head=4
)
FIELDS = ["what", "against", "ratio", "ours_seconds", "theirs_seconds", "equal"]


def test_every_result_is_compared_and_written(tmp_path, monkeypatch):
    """All rows but those whose size is fixed, which the next test takes; and how cost grows."""
    few = lambda world, parent: list(cases(world, parent))[:6]  # noqa: E731
    monkeypatch.setattr("benchmarks.rows.cases", few)
    monkeypatch.setattr("benchmarks.growth.with_items", lambda world, values: iter(()))
    status = main(Bench(out=tmp_path, rounds=1, record=tmp_path / "record"), TOY, quick=True)
    assert status == 0
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [list(row) for row in rows] == [FIELDS] * 6
    assert all(row["equal"] is True for row in rows)
    assert [row["ratio"] for row in rows] == pytest.approx(
        [row["theirs_seconds"] / row["ours_seconds"] for row in rows]
    )
    assert [row["what"].partition(" (")[0] for row in rows] == [
        "training step",
        "policy update",
        "policy update, sharing alone",
        "sampling rollouts",
        "beam search 10 beams",
        "beam search 50 beams",
    ]
    timing = pd.read_csv(tmp_path / "timing.csv")
    assert (tmp_path / "record" / "timing.csv").read_bytes() == (tmp_path / "timing.csv").read_bytes()
    assert set(timing["axis"]) == {
        "ratio",
        "step",
        "completions a prompt",
        "prompt tokens",
        "steps K",
        "beams",
        "requests",
    }
    assert set(timing.loc[timing["axis"] == "step", "who"]) >= {"sapo", "grpo", "grpo, stock TRL"}
    assert (timing["seconds"] > 0).all()
    grown = timing[timing["axis"] != "ratio"]
    assert ((grown["low"] <= grown["seconds"]) & (grown["seconds"] <= grown["high"])).all()
    assert timing[["machine", "versions", "dtype"]].notna().all(axis=None)


def test_what_differs_is_said_and_fails(tmp_path, monkeypatch, capsys):
    case = Case("guess", "truth", lambda: 1, lambda: 2, lambda: False, tensors=False)
    monkeypatch.setattr("benchmarks.rows.cases", lambda world, parent: [lambda: case])
    assert main(Bench(out=tmp_path, rounds=1, growth=False), TOY, quick=True) == 1
    assert json.loads((tmp_path / "bench.json").read_text())[0]["equal"] is False
    assert "results differ: guess" in capsys.readouterr().out


def test_rows_of_a_fixed_size_hold_at_a_smaller_one():
    from benchmarks.ratios import advantages_case, trie_allowed_case, trie_build_case

    world = World(TOY)
    for case in (
        advantages_case(world, prompts=5, group=4, tokens=9),
        trie_build_case(world, items=1200),
        trie_allowed_case(world, items=1200, prefixes=100),
    ):
        assert case.equal()


def test_comparisons_notice_a_difference(monkeypatch):
    """A scale that is off by a thousandth, a list in another order."""
    case = update_case(World(TOY))
    assert case.equal()
    import benchmarks.ratios as ratios

    exact = ratios.PackedGroups.logits
    monkeypatch.setattr(ratios.PackedGroups, "logits", lambda *arguments: exact(*arguments) * 1.001)
    assert not case.equal()
    sids, scores = torch.tensor([[[0, 1], [1, 0], [1, 1]]]), torch.tensor([[-1.0, -2.0, -3.0]])
    assert same_lists(Beams(sids, scores), sids, scores)
    assert not same_lists(Beams(sids[:, [1, 0, 2]], scores), sids, scores)
    tied = torch.tensor([[-1.0, -1.0, -3.0]])
    assert same_lists(Beams(sids[:, [1, 0, 2]], tied), sids, tied)  # rounding alone orders equal scores
    assert not same_lists(Beams(sids, scores + 0.01), sids, scores)


def test_a_shared_prompt_takes_at_most_half_of_the_memory():
    """At the sizes of the benchmark but for fewer prompts; counted from allocations, not from the clock."""
    world = World(replace(SMALL, prompts=4))
    case = update_case(world)
    case.ours()
    case.theirs()
    ours, theirs = peak_bytes(world, case.ours), peak_bytes(world, case.theirs)
    assert 0 < ours <= theirs / 2


def test_beams_of_any_world_agree():
    world = World(replace(TOY, items=25, levels=2))
    for beams in (2, 3, 9):
        assert beam_case(world, beams, batch=4, prompt_tokens=5).equal()

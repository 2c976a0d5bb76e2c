"""The ledger: verdicts follow from numbers, numbers from shipped code, and the record is what the commands make."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from sapo.credit.objectives import Objective
from sapo.errors import InputError
from sapo.lab.claims import CLAIMS, COLUMNS, ledger
from sapo.lab.credit_claims import _step_weight
from sapo.lab.exact import efficiency, expected_update, second_moment, silent_share, true_gradient
from sapo.lab.findings import against_one
from sapo.lab.goal_claims import _lost
from sapo.lab.sweep import COLUMNS as CELL
from sapo.lab.sweep import FEW, Sweep, sparse_world, sweep

RECORD = Path(__file__).resolve().parent.parent / "paper_figures" / "data"


@pytest.fixture
def record(tmp_path):
    """Two seeds of 2 prompts x 4 completions on 2 levels, counted by hand below."""
    match = {
        0: [[(1, 1), (0, 1), (0, 0), (0, 0)], [(0, 0)] * 4],
        1: [[(1, 1), (1, 0), (0, 0), (0, 0)], [(1, 0), (0, 1), (0, 0), (0, 0)]],
    }
    world = {"dataset": "tiny", "split": "leave_one_out", "preset": "quick"}
    rows = [
        {**world, "seed": seed, "prompt": p, "rollout": r, "level": k + 1, "match": hit}
        for seed, prompts in match.items()
        for p, group in enumerate(prompts)
        for r, hits in enumerate(group)
        for k, hit in enumerate(hits)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "rollouts.csv.gz", index=False)
    curves = pd.DataFrame(columns=["dataset", "split", "preset", "method", "seed", "step", "metric", "value"])
    curves.to_csv(tmp_path / "dynamics.csv.gz", index=False)
    return tmp_path


def test_outcome_reward_and_lengths(record):
    rows = ledger(record, 1)
    assert rows["value"].iloc[0] == 0
    assert rows["verdict"].iloc[0] == "holds, exactly"
    # of 7 tokens each weighs 1/7, or 1/3, 1/6 and 1/12: (1/3 - 1/7) + 2 (1/6 - 1/7) = 5/21 go to the first three
    assert rows["value"].iloc[1] == pytest.approx(5 / 21)
    assert rows["verdict"].iloc[1] == "holds"


def test_signs_by_hand(record):
    """Level 1 of the first group of seed 0 is (1, 0, 0, 0), level 2 (1, 1, 0, 0): the second completion is wrong, then
    right. Seed 1: the second of group 1, and the first two of group 2."""
    row = ledger(record, 2).iloc[0]
    assert row["value"] == pytest.approx((1 / 8 + 3 / 8) / 2)
    assert row["low"] == 0  # two seeds; the bound is that of a share
    assert row["verdict"] == "seen, for 25.0% of completions, share uncertain"


def test_starvation_by_hand(record):
    """Exact matches: one completion of seed 0's first group and one of seed 1's. The groups left are silent."""
    rows = ledger(record, 3)
    assert rows["value"].iloc[0] == pytest.approx(0.5)
    # SAPO is silent in 1/2 of seed 0's groups, so that nothing is left to repair there, and in none of seed 1's, whose
    # second group a graded reward tells apart as well: (1, 0) is worth 1/2.
    assert rows[rows["experiment"].str.contains("graded")]["value"].item() == pytest.approx(1.0)
    assert rows["verdict"].iloc[0] == "undecided"


def test_chance_matches_by_hand(record):
    """Beyond level 1, seed 0 matches twice and once under a wrong prefix; seed 1 as often."""
    assert ledger(record, 6)["value"].iloc[0] == pytest.approx(0.5)


def test_maximisers_by_hand():
    """J_match of (1, 0): .6 + .4, more than .4 + .4 of the likeliest target and .6 + .3 of the others."""
    items = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    targets, probs = torch.tensor([[0, 0], [1, 1], [1, 2]]), torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64)
    assert _lost(items, targets, probs, "match").item() == pytest.approx(0.4)
    # gated, (1, 1) earns .6 + .3; only targets can be named, the same wins
    assert _lost(items, targets, probs, "gated").item() == pytest.approx(0.1)
    assert _lost(targets, targets, probs, "match").item() == pytest.approx(0.1)
    rows = ledger(RECORD, 4)
    assert (rows["verdict"].str.startswith("holds") == (rows["value"] < 1e-12)).all()
    assert len(rows) == 10
    assert rows["value"].max() == pytest.approx(0.4)
    # (0, 0) and (1, 0) are worth the same: a tie is broken in favour of the claim, whatever the last bit says
    targets, probs = torch.tensor([[0, 0], [1, 1], [1, 2]]), torch.tensor([[0.3, 0.1, 0.2]]).double()
    assert _lost(items, targets, probs / probs.sum(), "match").item() == pytest.approx(0)


def test_verdicts_follow_from_intervals():
    from sapo.analysis.statistics import Interval

    assert against_one(Interval(3.0, 2.0, 4.0)) == "holds, 3 times"
    assert against_one(Interval(0.5, 0.4, 0.6)) == "fails, 0.5 times"
    assert against_one(Interval(1.1, 0.9, 1.3)) == "undecided"
    assert against_one(Interval(1.001, 1.0001, 1.002)) == "equal within 1 %"


def test_the_sweep_is_what_the_laboratory_says():
    grid = Sweep(("grpo", "sapo"), (0.1,), (0.5,), (4,), items=(64, 26), seeds=(1,))
    both = sweep(grid)
    few = both[(both["items"] == 26) & (both["objective"] == "sapo")].iloc[0]
    constrained = sparse_world(0.1, 0.5, seed=1, catalogue=FEW)
    assert len(constrained.sids) == 26 * 2**3
    assert few["silent"] == silent_share("sapo", constrained, 4)
    rows = both[both["items"] == 64].set_index("objective")
    world = sparse_world(0.1, 0.5, seed=1)
    gradient = true_gradient(world)
    for key in ("grpo", "sapo"):
        update = expected_update(key, world, 4)
        assert rows.loc[key, "efficiency"] == efficiency(update, second_moment(key, world, 4), gradient)
    assert rows.loc["grpo", "cosine"] == pytest.approx(1)  # one target: GRPO follows the true gradient
    assert rows.loc["grpo", "silent"] == pytest.approx(0.1**4 + 0.9**4)
    assert set(CELL) < set(rows.reset_index().columns)


def test_claims_of_the_laboratory_are_ratios_over_its_worlds(monkeypatch):
    """On two worlds a claim. The recorded rows are of eight."""
    monkeypatch.setattr("sapo.lab.credit_claims.WORLDS", range(2))
    rows = ledger(RECORD, 5).set_index("experiment")
    ratio = 1.0
    for seed in range(2):
        world = sparse_world(1e-2, 1.0, seed=seed)
        gradient = true_gradient(world)
        sapo, grpo = (
            efficiency(expected_update(key, world, 16), second_moment(key, world, 16), gradient)
            for key in ("sapo", "grpo")
        )
        ratio *= (sapo / grpo) ** 0.5
    cell = "exact, G = 16, coupling 1, exact match {}, one group: efficiency of SAPO over that of GRPO"
    assert rows.loc[cell.format("0.01"), "value"] == pytest.approx(ratio)
    more = "exact, G = 16, coupling 1, one group: SAPO's gain over GRPO at exact match 0.0001 over its gain at 0.2"
    sparse, dense = (rows.loc[cell.format(rarity), "value"] for rarity in ("0.0001", "0.2"))
    assert rows.loc[more, "value"] == pytest.approx(sparse / dense)
    # With 0/1 rewards the expected update is the gradient times E[A | hit] - E[A | miss]; without the std that is 1.
    pulls = ledger(RECORD, 7)
    value = pulls["value"].tolist()
    assert value[2:4] + value[6:] == pytest.approx([1] * 4)  # Dr. GRPO, and SAPO without the std
    assert value[4:6] == pytest.approx(value[:2])  # a step of SAPO is weighed as GRPO weighs a prompt
    assert value[0] > value[1] > 1.2
    assert pulls["verdict"].str.startswith("holds").all()
    layouts = ledger(RECORD, 8)
    assert len(layouts) == 4
    assert (layouts["low"] < layouts["value"]).all()
    assert (layouts["value"] < layouts["high"]).all()


def test_bad_input(record):
    with pytest.raises(InputError, match="there is no claim 99; there are 1, 2"):
        ledger(record, 99)
    (record / "rollouts.csv.gz").unlink()
    with pytest.raises(InputError, match=r"no .*rollouts\.csv\.gz"):
        ledger(record, 2)


def test_the_record_has_every_claim_and_its_cheap_rows_come_out_again():
    recorded = pd.read_csv(RECORD / "claims.csv")
    assert list(recorded.columns) == COLUMNS
    commands = {f"sapo claims --only {number}" for number in CLAIMS}
    commands |= {f"sapo claims --only 4 --data {name}" for name in ("office", "industrial_full")}
    assert set(recorded["command"]) <= commands
    for number, find in CLAIMS.items():  # a claim of training has rows once its runs are recorded
        if f"sapo claims --only {number}" not in set(recorded["command"]):
            assert list(find(RECORD)) == []
    again = pd.concat([ledger(RECORD, number) for number in (1, 2, 3, 4)])
    kept = recorded[recorded["command"].isin(again["command"])]
    pd.testing.assert_frame_equal(
        kept.reset_index(drop=True), again.reset_index(drop=True), check_exact=False, rtol=1e-6, check_dtype=False
    )
    assert recorded["verdict"].notna().all()


def test_the_weight_of_a_step_by_hand():
    """One code of 16 right: 15/16 over a sample std of 1/4 for the hit. With p near 0 others are never right, so that
    a miss has 0 and the weight is that advantage."""
    point = Objective("match", "step", average="step")
    assert _step_weight(point, 1e-9) == pytest.approx(15 / 16 / (0.25 + 1e-4), rel=1e-6)
    assert _step_weight(Objective("match", "step", scale="none"), 0.3) == pytest.approx(15 / 16)


def test_what_is_given_away_on_real_data_is_what_the_record_says(shared_data):
    rows = ledger(RECORD, 4, [shared_data / "office"])
    rows = rows[rows["command"] == "sapo claims --only 4 --data office"]
    recorded = pd.read_csv(RECORD / "claims.csv")
    recorded = recorded[recorded["command"] == "sapo claims --only 4 --data office"]
    assert rows["experiment"].tolist() == recorded["experiment"].tolist()
    assert rows["value"].tolist() == pytest.approx(recorded["value"].tolist())
    assert rows["value"].between(0, 1).all()


def test_weight_moved_is_read_from_the_record(record):
    curves = pd.DataFrame({"seed": [0, 0, 1], "step": [1, 2, 1], "metric": "weight_moved", "value": [0.1, 0.3, 0.4]})
    world = {"dataset": "tiny", "split": "leave_one_out", "preset": "quick", "method": "sapo_outcome_reward"}
    curves.assign(**world).to_csv(record / "dynamics.csv.gz", index=False)
    row = ledger(record, 1).iloc[2]
    assert row["value"] == pytest.approx((0.2 + 0.4) / 2)
    assert row["experiment"] == "tiny (quick), training completions of SAPO with an outcome reward: the same share"

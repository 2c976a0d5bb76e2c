"""Theory against training: correlations and ranks by hand, and the artefacts of made-up starts."""

import itertools
import math
from importlib import import_module
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from sapo.analysis.results import write_results

WORLDS = {"study": 0.5, "study-start0.15": 0.7}  # preset: how often a step is right
GAINS = {"stage2": 0.0, "sapo": 0.05, "grpo": 0.01, "sapo_outcome_reward": 0.02}
PLACE = {"dataset": "reasoning", "split": "leave_one_out"}


@pytest.fixture
def theory(monkeypatch):
    mpl.use("Agg")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "paper_figures"))
    return import_module("fig_theory")


def dots(worths, gains, starts) -> pd.DataFrame:
    table = pd.DataFrame({"worth": worths, "gain": gains, "seed": starts})
    return table.assign(preset="study", early=np.nan, **PLACE)


def write_study(out: Path) -> pd.DataFrame:
    """Results, looks and rollouts of two starts of three seeds; returns the results."""
    rng = np.random.default_rng(0)
    results, looks, rollouts = [], [], []
    for preset, seed in itertools.product(WORLDS, range(3)):
        for method, gain in GAINS.items():
            value = 0.1 + gain + 0.001 * seed
            results.append((preset, method, seed, "ndcg@10", value))
            if method == "stage2":
                continue
            results.append((preset, method, seed, "learning_rate", 3e-4))
            for rate, step in itertools.product((1e-4, 3e-4), (0, 20, 100, 400)):
                looks.append((preset, method, seed, rate, step, "valid/ndcg@10", 0.1 + step * rate * gain))
        right = rng.random((20, 8, 2)) < WORLDS[preset]
        prompt, rollout, level = np.indices(right.shape).reshape(3, -1)
        columns = {"prompt": prompt, "rollout": rollout, "level": level + 1, "match": right.ravel().astype(int)}
        rollouts.append(pd.DataFrame(columns).assign(preset=preset, seed=seed, **PLACE))
    table = pd.DataFrame(results, columns=["preset", "method", "seed", "metric", "value"])
    table = table.assign(source="measured", n=2000, run="r", **PLACE)
    write_results(table, out / "results.csv")
    columns = ["preset", "method", "seed", "learning_rate", "step", "metric", "value"]
    pd.DataFrame(looks, columns=columns).assign(**PLACE).to_csv(out / "looks.csv.gz", index=False)
    pd.concat(rollouts).to_csv(out / "rollouts.csv.gz", index=False)
    return table


def test_rank_correlation_by_hand(theory):
    """Worths rank 1 2 3 4, gains 1 2 4 3: 1 - 6 (0 + 0 + 1 + 1) / (4 x 15) = 0.8. Two starts are too few for bounds."""
    found = theory.rank_correlation(dots([1, 10, 100, 1000], [0.1, 0.2, 0.4, 0.3], [0, 0, 1, 1]))
    assert found.value == pytest.approx(0.8)
    assert math.isnan(found.low)
    assert math.isnan(theory.rank_correlation(dots([1, 1], [0.1, 0.2], [0, 0])).value)
    many = dots(np.arange(12.0), np.arange(12.0) ** 2, np.arange(12) // 2)
    assert tuple(theory.rank_correlation(many)) == pytest.approx((1, 1, 1))


def test_whole_starts_are_drawn(theory):
    """Six starts with one dot each and the same dots ten times over: what is within a start adds no certainty."""
    rng = np.random.default_rng(0)
    worth, gain, start = rng.random(6), rng.random(6), np.arange(6)
    once = theory.rank_correlation(dots(worth, gain, start))
    again = theory.rank_correlation(dots(*(np.tile(values, 10) for values in (worth, gain, start))))
    assert again == pytest.approx(once)
    assert once.low < once.value < once.high


def test_pairs_are_of_one_start_and_of_worths_that_differ(theory):
    """Start 0: (1, 2) right, (1, 3) right, (2, 3) wrong. Start 1: two alike, which is no prediction, and so no pair."""
    found = theory.ordered_pairs(dots([1, 2, 3, 5, 5], [0.0, 0.3, 0.1, 0.0, 0.1], [0, 0, 0, 1, 1]))
    assert found == (2, 3)


def test_gains_are_those_over_the_start_and_of_its_first_updates(theory, tmp_path):
    """At the chosen rate 3e-4 the look after 100 updates is 100 x 3e-4 x gain above the first."""
    results = write_study(tmp_path)
    looks = pd.read_csv(tmp_path / "looks.csv.gz")
    table = theory.gains(results, looks)
    assert len(table) == 2 * 3 * 3
    assert table["gain"].tolist() == pytest.approx([GAINS[method] for method in table["method"]])
    assert table["early"].tolist() == pytest.approx([0.03 * GAINS[method] for method in table["method"]])
    assert theory.gains(results)["early"].isna().all()


def test_methods_are_ranked_on_the_same_seeds(theory, tmp_path):
    """GRPO has all three seeds, the outcome reward two: the theory cannot tell them apart."""
    results = write_study(tmp_path)
    lacking = (results["method"] == "sapo_outcome_reward") & (results["seed"] == 2)
    write_results(results[~lacking], tmp_path / "results.csv")
    table = theory.main(tmp_path)[1].table.set_index(["preset", "method"])
    assert table["seeds"].tolist() == [2] * 6
    for preset in WORLDS:
        of_start = table.loc[preset]
        for parameters in ("shared", "own"):
            ranks = of_start[f"rank predicted, {parameters}"]
            assert ranks["GRPO"] == ranks["SAPO, outcome reward"]


def test_measured_gradients_are_a_theory_too(theory, tmp_path):
    """SAPO is worth 4, 9 and 16 times GRPO's worth: a geometric mean of (4 x 9 x 16)^(1/3) = 8.320."""
    write_study(tmp_path)
    worths = {"grpo": [1.0, 1.0, 1.0], "sapo": [4.0, 9.0, 16.0]}
    rows = [
        {"preset": "study", "seed": seed, "objective": name, "goal": goal, "worth": worth, "adam_worth": 2 * worth}
        for name, values in worths.items()
        for seed, worth in enumerate(values)
        for goal in ("exact", "match")
    ]
    pd.DataFrame(rows).assign(signal=0.5, cosine=0.9, **PLACE).to_csv(tmp_path / "gradients.csv", index=False)
    _figure, starts, agreement, table = theory.main(tmp_path)
    assert table.name == "table_gradients"
    (grpo, sapo) = (table.table[table.table["method"].str.startswith(name)].iloc[0] for name in ("GRPO", "SAPO"))
    assert grpo["worth over GRPO"] == grpo["worth to"] == 1
    assert sapo["worth over GRPO"] == sapo["adam_worth over GRPO"] == pytest.approx(8.320, abs=1e-3)
    assert sapo["worth from"] < 8.320 < sapo["worth to"]
    assert sapo["gain"] == pytest.approx(GAINS["sapo"])
    of_policy = agreement.table[agreement.table["parameters"] == "policy"]
    assert (of_policy["pairs right"] == of_policy["pairs"]).all()
    assert (of_policy["pairs"] == 3).all()  # one pair of methods a start
    logs = starts.table.set_index(["preset", "method"])["log10 worth, policy"]
    assert logs["study", "GRPO"] == 0
    assert np.isnan(logs["study", "SAPO, outcome reward"])  # not measured


def test_artefacts(theory, tmp_path):
    write_study(tmp_path)
    figure, starts, agreement = theory.main(tmp_path)
    assert [artefact.name for artefact in (figure, starts, agreement)] == [
        "fig_theory",
        "table_theory",
        "table_theory_agreement",
    ]
    for artefact in (figure, starts, agreement):
        assert all(path.stat().st_size > 100 for path in artefact.files)
    table = starts.table.set_index(["preset", "method"])
    assert len(table) == 2 * 3
    assert table["seeds"].tolist() == [3] * 6
    # GRPO and the outcome reward at every step differ in token weights alone: they share ranks 1 and 2, or 2 and 3
    for preset in WORLDS:
        of_start = table.loc[preset]
        assert (
            of_start.loc["GRPO", "rank predicted, own"] == of_start.loc["SAPO, outcome reward", "rank predicted, own"]
        )
        assert of_start["rank predicted, own"].sum() == 6
        assert of_start["rank in training"].to_dict() == {
            "SAPO (step-aligned)": 1,
            "SAPO, outcome reward": 2,
            "GRPO": 3,
        }
    # the same policy and reward: what is right more often is worth more
    worth = table["log10 worth, own"].unstack()
    assert (worth.loc["study-start0.15"] > worth.loc["study"]).all()
    assert len(agreement.table) == 2 * 2 * 2 * 2  # gains, steps, parameters, goals
    assert (agreement.table["pairs"] == 2 * 3 * 2).all()  # of three pairs of a start one is no prediction
    shown = agreement.table.query("gain == 'gain' and steps == 'independent' and goal == 'exact'")
    for row in shown.itertuples():
        assert f"{row.parameters} parameters: rank correlation {row.correlation:.2f}" in figure.caption

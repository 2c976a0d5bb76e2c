"""Claims of training on records made by hand: which worlds count, what is subtracted, and who judges."""

import numpy as np
import pandas as pd
import pytest

from sapo.analysis.ranks import Ranks, add_ranks
from sapo.analysis.results import write_results
from sapo.lab import training_claims

USERS = 400


def record(tmp_path, worlds):
    """A record of worlds {(dataset, preset): {method: chances of the first rank, one a seed}}."""
    rows, tables = [], []
    for (dataset, preset), methods in worlds.items():
        key = {"dataset": dataset, "split": "leave_one_out", "preset": preset}
        for method, chances in methods.items():
            if method == "rollouts":
                for seed, value in enumerate(chances):
                    metric = {"metric": "rollouts/exact", "value": value}
                    rows.append({**key, "method": "stage2", "seed": seed, **metric})
                continue
            for seed, chance in enumerate(chances):
                hit = np.random.default_rng((seed, round(1000 * chance))).random(USERS) < chance
                users = pd.DataFrame({"user": range(USERS), "rank": hit.astype(int)})
                tables.append((users, {**key, "method": method, "seed": seed}))
                for metric in ("ndcg@10", "item/ndcg@10"):
                    rows.append({**key, "method": method, "seed": seed, "metric": metric, "value": hit.mean()})
    table = pd.DataFrame(rows).assign(source="measured", n=USERS, run="r")
    write_results(table, tmp_path / "results.csv")
    add_ranks(tables, tmp_path)
    return tmp_path


@pytest.fixture
def made(tmp_path):
    return record(
        tmp_path,
        {
            ("reasoning", "study"): {
                "stage2": [0.3, 0.32, 0.28],
                "stage2_no_thinking": [0.02, 0.03, 0.02],
                "sapo": [0.6, 0.62, 0.61],
                "grpo": [0.35, 0.36, 0.37],
                "rollouts": [0.01, 0.02, 0.03],
            },
            ("reasoning", "study-start0.4"): {
                "stage2": [0.7, 0.7, 0.7],
                "sapo": [0.8, 0.81, 0.82],
                "grpo": [0.8, 0.81, 0.83],
                "rollouts": [0.2, 0.2, 0.2],
            },
            ("other", "quick"): {"sapo": [0.5, 0.5], "grpo": [0.1, 0.1]},  # two seeds are no evidence
        },
    )


def test_a_difference_is_paired_and_every_world_has_a_row(made):
    rows = {row.experiment.split(":")[0]: row for row in training_claims.beats_outcome(made)}
    assert set(rows) == {"reasoning, leave one out (study)", "reasoning, leave one out (study-start0.4)"}
    ranks = Ranks(made)
    for preset, verdict in (("study", "holds"), ("study-start0.4", "undecided")):
        keys = [("reasoning", "leave_one_out", preset, method) for method in ("sapo", "grpo")]
        gain = ranks.gain(*keys, "ndcg@10")
        row = rows[f"reasoning, leave one out ({preset})"]
        assert (row.value, row.low, row.high) == (gain.value, gain.low, gain.high)
        assert row.verdict == verdict
        assert row.experiment.endswith(f"{USERS} users and 3 seeds")


def test_thinking_pays_where_both_were_measured(made):
    (row,) = training_claims.thinking_pays(made)
    assert row.verdict == "holds"
    assert row.value == pytest.approx(0.3 - 0.023, abs=0.1)


def test_the_rarest_start_is_told_by_its_completions(made):
    """.02 on average against .2; the difference of differences is a t interval over seeds."""
    (row,) = training_claims.sparsest(made)
    results = pd.read_csv(made / "results.csv")
    values = results[results["metric"] == "ndcg@10"].pivot_table("value", ["preset", "seed"], "method")
    gains = values["sapo"] - values["grpo"]
    expected = gains["study"] - gains["study-start0.4"]
    assert row.value == pytest.approx(expected.mean())
    assert "2.00% of the start's completions" in row.experiment
    assert "20.00% are; 3 seeds" in row.experiment


def test_a_claim_nobody_has_run_has_no_rows(made):
    for claim in (training_claims.both_components, training_claims.beats_graded, training_claims.stabilises):
        assert list(claim(made)) == []


def test_stability_is_judged_over_seeds(made):
    """SAPO never falls; GRPO falls to .05, .06 and .04 of .1 at its only rate: worst falls of .5, .4 and .6."""
    rows = [
        {"method": method, "seed": seed, "step": step, "value": value}
        for method, curves in (
            ("sapo", [[0.1, 0.11], [0.1, 0.12], [0.1, 0.13]]),
            ("grpo", [[0.1, 0.05], [0.1, 0.06], [0.1, 0.04]]),
        )
        for seed, curve in enumerate(curves)
        for step, value in zip((0, 20), curve, strict=True)
    ]
    key = {"dataset": "reasoning", "split": "leave_one_out", "preset": "study"}
    table = pd.DataFrame(rows).assign(**key, learning_rate=1e-4, metric="valid/ndcg@10")
    table.to_csv(made / "looks.csv.gz", index=False)
    fall, share = training_claims.stabilises(made)
    assert fall.value == pytest.approx(-0.5)
    # t of 2 degrees of freedom at .975 is 4.303; the sd of .5, .4, .6 is .1
    assert (fall.low, fall.high) == pytest.approx((-0.5 - 4.303 * 0.1 / 3**0.5, -0.5 + 4.303 * 0.1 / 3**0.5), abs=1e-3)
    assert share.value == -1  # none of SAPO's rates ends below the start, each of GRPO's does
    assert fall.verdict == "holds"
    assert share.verdict == "undecided"  # alike in three seeds, a sign that comes by chance with 2 x .5^3 = .25


def test_holm_corrects_over_the_rows_of_a_claim():
    """p = .03 alone is beyond noise; beside two of .04 none is, since 3 x .03 > .05."""
    from sapo.analysis.statistics import Difference

    def judged(*p_values):
        asked = [training_claims.Asked("c", "s", "e", Difference(0.1, 0, 0.2, p, 10, 3)) for p in p_values]
        return [row.verdict for row in training_claims._judged(asked, more="holds", less="fails")]

    assert judged(0.03) == ["holds"]
    assert judged(0.03, 0.04, 0.04) == ["undecided"] * 3


def test_equal_kl_is_judged_over_seeds_where_looks_have_both(tmp_path):
    """SAPO gains .1 at KL .01 and GRPO .02: +.08 on three seeds that differ by .001."""
    rows = []
    for seed in range(3):
        for method, gain, kl in (("sapo", 0.1 + 0.001 * seed, 0.01), ("grpo", 0.02, 0.01)):
            run = {"dataset": "d", "split": "leave_one_out", "preset": "p", "method": method, "seed": seed}
            for step, metric, value in (
                (0, "valid/ndcg@10", 0.3),
                (20, "valid/ndcg@10", 0.3 + gain),
                (20, "kl", kl),
            ):
                rows.append({**run, "learning_rate": 1e-4, "step": step, "metric": metric, "value": value})
    assert list(training_claims.at_equal_kl(tmp_path)) == []
    pd.DataFrame(rows).to_csv(tmp_path / "looks.csv.gz", index=False)
    (found,) = training_claims.at_equal_kl(tmp_path)
    assert found.value == pytest.approx(0.081)
    assert found.low < 0.081 < found.high
    assert found.verdict == "holds"
    pd.DataFrame(rows[:-6]).to_csv(tmp_path / "looks.csv.gz", index=False)  # two seeds are no evidence
    assert list(training_claims.at_equal_kl(tmp_path)) == []


def test_the_mass_that_the_trie_keeps_is_a_mean_over_levels_and_seeds(tmp_path):
    """Levels at .9 and .7 + .01 s: the mean over levels is .8 + .005 s, over three seeds .805."""
    key = {"dataset": "d", "split": "leave_one_out", "preset": "p", "method": "sapo"}
    rows = [
        {**key, "seed": seed, "metric": f"allowed_mass/level_{level + 1}", "value": value}
        for seed in range(3)
        for level, value in enumerate((0.9, 0.7 + 0.01 * seed))
    ]
    rows += [{**key, "seed": seed, "metric": "allowed_mass/block", "value": 0.1} for seed in range(3)]
    write_results(pd.DataFrame(rows).assign(source="measured", n=5, run="r"), tmp_path / "results.csv")
    (found,) = training_claims.kept_mass(tmp_path)
    assert found.value == pytest.approx(0.805)
    assert found.high - found.value == pytest.approx(4.302653 * 0.005 / 3**0.5)
    assert found.verdict == "keeps 80.5%"

"""The figure scripts on made-up tables: what they compute, what they refuse, and that they write the same bytes."""

import itertools
import json
import math
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from sapo.analysis.plots.laboratory import plot_against_sparsity, plot_growth, plot_winners
from sapo.analysis.ranks import add_ranks
from sapo.analysis.results import add_results, name_hits, read_results, write_results
from sapo.analysis.statistics import paired_difference
from sapo.analysis.style import METHOD_COLORS, figure_style
from sapo.credit.objectives import OBJECTIVES
from sapo.errors import InputError
from sapo.experiments.stages import REFERENCES
from sapo.experiments.suite import BASELINES, FUSIONS
from sapo.experiments.systems import SYSTEMS

SCRIPTS = Path(__file__).resolve().parent.parent / "paper_figures"
WORLD = {"dataset": "office", "split": "published_test", "preset": "quick"}
METHODS = {"sapo": 0.30, "grpo": 0.24, "grpo_step_reward": 0.26, "stage2": 0.22, "popularity": 0.05}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Scripts import each other by name, as when one is started from the shell."""
    backend = mpl.get_backend()
    mpl.use("Agg")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    plt.close("all")
    mpl.use(backend)


PLAIN = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")


def fake_results() -> pd.DataFrame:
    """Three seeds of SAPO, GRPO and stage 2, one of the rest, and an optimum. By item policies hit 9 times in 10."""
    rng = np.random.default_rng(0)
    rows = []
    for method, level in METHODS.items():
        for seed in range(3 if method in ("sapo", "grpo", "stage2") else 1):
            for metric, share in (
                ("recall@5", 0.7),
                ("ndcg@5", 0.5),
                ("recall@10", 1.0),
                ("ndcg@10", 0.6),
                ("recall@1", 0.3),
            ):
                rows.append((method, "measured", seed, metric, share * (level + 0.01 * rng.normal())))
                if method != "popularity":
                    rows.append((method, "measured", seed, f"item/{metric}", 0.9 * rows[-1][-1]))
            rows.append((method, "measured", seed, "updates", 0 if method == "popularity" else 80))
    rows += [("stage2", "measured", seed, "rollouts/exact", 0.01 * (seed + 1)) for seed in range(3)]
    rows += [(method, "measured", seed, "learning_rate", 1e-3) for method in ("sapo", "grpo") for seed in range(3)]
    rows.append(("optimum", "exact", 0, "recall@10", 0.41))
    table = pd.DataFrame(rows, columns=["method", "source", "seed", "metric", "value"])
    return table.assign(**WORLD, n=2000, run="r")


def fake_dynamics(levels: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    names = {"rewards/exact/mean": 0.2, "response_length": 18.0, "kl": 0.05}
    names |= {"grad_norm": 0.5, "frac_zero_credit": 0.3, "valid/ndcg@10": 0.1}
    names |= {f"rewards/sid_level_{k}/mean": 0.6 / k for k in range(1, levels + 1)}
    names |= {f"step/{k}/length": 5.0 for k in range(1, levels + 1)}
    rows = [
        (method, seed, step, metric, level * (1 + step / (60 if method == "sapo" else 150) + 0.03 * rng.normal()))
        for (metric, level), method, seed, step in itertools.product(
            names.items(), ("sapo", "grpo"), range(3), range(5, 81, 5)
        )
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "step", "metric", "value"]).assign(**WORLD)


def fake_rollouts(levels: int = 3, prompts: int = 32, group_size: int = 16) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    index = itertools.product(range(3), range(prompts), range(group_size), range(1, levels + 1))
    table = pd.DataFrame(index, columns=["seed", "prompt", "rollout", "level"])
    return table.assign(match=(rng.random(len(table)) < 0.5 / table["level"]).astype(int), **WORLD)


def fake_looks() -> pd.DataFrame:
    """Two seeds at two rates, a third at the chosen one; GRPO falls at the higher rate."""
    rows = [
        (method, seed, rate, 20 * place, metric, value)
        for method, seed, rate in itertools.product(("sapo", "grpo"), range(3), (1e-4, 1e-3))
        if seed < 2 or rate == 1e-3
        for place, gain in enumerate((0.0, 0.02, -0.05 if method == "grpo" and rate == 1e-3 else 0.03))
        for metric, value in (("valid/ndcg@10", 0.1 + 0.01 * seed + gain), ("kl", 0.01 * place), ("rollouts", 512.0))
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "learning_rate", "step", "metric", "value"]).assign(**WORLD)


@pytest.fixture
def out(tmp_path) -> Path:
    """A folder as `sapo run` leaves it."""
    write_results(fake_results(), tmp_path / "results.csv")
    fake_dynamics().to_csv(tmp_path / "dynamics.csv.gz", index=False)
    fake_rollouts().to_csv(tmp_path / "rollouts.csv.gz", index=False)
    fake_looks().to_csv(tmp_path / "looks.csv.gz", index=False)
    for seed in range(2):
        folder = tmp_path / "runs" / "office" / f"seed{seed}" / "sapo-lr0.001"
        folder.mkdir(parents=True)
        manifest = {**WORLD, "seed": seed, "method": "sapo", "status": "finished", "updates": 80, "seconds": 90.0}
        manifest |= {"started": "2026-01-01T00:00:00+00:00", "hardware": "<CPU>", "commit": None, "identity": "abc"}
        (folder / "run.json").write_text(json.dumps(manifest | {"config": {"learning_rate": 0.001}}))
    return tmp_path


def test_make_all_writes_every_artefact_and_an_index(out):
    make_all = import_module("make_all")
    made = make_all.main(out)
    scripts = {path.stem for path in SCRIPTS.glob("[ft][ia][gb]*_*.py")}
    beside = {"table_stability": "fig_stability", "table_theory": "fig_theory", "table_theory_agreement": "fig_theory"}
    # no other recommender was fitted
    assert {artefact.name for artefact in made} == (scripts | set(beside)) - {"table_systems"}
    page = (out / "index.html").read_text(encoding="utf-8")
    for artefact in made:
        suffixes = {".csv", ".tex"} if artefact.name.startswith("table") else {".pdf", ".png"}
        assert {path.suffix for path in artefact.files} == suffixes
        for path in artefact.files:
            assert path.stat().st_size > 100
            assert f'href="{path.relative_to(out).as_posix()}"' in page
        script = beside.get(artefact.name, artefact.name)
        assert f"python paper_figures/{script}.py --out {out}" in page
    assert "2 runs, 3.0 minutes" in page
    assert "2026-01-01T00:00:00+00:00" in page
    assert "&lt;CPU&gt;" in page
    assert "SASRec (MiniOneRec)†" in page
    assert "record that the repository carries" not in page
    assert sorted(path.name for path in out.iterdir()) == [
        "dynamics.csv.gz",
        "figures",
        "index.html",
        "looks.csv.gz",
        "results.csv",
        "rollouts.csv.gz",
        "runs",
        "tables",
    ]


def test_curves_are_those_of_chosen_rates_less_each_seeds_start():
    script = import_module("fig_components")
    rows = script.at_chosen_rates(fake_looks(), fake_results())
    assert set(rows["learning_rate"]) == {1e-3}
    assert rows.groupby("method")["seed"].nunique().tolist() == [3, 3]
    gains = script.over_start(rows[rows["metric"] == "valid/ndcg@10"])
    by_step = gains.pivot_table("value", ["method", "step"], "seed")
    assert by_step.loc["sapo"].to_numpy() == pytest.approx(np.array([[0.0] * 3, [0.02] * 3, [0.03] * 3]))
    assert by_step.loc[("grpo", 40)].tolist() == pytest.approx([-0.05] * 3)


def test_gains_stand_at_what_sampled_completions_of_their_own_start_can_do():
    table = import_module("fig_sparsity").gains_by_start(fake_results())
    wide = fake_results().pivot_table("value", ["metric", "seed"], "method")
    assert sorted(table["method"].unique()) == ["grpo", "sapo"]
    for row in table.itertuples():
        assert row.exact_match == pytest.approx(0.01 * (row.seed + 1))
        ndcg = wide.loc[("ndcg@10", row.seed)]
        assert row.gain == pytest.approx(ndcg[row.method] - ndcg["stage2"])


def test_measures_of_stability_are_of_seeds_that_tried_every_rate():
    table = import_module("fig_stability").measures(fake_looks()).set_index("method")
    sapo, grpo = (table.loc[name] for name in ("SAPO (step-aligned)", "GRPO"))
    assert (sapo["cells"], sapo["ends below start"]) == (4, 0)
    assert (grpo["cells"], grpo["ends below start"]) == (4, 0.5)
    assert (sapo["decades that improve"], grpo["decades that improve"]) == (1, 0)
    assert (sapo["best rate"], grpo["best rate"]) == (1e-4, 1e-4)  # SAPO's two are alike: the smaller one
    assert sapo["rollouts to .02, median"] == 20 * 512


def test_runs_that_looked_at_no_validation_rows_have_no_such_figures(out):
    (out / "looks.csv.gz").unlink()
    for script in ("fig_components", "fig_stability"):
        assert import_module(script).main(out) == []


@pytest.mark.parametrize("script", ["fig_credit_units", "fig_advantage_distributions", "table_main_results"])
def test_same_tables_same_bytes(out, script):
    (artefact,) = import_module(script).main(out)
    before = [path.read_bytes() for path in artefact.files]
    assert [path.read_bytes() for path in import_module(script).main(out)[0].files] == before


def test_main_table(out):
    artefact = import_module("table_main_results").main(out)[0]
    table = artefact.table.set_index("method")
    assert "GRPO, step reward" not in table.index  # of the ablation alone
    assert table.loc["SAPO (step-aligned)", ["source", "seeds", "updates"]].tolist() == ["measured", 3, 80]
    assert table.loc["MiniOneRec (MiniOneRec)", "sid/ndcg@10"] == 0.1242
    assert np.isnan(table.loc["MiniOneRec (MiniOneRec)", "item/ndcg@10"])
    means = fake_results().groupby(["method", "metric"])["value"].mean()
    assert table.loc["GRPO", "item/ndcg@10"] == pytest.approx(means["grpo", "item/ndcg@10"])
    assert table.loc["GRPO", "sid/ndcg@10"] == pytest.approx(means["grpo", "ndcg@10"])
    assert table.loc["Popularity", "item/ndcg@10"] == pytest.approx(means["popularity", "ndcg@10"])
    assert np.isnan(table.loc["Popularity", "sid/ndcg@10"])  # it was not measured so
    assert table.loc["MiniOneRec (MiniOneRec)", "source"] == "published"
    assert set(artefact.table["dataset"]) == {"office"}  # no published rows of data that was not measured
    values = fake_results().query("metric == 'ndcg@10'").pivot(index="seed", columns="method", values="value")
    gain = (values["sapo"] - values["grpo"]).mean()
    assert f"NDCG@10, office (published test, quick), 3 paired seeds: by item {0.9 * gain:+.4f} [" in artefact.caption
    assert f"; by SID {gain:+.4f} [" in artefact.caption
    assert "over users and seeds" not in artefact.caption  # there are no ranks
    assert "coincide" not in artefact.caption
    assert (
        "recall and NDCG of S-DPO (MiniOneRec), TIGER (MiniOneRec), TIGER (SIDReasoner Table 2) on office cannot"
        in (artefact.caption)
    )


def test_main_table_compares_users_and_seeds_where_it_has_ranks(out):
    """SAPO names every target of two seeds first, GRPO those of every other row, first by SID and second by item."""
    results, runs = [], []
    every_other = np.arange(40) % 2
    for method, found in {"sapo": np.ones(40, dtype=int), "grpo": every_other}.items():
        for seed in range(2):
            run = WORLD | {"method": method, "seed": seed}
            users = pd.DataFrame({"user": np.arange(40), "rank": found})
            item = found * (1 if method == "sapo" else 2)
            runs.append((users.assign(**{"item/rank": item, "item/sharers": 1}), run))
            values = {"ndcg@10": found.mean(), "item/ndcg@10": (found / np.log2(np.maximum(item, 1) + 1)).mean()}
            results += [{**run, "metric": name, "value": value} for name, value in values.items()]
    write_results(pd.DataFrame(results).assign(source="measured", n=40, run="r"), out / "results.csv")
    add_ranks(runs, out)
    caption = import_module("table_main_results").main(out)[0].caption
    by_sid = paired_difference([1 - every_other] * 2)
    bounds = f"[{by_sid.low:+.4f}, {by_sid.high:+.4f}]"
    assert f"by SID +0.5000 {bounds} over users and seeds *" in caption
    assert f"2 paired seeds: by item {1 - 0.5 / np.log2(3):+.4f} [" in caption


def test_main_table_says_when_rows_coincide(out):
    results = fake_results()
    write_results(pd.concat([results, results[results["method"] == "grpo"].assign(method="gspo")]), out / "results.csv")
    assert "GRPO and GSPO coincide in every run." in import_module("table_main_results").main(out)[0].caption


def test_the_optimum_is_a_line_at_its_value():
    results = name_hits(fake_results())
    with figure_style():
        recall, ndcg = import_module("fig_main_results").draw(results).axes
    assert [line.get_xdata()[0] for line in recall.lines if line.get_linestyle() == "-."] == [0.41]
    assert not [line for line in ndcg.lines if line.get_linestyle() == "-."]  # the fake optimum has no NDCG
    assert {text.get_text() for text in recall.get_yticklabels()} >= {"GRPO, 3 seeds", "Popularity"}


def test_ablation_has_all_cells(out):
    table = import_module("table_component_ablation").main(out)[0].table
    assert table[["step reward", "step advantage"]].agg(tuple, axis=1).tolist() == [
        ("", ""),
        ("off", "off"),
        ("on", "off"),
        ("off", "on"),
        ("on", "on"),
        ("on", "on"),  # with the sequence mean
    ]
    assert table["seeds"].tolist() == [1, 1, 1, 0, 1, 0]  # one has seed 0 alone; two cells were not run
    first = fake_results().query("metric == 'ndcg@10' and seed == 0").set_index("method")["value"]
    assert table["ndcg@10"].tolist()[:3] == [first["stage2"], first["grpo"], first["grpo_step_reward"]]
    assert math.isnan(table["ndcg@10"][3])
    tex = (out / "tables" / "table_component_ablation.tex").read_text()
    assert "off & on & SAPO, outcome reward & 0 & -- & -- & -- & -- & -- " in tex


def test_credit_panels_by_hand():
    """Two prompts, G = 2, K = 2. Prompt 0: (1, 0) against (0, 1). Prompt 1: (1, 1) against (1, 0)."""
    match = [
        (0, 0, 1, 1),
        (0, 0, 2, 0),
        (0, 1, 1, 0),
        (0, 1, 2, 1),
        (1, 0, 1, 1),
        (1, 0, 2, 1),
        (1, 1, 1, 1),
        (1, 1, 2, 0),
    ]
    rows = pd.DataFrame(match, columns=["prompt", "rollout", "level", "match"]).assign(seed=0)
    advantages, zeros, signs = import_module("fig_advantage_distributions").credit(rows.sample(frac=1, random_state=0))
    high = 0.5 / (math.sqrt(0.5) + 1e-4)  # one of two right: mean 1/2, sample std sqrt(1/2)
    found = advantages.groupby("credit")["advantage"].apply(list).to_dict()
    assert found["step 1"] == pytest.approx([high, -high, 0, 0])
    assert found["step 2"] == pytest.approx([-high, high, high, -high])
    assert found["trajectory"] == pytest.approx([0, 0, high, -high])  # prompt 0 has no exact match
    assert dict(zip(zeros["credit"], zeros["value"], strict=True)) == {"trajectory": 0.5, "step 1": 0.5, "step 2": 0}
    assert dict(zip(signs["signs"], signs["value"], strict=True)) == {
        "different signs": 0.5,
        "one sign": 0.5,
        "no signal": 0,
    }


def with_dapo() -> pd.DataFrame:
    """DAPO generates 32 completions an update up to step 10, 64 an update after it; the others always 32."""
    table = fake_dynamics()
    table = pd.concat([table, table[table["method"] == "grpo"].assign(method="dapo")])
    generated = table[table["metric"] == "kl"].assign(metric="rollouts", value=32.0)
    generated.loc[(generated["method"] == "dapo") & (generated["step"] > 10), "value"] = 64.0
    return pd.concat([table, generated])


def test_completions_are_counted_over_the_updates_between_two_points():
    module = import_module("fig_training_dynamics")
    counted = module.against_completions(with_dapo())
    steps = {method: sorted(rows["step"].unique()) for method, rows in counted.groupby("method")}
    assert steps["sapo"] == [32 * step for step in range(5, 81, 5)]
    assert steps["dapo"][:3] == [160, 320, 320 + 5 * 64]  # a point every 5 updates
    assert len(steps["dapo"]) == 16
    assert counted["value"].tolist() == with_dapo()["value"].tolist()


def test_dapo_is_also_drawn_against_completions(out):
    with_dapo().to_csv(out / "dynamics.csv.gz", index=False)
    plain, cost = import_module("fig_training_dynamics").main(out)
    assert cost.name == "fig_training_dynamics_cost"
    assert all(path.is_file() for path in (*plain.files, *cost.files))
    figure = import_module("fig_training_dynamics").draw_cost(with_dapo(), 1)
    left, right = (ax.get_lines() for ax in figure.axes)
    assert [line.get_label() for line in left] == [line.get_label() for line in right]
    assert len(left) == 3
    assert max(line.get_xdata().max() for line in right) == 320 + 14 * 5 * 64


@pytest.mark.parametrize("levels", [2, 4])
def test_dynamics_has_a_panel_a_level(levels):
    with figure_style():
        figure = import_module("fig_training_dynamics").draw(fake_dynamics(levels), 1)
    titles = [ax.get_title() for ax in figure.axes]
    assert len(titles) == 6 + 2 * levels  # the run as a whole, how it trains, and two rows of steps
    assert titles[6] == "match rate, level 1"
    assert all(len(ax.get_lines()) == 2 for ax in figure.axes)
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 > -0.02
    assert box.x1 < figure.get_size_inches()[0] + 0.02
    boxes = [ax.title.get_window_extent() for ax in figure.axes]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_several_worlds_have_a_figure_each(out):
    rollouts = fake_rollouts(prompts=4)
    pd.concat([rollouts, rollouts.assign(dataset="toy", split="leave_one_out")]).to_csv(out / "rollouts.csv.gz")
    made = import_module("fig_advantage_distributions").main(out)
    assert [artefact.name for artefact in made] == [
        "fig_advantage_distributions-office-published_test-quick",
        "fig_advantage_distributions-toy-leave_one_out-quick",
    ]


def test_results_option_and_record(out, tmp_path, monkeypatch):
    artefacts, script = import_module("artefacts"), import_module("table_component_ablation")
    other = tmp_path / "other.csv"
    write_results(fake_results().assign(dataset="toy", split="leave_one_out"), other)
    assert set(script.main(out, other)[0].table["dataset"]) == {"toy"}
    record = tmp_path / "record"
    record.mkdir()
    monkeypatch.setattr(artefacts, "RECORD", record)
    for name in ("results.csv", "dynamics.csv.gz"):
        (record / name).write_bytes((out / name).read_bytes())
    empty = tmp_path / "empty"
    assert artefacts.find_input(empty, None, "results.csv") == record / "results.csv"
    (out / "dynamics.csv.gz").unlink()
    with pytest.raises(InputError, match=r"no dynamics\.csv"):  # the record is not mixed with results of one's own
        artefacts.find_input(out, None, "dynamics.csv.gz")
    with pytest.raises(InputError, match=r"no rollouts\.csv\.gz"):
        artefacts.find_input(empty, None, "rollouts.csv.gz")


@pytest.mark.parametrize(
    ("script", "file", "change", "message"),
    [
        ("fig_training_dynamics", "dynamics.csv.gz", lambda t: t.drop(columns="metric"), "no column 'metric'"),
        ("fig_training_dynamics", "dynamics.csv.gz", lambda t: t.iloc[:0], "no rows"),
        ("fig_training_dynamics", "dynamics.csv.gz", lambda t: t[t["metric"] != "kl"], "no rows of metric 'kl'"),
        ("fig_training_dynamics", "dynamics.csv.gz", lambda t: t.assign(method="dapo"), "no rows of sapo or grpo"),
        ("fig_training_dynamics", "dynamics.csv.gz", lambda t: pd.concat([t, t]), "two values for one"),
        ("fig_training_dynamics", "dynamics.csv.gz", lambda t: t.assign(value="x"), "line 2: value is 'x'"),
        ("fig_advantage_distributions", "rollouts.csv.gz", lambda t: t.iloc[1:], "every rollout of every prompt"),
        ("fig_advantage_distributions", "rollouts.csv.gz", lambda t: t.assign(match=2), "other than 0 and 1"),
        ("fig_advantage_distributions", "rollouts.csv.gz", lambda t: t[t["rollout"] == 0], "group_size is 1"),
        ("fig_advantage_distributions", "rollouts.csv.gz", lambda t: t.assign(split="all"), "unknown split 'all'"),
        (
            "table_component_ablation",
            "results.csv",
            lambda t: t[t["method"] == "popularity"],
            "no measured rows of sapo",
        ),
        ("table_main_results", "results.csv", lambda t: t[t["source"] == "exact"], "no measured rows"),
    ],
)
def test_bad_tables_are_named(out, script, file, change, message):
    change(pd.read_csv(out / file)).to_csv(out / file, index=False)
    with pytest.raises(InputError, match=message) as error:
        import_module(script).main(out)
    assert str(out / file) in str(error.value)


def test_a_broken_manifest_is_named(out):
    path = next(out.glob("runs/**/run.json"))
    path.write_text("{")
    with pytest.raises(InputError, match=r"run\.json: not a run's manifest"):
        import_module("make_all").read_runs(out)


def test_from_the_shell(out):
    command = [sys.executable, str(SCRIPTS / "table_component_ablation.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        str(out / "tables" / f"table_component_ablation.{kind}") for kind in ("csv", "tex")
    ]


def test_bad_input_is_one_line_for_the_shell(out, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["table", "--out", str(out), "--results", "none.csv"])
    with pytest.raises(SystemExit, match=r"^error: none\.csv: no such file\.$"):
        import_module("artefacts").command_line(import_module("table_component_ablation").main, "A table.")


def test_published_numbers():
    """With one target a row, recall and NDCG bound each other; rows that break this say so.

    A target that enters between places k1 and k2 adds between 1/log2(k2 + 1) and 1/log2(k1 + 2) to NDCG.
    """
    table = read_results(SCRIPTS / "data" / "published.csv")
    assert set(table["source"]) == {"published"}
    assert table["seed"].isna().all()
    assert set(table["dataset"]) == {"office", "industrial", "games_sidreasoner", "beauty"}
    rounding = 1.01e-4
    for (dataset, method), rows in table.groupby(["dataset", "method"]):
        value = rows.set_index("metric")["value"]
        ks = [k for k in (3, 5, 10) if f"recall@{k}" in value]
        fits = True
        for k1, k2 in itertools.combinations([0, *ks], 2):
            gain = value[f"recall@{k2}"] - value.get(f"recall@{k1}", 0)
            ndcg = value[f"ndcg@{k2}"] - value.get(f"ndcg@{k1}", 0)
            fits &= gain / math.log2(k2 + 1) - rounding <= ndcg <= gain / math.log2(k1 + 2) + rounding
        assert rows["run"].str.contains("cannot both be right").all() == (not fits), (dataset, method)


# ------------------------------------------------------------------------------------------------- the laboratory


def fake_exact() -> pd.DataFrame:
    """SAPO is twice as efficient as GRPO where an exact match is rare, half as efficient where it is not."""
    index = itertools.product(("grpo", "sapo"), (0.2, 1e-3), (0.0, 1.0), (4, 16), range(3))
    table = pd.DataFrame(index, columns=["objective", "exact_match", "coupling", "group_size", "seed"])
    factor = np.where(table["objective"] == "grpo", 1.0, np.where(table["exact_match"] < 0.1, 2.0, 0.5))
    world = 0.1 * (1 + table["seed"]) * table["exact_match"]
    return table.assign(
        layout="blocks_first",
        items=64,
        efficiency=factor * world,
        efficiency_256=world,
        cosine=0.9,
        silent=0.3,
        improvement=0.8,
    )


def test_gain_is_over_grpo_in_the_same_world():
    rows = import_module("fig_exact_efficiency").with_gain(fake_exact())
    gains = rows.groupby(["objective", "exact_match"])["gain"].agg(["min", "max"])
    assert gains.loc[("grpo", 0.2)].tolist() == pytest.approx([1, 1])
    assert gains.loc[("sapo", 1e-3)].tolist() == pytest.approx([2, 2])
    assert gains.loc[("sapo", 0.2)].tolist() == pytest.approx([0.5, 0.5])
    assert rows["gain_256"].tolist() == pytest.approx([1.0] * len(rows))
    with pytest.raises(InputError, match="no row of grpo"):
        import_module("fig_exact_efficiency").with_gain(fake_exact().query("objective == 'sapo'"))


def test_phase_diagram_names_the_winner_of_each_cell():
    rows = import_module("fig_exact_efficiency").with_gain(fake_exact())
    ax = plot_winners(rows[rows["group_size"] == 4])
    cells = {(patch.get_x(), patch.get_y()): mpl.colors.to_hex(patch.get_facecolor()) for patch in ax.patches}
    assert len(cells) == 4
    for coupling in (0, 1):  # columns go from dense to sparse
        assert cells[(0, coupling)] == METHOD_COLORS["grpo"]
        assert cells[(1, coupling)] == METHOD_COLORS["sapo"]
    assert [text.get_text() for text in ax.texts] == ["1.0×", "2.0×"] * 2
    assert not any(patch.get_hatch() for patch in ax.patches)
    tied = rows.assign(gain=np.where(rows["objective"] == "grpo", 1.0, 0.5 + 0.5 * rows["seed"]))
    assert all(patch.get_hatch() for patch in plot_winners(tied[tied["group_size"] == 4]).patches)


def test_curves_against_sparsity_are_means_over_worlds():
    rows = import_module("fig_exact_efficiency").with_gain(fake_exact())
    cell = rows[(rows["group_size"] == 16) & (rows["coupling"] == 1)]
    ax = plot_against_sparsity(cell, "gain", log=True)
    curves = {container.get_label(): container.lines[0] for container in ax.containers}
    assert list(curves) == ["SAPO (step-aligned)", "GRPO"]
    assert curves["SAPO (step-aligned)"].get_xdata() == pytest.approx([1e-3, 0.2], rel=0.2)  # beside each other
    assert curves["SAPO (step-aligned)"].get_ydata() == pytest.approx([2, 0.5])
    left, right = ax.get_xlim()
    assert left > right  # rarer to the right
    with pytest.raises(InputError, match="two rows for one"):
        plot_against_sparsity(rows, "gain")


def test_the_laboratory_is_drawn_from_the_record_or_the_users_own(out):
    artefacts = import_module("artefacts")
    for script in ("fig_exact_efficiency", "fig_exact_phase"):
        assert import_module(script).main(out)[0].read == artefacts.RECORD / "exact.csv"
    fake_exact().to_csv(out / "exact.csv", index=False)
    assert import_module("fig_exact_phase").main(out)[0].read == out / "exact.csv"
    with pytest.raises(InputError, match=r"no nothing\.csv"):
        artefacts.find_recorded(out, None, "nothing.csv")
    fake_exact().drop(columns="silent").to_csv(out / "exact.csv", index=False)
    with pytest.raises(InputError, match="no column 'silent'"):
        import_module("fig_exact_phase").main(out)


def test_table_of_claims(out):
    rows = pd.DataFrame(
        {
            "claim": ["a", "b"],
            "said_by": "x",
            "experiment": "y",
            "value": [0.0, 1.23456],
            "low": [0.0, 1.0],
            "high": [0.0, 1.5],
            "verdict": ["holds", "fails"],
            "command": "sapo claims --only 1",
        }
    )
    rows.to_csv(out / "claims.csv", index=False)
    (artefact,) = import_module("table_claims").main(out)
    assert artefact.table["value"].tolist() == ["0", "1.23"]
    assert artefact.table["95 % interval"].tolist() == ["", "[1, 1.5]"]
    assert "sapo claims" in artefact.files[1].read_text("utf-8")


def fake_timing() -> pd.DataFrame:
    """Ours takes .1 s for 4 completions and half as much again for each doubling, the others twice as much each."""
    rows = []
    for who, seconds in (("sapo", 1.1), ("grpo", 1.0), ("sapo, prompts repeated", 3.0), ("grpo, stock TRL", 5.5)):
        rows.append(("step", 33, "training step", who, seconds, 2e8))
    for axis, whats, values in (
        ("completions a prompt", ("policy update", "sampling rollouts"), (4, 8, 16)),
        ("prompt tokens", ("policy update", "sampling rollouts"), (32, 64, 128)),
        ("steps K", ("policy update", "sampling rollouts"), (2, 3, 4)),
        ("beams", ("beam search",), (1, 10, 100)),
        ("items", ("beam search", "trie build", "trie allowed"), (1e3, 1e6, 1e7)),
    ):
        for what, (power, value) in itertools.product(whats, enumerate(values)):
            rows.append((axis, value, what, "ours", 0.1 * 1.5**power, 1e7 * 1.5**power))
            rows.append((axis, value, what, "the rest", 0.2 * 2**power, 4e7 * 2**power))
    table = pd.DataFrame(rows, columns=["axis", "value", "what", "who", "seconds", "peak_bytes"])
    table = table.assign(low=table["seconds"] * 0.9, high=table["seconds"] * 1.2, rounds=3, setup="9 prompts")
    return table.assign(size="small", dtype="float32", machine="a CPU, 2 threads", versions="torch 2, trl 1")


def test_timing_tables(out):
    fake_timing().to_csv(out / "timing.csv", index=False)
    (artefact,) = import_module("table_timing").main(out)
    table = artefact.table.set_index("trainer")
    assert table.loc["SAPO", ["seconds per update", "of GRPO"]].tolist() == ["1.10", "1.10"]
    assert table.loc["GRPO, stock TRL", "of GRPO"] == "5.50"
    assert table.loc["GRPO", "fastest, slowest"] == "0.90, 1.20"
    assert "9 prompts." in artefact.caption
    assert "Medians of 3 calls in turns after one to warm up, freed memory kept; a CPU, 2 threads" in artefact.caption
    assert "float32, torch 2, trl 1." in artefact.caption
    (artefact,) = import_module("table_group_size").main(out)
    table = artefact.table.set_index(["work", "G"])
    assert table.loc[("policy update", "4"), "growth"] == ""
    assert table.loc[("policy update", "8"), "growth"] == "1.50 x"
    assert table.loc[("sampling rollouts", "16"), "ratio"] == "3.6 x"  # .2 x 4 over .1 x 1.5^2
    assert table.loc[("policy update", "16"), "memory, MB"] == "22"  # 1e7 x 1.5^2
    assert table.loc[("policy update", "16"), "its memory, MB"] == "160"


def test_growth_is_drawn_in_every_panel(out):
    rows = fake_timing()
    module = import_module("fig_scaling")
    with figure_style():
        figure = module.draw(rows)
    for ax, (axis, _, only, quantity) in zip(figure.axes, module.PANELS, strict=True):
        shown = rows[(rows["axis"] == axis) & (rows["what"].isin(only) if only else True)]
        lines = {container.get_label(): container.lines[0] for container in ax.containers}
        assert len(lines) == shown.groupby(["what", "who"]).ngroups
        line = lines[f"{shown['what'].iloc[0]}, ours"]
        unit = 1e6 if quantity == "peak_bytes" else 1
        mine = shown[(shown["what"] == shown["what"].iloc[0]) & (shown["who"] == "ours")]
        assert list(line.get_ydata()) == pytest.approx((mine[quantity] / unit).tolist())
        assert line.get_linestyle() == "-"
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    with pytest.raises(InputError, match="unknown work 'training step'"):
        plot_growth(rows)
    with pytest.raises(InputError, match="no rows"):
        plot_growth(rows[:0])


def test_a_record_of_nothing_is_refused(out):
    fake_timing()[:0].to_csv(out / "timing.csv", index=False)
    with pytest.raises(InputError, match="no rows"):
        import_module("table_timing").main(out)


def test_systems_compete_on_the_same_rows(out):
    """SASRec hits rows 0 and 1, item kNN row 0, popularity none; SAPO was tested on other rows, so it is left out."""
    script = import_module("table_systems")
    assert script.main(out) == []  # no other recommender was fitted
    world = {"dataset": "office", "split": "published_test", "preset": "baseline"}
    rows, runs = [], []
    for method, ranks in {"SASRec": [1, 1, 0, 0], "item_knn": [1, 0, 0, 0], "popularity": [0, 0, 0, 0]}.items():
        run = world | {"method": method, "seed": 0}
        hit = sum(rank > 0 for rank in ranks) / 4
        values = dict.fromkeys(PLAIN, hit) | ({"parameters": 2e6, "seconds": 90} if method == "SASRec" else {})
        rows += [{**run, "metric": name, "value": value, "n": 4} for name, value in values.items()]
        runs.append((pd.DataFrame({"user": list("abcd"), "rank": ranks}), run))
    add_ranks(runs, out)
    add_results(pd.DataFrame(rows).assign(source="measured", run="r"), out / "results.csv")
    few = read_results(out / "results.csv")
    few.loc[few["preset"] == "quick", "n"] = 2
    write_results(few, out / "results.csv")
    table, gains = script.main(out)
    measured = table.table[table.table["source"] == "measured"].set_index("method")
    assert list(measured.index) == ["SASRec", "Item kNN", "Popularity"]
    assert measured.loc["SASRec", ["million parameters", "minutes"]].tolist() == ["2.00", "1.5"]
    # a record says where runs were made; a fusion's minutes are those of all its parts
    for method, part in {"Fusion": "SASRec", "Fusion of fitted": "HSTU"}.items():
        values = {"ndcg@10": 0, "seconds": 60, f"weight/{part}": 0}
        own = pd.DataFrame(
            [{**world, "method": method, "seed": 0, "metric": m, "value": v, "n": 4} for m, v in values.items()]
        )
        add_results(own.assign(source="measured", run=method), out / "results.csv")
    machines = {"r": "NVIDIA H100 80GB HBM3", "Fusion": "x86_64 CPU", "Fusion of fitted": "NVIDIA H100 80GB HBM3"}
    recorded = [world | {"run": f"runs/seed0/{run}", "hardware": machine} for run, machine in machines.items()]
    pd.DataFrame(recorded).to_csv(out / "runs.csv")
    again = script.main(out)[0].table.set_index("method")["minutes"]
    labels = ["SASRec", "Item kNN", "Fusion", "Fusion of fitted"]
    assert again[labels].tolist() == ["1.5 (GPU)", "", "1.0 (GPU)", "1.0"]
    assert (table.table["source"] == "published").any()
    assert "office, published test, n = 4 test rows" in table.caption
    assert "As published, recall and NDCG of S-DPO (MiniOneRec), TIGER" in table.caption
    assert set(gains.table["metric"]) == {"Recall@10 by item", "NDCG@10 by item"}  # of SIDs there are no ranks
    recall = gains.table[gains.table["metric"] == "Recall@10 by item"]
    # one difference of 1 in 4: variance 1 / 4, standard error sqrt(1 / 16), t(.975) with 3 degrees of freedom 3.1824
    assert recall[["method", "next best", "gain"]].to_numpy().tolist() == [
        ["SASRec", "Item kNN", "+0.2500 [-0.5456, +1.0456]"],
        ["Item kNN", "Popularity", "+0.2500 [-0.5456, +1.0456]"],
        ["Popularity", "", ""],
    ]
    assert (out / "tables" / "table_systems-gains.tex").is_file()
    # a second data set has tables of its own, and all systems stand in one
    shop = world | {"dataset": "shop", "seed": 0}
    for method, ranks in {"SASRec": [1, 0], "cooccurrence": [1, 1]}.items():
        run, hit = shop | {"method": method}, sum(ranks) / 2
        own = pd.DataFrame([{**run, "metric": name, "value": hit, "n": 2} for name in PLAIN])
        add_results(own.assign(source="measured", run="s"), out / "results.csv")
        add_ranks([(pd.DataFrame({"user": list("ab"), "rank": ranks}), run)], out)
    made = {artefact.name.removeprefix("table_systems"): artefact.table for artefact in script.main(out)}
    places = ["office-published_test", "shop-published_test"]
    assert list(made) == ["", *(f"{kind}-{place}" for place in places for kind in ("", "-gains"))]
    gained = (
        made["-gains-shop-published_test"].set_index(["metric", "method"]).loc["Recall@10 by item", "Co-occurrence"]
    )
    assert gained["gain"].startswith("+0.5000")
    assert gained["over Co-occurrence"] == ""
    last = made["-gains-shop-published_test"].set_index(["metric", "method"]).loc["Recall@10 by item", "SASRec"]
    assert last[["next best", "gain"]].tolist() == ["", ""]
    assert last["over Co-occurrence"].startswith("-0.5000")
    both = made[""].set_index("method")
    # SASRec is the best of the one, and has half of the best of the other; co-occurrence is the best where it was
    assert both.index[:2].tolist() == ["Co-occurrence", "SASRec"]
    assert both.loc["SASRec", ["office item/ndcg@10", "shop item/ndcg@10"]].tolist() == [0.5, 0.5]
    assert np.isnan(both.loc["Co-occurrence", "office item/ndcg@10"])


def test_systems_are_compared_like_with_like_and_after_holm(out):
    """The policy names the SID of every target first but of row 0 in seed 1, and of odd rows after another item of it.
    SASRec names the items of odd rows first, counting those of rows 0 to 10, of which no ranks by SID were kept."""
    script = import_module("table_systems")
    odd, most = np.arange(40) % 2, (np.arange(40) > 0).astype(int)
    counted, ones = (np.arange(40) < 11).astype(int), np.ones(40, dtype=int)
    found = {
        ("stage2", "quick", 0): {"rank": ones, "item/rank": ones + odd, "item/sharers": ones},
        ("stage2", "quick", 1): {"rank": most, "item/rank": most + odd, "item/sharers": ones},
        ("SASRec", "baseline", 0): {"rank": odd, "sid/rank": odd},
        ("SASRec", "baseline", 1): {"rank": odd, "sid/rank": odd},
        ("cooccurrence", "baseline", 0): {"rank": counted},
    }
    rows, runs = [], []
    for (method, preset, seed), ranks in found.items():
        run = WORLD | {"preset": preset, "method": method, "seed": seed}
        runs.append((pd.DataFrame({"user": np.arange(40)} | ranks), run))
        for way in ("rank", "item/rank", "sid/rank"):
            if way in ranks:
                hit = (ranks[way] > 0).mean()
                rows += [{**run, "metric": way.replace("rank", name), "value": hit} for name in PLAIN]
    write_results(pd.DataFrame(rows).assign(source="measured", n=40, run="r"), out / "results.csv")
    add_ranks(runs, out)
    table, gains = script.main(out)
    measured = table.table.set_index("method")
    assert measured.loc["Co-occurrence", ["item/recall@10", "sid/recall@10"]].isna().tolist() == [False, True]
    shown = gains.table.set_index(["metric", "method"])
    assert shown.loc["Recall@10 by SID"].index.tolist() == ["Stage 2 (no RL)", "SASRec"]
    assert set(shown.loc["Recall@10 by SID", "over Co-occurrence"]) == {""}

    def text(gain):
        return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"

    by_sid = paired_difference([ones - odd, most - odd])
    assert shown.loc[("Recall@10 by SID", "Stage 2 (no RL)"), "gain"] == text(by_sid) + " *"
    discounted = odd / np.log2(3) + 1 - odd  # of the policy's items
    by_item = paired_difference([discounted - odd, discounted * most - odd])
    assert shown.loc[("NDCG@10 by item", "Stage 2 (no RL)"), "gain"].removesuffix(" *") == text(by_item)
    # Of eight pairs (three by item, one by SID, two metrics each) this one has p = .045 twice, the last two: .09
    over = paired_difference([odd - counted] * 2)
    assert over.low > 0
    for column in ("gain", "over Co-occurrence"):
        assert shown.loc[("Recall@10 by item", "SASRec"), column] == text(over)


def test_a_mean_over_fewer_seeds_is_not_beside_others():
    """Of a method whose other seeds diverged."""
    script = import_module("table_systems")
    table = pd.DataFrame({"method": ["A", "B", "counting"], "source": "measured", "seeds": [3, 1, pd.NA]})
    table = table.astype({"seeds": "Int64"})
    for metric in script.METRICS:
        table = table.assign(**{metric: [0.2, 0.4, 0.1], f"{metric}_half": [0.01, np.nan, np.nan]})
    assert script.overview({"shop": table})["method"].tolist() == ["A", "counting"]


def test_the_command_of_a_row_makes_it():
    """Of every row in the record: its name, or that of the system that it belongs to, is one that the command knows."""
    script = import_module("table_systems")
    rows = script.systems(read_results(SCRIPTS / "data" / "results.csv")).drop_duplicates(["method", "preset"])
    known = {"baselines": {*BASELINES, *FUSIONS}, "--objectives": {*OBJECTIVES}, "--systems": {*SYSTEMS}}
    found = set()
    for method, preset in rows[["method", "preset"]].to_numpy():
        *_, option, name = shlex.split(script.command(method, preset))
        found.add(option)
        if option in known:
            assert name in known[option]
            assert name == method or SYSTEMS[name].start == method
        else:
            assert method in ({"stage2", "stage2_no_thinking"} if name == "run" else REFERENCES)
    assert found == {*known, "sapo", "of"}  # "sapo run", and "any of these"


def test_tokenizer_table(out):
    rows = [
        ("shop", "sids", "published", 2, 0, "collision_rate", 0.25),
        ("shop", "sids", "published", 2, 0, "codes_1", 8),
    ]
    for seed, rate in enumerate((0.1, 0.2, 0.3)):
        rows += [
            ("shop", "rqvae", "measured", 2, seed, "collision_rate", 0.0),
            ("shop", "rqvae", "measured", 2, seed, "collisions_before", rate),
            ("shop", "rqvae", "measured", 2, seed, "forced_2", 0.5),
        ]
    columns = ["dataset", "tokenizer", "source", "levels", "seed", "metric", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(out / "tokenizers.csv", index=False)
    (artefact,) = import_module("table_tokenizers").main(out)
    table = artefact.table.set_index("SIDs")
    assert list(table.index) == ["sids†", "RQ-VAE (TIGER)"]
    assert table.loc["sids†", "in collisions, %"] == "25.0"
    # standard error .1 / sqrt 3, times 4.303 for two degrees of freedom
    assert table.loc["RQ-VAE (TIGER)", "before moving, %"] == "20.0 ± 24.8"
    assert table.loc["RQ-VAE (TIGER)", "forced"] == "0.50"
    assert "3 seeds" in artefact.caption


def test_recorded_tokenizers_are_whole():
    """Every tokenizer on every data set with all seeds; what is counted stays within what there is to count."""
    rows = pd.read_csv(SCRIPTS / "data" / "tokenizers.csv")
    facts = rows.pivot(index=["source", "dataset", "tokenizer", "seed"], columns="metric", values="value")
    measured = facts.loc["measured"]
    assert measured.groupby(level="dataset").size().nunique() == 1
    assert measured.groupby(level=["dataset", "tokenizer"]).size().nunique() == 1
    shares = facts.filter(regex="^(collision|forced_|chance_|neighbours_share_|same_category_)").stack().dropna()
    assert shares.between(0, 1).all()
    assert (facts["perplexity_1"] <= facts["codes_1"] + 1e-6).all()
    assert (facts["codes_1"] <= facts["items"]).all()
    assert (measured["seconds"] > 0).all()

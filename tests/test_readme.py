"""Numbers in the README are those of the committed record, and files it names exist."""

import re
from pathlib import Path

import pandas as pd
import pytest

from sapo.analysis.ranks import Ranks
from sapo.analysis.results import paired_gains, read_results
from sapo.analysis.statistics import seed_interval
from sapo.credit.objectives import OBJECTIVES
from sapo.recipes import QUICK
from sapo.stages import REFERENCES
from sapo.suite import BASELINES, FUSIONS
from sapo.systems import SYSTEMS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
ROWS = {
    "stage 2 without thinking": "stage2_no_thinking",
    "SAPO": "sapo",
    "GRPO": "grpo",
    "stage 2, before RL": "stage2",
}


def quick_synthetic(name: str) -> pd.DataFrame:
    table = pd.read_csv(ROOT / "paper_figures" / "data" / name)
    return table[(table["dataset"] == "synthetic") & (table["preset"] == "quick")]


@pytest.fixture(scope="module")
def rows():
    rows = read_results(ROOT / "paper_figures" / "data" / "results.csv")
    return rows[(rows["dataset"] == "synthetic") & (rows["preset"] == "quick")]


@pytest.fixture(scope="module")
def record(rows):
    return rows[rows["metric"] == "ndcg@10"].set_index(["method", "seed"])["value"]


@pytest.mark.parametrize("label", ROWS)
def test_results_are_those_of_the_record(record, label):
    values = record[ROWS[label]].to_numpy(float)
    interval = seed_interval(values)
    assert f"| {label} | {interval.value:.3f} ± {interval.half:.3f} | {len(values)} |" in README


def test_optimum_and_difference_are_those_of_the_record(record):
    assert f"| Bayes optimum (exact) | {record['optimum'].iloc[0]:.3f} | |" in README
    gain = seed_interval((record["sapo"] - record["grpo"]).to_numpy(float))
    assert f"paired by seed: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" in README


def test_reasoning_systems_are_those_of_the_record():
    """All of them, the best of the synthetic catalogue first, each with its gain over its start or a control."""
    results = read_results(ROOT / "paper_figures" / "data" / "results.csv")
    rows = results[(results["preset"] == "quick") & (results["source"] == "measured")]
    rows = rows.set_index(["metric", "dataset", "method", "seed"])["value"]
    values, text = rows["ndcg@10"], " ".join(README.split())
    beside = {name: system.start for name, system in SYSTEMS.items()}
    beside |= {"LC-Rec": "stage2_no_thinking", "RecCoT": "RecCoT blind", "RecCoT blind": "stage2_no_thinking"}
    helped = {
        "synthetic": {"RecCoT blind", "LC-Rec", "MiniOneRec"},
        "industrial": {"RecCoT blind", "LC-Rec", "OneRec-Think"},
        "office": {"RecCoT blind", "R2ec"},
        "beauty": {"LICD", "RecCoT blind"},
    }
    worse = {("industrial", "RecCoT"), ("beauty", "MiniOneRec"), ("beauty", "SIDReasoner")}
    worse |= {(dataset, "Rec-R1") for dataset in helped}
    labels = {method: label for label, method in ROWS.items()}
    labels |= {"stage2_one_block": "stage 2 in one block", "stage2_aligned": "stage 2 after LC-Rec's tasks"}
    lines = []
    for method in sorted(SYSTEMS, key=lambda name: -values["synthetic", name].mean()):
        cells = []
        for dataset, better in helped.items():
            if (dataset, method) not in values:
                cells += ["", ""]
                continue
            own, other = (values[dataset, name].to_numpy(float) for name in (method, beside[method]))
            interval, gain = seed_interval(own), seed_interval(own - other)
            cells.append(f"{interval.value:.3f} ± {interval.half:.3f}")
            cells.append(f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
            assert (gain.low > 0) == (method in better), (dataset, method)
            assert (gain.high < 0) == ((dataset, method) in worse), (dataset, method)
        row = f"| {method} | {labels.get(beside[method], beside[method])} | {' | '.join(cells)} |"
        lines.append(" ".join(row.split()))
    assert "\n".join(lines) in README
    for dataset, method in (("industrial", "OneRec-Think"), ("office", "R2ec")):
        assert values[dataset, method].mean() < values[dataset, "stage2_no_thinking"].mean()
    shown = []
    for dataset in ("synthetic", "industrial", "office"):
        gain = seed_interval(
            (rows["recall@10", dataset, "R2ec"] - rows["recall@10", dataset, "stage2"]).to_numpy(float)
        )
        shown.append(f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
        assert gain.low > 0
        first, before = (rows["recall@1", dataset, method] for method in ("R2ec", "stage2"))
        assert (first.max() < before.min()) == (dataset != "office")
    assert f"Recall@10 {shown[0]} on the synthetic catalogue, {shown[1]} on Industrial, {shown[2]} on Office" in text
    assert (rows["updates", "synthetic", "Rec-R1"] == 0).all()
    beauty = values["beauty"].groupby("method").mean()
    assert f"all that name SIDs stay far below counting, {beauty['cooccurrence']:.3f}," in text
    thinking = ["stage2", "sapo", "grpo", "LICD", "OneRec-Think", "SIDReasoner", "stage2_one_block"]
    assert (beauty[["stage2_no_thinking", "MiniOneRec"]].min() > 2 * beauty[thinking]).all()


def test_counting_baselines_are_those_of_the_record(record):
    for label, method in (("co-occurrence", "cooccurrence"), ("popularity", "popularity")):
        assert f"| {label} | {record[method].iloc[0]:.3f} | |" in README


def test_real_data_are_those_of_the_record():
    results = read_results(ROOT / "paper_figures" / "data" / "results.csv")
    rows = results[(results["preset"] == "quick") & (results["metric"] == "ndcg@10")]
    values = rows.set_index(["dataset", "method", "seed"])["value"]
    sets = ("industrial_full", "industrial", "office", "beauty")
    for label, method in (ROWS | {"co-occurrence": "cooccurrence", "popularity": "popularity"}).items():
        cells = []
        for dataset in sets:
            interval = seed_interval(values[dataset, method].to_numpy(float))
            cells.append(f"{interval.value:.3f}" + f" ± {interval.half:.3f}" * (method in ROWS.values()))
        assert f"| {label} | {' | '.join(cells)} |" in README
    rates = results[(results["metric"] == "learning_rate") & results["method"].isin(["sapo", "grpo"])]
    chosen = rates.groupby("dataset")["value"].unique()
    assert {dataset: chosen[dataset].tolist() for dataset in sets} == {
        "industrial_full": [3e-5],
        "industrial": [1e-4],
        "office": [3e-5],
        "beauty": [3e-5],
    }
    text = " ".join(README.split())
    assert "3e-5, the lowest rate of the grid, for both, and 1e-4 on Industrial's published pairs" in text
    gains = {}
    for dataset in sets:
        for one, other in (("sapo", "grpo"), ("grpo", "stage2")):
            gain = seed_interval((values[dataset, one] - values[dataset, other]).to_numpy(float))
            gains[dataset, one] = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    full, pairs, office, beauty = (gains[dataset, "sapo"] for dataset in sets)
    assert (
        f"SAPO − GRPO, paired by seed: {full} and {pairs} on Industrial, {office} on Office, {beauty} on Beauty" in text
    )
    full, pairs = gains["industrial_full", "grpo"], gains["industrial", "grpo"]
    assert f"of stage 2: by {full} leave-one-out, by {pairs} on the published pairs" in text


def test_efficiencies_are_those_of_the_ledger():
    claims = pd.read_csv(ROOT / "paper_figures" / "data" / "claims.csv").set_index("experiment")
    text = " ".join(README.split())
    start, end = "exact, G = 16, coupling 0, exact match ", ": efficiency of SAPO over that of "
    for cell, rival, shown in (
        (
            "0.0001, one group",
            "GRPO",
            "worth {:.0f} [{:.0f}, {:.0f}] of GRPO's where one completion in 10,000 is right",
        ),
        ("0.2, one group", "GRPO", "and {:.2f} [{:.2f}, {:.2f}] where one in 5 is"),
        ("0.0001, one group", "GRPO with the same step rewards, summed", "summed, it is {:.2f} [{:.2f}, {:.2f}]"),
        ("0.01, 256 groups of the prompt", "GRPO", "at one in 100 right, SAPO's step is worth {:.2f} [{:.2f}, {:.2f}]"),
    ):
        row = claims.loc[f"{start}{cell}{end}{rival}"]
        assert shown.format(row["value"], row["low"], row["high"]) in text
    start = "exact, G = 16, coupling 0.5, exact match "
    for rarity, shown in (
        ("0.2", "{:.2f} [{:.2f}, {:.2f}] of SAPO's where one in 5"),
        ("0.01", "{:.2f} [{:.2f}, {:.2f}] at one in 100"),
    ):
        row = claims.loc[f"{start}{rarity}, one group: efficiency of sapo_fallback over that of SAPO"]
        assert shown.format(row["value"], row["low"], row["high"]) in text
    rarest = claims.loc[f"{start}0.0001, one group: efficiency of sapo_fallback over that of SAPO", "value"]
    assert rarest == pytest.approx(1, abs=0.005)
    real = claims.filter(regex="next items after each", axis=0)
    real = real[real["claim"].str.contains("maximises step")]
    for name, label in (("office", "Office it would give away"), ("industrial_full", "Industrial")):
        row = real.filter(regex=f"^{name}", axis=0).reset_index().iloc[0]
        best = float(re.search(r"of (0\.\d+);", row["experiment"])[1])
        assert re.search(f"{label} {100 * row['value']:.1f}( points)? of (an exact match of )?{100 * best:.1f} %", text)
    lost = claims.filter(regex="^synthetic catalogue, targets as random", axis=0)["value"]
    assert (lost == 0).all()


def test_gains_of_all_objectives_are_those_of_the_record(rows):
    text = " ".join(README.split())
    measured = rows[rows["source"] == "measured"]

    def shown(rows: pd.DataFrame, method: str, against: str) -> str:
        gain = seed_interval(paired_gains(rows, "ndcg@10", against)[method].dropna().to_numpy())
        return f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"

    assert f"whose groups are beams: {shown(measured, 'rank_reward', 'grpo')}" in text
    assert f"(over stage 2 {shown(measured, 'rank_reward', 'stage2')}" in text
    assert f"({shown(measured, 'sapo_fallback', 'sapo')} of SAPO)" in text
    gains = paired_gains(measured, "ndcg@10", "stage2")[list(OBJECTIVES)]
    assert len(gains.columns) == 22
    assert gains.notna().to_numpy().all()
    others = gains.drop(columns="rank_reward").mean()
    assert f"between {others.min():+.3f} and {others.max():+.3f} of stage 2" in text
    curves = quick_synthetic("dynamics.csv.gz")
    explained = curves[(curves["method"] == "rlvr") & (curves["metric"] == "value/explained")]
    explained = explained[explained["step"] == explained["step"].max()]["value"].mean()
    assert f"RLVR learns explains {100 * explained:.0f} % of its returns" in text
    results = read_results(ROOT / "paper_figures" / "data" / "results.csv")
    twice = results[(results["preset"] == "quick-2iterations") & (results["source"] == "measured")]
    assert f"SAPO - GRPO is {shown(twice, 'sapo', 'grpo')}" in text
    assert f"GSPO - GRPO {shown(twice, 'gspo', 'grpo')}" in text
    assert f"Rank-GRPO - SAPO {shown(twice, 'rank_grpo', 'sapo')}" in text


def test_the_record_is_of_the_recipe_as_it_stands(rows):
    updates = rows[rows["metric"] == "updates"].groupby("method")["value"].unique()
    expected = dict.fromkeys(OBJECTIVES, QUICK.stage3.updates)
    expected |= dict.fromkeys(("stage2", "stage2_no_thinking"), QUICK.stage2.updates)
    expected |= dict.fromkeys(("stage2_one_block", "stage2_aligned", "LC-Rec"), QUICK.stage2.updates)
    expected |= dict.fromkeys(("MiniOneRec", "SIDReasoner", "OneRec-Think"), QUICK.stage3.updates) | {"LICD": 0}
    updates = updates.drop([name for name in SYSTEMS if SYSTEMS[name].fits])  # as many as validation asked for
    assert {method: values.tolist() for method, values in updates.items()} == {
        method: [number] for method, number in expected.items()
    }
    rates = rows[rows["metric"] == "learning_rate"]
    assert set(rates["value"]) <= set(QUICK.stage3.learning_rates)
    assert set(rates.loc[rates["method"].isin(QUICK.objectives), "value"]) == {1e-4}
    assert "(1e-4 for both)" in README


def test_sharpening_is_that_of_the_record(rows):
    curves = quick_synthetic("dynamics.csv.gz")
    curves = curves[curves["metric"] == "rewards/exact/mean"]
    exact = curves.pivot_table(index="method", columns="step", values="value").iloc[:, [0, -1]].round(2)
    (before, sapo), (also_before, grpo) = exact.loc["sapo"], exact.loc["grpo"]
    assert before == also_before
    assert f"rose from {before:.2f} to {sapo:.2f} (SAPO) and {grpo:.2f} (GRPO)" in " ".join(README.split())
    greedy = rows[rows["metric"] == "recall@1"].groupby("method")["value"].mean().round(2)
    assert greedy["sapo"] == greedy["grpo"]
    assert f"({greedy['stage2']:.2f} in stage 2, {greedy['sapo']:.2f} after either)" in README


def test_shares_of_silent_groups_are_those_of_the_record():
    match = quick_synthetic("rollouts.csv.gz")
    match = match.pivot(index=["seed", "prompt", "rollout"], columns="level", values="match")
    match["exact"] = match.min(axis=1)
    groups = match.groupby(["seed", "prompt"])
    silent = (groups.max() == groups.min()).mean()
    assert groups.size().unique().tolist() == [8]
    shares = f"{silent['exact']:.0%} of the stage-2 groups of 8 completions, a single step gave none in "
    shares += f"{silent[[1, 2, 3]].min():.0%} to {silent[[1, 2, 3]].max():.0%}"
    assert re.sub(r"(\d)%", r"\1 %", shares).replace(" % to", " to") in " ".join(README.split())


def test_the_table_of_objectives_is_the_code():
    rows = dict(re.findall(r"^\| \**`(\w+)`\** \|(.*)\|$", README, flags=re.MULTILINE))
    assert OBJECTIVES.keys() <= rows.keys()
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for key, objective in OBJECTIVES.items():
        _, credit, scale, ratio, average, kl, source, test, figure = (cell.strip() for cell in rows[key].split("|"))
        assert credit == objective.credit + ", learned value" * (objective.baseline == "value")
        assert scale == ("none" if objective.scale == "none" else f"{objective.scale} std")
        unit, low, high = re.fullmatch(r"(\w+), (.+)/(.+)", ratio).groups()
        assert (unit, float(low), float(high)) == (objective.ratio, objective.epsilon, objective.epsilon_high)
        assert average == objective.average
        assert kl == {0: "–", 1e-3: "1e-3", 0.05: "0.05"}[objective.beta]
        assert source == objective.source
        assert f"\ndef {test.strip('`')}(" in tests
        assert (ROOT / "paper_figures" / f"{figure.strip('`')}.py").is_file()


def test_the_tables_of_systems_are_the_code():
    rows = re.findall(r"^\| (`.*?)\|(.*)\|$", README, flags=re.MULTILINE)
    cells = {names.strip(): [cell.strip() for cell in rest.split("|")] for names, rest in rows}
    fitted = [name for names in cells for name in re.findall(r"`([^`]+)`", names)]
    assert {*BASELINES, *FUSIONS} <= set(fitted)
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for names, (*_, test) in cells.items():
        if {*BASELINES, *FUSIONS} & set(re.findall(r"`([^`]+)`", names)):
            assert f"\ndef {test.strip('`')}(" in tests, names
    for name, system in SYSTEMS.items():
        _, then, source, scope = cells[f"`{name}`"]
        assert (source, scope) == (system.source, system.scope)
        if system.objective:
            assert then == f"`{system.objective}`"


def test_files_that_it_names_exist():
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).is_file(), name
    for name in re.findall(r"`((?:fig|table)_\w+)`", README):
        assert (ROOT / "paper_figures" / f"{name}.py").is_file(), name
    for name in re.findall(r"`(0\d_\w+)`", README):
        assert (ROOT / "notebooks" / f"{name}.ipynb").is_file(), name
    for name in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_the_snippet_without_a_trainer_runs():
    snippet = re.findall(r"```python\n(import torch.*?)```", README, flags=re.DOTALL)[0]
    names: dict = {}
    exec(snippet, names)
    # step 1 is right three times of four: (1 - 3/4) / (1/2 + 1e-4) on its two tokens
    assert names["advantages"][0, :2].tolist() == pytest.approx([0.25 / 0.5001] * 2)
    assert names["advantages"].shape == (4, 5)


def test_speed_is_that_of_the_record():
    timing, text = pd.read_csv(ROOT / "paper_figures" / "data" / "timing.csv"), " ".join(README.split())
    ratios = timing[timing["axis"] == "ratio"]
    assert ratios["what"].nunique() == 9
    for what, of_what in ratios.groupby("what"):
        ours, theirs = (of_what[(of_what["who"] == "ours") == mine].iloc[0] for mine in (True, False))
        assert f"| {what} | {theirs['who']} | {theirs['seconds'] / ours['seconds']:.1f} × |" in README
    update = ratios[ratios["what"] == "policy update"].set_index("who")["peak_bytes"]
    assert f"The update holds {update['ours'] / update.drop('ours').iloc[0]:.0%}".replace("%", " %") in text
    trie = timing[(timing["what"] == "trie build") & (timing["who"] == "ours") & (timing["value"] == 1e7)]
    assert f"(10 million items: {trie['peak_bytes'].iloc[0] / 1e6:.0f} MB)" in text
    steps = timing[timing["axis"] == "step"].set_index("who")["seconds"]
    assert f"A step of SAPO takes {steps['sapo'] / steps['grpo']:.2f} of one of GRPO" in text
    groups = timing[(timing["axis"] == "completions a prompt") & (timing["who"] == "ours")]
    seconds = groups.pivot(index="value", columns="what", values="seconds")
    update, rollouts = (seconds.loc[64, what] / seconds.loc[4, what] for what in ("policy update", "sampling rollouts"))
    shown = f"16 times the completions cost {update:.1f} times the time of an update and {rollouts:.1f} of the rollouts"
    assert shown in text
    asking = timing[timing["axis"] == "requests"].set_index("value")
    assert "histories of 10 titles, 3 blocks of 8 words" in asking["setup"].iloc[0]
    one, many = asking["seconds"][1] * 1e3, asking["seconds"][64] / 64 * 1e3
    assert f"three thoughts of eight words) waits {one:.0f} ms; of 64 who ask together, {many:.1f} ms each" in text


SYSTEM_ROWS = {
    "co-occurrence (counting, no training)": "cooccurrence",
    "co-occurrence (counting)": "cooccurrence",
    "item kNN (counting)": "item_knn",
    "RecCoT blind (two towers, above)": "RecCoT blind",
}
SYSTEM_DATA = {
    "Industrial": ("industrial", "published_test", 4533),
    "Office": ("office", "published_test", 4866),
    "Beauty": ("beauty", "leave_one_out", 22363),
}
BOTH = ("recall@10", "ndcg@10")


@pytest.fixture(scope="module")
def systems():
    """Rows and means of the record, what is published, whose numbers contradict each other, ranks."""
    record = ROOT / "paper_figures" / "data"
    rows = read_results(record / "results.csv")
    towers = (rows["preset"] == "quick") & (rows["method"] == "RecCoT blind")
    rows = rows[(rows["preset"] == "baseline") | towers]
    for dataset, split, count in SYSTEM_DATA.values():
        counts = rows.loc[(rows["dataset"] == dataset) & (rows["metric"] == "ndcg@10"), ["split", "n"]]
        assert counts.drop_duplicates().to_numpy().tolist() == [[split, count]]
    published = read_results(record / "published.csv")
    doubtful = published[published["run"].str.contains("cannot both be right")]
    return (
        rows.set_index(["dataset", "method", "metric", "seed"])["value"],
        rows.groupby(["dataset", "method", "metric"])["value"].mean(),
        published.set_index(["dataset", "method", "metric"])["value"],
        set(zip(doubtful["dataset"], doubtful["method"], strict=True)),
        Ranks(record),
    )


def readme_table(start: str) -> list[list[str]]:
    """Cells of the rows of a table, whose header begins so."""
    lines = README[README.index(start) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def two(values, dataset, method, prefix="") -> str:
    """HR@10 / NDCG@10 as a cell shows them, empty where there is none."""
    if (dataset, method, f"{prefix}{BOTH[0]}") not in values.index:
        return ""
    return " / ".join(f"{values[dataset, method, f'{prefix}{name}']:.3f}" for name in BOTH)


def published_name(method):
    """MiniOneRec's table, or SIDReasoner's of what it lacks."""
    of_sidreasoner = {"ReaRec ERL": "ReaRec", "ReaRec PRL": "ReaRec", "LETTER-TIGER": "LETTER"}
    if method in of_sidreasoner:
        return f"{of_sidreasoner[method]} (SIDReasoner Table 2)"
    return f"{method} (MiniOneRec)"


def test_systems_are_those_of_the_record(systems):
    _, mean, published, doubtful, _ = systems
    behind, short = {}, {}
    table = readme_table("| system | Industrial |")
    for label, *cells in table:
        method, expected = SYSTEM_ROWS.get(label, label), []
        for name in ("Industrial", "Office"):
            dataset, theirs = SYSTEM_DATA[name][0], published_name(method)
            said = two(published, dataset, theirs)
            expected += [two(mean, dataset, method), said + "?" * ((dataset, theirs) in doubtful)]
            if said and expected[-2]:
                hits, gained = (mean[dataset, method, m] / published[dataset, theirs, m] - 1 for m in BOTH)
                short[method, name] = hits
                if gained < -0.04:
                    behind[method, name] = f"{gained:.0%}".replace("%", " %")
        assert cells == expected, label
    shown = {SYSTEM_ROWS.get(label, label) for label, *_ in table}
    everything = set(mean.index.get_level_values(1)[mean.index.get_level_values(0) != "beauty"])
    assert everything - shown == {"popularity"}
    letter = f"{short.pop(('LETTER-TIGER', 'Office')):.0%}".replace("%", " %")
    assert f"stays within 9 % of it, but LETTER-TIGER on Office ({letter})" in " ".join(README.split())
    assert -0.09 < min(short.values()) < -0.08
    text = " ".join(README.split())
    said = (
        f'more than 4 % behind: HSTU {behind.pop(("HSTU", "Industrial"))} (of a number marked "?") and '
        f"{behind.pop(('HSTU', 'Office'))} (Industrial, Office), "
        f"SASRec {behind.pop(('SASRec', 'Industrial'))} and {behind.pop(('SASRec', 'Office'))}, "
        f'TIGER {behind.pop(("TIGER", "Industrial"))} and {behind.pop(("TIGER", "Office"))} ("?"), '
        f"LETTER-TIGER {behind.pop(('LETTER-TIGER', 'Industrial'))} and {behind.pop(('LETTER-TIGER', 'Office'))}, "
        f"ReaRec ERL {behind.pop(('ReaRec ERL', 'Office'))} and PRL {behind.pop(('ReaRec PRL', 'Office'))} (Office), "
        f"GRU4Rec {behind.pop(('GRU4Rec', 'Industrial'))} (Industrial)"
    )
    assert said in text
    assert not behind


def test_beauty_is_that_of_the_record(systems):
    _, mean, published, _, ranks = systems
    elsewhere = dict.fromkeys(["HSTU", "SASRec", "TIGER"], "re-run by phonism/genrec")
    elsewhere |= {"SASRec softmax": "RecBole issue 1290"}
    table = readme_table("| on Beauty |")
    for label, *cells in table:
        method = SYSTEM_ROWS.get(label, label)
        base = method.split()[0] if method.startswith("ReaRec") else method
        expected = [two(mean, "beauty", method), two(mean, "beauty", method, "new/")]
        for source in ("TIGER Table 1", "OneRec-Think Table 1", elsewhere.get(method)):
            expected.append(two(published, "beauty", f"{base} ({source})"))
        assert cells == expected, label
    shown = {SYSTEM_ROWS.get(label, label) for label, *_ in table}
    assert set(mean["beauty"].index.get_level_values(0)) - shown == {"popularity"}
    text = " ".join(README.split())
    key = lambda method: (*SYSTEM_DATA["Beauty"][:2], "quick" if method in SYSTEMS else "baseline", method)  # noqa: E731
    ahead = {
        method
        for method in shown - {"cooccurrence"}
        if ranks.gain(key(method), key("cooccurrence"), "recall@10").low > 0
    }
    assert ahead == {"Fusion of counting", "ReaRec PRL", "ReaRec ERL", "SASRec softmax", "RecCoT blind"}
    assert mean["beauty"].xs("ndcg@10", level="metric").idxmax() == "Fusion of counting"
    assert mean["beauty"].xs("recall@10", level="metric").idxmax() == "ReaRec PRL"
    assert f"OneRec-Think as published has {two(published, 'beauty', 'OneRec-Think (OneRec-Think Table 1)')}" in text
    assert f"with them they have {two(published, 'beauty', 'LETTER-TIGER (LETTER)')}" in text
    shares = [
        mean["beauty", "TIGER", f"{of}{metric}"] / published["beauty", "TIGER (TIGER Table 1)", metric] - 1
        for of in ("", "new/")
        for metric in BOTH
    ]
    signs, sizes = [share > 0 for share in shares], (f"{abs(share):.0%}".replace("%", " %") for share in shares)
    assert signs == [False, False, True, False]
    said = (
        "TIGER is {} below the HR@10 of its paper, and {} below its NDCG@10 ({} above and {} below where the old items"
    )
    assert said.format(*sizes) in text
    sources = ("TIGER Table 1", "OneRec-Think Table 1", "re-run by phonism/genrec")
    theirs = [published["beauty", f"SASRec ({source})", "recall@10"] for source in sources]
    low, same, high = (f"{1 - mean['beauty', 'SASRec', 'new/recall@10'] / value:.0%}" for value in theirs)
    assert low == same
    said = f"SASRec with one negative is {low} below the HR@10 of both papers and {high} below that of a re-run"
    assert said.replace("%", " %") in text
    gru = [published["beauty", f"GRU4Rec ({name} Table 1)", "recall@10"] for name in ("TIGER", "OneRec-Think")]
    assert gru[0] < mean["beauty", "GRU4Rec", "new/recall@10"] < gru[1]


def test_what_is_said_of_large_models_is_so(systems):
    values, mean, published, _, _ = systems
    text, large = " ".join(README.split()), {}
    for name, words in (
        ("MiniOneRec (MiniOneRec)", "MiniOneRec (Industrial {}, Office {})"),
        ("SIDReasoner (SIDReasoner Table 2)", "SIDReasoner ({}, {})"),
    ):
        assert words.format(*(two(published, data, name) for data in ("industrial", "office"))) in text
        large |= {(data, m, name[:4]): published[data, name, m] for data in ("industrial", "office") for m in BOTH}
    fused = {(data, m): mean[data, "Fusion", m] for data in ("industrial", "office") for m in BOTH}
    for metric in BOTH:
        beside, above = large["industrial", metric, "SIDR"], large["industrial", metric, "Mini"]
        assert abs(fused["industrial", metric] - beside) < 0.003
        assert beside + 0.002 < mean["industrial", "Fusion with TIGER", metric] < above - 0.01
    sizes = values[values.index.get_level_values("metric") == "parameters"]
    sizes = sizes[sizes.index.get_level_values("method").isin({*FUSIONS} - {"Fusion of counting"})]
    assert 2e6 < sizes.min() < sizes.max() < 4.5e6
    ahead = (fused["office", m] / max(large["office", m, name] for name in ("Mini", "SIDR")) - 1 for m in BOTH)
    hits, gained = (f"{share:.0%}".replace("%", " %") for share in ahead)
    assert (
        f"it is ahead of the better of them by {hits} in HR@10 and, no more than users differ, {gained} in NDCG@10"
        in text
    )


def test_gains_between_systems_are_those_of_the_record(systems):
    """Every "A - B in METRIC on DATA: gain [low, high]" of the README."""
    values, mean, _, _, ranks = systems
    names = {"co-occurrence": "cooccurrence"}
    pattern = (
        r"([A-Za-z][\w -]*?) - ([A-Za-z][\w -]*?) in (HR|NDCG)@10 on (\w+)[:,]? "
        r"([+-]\d\.\d{4}) \[([+-]\d\.\d{4}), ([+-]\d\.\d{4})\]"
    )
    text = " ".join(README.split())
    found = re.findall(pattern, text)
    assert len(found) >= 8
    for one, other, metric, data, *numbers in found:
        metric = {"HR": "recall@10", "NDCG": "ndcg@10"}[metric]
        pair = [
            (*SYSTEM_DATA[data][:2], "quick" if name in SYSTEMS else "baseline", names.get(name, name))
            for name in (one, other)
        ]
        gain = ranks.gain(*pair, metric)
        assert [f"{value:+.4f}" for value in (gain.value, gain.low, gain.high)] == numbers, (one, other)
    over_seeds, places = {}, ("industrial", "office")
    for one, other, metric, data, *numbers in re.findall(pattern + r" over users, \[(\S+), (\S+)\] over seeds", text):
        assert metric == "NDCG"
        own, others = (values[data.lower(), name, "ndcg@10"].to_numpy(float) for name in (one, other))
        over = seed_interval(own - others)
        assert numbers[-2:] == [f"{over.low:+.3f}", f"{over.high:+.3f}"]
        over_seeds[one, other, data.lower()] = over.low > 0
    assert over_seeds == {("Fusion", "Fusion of fitted", data): True for data in places} | {
        ("LETTER-TIGER", "TIGER", "office"): False
    }
    counted = mean["office"].xs("ndcg@10", level="metric")
    assert counted["cooccurrence"] > counted.drop(["cooccurrence", "item_knn", *FUSIONS], errors="ignore").max()
    fitted = {data: mean[data].unstack().drop([*FUSIONS, *REFERENCES], errors="ignore") for data in places}
    assert fitted["industrial"]["ndcg@10"].idxmax() == fitted["industrial"]["recall@10"].idxmax() == "ReaRec ERL"
    assert [fitted["office"][metric].idxmax() for metric in BOTH] == ["ReaRec ERL", "RecCoT blind"]


def test_collisions_are_those_of_the_record():
    rows = pd.read_csv(ROOT / "paper_figures" / "data" / "tokenizers.csv")
    rows = rows[rows["dataset"] == "industrial_full"]
    mean = rows.groupby(["tokenizer", "metric"])["value"].mean().mul(100).round(1)
    text = " ".join(README.split())
    kmeans, rqvae = (mean[method, "collisions_before"] for method in ("rkmeans", "rqvae"))
    theirs = [mean[sids, "collision_rate"] for sids in ("sids_rkmeans", "sids", "sids_letter")]
    assert f"k-means leaves {kmeans} % of the items in collisions (published with the data: {theirs[0]} %)" in text
    assert f"RQ-VAE {rqvae} % ({theirs[1]} %)" in text
    assert f"LETTER after its own rounds {mean['letter', 'collisions_shared_out']} % ({theirs[2]} %)" in text

"""The results pages on made-up records: which worlds they pick up, how they order them, and what they refuse."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sapo.analysis.ranks import Ranks, add_ranks
from sapo.analysis.results import write_results
from sapo.analysis.statistics import seed_difference
from sapo.analysis.style import METHOD_COLORS
from sapo.credit.objectives import Objective
from sapo.errors import InputError

SCRIPTS = Path(__file__).resolve().parent.parent / "paper_figures"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Scripts import each other by name, as when one is started from the shell."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    assert sys.path[0] == str(SCRIPTS)


WORLDS = {  # dataset, preset: value of each method with seeds 0, 1 and 2, in NDCG@10 and in Recall@1
    ("reasoning", "quick"): {"sapo": 0.4, "grpo": 0.2, "stage2": 0.1, "stage2_no_thinking": 0.02},
    ("reasoning_sparse", "study-350"): {"sapo": 0.3, "grpo": 0.1, "stage2": 0.01},
    ("reasoning", "study-200"): {"sapo": 0.2, "grpo": 0.21, "stage2": 0.05},
    ("synthetic", "quick"): {"sapo": 0.3, "grpo": 0.3, "stage2": 0.3, "stage2_no_thinking": 0.5},
}


@pytest.fixture
def record(tmp_path):
    """Policies of four worlds: seed s is better by s / 100 in every method, so that paired differences are exact."""
    from pages import Record

    rows = [
        {"dataset": dataset, "preset": preset, "method": method, "seed": seed, "metric": metric, "value": value}
        for (dataset, preset), methods in WORLDS.items()
        for method, level in methods.items()
        for seed in range(3)
        for metric, value in (("ndcg@10", level + seed / 128), ("recall@1", level / 2), ("updates", 300.0))
    ]
    rows += [
        rows[0]
        | {"preset": preset, "method": "stage2", "seed": seed, "metric": "rollouts/exact", "value": 0.01 * level}
        for preset, level in (("quick", 1), ("study-200", 2))
        for seed in range(3)
    ]
    rows.append(rows[0] | {"method": "optimum", "metric": "ndcg@10", "value": 0.7, "source": "exact"})
    table = pd.DataFrame(rows).assign(split="leave_one_out", n=100, run="r")
    write_results(table.assign(source=table["source"].fillna("measured")), tmp_path / "results.csv")
    world = {"dataset": "reasoning", "split": "leave_one_out", "preset": "quick"}
    match = [
        {**world, "seed": 0, "prompt": prompt, "rollout": rollout, "level": level, "match": int(hit)}
        for prompt in range(2)
        for rollout in range(2)
        for level, hit in ((1, prompt == rollout == 0), (2, True))
    ]
    pd.DataFrame(match).to_csv(tmp_path / "rollouts.csv.gz", index=False)
    elsewhere = {"dataset": "shop", "split": "published_test", "preset": "quick", "method": "sapo", "seed": 0}
    add_ranks([(pd.DataFrame({"user": ["ann"], "rank": [1]}), elsewhere)], tmp_path)
    curves = [
        {**world, "method": "sapo", "seed": 0, "step": step, "metric": "rewards/exact/mean", "value": step / 10}
        for step in (1, 5)
    ]
    pd.DataFrame(curves).to_csv(tmp_path / "dynamics.csv.gz", index=False)
    return Record(tmp_path)


def test_worlds_of_reasoning_are_picked_up_and_ordered_by_their_start(record):
    """Starts name the right item in .005, .025 and .05 of the rows; SAPO - GRPO is +.2, -.01 and +.2 in every seed."""
    import page_reasoning_world

    (page,) = page_reasoning_world.main(record)
    starts = [line for line in page.text.splitlines() if line.startswith("| reasoning")]
    assert [line.split("|")[2].strip() for line in starts] == ["0.005 ± 0.000", "0.025 ± 0.000", "0.050 ± 0.000"]
    assert [line.split("|")[-3].strip() for line in starts] == [
        "+0.200 [+0.200, +0.200]",
        "-0.010 [-0.010, -0.010]",
        "+0.200 [+0.200, +0.200]",
    ]
    assert "SAPO - GRPO in NDCG@10: +0.200 [+0.200, +0.200] over 3 seeds: SAPO is ahead." in page.answer
    assert "Bayes optimum | 0.700" in page.text
    # of two prompts with two rollouts each, level 1 tells one apart and level 2 none
    assert "50% in exact match; 50% of step 1, 100% of step 2" in page.text
    assert "| SAPO | 0.100 (update 1) | 0.500 (update 5) | 1 |" in page.text
    assert set(page.figures) == {
        f"{name}-reasoning-leave_one_out-quick"
        for name in ("fig_training_dynamics", "fig_objectives", "fig_advantage_distributions")
    } | {"fig_sparsity"}
    assert page_reasoning_world.main(record) == [page]


def test_the_front_page_takes_one_world_of_each_kind(record):
    import make_pages

    header, _, *lines = make_pages.results_table(record).splitlines()
    assert header == "| NDCG@10, by item | reasoning world | control world |"
    # levels plus the mean of 0, 1/128 and 2/128; a half width of 4.303 / 128 / sqrt 3
    assert "| SAPO | 0.408 ± 0.019 | 0.308 ± 0.019 |" in lines
    assert "| Bayes optimum | 0.700 |  |" in lines
    assert len(lines) <= 8
    said = make_pages.finding(record)
    assert said.startswith("On the reasoning world thinking pays: NDCG@10 is 0.108 with a thought, 0.028 without.")
    assert "SAPO and GRPO are the same on the control world." in said
    assert "Not thinking ranks better than thinking first on the control world" in said


def test_a_record_without_the_world_says_so(record):
    import page_reasoning_world

    rows = pd.read_csv(record.folder / "results.csv")
    rows[rows["dataset"] == "synthetic"].to_csv(record.folder / "results.csv", index=False)
    (page,) = page_reasoning_world.main(type(record)(record.folder))
    assert page.answer == "Not in the record yet."
    assert not page.figures


def test_policies_count_by_item_and_others_as_they_are():
    """A policy names SIDs, so that its own numbers are by SID and those of "item/..." by item; co-occurrence names
    items and has no number by SID."""
    from pages import by_seed

    rows = [
        ("sapo", "ndcg@10", 0.4),
        ("sapo", "item/ndcg@10", 0.3),
        ("cooccurrence", "ndcg@10", 0.2),
        ("grpo", "ndcg@10", 0.5),
    ]
    table = pd.DataFrame(rows, columns=["method", "metric", "value"]).assign(seed=0, dataset="office")
    assert by_seed(table, "ndcg@10").loc[0].to_dict() == {"sapo": 0.3, "cooccurrence": 0.2}
    assert by_seed(table, "ndcg@10", "SID").loc[0].to_dict() == {"sapo": 0.4, "grpo": 0.5}
    ours = by_seed(table.assign(dataset="synthetic"), "ndcg@10").loc[0]  # an item a SID
    assert ours.to_dict() == {"sapo": 0.3, "cooccurrence": 0.2, "grpo": 0.5}


def test_a_pair_is_compared_on_the_seeds_it_shares(record):
    from pages import Scores, World

    values = pd.DataFrame({"a": [0.3, 0.5, None], "b": [0.1, 0.1, 0.9], "c": [None, None, 0.2]})
    scores = Scores(values, World("office", "published_test", "quick"), "item/ndcg@10", record.ranks)
    assert scores.gain("a", "b") == seed_difference(np.array([0.3, 0.5]) - 0.1)
    assert scores.gain("a", "c") is None
    assert scores.gain("a", "d") is None
    assert list(scores.gains([("a", "b"), ("a", "c"), ("b", "c")])) == [("a", "b"), ("b", "c")]
    assert scores.gain("b", "c").seeds == 1


STUDY = {  # dataset, preset: of each method the chance of the first rank, with seeds 0, 1 and 2
    ("reasoning", "study"): {
        "stage2": 0.2,
        "stage2_no_thinking": 0.02,
        "sapo": 0.5,
        **dict.fromkeys(["grpo", "grpo_step_reward", "sapo_outcome_reward", "dapo", "rloo"], 0.3),
    },
    ("reasoning", "study-start0.02"): {"stage2": 0.05, "sapo": 0.3, "grpo": 0.1},
    ("reasoning-coupled", "study"): {"stage2": 0.2, "sapo": 0.3, "grpo": 0.3},
}
USERS = 300


@pytest.fixture
def study(tmp_path):
    """What `sapo study` leaves in a record, of three axes at the base point and two others; ranks of all but RLOO."""
    from pages import Record

    rows, tables, looks = [], [], []
    for (dataset, preset), methods in STUDY.items():
        world = {"dataset": dataset, "split": "leave_one_out", "preset": preset}
        for method, chance in methods.items():
            for seed in range(3):
                run = {**world, "method": method, "seed": seed}
                hit = np.random.default_rng((seed, round(1000 * chance))).random(USERS) < chance
                users = pd.DataFrame({"user": range(USERS), "rank": hit.astype(int)})
                tables += [(users, run)] if method != "rloo" else []
                metrics = {"ndcg@10": hit.mean(), "recall@1": hit.mean()}
                if method == "stage2":
                    metrics |= {"rollouts/exact": chance / 4, "rollouts/match_level_1": 0.5}
                elif method != "stage2_no_thinking":
                    metrics |= {"learning_rate": 1e-4, "updates": 400}
                    for rate, step in ((1e-4, 0), (1e-4, 20), (1e-3, 0), (1e-3, 20)):
                        # at the lower rate everything gains, at the higher one it falls
                        value = 0.1 if not step else 0.15 if rate < 1e-3 else 0.05
                        place = {"learning_rate": rate, "step": step, "metric": "valid/ndcg@10", "value": value}
                        looks.append({**run, **place})
                rows += [{**run, "metric": metric, "value": value} for metric, value in metrics.items()]
    exact = {**rows[0], "method": "optimum", "metric": "ndcg@10", "value": 0.7, "source": "exact"}
    table = pd.DataFrame([*rows, exact]).assign(n=USERS, run="r")
    write_results(table.assign(source=table["source"].fillna("measured")), tmp_path / "results.csv")
    add_ranks(tables, tmp_path)
    pd.DataFrame(looks).to_csv(tmp_path / "looks.csv.gz", index=False)
    of_start = {"dataset": "reasoning", "split": "leave_one_out", "preset": "study", "seed": 0, "prompt": 0}
    match = [{**of_start, "rollout": rollout, "level": 1, "match": rollout} for rollout in range(2)]
    pd.DataFrame(match).to_csv(tmp_path / "rollouts.csv.gz", index=False)
    curve = {**of_start, "method": "sapo", "step": 1, "metric": "rewards/exact/mean", "value": 0.1}
    pd.DataFrame([curve]).to_csv(tmp_path / "dynamics.csv.gz", index=False)
    return Record(tmp_path)


def test_pairs_are_compared_over_users_and_seeds_where_both_have_ranks(study):
    ((_, rows),) = [(world, rows) for world, rows in study.worlds("reasoning") if world.axes[:1] == ("base",)]
    scores, ranks = study.scores(rows, "ndcg@10"), Ranks(study.folder)
    keys = [("reasoning", "leave_one_out", "study", method) for method in ("sapo", "grpo")]
    assert scores.gain("sapo", "grpo") == ranks.gain(*keys, "ndcg@10")
    assert scores.gain("sapo", "grpo").value == pytest.approx((scores.values["sapo"] - scores.values["grpo"]).mean())
    without = scores.gain("rloo", "grpo")
    assert without == seed_difference((scores.values["rloo"] - scores.values["grpo"]).to_numpy())
    assert (without.users, without.seeds) == (0, 3)
    one_seed = study.scores(rows[(rows["seed"] == 0) | (rows["method"] == "grpo")], "ndcg@10")
    assert np.isnan(one_seed.gain("sapo", "grpo").low)  # users alone do not tell what another run would change


def test_the_study_is_shown_axis_by_axis_as_far_as_it_is_recorded(study):
    import page_reasoning_world

    from sapo.experiments.study import AXES

    (page,) = page_reasoning_world.main(study)
    headings = [line.removeprefix("## ") for line in page.text.splitlines() if line.startswith("## ")]
    recorded = ("base", "components", "sparsity", "coupling", "objectives")
    assert headings == [*(AXES[axis].question for axis in AXES if axis in recorded), "Make it again"]
    lines = [line for line in page.text.splitlines() if line.startswith("sapo ")]
    record = "--out my/results --record paper_figures/data"
    assert lines == [f"sapo study {axis} {record}" for axis in AXES if axis in recorded]
    # of one group of two completions, one is right: no group without variance
    assert "| zero-variance groups of 2, exact match | 0% |" in page.text
    assert "| exact match, sampled completions | 0.050 ± 0.000 |" in page.text
    # three seeds at two rates: all end below the start at the higher one, 3 of 6 cells, whose Wilson interval is
    # 1/2 -+ 1.96 sqrt(1/24 + 3.84 / 144) / (1 + 3.84 / 6) = .188, .812; at the lower one they gain .05 and never fall
    assert (
        "| 0.50 [0.19, 0.81] | 6 | 0.0001 | 0.050 ± 0.000 | 0.000 ± 0.000 | 0.000 ± 0.000 | 0.000 [0.000, 0.000] |"
        in page.text
    )
    assert page_reasoning_world.main(study) == [page]


def test_gradients_at_the_start_are_shown_where_they_were_measured(study):
    """Worths of 4, 9 and 16 times GRPO's: exp of the mean log 2.1187 -+ 4.303 x 0.6965 / sqrt 3 (log 4, 9, 16)."""
    import page_reasoning_world
    from pages import Record, World

    world = World("reasoning", "leave_one_out", "study")
    assert page_reasoning_world.gradients_table(study, world) == []
    place = {"dataset": "reasoning", "split": "leave_one_out", "preset": "study", "goal": "exact"}
    rows = [
        place
        | {
            "seed": seed,
            "objective": name,
            "batches": 64,
            "signal": 0.5,
            "cosine": 0.9,
            "worth": worth,
            "adam_worth": 1.0,
        }
        for name, worths in {"grpo": (1, 1, 1), "sapo": (4, 9, 16)}.items()
        for seed, worth in enumerate(worths)
    ]
    pd.DataFrame(rows).assign(adam_worth=1.0).to_csv(study.folder / "gradients.csv", index=False)
    (page,) = page_reasoning_world.main(Record(study.folder))
    shown = "| SAPO | 0.50 ± 0.00 | 0.90 ± 0.00 | 8.32 [1.47, 46.9] | 1.00 [1.00, 1.00] |"
    assert shown in page.text
    assert "sapo study base --gradients 64 --out my/results" in page.text


def test_figures_of_the_study_are_those_that_their_scripts_draw(study, tmp_path_factory):
    import fig_components
    import fig_sparsity
    import fig_stability
    import page_reasoning_world

    (page,) = page_reasoning_world.main(study)
    out = tmp_path_factory.mktemp("out")
    for script, name in (
        (fig_components, "looks.csv.gz"),
        (fig_stability, "looks.csv.gz"),
        (fig_sparsity, "results.csv"),
    ):
        drawn = {artefact.name for artefact in script.main(out, study.folder / name)}
        wanted = {name for name in page.figures if name.startswith(script.NAME)}
        assert wanted
        assert wanted <= drawn


def test_the_front_page_says_of_the_study_what_was_found(study):
    """The verdicts are those of Holm's correction over the four pairs of its base point."""
    import make_pages

    ((world, rows),) = make_pages.headline(study)
    assert (world.dataset, world.preset) == ("reasoning", "study")
    means = rows[rows["metric"] == "ndcg@10"].groupby("method")["value"].mean()
    said = make_pages.finding(study)
    assert f"On the reasoning world thinking pays: NDCG@10 is {means['stage2']:.3f} with a thought" in said
    assert f"SAPO gains over its start ({means['stage2']:.3f} → {means['sapo']:.3f})" in said
    assert "Step credit is ahead of outcome credit." in said
    words = make_pages.where_thinking_pays("X", study.scores(rows, "ndcg@10"), {("sapo", "grpo"): "behind"})
    assert words == "Outcome credit is ahead of step credit."


def test_commands_name_data_and_iterations():
    from pages import World

    twice = World("synthetic", "leave_one_out", "quick-2iterations")
    assert twice.command == "sapo run --preset quick --data synthetic --iterations 2 --out my/results"
    axis = World("reasoning", "leave_one_out", "study-start0.02")
    assert axis.command == "sapo study sparsity --out my/results --record paper_figures/data"
    assert World("reasoning", "leave_one_out", "study").axes == ("base", "components", "objectives")
    assert World("reasoning", "leave_one_out", "study").command.startswith("sapo study base ")
    ours = World("reasoning", "leave_one_out", "study-350")
    assert ours.command == "sapo run --preset study-350 --out my/results"
    real = World("office", "published_test", "quick")
    assert real.command == "sapo run --preset quick --data data/office --split published_test --out my/results"


def test_blocks_are_filled_once():
    from pages import fill

    text = "a\n<!-- generated: x -->old\\1<!-- /generated -->\nb <!-- generated: y --><!-- /generated -->"
    filled = fill(text, "x", r"\1 | new")
    assert filled.startswith("a\n<!-- generated: x -->\n\n\\1 | new\n\n<!-- /generated -->\nb")
    assert fill(filled, "x", r"\1 | new") == filled
    assert filled.endswith("b <!-- generated: y --><!-- /generated -->")
    with pytest.raises(InputError, match="needs one block <!-- generated: z -->"):
        fill(text, "z", "")


def test_cells_cannot_break_a_table():
    from pages import markdown_table

    table = markdown_table(pd.DataFrame({"a": ["x|y", None], "b": [1, 2]}))
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y | 1 |", "|  | 2 |"]


def test_reported_numbers_are_compared_one_by_one():
    """.12 of a reported .15 is 20 % behind; .15 of .1 is reached. ReaRec stands for both of its kinds."""
    from page_other_recommenders import against_reported, here

    means = pd.DataFrame({"recall@10": [0.12, 0.15], "ndcg@10": [0.1, 0.1]}, index=["TIGER", "ReaRec ERL"])
    theirs = pd.DataFrame(
        {"system": ["TIGER", "ReaRec"], "source": ["P", "Q"], "recall@10": [0.15, 0.1], "ndcg@10": [0.1, 0.1]}
    )
    hits, quality = against_reported(means, theirs)
    assert hits == "HR@10, against 2 reported numbers: 1 reached; more than 5 % behind: TIGER (P) -20%."
    assert quality == "NDCG@10, against 2 reported numbers: 2 reached."
    assert here("ReaRec") == ("ReaRec ERL", "ReaRec PRL")
    assert here("BIGRec") == ()


def test_what_the_code_says_of_itself_needs_no_line_here(monkeypatch):
    """An objective without a test of its name has an empty cell; a recommender must say what is particular to it."""
    import reference

    monkeypatch.setitem(reference.OBJECTIVES, "other", Objective("gated", "step"))
    assert "| `other` | match under a right prefix | step | group std |" in reference.objectives()
    monkeypatch.setitem(reference.BASELINES, "other", reference.BASELINES["SASRec"])
    with pytest.raises(InputError, match="no line for other"):
        reference.recommenders()


def test_a_picture_is_made_small_alike(tmp_path):
    from make_pages import WIDTH, _small
    from PIL import Image

    sizes = []
    for name in ("a.png", "b.png"):
        Image.radial_gradient("L").resize((2 * WIDTH, WIDTH)).convert("RGB").save(tmp_path / name)
        before = (tmp_path / name).stat().st_size
        sizes.append(_small(tmp_path / name))
        assert len(sizes[-1]) < before
    assert sizes[0] == sizes[1]
    assert Image.open(tmp_path / "a.png").size == (WIDTH, WIDTH // 2)


def test_a_small_picture_keeps_the_colours_of_small_dots(tmp_path):
    """A palette by how often a colour occurs would give the few dots of a method its neighbour's colour."""
    from make_pages import WIDTH, _small
    from PIL import Image, ImageColor, ImageDraw

    picture, names = Image.new("RGB", (2 * WIDTH, WIDTH), "white"), [*METHOD_COLORS.values()]
    picture.paste(Image.linear_gradient("L").resize((2 * WIDTH, 400)).convert("RGB"))  # as many greys as there can be
    places = [(100 * (number % 25) + 20, 100 * (number // 25) + 500) for number in range(len(names))]
    for (x, y), color in zip(places, names, strict=True):
        ImageDraw.Draw(picture).ellipse((x, y, x + 30, y + 30), fill=color)
    picture.save(tmp_path / "a.png")
    _small(tmp_path / "a.png")
    small = Image.open(tmp_path / "a.png").convert("RGB")
    for (x, y), color in zip(places, names, strict=True):
        seen, given = small.getpixel((x // 2 + 7, y // 2 + 7)), ImageColor.getrgb(color)
        assert max(abs(a - b) for a, b in zip(seen, given, strict=True)) <= 8, color


def test_a_figure_that_no_script_makes_is_an_error():
    from make_pages import draw

    with pytest.raises(InputError, match=r"makes no fig_credit_units-nowhere\.png"):
        draw(["fig_credit_units-nowhere"])

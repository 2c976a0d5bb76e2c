"""The results pages on made-up records: which worlds they pick up, how they order them, and what they refuse."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from sapo.analysis.results import write_results
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
    } | set(page_reasoning_world.SPARSITY)
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
    assert said.startswith("SAPO ranks better than GRPO on the reasoning world; SAPO and GRPO are the same on the")
    assert "Thinking first ranks better than not thinking on the reasoning world" in said


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


def test_a_pair_is_compared_on_the_seeds_it_shares():
    from pages import gain

    values = pd.DataFrame({"a": [0.3, 0.5, None], "b": [0.1, 0.1, 0.9], "c": [None, None, 0.2]})
    interval, over = gain(values, "a", "b")
    assert (interval.value, over) == (pytest.approx(0.3), "2 seeds")
    assert gain(values, "a", "c") is None
    assert gain(values, "a", "d") is None


def test_commands_name_data_and_iterations():
    from pages import World

    twice = World("synthetic", "leave_one_out", "quick-2iterations")
    assert twice.command == "sapo run --preset quick --data synthetic --iterations 2 --out my/results"
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


def test_a_name_without_its_line_is_refused(monkeypatch):
    import reference

    from sapo.credit.objectives import OBJECTIVES

    monkeypatch.setitem(reference.OBJECTIVES, "other", OBJECTIVES["sapo"])
    with pytest.raises(InputError, match="no line for other"):
        reference.objectives()


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


def test_a_figure_that_no_script_makes_is_an_error():
    from make_pages import draw

    with pytest.raises(InputError, match=r"makes no fig_credit_units-nowhere\.png"):
        draw(["fig_credit_units-nowhere"])

"""The study of the reasoning world: its recipes differ in one thing each, and it says what is left."""

from dataclasses import asdict, replace

import pytest

from sapo.credit.objectives import OBJECTIVES
from sapo.errors import InputError
from sapo.experiments import study
from sapo.experiments.folders import supervised_folder
from sapo.experiments.run_folder import Job
from sapo.experiments.starts import start_remark

SHARED = {"objectives", "ablations", "seeds", "grid_seeds", "ablation_seeds", "preset"}  # who is compared, not where


@pytest.mark.parametrize("name", study.AXES)
def test_an_axis_differs_from_the_base_point_in_one_thing(name):
    base, rates = asdict(study.BASE), set(study.RATES)
    for recipe in study.AXES[name].recipes:
        other = asdict(recipe)
        if rates < set(other["stage3"]["learning_rates"]):  # a wider grid holds the same runs
            other["stage3"]["learning_rates"] = study.RATES
        changed = {field for field in base if other[field] != base[field]} - SHARED
        assert len(changed) <= 1, changed
        if changed & {"stage2", "stage3"}:
            assert recipe.preset != study.BASE.preset  # rows of another start or optimizer are filed apart
        assert set(recipe.objectives + recipe.ablations) <= set(OBJECTIVES)
        assert len(recipe.seeds) >= 3


def test_what_an_axis_compares_is_of_the_base_point_or_trained_beside_it():
    """Rows of one key come from one recipe: methods do not repeat within a world and preset."""
    seen: dict[tuple[str, str], list[str]] = {}
    for axis in study.AXES.values():
        for recipe in axis.recipes:
            seen.setdefault((recipe.world.name, recipe.preset), []).extend(recipe.objectives + recipe.ablations)
    for key, methods in seen.items():
        assert len(methods) == len(set(methods)), key
        assert {"sapo", "grpo"} <= set(methods), key


def test_axes_of_one_start_share_its_stages():
    base, components = (study.AXES[name].recipes[0] for name in ("base", "components"))
    folders = [supervised_folder(Job(recipe, "out"), 0, "stage2").identity for recipe in (base, components)]
    assert folders[0] == folders[1]
    other = replace(study.AXES["sparsity"].recipes[0])
    assert supervised_folder(Job(other, "out"), 0, "stage2").identity != folders[0]
    stage1 = [supervised_folder(Job(recipe, "out"), 0, "stage1").identity for recipe in (base, other)]
    assert stage1[0] == stage1[1]


def test_recipes_are_run_one_after_the_other_and_published(monkeypatch, tmp_path):
    done, published = [], []
    monkeypatch.setattr(study, "run", lambda job, workers, tell: done.append((job.recipe, workers)))
    monkeypatch.setattr(study, "publish", lambda out, record: published.append((out, record)))
    study.run_study(["sparsity", "base"], str(tmp_path), 3, tmp_path / "record")
    assert done == [(recipe, 3) for name in ("sparsity", "base") for recipe in study.AXES[name].recipes]
    assert published == [(str(tmp_path), tmp_path / "record")] * 4
    with pytest.raises(InputError, match=r"no axis 'spareness'; there are base, components"):
        study.run_study(["spareness"], str(tmp_path))


def test_the_countdown_says_how_long_what_is_left_takes(monkeypatch, capsys):
    """Two tasks in 120 seconds, so eight more take 8 minutes; another list of tasks counts from its own start."""
    clock = iter([0.0, 0.0, 120.0, 200.0])
    monkeypatch.setattr(study.time, "monotonic", lambda: next(clock))
    tell = study.Countdown("base")
    tell(5, 15)
    tell(7, 15)
    tell(1, 4)
    assert capsys.readouterr().out.splitlines() == [
        "base: 5 of 15 tasks are done, ? minutes left",
        "base: 7 of 15 tasks are done, 8 minutes left",
        "base: 1 of 4 tasks are done, ? minutes left",
    ]


def test_starts_that_can_tell_nothing_are_said():
    optimum = {"exact_match_greedy": 0.6}
    assert start_remark(0.3, optimum, 500) is None
    assert "nothing is left to learn" in start_remark(0.58, optimum, 500)
    assert "it is at chance" in start_remark(0.004, optimum, 500)  # 3 of 500 are .006
    assert start_remark(0.0061, optimum, 500) is None

"""What decides a result changes its identity, and what only people read does not."""

import json
from dataclasses import dataclass, replace

import pandas as pd
import pytest

from sapo.analysis.results import write_results
from sapo.credit.objectives import OBJECTIVES, Objective
from sapo.errors import InputError
from sapo.experiments import folders, run_folder
from sapo.experiments.identity import code_digest, objective_identity, weights_digest
from sapo.experiments.recipes import QUICK
from sapo.experiments.run_folder import Job
from sapo.experiments.runner import check_data, check_out, check_parents

CODE = '''
"""A module."""
import math

LIMIT = 3
"""Most."""


def area(side: int) -> int:
    """Of a square."""
    # twice
    return side * side


class Box:
    """Holds."""

    width: int = 1
    """Of it."""
'''


@pytest.mark.parametrize(
    "text",
    [
        '"""Another text."""\nfrom os import path\n' + CODE.split("import math")[1],
        CODE.replace("Of a square.", "Of a square, side by side.").replace("# twice", "# once"),
        CODE.replace('    """Of a square."""\n', ""),
        CODE.replace("side: int", "side :  int"),
        CODE.replace('    """Of it."""\n', ""),
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import os\n" + CODE,
    ],
    ids=["imports", "words", "no docstring", "spaces", "field", "types"],
)
def test_what_is_only_read_changes_nothing(text):
    assert code_digest([text]) == code_digest([CODE])


@pytest.mark.parametrize(
    ("old", "new"),
    [("side * side", "side + side"), ("LIMIT = 3", "LIMIT = 4"), ("width: int = 1", "width: int = 2"), ("Box", "Bag")],
)
def test_what_is_run_does(old, new):
    assert code_digest([CODE.replace(old, new)]) != code_digest([CODE])


def test_definitions_may_move_to_another_module():
    start = CODE.index("class Box")
    halves = [f'"""Another module."""\n{CODE[start:]}', CODE[:start]]
    assert code_digest(halves) == code_digest([CODE])
    assert code_digest([CODE.replace('"""A module."""', "")]) == code_digest([CODE])


def test_a_function_of_a_docstring_alone_still_is_one():
    assert code_digest(['def f():\n    """Nothing."""\n']) == code_digest(["def f():\n    pass\n"])


def test_the_code_of_the_package_has_an_identity():
    assert run_folder.code_version.__wrapped__() == run_folder.code_version()


def test_an_objective_is_its_fields_and_its_class(monkeypatch):
    @dataclass(frozen=True)
    class Doubled(Objective):
        def advantages(self, *given, **named):
            return 2 * super().advantages(*given, **named)

    job, identities = Job(QUICK, "out"), {}
    sapo = OBJECTIVES["sapo"]
    kinds = {
        "as it is": sapo,
        "another source": replace(sapo, source="elsewhere"),
        "another clip": replace(sapo, epsilon=0.1),
        "a subclass": Doubled(**vars(sapo)),
    }
    for name, objective in kinds.items():
        monkeypatch.setitem(OBJECTIVES, "sapo", objective)
        identities[name] = folders.stage3_folder(job, 0, "sapo", 1e-3).identity
    assert identities["as it is"] == identities["another source"]
    assert len(set(identities.values())) == 3
    assert "class" not in " ".join(objective_identity("grpo"))


def test_weights_are_told_by_their_bytes(tmp_path):
    assert weights_digest(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"a")
    first = weights_digest(tmp_path)
    (tmp_path / "README.md").write_text("of it")
    assert weights_digest(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"b")
    assert weights_digest(tmp_path) != first


def test_runs_that_went_on_from_another_start_are_refused():
    place = {"dataset": "d", "split": "leave_one_out", "preset": "p", "seed": 0}
    table = pd.DataFrame(
        [
            {**place, "run": "stage2-a", "method": "stage2", "weights": "x", "parent": "stage 1, which has no row"},
            {**place, "run": "sapo-a", "method": "sapo", "weights": "y", "parent": "x"},
            {**place, "run": "grpo-a", "method": "grpo", "weights": None, "parent": None},  # of before they were told
            {**place, "run": "rloo-a", "method": "rloo", "weights": "z", "parent": "w", "seed": 1},  # nothing beside it
        ]
    )
    check_parents(table)
    table.loc[1, "parent"] = "w"
    with pytest.raises(InputError, match="sapo-a went on from other weights than stage2-a has"):
        check_parents(table)


def test_one_name_is_one_set_of_files(tmp_path):
    place = {"dataset": "office", "split": "leave_one_out"}
    table = pd.DataFrame(
        [
            {**place, "run": "a", "data": "1"},
            {**place, "run": "b", "data": "1"},
            {**place, "run": "c", "data": None},  # of before it was told
            {**place, "split": "published_test", "run": "d", "data": "2"},
        ]
    )
    check_data(table, "out")
    table.loc[1, "data"] = "2"
    with pytest.raises(
        InputError, match=r"out: a and b saw different files under the one name 'office' \(leave_one_out\)"
    ):
        check_data(table, "out")


def test_a_job_refuses_results_of_other_files_of_the_same_name(tmp_path):
    """Whose rows would be paired with its own, user by user."""
    job = Job(QUICK, str(tmp_path))
    check_out(job)
    folder = folders.references_folder(job)
    folder.start()
    folder.finish(1.0, 0, {}, {})
    rows = folder.results("measured", {"ndcg@10": 0.1}, 3)
    write_results(rows, tmp_path / "results.csv")
    check_out(job)
    (path := folder.path / "run.json").write_text(json.dumps(folder.manifest | {"data": "of other files"}))
    with pytest.raises(InputError, match=r"this run and .* saw different files"):
        check_out(job)
    path.write_text(json.dumps({name: value for name, value in folder.manifest.items() if name != "data"}))
    check_out(job)  # a run of before data were told

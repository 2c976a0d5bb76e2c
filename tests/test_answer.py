"""Asking a policy in words: what it is asked after, what comes back, and how mistakes are told."""

import io
import json
import sys

import pytest
import torch
from test_policy import CATALOG, TITLES, make_policy

from sapo import cli
from sapo.data.catalog import Catalog
from sapo.errors import InputError
from sapo.policy.answer import ask
from sapo.policy.policy import recommend

SHOP = Catalog("shop", CATALOG.sids, TITLES, asins=["B0", "B1", "B2", "B3", "B4", "42"])


def test_items_are_found_by_number_product_id_and_title():
    assert SHOP.find(3) == SHOP.find("3") == SHOP.find("b3") == SHOP.find(" Steel Kitchen Knife ") == 3
    assert SHOP.find("42") == 5  # a product id before a number
    for name, message in {
        6: "there is no item 6; the items of 'shop' are 0..5",
        "-1": "no item of 'shop' is called '-1'; nothing comes close",
        "steel knife": "is called 'steel knife'; 'steel kitchen knife' comes close",
    }.items():
        with pytest.raises(InputError, match=message):
            SHOP.find(name)
    twins = Catalog("shop", CATALOG.sids, [*TITLES[:4], "mitt", "Mitt"])
    with pytest.raises(InputError, match=r"2 items are called 'mitt': ask by number, one of \[4, 5\]"):
        twins.find("mitt")
    untitled = Catalog("shop", CATALOG.sids, [""] * 6)
    with pytest.raises(InputError, match="nothing comes close"):
        untitled.find("")


def test_an_answer_is_what_recommend_says_in_words():
    """All six items of five SIDs come back; the two that share (1, 1) stand together with one score."""
    policy = make_policy(catalog=SHOP)
    (answer,) = ask(policy, [["red garden hose", "B1"]])
    said = recommend(policy, [[0, 1]], 10, 10)
    assert answer.history == [0, 1]
    assert sorted(answer.items["item"]) == [0, 1, 2, 3, 4, 5]
    sids = list(dict.fromkeys(answer.items["sid"]))
    assert sids == [tuple(sid) for sid in said.sids[0, :5].tolist()]
    scores = answer.items.drop_duplicates("sid")["score"]
    assert scores.tolist() == pytest.approx(said.scores[0, :5].tolist())
    assert scores.map(lambda score: torch.tensor(score).exp().item()).sum() == pytest.approx(1, abs=1e-4)
    shared = answer.items[answer.items["sid"] == (1, 1)]
    assert shared["item"].tolist() == [4, 5]
    assert shared["score"].nunique() == 1
    assert (
        "".join(f"<think> {block} </think>" for block in answer.thinking).split()
        == said.thinking[0].replace("</think> <think>", "</think><think>").split()
    )
    lines = str(answer).splitlines()
    assert [line.split()[0] for line in lines] == ["thinks", "thinks", *map(str, range(1, 7))]
    assert json.loads(json.dumps(answer.as_dict()))["items"][0]["sid"] == list(sids[0])


def test_new_items_are_those_that_the_history_lacks():
    policy = make_policy(catalog=SHOP)
    every, new = (ask(policy, [[0, 1]], k=3, new=only)[0].items["item"].tolist() for only in (False, True))
    everything = ask(policy, [[0, 1]], k=6)[0].items["item"].tolist()
    assert every == everything[:3]
    assert new == [item for item in everything if item not in (0, 1)][:3]


@pytest.mark.parametrize(
    ("history", "k", "message"),
    [
        ([], 3, "a history is empty"),
        ([0], 0, "k is 0; 1 to 200 items"),
        ([0], 201, "k is 201"),
        (["x"], 3, "no item of"),
    ],
)
def test_bad_questions_say_so(history, k, message):
    with pytest.raises(InputError, match=message):
        ask(make_policy(catalog=SHOP), [history], k)


@pytest.fixture
def sapo(tmp_path, monkeypatch, capsys):
    """`sapo recommend` of a policy on disk, with lines on its standard input."""
    SHOP.save(tmp_path / "shop")
    policy = make_policy(catalog=Catalog.load(tmp_path / "shop"))
    policy.save(tmp_path / "policy")

    def run(*arguments, lines=""):
        command = ["sapo", "recommend", "--model", tmp_path / "policy", "--data", tmp_path / "shop", *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        cli.main()
        return capsys.readouterr().out

    return run


def test_the_command_answers_in_text(sapo):
    lines = sapo("--history", "red garden hose", 3, "--k", 2).splitlines()
    assert len(lines) == 4  # two blocks, two items
    assert any(title in lines[2] for title in TITLES)


def test_the_command_answers_line_by_line_and_outlives_mistakes(sapo):
    lines = sapo("--json", "--k", 1, lines='[0, "B1"]\n["spoon"]\n{"history": 1}\n[true]\nnot\n[3]\n').splitlines()
    first, *wrong, last = map(json.loads, lines)
    assert (first["history"], last["history"]) == ([0, 1], [3])
    assert len(first["items"]) == 1
    assert [answer["line"] for answer in wrong] == [2, 3, 4, 5]
    for answer, message in zip(wrong, ("no item", "a history is", "a history is", "not JSON"), strict=True):
        assert message in answer["error"]


def test_the_command_says_what_is_wrong_with_a_history(sapo):
    with pytest.raises(SystemExit, match="no item of 'shop' is called 'spoon'"):
        sapo("--history", "spoon")

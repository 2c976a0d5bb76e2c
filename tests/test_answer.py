"""Asking a policy in words: what it is asked after, what comes back, and how mistakes are told."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_policy import CATALOG, TITLES, make_policy

from sapo import cli
from sapo.data.catalog import Catalog
from sapo.errors import InputError
from sapo.policy.ask import ItemNames, answer_lines, ask
from sapo.policy.policy import recommend

SHOP = Catalog("shop", CATALOG.sids, TITLES, asins=["B0", "B1", "B2", "B3", "B4", "42"])
# 64 items, one for each SID: more than ten beams reach
MANY = Catalog("many", torch.cartesian_prod(*[torch.arange(4)] * 3), [f"garden hose number {n}" for n in range(64)])


def test_items_are_found_by_number_product_id_and_title():
    find = ItemNames(SHOP).find
    assert find(3) == find(np.int64(3)) == find("3") == find("#3") == find(" b3 ") == find("Steel Kitchen KNIFE") == 3
    assert find("42") == 5  # a product id before a number
    ids = ItemNames(Catalog("shop", CATALOG.sids, [""] * 6, asins=["aB", "Ab", " c", "3", "", ""])).find
    assert [ids("aB"), ids("Ab"), ids("c"), ids("3"), ids("#3")] == [0, 1, 2, 3, 3]
    with pytest.raises(InputError, match="2 items are called 'ab': ask by number, #0, #1"):
        ids("ab")
    twins = ItemNames(Catalog("shop", CATALOG.sids, ["Mitt"] * 5 + [""]))
    with pytest.raises(InputError, match="5 items are called 'mitt': ask by number, #0, #1, #2 and 2 more"):
        twins.find("mitt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (6, "there is no item 6; the items of 'shop' are 0..5"),
        (-1, "there is no item -1"),
        ("6", "there is no item 6"),
        ("9" * 5000, "there is no item 999"),
        ("-1", r"called '-1'\.$"),
        ("", r"called ''\.$"),
        (True, "True names no item"),
        (None, "None names no item"),
        (
            "kitchen",
            "did you mean 'kitchen towel' or 'steel kitchen knife'?",
        ),  # titles that say it, as they are written
        ("ovn mit", "did you mean 'oven mitt'?"),
    ],
)
def test_what_is_no_item_is_told_with_what_comes_close(name, message):
    with pytest.raises(InputError, match=message):
        ItemNames(SHOP).find(name)


def test_an_answer_is_what_recommend_says_in_words():
    """All six items of five SIDs come back; the two that share (1, 1) stand together, by title, with one score."""
    policy = make_policy(catalog=SHOP)
    (answer,) = ask(policy, [["red garden hose", "B1"]])
    said = recommend(policy, [[0, 1]], 10, 10)
    assert answer.history["item"].tolist() == [0, 1]
    assert sorted(answer.items["item"]) == [0, 1, 2, 3, 4, 5]
    sids = list(dict.fromkeys(answer.items["sid"]))
    assert sids == [tuple(sid) for sid in said.sids[0, :5].tolist()]
    scores = answer.items.drop_duplicates("sid")["score"]
    assert scores.tolist() == pytest.approx(said.scores[0, :5].tolist())
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-4)
    shared = answer.items[answer.items["sid"] == (1, 1)]
    assert shared["title"].tolist() == ["kitchen towel", "oven mitt"]
    assert shared["score"].nunique() == 1
    blocks = "".join(f"<think>{block}</think>" for block in answer.thinking)
    assert blocks.replace(" ", "") == said.thinking[0].replace(" ", "")
    first, *lines = str(answer).splitlines()
    assert first == "after red garden hose; blue garden hose"
    assert [line.split()[0] for line in lines] == ["thinks", "thinks", *map(str, range(1, 7))]
    told = json.loads(json.dumps(answer.as_dict()))
    assert (told["history"], told["items"][0]["sid"]) == ([0, 1], list(sids[0]))


def test_histories_are_answered_one_by_one():
    """Of one call the same as of three, also where new items make searches of different widths."""
    policy = make_policy(catalog=MANY)
    histories = [[0, 1], [5], [*range(30)]]
    for new in (False, True):
        together = ask(policy, histories, k=12, new=new)
        for history, answer in zip(histories, together, strict=True):
            (alone,) = ask(policy, [history], k=12, new=new)
            assert alone.items["item"].tolist() == answer.items["item"].tolist()
            assert len(answer.items) == 12
            wide = recommend(policy, [history], 64, 64).sids[0]
            items = [MANY.items_of(sid)[0] for sid in wide]
            if len(history) == 30:  # more than ten beams are needed, and found
                assert answer.items["item"].tolist() == [i for i in items if not (new and i in history)][:12]


def test_new_items_come_however_many_the_history_takes():
    policy = make_policy(catalog=MANY)
    best = ask(policy, [[0]], k=64)[0].items["item"].tolist()
    assert len(best) == 64
    history = [*best[:50], 0]
    (answer,) = ask(policy, [history], k=10, new=True)
    assert len(answer.items) == 10
    assert not set(answer.items["item"]) & set(history)


def test_policies_that_think_otherwise_answer_too():
    policy = make_policy(catalog=MANY)
    silent, one_block = replace(policy, thinking=False), replace(policy, num_blocks=1)
    assert ask(silent, [[0]])[0].thinking == []
    assert len(ask(one_block, [[0]])[0].thinking) == 1
    contrast = replace(policy, contrast=0.5)
    few, more = (ask(contrast, [[0]], k=k)[0].items["item"].tolist() for k in (5, 20))
    assert few == more[:5]


@pytest.mark.parametrize(
    ("history", "k", "message"),
    [([], 3, "a history is empty"), ([0], 0, "k is 0; 1 to 200"), ([0], 201, "k is 201"), (["x"], 3, "no item of")],
)
def test_bad_questions_say_so(history, k, message):
    with pytest.raises(InputError, match=message):
        ask(make_policy(catalog=SHOP), [history], k)


def test_lines_are_answered_as_they_come_and_outlive_mistakes():
    policy = make_policy(catalog=SHOP)
    wrong = {
        b'["spoon"]\n': "no item of",
        b'{"history": 1}\n': "a history is",
        b"[true]\n": "a history is",
        b"not\n": "not JSON",
        b"[" * 200_000 + b"\n": "not JSON",
        b'["\xff"]\n': "not JSON",
        b"[]\n": "a history is empty",
    }
    asked = []
    answers = answer_lines(policy, (asked.append(line) or line for line in [b'[0, "B1"]\n', b" \n", *wrong]), k=1)
    number, first = next(answers)
    assert (number, first.history["item"].tolist(), len(first.items)) == (1, [0, 1], 1)
    assert len(asked) == 1  # nothing is read ahead
    for (number, said), (place, message) in zip(answers, enumerate(wrong.values(), start=3), strict=True):
        assert number == place
        assert message in str(said)
    with pytest.raises(InputError, match="k is 0"):
        next(answer_lines(policy, [b"[0]"], k=0))


@pytest.fixture
def folder(tmp_path):
    """A policy on disk with its data."""
    SHOP.save(tmp_path / "shop")
    make_policy(catalog=Catalog.load(tmp_path / "shop")).save(tmp_path / "policy")
    return tmp_path


@pytest.fixture
def sapo(folder, monkeypatch, capsys):
    """`sapo recommend`, with lines on its standard input."""

    def run(*arguments, lines=""):
        command = ["sapo", "recommend", "--model", folder / "policy", "--data", folder / "shop", *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        cli.main()
        return capsys.readouterr()

    return run


def test_the_command_answers_in_text(sapo):
    lines = sapo("--history", "red garden hose", 3, "--k", 2).out.splitlines()
    assert len(lines) == 5  # the history, two blocks, two items
    assert any(title in lines[3] for title in TITLES)
    new = sapo("--history", *range(5), "--new").out.splitlines()
    assert new[3:] == [line for line in new if "oven mitt" in line]  # the one that is left


def test_the_command_ends_with_1_where_a_line_was_wrong(sapo, capsys):
    with pytest.raises(SystemExit) as ended:
        sapo("--k", 1, lines='[0]\n["spoon"]\n')
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "after red garden hose" in said.out
    assert "line 2: no item of 'shop' is called 'spoon'" in said.err
    with pytest.raises(SystemExit) as ended:
        sapo("--json", lines="[0]\n")
    assert ended.value.code == 0


def test_the_command_says_what_is_wrong_with_a_history(sapo):
    with pytest.raises(SystemExit, match="no item of 'shop' is called 'spoon'"):
        sapo("--history", "spoon")


def test_a_program_gets_every_answer_before_it_asks_again(folder):
    """Through pipes, which hold back what is not flushed; mistakes too."""
    command = ["-m", "sapo.cli", "recommend", "--model", folder / "policy", "--data", folder / "shop", "--json"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=buffered, **pipes)
    for line, key in ((b"[0]\n", "items"), (b'["spoon"]\n', "error"), (b"[1]\n", "items")):
        process.stdin.write(line)
        process.stdin.flush()
        assert key in json.loads(process.stdout.readline())
    process.stdout.close()  # nobody reads any more
    process.stdin.write(b"[2]\n")
    process.stdin.close()
    assert process.wait(60) == 141

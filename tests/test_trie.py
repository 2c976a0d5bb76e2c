"""The trie against a dict of sets."""

import itertools
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import random_sids, trie_for

from sapo.errors import InputError
from sapo.semantic_ids.trie import SidTrie

HUGE = 2**62


def children_of(sids: list[list[int]]) -> dict[tuple[int, ...], set[int]]:
    children = defaultdict(set)
    for sid in sids:
        for depth, code in enumerate(sid):
            children[tuple(sid[:depth])].add(code)
    return children


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_against_a_dict_of_sets(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes)).map(list)
    sids = data.draw(st.lists(row, min_size=1, max_size=12))  # duplicates occur
    trie, children = SidTrie(torch.tensor(sids), sizes), children_of(sids)
    assert (trie.num_levels, tuple(trie.level_sizes)) == (len(sizes), tuple(sizes))
    code = st.one_of(st.integers(-1, 5), st.sampled_from([-HUGE, -2, HUGE, 2**63 - 1, -(2**63)]))
    for depth in range(len(sizes) + 1):
        queries = data.draw(st.lists(st.lists(code, min_size=depth, max_size=depth), min_size=1, max_size=6))
        queries += [sid[:depth] for sid in sids]
        asked = torch.tensor(queries, dtype=torch.long).reshape(len(queries), depth)
        if depth == len(sizes):
            assert trie.contains(asked).tolist() == [query in sids for query in queries]
        else:
            expected = [[c in children.get(tuple(query), ()) for c in range(sizes[depth])] for query in queries]
            assert trie.allowed(asked).tolist() == expected


@pytest.mark.parametrize("sizes", [(4, 5), (4, 3, 5), (3, 2, 4, 3), (2, 3, 2, 3, 2)])
def test_reachable_sids_are_the_catalogue(sizes):
    """Follow every allowed code from the root; and ask for every SID that could be."""
    sids = random_sids(15, sizes, seed=len(sizes))
    trie = trie_for(sids, sizes)
    paths = torch.zeros(1, 0, dtype=torch.long)
    for _ in sizes:
        allowed = trie.allowed(paths)
        assert allowed.any(1).all()  # no dead end
        row, code = allowed.nonzero(as_tuple=True)
        paths = torch.cat([paths[row], code[:, None]], 1)
    catalogue = sorted(set(map(tuple, sids.tolist())))
    assert sorted(map(tuple, paths.tolist())) == catalogue
    possible = list(itertools.product(*map(range, sizes)))
    contained = trie.contains(torch.tensor(possible)).tolist()
    assert [sid for sid, yes in zip(possible, contained, strict=True) if yes] == catalogue


SIDS = torch.tensor([[0, 1, 2], [0, 1, 2], [2, 0, 1]])
TRIE = SidTrie(SIDS, (4, 2, 3))  # code 3 of level 1 and code 0 of level 3 are in no SID


def test_by_hand():
    assert TRIE.allowed(torch.zeros(1, 0, dtype=torch.long)).tolist() == [[True, False, True, False]]
    assert TRIE.allowed(torch.tensor([[0], [1], [2], [3]])).tolist() == [
        [False, True],
        [False, False],
        [True, False],
        [False, False],
    ]
    assert TRIE.allowed(torch.tensor([[0, 1], [0, 0]])).tolist() == [[False, False, True], [False, False, False]]
    assert TRIE.contains(torch.tensor([[0, 1, 2], [2, 0, 1], [0, 1, 1], [2, 1, 2]])).tolist() == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("code", [-1, -2, -HUGE, -(2**63), 4, 5, 2**31, 2**32, HUGE, 2**63 - 1])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_out_of_range_is_not_allowed(code, place):
    """A code that reads as another digit would alias: (0, 1 + 2) is not (1, 1)."""
    sid = SIDS[:1].clone()
    sid[0, place] = code
    assert not TRIE.contains(sid).item()
    for depth in range(place + 1, 3):
        assert not TRIE.allowed(sid[:, :depth]).any()


def test_out_of_range_digits_do_not_alias():
    """With base 2 below it, (0, 1) + 2 in the last place has the number of (1, 1)."""
    trie = SidTrie(torch.tensor([[1, 1], [0, 0]]), (2, 2))
    assert trie.contains(torch.tensor([[0, 3], [2, -3], [1, -1], [-1, 2]])).tolist() == [False] * 4
    deeper = SidTrie(torch.tensor([[1, 1, 0], [0, 0, 0]]), (2, 2, 1))
    assert not deeper.allowed(torch.tensor([[0, 3], [2, -1], [1, -1]])).any()


def test_nothing_asked():
    for depth, size in enumerate((4, 2, 3)):
        assert TRIE.allowed(torch.zeros(0, depth, dtype=torch.long)).shape == (0, size)
    assert TRIE.contains(torch.zeros(0, 3, dtype=torch.long)).shape == (0,)
    assert TRIE.allowed(torch.zeros(5, 0, dtype=torch.long)).shape == (5, 4)


def test_other_integers_and_devices():
    trie = SidTrie(SIDS.int(), [4, 2, 3]).to("cpu")
    assert trie.contains(SIDS.int()).all()
    assert trie.contains(SIDS.to(torch.uint8)).all()
    assert (trie.allowed(SIDS[:, :2].short()) == TRIE.allowed(SIDS[:, :2])).all()
    assert trie.allowed(SIDS[:, :2]).dtype == torch.bool


def test_a_trie_that_moves_stays_where_it_is_for_others():
    trie = SidTrie(SIDS, [4, 2, 3])
    moved = trie.to("meta")
    assert moved.num_bytes == trie.num_bytes
    assert moved.allowed(torch.zeros(5, 0, dtype=torch.long, device="meta")).device.type == "meta"
    assert trie.to("meta") is moved
    assert trie.contains(SIDS).all()


def test_order_and_duplicates_do_not_matter():
    again = SidTrie(SIDS[[2, 0, 2]], (4, 2, 3))
    for depth in range(3):
        assert (again.allowed(SIDS[:, :depth]) == TRIE.allowed(SIDS[:, :depth])).all()


@pytest.mark.parametrize(
    ("sids", "sizes", "message"),
    [
        (SIDS, (4, 2), r"\(3, 3\).*2 level sizes"),
        (SIDS[0], (4, 2, 3), "shape"),
        (SIDS[:0], (4, 2, 3), "N > 0"),
        (SIDS.float(), (4, 2, 3), "float32.*integers"),
        (SIDS - 1, (4, 2, 3), "from -1"),
        (SIDS, (2, 2, 3), r"level sizes are \(2, 2, 3\)"),
        (SIDS, (2**31, 2**31, 2**31), r"2\^63"),
    ],
)
def test_bad_catalogues(sids, sizes, message):
    with pytest.raises(InputError, match=message):
        SidTrie(sids, sizes)


def test_questions_of_another_depth():
    with pytest.raises(InputError, match="3 codes"):
        TRIE.allowed(SIDS)
    with pytest.raises(InputError, match=r"2 codes.*3 levels"):
        TRIE.contains(SIDS[:, :2])

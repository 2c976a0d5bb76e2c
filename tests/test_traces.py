"""What a block says of a node: words of its own items, the most telling first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data.catalog import Catalog
from sapo.policy.prompts import frequent_words, sid_token, split_words
from sapo.training.traces import STOPWORDS, NodeDescriptors, OneBlock, leaks, names_title

SIDS = [[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]
TITLES = ["Coffee grinder", "Coffee kettle", "Coffee filter", "Guitar strings", "Guitar tuner 12"]
CATEGORIES = ["Kitchen, Store", "Kitchen, Store", "Kitchen, Store", "Music, Store", "Music, Store"]


def catalog(sids=SIDS, titles=TITLES, categories=CATEGORIES) -> Catalog:
    return Catalog("hand made", torch.tensor(sids), list(titles), categories=list(categories))


def test_words_that_set_siblings_apart_come_first():
    """Both children of the root say "store" in every item; "coffee" and "kitchen" are of the first alone."""
    nodes = NodeDescriptors(catalog(), words_per_node=9)
    assert set(nodes.words([0])[:2]) == {"coffee", "kitchen"}  # in 3 items of one child of two
    assert nodes.words([0])[2] == "store"  # in 3 items, but of both children
    assert set(nodes.words([0])[3:]) == {"grinder", "kettle", "filter"}  # in 1 item each
    assert set(nodes.words([1])[:2]) == {"guitar", "music"}


def test_below_a_node_its_own_word_says_nothing():
    """Among the children of (0,), "coffee" is everywhere; with one item a node, what differs comes first."""
    nodes = NodeDescriptors(catalog(), words_per_node=1)
    assert nodes.words([0, 1]) == ["filter"]
    assert nodes.words([1, 0]) == ["strings"]
    assert nodes.words([1, 1]) == ["tuner"]


def test_equally_telling_words_come_by_their_number_of_items():
    """In (0, 1), "hat" and "red" are in its one item and in no sibling; two items of the catalogue are red."""
    sids = [[0, 0], [0, 1], [1, 0]]
    assert NodeDescriptors(catalog(sids, ["mug", "hat red", "red bag"], [""] * 3)).words([0, 1]) == ["red", "hat"]
    assert NodeDescriptors(catalog(sids, ["mug", "red hat", "bag"], [""] * 3)).words([0, 1]) == ["hat", "red"]


def test_a_plural_says_nothing_more():
    nodes = NodeDescriptors(catalog([[0, 0], [0, 1], [1, 0]], ["box boxes pens", "box pen glass", "lamp"], [""] * 3))
    assert nodes.words([0]) == ["box", "glass", "pen"]


def test_a_vocabulary_limits_what_is_said():
    nodes = NodeDescriptors(catalog(), vocabulary=["coffee", "tuner", "the", "unheard"])
    assert nodes.words([0]) == ["coffee"]
    assert nodes.words([1, 1]) == nodes.words([1]) == ["tuner"]
    assert nodes.words([1, 0]) == ["tuner"]  # its own "strings" is not usable: its parent's word
    assert NodeDescriptors(catalog(), vocabulary=[]).words([0, 1]) == []


def test_a_node_without_words_says_what_its_parent_says():
    # no text; digits, stop words and single letters only; and a whole level-1 node without text
    titles = ["Coffee grinder", "", "12 x 3 the", "", ""]
    sids = [[0, 0, 0], [0, 1, 0], [0, 2, 1], [1, 0, 0], [1, 1, 1]]
    nodes = NodeDescriptors(catalog(sids, titles, [""] * 5))
    said = nodes.words([0])
    assert set(said) == {"coffee", "grinder"}
    for prefix in ([0, 1], [0, 1, 0], [0, 2], [0, 2, 1]):
        assert nodes.words(prefix) == said
    assert nodes.words([1]) == nodes.words([1, 0]) == nodes.words([1, 1, 1]) == []  # the root has nothing to say
    assert nodes.trace([1, 0, 0]) == [""] * 3


texts = st.lists(st.sampled_from(["Red", "shoe", "the", "b", "7", "Wool-hat", "café", "mug", "mugs"]), max_size=5).map(
    " ".join
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_catalogue(data):
    """Every level gets a block; its words are those of the node's own items, of the parent's where it has none."""
    levels, limit = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4))
    sid = st.lists(st.integers(0, 2), min_size=levels, max_size=levels)
    items = data.draw(st.lists(st.tuples(sid, texts, texts), min_size=1, max_size=8))
    sids, titles, categories = map(list, zip(*items, strict=True))
    nodes = NodeDescriptors(catalog(sids, titles, categories), limit)
    for path in sids:
        parent: list[str] = []
        said = []
        for depth in range(1, levels + 1):
            own = set()
            for other, title, category in items:
                if other[:depth] == path[:depth]:
                    own |= set(split_words(title) + split_words(category)) - STOPWORDS
            words = nodes.words(path[:depth])
            assert words == nodes.words(tuple(path[:depth]))
            if own:
                assert set(words) <= own
                kinds = {"mug" if word == "mugs" else word for word in own}  # the singular will do
                assert len(words) == len(set(words)) == min(limit, len(kinds))
            else:
                assert words == parent
            parent = words
            said.append(" ".join(words))
        assert nodes.trace(path) == said


def test_same_catalogue_same_traces():
    """Ties are broken by the word, never by the order of the items."""
    first = NodeDescriptors(catalog())
    order = [3, 1, 4, 0, 2]
    shuffled = NodeDescriptors(catalog(*([rows[i] for i in order] for rows in (SIDS, TITLES, CATEGORIES))))
    for sid in SIDS:
        assert first.trace(sid) == NodeDescriptors(catalog()).trace(sid) == shuffled.trace(sid)


def test_real_catalogues(shared_data):
    for name, levels in (("office", 3), ("industrial_full", 4)):
        items = Catalog.load(shared_data / name)
        nodes = NodeDescriptors(items)
        assert items.num_levels == levels
        for sid in items.sids[::97].tolist():
            blocks = nodes.trace(sid)
            assert len(blocks) == levels
            assert any(blocks)  # no trace is empty


# Prompts


def test_a_leak_is_the_whole_title():
    assert names_title("They want a STEEL drill, surely.", "Steel Drill")
    assert not names_title("A drill of steel", "Steel Drill")
    assert not names_title("A drill", "Drill")  # any drill
    assert not names_title("steel", "")
    texts = ["Steel drill it is.", "A drill for the workshop.", "Anything."]
    # 2 of 2 words, 1 of 2 different ones ("drill" twice), and a title without words
    assert leaks(texts, ["Steel Drill", "Drill, hand drill", ""]) == {
        "leak_rate": pytest.approx(1 / 3),
        "title_words": pytest.approx((1 + 1 / 2 + 0) / 3),
    }
    assert leaks([], []) == {"leak_rate": 0, "title_words": 0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Wool-Hat, 2-pack (L)", ["wool", "hat", "pack"]),
        ("CAFÉ crème", ["café", "crème"]),
        ("3M x4 a_b under_score", ["under", "score"]),
        ("", []),
    ],
)
def test_split_words(text, words):
    assert split_words(text) == words


def test_names_of_codes():
    assert [sid_token(level, code) for level, code in ((0, 5), (1, 0), (4, 12))] == ["<a_5>", "<b_0>", "<e_12>"]


def test_frequent_words_count_items_and_break_ties_by_the_alphabet():
    # in 5, 3, 3, 2 and 2 items, of title and category together; a word of one item alone is not frequent
    assert frequent_words(catalog(), 9) == ["store", "coffee", "kitchen", "guitar", "music"]
    assert frequent_words(catalog(), 2) == ["store", "coffee"]
    assert frequent_words(catalog(titles=["Mug mug mug", "", "", "", ""], categories=[""] * 5), 9) == []


def test_one_block_holds_the_words_of_all():
    traces = OneBlock(NodeDescriptors(catalog(), 2))
    apart = NodeDescriptors(catalog(), 2).of_row([], 3)
    assert apart == ["guitar music", "strings store"]
    assert traces.of_row([], 3) == ["guitar music strings store"]

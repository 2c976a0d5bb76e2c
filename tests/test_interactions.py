"""Sequences and their splits: cuts by hand, no target that was trained on, files that come back, located errors."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo.data import interactions as module
from sapo.data.interactions import Interactions, PublishedPairs, Rows, Split
from sapo.data.synthetic import SyntheticCatalogue, SyntheticConfig
from sapo.errors import InputError

TABLES = {
    "items": "item_id\ttitle\n0\ta\n1\tb\n2\tc\n3\td\n4\te\n",
    "sequences": "user_id\titems\tn_train\nA\t0 1 2 3\t3\nB\t4 4 1\t1\n",
    "sequences_extended": "user_id\tgroup\tn_before\tn_train\titems\nA\to\t1\t4\t3 0 1 2 3\nC\te\t0\t2\t1 2 0 4\n",
    "valid": "user_id\thistory\ttarget\tday\nB\t4\t4\t9\n",
    "test": "user_id\thistory\ttarget\tday\nA\t0 1 2\t3\t10\nB\t4 4\t1\t11\n",
}
LEAVE_ONE_OUT = ("items", "sequences")


def folder(path: Path, stems=tuple(TABLES), **changes: str) -> Path:
    for stem in stems:
        (path / f"{stem}.tsv").write_text(changes.get(stem, TABLES[stem]))
    return path


def load(path: Path, stems=tuple(TABLES), **changes: str) -> Interactions:
    return Interactions.load(folder(path, stems, **changes))


# ------------------------------------------------------------------------------------------------- cuts by hand


def test_leave_one_out_by_hand():
    split = Interactions(["u", "v"], [[3, 1, 4, 1, 5], [2, 6, 0]], 7).leave_one_out()
    assert split.name == "leave_one_out"
    assert split.sequences == [[3, 1, 4], [2]]
    assert split.train == Rows(["u", "u"], [[3], [3, 1]], [1, 4])  # v has one item to train on: no row
    assert split.valid == Rows(["u", "v"], [[3, 1, 4], [2]], [1, 6])
    assert split.test == Rows(["u", "v"], [[3, 1, 4, 1], [2, 6]], [5, 0])


def test_published_by_hand(tmp_path):
    split = load(tmp_path).published()
    assert split.name == "published_test"
    assert split.sequences == [[3, 0, 1, 2], [1, 2]]  # n_train of the extended sequences
    assert split.train == Rows(["A", "A", "A", "C"], [[3], [3, 0], [3, 0, 1], [1]], [0, 1, 2, 2])
    assert split.valid == Rows(["B"], [[4]], [4])
    assert split.test == Rows(["A", "B"], [[0, 1, 2], [4, 4]], [3, 1])


def test_published_without_extended_sequences(tmp_path):
    split = load(tmp_path, ("items", "sequences", "valid", "test")).published()
    assert split.sequences == [[0, 1, 2], [4]]
    assert split.train == Rows(["A", "A"], [[0], [0, 1]], [1, 2])


def test_published_needs_a_test_file(tmp_path):
    interactions = load(tmp_path, LEAVE_ONE_OUT)
    assert not interactions.has_published
    with pytest.raises(InputError, match=r"test\.tsv\.gz.*use leave_one_out"):
        interactions.published()
    assert load(tmp_path).has_published


def test_take_keeps_the_order_asked_for():
    rows = Rows(["a", "b", "c"], [[1], [2], [3]], [4, 5, 6])
    assert len(rows) == 3
    assert rows.take([2, 0]) == Rows(["c", "a"], [[3], [1]], [6, 4])
    assert len(rows.take([])) == 0


sequences = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=8), min_size=1, max_size=5)


@given(sequences)
def test_leave_one_out_gives_every_item_one_place(items):
    """First item, train targets, valid and test target are together the user's items; a history is what came before."""
    split = Interactions([str(user) for user in range(len(items))], items, 10).leave_one_out()
    for user, sequence in enumerate(items):
        targets = []
        for part in (split.train, split.valid, split.test):
            for name, history, target in zip(part.user, part.history, part.target, strict=True):
                if name == str(user):
                    targets.append(target)
                    assert history == sequence[: len(targets)]
        assert [sequence[0], *targets] == sequence


# ------------------------------------------------------------------------------------------------- leaks


def assert_training_stops_before(split: Split, whole: dict[str, list[int]]) -> int:
    """Every training sequence of a user with later rows is a proper prefix of theirs; returns how many were checked."""
    first: dict[str, int] = {}
    for part in (split.valid, split.test):
        for user, history, target in zip(part.user, part.history, part.target, strict=True):
            # how much had happened: the shortest prefix that ends in the history and precedes the target
            sequence = whole[user]
            ends = [
                end
                for end in range(len(history), len(sequence))
                if sequence[end] == target and sequence[end - len(history) : end] == history
            ]
            assert ends, (user, history, target)
            first[user] = min(first.get(user, len(sequence)), ends[0])
    trained: dict[str, list[list[int]]] = {}
    for user, history, target in zip(split.train.user, split.train.history, split.train.target, strict=True):
        trained.setdefault(user, []).append([*history, target])
    for user, end in first.items():
        for sequence in trained.get(user, []):
            assert sequence == whole[user][: len(sequence)]
            assert len(sequence) <= end
    return len(first)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_leak_in_synthetic_data(seed):
    config = SyntheticConfig(branching=(3, 3), num_items=8, num_users=80, predictability=(0.5, 0.5), seed=seed)
    interactions = SyntheticCatalogue(config).interactions
    split = interactions.leave_one_out()
    assert split.sequences == [items[:-2] for items in interactions.items]
    assert assert_training_stops_before(split, dict(zip(interactions.user_ids, interactions.items, strict=True))) == 80


@pytest.mark.parametrize("place", ["office", "industrial"])
def test_no_leak_in_real_data(shared_data, place):
    interactions = Interactions.load(shared_data / place)
    whole = dict(zip(interactions.user_ids, interactions.items, strict=True))
    split = interactions.leave_one_out()
    assert assert_training_stops_before(split, whole) == len(whole)
    assert split.sequences == [items[:-2] for items in interactions.items]

    split = interactions.published()
    users = dict.fromkeys(split.valid.user + split.test.user)
    assert set(users) == set(whole)
    later = Counter(split.valid.user + split.test.user)
    trained = dict(zip(interactions.published_pairs.users, split.sequences, strict=True))
    for user in users:
        # the published rows are the last items of the user, one each, and training ends where they begin
        before = whole[user][: len(whole[user]) - later[user]]
        assert before
        assert trained[user][-len(before) :] == before
    for part in (split.valid, split.test):
        for user, history in zip(part.user, part.history, strict=True):
            before = whole[user][: len(whole[user]) - later[user]]
            n = next(n for n in range(len(before), len(whole[user])) if whole[user][:n][-len(history) :] == history)
            assert n >= len(before)


def test_a_third_of_the_published_targets_is_trained_on_by_leave_one_out(shared_data):
    """Why the hashes of the two splits differ, and why a checkpoint of one is refused on the other."""
    interactions = Interactions.load(shared_data / "office")
    published, own = interactions.published(), interactions.leave_one_out()
    trained = Counter(zip(own.train.user, own.train.target, strict=True))
    shared = sum(trained[pair] > 0 for pair in zip(published.test.user, published.test.target, strict=True))
    assert 0.25 < shared / len(published.test) < 0.45
    assert published.data_hash != own.data_hash


# ------------------------------------------------------------------------------------------------- hashes


def test_data_hash_is_of_the_name_and_the_rows():
    def hash_of(users=("u", "v"), items=([1, 2, 3], [4, 5, 6])):
        return Interactions(list(users), [list(sequence) for sequence in items], 10).leave_one_out().data_hash

    assert hash_of() == hash_of()
    variants = [
        hash_of(),
        hash_of(users=("u", "w")),
        hash_of(items=([1, 2, 3], [4, 5, 7])),  # a test target
        hash_of(items=([1, 2, 3], [4, 7, 6])),  # a validation target
        hash_of(items=([1, 2, 3], [7, 5, 6])),  # a training item
    ]
    assert len(set(variants)) == len(variants)


def test_splits_of_the_same_rows_differ_by_name():
    rows = Interactions(["u"], [[1, 2, 3]], 10).leave_one_out()
    pairs = PublishedPairs(["u"], rows.sequences, rows.valid, rows.test)
    assert Interactions(["u"], [[1, 2, 3]], 10, pairs).published().data_hash != rows.data_hash


def test_content_hash(tmp_path):
    base = load(tmp_path).content_hash
    assert load(tmp_path).content_hash == base
    changed = [
        load(tmp_path, valid=TABLES["valid"].replace("4\t4", "4\t3")),
        load(tmp_path, test=TABLES["test"].replace("A\t", "D\t")),
        load(tmp_path, sequences=TABLES["sequences"].replace("0 1", "1 0")),
        load(tmp_path, sequences_extended=TABLES["sequences_extended"].replace("1\t4", "1\t3")),
        load(tmp_path, items=TABLES["items"] + "5\tf\n"),
    ]
    assert len({base, *(interactions.content_hash for interactions in changed)}) == 6


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("stems", [LEAVE_ONE_OUT, ("items", "sequences", "valid", "test"), tuple(TABLES)])
def test_round_trip(tmp_path, stems):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    interactions = load(tmp_path / "in", stems)
    interactions.save(folder(tmp_path / "out", ["items"]))
    loaded = Interactions.load(tmp_path / "out")
    assert loaded.content_hash == interactions.content_hash
    assert loaded.leave_one_out() == interactions.leave_one_out()
    assert loaded.has_published == interactions.has_published
    if loaded.has_published:
        assert loaded.published() == interactions.published()


@pytest.mark.parametrize("trouble", ["tab", "disk"])
def test_what_cannot_be_saved_changes_nothing(tmp_path, monkeypatch, trouble):
    """Half of a cut in time would be read as leave-one-out, and give test targets to training."""
    load(tmp_path).save(tmp_path / "there")
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    interactions = load(tmp_path)
    if trouble == "tab":
        interactions = replace(interactions, user_ids=[f"a\t{user}" for user in interactions.user_ids])
        expected = pytest.raises(InputError, match="holds a tab")
    else:
        written, write = [], module.write_table
        full = OSError(28, "No space left on device")

        def until_full(*arguments):
            if len(written) == 3:
                raise full
            written.append(write(*arguments))

        monkeypatch.setattr(module, "write_table", until_full)
        expected = pytest.raises(OSError, match="No space left")
    with expected:
        interactions.save(tmp_path / "there")
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before


def test_a_save_that_is_stopped_while_tables_are_put_in_place_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    load(tmp_path).save(folder(tmp_path / "there", ["items"]))
    replace_file, moved = Path.replace, []

    def stopped(path, target):
        if Path(target).parent == tmp_path / "there":
            moved.append(target)
            if len(moved) == 2:
                raise KeyboardInterrupt
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path).save(tmp_path / "there")
    with pytest.raises(InputError, match="sequences"):
        Interactions.load(tmp_path / "there")


def test_same_interactions_same_bytes(tmp_path):
    interactions = load(tmp_path)
    for place in ("one", "two"):
        interactions.save(tmp_path / place)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["sequences.tsv.gz", "sequences_extended.tsv.gz", "test.tsv.gz", "valid.tsv.gz"]
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    ("stem", "old", "new", "message"),
    [
        (
            "sequences",
            "0 1 2 3",
            "0 1 2 5",
            r"sequences\.tsv, line 2, column 'items': '5' is not an integer from 0 to 4",
        ),
        ("sequences", "0 1 2 3", "0 1 -2 3", r"line 2, column 'items': '-2'"),
        ("sequences", "0 1 2 3", "0 1  2 3", r"line 2, column 'items': ''"),
        ("sequences", "0 1 2 3", "0 x 2 3", r"line 2, column 'items': 'x'"),
        ("sequences", "0 1 2 3", "", r"line 2, column 'items': ''"),
        ("sequences", "4 4 1", "4 1", r"line 3, column 'items': 2 items; leave-one-out needs at least 3"),
        ("sequences", "B\t", "A\t", r"line 3, column 'user_id': user 'A' already stands in line 2"),
        ("sequences", "items", "item", r"sequences\.tsv, line 1: no column 'items'"),
        (
            "sequences_extended",
            "1\t4",
            "1\t6",
            r"sequences_extended\.tsv, line 2, column 'n_train': '6' is not .* 0 to 5",
        ),
        ("sequences_extended", "1\t4", "1\t0", r"line 2, column 'n_train': 0 of 5 items"),
        ("sequences_extended", "n_train", "n", r"line 1: no column 'n_train'"),
        ("sequences_extended", "C\t", "A\t", r"line 3, column 'user_id': user 'A'"),
        ("valid", "4\t4", "4\t9", r"valid\.tsv, line 2, column 'target': '9'"),
        ("test", "4 4\t", "\t", r"test\.tsv, line 3, column 'history': ''"),
        ("test", "\t10", "", r"test\.tsv, line 2: 3 fields, but line 1 names 4"),
    ],
)
def test_bad_tables(tmp_path, stem, old, new, message):
    assert old in TABLES[stem]
    with pytest.raises(InputError, match=message):
        load(tmp_path, **{stem: TABLES[stem].replace(old, new, 1)})


def test_missing_tables(tmp_path):
    with pytest.raises(InputError, match="neither sequences"):
        load(tmp_path, ["items"])
    with pytest.raises(InputError, match="neither valid"):
        load(tmp_path, ("items", "sequences", "test"))
    for stem in ("valid", "test"):
        with pytest.raises(InputError, match=f"{stem} has no line after the header"):
            load(tmp_path, **{stem: TABLES[stem].splitlines(keepends=True)[0]})
    (tmp_path / "sequences.tsv").write_text("user_id\titems\n")
    with pytest.raises(InputError, match="sequences has no line after the header"):
        Interactions.load(tmp_path)


def test_published_without_extended_sequences_needs_n_train(tmp_path):
    plain = "user_id\titems\nA\t0 1 2 3\n"
    with pytest.raises(InputError, match=r"sequences\.tsv, line 1: no column 'n_train'"):
        load(tmp_path, ("items", "sequences", "valid", "test"), sequences=plain)


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        (["u"], [], "1 users with 0 sequences"),
        ([], [], "at least one"),
        (["u", "u"], [[0, 1, 2], [0, 1, 2]], "a user twice"),
        (["u"], [[0, 1]], "user 'u' has 2 items; leave-one-out needs at least 3"),
        (["u"], [[0, 1, 3]], r"user 'u' has an item outside 0\.\.2"),
        (["u"], [[0, -1, 2]], r"user 'u' has an item outside 0\.\.2"),
    ],
)
def test_bad_interactions(users, items, message):
    with pytest.raises(InputError, match=message):
        Interactions(users, items, 3)


# ------------------------------------------------------------------------------------------------- statistics


def test_describe_by_hand(tmp_path):
    facts = load(tmp_path).describe()["value"].to_dict()
    assert facts == {
        "users": 2,
        "items in the catalogue": 5,
        "items in sequences": 5,
        "interactions": 7,
        "mean length": 3.5,
        "median length": 3.5,
        "90th percentile of lengths": pytest.approx(3.9),  # 3 + 0.9 x (4 - 3)
        "longest": 4,
        "density": 0.7,  # 7 / (2 x 5)
        "repeats": 1,  # B's second 4
        "leave_one_out: train rows": 1,  # A's 0 -> 1; B keeps one item
        "leave_one_out: valid rows": 2,
        "leave_one_out: test rows": 2,
        "published_test: train rows": 4,  # 3 of A's four items, 1 of C's two
        "published_test: valid rows": 1,
        "published_test: test rows": 2,
    }


@pytest.mark.parametrize(
    ("place", "numbers", "mean", "middle", "repeats", "test_rows"),
    [  # the table "Statistics" of the data's README
        ("office", (3231, 3459, 3317, 22447), 6.95, (6, 11, 30), 1259, 4866),
        ("industrial", (3285, 3686, 3541, 22743), 6.92, (6, 11, 34), 1079, 4533),
        ("industrial_full", (8317, 4344, 4344, 58492), 7.03, (6, 10, 78), 0, None),
        ("games", (50546, 16859, 16859, 452989), 8.96, (6, 14, 771), 0, None),
        ("beauty", (22363, 12101, 12101, 198502), 8.88, (6, 14, 204), 0, None),
    ],
)
def test_published_statistics(shared_data, place, numbers, mean, middle, repeats, test_rows):
    facts = Interactions.load(shared_data / place).describe()["value"]
    names = ["users", "items in the catalogue", "items in sequences", "interactions"]
    assert tuple(facts[name] for name in names) == numbers
    assert round(facts["mean length"], 2) == mean
    assert (facts["median length"], facts["90th percentile of lengths"], facts["longest"]) == middle
    assert facts["repeats"] == repeats
    assert facts["density"] == pytest.approx(numbers[3] / (numbers[0] * numbers[1]))
    assert facts.get("published_test: test rows") == test_rows
    # every user gives two items away and starts with one
    assert facts["leave_one_out: train rows"] == numbers[3] - 3 * numbers[0]


# ---------------------------------------------------------------------------------------------------- leakage


def test_leakage_by_hand():
    items, days = [[0, 5, 5], [7, 3, 4], [9, 1, 2, 1]], [[1, 2, 2], [4, 5, 6], [1, 1, 3, 3]]
    pairs = PublishedPairs(
        ["a", "b", "c"],
        [[0, 5], [7], [9, 1]],
        Rows(["b"], [[7]], [3]),
        Rows(["b", "c", "c"], [[7, 3], [9, 1], [9, 1, 2]], [4, 2, 1]),
    )
    report = Interactions(["a", "b", "c"], items, 10, pairs, days).leakage()
    alone = report["leave_one_out"]  # targets 5, 4, 1 after 5, 3, 2
    assert alone["test rows"] == 3
    assert alone["target in its history"] == pytest.approx(2 / 3)
    assert alone["target of the day of the item before"] == pytest.approx(2 / 3)  # of a and c
    assert alone["target numbered 1 to 3 from the item before"] == pytest.approx(2 / 3)  # 4 after 3, 1 after 2
    assert alone["rows whose target no training sequence holds"] == 2  # trained on 0, 7, 9 and 1: 5 and 4 are new
    published = report["published_test"]  # 4 after 3, 2 after 1, 1 after 2
    assert published["target in its history"] == pytest.approx(1 / 3)
    assert published["target of the day of the item before"] == pytest.approx(1 / 3)  # c's days 1, 1, 3, 3
    assert published["rows whose target no training sequence holds"] == 2
    assert report.loc["the same of items numbered at random"].tolist() == [0.6, 0.6]
    unknown = Interactions(["a"], [[0, 5, 5]], 10).leakage()
    assert pd.isna(unknown.loc["target of the day of the item before", "leave_one_out"])


@pytest.mark.parametrize(
    ("place", "same_day", "near", "repeated", "unseen"),
    [("office", 0.515, 0.070, 0.024, 87), ("industrial", 0.393, 0.062, 0.028, 160)],
)
def test_published_leakage(shared_data, place, same_day, near, repeated, unseen):
    """The cautions of the data's README."""
    report = Interactions.load(shared_data / place).leakage()["published_test"]
    assert report["target of the day of the item before"] == pytest.approx(same_day, abs=5e-4)
    assert report["target numbered 1 to 3 from the item before"] == pytest.approx(near, abs=5e-4)
    assert report["target in its history"] == pytest.approx(repeated, abs=5.1e-4)
    assert report["rows whose target no training sequence holds"] == unseen


def test_days_come_back_and_are_checked(tmp_path):
    data = Interactions(["u"], [[0, 1, 2]], 5, days=[[3, 4, 4]])
    folder(tmp_path, ("items",))
    data.save(tmp_path)
    loaded = Interactions.load(tmp_path)
    assert loaded.days == [[3, 4, 4]]
    assert loaded.content_hash == Interactions(["u"], [[0, 1, 2]], 5).content_hash  # days are not what is learnt from
    with pytest.raises(InputError, match="days must hold one number for each item"):
        Interactions(["u"], [[0, 1, 2]], 5, days=[[3, 4]])
    (tmp_path / "sequences.tsv.gz").unlink()
    with pytest.raises(InputError, match=r"line 2, column 'days': 2 days for 3 items"):
        load(tmp_path, LEAVE_ONE_OUT, sequences="user_id\titems\tdays\nA\t0 1 2\t4 5\n")


def test_an_earlier_cut_does_not_stay(tmp_path):
    folder(tmp_path)
    assert Interactions.load(tmp_path).has_published
    Interactions(["u"], [[0, 1, 2]], 5).save(tmp_path)
    assert not Interactions.load(tmp_path).has_published
    assert Interactions.load(tmp_path).user_ids == ["u"]

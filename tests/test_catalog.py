"""Catalogues: properties by hand, TSV folders that come back as they were, one clear error for every bad file."""

import gzip
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapo.data.catalog import Catalog
from sapo.errors import InputError

ITEMS = "item_id\ttitle\tbrand\n0\tred pen\tAcme\n1\tblue pen\t\n2\t\tAcme\n"
SIDS = "item_id\tsid_1\tsid_2\n0\t0\t5\n1\t0\t2\n2\t3\t5\n"


def folder(path: Path, items: str | bytes | None = ITEMS, sids: str | bytes | None = SIDS) -> Path:
    """A data folder of plain tables; None leaves a table out, bytes become the compressed file as they are."""
    for stem, content in (("items", items), ("sids", sids)):
        if isinstance(content, str):
            (path / f"{stem}.tsv").write_bytes(content.encode())
        elif content is not None:
            (path / f"{stem}.tsv.gz").write_bytes(content)
    return path


def small(**changes) -> Catalog:
    """Items 0 and 3 share the SID (1, 0, 2)."""
    fields = {
        "name": "small",
        "sids": torch.tensor([[1, 0, 2], [0, 0, 0], [1, 4, 2], [1, 0, 2]]),
        "titles": ["a", "b", "c", ""],
    }
    return Catalog(**(fields | changes))


def test_properties_by_hand():
    catalog = small(brands=["x", "", "", "y"])
    assert (catalog.num_items, catalog.num_levels) == (4, 3)
    assert catalog.level_sizes == (2, 5, 3)  # largest codes 1, 4, 2
    assert catalog.codes_in_use == (2, 2, 2)  # {0, 1}, {0, 4}, {0, 2}
    assert catalog.collision_rate == 0.5  # 2 of 4 items
    assert catalog.item_ids == [0, 1, 2, 3]
    assert catalog.items_of([1, 0, 2]) == [0, 3]
    assert catalog.items_of(torch.tensor([1, 4, 2])) == [2]
    assert catalog.items_of((1, 1, 1)) == [] == catalog.items_of((1, 0))
    assert catalog.categories == catalog.descriptions == catalog.asins == [""] * 4
    facts = catalog.describe()["value"].to_dict()
    # prefixes: (1) (0); (1,0) (0,0) (1,4); (1,0,2) (0,0,0) (1,4,2)
    assert [facts[f"distinct prefixes, depth {depth}"] for depth in (1, 2, 3)] == [2, 3, 3]
    assert [facts[f"codes in use, level {level}"] for level in (1, 2, 3)] == [2, 2, 2]
    assert (facts["items"], facts["levels"], facts["items in a collision"], facts["collision rate"]) == (4, 3, 2, 0.5)
    assert (facts["items with title"], facts["items with brand"], facts["items with category"]) == (3, 2, 0)


def test_answers_are_copies():
    catalog = small()
    catalog.items_of([1, 0, 2]).append(9)
    assert catalog.items_of([1, 0, 2]) == [0, 3]


def test_other_integer_dtypes_become_int64():
    assert small(sids=torch.zeros(4, 2, dtype=torch.int16)).sids.dtype == torch.int64


def test_content_hash_sees_everything_but_the_name():
    base = small().content_hash
    assert len(base) == 64
    assert small(name="other").content_hash == base
    assert small(sids=small().sids + 1).content_hash != base
    # ["a", "b"] and ["ab", ""] must not run together, and a brand is not a title
    assert len({small(titles=t).content_hash for t in (["a", "b", "", ""], ["ab", "", "", ""])} | {base}) == 3
    assert small(brands=["a", "b", "c", ""]).content_hash != small(asins=["a", "b", "c", ""]).content_hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sids": torch.zeros(4, 1, dtype=torch.long)}, r"sids is \(4, 1\).*2 to 5 levels"),
        ({"sids": torch.zeros(4, 6, dtype=torch.long)}, r"sids is \(4, 6\).*2 to 5 levels"),
        ({"sids": torch.zeros(0, 3, dtype=torch.long), "titles": []}, r"sids is \(0, 3\)"),
        ({"sids": torch.zeros(4, dtype=torch.long)}, r"sids is \(4,\)"),
        ({"sids": [[0, 1]] * 4}, "sids is list"),
        ({"sids": torch.zeros(4, 3)}, "dtype torch.float32; codes are integers"),
        ({"sids": torch.zeros(4, 3, dtype=torch.bool)}, "dtype torch.bool"),
        ({"sids": torch.tensor([[0, 0], [0, -1], [0, 0], [0, 0]])}, "item 1 has code -1 on level 2"),
        ({"titles": ["a"]}, "titles has 1 entries for 4 items"),
        ({"brands": ["a"] * 5}, "brands has 5 entries for 4 items"),
        ({"item_ids": [1, 2, 3, 4]}, "item_ids must be 0 to 3"),
    ],
)
def test_bad_catalogues(changes, message):
    with pytest.raises(InputError, match=message):
        small(**changes)


# ------------------------------------------------------------------------------------------------- folders


def test_load_by_hand(tmp_path):
    catalog = Catalog.load(folder(tmp_path))
    assert catalog.name == tmp_path.name
    assert catalog.sids.tolist() == [[0, 5], [0, 2], [3, 5]]
    assert catalog.titles == ["red pen", "blue pen", ""]
    assert catalog.brands == ["Acme", "", "Acme"]
    assert catalog.categories == ["", "", ""]


def test_rows_in_any_order_and_files_from_windows(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "other").mkdir()
    plain = Catalog.load(folder(tmp_path / "plain"))
    header, *rows = ITEMS.splitlines()
    shuffled = "\ufeff" + "\r\n".join([header, *rows[::-1], ""])
    header, *rows = SIDS.splitlines()
    other = Catalog.load(folder(tmp_path / "other", shuffled, "\n".join([header, rows[1], rows[2], rows[0]])))
    assert other.content_hash == plain.content_hash


def test_the_name_of_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path))
    assert Catalog.load(".").name == tmp_path.name


words = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=("Cs",)))


@given(st.data(), st.integers(1, 6), st.integers(2, 5))
def test_round_trip(tmp_path_factory, data, num_items, num_levels):
    path = tmp_path_factory.mktemp("round-trip")
    texts = {
        name: data.draw(st.lists(words, min_size=num_items, max_size=num_items))
        for name in ("titles", "brands", "categories", "descriptions", "asins")
    }
    code = st.integers(0, 2**31 - 1)
    sid = st.lists(code, min_size=num_levels, max_size=num_levels)
    sids = torch.tensor(data.draw(st.lists(sid, min_size=num_items, max_size=num_items)))
    catalog = Catalog("any", sids, **texts)
    catalog.save(path, "sids_own")
    loaded = Catalog.load(path, "sids_own")
    assert loaded.content_hash == catalog.content_hash
    assert torch.equal(loaded.sids, catalog.sids)
    assert all(getattr(loaded, name) == value for name, value in texts.items())


def test_same_catalogue_same_bytes(tmp_path):
    for place in ("one", "two"):
        small().save(tmp_path / place)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["items.tsv.gz", "sids.tsv.gz"]
    for name in ("items.tsv.gz", "sids.tsv.gz"):
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "two" / name).read_bytes()
        assert data[4:8] == b"\0\0\0\0"  # the time in a gzip header
    text = gzip.decompress((tmp_path / "one" / "sids.tsv.gz").read_bytes()).decode()
    assert text == "item_id\tsid_1\tsid_2\tsid_3\n0\t1\t0\t2\n1\t0\t0\t0\n2\t1\t4\t2\n3\t1\t0\t2\n"


@pytest.mark.parametrize("mark", ["\t", "\n", "\r"])
def test_save_refuses_what_the_format_cannot_hold(tmp_path, mark):
    with pytest.raises(InputError, match=r"items, line 3, column 'title': .* holds a tab or a line break"):
        small(titles=["a", f"b{mark}c", "d", "e"]).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        Catalog.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"neither items\.tsv\.gz nor items\.tsv; it holds nothing"):
        Catalog.load(tmp_path)
    folder(tmp_path)
    with pytest.raises(InputError, match=r"neither sids_x\.tsv\.gz nor sids_x\.tsv; it holds items\.tsv, sids\.tsv"):
        Catalog.load(tmp_path, "sids_x")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("", r"items\.tsv is empty; line 1 must name the columns item_id, title"),
        ("item_id\ttitle\n", r"items\.tsv has no line after the header"),
        ("item_id\tname\n0\ta\n", r"line 1: no column 'title'; the columns are 'item_id', 'name'"),
        ("item_id\ttitle\ttitle\n0\ta\tb\n", r"line 1: the column 'title' appears twice"),
        (ITEMS + "x\ta\tb\n", r"items\.tsv, line 5, column 'item_id': 'x' is not an integer from 0 to 3"),
        (ITEMS + "3.0\ta\tb\n", r"line 5, column 'item_id': '3\.0'"),
        (ITEMS + "-1\ta\tb\n", r"line 5, column 'item_id': '-1'"),
        (ITEMS + "٣\ta\tb\n", r"line 5, column 'item_id': '٣'"),  # int() reads this as 3
        (ITEMS + "4\ta\tb\n", r"line 5, column 'item_id': '4' is not an integer from 0 to 3"),
        (ITEMS + "1" * 5000 + "\ta\tb\n", r"line 5, column 'item_id'"),
        (ITEMS + "1\ta\tb\n", r"line 5, column 'item_id': item 1 already stands in line 3"),
        (ITEMS + "3\ta\n", r"line 5: 2 fields, but line 1 names 3 columns"),
        (ITEMS + "3\ta\tb\tc\n", r"line 5: 4 fields, but line 1 names 3 columns"),
        (ITEMS + "\n", r"line 5: 1 fields, but line 1 names 3 columns"),
    ],
)
def test_bad_items(tmp_path, items, message):
    with pytest.raises(InputError, match=message):
        Catalog.load(folder(tmp_path, items=items))


@pytest.mark.parametrize(
    ("sids", "message"),
    [
        ("item_id\tsid_1\n0\t1\n", r"sids\.tsv, line 1: no column 'sid_2'"),
        ("item_id\tsid_1\tsid_2\tsid_3\tsid_4\tsid_5\tsid_6\n", r"line 1: 6 levels; a SID has 2 to 5"),
        (
            "item_id\tsid_2\tsid_1\n0\t1\t1\n",
            r"line 1: the columns must be item_id, sid_1, sid_2, \.\.\., in this order",
        ),
        ("item_id\tsid_1\tsid_2\tsid_4\n", r"line 1: the columns must be item_id, sid_1, sid_2"),
        (SIDS.replace("0\t2", "0\t-2"), r"sids\.tsv, line 3, column 'sid_2': '-2' is not an integer from 0"),
        (SIDS.replace("0\t2", "0\t2.5"), r"line 3, column 'sid_2': '2\.5'"),
        (SIDS.replace("0\t2", "\t2"), r"line 3, column 'sid_1': ''"),
        (SIDS.replace("0\t2", "0\t2\t1"), r"line 3: 4 fields, but line 1 names 3 columns"),
        (SIDS.replace("2\t3\t5\n", ""), r"sids\.tsv has no line for item 2 \(1 of 3 are missing\)"),
        (SIDS + "3\t0\t0\n", r"line 5, column 'item_id': '3' is not an integer from 0 to 2"),
        (SIDS + "2\t0\t0\n", r"line 5, column 'item_id': item 2 already stands in line 4"),
        ("item_id\tsid_1\tsid_2\n", r"sids\.tsv has no line after the header"),
    ],
)
def test_bad_sids(tmp_path, sids, message):
    with pytest.raises(InputError, match=message):
        Catalog.load(folder(tmp_path, sids=sids))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (b"", r"items\.tsv\.gz is empty"),
        (gzip.compress(b""), r"items\.tsv\.gz is empty"),
        (ITEMS.encode(), r"items\.tsv\.gz, after line 0: not a whole gzip file"),
        (gzip.compress(ITEMS.encode())[:-12], r"items\.tsv\.gz, after line \d+: not a whole gzip file"),
        (gzip.compress(ITEMS.encode())[:-8] + b"\0" * 8, r"not a whole gzip file"),  # the checksum
        (gzip.compress(ITEMS.encode())[:10] + b"\xff" * 40, r"not a whole gzip file"),  # the compressed stream
        (gzip.compress(ITEMS.encode("utf-16")), r"items\.tsv\.gz, line 1: not UTF-8"),
        (gzip.compress(ITEMS.replace("blue", "blåu").encode("latin-1")), r"items\.tsv\.gz, line 3: not UTF-8"),
    ],
    # bytes would be the names of the tests, and gzip writes the time into them
    ids=["empty", "empty gzip", "not gzip", "cut short", "checksum", "stream", "UTF-16", "Latin-1"],
)
def test_damaged_files(tmp_path, items, message):
    with pytest.raises(InputError, match=message):
        Catalog.load(folder(tmp_path, items=items))


# ---------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("place", "sids", "codes", "prefixes", "collisions"),
    [  # the table "Semantic ids" of the data's README
        ("office", "sids", [88, 256, 256], [88, 2488, 3444], 30),
        ("office", "sids_mimigenrec", [81, 256, 256], [81, 2579, 3445], 28),
        ("industrial", "sids", [48, 256, 256], [48, 2295, 3670], 31),
        ("industrial_full", "sids", [32, 256, 256, 256], [32, 2005, 3350, 3790], 887),
        ("industrial_full", "sids_rkmeans", [256, 256, 256, 256], [256, 2006, 3135, 3469], 1326),
        ("beauty", "sids_rqkmeans", [256, 256, 256, 255], [256, 6983, 10743, 12089], 23),
    ],
)
def test_published_statistics_of_sids(shared_data, place, sids, codes, prefixes, collisions):
    catalog = Catalog.load(shared_data / place, sids)
    facts = catalog.describe()["value"].to_dict()
    assert list(catalog.codes_in_use) == codes
    assert [facts[f"distinct prefixes, depth {depth}"] for depth in range(1, catalog.num_levels + 1)] == prefixes
    assert facts["items in a collision"] == collisions
    assert catalog.collision_rate == pytest.approx(collisions / catalog.num_items)


def test_published_text_coverage(shared_data):
    facts = Catalog.load(shared_data / "office").describe()["value"]
    columns = ["title", "brand", "category", "description", "asin"]
    assert [facts[f"items with {column}"] for column in columns] == [3459, 3454, 505, 3230, 3336]


def test_round_trip_of_real_data(shared_data, tmp_path):
    catalog = Catalog.load(shared_data / "industrial")
    catalog.save(tmp_path / "industrial")
    assert Catalog.load(tmp_path / "industrial").content_hash == catalog.content_hash

"""Raw reviews to a data folder: on files made here, against brute force, and over a connection that breaks."""

import gzip
import http.server
import json
import threading
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data import amazon
from sapo.data.amazon import Filter, build, first_of_pairs, sequences, urls
from sapo.data.catalog import Catalog
from sapo.data.download import download
from sapo.data.interactions import Interactions, chronological_pairs
from sapo.data.preprocess import k_core
from sapo.data.readers.amazon import clean, read_products, read_reviews
from sapo.errors import InputError
from sapo.semantic_ids.config import TokenizerConfig
from sapo.semantic_ids.tokenizer import tokenize_folder


def review(user, item, time, **more):
    return json.dumps({"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": 5.0, **more})


def write_lines(path, lines, compress=True):
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if compress else data)
    return path


# -------------------------------------------------------------------------------------------------------- reading


def test_reviews_are_read_in_the_order_of_the_file(tmp_path):
    lines = [review("A1", "B000000001", 7), review("A2", "B000000002", 5), "{broken", review("A1", "B000000002", 6)]
    lines.append('{"reviewerID": "A3", "asin": "B000000001"}')  # no time
    lines += [review("A3", "B000000001", time) for time in (10**20, -1, float("inf"))] + ["[" * 100_000]
    lines.append(review("A\ud83d", "B000000001", 7))
    lines += [review("A1", "B000000001", 8)] * 9
    for compress in (True, False):
        reviews = read_reviews(write_lines(tmp_path / "r.json.gz", lines, compress))
        assert reviews.user_names == ["A1", "A2"]
        assert reviews.item_names == ["B000000001", "B000000002"]
        assert reviews.users.tolist() == [0, 1, 0] + [0] * 9
        assert reviews.items.tolist() == [0, 1, 1] + [0] * 9
        assert reviews.times.tolist() == [7, 5, 6] + [8] * 9
        assert reviews.broken == [3, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("item_first", [True, False])  # as in the release of 2018, of 2014
def test_ratings_of_either_release(tmp_path, item_first):
    rows = [("A1YJEY40YUW4SE", "B000000001", 7), ("A2ZZZZZZZZZZZZ", "B000000002", 5)]
    lines = [",".join([item, user] if item_first else [user, item]) + f",4.0,{time}" for user, item, time in rows]
    reviews = read_reviews(write_lines(tmp_path / "ratings.csv", lines, compress=False))
    assert reviews.user_names == ["A1YJEY40YUW4SE", "A2ZZZZZZZZZZZZ"]
    assert reviews.item_names == ["B000000001", "B000000002"]
    assert reviews.times.tolist() == [7, 5]


def test_names_of_columns_are_no_broken_line(tmp_path):
    lines = ["user_id,parent_asin,rating,timestamp", "u1,B000000001,5.0,86400", "u2,B000000001,3.0,nonsense"]
    lines.append("u3,B000000001,4.0,86400")
    reviews = read_reviews(write_lines(tmp_path / "ratings.csv", lines))
    assert (len(reviews.users), reviews.broken) == (2, [3])


def test_another_format_is_one_message(tmp_path):
    with pytest.raises(InputError, match=r"r\.json: no reviews\. A line must be a JSON object with reviewerID"):
        read_reviews(write_lines(tmp_path / "r.json", ["user item"] * 3000, compress=False))
    with pytest.raises(InputError, match="A line must be user,item,rating,time"):
        read_reviews(write_lines(tmp_path / "r.csv", ["a b c"], compress=False))
    with pytest.raises(InputError, match="no products"):
        read_products(write_lines(tmp_path / "m.json", ["title"] * 3000, compress=False), {"B1"})
    with pytest.raises(InputError, match="is not a file"):
        read_reviews(tmp_path / "none.json.gz")
    whole = gzip.compress("\n".join(review("A1", f"B{n}", n) for n in range(5000)).encode())
    (tmp_path / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole gzip file"):
        read_reviews(tmp_path / "cut.json.gz")


def test_products_of_either_release(tmp_path):
    lines = [
        json.dumps({"asin": "B1", "title": "Pens &amp; <b>Ink</b>", "brand": "Bic", "category": ["Office", "Pens"]}),
        "{'asin': 'B2', 'title': 'Soap', 'categories': [['Beauty', 'Bath'], ['Gifts']], 'description': 'Long word'}",
        json.dumps({"asin": "B1", "title": "again"}),
        json.dumps({"asin": "B3", "title": "not wanted"}),
        json.dumps({"asin": "B5", "title": "Mat", "categories": 5}),
        "{'asin': 'B4', 'title': ",
        "nothing",
    ]
    found, broken = read_products(write_lines(tmp_path / "m.json.gz", lines), {"B1", "B2", "B4", "B5"}, longest=6)
    assert found == {
        "B1": amazon.Product("Pens & Ink", "Bic", "Office,Pens", ""),
        "B2": amazon.Product("Soap", "", "Beauty,Bath", "Long"),  # not cut within a word
        "B5": amazon.Product("Mat", "", "", ""),
    }
    assert broken == 2


def test_clean_text():
    assert clean("a\tb\n c") == "a b c"
    assert clean("1 &amp;lt; 2") == "1 < 2"  # escaped twice
    assert clean("<p>A</p><script>var x = 1;</script>B") == "A B"
    assert clean(["one", "two"]) == "one two"
    assert clean(None) == ""
    assert clean("fits 3 < 5 and 7 > 2") == "fits 3 < 5 and 7 > 2"
    assert clean("cut \ud83d") == "cut ?"


# ------------------------------------------------------------------------------------------------------ filtering


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60),
    st.integers(1, 4),
)
def test_the_k_core_is_that_of_brute_force(pairs, k):
    users, items = (np.array([pair[side] for pair in pairs], dtype=np.int32) for side in (0, 1))
    left = list(range(len(pairs)))
    while True:  # one at a time
        of_user, of_item = Counter(pairs[i][0] for i in left), Counter(pairs[i][1] for i in left)
        bad = next((i for i in left if of_user[pairs[i][0]] < k or of_item[pairs[i][1]] < k), None)
        if bad is None:
            break
        left.remove(bad)
    assert k_core(users, items, k).nonzero()[0].tolist() == left


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5)), max_size=40))
def test_first_of_pairs_and_order_are_those_of_brute_force(rows):
    reviews = amazon.Reviews(
        [f"u{n}" for n in range(4)],
        [f"i{n}" for n in range(4)],
        *(np.array([row[side] for row in rows], dtype=np.int64) for side in range(3)),
        [],
    )
    first = {}
    for place, (user, item, _) in sorted(enumerate(rows), key=lambda entry: (entry[1][2], entry[0])):
        first.setdefault((user, item), place)
    assert first_of_pairs(reviews).nonzero()[0].tolist() == sorted(first.values())
    if rows:
        names, items, times = sequences(reviews)
        for name, of_items, of_times in zip(names, items, times, strict=True):
            mine = sorted((row[2], place) for place, row in enumerate(rows) if f"u{row[0]}" == name)
            assert of_times == [time for time, _ in mine]
            assert of_items == [f"i{rows[place][1]}" for _, place in mine]
        assert len(names) == len({row[0] for row in rows})


def test_window_titles_and_repeats(tmp_path):
    day = 86_400
    times = [0, day, 2 * day, 2 * day]
    lines = [
        review("A", "B1", times[0]),
        review("A", "B2", times[1]),
        review("A", "B2", times[2]),
        review("A", "B3", times[3]),
    ]
    reviews = read_reviews(write_lines(tmp_path / "r.json.gz", lines))
    left = lambda **options: Filter(k=1, **options).apply(reviews, {"B1": "x", "B2": "a b c", "B3": ""}).times.tolist()  # noqa: E731
    assert left() == [0, day, 2 * day]  # B2 once
    assert left(repeats="keep") == [0, day, 2 * day, 2 * day]
    assert left(since="1970-01-02", until="1970-01-03", repeats="keep") == [day]
    assert left(max_title_words=2) == [0]  # B3 has no title
    with pytest.raises(InputError, match="of 4 reviews from 1970-01-01 to 1970-01-03 3 pass, none in a 9-core"):
        Filter(k=9).apply(reviews)
    with pytest.raises(InputError, match="'soon' is no date"):
        Filter(since="soon")
    with pytest.raises(InputError, match="the window from 2018-01-02 until 2018-01-02 holds no day"):
        Filter(since="2018-01-02", until="2018-01-02")


def test_addresses():
    core, products = urls("Office_Products", "2018", 5)
    assert core.endswith("/amazon_v2/categoryFilesSmall/Office_Products_5.json.gz")
    assert products.endswith("/amazon_v2/metaFiles2/meta_Office_Products.json.gz")
    assert urls("Beauty", "2014", 3)[0].endswith("/categoryFiles/reviews_Beauty.json.gz")  # not the 5-core
    with pytest.raises(InputError, match="'Office Products' is no category; names are written like Office_Products"):
        urls("Office Products", "2018", 5)


# ------------------------------------------------------------------------------------------------- the whole way


def raw_files(folder, users=40, items=24, seed=0):
    """Reviews of two kinds of products; each user likes one kind."""
    rng = np.random.default_rng(seed)
    lines, kinds = [], ["brass lamp shade", "cotton towel soft"]
    names = [f"B{number:09d}" for number in range(items)]
    for user in range(users):
        liked = names[user % 2 :: 2]
        for step, item in enumerate(rng.permutation(liked)[:9]):
            lines.append(review(f"A{user}", str(item), 86_400 * int(user + 3 * step), reviewText="fine"))
    products = [
        json.dumps(
            {"asin": name, "title": f"{kinds[number % 2]} model {number % 7}", "category": ["Home", kinds[number % 2]]}
        )
        for number, name in enumerate(names[:-1])  # one has no metadata
    ]
    rng.shuffle(lines)
    return write_lines(folder / "reviews.json.gz", [*lines, "{"]), write_lines(folder / "meta.json.gz", products)


def test_raw_files_become_a_folder_that_loads(tmp_path):
    reviews, products = raw_files(tmp_path)
    said = list(build("Home", tmp_path / "home", tmp_path, Filter(), "2018", reviews, products))
    assert any("1 broken lines" in line and "line 361" in line for line in said)
    assert any("1 of 24 items have no metadata" in line for line in said)
    assert "360 interactions of 24 items by 40 users are left" in said
    interactions = Interactions.load(tmp_path / "home")
    assert interactions.num_items == 24
    assert sorted(map(len, interactions.items)) == [9] * 40
    assert all(days == sorted(days) for days in interactions.days)
    # by hand: 40 x 8 = 320 rows, cut at 256 and 288
    split = interactions.published()
    assert [len(part) for part in (split.train, split.valid, split.test)] == [256, 32, 32]
    catalog, _ = tokenize_folder(tmp_path / "home", "sids", TokenizerConfig("rkmeans", (4, 4, 4)))
    loaded = Catalog.load(tmp_path / "home")
    assert loaded.sids.equal(catalog.sids)
    assert loaded.titles.count("") == 1
    same = list(build("Home", tmp_path / "home", tmp_path, Filter(), "2018", reviews, products))
    assert same == [f"{tmp_path / 'home'} was made before, with the same settings"]
    with pytest.raises(InputError, match="holds other data already"):
        list(build("Home", tmp_path / "home", tmp_path, Filter(4), "2018", reviews, products))
    with pytest.raises(InputError, match="no user has 3 items"):
        list(build("Home", tmp_path / "none", tmp_path, Filter(1, until="1970-01-04"), "2018", reviews, products))
    # the same files give the same bytes
    again = tmp_path / "again"
    list(build("Home", again, tmp_path, Filter(), "2018", reviews, products))
    for name in ("items", "sequences", "test"):
        assert (again / f"{name}.tsv.gz").read_bytes() == (tmp_path / "home" / f"{name}.tsv.gz").read_bytes()


def test_files_that_do_not_fit_leave_no_folder(tmp_path):
    reviews, products = raw_files(tmp_path)
    for files, message in (
        ((reviews, reviews), r"reviews\.json\.gz: no title of any of the 24 items\. Is it a file of products\?"),
        ((reviews, tmp_path / "none"), "none is not a file"),
        ((tmp_path / "none", products), "none is not a file"),
    ):
        with pytest.raises(InputError, match=message):
            list(build("Home", tmp_path / "home", tmp_path, Filter(), "2018", *files))
        assert not (tmp_path / "home").exists()


def test_too_few_interactions_for_a_cut_in_time_leave_one_out(tmp_path):
    lines = [review("A1", f"B{number:09d}", number * 86_400) for number in range(3)]
    reviews = write_lines(tmp_path / "r.json.gz", lines)
    products = write_lines(
        tmp_path / "m.json.gz", [json.dumps({"asin": f"B{n:09d}", "title": "hat"}) for n in range(3)]
    )
    # two rows, cut at 1.6 and 1.8: one to train, none to validate, one to test
    said = list(build("Tiny shop", tmp_path / "tiny", tmp_path, Filter(1), "2018", reviews, products))
    assert any("leave-one-out is the only split" in line for line in said)
    assert not Interactions.load(tmp_path / "tiny").has_published


def test_numbers_say_nothing_of_who_came_first():
    names = [f"B{number:09d}" for number in range(1000)]
    numbers = amazon.numbered(names)
    assert sorted(numbers.values()) == list(range(1000))
    order = np.array([numbers[name] for name in names])
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1  # 1/sqrt(1000) is .03


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=6), st.integers(1, 3))
def test_the_chronological_cut_is_that_of_brute_force(times, longest):
    times = [sorted(of_user) for of_user in times]
    items = [[10 * user + at for at in range(len(of_user))] for user, of_user in enumerate(times)]
    names = [f"u{user}" for user in range(len(times))]
    pairs = chronological_pairs(names, items, times, longest=longest)
    rows = [(times[user][end], user, end) for user in range(len(items)) for end in range(1, len(items[user]))]
    rows.sort(key=lambda row: row[0])  # Python's sort keeps the order of equal times
    for part, (low, high) in ((pairs.valid, (0.8, 0.9)), (pairs.test, (0.9, 1))):
        expected = rows[int(len(rows) * low + 1e-9) : int(len(rows) * high + 1e-9)]
        assert part.target == [items[user][end] for _, user, end in expected]
        assert part.user == [names[user] for _, user, _ in expected]
        assert part.history == [items[user][max(0, end - longest) : end] for _, user, end in expected]
    last = max((time for time, _, _ in rows[: int(len(rows) * 0.8 + 1e-9)]), default=-1)
    sequences = dict(zip(pairs.users, pairs.sequences, strict=True))
    for user, name in enumerate(names):
        later = [
            t for part in (pairs.valid, pairs.test) for u, t in zip(part.user, part.target, strict=True) if u == name
        ]
        if name in sequences:
            assert sequences[name] + sorted(later) == items[user]  # nothing is lost, nothing in two parts
        else:  # everything of this user is later than the cut
            assert items[user][1:] == sorted(later)
        assert (name in sequences) == (times[user][0] <= last or len(later) < len(items[user]) - 1)


@pytest.mark.parametrize(("place", "train_rows"), [("office", 38_924), ("industrial", 36_259)])
def test_the_chronological_cut_is_the_published_one(shared_data, place, train_rows):
    """Published rows are the last of all rows of these users, and the counts are those of an 8:1:1 cut of all users.

    Days are all that is known of times, so rows of the day on which a part begins may stand on either side of it.
    """
    interactions = Interactions.load(shared_data / place)
    published = interactions.published_pairs
    valid, test = len(published.valid), len(published.test)
    total = train_rows + valid + test
    assert (total * 8 // 10, total * 9 // 10) == (train_rows, train_rows + valid)
    known = sum(len(items) - 1 for items in interactions.items)
    parts = (known - valid - test, valid, test)  # train rows of other users are not known, and all are earlier
    pairs = chronological_pairs(interactions.user_ids, interactions.items, interactions.days, parts)
    of_user = {user: number for number, user in enumerate(interactions.user_ids)}

    def day(row):
        """Of the target; a user who did the same twice did it on days that are next to each other."""
        user, history, target = row
        items = interactions.items[of_user[user]]
        places = [
            at for at, item in enumerate(items) if item == target and items[max(0, at - 10) : at] == list(history)
        ]
        return interactions.days[of_user[user]][places[-1]]

    counted = lambda rows: Counter(zip(rows.user, map(tuple, rows.history), rows.target, strict=True))  # noqa: E731
    for mine, theirs in ((pairs.valid, published.valid), (pairs.test, published.test)):
        rows, others = counted(mine), counted(theirs)
        borders = {min(map(day, others)), max(map(day, others))}
        apart = [row for row in (rows - others) + (others - rows) if day(row) not in borders]
        assert not apart
        assert (rows & others).total() >= 0.97 * len(theirs)


# ------------------------------------------------------------------------------------------------------ downloading


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves `body`, but breaks off after a third of what is asked for, as often as `breaks` says."""

    body = b""
    breaks = 0
    ranges = True
    version = None
    astray = 0
    asked: ClassVar[list] = []

    def do_GET(self):
        kind = type(self)
        wanted = self.headers.get("Range")
        kind.asked.append(wanted)
        if self.path.endswith("missing"):
            self.send_error(404)
            return
        same = self.headers.get("If-Range", kind.version) == kind.version
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and kind.ranges and same else 0
        if start >= len(kind.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(kind.body)}")
            self.end_headers()
            return
        rest = kind.body[start:]
        self.send_response(206 if start else 200)
        if start:
            first = start + kind.astray
            self.send_header("Content-Range", f"bytes {first}-{len(kind.body) - 1}/{len(kind.body)}")
        self.send_header("Content-Length", str(len(rest)))
        if kind.version:
            self.send_header("ETag", kind.version)
        self.end_headers()
        if kind.breaks:
            kind.breaks -= 1
            rest = rest[: max(1, len(rest) // 3)]
        self.wfile.write(rest)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    kind = type("Served", (Flaky,), {"asked": [], "body": np.random.default_rng(0).bytes(3_000_000)})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield kind, f"http://127.0.0.1:{running.server_address[1]}/file.json.gz"
    running.shutdown()
    running.server_close()


def test_a_broken_connection_is_gone_on_from(server, tmp_path):
    kind, url = server
    kind.breaks = 3
    path = download(url, tmp_path / "deep" / "file.json.gz", pause=0)
    assert path.read_bytes() == kind.body
    assert kind.asked[0] is None
    assert len(kind.asked) == 4
    assert all(wanted.startswith("bytes=") for wanted in kind.asked[1:])
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json.gz"]  # no half is left
    assert download(url, path) == path
    assert len(kind.asked) == 4  # it was there


def test_a_server_that_knows_no_ranges_starts_again(server, tmp_path):
    kind, url = server
    kind.ranges, kind.breaks = False, 2
    assert download(url, tmp_path / "file", pause=0).read_bytes() == kind.body


def test_what_came_in_an_earlier_call_is_kept(server, tmp_path):
    kind, url = server
    (tmp_path / "file.part").write_bytes(kind.body[:1000])
    assert download(url, tmp_path / "file").read_bytes() == kind.body
    assert kind.asked == ["bytes=1000-"]
    (tmp_path / "whole.part").write_bytes(kind.body)
    assert download(url, tmp_path / "whole").read_bytes() == kind.body
    (tmp_path / "other.part").write_bytes(kind.body + b"more than there is")
    assert download(url, tmp_path / "other", pause=0).read_bytes() == kind.body


def test_another_part_than_was_asked_for_is_not_kept(server, tmp_path):
    kind, url = server
    kind.astray = 5
    (tmp_path / "file.part").write_bytes(kind.body[:1000])
    assert download(url, tmp_path / "file", pause=0).read_bytes() == kind.body
    assert kind.asked == ["bytes=1000-", None]


def test_another_version_of_the_file_is_fetched_from_the_start(server, tmp_path):
    kind, url = server
    kind.version, kind.ranges, kind.breaks = '"first"', False, 9
    with pytest.raises(InputError, match="1 times in a row"):  # the second connection brings a third again
        download(url, tmp_path / "file", attempts=1, pause=0)
    kind.ranges, kind.breaks = True, 0
    kind.version, kind.body = '"second"', kind.body[::-1]
    assert download(url, tmp_path / "file", pause=0).read_bytes() == kind.body
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_not_the_servers_fault(server, tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    kind, url = server
    (tmp_path / "file.part").symlink_to(full)
    with pytest.raises(OSError, match=r"No space left on device.*file\.part"):
        download(url, tmp_path / "file", pause=0)
    assert len(kind.asked) == 1


def test_what_cannot_be_fetched_says_so(server, nobody, tmp_path):
    _, url = server
    with pytest.raises(InputError, match="missing: 404"):
        download(f"{url}/missing", tmp_path / "file")
    with pytest.raises(InputError, match="2 times in a row"):
        download(f"{nobody}/file", tmp_path / "file", attempts=2, pause=0)

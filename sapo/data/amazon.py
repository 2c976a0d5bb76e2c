"""Amazon Reviews of 2014 and 2018: raw files to users, items and times, filtered, ordered and with cleaned text.

Raw files are streamed; what is kept of a review is 16 bytes, and of a product its text, if it stays.

    read_reviews    who reviewed what and when; JSON lines or ratings CSV, gzip-compressed or not
    k_core          the reviews whose users and items have k each
    sequences       every user's items in time order
    read_products   titles, brands, categories and descriptions
    build           all of it, into a data folder
"""

import ast
import csv
import gzip
import hashlib
import html
import json
import re
import zlib
from array import array
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from sapo.common.files import read_lines, write_atomically
from sapo.common.progress import progress_bar
from sapo.data.download import download
from sapo.data.interactions import DAY_LIMIT, Interactions, chronological_pairs
from sapo.data.tsv import write_table
from sapo.errors import InputError

Release = Literal["2018", "2014"]
HOSTS = {
    "2018": "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2",
    "2014": "https://snap.stanford.edu/data/amazon/productGraph",
}
# Category of each release -> where its files lie under the host: reviews of the 5-core, all reviews, products.
FILES = {
    "2018": ("categoryFilesSmall/{}_5.json.gz", "categoryFiles/{}.json.gz", "metaFiles2/meta_{}.json.gz"),
    "2014": ("categoryFiles/reviews_{}_5.json.gz", "categoryFiles/reviews_{}.json.gz", "categoryFiles/meta_{}.json.gz"),
}
DAY = 24 * 60 * 60
LOOKED_AT = 1000  # first lines that decide whether a file is what it should be
ASIN = re.compile(r"""["']asin["']\s*:\s*["']([^"']+)["']""")
CATEGORY = re.compile(r"\w+")
TAG = re.compile(r"<(script|style)\b[^<]*(?:<(?!/\1)[^<]*)*</\1\s*>|</?[a-z!][^<>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Reviews:
    """R reviews in the order of their file; names by number, in order of first appearance."""

    user_names: list[str]
    item_names: list[str]
    users: Int[ndarray, "R"]
    items: Int[ndarray, "R"]
    times: Int[ndarray, "R"]  # seconds since 1970
    broken: list[int]  # numbers of lines that are no review

    def take(self, kept: Bool[ndarray, "R"]) -> "Reviews":
        """Some of the reviews; names stay."""
        return Reviews(
            self.user_names, self.item_names, self.users[kept], self.items[kept], self.times[kept], self.broken
        )


@dataclass(frozen=True)
class Product:
    """Cleaned text of one product; empty where unknown."""

    title: str
    brand: str
    category: str  # a path from general to special, joined by commas
    description: str


def urls(category: str, release: Release, k: int) -> tuple[str, str]:
    """Where the reviews and the products of a category are. The 5-core is enough for a k-core of 5 and more, within any
    window: what is a core of a part is in the core of the whole.

    Raises:
        InputError: a name that no category has.
    """
    if not CATEGORY.fullmatch(category):
        raise InputError(f"{category!r} is no category; names are written like Office_Products.")
    core, every, products = FILES[release]
    host = HOSTS[release]
    return f"{host}/{(core if k >= 5 else every).format(category)}", f"{host}/{products.format(category)}"


def read_reviews(path: str | Path) -> Reviews:
    """Stream a file of reviews: JSON objects with reviewerID, asin and unixReviewTime, one a line, or, if its name has
    .csv, ratings of an item by a user at a time. Lines that are neither are counted.

    Raises:
        InputError: most of the first lines are no reviews; damaged gzip.
    """
    path = Path(path)
    is_csv = ".csv" in path.suffixes
    item_first = is_csv and _item_comes_first(path)
    users, items, times, broken = array("i"), array("i"), array("q"), array("q")
    user_numbers: dict[str, int] = {}
    item_numbers: dict[str, int] = {}
    for number, line in enumerate(_lines(path, "reviews"), start=1):
        try:
            if is_csv:
                first, second, _, moment = next(csv.reader([line]))
                user, item = (second, first) if item_first else (first, second)
            else:
                review = json.loads(line)
                user, item, moment = review["reviewerID"], review["asin"], review["unixReviewTime"]
            seconds = int(moment)
            named = all(isinstance(name, str) and name and name.isascii() for name in (user, item))
            if not named or not 0 <= seconds < DAY_LIMIT * DAY:
                raise ValueError
        except (ValueError, TypeError, KeyError, StopIteration, OverflowError, RecursionError, csv.Error):
            if is_csv and number == 1 and not any(character.isdigit() for character in line):
                continue  # names of columns
            broken.append(number)
            if number == LOOKED_AT and len(broken) > LOOKED_AT // 2:
                raise _no_reviews(path, is_csv) from None
            continue
        users.append(user_numbers.setdefault(user, len(user_numbers)))
        items.append(item_numbers.setdefault(item, len(item_numbers)))
        times.append(seconds)
    if len(broken) >= len(users):
        raise _no_reviews(path, is_csv)
    return Reviews(
        list(user_numbers), list(item_numbers), np.array(users), np.array(items), np.array(times), broken.tolist()
    )


def first_of_pairs(reviews: Reviews) -> Bool[ndarray, "R"]:
    """Which reviews are the first in time of their user and item; of the same time, the first in the file."""
    pairs = reviews.users.astype(np.int64) * len(reviews.item_names) + reviews.items
    order = np.lexsort((np.arange(len(pairs)), reviews.times, pairs))
    ordered = pairs[order]
    is_first = np.ones(len(pairs), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    kept = np.zeros(len(pairs), bool)
    kept[order[is_first]] = True
    return kept


def k_core(users: Int[ndarray, "R"], items: Int[ndarray, "R"], k: int) -> Bool[ndarray, "R"]:
    """The largest set of interactions in which every user and every item has at least k; it is unique."""
    kept = np.ones(len(users), bool)
    while True:
        enough = np.ones(len(users), bool)
        for numbers in (users, items):
            counts = np.bincount(numbers[kept], minlength=int(numbers.max(initial=-1)) + 1)
            enough &= counts[numbers] >= k
        if not (kept & ~enough).any():
            return kept
        kept &= enough


def numbered(names: Collection[str]) -> dict[str, int]:
    """Numbers 0..N-1 in the order of hashes, so that a number says nothing of who came first."""
    return {
        name: number for number, name in enumerate(sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest()))
    }


def sequences(reviews: Reviews) -> tuple[list[str], list[list[str]], list[list[int]]]:
    """Every user, its items in time order, and their times. Of the same time, the first in the file comes first."""
    order = np.lexsort((np.arange(len(reviews.users)), reviews.times, reviews.users))
    users = reviews.users[order]
    names, items, times = [], [], []
    for part in np.split(order, np.flatnonzero(np.diff(users)) + 1):
        names.append(reviews.user_names[reviews.users[part[0]]])
        items.append([reviews.item_names[item] for item in reviews.items[part]])
        times.append(reviews.times[part].tolist())
    return names, items, times


def read_products(path: str | Path, wanted: Collection[str], longest: int = 200) -> tuple[dict[str, Product], int]:
    """Stream a file of products, and keep the wanted ones, the first line of each; also how many lines were broken.

    Lines are JSON, or, in the release of 2014, Python literals. Descriptions are cut at `longest` characters.

    Raises:
        InputError: most of the first lines name no product; damaged gzip.
    """
    path = Path(path)
    found: dict[str, Product] = {}
    broken, number = 0, 0
    for number, line in enumerate(_lines(path, "products"), start=1):
        name = ASIN.search(line)
        if name is None:
            broken += 1
            if number == LOOKED_AT and broken > LOOKED_AT // 2:
                break
        elif name[1] in wanted and name[1] not in found:
            fields = _fields(line)
            if fields is None:
                broken += 1
            else:
                found[name[1]] = _product(fields, longest)
    if broken >= max(1, number - broken):
        raise InputError(
            f"{path}: no products. A line must be a JSON object (or a Python literal) with asin and title."
        )
    return found, broken


def clean(text: object) -> str:
    """Plain text on one line: entities decoded, tags, scripts and line breaks removed."""
    if isinstance(text, list):
        text = " ".join(part for part in text if isinstance(part, str))
    if not isinstance(text, str):
        return ""
    text = html.unescape(html.unescape(text)).encode("utf-8", "replace").decode()  # some are escaped twice, or cut
    return " ".join(TAG.sub(" ", text).split())


def _product(fields: dict[str, Any], longest: int) -> Product:
    names: Any = fields.get("category")
    if not names and isinstance(paths := fields.get("categories"), list) and paths:
        names = paths[0]
    path = [clean(name) for name in names] if isinstance(names, list) else [clean(names)]
    title, description = clean(fields.get("title")), clean(fields.get("description"))
    if len(description) > longest:  # not in the middle of a word
        description = description[: longest + 1].rsplit(" ", 1)[0][:longest]
    return Product(title, clean(fields.get("brand")), ",".join(filter(None, path)), description)


def _fields(line: str) -> dict[str, Any] | None:
    for parse in (json.loads, ast.literal_eval):
        try:
            fields = parse(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return fields if isinstance(fields, dict) else None
    return None


def _item_comes_first(path: Path) -> bool:
    """The two releases differ in it. A product id has ten characters, and hardly any user id has."""
    first = second = 0
    for number, line in enumerate(_lines(path, "")):
        fields = line.split(",")
        if number == LOOKED_AT:
            break
        if len(fields) == 4:
            first, second = first + (len(fields[0]) == 10), second + (len(fields[1]) == 10)
    return first > second


def _no_reviews(path: Path, is_csv: bool) -> InputError:
    expected = "user,item,rating,time" if is_csv else "a JSON object with reviewerID, asin and unixReviewTime"
    return InputError(f"{path}: no reviews. A line must be {expected}.")


def _lines(path: Path, title: str) -> Iterator[str]:
    """Lines of a file, compressed or not, with a bar of bytes if it has a title.

    Raises:
        InputError: no such file, damaged gzip.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file.")
    number = 0
    try:
        with path.open("rb") as raw, progress_bar(title, total=path.stat().st_size if title else 0) as bar:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if compressed else raw as file:
                for number, line in enumerate(read_lines(file, path), start=1):
                    if title and number % 4096 == 0:
                        bar.update(raw.tell() - bar.n)
                    yield line.decode("utf-8", "replace").strip()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}, after line {number}: not a whole gzip file ({error}); delete it, and copy or download it again."
        ) from error


@dataclass(frozen=True)
class Filter:
    """Which reviews stay. Times are days of UTC; the window is [since, until)."""

    k: int = 5
    since: str | None = None
    until: str | None = None
    repeats: Literal["first", "keep"] = "first"
    max_title_words: int | None = None

    def __post_init__(self) -> None:
        since, until = (None if day is None else _seconds(day) for day in (self.since, self.until))
        if since is not None and until is not None and since >= until:
            raise InputError(f"the window from {self.since} until {self.until} holds no day.")

    def apply(self, reviews: Reviews, titles: dict[str, str] | None = None) -> Reviews:
        """The window, then titles, then repeats, then the k-core of what is left.

        Args:
            titles: of items, for `max_title_words`.

        Raises:
            InputError: nothing is left.
        """
        first, last = (datetime.fromtimestamp(at(reviews.times), UTC).date() for at in (np.min, np.max))
        kept = np.ones(len(reviews.users), bool)
        for day, side in ((self.since, np.greater_equal), (self.until, np.less)):
            if day is not None:
                kept &= side(reviews.times, _seconds(day))
        if self.max_title_words is not None and titles is not None:
            words = np.array([len(titles.get(name, "").split()) for name in reviews.item_names])
            kept &= ((words > 0) & (words <= self.max_title_words))[reviews.items]
        reviews = reviews.take(kept)
        if self.repeats == "first":
            reviews = reviews.take(first_of_pairs(reviews))
        core = reviews.take(k_core(reviews.users, reviews.items, self.k))
        if not len(core.users):
            raise InputError(
                f"nothing is left: of {len(kept)} reviews from {first} to {last} {len(reviews.users)} pass, none in a "
                f"{self.k}-core."
            )
        return core


def build(
    category: str,
    folder: Path,
    raw: Path,
    kept: Filter,
    release: Release = "2018",
    reviews_path: Path | None = None,
    products_path: Path | None = None,
    chronological: bool = True,
) -> Iterator[str]:
    """Write sequences.tsv.gz, rows of the chronological cut, amazon.json (of what it was made), and last items.tsv.gz;
    yields what was found. A folder that holds the same already is left as it is.

    Users and items are numbered in an order that says nothing. A user of fewer than 3 items is left out.

    Raises:
        InputError: files that are no reviews or products, or cannot be fetched; nothing is left; a folder that holds
            other data.
    """
    source = {
        "category": category,
        "release": release,
        "reviews": reviews_path and str(reviews_path),
        "products": products_path and str(products_path),
        "chronological": chronological,
        **asdict(kept),
    }
    made = folder / "amazon.json"
    if any(folder.glob("items.tsv*")):
        if not made.is_file() or json.loads(made.read_text()) != source:
            raise InputError(
                f"{folder} holds other data already; SIDs and policies of other items must not stay. Name another."
            )
        yield f"{folder} was made before, with the same settings"
        return
    for named in filter(None, (reviews_path, products_path)):
        if not named.is_file():  # before the other one is read or fetched
            raise InputError(f"{named} is not a file.")
    if reviews_path is None or products_path is None:
        fetched = [(url, raw / release / url.rpartition("/")[2]) for url in urls(category, release, kept.k)]
        for given, (url, path) in zip((reviews_path, products_path), fetched, strict=True):
            if given is None and not path.is_file():
                yield f"downloading {url}"
                download(url, path)
        reviews_path, products_path = reviews_path or fetched[0][1], products_path or fetched[1][1]
    reviews = read_reviews(reviews_path)
    yield f"{len(reviews.users):,} reviews of {len(reviews.item_names):,} items by {len(reviews.user_names):,} users"
    if reviews.broken:
        yield f"{len(reviews.broken):,} broken lines in {reviews_path}, the first is line {reviews.broken[0]}"
    products: dict[str, Product] = {}
    titles, broken = None, 0
    if kept.max_title_words is not None:  # then texts decide what stays, and are read first
        products, broken = read_products(products_path, set(reviews.item_names))
        titles = {name: product.title for name, product in products.items()}
    core = kept.apply(reviews, titles)
    names, items, times = sequences(core)
    long = [row for row, sequence in enumerate(items) if len(sequence) >= 3]
    if not long:
        raise InputError("no user has 3 items, of which one is to train, one to validate and one to test.")
    numbers = numbered({name for row in long for name in items[row]})
    if titles is None:
        products, broken = read_products(products_path, numbers)
    if broken:
        yield f"{broken:,} broken lines in {products_path}"
    missing = sum(name not in products for name in numbers)
    if missing:
        yield f"{missing:,} of {len(numbers):,} items have no metadata; their texts are empty"
    if not any(products[name].title for name in numbers if name in products):
        raise InputError(f"{products_path}: no title of any of the {len(numbers):,} items. Is it a file of products?")
    order = numbered([names[row] for row in long])
    long.sort(key=lambda row: order[names[row]])
    users = [f"u{number}" for number in range(len(long))]
    coded = [[numbers[name] for name in items[row]] for row in long]
    moments = [times[row] for row in long]
    pairs = chronological_pairs(users, coded, moments) if chronological else None
    if pairs and not (len(pairs.valid) and len(pairs.test)):
        yield "too few interactions for a chronological cut; leave-one-out is the only split"
        pairs = None
    days = [[moment // DAY for moment in row] for row in moments]
    empty = Product("", "", "", "")
    texts = [products.get(name, empty) for name in numbers]
    Interactions(users, coded, len(numbers), pairs, days).save(folder)
    with write_atomically(made) as temporary:
        temporary.write_text(json.dumps(source, indent=1))
    write_table(
        folder,
        "items",
        ["item_id", "title", "brand", "category", "description", "asin"],
        (
            (number, text.title, text.brand, text.category, text.description, name)
            for (name, number), text in zip(numbers.items(), texts, strict=True)
        ),
    )
    total = sum(map(len, coded))
    yield f"{total:,} interactions of {len(numbers):,} items by {len(users):,} users are left"


def _seconds(day: str) -> int:
    try:
        return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
    except ValueError as error:
        raise InputError(f"{day!r} is no date; write it as 2016-10-01.") from error

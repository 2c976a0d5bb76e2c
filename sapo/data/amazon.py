"""Amazon Reviews of 2014 and 2018: raw files to users, items and times, filtered, ordered and with cleaned text.

Raw files are streamed; what is kept of a review is 16 bytes, and of a product its text, if it stays.

    read_reviews    who reviewed what and when; JSON lines or ratings CSV, gzip-compressed or not
    k_core          the reviews whose users and items have k each
    sequences       every user's items in time order
    read_products   titles, brands, categories and descriptions
    build           all of it, into a data folder
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from sapo.common.files import write_atomically
from sapo.data.download import download
from sapo.data.interactions import Interactions, chronological_pairs
from sapo.data.preprocess import k_core, numbered
from sapo.data.readers.amazon import DAY, Product, Reviews, read_products, read_reviews
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
CATEGORY = re.compile(r"\w+")


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

"""Amazon's review files of 2014 and 2018: reviews and products, line by line."""

import ast
import csv
import gzip
import html
import json
import re
import zlib
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from sapo.common.files import read_lines
from sapo.common.progress import progress_bar
from sapo.data.interactions import DAY_LIMIT
from sapo.errors import InputError

DAY = 24 * 60 * 60
LOOKED_AT = 1000  # first lines that decide whether a file is what it should be
ASIN = re.compile(r"""["']asin["']\s*:\s*["']([^"']+)["']""")
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

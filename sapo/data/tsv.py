"""Plain TSV tables: read line by line with errors that name the place, written to the same bytes for the same content.

One header line, UTF-8, no quoting, gzip-compressed or not. Lists of integers are separated by single spaces.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sapo.common.files import read_lines, write_atomically
from sapo.errors import InputError


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: its fields by column, and where they stand."""

    path: Path
    line: int  # 1-based; the header is line 1
    fields: dict[str, str]

    def integer(self, column: str, limit: int) -> int:
        """The field as an integer in 0..limit-1."""
        return self._integer(column, self.fields[column], limit)

    def integers(self, column: str, limit: int) -> list[int]:
        """The field as one or more integers in 0..limit-1."""
        return [self._integer(column, text, limit) for text in self.fields[column].split(" ")]

    def error(self, column: str, problem: str) -> InputError:
        """An error about one field, to be raised."""
        return InputError(f"{self.path}, line {self.line}, column {column!r}: {problem}")

    def _integer(self, column: str, text: str, limit: int) -> int:
        # int() also takes signs, underscores, spaces and digits of other scripts
        if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) >= limit:
            raise self.error(column, f"{text[:40]!r} is not an integer from 0 to {limit - 1}.")
        return int(text)


class Table:
    """The file `<stem>.tsv.gz`, or `<stem>.tsv` where there is no compressed one.

    Args:
        folder: where the file lies.
        stem: its name without the suffixes.
        required: columns that must be there; others may be.

    Raises:
        InputError: no such folder or file, an empty file, a required column that is missing, a column given twice.
            While rows are read: another number of fields than columns, damaged gzip, text that is not UTF-8.
    """

    def __init__(self, folder: str | Path, stem: str, required: Sequence[str]):
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; a data folder holds {stem}.tsv.gz.")
        found = [path for path in (folder / f"{stem}.tsv.gz", folder / f"{stem}.tsv") if path.is_file()]
        if not found:
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise InputError(f"{folder} has neither {stem}.tsv.gz nor {stem}.tsv; it holds {there}.")
        self.path = found[0]
        self.columns = next(self._lines(), [])
        if not self.columns:
            raise InputError(f"{self.path} is empty; line 1 must name the columns {', '.join(required)}.")
        for column in required:
            if column not in self.columns:
                raise InputError(
                    f"{self.path}, line 1: no column {column!r}; the columns are {', '.join(map(repr, self.columns))}."
                )
        twice = [column for column in self.columns if self.columns.count(column) > 1]
        if twice:
            raise InputError(f"{self.path}, line 1: the column {twice[0]!r} appears twice.")

    def __iter__(self) -> Iterator[Row]:
        for number, fields in enumerate(self._lines(), start=1):
            if number == 1:
                continue
            if len(fields) != len(self.columns):
                raise InputError(
                    f"{self.path}, line {number}: {len(fields)} fields, but line 1 names {len(self.columns)} columns "
                    "(separated by single tabs, no quoting)."
                )
            yield Row(self.path, number, dict(zip(self.columns, fields, strict=True)))

    def _lines(self) -> Iterator[list[str]]:
        number = 0
        try:
            with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as file:
                for number, line in enumerate(read_lines(file, self.path), start=1):
                    # spreadsheets on Windows write a byte order mark and \r\n
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    yield text.removesuffix("\n").removesuffix("\r").split("\t")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}, line {number}: not UTF-8 ({error.reason}); save the table as UTF-8."
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"{self.path}, after line {number}: not a whole gzip file ({error}); copy or download it again."
            ) from error


def write_table(folder: str | Path, stem: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write `<stem>.tsv.gz` atomically. A list in a field is written with spaces between its members.

    Raises:
        InputError: a field that holds a tab or a line break, which the format has no way to quote.
    """
    lines = ["\t".join(columns)]
    for number, row in enumerate(rows, start=2):
        fields = [" ".join(map(str, field)) if isinstance(field, list) else str(field) for field in row]
        for column, field in zip(columns, fields, strict=True):
            if any(mark in field for mark in "\t\n\r"):
                raise InputError(
                    f"{stem}, line {number}, column {column!r}: {field[:40]!r} holds a tab or a line break."
                )
        lines.append("\t".join(fields))
    with write_atomically(Path(folder) / f"{stem}.tsv.gz") as path:
        path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))  # mtime 0: same content, same bytes


def fingerprint(content: object) -> str:
    """SHA-256 (hex) of nested lists, strings and integers."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()

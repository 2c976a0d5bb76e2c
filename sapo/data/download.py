"""One file over HTTP: with a progress bar, resumed where it broke off, checked by its size."""

import http.client
import io
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from sapo.common.progress import progress_bar
from sapo.errors import InputError

CHUNK = 2**20
TIMEOUT = 60.0  # seconds without a byte
# What a connection may raise; other errors are of this machine's files.
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(url: str, path: str | Path, attempts: int = 6, pause: float = 2.0) -> Path:
    """Fetch `url` to `path`, unless it is there.

    What came before a connection broke is kept beside it, and gone on from, also by a later call, unless the server
    says that it has another version of the file by now.

    Args:
        attempts: connections in a row that may bring nothing further.
        pause: seconds before the second of them, twice as many before each further one.

    Raises:
        InputError: a URL that is refused or does not exist, or `attempts` connections that brought nothing further.
        OSError: a file that cannot be written; the disk is full.
    """
    path = Path(path)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, mark = (path.with_name(f"{path.name}.{suffix}") for suffix in ("part", "version"))
    furthest, failed = _size(part), 0
    while True:
        try:
            if _fetch(url, part, mark):
                part.replace(path)
                mark.unlink(missing_ok=True)
                return path
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise InputError(
                    f"{url}: {error.code} {error.reason}; check the name, or download it by hand."
                ) from error
            problem = f"{error.code} {error.reason}"
        except BROKEN as error:
            problem = str(error) or type(error).__name__
        came = _size(part) > furthest  # a server without ranges starts again each time: that alone is no progress
        furthest, failed = max(furthest, _size(part)), 0 if came else failed + 1
        if failed >= attempts:
            kept = f"What came stays in {part}; the same command goes on." if part.exists() else "Nothing came."
            raise InputError(f"{url}: {problem}, {attempts} times in a row. {kept} A file of your own is read too.")
        wait = 0 if came else pause * 2 ** (failed - 1)
        print(f"{path.name}: {problem}; again{f' in {wait:g} s' if wait else ''}", file=sys.stderr)
        time.sleep(wait)


def _fetch(url: str, part: Path, mark: Path) -> bool:
    """Append what follows; whether the file is whole then, as far as the server tells its size.

    `mark` holds what the server calls this version of the file. A server that has another one sends it from the start.
    """
    start = _size(part)
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and mark.is_file():
        headers["If-Range"] = mark.read_text()
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing follows: it is whole, or another file has taken its place
            if error.headers.get("Content-Range", "").endswith(f"/{start}"):
                return True
            part.unlink()
            return False
        raise
    with answer:
        resumed = answer.status == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()  # another part than was asked for
            return False
        start = start if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        if not resumed:
            _remember(mark, answer.headers)
        with (
            part.open("ab" if resumed else "wb", buffering=0) as file,
            progress_bar(part.stem, total=total, start=start) as bar,
        ):
            while chunk := answer.read(CHUNK):
                _write(file, chunk, part)
                bar.update(len(chunk))
    return total is None or _size(part) == total


def _remember(mark: Path, headers: http.client.HTTPMessage) -> None:
    """An ETag that promises equal bytes, else the date of the file."""
    tag = headers.get("ETag", "")
    version = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
    if version:
        mark.write_text(version)
    else:
        mark.unlink(missing_ok=True)


def _write(file: io.FileIO, chunk: bytes, path: Path) -> None:
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0

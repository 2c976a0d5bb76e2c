"""One file over HTTP: with a progress bar, resumed where it broke off, checked by its size."""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from sapo.errors import InputError
from sapo.progress import progress_bar

CHUNK = 2**20
TIMEOUT = 60.0  # seconds without a byte


def download(url: str, path: str | Path, attempts: int = 6, pause: float = 2.0) -> Path:
    """Fetch `url` to `path`, unless it is there.

    What came before a connection broke is kept beside it, and gone on from, also by a later call.

    Args:
        attempts: connections in a row that may bring nothing.
        pause: seconds before the second of them, twice as many before each further one.

    Raises:
        InputError: a URL that is refused or does not exist, or `attempts` connections without a byte.
    """
    path = Path(path)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, failed = path.with_name(f"{path.name}.part"), 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _fetch(url, part, before):
                part.replace(path)
                return path
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise InputError(
                    f"{url}: {error.code} {error.reason}; check the name, or download it by hand."
                ) from error
            problem = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
        came = part.is_file() and part.stat().st_size > before
        failed = 0 if came else failed + 1
        if failed >= attempts:
            raise InputError(
                f"{url}: {problem}, {attempts} times in a row. What came stays in {part}; the same command goes on."
            )
        time.sleep(0 if came else pause * 2 ** (failed - 1))


def _fetch(url: str, part: Path, start: int) -> bool:
    """Append what follows byte `start`; whether the file is whole then, as far as the server tells its size."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing follows: it is whole, or another file has taken its place
            if error.headers.get("Content-Range", "").endswith(f"/{start}"):
                return True
            part.unlink()
            return False
        raise
    with answer:
        resumed = answer.status == 206
        start = start if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        with part.open("ab" if resumed else "wb") as file, progress_bar(part.stem, total=total, start=start) as bar:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            size = file.tell()
    return total is None or size == total

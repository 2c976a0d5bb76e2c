"""Files that are either whole or absent, and lines of files that others wrote."""

import errno
import gzip
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from safetensors import SafetensorError

from sapo.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

LONGEST_LINE = 2**25  # bytes; a file that unpacks into one endless line must not fill the memory
# What torch says when a checkpoint does not fit the disk; which of them depends on where in the file it ended.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Whatever the libraries raise where weights or checkpoints cannot be written becomes an OSError naming `path`."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_CANNOT_WRITE):
            raise
        raise OSError(
            errno.EIO, f"could not be written, most often because of a full disk ({error})", str(path)
        ) from error


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any error.

    A reader sees the earlier file or the whole later one, never a half. The temporary name keeps the suffix of
    `path`, because pandas and matplotlib choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_partial(), suffix="".join(path.suffixes), dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner reads
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def updating(folder: str | Path) -> Iterator[None]:
    """Who reads the tables of a folder and writes them with rows added does it alone; another process waits. Not to be
    nested."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(folder) / ".lock"):
        drop_halves(Path(folder).glob(".partial-*"))
        yield


@contextmanager
def write_folder_atomically(path: str | Path) -> Iterator[Path]:
    """The same for a folder: an existing folder at `path` is replaced only once the other one is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_partial(), dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        earlier = Path(f"{temporary}-earlier")
        if path.exists():
            path.replace(earlier)
        try:
            temporary.replace(path)
        except BaseException:
            if earlier.exists():
                earlier.replace(path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _partial() -> str:
    """How temporary names begin: whose they are."""
    return f".partial-{os.getpid()}-"


def drop_halves(partial: Iterable[Path]) -> None:
    """Of temporary files and folders, remove those of processes that are no more."""
    for path in partial:
        number = path.name.split("-")[1]  # as `_partial` names them
        if number.isdigit() and not _runs(int(number)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and does nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def read_lines(file: BufferedIOBase, path: str | Path) -> Iterator[bytes]:
    """Lines of a file that is open, their ends included.

    Raises:
        InputError: a line of more than 32 MiB.
    """
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise InputError(f"{path}, line {number}: longer than {LONGEST_LINE // 2**20} MiB; a line is one row.")
        yield line


def write_csv(table: "pd.DataFrame", path: Path) -> None:
    """A CSV, whole or absent; gzip where its name ends in .gz, without time stamp and name: same table, same bytes."""
    content = table.to_csv(index=False, lineterminator="\n").encode()
    with write_atomically(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)

"""Files and folders are whole or absent, whatever happens in between."""

import os

import pytest

from sapo.common.files import write_atomically, write_folder_atomically

INTERRUPTIONS = [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(1), ValueError("bad number")]
kind_of = pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda error: type(error).__name__)


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_file_appears_under_its_name_when_whole(tmp_path):
    path = tmp_path / "made" / "on the way" / "table.csv.gz"
    with write_atomically(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename is atomic within a file system only
        assert temporary.name.endswith(".csv.gz")  # pandas reads the compression off the name
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["table.csv.gz"]


def test_earlier_file_stands_until_the_later_is_whole(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("old")
    with write_atomically(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == ["results.csv"]


@kind_of
def test_interrupted_file(tmp_path, interruption):
    path = tmp_path / "results.csv"

    def write():
        with write_atomically(path) as temporary:
            temporary.write_text("ne")
            raise interruption

    with pytest.raises(type(interruption)):
        write()
    assert names(tmp_path) == []
    path.write_text("old")
    with pytest.raises(type(interruption)):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.csv"]


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "results.csv"
    with write_atomically(path) as one, write_atomically(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the outer one ends last
    assert names(tmp_path) == ["results.csv"]


def test_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "runs" / "seed0"
    with write_folder_atomically(path) as temporary:
        (temporary / "weights").write_text("1")
        (temporary / "deep").mkdir()
        assert not path.exists()
    assert names(path) == ["deep", "weights"]
    with write_folder_atomically(str(path)) as temporary:
        (temporary / "config").write_text("2")
        assert names(path) == ["deep", "weights"]
    assert names(path) == ["config"]
    assert path.stat().st_mode & 0o777 == 0o755
    assert names(path.parent) == ["seed0"]


@kind_of
def test_interrupted_folder(tmp_path, interruption):
    path = tmp_path / "seed0"

    def write():
        with write_folder_atomically(path) as temporary:
            (temporary / "weights").write_text("ne")
            raise interruption

    with pytest.raises(type(interruption)):
        write()
    assert names(tmp_path) == []
    path.mkdir()
    (path / "weights").write_text("old")
    with pytest.raises(type(interruption)):
        write()
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["seed0"]


def test_a_folder_is_never_missing_for_good(tmp_path, monkeypatch):
    """The rename itself fails: one of the two versions is still there."""
    path = tmp_path / "seed0"
    path.mkdir()
    (path / "weights").write_text("old")

    def fails(*_):
        raise OSError("rename failed")

    monkeypatch.setattr("pathlib.Path.replace", fails)
    with pytest.raises(OSError, match="rename failed"), write_folder_atomically(path) as temporary:
        (temporary / "weights").write_text("new")
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["seed0"]

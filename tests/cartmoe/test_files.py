"""Files and folders that are there whole or not at all, and who may remove what is left."""

import errno
import os
import socket
import subprocess
import sys

import pytest

from cartmoe import folders
from cartmoe.files import remove_leftovers, temporary, write_atomically
from cartmoe.folders import cached_folder, check_directory, damage, remove_folder, write_folder

NAMES = ["plain.json", "a-b.partial-c", "[1]*", "-", "ünï code"]


def names(path):
    return sorted(child.name for child in path.iterdir())


@pytest.fixture
def dead():
    """The number of a process that was."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_replaced_in_one_step(tmp_path, name):
    path = tmp_path / name
    write_atomically(path, b"first")
    write_atomically(path, "zweitens: ü\n")
    assert path.read_bytes() == "zweitens: ü\n".encode()
    assert names(tmp_path) == [name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr("cartmoe.files.sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", NAMES)
def test_leftovers_of_the_dead_alone(tmp_path, name, dead):
    here = socket.gethostname()
    left = [f".{name}.partial-{dead}-0-{here}", f".{name}.partial-0"]
    spared = [
        f".{name}.partial-{os.getpid()}-0-{here}",  # this process is alive
        f".{name}.partial-{dead}-0-not-{here}",  # nobody here knows
        f".other{name}.partial-0",  # of another name
        f"{name}.partial-0",  # the user's
    ]
    for i, each in enumerate(left + spared):
        (tmp_path / each).mkdir() if i % 2 else (tmp_path / each).write_text("begun")
    write_atomically(tmp_path / name, "done")
    assert names(tmp_path) == sorted([name, *spared])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([name, *spared[:2], spared[3]])
    remove_leftovers(tmp_path, locked=True)
    assert names(tmp_path) == sorted([name, spared[3]])


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    with temporary(tmp_path / "a") as first, temporary(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        assert first.exists()
    assert names(tmp_path) == []


def fill(folder):
    (folder / "a.txt").write_text("text")


def test_a_folder_goes_as_it_came(tmp_path, monkeypatch):
    """In one step: it has another name before the first of its files is deleted."""
    write_folder(tmp_path / "a", fill)
    monkeypatch.setattr("cartmoe.files.shutil.rmtree", lambda path, **_: None)
    remove_folder(tmp_path / "a")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.partial-")
    assert damage(left) is None


def test_a_folder_of_something_else_is_damaged(tmp_path):
    write_folder(tmp_path / "a", fill, key={"corpus": "x"})
    assert damage(tmp_path / "a", key={"corpus": "x"}) is None
    for key in ({"corpus": "y"}, None):
        assert damage(tmp_path / "a", key=key).startswith("manifest.json is of something else")


def test_a_new_format_is_another_folder(tmp_path, monkeypatch):
    """Old caches are passed over in silence."""
    old = cached_folder(tmp_path, "name", {"a": 1}, fill)
    monkeypatch.setattr(folders, "FORMAT", folders.FORMAT + 1)
    assert cached_folder(tmp_path, "name", {"a": 1}, fill) != old


def test_the_faster_process_stays(tmp_path):
    def fill_late(folder):
        cached_folder(tmp_path, "name", 1, fill)
        (folder / "a.txt").write_text("late")

    folder = cached_folder(tmp_path, "name", 1, fill_late)
    assert (folder / "a.txt").read_text() == "text"
    assert names(tmp_path) == [folder.name]


def test_a_file_in_the_way_of_a_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    check_directory(tmp_path)
    check_directory(tmp_path / "not" / "there")
    with pytest.raises(FileExistsError, match=r"file is a file; name a directory$"):
        check_directory(tmp_path / "file")
    with pytest.raises(FileExistsError, match=r"a/b is below \S*/file, which is a file; name a"):
        write_folder(tmp_path / "file" / "a" / "b", fill)
    assert names(tmp_path) == ["file"]


def test_what_cannot_be_made_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cached_folder(tmp_path, "name", 1, lambda folder: (folder / "nowhere" / "a").touch())
    assert names(tmp_path) == []

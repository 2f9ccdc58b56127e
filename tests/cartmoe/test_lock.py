"""One writer of a folder at a time."""

import os
import subprocess
import sys
import time

import pytest

from cartmoe.lock import LOCK, locked

COUNT = """
import sys
from pathlib import Path
from cartmoe.lock import locked
folder, file = Path(sys.argv[1]), Path(sys.argv[1], "number")
for _ in range(50):
    with locked(folder, wait=True):
        number = int(file.read_text()) if file.exists() else 0
        file.write_text(str(number + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from cartmoe.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_it_is_gone_afterwards(tmp_path):
    with locked(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK).read_text() == str(os.getpid())
        with locked(tmp_path / "new", "other"):  # another thing that is written there
            pass
    assert list((tmp_path / "new").iterdir()) == []


def test_refused(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match=f"is in use: process {os.getpid()} writes"),
        locked(tmp_path),
    ):
        pass


def test_a_killed_holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {child.pid} writes"), locked(tmp_path):
            pass
        child.kill()
    with locked(tmp_path):
        pass


def test_waiting(tmp_path):
    """Nobody's count is lost, though each removes the file that the others wait for."""
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    children = [subprocess.Popen(command) for _ in range(4)]
    end = time.monotonic() + 60
    assert [child.wait(max(1, end - time.monotonic())) for child in children] == [0] * 4
    assert (tmp_path / "number").read_text() == "200"


def test_a_file_in_the_way(tmp_path):
    place = tmp_path / "file"
    place.touch()
    with pytest.raises(FileExistsError, match="is a file; name a directory"), locked(place):
        pass

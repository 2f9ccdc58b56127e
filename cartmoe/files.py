"""Files and folders that are there whole or not at all.

What is written lies beside its place, under a name that tells who writes it, until it is complete
and on the disk; then it is renamed. What killed writers left is removed by the next one.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def path_of(name: str, value: object) -> Path:
    """The path that somebody gave as the argument of that name, ~ standing for a home. Raises
    `ValueError` for what is none."""
    if value == "":
        raise ValueError(f"{name} is ''; give a path")
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name} is a {type(value).__name__}; give a path")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} is {str(value)!r}, in which ~ is no home: {error}") from None


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write the file in one step: a crash or a full disk leaves the old one as it was."""
    with temporary(path) as new:
        new.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(new)
        new.replace(path)
    sync(path.parent)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name beside `path`, for a file or folder that becomes it by a rename within the block;
    what still has the name at the end is removed."""
    remove_leftovers(path.parent, path.name)
    writer = f"{os.getpid()}-{uuid.uuid4().hex}-{socket.gethostname()}"
    new = path.with_name(f".{path.name}.partial-{writer}")
    try:
        yield new
    finally:
        _remove(new)


def remove_leftovers(parent: Path, name: str = "*", *, locked: bool = False) -> None:
    """Remove what killed writers of parent/name left; "*" stands for any name.

    locked   nobody writes there now: nothing is spared. Else what a living process of this
             machine writes is, and all of other machines.
    """
    name = name if name == "*" else glob.escape(name)
    for path in parent.glob(f".{name}.partial-*"):
        if locked or not _may_be_written(path):
            _remove(path)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's entries, before we go on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _may_be_written(path: Path) -> bool:
    match path.name.rpartition(".partial-")[2].split("-", 2):
        case [pid, _, host] if host == socket.gethostname() and pid.isdecimal():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                return False
            except PermissionError:  # alive, of another user
                pass
            return True
        case [_, _, _]:  # of another machine
            return True
    return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

"""One writer of a folder at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cartmoe.folders import check_directory

LOCK = "lock"


@contextmanager
def locked(folder: Path, name: str = LOCK, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder, made if need be; the lock dies with the process, however it ends.

    name   of the file in it, gone afterwards, that stands for what is written: nothing else waits
    wait   until whoever holds it is done, in place of `ValueError` naming its process
    """
    check_directory(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with _held(path, wait):
        path.write_text(str(os.getpid()))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _held(path: Path, wait: bool) -> Iterator[None]:
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                holder = path.read_text().strip() if path.exists() else ""
                raise ValueError(
                    f"{path.parent} is in use: process {holder or 'unknown'} writes there"
                ) from None
            # Whoever held it may have removed the file meanwhile, and another have made a new one.
            if _stands_at(path, file):
                yield
                return


def _stands_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

"""The directory of a training run: what was asked for, its checkpoints, and who may write.

run.json       what was asked for, and what was found out at the start (precision, threads)
metrics.csv    a row for every step
checkpoints/   step-00000100, ...: the newest few
lock           held by the process that trains
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cartmoe.checkpoint import CHECKPOINTS, newest, run_checkpoints, step_of
from cartmoe.files import remove_leftovers, write_atomically
from cartmoe.folders import check_directory, remove_folder

RUN = "run.json"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the directory, made if need be; the lock dies with the process, however it ends.

    Raises `ValueError` if another process trains there.
    """
    check_directory(out)
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(f"{out} is in use: process {holder} trains there") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        remove_leftovers(out / CHECKPOINTS, locked=True)
        yield


def read_run(out: str | Path) -> dict[str, Any]:
    """What `start_run` wrote. Raises `FileNotFoundError` where there is no run."""
    path = Path(out) / RUN
    if not path.exists():
        raise FileNotFoundError(f"{out} is no run: it has no {RUN}")
    return json.loads(path.read_text(encoding="utf-8"))


def start_run(out: Path, asked: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """Write run.json: `asked` (groups of settings that decide every weight) and `found`."""
    write_atomically(out / RUN, json.dumps({"asked": asked, "found": found}, indent=1) + "\n")


def check_same(
    out: Path,
    there: Mapping[str, Mapping[str, Any]],
    asked: Mapping[str, Mapping[str, Any]],
    may_change: Iterable[str],
) -> None:
    """Raise `ValueError` naming what differs between a run and what is asked for now, unless only
    fields that may change do."""
    asked = json.loads(json.dumps(asked))  # as it would be read: tuples are lists
    differing = {
        field: f"{field} is {there.get(group, {}).get(field)!r} there, {value!r} asked for"
        for group, settings in asked.items()
        for field, value in settings.items()
        if there.get(group, {}).get(field) != value
    }
    if set(differing) - set(may_change):
        raise ValueError(
            f"{out} holds a run of another configuration ({'; '.join(differing.values())}); "
            "choose another directory, or ask for the same"
        )


def resume_point(out: Path) -> Path | None:
    """The newest good checkpoint, None before the first; damaged ones behind it are removed, since
    training comes by there once more. Warns and raises as `checkpoint.newest` does."""
    if not run_checkpoints(out):
        return None
    good = newest(out)
    for folder in run_checkpoints(out):
        if step_of(folder) > step_of(good):
            remove_folder(folder)
    return good


def keep_newest(out: Path, number: int) -> None:
    """Remove all checkpoints but the newest ones."""
    for folder in run_checkpoints(out)[:-number]:
        remove_folder(folder)

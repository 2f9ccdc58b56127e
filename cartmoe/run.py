"""The directory of a training run: what it is, its metrics, its checkpoints, and who may write.

run.json       what was asked for, and what was found out at the start (precision, threads)
metrics.csv    a row for every step
checkpoints/   step-00000100, ...: the newest few
lock           held by the process that trains
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cartmoe.checkpoint import CHECKPOINTS, newest, run_checkpoints, step_of
from cartmoe.files import write_atomically
from cartmoe.folders import remove_folder, remove_leftovers

RUN = "run.json"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the directory, made if need be; the lock dies with the process, however it ends.

    Raises `ValueError` if another process trains there.
    """
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
        remove_leftovers(out / CHECKPOINTS)
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


class Metrics:
    """metrics.csv: a header, and a row for each step, the step first.

    Opened after a kill it is cut back to `step`, the one that training goes on from: no row is
    lost, since `sync` comes before each checkpoint, and none is there twice.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        header = ",".join(columns) + "\n"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = [line for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]
        kept = [row for row in rows if int(row.split(",")[0]) <= step]
        write_atomically(path, header + "".join(kept))
        self._file: TextIO = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def add(self, row: Sequence[Any]) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

"""The directory of a training run: what was asked for, its checkpoints, and who may write.

run.json       what was asked for, and what was found out at the start (precision, threads)
metrics.csv    a row for every step; metrics.json its SHA-256
checkpoints/   step-00000100, ...: the newest few, and those of milestones
lock           held by the process that trains
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cartmoe.checkpoint import CHECKPOINTS, newest, run_checkpoints, step_of
from cartmoe.files import path_of, remove_leftovers
from cartmoe.folders import remove_folder
from cartmoe.lock import locked
from cartmoe.sealed import read_sealed, write_sealed

RUN = "run.json"


@contextmanager
def training_in(out: Path) -> Iterator[None]:
    """Hold the directory as `locked` does, and clear away what killed trainings left."""
    with locked(out):
        (out / CHECKPOINTS).mkdir(exist_ok=True)
        remove_leftovers(out / CHECKPOINTS, locked=True)
        yield


def read_run(out: str | Path) -> dict[str, Any]:
    """What `start_run` wrote. Raises `FileNotFoundError` where there is no run, `ValueError` for a
    file that is not as it was written."""
    path = path_of("out", out) / RUN
    if not path.exists():
        raise FileNotFoundError(f"{out} is no run: it has no {RUN}")
    return read_sealed(path)


def start_run(out: Path, asked: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """Write run.json: `asked` (groups of settings that decide every weight) and `found`."""
    write_sealed(out / RUN, {"asked": asked, "found": found})


def resumed(out: Path, cpu_capability: str) -> dict[str, Any]:
    """What was found at the run's start. Another kind of CPU, which rounds otherwise, is noted
    there, and warned of."""
    there = read_run(out)
    found = there["found"]
    known = [found["cpu_capability"], *found.get("resumed_on", [])]
    if cpu_capability not in known:
        warnings.warn(
            f"{out} was begun on a CPU with {known[0]} and goes on on one with {cpu_capability}: "
            "its weights will not be those of a run on one kind",
            stacklevel=2,
        )
        found["resumed_on"] = [*known[1:], cpu_capability]
        start_run(out, there["asked"], found)
    return found


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


def keep_newest(out: Path, number: int, milestones: Collection[int] = ()) -> None:
    """Remove all checkpoints but those of milestones, and of the others the newest ones."""
    others = [folder for folder in run_checkpoints(out) if step_of(folder) not in milestones]
    for folder in others[:-number]:
        remove_folder(folder)

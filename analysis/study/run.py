"""Running a study: train what is to be trained, measure what is missing, keep every cell."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from analysis.measure import Results, key_columns
from analysis.study.folder import PLAN, STORE, STREAMS, read
from analysis.study.machine import free_workers
from analysis.study.models import Checkpoint, check_bytes, trained
from analysis.study.plan import Plan, Work
from analysis.study.pool import Failure, InProcess, Pool
from analysis.study.provenance import default_device, manifest
from analysis.study.store import DamagedCells, Store
from analysis.study.study import Study, study_dict
from analysis.study.training import train_models
from cartmoe.files import path_of
from cartmoe.folders import check_directory
from cartmoe.lock import locked
from cartmoe.sealed import write_sealed


def run(
    study: Study | str | Path,
    out: str | Path,
    progress: bool = True,
    executor: Callable[[], Executor] | None = None,
    threads: int | None = None,
) -> Results:
    """Do what of the study is not done yet in `out`, and return its results.

    study      itself, or the path of its TOML
    executor   makes any `concurrent.futures.Executor` to measure with: `analysis.processes(4)`,
               which also trains as many models at a time, `analysis.dask("tcp://host:8786")`, or
               one of yours (of processes: spawned, not forked); None: in this process
    threads    of each process on a CPU; by default what the study says, then what the executor has,
               then 1, or for a model that is larger than memory all cores. Results are the same
               bits for the same number, wherever and with how many processes they are computed, on
               CPUs of one capability.

    A run that was stopped, however, goes on where it was: training from its last checkpoint, the
    measurement with the first cell that is not in `out`/results.sqlite. A cell that kills its
    workers costs no other one: it is noted as failed, and tried again by the next run. Cells that
    are not as they were written are measured anew, with a warning. Raises `ValueError` naming the
    process that runs a study in `out` already.
    """
    if not (executor is None or callable(executor)):
        raise ValueError(
            f"executor is {executor!r}; give what makes one, such as analysis.processes(4)"
        )
    out, study = path_of("out", out), study if isinstance(study, Study) else Study.read(study)
    # What can fail at once comes before training, which may take hours.
    check_directory(out)
    check_executor(executor)
    plan = Plan.of(study, threads_of(study, executor, threads))
    with locked(out), Store(out / STORE) as store:
        finished = _undamaged(store)
        work = _ready(plan, out, finished, trainers_of(study, executor, plan.threads), progress)
        write_sealed(out / PLAN, _described(plan, work))
        _measure_missing(plan, out, work, finished, store, executor, progress)
        try:
            return read(out)
        except DamagedCells as damaged:
            _forget(store, damaged)
        _measure_missing(plan, out, work, store.keys(), store, executor, progress)
        return read(out)


def _undamaged(store: Store) -> set[str]:
    """The finished cells; damaged ones are forgotten, with a warning."""
    try:
        store.failures()
        return store.keys()
    except DamagedCells as damaged:
        _forget(store, damaged)
        return _undamaged(store)


def _forget(store: Store, damaged: DamagedCells) -> None:
    warnings.warn(str(damaged).replace("run the study again to measure", "measuring"), stacklevel=3)
    store.remove(damaged.keys)


def check_executor(executor: Callable[[], Executor] | None) -> None:
    """Raise `ConnectionError` for a cluster that is not there."""
    getattr(executor, "check", lambda: None)()


def threads_of(
    study: Study, executor: Callable[[], Executor] | None, threads: int | None = None
) -> int | None:
    """Of each process that measures, as somebody chose."""
    return threads or study.measure.threads or getattr(executor, "threads", None)


def trainers_of(study: Study, executor: Callable[[], Executor] | None, threads: int) -> int:
    """How many models are trained at a time: on a GPU one, as many as processes of this machine
    measure, or where others measure, as many as it has cores and memory for."""
    if executor is None or default_device() != "cpu":
        return 1
    return getattr(executor, "workers", None) or free_workers(study.models, threads)


def _ready(plan: Plan, out: Path, finished: set[str], workers: int, progress: bool) -> list[Work]:
    """The cells of every model, in their order, those trained that are to be trained."""
    study = plan.study

    def checked(checkpoint: Checkpoint) -> Work:
        work = plan.work(checkpoint)
        if all(cell.key in finished for cell in work.cells):
            return work
        # It will be read, perhaps after hours of training others.
        return plan.work(check_bytes(study, checkpoint))

    found = [checked(there) if there else None for there in plan.find(out)]
    missing = [spec for spec, work in zip(study.models, found, strict=True) if not work]
    train_models(missing, out, workers, plan.threads, progress)
    each = zip(study.models, found, strict=True)
    return [work or plan.work(trained(spec, out)) for spec, work in each]


def _measure_missing(
    plan: Plan,
    out: Path,
    work: Sequence[Work],
    finished: set[str],
    store: Store,
    executor: Callable[[], Executor] | None,
    progress: bool,
) -> None:
    planned = {cell.key for w in work for cell in w.cells}
    missing = planned - finished
    if not missing:
        shutil.rmtree(out / STREAMS, ignore_errors=True)
        return
    if progress:
        tqdm.write(f"measuring {len(missing)} of {len(planned)} cells")
    attempts = store.failures().set_index("key").attempts.to_dict()
    streams = None
    if plan.study.measure.streams == "disk":
        streams = out.resolve() / STREAMS
    bar = tqdm(total=len(missing), unit="cell", disable=not progress)
    with bar, InProcess(bar.update) if executor is None else Pool(executor) as pool:
        tasks = [
            plan.tasks(work, keys, pool.workers, streams)
            for keys in (missing - attempts.keys(), missing & attempts.keys())
        ]
        # Closed at once when anything goes wrong here: workers do not go on.
        with closing(pool.run(*tasks)) as outcomes:
            for task, outcome in outcomes:
                bar.set_description(task.source.name)
                if isinstance(outcome, Failure):
                    (cell,) = task.cells
                    died = outcome.attempts + attempts.get(cell.key, 0)
                    store.fail(cell.identity, outcome.reason, died)
                else:
                    for cell, measured in zip(task.cells, outcome, strict=True):
                        store.add(cell.identity, measured)
                bar.update(len(task.cells) - pool.told)
    shutil.rmtree(out / STREAMS, ignore_errors=True)  # nothing is left that would go on from there


def _described(plan: Plan, work: Sequence[Work]) -> dict[str, Any]:
    """plan.json names every cell, so that results can be read without the models or the data."""
    study, texts = plan.study, plan.texts.values()
    return {
        "study": study_dict(study),
        "toml": study.definition,
        "corpus_fingerprint": next(iter(texts)).corpus.fingerprint,
        "contrasts": study.contrasts and asdict(study.contrasts),
        "manifest": manifest(),
        "facts": [row for w in work for row in w.described.facts],
        "models": [w.described.model for w in work],
        # A list: one checkpoint under two names has the same cells twice.
        "cells": [
            {"key": cell.key, "shard": cell.shard} | key_columns(*w.described[:3], cell.condition)
            for w in work
            for cell in w.cells
        ],
    }

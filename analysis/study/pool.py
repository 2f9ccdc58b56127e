"""Tasks through an executor: a few in flight at a time, what kills its worker tried again alone.

When a worker process dies, all that was in flight is suspect. Suspects wait until the rest is done;
then they run again, one cell at a time with nothing beside it, and a cell that has killed
`MAX_DEATHS` workers in that way has failed. Any other error ends the whole.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import replace
from itertools import chain, islice
from typing import NamedTuple

from analysis.adapters import num_batches
from analysis.measure import Cell
from analysis.study.executors import deaths
from analysis.study.worker import Task, compute, compute_pickled, forget

MAX_DEATHS = 3
PATIENCE = 60  # seconds without a result before an executor is asked whether it has workers


class Failure(NamedTuple):
    """A cell that killed its workers."""

    reason: str
    attempts: int


Outcomes = Generator[tuple[Task, list[Cell] | Failure], None, None]


class InProcess:
    """Tasks one after the other, here.

    progress   is told of cells before their task is done, which of a large model takes hours
    told       of how many, of the last task
    """

    workers = 1

    def __init__(self, progress: Callable[[int], object] = lambda cells: None):
        self.progress, self.told = progress, 0

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exception) -> None:
        forget()

    def run(self, tasks: Iterable[Task], suspects: Iterable[Task] = ()) -> Outcomes:
        """(task, its cells), in their order."""
        for task in chain(tasks, suspects):
            self.told, done = 0, 0
            parts = num_batches(task.shard, task.source.batch_size)

            def tell(number: int, parts: int = parts) -> None:
                """Of conditions on a batch that are done."""
                nonlocal done
                done += number
                cells = done // parts - self.told
                self.told += cells
                self.progress(cells)

            yield task, compute(task, tell)


class Pool:
    """Tasks through the executors that a factory makes. Raises `ValueError` where a worker dies
    before it has a task.

    Leaving the block by an exception drops what is in flight, and the workers with it.
    """

    told = 0  # cells of a task before it is done

    def __init__(self, factory: Callable[[], Executor]):
        self.factory = factory

    def __enter__(self) -> Pool:
        self.executor = self.factory()
        known = [getattr(self.executor, name, None) for name in ("workers", "_max_workers")]
        self.workers = next(filter(None, known), os.cpu_count() or 1)
        try:
            for future in [self.executor.submit(os.getpid) for _ in range(self.workers)]:
                future.result()
        except BaseException as error:
            self._drop()
            if isinstance(error, BrokenExecutor):  # they would die again and again
                raise ValueError(
                    "worker processes die at their start; a script needs "
                    "`if __name__ == '__main__':` around what starts processes"
                ) from error
            raise
        return self

    def __exit__(self, kind: type | None, *exception) -> None:
        if kind is None:
            self.executor.shutdown(wait=True)
        else:
            self._drop()

    def run(self, tasks: Iterable[Task], suspects: Iterable[Task] = ()) -> Outcomes:
        """(task, its cells or its `Failure`), as they are done.

        suspects   tasks known to have killed workers: they come last, cell by cell

        Raises what a task raises, and `ConnectionError` where the executor lost it.
        """
        suspects = list(suspects)
        # No more at once than keeps all busy: the others are not even made yet.
        for task, outcome in self._fly(iter(tasks), self.workers + 1):
            if isinstance(outcome, BaseException):
                suspects.append(task)
            else:
                yield task, outcome
        for task in suspects:
            for cell in task.cells:
                alone = replace(task, cells=(cell,))
                yield alone, self._alone(alone)

    def _alone(self, task: Task) -> list[Cell] | Failure:
        died = 0
        while died < MAX_DEATHS:
            ((_, outcome),) = self._fly(iter([task]), 1)
            if not isinstance(outcome, BaseException):
                return outcome
            died += deaths(outcome)
        return Failure("the worker process died: killed, crashed, or out of memory", died)

    def _fly(
        self, tasks: Iterator[Task], at_once: int
    ) -> Iterator[tuple[Task, list[Cell] | BaseException]]:
        """(task, its cells, or by what a worker died that had it), as they are done."""
        flying: dict[Future, Task] = {}
        while True:
            for task in islice(tasks, at_once - len(flying)):
                flying[self._submit(task)] = task
            if not flying:
                return
            broken = None
            for future in self._wait(flying):
                task = flying.pop(future)
                try:
                    error = future.exception()
                except futures.CancelledError as lost:
                    raise ConnectionError(
                        f"the executor lost a task ({lost}); finished cells are kept"
                    ) from lost
                if error and not deaths(error):
                    raise error
                yield task, error or future.result()
                broken = error if isinstance(error, BrokenExecutor) else broken
            if broken:
                yield from ((task, broken) for task in flying.values())
                flying.clear()
                self._drop()
                self.executor = self.factory()

    def _wait(self, flying: Iterable[Future]) -> set[Future]:
        """Those that are done, once one is; asks now and then whether there still are workers."""
        while not (done := futures.wait(flying, PATIENCE, futures.FIRST_COMPLETED).done):
            check = getattr(self.executor, "check", None)
            if check:
                check()
        return done

    def _submit(self, task: Task) -> Future:
        try:
            return self.executor.submit(compute_pickled, pickle.dumps(task))
        except BrokenExecutor as error:  # it broke since it was asked last
            future: Future = Future()
            future.set_exception(error)
            return future

    def _drop(self) -> None:
        kill = getattr(self.executor, "kill_workers", None)
        if kill:
            kill()
        else:
            self.executor.shutdown(wait=False, cancel_futures=True)

"""Where tasks can be computed: in processes of this machine, or on a Dask cluster.

`run` takes a factory of any `concurrent.futures.Executor`; these are two. An executor that is
dropped in the middle of its work is told so by `kill_workers` if it has it (as Python 3.14's
process pools have), else by `shutdown(wait=False)`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection

from cartmoe.config import check_whole

WAIT = 30  # seconds for the first worker of a cluster
LOST = 300  # seconds without any after which it is given up


def deaths(error: BaseException | None) -> int:
    """How many workers died of what a future raised; 0 if it is an error of another kind."""
    if isinstance(error, BrokenExecutor):
        return 1
    distributed = sys.modules.get("distributed")  # who uses it has imported it
    if distributed and isinstance(error, distributed.KilledWorker):
        return error.allowed_failures + 1
    return 0


@dataclass(frozen=True)
class Factory:
    """Makes executors whose workers compute with so many threads, unless a study says otherwise.

    workers   how many there are on this machine; None: others compute
    check     raises where there will be none; called before models are trained for hours
    """

    make: Callable[[], Executor]
    threads: int
    workers: int | None = None
    check: Callable[[], None] = lambda: None

    def __call__(self) -> Executor:
        """A new executor."""
        return self.make()


def processes(workers: int, threads: int = 1) -> Factory:
    """A factory of process pools. Workers die when their pool is dropped, and with this process,
    however that ends.

    threads   of each worker, unless the study or `run` says otherwise
    """
    workers = check_whole("workers", workers, 1)
    threads = check_whole("threads", threads, 1)
    return Factory(partial(_Processes, workers), threads, workers)


def dask(address: str, threads: int = 1) -> Factory:
    """A factory of executors on a Dask cluster, by its scheduler's address "tcp://host:8786".

    threads   of each worker, unless the study or `run` says otherwise; a worker process computes
              one task at a time

    Raises `ImportError` without Dask. Its executors raise `ConnectionError` without any worker.
    """
    threads = check_whole("threads", threads, 1)
    if find_spec("distributed") is None:
        raise ImportError("Dask is missing; install it: pip install 'cartmoe[dask]'")
    make = partial(_Dask, address)
    return Factory(make, threads, check=lambda: make().shutdown(wait=False, cancel_futures=True))


class _Processes(ProcessPoolExecutor):
    """Spawned, since forked processes inherit threads that are not there.

    Every worker reads from a pipe that only this process can write to: it ends when this process
    closes it or dies, and the worker with it.
    """

    def __init__(self, workers: int):
        context = get_context("spawn")
        reader, self._lifeline = context.Pipe(duplex=False)
        super().__init__(workers, context, initializer=live_with, initargs=(reader,))

    def kill_workers(self) -> None:
        """End them in the middle of their work, and wait until they are gone."""
        self._lifeline.close()
        self.shutdown(wait=True, cancel_futures=True)


def live_with(lifeline: Connection) -> None:
    """End this process when the other end of the pipe is closed. Ctrl-C is the parent's matter."""

    def wait() -> None:
        lifeline.poll(None)  # until something comes, which is only the end
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()


class _Dask(Executor):
    """`Client.get_executor`, with a client of its own."""

    def __init__(self, address: str):
        from distributed import Client

        try:
            self._client = Client(address, timeout=WAIT, set_as_default=False)
            try:
                self._client.wait_for_workers(1, timeout=WAIT)
            except BaseException:
                self._client.close()
                raise
        except (OSError, ValueError, TimeoutError) as error:
            raise ConnectionError(f"no Dask workers at {address!r}: {error}") from error
        self.workers = len(self._client.ncores())
        self._address = address
        self._executor = self._client.get_executor(pure=False)  # the same again is a new try

    def submit(self, fn, /, *args, **kwargs) -> Future:
        """As any executor's."""
        return self._executor.submit(fn, *args, **kwargs)

    def check(self) -> None:
        """Raise `ConnectionError` where the cluster stays without any worker: Dask itself would
        wait for ever."""
        try:
            self._client.wait_for_workers(1, timeout=LOST)
        except (OSError, TimeoutError) as error:
            raise ConnectionError(
                f"no Dask workers at {self._address!r} any more for {LOST} s ({error}); finished "
                "cells are kept, and the same command goes on from them"
            ) from error

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Also closes the client. What runs already goes on, and is dropped."""
        self._executor.shutdown(wait=wait and not cancel_futures)
        self._client.close()

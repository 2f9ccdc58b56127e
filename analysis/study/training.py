"""Models of a study that are trained side by side, each in a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import SimpleQueue

from tqdm.auto import tqdm

from analysis.study.executors import live_with
from analysis.study.models import run_folder
from analysis.study.specs import ModelSpec
from cartmoe.checkpoint import read_meta, run_checkpoints
from cartmoe.metrics import summary
from cartmoe.train import train

SPAWN = get_context("spawn")  # forked processes inherit threads that are not there


def train_models(
    specs: Sequence[ModelSpec], out: Path, workers: int, threads: int | None, progress: bool
) -> None:
    """Train each in its folder of `out`, at most `workers` at a time, going on where an earlier
    process ended. A single one is trained in this process.

    threads   of each; None: as many as this process has

    Ctrl-C has each write a checkpoint first; so has a failure, which is raised when the others have
    stopped. Raises as `train` does, and `ChildProcessError` for a process that is killed.
    """
    if min(workers, len(specs)) > 1:
        _Crew(out, threads, progress).train(specs, workers)
        return
    whole = dict(desc=f"training {len(specs)} models", unit="model", position=1)
    for spec in tqdm(specs, **whole, disable=not progress or len(specs) < 2):
        if progress:
            tqdm.write(f"{_name(spec)}: {run_folder(out, spec)}")
        train(spec.config, spec.train, run_folder(out, spec), threads=threads, progress=progress)


def _name(spec: ModelSpec) -> str:
    return f"{spec.name}, seed {spec.train_seed}"


class _Crew:
    """Processes that train, a thread of this one listening to each."""

    def __init__(self, out: Path, threads: int | None, progress: bool):
        self.out, self.threads, self.progress = out, threads, progress
        self.running: list[SpawnProcess] = []
        self.lines: SimpleQueue[int] = SimpleQueue()  # of the screen, for bars
        self.stopping = False

    def train(self, specs: Sequence[ModelSpec], workers: int) -> None:
        """All of them; see `train_models`."""
        for line in range(1, workers + 1):
            self.lines.put(line)
        done = [self._steps_done(spec) for spec in specs]
        self.bar = tqdm(
            desc=f"training {len(specs)} models",
            total=sum(spec.train.steps for spec in specs),
            initial=sum(done),
            unit="step",
            disable=not self.progress,
        )
        with self.bar, ThreadPoolExecutor(workers, initializer=_block_interrupts) as listeners:
            futures = [listeners.submit(self._one, *each) for each in zip(specs, done, strict=True)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stopping = True
                for future in futures:
                    future.cancel()
                self._end(SpawnProcess.terminate)
                try:
                    wait(futures)
                except KeyboardInterrupt:  # the second one: without a checkpoint
                    self._end(SpawnProcess.kill)
                raise

    def _steps_done(self, spec: ModelSpec) -> int:
        there = run_checkpoints(run_folder(self.out, spec))
        return min(read_meta(there[-1])["step"], spec.train.steps) if there else 0

    def _end(self, how) -> None:
        for process in [*self.running]:
            with suppress(ValueError, ProcessLookupError):  # it has ended meanwhile
                how(process)

    def _one(self, spec: ModelSpec, done: int) -> None:
        """Train one, and show what it says."""
        lifeline, held_open = SPAWN.Pipe(duplex=False)
        updates, send_end = SPAWN.Pipe(duplex=False)
        folder = run_folder(self.out, spec)
        process = SPAWN.Process(
            target=_train, args=(spec, folder, self.threads, lifeline, send_end)
        )
        line, failure = self.lines.get(), None
        process.start()
        self.running.append(process)
        if self.stopping:  # since it was submitted
            process.terminate()
        lifeline.close()
        send_end.close()
        try:
            with tqdm(
                desc=_name(spec),
                total=spec.train.steps,
                initial=done,
                unit="step",
                position=line,
                leave=False,
                disable=not self.progress,
            ) as bar:
                while True:
                    said = updates.recv()
                    if isinstance(said, BaseException):
                        failure = said
                        continue
                    self.bar.update(said["step"] - done)
                    bar.set_postfix_str(summary(said), refresh=False)
                    bar.update(said["step"] - done)
                    done = said["step"]
        except EOFError:  # it has nothing more to say
            process.join()
        finally:
            self.running.remove(process)
            self.lines.put(line)
            updates.close()
            held_open.close()
        if failure:
            raise failure
        if process.exitcode:
            raise ChildProcessError(
                f"the process that trained {_name(spec)} died: killed, crashed, or out of memory; "
                "the same again goes on from its last checkpoint"
            )


def _block_interrupts() -> None:
    """In this thread and in the processes that it starts: a Ctrl-C, which all of a terminal get, is
    the main thread's matter."""
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # the first start of a process would, and unblock it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def _train(
    spec: ModelSpec, folder: Path, threads: int | None, lifeline: Connection, send_end: Connection
) -> None:
    """What a process does. It ends with the one that started it, however that does; a SIGTERM has
    it write a checkpoint and end."""
    live_with(lifeline)  # which ignores Ctrl-C, too
    try:
        train(
            *(spec.config, spec.train, folder), threads=threads, progress=False, watch=send_end.send
        )
    except BaseException as error:
        send_end.send(error)

"""Whole studies: a second worker, a restart when all is done, and memory that stays flat.

`python -m benchmarks.studies CONDITIONS DOCUMENTS` prints the peak resident bytes of a process that
runs such a study, above what it had before; `... train THREADS` the seconds of a short training.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.memory import resident
from benchmarks.timing import Row, interleaved, milliseconds
from cartmoe.checkpoint import save
from cartmoe.config import ModelConfig
from cartmoe.model import LanguageModel

LENGTH = 256
BUSY = "while True: pass"


def study_of(folder: Path, conditions: int, documents: int, shard: int = 24):
    """A study of one nano model with random weights on the standard library; the clean run is one
    more condition."""
    from analysis.study.study import Study

    path = folder / "model"
    if not path.exists():
        torch.manual_seed(0)
        save(LanguageModel(ModelConfig.preset("nano", init_std=0.05)), path, {})
    noise = {"perturbation": "GaussianNoise", "sigma": 1.0, "eval_seed": list(range(conditions))}
    data = dict(corpus="stdlib", length=LENGTH, max_tokens=LENGTH, documents=documents, shard=shard)
    return Study.from_dict(
        {
            "name": "bench",
            "data": data,
            "measure": {"batch_size": 24, "calibration": 4},
            "models": [{"path": str(path), "name": "nano"}],
            "conditions": [noise],
        }
    )


def rows():
    """Rows of the bench table."""
    yield _start()
    yield _workers()
    yield from _trainings()
    yield _restart()
    yield from _memory()


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _start() -> Row:
    """Until a worker process can begin with a cell, against `import torch` in a new interpreter."""
    from analysis.study.executors import processes
    from analysis.study.worker import forget

    def worker() -> None:
        with processes(1)() as executor:
            executor.submit(forget).result()

    def torch_alone() -> None:
        subprocess.run([sys.executable, "-c", "import torch"], check=True)

    times = interleaved({"worker": worker, "import torch": torch_alone}, repeats=5, warm_up=1)
    ratio = times["worker"] / times["import torch"]
    return Row("start of a worker process / import torch", ratio, "<= 1.30", milliseconds(times))


def _workers() -> Row:
    """The same study through one process and through two, which have started and imported what
    they need before the clock."""
    from analysis.study.executors import processes
    from analysis.study.run import run

    with tempfile.TemporaryDirectory() as name:
        folder, times = Path(name), {}
        study = study_of(folder, conditions=47, documents=96)
        for workers in (1, 2):
            executor = processes(workers)()
            warm = [executor.submit(study_of, folder, 1, 2) for _ in range(2 * workers)]
            for future in warm:
                future.result()
            out = folder / f"{workers} workers"
            times[workers] = _seconds(
                lambda out=out, e=executor: run(study, out, False, lambda: e, threads=1)
            )
    detail = f"{times[1]:.1f} s, {times[2]:.1f} s"
    what = "two worker processes / one, one thread each: cells a second"
    return Row(what, times[1] / times[2], ">= 1.85", detail)


def _trainings():
    """Two models of the preset that studies train most, trained by two processes of one thread and
    by one of two threads, whose start is not counted; idle, and beside a process that is busy."""
    for beside, goal in (("idle", ">= 1.30"), ("beside a busy process", ">= 2.00")):
        busy = subprocess.Popen([sys.executable, "-c", BUSY]) if beside != "idle" else None
        try:
            times = {n: max(_trained(n, threads=3 - n)) for n in (1, 2)}
        finally:
            if busy:
                busy.kill()
        speeds = {1: 1 / times[1], 2: 2 / times[2]}  # models a second
        detail = ", ".join(f"{n} process{'es' * (n > 1)} {times[n]:.1f} s" for n in times)
        what = f"training: two processes of one thread / one of two, {beside}"
        yield Row(what, speeds[2] / speeds[1], goal, detail)


def _trained(processes: int, threads: int) -> list[float]:
    """Seconds of each of so many processes that train at the same time."""
    command = [sys.executable, "-m", "benchmarks.studies", "train", str(threads)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    return [float(process.communicate()[0]) for process in started]


def train_seconds(threads: int, steps: int = 40) -> float:
    """Of so many steps of preset micro, behind some that warm up."""
    from benchmarks.steps import training_step

    torch.set_num_threads(threads)
    run = training_step(LanguageModel(ModelConfig.preset("micro")), bf16=False, batch=16)
    for _ in range(5):
        run()
    return _seconds(lambda: [run() for _ in range(steps)])


def _restart() -> Row:
    from analysis.study.run import run

    with tempfile.TemporaryDirectory() as name:
        study = study_of(Path(name), conditions=249, documents=96)  # 4 shards x 250
        times = [_seconds(lambda: run(study, Path(name) / "out", progress=False)) for _ in range(2)]
    detail = f"1,000 cells {times[0]:.1f} s, again {times[1]:.2f} s"
    return Row("restart of a finished study / the study", times[1] / times[0], "<= 0.01", detail)


def _memory():
    """Peak memory of the process that measures; in all of them a table of experts is made."""
    peaks = {}
    for conditions, documents in ((24, 24), (240, 24), (24, 240)):
        command = [sys.executable, "-m", "benchmarks.studies", str(conditions), str(documents)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[conditions, documents] = int(done.stdout)
    for what, size in (("conditions", (240, 24)), ("documents", (24, 240))):
        detail = ", ".join(f"{peaks[k] / 2**20:.0f} MiB" for k in ((24, 24), size))
        yield Row(f"peak memory, 10x {what} / once", peaks[size] / peaks[24, 24], "flat", detail)


def peak(conditions: int, documents: int) -> int:
    """Bytes above those of the process before it measures."""
    from analysis.study.run import run

    with tempfile.TemporaryDirectory() as name:
        study = study_of(Path(name), conditions, documents)
        before = resident("VmRSS")
        run(study, Path(name) / "out", progress=False)
        return resident("VmHWM") - before


if __name__ == "__main__":
    if sys.argv[1] == "train":
        print(train_seconds(int(sys.argv[2])))
    else:
        print(peak(*map(int, sys.argv[1:])))

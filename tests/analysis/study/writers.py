"""Processes that write to one store: python writers.py MODE STORE LOG ...

together STORE LOG WRITERS CELLS   so many processes add the same cells, each in an order of its own
apart STORE LOG WRITERS CELLS      so many processes add so many cells each, all different ones
opened STORE LOG WRITERS ROUNDS    so many processes make a store at the same moment
killed STORE LOG KILLS SEED        a process that adds cells is killed with SIGKILL and started anew

What was added, or found to be there, is noted in LOG after `add` has returned: a line a cell.
"""

import os
import random
import select
import signal
import sys
from collections.abc import Iterable

import pandas as pd

from analysis.measure.shard import Cell
from analysis.study.store import Store, cell_key

LINE = 67  # bytes of a line of LOG: a SHA-256 in hexadecimal, a space, a digit, its end


def cell(number: int, sequences: int = 40) -> Cell:
    """Its number stands in every row."""
    rows = pd.DataFrame({"document_id": "d", "sequence_id": range(sequences), "num_tokens": 5})
    losses = rows.assign(domain="x", num_bytes=5, nll_sum=number + 0.5, kl_sum=0.0, num_agree=1.0)
    routing = rows.assign(layer=0, stage=0, flips=float(number))
    return Cell(None, losses, routing, 0.1)


def identity(number: int) -> dict:
    return {"model": "m", "number": number}


def write(path: str, log: str, numbers: Iterable[int]) -> None:
    with open(log, "ab", buffering=0) as file, Store(path) as store:
        for number in numbers:
            added = store.add(identity(number), cell(number))
            file.write(f"{cell_key(identity(number))} {int(added)}\n".encode())


def fork(path: str, log: str, numbers: Iterable[int], gate: tuple[int, int] | None = None) -> int:
    """A process that writes, once its parent has closed the writing end of the pipe `gate`."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if gate:
            os.close(gate[1])
            os.read(gate[0], 1)
        write(path, log, numbers)
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
        os._exit(1)
    os._exit(0)


def together(path: str, log: str, writers: int, cells: int) -> int:
    return at_once(
        path, log, [random.Random(i).sample(range(cells), cells) for i in range(writers)]
    )


def apart(path: str, log: str, writers: int, cells: int) -> int:
    return at_once(path, log, [range(i * cells, (i + 1) * cells) for i in range(writers)])


def opened(path: str, log: str, writers: int, rounds: int) -> int:
    """Every round has a store of its own, STORE-ROUND, to which each adds a cell of its own."""
    return max(at_once(f"{path}-{r}", log, [[i] for i in range(writers)]) for r in range(rounds))


def at_once(path: str, log: str, numbers: list) -> int:
    gate = os.pipe()
    children = [fork(path, log, of_one, gate) for of_one in numbers]
    for end in gate:
        os.close(end)
    return max(os.waitpid(child, 0)[1] for child in children)


def size(log: str) -> int:
    return os.path.getsize(log) if os.path.exists(log) else 0


def killed(path: str, log: str, kills: int, seed: int) -> int:
    """Every second one has added some cells before its time runs, however slow the machine is."""
    draw, alive = random.Random(seed), 0
    for kill in range(kills):
        noted = size(log)
        child = fork(path, log, [kill * 10_000 + i for i in range(10_000)])
        while kill % 2 and size(log) < noted + 3 * LINE:
            select.select([], [], [], 0.001)
        select.select([], [], [], draw.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        alive += os.waitpid(child, 0)[1] != signal.SIGKILL
    return alive


if __name__ == "__main__":
    modes = {"together": together, "apart": apart, "opened": opened, "killed": killed}
    mode, store, log, *numbers = sys.argv[1:]
    sys.exit(modes[mode](store, log, *map(int, numbers)))

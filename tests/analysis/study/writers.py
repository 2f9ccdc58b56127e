"""Processes that write to one store: python writers.py MODE STORE LOG ...

together STORE LOG WRITERS CELLS   so many processes add the same cells, each in an order of its own
apart STORE LOG WRITERS CELLS      so many processes add so many cells each, all different ones
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


def fork(path: str, log: str, numbers: Iterable[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
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


def at_once(path: str, log: str, numbers: list) -> int:
    children = [fork(path, log, of_one) for of_one in numbers]
    return max(os.waitpid(child, 0)[1] for child in children)


def killed(path: str, log: str, kills: int, seed: int) -> int:
    draw, alive = random.Random(seed), 0
    for kill in range(kills):
        child = fork(path, log, [kill * 10_000 + i for i in range(10_000)])
        select.select([], [], [], draw.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        alive += os.waitpid(child, 0)[1] != signal.SIGKILL
    return alive


if __name__ == "__main__":
    modes = {"together": together, "apart": apart, "killed": killed}
    mode, store, log, *numbers = sys.argv[1:]
    sys.exit(modes[mode](store, log, *map(int, numbers)))

"""What a worker is given and gives back: the cells of one model on one shard.

A task is plain data, so that it can go to another process or machine. Its cells are the same bits
wherever it is computed: the worker takes on the planned number of threads, and refuses where it
differs from what was planned in anything else that changes bits.
"""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from analysis.adapters import Adapter, load
from analysis.measure import Calibrating, Cell, forget_streams, measure
from analysis.perturb import CLEAN, Calibration, Condition
from analysis.study.provenance import default_device, platform_identity
from cartmoe.data import Sequences
from cartmoe.tokenizers import Tokenizer

# Threads of one process share model and hooks, so one task at a time.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Source:
    """A model and the calibration slice: what a worker keeps from one task to the next.

    tokenizer     that of the documents, which tells kinds of tokens
    calibration   sequences, whose routing is recorded `batch_size` at a time, and their hash
    stream        whether its weights stay on the disk, a layer in memory
    platform      items of `platform_identity` where the study was planned
    """

    checkpoint: Path
    identity: str
    name: str
    tokenizer: Tokenizer = field(compare=False, repr=False)
    calibration: Sequences = field(compare=False, repr=False)
    calibration_sha256: str
    batch_size: int
    precision: str
    stream: bool
    platform: tuple[tuple[str, Any], ...]


class PlannedCell(NamedTuple):
    """One cell: a condition (`CLEAN`: the clean run) on the shard of that number.

    reuses   whether experts' outputs come from a table (see `analysis.measure.reuse`)
    """

    key: str
    shard: int
    condition: Condition
    reuses: bool
    identity: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Task:
    """Cells of one model on one shard, and what to measure them with.

    streams   where hidden states of a streamed model lie between its layers; None: in memory
    """

    source: Source
    shard: Sequences
    cells: tuple[PlannedCell, ...]
    keep_tokens: bool
    streams: Path | None = None


def compute(task: Task, progress: Callable[[int], object] = lambda done: None) -> list[Cell]:
    """The task's cells, in their order. Raises as `analysis.measure.measure` does, and `ValueError`
    where bits would differ from those planned."""
    source = task.source
    with _ONE_AT_A_TIME, numerics(dict(source.platform)), autocast(source.precision):
        model, calibration = _prepared(source)
        measured = measure(
            model,
            [cell.condition for cell in task.cells if cell.condition != CLEAN],
            task.shard,
            batch_size=source.batch_size,
            calibration=calibration,
            reuse=frozenset(cell.condition for cell in task.cells if cell.reuses),
            keep_tokens=task.keep_tokens,
            streams=task.streams if source.stream else None,
            progress=progress,
        )
    if task.streams:
        forget_streams(task.streams, model=source.identity, data=task.shard.sha256)
    by_condition = {cell.condition: cell for cell in measured}
    return [by_condition[cell.condition] for cell in task.cells]


def compute_pickled(task: bytes) -> list[Cell]:
    """The same for another process. Pickled by hand: torch's own way between processes shares
    memory with the sender, who may be gone."""
    try:
        unpickled = pickle.loads(task)
    except (AttributeError, ImportError) as error:
        raise ValueError(
            f"a worker on {socket.gethostname()} cannot import a perturbation ({error}); it must "
            "stand in a module that is installed there"
        ) from error
    return compute(unpickled)


def forget() -> None:
    """Let go of the models that this process keeps."""
    _prepared.cache_clear()
    opened.cache_clear()


@lru_cache(maxsize=1)
def _prepared(source: Source) -> tuple[Adapter, Calibration | Calibrating | None]:
    model = opened(source.checkpoint, source.identity, source.name, source.stream)
    model.tokenizer = source.tokenizer
    if not model.sites():
        return model, None
    calibrating = Calibrating(model, source.calibration, batch_size=source.batch_size)
    # That of a streamed model goes along with its first shard.
    return model, calibrating if source.stream else calibrating.finish()


@lru_cache(maxsize=1)
def opened(checkpoint: Path, identity: str, name: str, stream: bool = False) -> Adapter:
    """The model of a checkpoint, where a study measures. Raises `ValueError` if it is another one
    than that of this identity."""
    model = load(checkpoint, name=name, device=default_device(), stream=stream)
    if model.identity != identity:
        raise ValueError(f"{checkpoint} is not the checkpoint that was planned anymore")
    return model


@contextmanager
def numerics(planned: dict[str, Any]) -> Iterator[None]:
    """Within the block, threads on the CPU and the precision of products as planned, whatever
    OMP_NUM_THREADS says. Raises `ValueError` for what cannot be taken on."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(planned["threads"] or threads)
    torch.set_float32_matmul_precision(planned["matmul_precision"])
    try:
        here = platform_identity(default_device())
        differing = [f"{k} is {here[k]!r}, not {v!r}" for k, v in planned.items() if here[k] != v]
        if differing:
            raise ValueError(
                f"a worker on {socket.gethostname()} computes other bits than the study was "
                f"planned with: {'; '.join(differing)}"
            )
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def autocast(precision: str):
    """The context in which a study of this precision measures."""
    return torch.autocast(default_device(), torch.bfloat16, enabled=precision == "bf16")

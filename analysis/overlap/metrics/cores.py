"""Independent pieces of work on tensors, each on a core of its own.

Small tensor operations that all cores share wait for each other more than they compute, and their
temporaries travel between caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_cores(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """work(item) for each in order, without gradients; `torch.get_num_threads()` at once."""
    threads = torch.get_num_threads()

    def start() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)  # of this thread

    try:
        with ThreadPoolExecutor(threads, initializer=start) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)  # of threads to come, which start with the last number set

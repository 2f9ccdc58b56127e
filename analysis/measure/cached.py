"""Which rows a cache holds: the ids that key their noise, from one forward to the next."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from analysis.adapters import Given
from analysis.perturb import sequence_hash

# What changes the rows of a cache, and what becomes of their ids.
CHANGES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda ids_B, rows: ids_B[rows.to(ids_B.device)],
    "batch_select_indices": lambda ids_B, rows: ids_B[rows],
    "batch_repeat_interleave": lambda ids_B, times: ids_B.repeat_interleave(times),
}


class CachedRows:
    """Within the block, (B,) ids of the rows of every cache that a forward began or went on with.

    They are a hash of what the row began with, and follow their rows where a cache reorders them.
    """

    def __init__(self) -> None:
        self._ids: dict[int, Tensor] = {}
        self._kept: dict[int, Any] = {}  # so that no other object has the number of one of them
        self._now = torch.empty(0, dtype=torch.int64)
        self._stack = ExitStack()

    def __enter__(self) -> CachedRows:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._ids.clear()
        self._kept.clear()

    def of(self, given: Given) -> Tensor:
        """The ids of the rows that a forward is given; none for a cache from before the block."""
        if given.past:
            self._now = self._ids.get(id(given.cache), torch.empty(0, dtype=torch.int64))
        else:
            surely_BL = given.real_BL if given.surely_BL is None else given.surely_BL
            self._now = sequence_hash(given.tokens_BL, surely_BL)
        return self._now

    def left(self, cache: Any) -> None:
        """Behind the forward: the cache has the rows that it was given."""
        if cache is None:
            return
        if id(cache) not in self._kept:
            self._kept[id(cache)] = cache
            for name, change in CHANGES.items():
                if own := getattr(cache, name, None):
                    self._follow(cache, name, own, change)
        self._ids[id(cache)] = self._now

    def _follow(self, cache: Any, name: str, own: Callable, change: Callable) -> None:
        def changed(argument: Any) -> Any:
            result = own(argument)
            self._ids[id(cache)] = change(self._ids[id(cache)], argument)
            return result

        setattr(cache, name, changed)
        self._stack.callback(delattr, cache, name)

"""The same sums with the loops turned inside out: a segment outside, batches inside, for a model of
which a segment's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from analysis.adapters import Adapter
from analysis.measure import Bookmarks, marked
from analysis.overlap.metrics import Streams
from analysis.overlap.probes import Reading
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

NAME = "overlap"  # of the bookmark
Tables = list[tuple[str, pd.DataFrame]]  # name, rows


class Readings:
    """All batches between two segments, and what is known of the sites before.

    rows_at   what streams say of a site that all batches went through
    done      how many segments they went through
    """

    def __init__(
        self,
        model: Adapter,
        each: Sequence[Reading],
        streams: Streams,
        rows_at: Callable[[RouterSite], Tables],
    ):
        self.model, self.each, self.streams, self.rows_at = model, each, streams, rows_at
        self.begin()

    def begin(self) -> None:
        """Before the first segment, whatever they went through."""
        self.done = 0
        self.found: Tables = []
        for reading in self.each:
            reading.hidden_BLD = reading.before = None

    def reach(self, number: int) -> None:
        """Through all segments up to this one."""
        segments = self.model.segments()
        while self.done <= number:
            segment = segments[self.done]
            for reading in self.each:
                for site, probe in reading.step(segment):
                    self.streams.add(site, probe)
            for site in segment.sites:
                self.found += self.rows_at(site)
                self.streams.forget(site)
            self.done += 1

    def state(self) -> dict[str, Any]:
        """What `restore` takes: numbers, texts and tensors."""
        return {
            "done": self.done,
            "hidden": [reading.hidden_BLD for reading in self.each],
            "before": [reading.before and list(reading.before) for reading in self.each],
            "found": [
                [table, {n: [str(rows[n].dtype), rows[n].tolist()] for n in rows}]
                for table, rows in self.found
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """As they were when they gave this state."""
        self.done = state["done"]
        pairs = zip(self.each, state["hidden"], state["before"], strict=True)
        for reading, hidden_BLD, before in pairs:
            reading.hidden_BLD = hidden_BLD
            reading.before = Routing(*before) if before else None
        self.found = [
            (table, pd.DataFrame({n: pd.Series(v, dtype=kind) for n, (kind, v) in columns.items()}))
            for table, columns in state["found"]
        ]


def by_segment(readings: Readings, marks: Bookmarks | None, quiet: bool) -> Tables:
    """The rows of all sites; with bookmarks the same call goes on behind the last segment."""
    last = len(readings.model.segments()) - 1
    for number in tqdm(range(last + 1), unit="layer", disable=quiet):
        if not marks or marks.done(NAME) <= number:
            with marked(marks, NAME, readings):
                readings.reach(number)
    with marked(marks, NAME, readings, write=False):
        readings.reach(last)
        return readings.found

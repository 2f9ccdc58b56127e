"""What training records of every step: metrics.csv, and the text of the progress bar.

step               1 for the first
loss               mean nll of its tokens, in nats
balance, z         losses of all routers together, without their coefficients
learning_rate
gradient_norm      before it is clipped
max_violation      E max f - 1 of the router where that is greatest, f an expert's share of the
                   slots used: 0 is balanced; empty for a dense model
worst_site         that router
tokens_per_second
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from cartmoe.files import write_atomically
from cartmoe.hooks import RouterSite

COLUMNS = (
    "step",
    "loss",
    "balance",
    "z",
    "learning_rate",
    "gradient_norm",
    "max_violation",
    "worst_site",
    "tokens_per_second",
)


def violations(counts_SE: Tensor) -> Tensor:
    """(S,) of each router, from (S, E) expert counts; S may be 0."""
    return counts_SE.shape[-1] * counts_SE.amax(-1) / counts_SE.sum(-1).clamp(min=1) - 1


def worst(violation_S: Sequence[float], sites: Sequence[RouterSite]) -> dict[str, Any]:
    """The columns of the worst router."""
    if not sites:
        return {"max_violation": None, "worst_site": None}
    violation, site = max(zip(violation_S, sites, strict=True), key=lambda pair: pair[0])
    name = f"layer {site.layer} stage {site.stage}"
    return {"max_violation": violation, "worst_site": name}


def summary(row: Mapping[str, Any]) -> str:
    """A row as the progress bar shows it."""
    text = f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
    if row["worst_site"] is not None:
        text += f", load up to {1 + row['max_violation']:.1f}x in {row['worst_site']}"
    return text


class Metrics:
    """metrics.csv: a header, and a row for each step, the step first.

    Opened after a kill it is cut back to `step`, the one that training goes on from: no row is
    lost, since `sync` comes before each checkpoint, and none is there twice.
    """

    def __init__(self, path: Path, step: int):
        header = ",".join(COLUMNS) + "\n"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = [line for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]
        kept = [row for row in rows if int(row.split(",")[0]) <= step]
        write_atomically(path, header + "".join(kept))
        self._file: TextIO = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def add(self, row: Mapping[str, Any]) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

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
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cartmoe.files import write_atomically
from cartmoe.hooks import RouterSite
from cartmoe.sealed import read_sealed, write_sealed

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
    lost, since `sync` comes before each checkpoint, and none is there twice. metrics.json says how
    many bytes were there at the last `sync`, and their SHA-256. Raises `ValueError` naming the file
    if they are others now; without metrics.csv it begins anew.
    """

    def __init__(self, path: Path, step: int):
        self.path, self.seal = path, path.with_suffix(".json")
        rows = self._whole().splitlines(keepends=True)[1:] if path.exists() else []
        kept = [",".join(COLUMNS) + "\n", *(r for r in rows if int(r.partition(",")[0]) <= step)]
        text = "".join(kept).encode()
        self._size, self._digest = len(text), hashlib.sha256(text)
        self._note()  # first: it is then true of the beginning of what is there
        write_atomically(path, text)
        self._file = path.open("ab")

    def _whole(self) -> str:
        known, data = read_sealed(self.seal), self.path.read_bytes()
        data = data[: known["bytes"]]
        if hashlib.sha256(data).hexdigest() != known["content"]:
            raise ValueError(
                f"{self.path} is not as it was written; move it away to go on without its rows"
            )
        return data.decode()

    def _note(self) -> None:
        write_sealed(self.seal, {"bytes": self._size, "content": self._digest.hexdigest()})

    def add(self, row: Mapping[str, Any]) -> None:
        """The values of `COLUMNS`."""
        line = io.StringIO()
        csv.DictWriter(line, COLUMNS, lineterminator="\n").writerow(row)
        data = line.getvalue().encode()
        self._size += len(data)
        self._digest.update(data)
        self._file.write(data)
        self._file.flush()

    def sync(self) -> None:
        """Have the disk hold all rows."""
        os.fsync(self._file.fileno())
        self._note()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

"""The store's tables of rows: their columns, types, and checksums."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

TABLES = {
    "losses": ("document_id", "domain", "sequence_id", "num_tokens", "num_bytes", "nll_sum",
               "kl_sum", "num_agree", "num_touched", "delta_max"),
    "routing": ("document_id", "sequence_id", "layer", "stage", "num_tokens", "flips",
                "flips_total", "changed", "mass_moved", "mass_lost", "active", "entropy", "margin",
                "output_change", "routed_share", "routed_ratio"),
    "tokens": ("document_id", "sequence_id", "nll", "targets"),
}  # fmt: skip
TYPES = {"document_id": "TEXT", "domain": "TEXT", "sequence_id": "INTEGER", "layer": "INTEGER",
         "stage": "INTEGER", "num_tokens": "INTEGER", "num_bytes": "INTEGER", "nll": "BLOB",
         "targets": "BLOB"}  # fmt: skip
DTYPES = {"TEXT": str, "INTEGER": "int64", "REAL": float, "BLOB": object}
CELL = ("key", "seconds", "created", *TABLES)  # what the checksum of a cell's own row is over
SCHEMA = 4
SCHEMA_SQL = [
    "CREATE TABLE IF NOT EXISTS cells (id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, identity "
    "TEXT NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL, "
    f"{', '.join(f'{name} INTEGER NOT NULL' for name in TABLES)}, checksum TEXT)",
    "CREATE TABLE IF NOT EXISTS failures (key TEXT PRIMARY KEY, identity TEXT NOT NULL, reason "
    "TEXT NOT NULL, attempts INTEGER NOT NULL, checksum TEXT)",
    "CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, number INTEGER)",
    "INSERT OR IGNORE INTO counts VALUES ('cells', 0), ('failures', 0)",
]
for _name, _names in TABLES.items():
    _columns = ", ".join(f"{c} {TYPES.get(c, 'REAL')}" for c in _names)
    SCHEMA_SQL += [
        f"CREATE TABLE IF NOT EXISTS {_name} (cell INTEGER, {_columns})",
        f"CREATE INDEX IF NOT EXISTS {_name}_cell ON {_name} (cell)",
    ]


def typed(table: str, frame: pd.DataFrame | None) -> pd.DataFrame:
    """The table's columns, as they are both written and read."""
    columns = pd.DataFrame(frame, columns=[*TABLES[table]])
    rows = columns.astype({c: DTYPES[TYPES.get(c, "REAL")] for c in columns})
    blobs = [c for c in columns if TYPES.get(c) == "BLOB"]
    return rows.assign(**{c: rows[c].where(rows[c].notna(), None) for c in blobs})


def checksums(rows: pd.DataFrame, cell: Any) -> pd.Series:
    """By cell, a 64-bit number that any change of its rows, or of their order, changes."""
    hashes = pd.util.hash_pandas_object(rows, index=False)
    odd = 2 * hashes.groupby(cell).cumcount().astype("uint64") + 1
    sums = (hashes * odd).groupby(cell).sum().astype("uint64")
    return pd.Series(sums.to_numpy().view("int64"), sums.index)


class DamagedCells(ValueError):
    """Cells that are not as they were written; `keys` names them."""

    def __init__(self, path: Path, keys: Iterable[str]):
        self.keys = sorted(keys)
        super().__init__(
            f"{path} is damaged: {len(self.keys) or 'some'} cells are not as they were written; "
            "run the study again to measure them anew"
        )

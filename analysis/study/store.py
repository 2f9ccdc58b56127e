"""The result store: cells in one SQLite file, safe under kill -9 and several writers.

A cell is what one condition gave on one shard with one model. Its key is the hash of its identity:
everything that can change a bit of it. One transaction a cell, with synchronous=FULL, so a cell is
either there whole and for good, or not at all. No write-ahead log: it saves 0.7 ms a cell, but its
file is three, cannot be read from a read-only place or shared over a network, and two processes
that make it at once find it "locked" without waiting.

    cells      key, identity, seconds, created
    losses, routing, tokens   their rows (see `analysis.measure.Cell`); tokens only where asked for
    failures   cells that killed their workers: key, identity, reason, attempts
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.measure import Cell
from cartmoe.interrupt import Later

SCHEMA = 2
TABLES = {
    "losses": ("document_id", "domain", "sequence_id", "num_tokens", "num_bytes", "nll_sum",
               "kl_sum", "num_agree", "delta_max"),
    "routing": ("document_id", "sequence_id", "layer", "stage", "num_tokens", "flips",
                "flips_total", "changed", "mass_moved", "mass_lost", "active", "entropy", "margin",
                "output_change", "routed_share", "routed_ratio"),
    "tokens": ("document_id", "sequence_id", "nll", "targets"),
}  # fmt: skip
TYPES = {"document_id": "TEXT", "domain": "TEXT", "sequence_id": "INTEGER", "layer": "INTEGER",
         "stage": "INTEGER", "num_tokens": "INTEGER", "num_bytes": "INTEGER", "nll": "BLOB",
         "targets": "BLOB"}  # fmt: skip
DTYPES = {"TEXT": str, "INTEGER": "int64", "REAL": float, "BLOB": object}
ROWS = 100_000  # read at once


def cell_key(identity: dict[str, Any]) -> str:
    """SHA-256 of the identity's canonical JSON."""
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()


def _canonical(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True, separators=(",", ":"))


class Store:
    """Cells by key, in the file at `path`, which is made if it is not there.

    Raises `ValueError` if the file is no store, or one of another schema version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(self.path, timeout=120, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is not a result store: {error}") from error

    def _open(self) -> None:
        self._db.execute("PRAGMA synchronous=FULL")
        if self._db.execute("PRAGMA user_version").fetchone() == (SCHEMA,):
            return  # without writing to it
        with self._transaction() as cursor:
            (version,) = cursor.execute("PRAGMA user_version").fetchone()
            (tables,) = cursor.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version not in (0, SCHEMA) or (version == 0 and tables):
                raise ValueError(
                    f"{self.path} has schema version {version}; this program reads {SCHEMA}. "
                    "Use the version that wrote it, or another --out"
                )
            cursor.execute(
                "CREATE TABLE IF NOT EXISTS cells (id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT "
                "NULL, identity TEXT NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL)"
            )
            cursor.execute(
                "CREATE TABLE IF NOT EXISTS failures (key TEXT PRIMARY KEY, identity TEXT NOT "
                "NULL, reason TEXT NOT NULL, attempts INTEGER NOT NULL)"
            )
            for name, columns in TABLES.items():
                typed = ", ".join(f"{c} {TYPES.get(c, 'REAL')}" for c in columns)
                cursor.execute(f"CREATE TABLE IF NOT EXISTS {name} (cell INTEGER, {typed})")
                cursor.execute(f"CREATE INDEX IF NOT EXISTS {name}_cell ON {name} (cell)")
            cursor.execute(f"PRAGMA user_version={SCHEMA}")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def keys(self) -> set[str]:
        """Of all finished cells."""
        return set(self.seconds())

    def __contains__(self, key: str) -> bool:
        """Whether a cell of that key is finished."""
        return bool(self._db.execute("SELECT 1 FROM cells WHERE key = ?", (key,)).fetchone())

    def seconds(self) -> dict[str, float]:
        """By key of every finished cell, how long it took to measure."""
        return dict(self._db.execute("SELECT key, seconds FROM cells"))

    def add(self, identity: dict[str, Any], cell: Cell) -> bool:
        """Write a cell, durably; False if another writer already has, which changes nothing."""
        text = _canonical(identity)
        key = hashlib.sha256(text.encode()).hexdigest()
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT OR IGNORE INTO cells (key, identity, seconds, created) VALUES (?, ?, ?, ?)",
                (key, text, cell.seconds, time.time()),
            )
            if cursor.rowcount == 0:
                return False
            number = cursor.lastrowid
            for table, columns in TABLES.items():
                frame = getattr(cell, table)
                if frame is not None:
                    rows = frame.assign(cell=number).reindex(columns=["cell", *columns])
                    marks = ", ".join("?" * len(rows.columns))
                    values = rows.itertuples(index=False, name=None)
                    cursor.executemany(f"INSERT INTO {table} VALUES ({marks})", values)
            cursor.execute("DELETE FROM failures WHERE key = ?", (key,))
        return True

    def fail(self, identity: dict[str, Any], reason: str, attempts: int) -> None:
        """Note that a cell killed its workers so many times, in place of what was noted before."""
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)",
                (cell_key(identity), _canonical(identity), reason, attempts),
            )

    def failures(self) -> pd.DataFrame:
        """key, reason, attempts of every cell that failed and was not measured since."""
        return pd.read_sql_query("SELECT key, reason, attempts FROM failures", self._db)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        with Later(), self._db:  # which commits, or rolls back
            yield self._db.execute("BEGIN IMMEDIATE")

    def read(self, table: str, keys: Iterable[str]) -> pd.DataFrame:
        """Rows of the table, a key of `TABLES`, of these cells, with a column `key`."""
        columns, listed = TABLES[table], "IN (SELECT value FROM json_each(?))"
        query, wanted = f"SELECT id, key FROM cells WHERE key {listed}", json.dumps([*keys])
        cells = dict(self._db.execute(query, [wanted]))
        names, wanted = ", ".join(columns), json.dumps([*cells])
        query = f"SELECT cell AS key, {names} FROM {table} WHERE cell {listed} ORDER BY rowid"
        # Tuples take several times the memory of columns, so not all of them are held at once.
        parts = pd.read_sql_query(query, self._db, params=[wanted], chunksize=ROWS)
        dtypes = {c: DTYPES[TYPES.get(c, "REAL")] for c in columns}
        frame = pd.concat((part.astype(dtypes) for part in parts), ignore_index=True)
        return frame.assign(key=frame.key.map(cells))

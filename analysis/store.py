"""The result store: cells in one SQLite file, safe under kill -9 and several writers.

A cell is what one condition gave on one shard with one model. Its key is the hash of its identity:
everything that can change a bit of it. WAL with synchronous=FULL and one transaction a cell, so a
cell is either there whole and for good, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.measure import Cell

SCHEMA = 1
LOSSES = ("document_id", "domain", "sequence_id", "num_tokens", "num_bytes", "nll_sum", "kl_sum",
          "num_agree")  # fmt: skip
ROUTING = ("document_id", "sequence_id", "layer", "stage", "num_tokens", "flips", "flips_total",
           "changed", "mass_moved", "mass_lost", "active", "entropy", "margin", "routed_share",
           "routed_ratio")  # fmt: skip
TYPES = {"document_id": "TEXT", "domain": "TEXT", "sequence_id": "INTEGER", "layer": "INTEGER",
         "stage": "INTEGER", "num_tokens": "INTEGER", "num_bytes": "INTEGER"}  # fmt: skip


def cell_key(identity: dict[str, Any]) -> str:
    """SHA-256 of the identity's canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """Cells by key, in the file at `path`, which is made if it is not there.

    Raises `ValueError` if the file is no store, or one of another schema version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(self.path, timeout=120, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise ValueError(f"{self.path} is not a result store: {error}") from error
        try:
            self._open()
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise ValueError(f"{self.path} is not a result store: {error}") from error
            raise

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        columns = {
            name: ", ".join(f"{c} {TYPES.get(c, 'REAL')}" for c in fields)
            for name, fields in (("losses", LOSSES), ("routing", ROUTING))
        }
        with closing(self._db.cursor()) as cursor:
            if cursor.execute("PRAGMA user_version").fetchone() == (SCHEMA,):
                return  # without writing to it
            cursor.execute("BEGIN IMMEDIATE")
            (version,) = cursor.execute("PRAGMA user_version").fetchone()
            tables = cursor.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version not in (0, SCHEMA) or (version == 0 and tables):
                cursor.execute("ROLLBACK")
                raise ValueError(
                    f"{self.path} has schema version {version}; this program reads {SCHEMA}. "
                    "Use the version that wrote it, or another --out"
                )
            cursor.execute(
                "CREATE TABLE IF NOT EXISTS cells (id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT "
                "NULL, identity TEXT NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL)"
            )
            for name, definition in columns.items():
                cursor.execute(f"CREATE TABLE IF NOT EXISTS {name} (cell INTEGER, {definition})")
                cursor.execute(f"CREATE INDEX IF NOT EXISTS {name}_cell ON {name} (cell)")
            cursor.execute(f"PRAGMA user_version={SCHEMA}")
            cursor.execute("COMMIT")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def keys(self) -> set[str]:
        """Of all finished cells."""
        return {key for (key,) in self._db.execute("SELECT key FROM cells")}

    def add(self, identity: dict[str, Any], cell: Cell) -> bool:
        """Write a cell, durably; False if another writer already has, which changes nothing."""
        cursor = self._db.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            cursor.execute(
                "INSERT OR IGNORE INTO cells (key, identity, seconds, created) VALUES (?, ?, ?, ?)",
                (
                    cell_key(identity),
                    json.dumps(identity, sort_keys=True),
                    cell.seconds,
                    time.time(),
                ),
            )
            added = cursor.rowcount == 1
            if added:
                number = cursor.lastrowid
                self._insert(cursor, "losses", LOSSES, number, cell.losses)
                self._insert(cursor, "routing", ROUTING, number, cell.routing)
            cursor.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite has rolled back itself where the disk was full
                cursor.execute("ROLLBACK")
            raise
        return added

    @staticmethod
    def _insert(cursor, table: str, columns: tuple[str, ...], number: int, frame) -> None:
        if frame.empty:
            return
        frame = frame.reindex(columns=columns).astype(object)
        rows = ((number, *row) for row in frame.itertuples(index=False, name=None))
        marks = ", ".join("?" * (len(columns) + 1))
        cursor.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)

    def read(self, table: str, keys: Iterable[str]) -> pd.DataFrame:
        """Rows of the table ("losses" or "routing") of these cells, with a column `key`."""
        columns = {"losses": LOSSES, "routing": ROUTING}[table]
        cursor = self._db.cursor()
        cursor.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (key TEXT PRIMARY KEY)")
        cursor.execute("DELETE FROM wanted")
        cursor.executemany("INSERT OR IGNORE INTO wanted VALUES (?)", ((k,) for k in keys))
        names = ", ".join(f"{table}.{c}" for c in columns)
        rows = cursor.execute(
            f"SELECT cells.key, {names} FROM cells JOIN wanted USING (key) "
            f"JOIN {table} ON {table}.cell = cells.id ORDER BY {table}.rowid"
        ).fetchall()
        return pd.DataFrame(rows, columns=["key", *columns])

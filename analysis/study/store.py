"""The result store: cells in one SQLite file, safe under kill -9 and several writers.

A cell is what one condition gave on one shard with one model. Its key is the hash of its identity:
everything that can change a bit of it. One transaction a cell, with synchronous=FULL, so a cell is
either there whole and for good, or not at all. No write-ahead log: it saves 0.7 ms a cell, but its
file is three, cannot be read from a read-only place or shared over a network, and two processes
that make it at once find it "locked" without waiting.

    cells      key, identity, seconds, created, and checksums: of its own row, and of its rows
               in each of the other tables
    losses, routing, tokens   their rows (see `analysis.measure.Cell`); tokens only where asked for
    failures   cells that killed their workers: key, identity, reason, attempts, checksum
    counts     how many rows cells and failures have: damage can make a page of them look empty
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.measure import Cell
from analysis.study.tables import CELL, SCHEMA, SCHEMA_SQL, TABLES, DamagedCells, checksums, typed
from cartmoe.interrupt import Later

ROWS = 100_000  # read at once
# How SQLite calls what is no damage.
OF_THE_PLACE = ("SQLITE_BUSY", "SQLITE_FULL", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_PERM")


def cell_key(identity: dict[str, Any]) -> str:
    """SHA-256 of the identity's canonical JSON."""
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()


def _canonical(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True, separators=(",", ":"))


class Store:
    """Cells by key, in the file at `path`, which is made if it is not there.

    readonly   neither made nor written to, so that it may lie where nobody can write

    Raises `ValueError` naming the file if it is no store, one of another schema version, or, when
    it is read, damaged; `FileNotFoundError` for one to be read that is not there.
    """

    def __init__(self, path: str | Path, readonly: bool = False):
        self.path = Path(path)
        if readonly and not self.path.is_file():
            raise FileNotFoundError(f"there are no results at {self.path}")
        if not readonly:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # What a killed writer has left half done can only be taken back by writing.
        journal = self.path.with_name(f"{self.path.name}-journal").exists()
        mode = "rwc" if not readonly else "rw" if journal else "ro"
        with self._named("is not a result store"):
            uri = f"{self.path.absolute().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(uri, timeout=120, isolation_level=None, uri=True)
            try:
                self._open(readonly)
            except BaseException:
                self._db.close()
                raise

    def _open(self, readonly: bool) -> None:
        self._db.execute("PRAGMA synchronous=FULL")
        if self._db.execute("PRAGMA user_version").fetchone() == (SCHEMA,):
            return  # without writing to it
        with nullcontext(self._db) if readonly else self._transaction() as cursor:
            (version,) = cursor.execute("PRAGMA user_version").fetchone()
            (tables,) = cursor.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if readonly or version not in (0, SCHEMA) or (version == 0 and tables):
                raise ValueError(
                    f"{self.path} has schema version {version}; this program reads {SCHEMA}. "
                    "Use the version that wrote it, or another --out"
                )
            for statement in SCHEMA_SQL:
                cursor.execute(statement)
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

    def seconds(self) -> dict[str, float]:
        """By key of every finished cell, how long it took to measure."""
        return {key: seconds for key, seconds, *_ in self._cells()}

    def identities(self) -> dict[str, dict[str, Any]]:
        """By key of every finished cell, what it is the hash of."""
        with self._named():
            rows = self._db.execute("SELECT key, identity FROM cells").fetchall()
        return {key: json.loads(text) for key, text in rows if cell_key(json.loads(text)) == key}

    def _cells(self) -> list[tuple[Any, ...]]:
        """`CELL` and the id of each, in the order in which they were added."""
        return [(*own, id) for *own, id in self._rows("cells", CELL, "id")]

    def _rows(self, table: str, columns: Sequence[str], *more: str) -> list[tuple[Any, ...]]:
        """The columns of all rows, over which there is a checksum, and more columns; by rowid.

        Raises `DamagedCells`."""
        with self._named():
            names = ", ".join([*columns, *more, "checksum"])
            rows = self._db.execute(f"SELECT {names} FROM {table} ORDER BY rowid").fetchall()
            counted = "SELECT number FROM counts WHERE name = ?"
            count = self._db.execute(counted, (table,)).fetchone()
        good = {row[0]: _sha256(row[: len(columns)]) == row[-1] for row in rows}
        if not all(good.values()) or count != (len(good),):
            raise DamagedCells(self.path, [key for key, is_good in good.items() if not is_good])
        return [row[:-1] for row in rows]

    def add(self, identity: dict[str, Any], cell: Cell) -> bool:
        """Write a cell, durably; False if another writer already has, which changes nothing."""
        text = _canonical(identity)
        key = hashlib.sha256(text.encode()).hexdigest()
        frames = {name: typed(name, getattr(cell, name)) for name in TABLES}
        sums = [int(checksums(frame, np.zeros(len(frame))).sum()) for frame in frames.values()]
        own = (key, float(cell.seconds), time.time(), *sums)
        with self._named(), self._transaction() as cursor:
            cursor.execute(
                f"INSERT OR IGNORE INTO cells ({', '.join(CELL)}, identity, checksum) "
                f"VALUES ({_marks(len(own) + 2)})",
                (*own, text, _sha256(own)),
            )
            if cursor.rowcount == 0:
                return False
            number = cursor.lastrowid
            for table, frame in frames.items():
                rows = frame.assign(cell=number)[["cell", *frame]]
                insert = f"INSERT INTO {table} VALUES ({_marks(rows.shape[1])})"
                cursor.executemany(insert, rows.itertuples(index=False, name=None))
            cursor.execute("DELETE FROM failures WHERE key = ?", (key,))
            _count(cursor, failures=-cursor.rowcount, cells=1)
        return True

    def remove(self, keys: Iterable[str]) -> None:
        """Forget these cells, whatever is left of them, and those of which nothing is."""
        listed, wanted = "IN (SELECT value FROM json_each(?))", [json.dumps([*keys])]
        with self._named(), self._transaction() as cursor:
            for table in TABLES:
                ids = f"(SELECT id FROM cells WHERE key {listed})"
                cursor.execute(f"DELETE FROM {table} WHERE cell IN {ids}", wanted)
            for table in ("cells", "failures"):
                cursor.execute(f"DELETE FROM {table} WHERE key {listed}", wanted)
                cursor.execute(
                    f"REPLACE INTO counts SELECT '{table}', count(*) FROM {table} NOT INDEXED"
                )

    def fail(self, identity: dict[str, Any], reason: str, attempts: int) -> None:
        """Note that a cell killed its workers so many times, in place of what was noted before."""
        failure = (cell_key(identity), reason, attempts)
        with self._named(), self._transaction() as cursor:
            cursor.execute("DELETE FROM failures WHERE key = ?", failure[:1])
            _count(cursor, failures=1 - cursor.rowcount)
            cursor.execute(
                "INSERT INTO failures (key, reason, attempts, identity, checksum) "
                f"VALUES ({_marks(5)})",
                (*failure, _canonical(identity), _sha256(failure)),
            )

    def failures(self) -> pd.DataFrame:
        """key, reason, attempts of every cell that failed and was not measured since."""
        columns = ("key", "reason", "attempts")
        return pd.DataFrame(self._rows("failures", columns), columns=columns)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        with Later(), self._db:  # which commits, or rolls back
            yield self._db.execute("BEGIN IMMEDIATE")

    @contextmanager
    def _named(self, what: str = "is damaged") -> Iterator[None]:
        """Errors of SQLite within the block name the file, and say what is wrong with it."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # a damaged name has no UTF-8
            if getattr(error, "sqlite_errorname", "").startswith(OF_THE_PLACE):
                raise OSError(f"{self.path}: {error}") from error
            raise ValueError(f"{self.path} {what}: {error}") from error

    def read(self, table: str, keys: Iterable[str]) -> pd.DataFrame:
        """Rows of the table, a key of `TABLES`, of these cells, with a column `key`.

        Raises `DamagedCells` for those whose rows are not as they were written.
        """
        wanted = set(keys)
        cells = pd.DataFrame(self._cells(), columns=[*CELL, "cell"]).set_index("cell")
        cells = cells[cells.key.isin(wanted)]
        columns, ids = TABLES[table], json.dumps(cells.index.tolist())
        with self._named():
            rows = self._db.execute(
                f"SELECT cell, {', '.join(columns)} FROM {table} "
                "WHERE cell IN (SELECT value FROM json_each(?)) ORDER BY rowid",
                [ids],
            )
            parts = [typed(table, None).assign(cell=pd.Series(dtype="int64"))]
            # Tuples take several times the memory of columns, so not all of them are held at once.
            while some := rows.fetchmany(ROWS):
                part = pd.DataFrame(some, columns=["cell", *columns])
                try:
                    parts.append(typed(table, part).assign(cell=part.cell.astype("int64")))
                except (ValueError, TypeError, OverflowError) as error:
                    raise ValueError(f"{self.path} is damaged: {error}") from error
        frame = pd.concat(parts[1:] or parts).sort_values("cell", kind="stable", ignore_index=True)
        found = checksums(frame[[*columns]], frame.cell).reindex(cells.index, fill_value=0)
        damaged = cells.key[found != cells[table]]
        if len(damaged):
            raise DamagedCells(self.path, damaged)
        return frame.assign(key=frame.cell.map(cells.key))[["key", *columns]]


def _count(cursor: sqlite3.Cursor, **more: int) -> None:
    """Note that so many rows were added to these tables."""
    for name, number in more.items():
        cursor.execute("UPDATE counts SET number = number + ? WHERE name = ?", (number, name))


def _sha256(row: tuple[Any, ...]) -> str:
    return hashlib.sha256(repr(row).encode()).hexdigest()


def _marks(number: int) -> str:
    return ", ".join("?" * number)

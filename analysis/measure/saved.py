"""Results of a sweep in a folder, and back, to the last bit.

results.json          columns of the tables and their types, cells planned and finished
losses.csv, ...       the tables of `Results`
tokens.csv            where every token's loss was kept, as base64
manifest.json         size and SHA-256 of each
"""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd

from cartmoe.folders import damage, write_folder

KIND = "results"  # the manifest's key, so that another folder is not taken for one
META = "results.json"
TABLES = ("losses", "routing", "facts", "cells", "failed", "models")
KEY = ["model", "train_seed", "condition"]
BYTES = ["nll", "targets"]  # columns of tokens


def is_saved(path: Path) -> bool:
    """Whether the folder is one of results, whole or not."""
    return (path / META).is_file()


def write_tables(path: Path, tables: dict[str, pd.DataFrame], counts: dict[str, Any]) -> None:
    """Make the folder. Raises `FileExistsError` if there is something at the path."""

    def fill(folder: Path) -> None:
        types = {}
        for name, table in tables.items():
            if name == "tokens":
                table = table.assign(**{c: table[c].map(_encoded) for c in BYTES})
            types[name] = {column: str(table[column].dtype) for column in table}
            # Quoted: a name may have a line break in it, or a carriage return.
            how: Any = dict(index=False, na_rep="nan", quoting=csv.QUOTE_NONNUMERIC)
            table.to_csv(folder / f"{name}.csv", **how)
        meta = {"counts": counts, "types": types}
        (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    write_folder(path, fill, KIND)


def read_tables(path: Path) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """What was written; `ValueError` naming the file that is not."""
    if problem := damage(path, key=KIND):
        raise ValueError(f"{path} is not whole: {problem}")
    meta = json.loads((path / META).read_text(encoding="utf-8"))
    tables = {}
    for name, types in meta["types"].items():
        file = path / f"{name}.csv"
        # As text first: a document may be called "NA".
        raw = pd.read_csv(file, dtype=str, keep_default_na=False) if types else pd.DataFrame()
        tables[name] = pd.DataFrame({c: _typed(raw[c], kind) for c, kind in types.items()})
    if "tokens" in tables:
        tables["tokens"] = tables["tokens"].assign(
            **{c: tables["tokens"][c].map(_decoded) for c in BYTES}
        )
    return tables, meta["counts"]


def _typed(column: pd.Series, kind: str) -> pd.Series:
    return column == "True" if kind == "bool" else column.astype(kind)


def _encoded(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else ""


def _decoded(text: str) -> bytes | None:
    return base64.b64decode(text) if text else None

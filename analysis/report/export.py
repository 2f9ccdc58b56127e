"""A study's tables as files that other programs read."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.study import read
from cartmoe.config import check_choice
from cartmoe.files import sync, temporary
from cartmoe.folders import check_directory

FORMATS = ("parquet", "csv")


def export(
    directory: str | Path, format: str = "parquet", out: str | Path | None = None
) -> list[Path]:
    """Write losses, routing, cells, and damage where there is any, each whole or not at all.

    directory   of a study, finished or not;  out   default: its folder export

    Returns the paths. Raises `ValueError` for another format, `ImportError` where Parquet needs
    pyarrow, and as `read` does.
    """
    check_choice("format", format, FORMATS)
    if format == "parquet":
        _check_pyarrow()
    results = read(directory)
    tables = {"losses": results.losses, "routing": results.routing, "cells": results.cells}
    if results.has_conditions:
        tables["damage"] = results.damage()
    folder = Path(directory) / "export" if out is None else Path(out)
    check_directory(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(table, folder / f"{name}.{format}") for name, table in tables.items()]


def _check_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow; install it: pip install 'cartmoe[data]', or choose --format csv"
        ) from error


def _write(table: pd.DataFrame, path: Path) -> Path:
    with temporary(path) as new:
        if path.suffix == ".csv":
            table.to_csv(new, index=False)
        else:
            table.to_parquet(new, index=False)
        sync(new)
        new.replace(path)
    sync(path.parent)
    return path

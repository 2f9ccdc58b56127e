"""The tables and figures that a study leaves in its directory; its tables for other programs."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from analysis.report.captions import words
from analysis.report.figures import drawn, shown_in
from analysis.report.made import Note, draw, write_note, write_tables
from analysis.report.text import describe, tables
from analysis.study import STORE, Store, read, read_plan, source_sha256
from cartmoe.config import check_choice
from cartmoe.files import path_of, write_atomically
from cartmoe.folders import check_directory
from cartmoe.lock import locked

NOTE = ".made.json"  # what tables or figures were made from, and their names
# The rooms that decide what they look like.
CODE = ("analysis/measure", "analysis/stats", "analysis/plots", "analysis/report")


def summarize(out: Path, to: Path | None = None) -> str:
    """Write tables/*.csv and robustness.txt, and return what that file says.

    out   of a study;  to   the directory for them, default: `out`

    What was summarized already, from the same cells by the same code, is not done again.
    """
    text = (to or out) / "robustness.txt"

    def write(folder: Path) -> list[Path]:
        results, plan = read(out), read_plan(out)
        made = tables(results, plan["contrasts"])
        said = describe(results, made, plan["contrasts"], plan["study"]["data"])
        write_atomically(text, said)
        return [text, *write_tables(made, folder)]

    _once(out, (to or out) / "tables", write)
    return text.read_text(encoding="utf-8")


def plot(out: Path, progress: bool = False, to: Path | None = None) -> list[Path]:
    """Draw every figure that the study has the conditions for: PNG, PDF and SVG in figures/ of
    `to`, by default of `out`, and its words beside it (see `analysis.report.captions`)."""

    def write(folder: Path) -> list[Path]:
        results, plan, files = read(out), read_plan(out), []
        bar = tqdm(shown_in(results), desc="drawing", unit="figure", disable=not progress)
        for name, shown, table in bar:
            text = words(results, plan, name)
            files += draw(partial(drawn, shown, table, results), folder / name, text)
        return files

    return _once(out, (to or out) / "figures", write)


def export(
    directory: str | Path, format: str = "parquet", out: str | Path | None = None
) -> list[Path]:
    """Write losses, routing, cells, and damage where there is any, each whole or not at all.

    directory   of a study, finished or not;  out   default: its folder export

    Returns the paths. Raises `ValueError` for another format, `ImportError` where Parquet needs
    pyarrow, and as `read` does.
    """
    check_choice("format", format, ("parquet", "csv"))
    if format == "parquet" and find_spec("pyarrow") is None:
        raise ImportError(
            "Parquet needs pyarrow; install it: pip install 'cartmoe[data]', or choose --format csv"
        )
    results = read(directory)
    tables = {"losses": results.losses, "routing": results.routing, "cells": results.cells}
    if results.has_conditions:
        tables["damage"] = results.damage(full=True)
    folder = Path(directory, "export") if out is None else path_of("out", out)
    check_directory(folder)
    with locked(folder, wait=True):
        return write_tables(tables, folder, format)


def _once(out: Path, folder: Path, write: Callable[[Path], list[Path]]) -> list[Path]:
    """The files of the folder, which `write` makes of a study unless they are there already, made
    from the same and as they were written. What was made from something else and is not made now
    is removed."""
    asked = {"made_from": _fingerprint(out)}
    before = _made(folder, asked)
    if before.asked == asked:
        return list(before.files)
    with locked(folder.parent, f"{folder.name}.lock", wait=True):
        before = _made(folder, asked)  # by another process meanwhile
        if before.asked != asked:
            folder.mkdir(exist_ok=True)
            files = write(folder)
            for path in set(before.files) - set(files):
                path.unlink(missing_ok=True)
            write_note(folder / NOTE, asked, files)
            return files
    return list(before.files)


def _made(folder: Path, asked: dict[str, Any]) -> Note:
    """What is there; as if nothing had been asked for where that differs, or it is damaged."""
    try:
        note = Note.read(folder / NOTE)
    except FileNotFoundError:
        return Note({}, {})
    except ValueError as error:
        warnings.warn(f"{error}; it is made anew", stacklevel=4)
        return Note({}, {})
    same = not note.other(asked) and note.is_whole()
    return note if same else Note({}, note.files)


def _fingerprint(out: Path) -> str:
    """Of all that a report is made from: the plan, the cells that are there, and this code."""
    plan = {name: value for name, value in read_plan(out).items() if name != "manifest"}
    digest = hashlib.sha256(json.dumps(plan).encode())
    with Store(out / STORE, readonly=True) as store:
        digest.update("".join(sorted(store.keys())).encode())
        digest.update(store.failures().sort_values("key").to_csv().encode())
    digest.update(source_sha256(CODE).encode())
    return digest.hexdigest()

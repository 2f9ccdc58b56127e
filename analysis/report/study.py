"""The tables and figures that a study leaves in its directory; its tables for other programs."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from analysis import plots
from analysis.measure import Results
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
# The table a picture is drawn from, empty where the study has nothing of it; and the picture.
Picture = tuple[Callable[[Results], pd.DataFrame], Callable[[pd.DataFrame], Axes | Figure]]


def fitting(pattern: str) -> Callable[[Results], pd.DataFrame]:
    """The table of damage if a label (see `stats.label`) fits the pattern, else none of it."""

    def table(results: Results) -> pd.DataFrame:
        damage = results.damage(full=True)
        return damage if damage.label.str.fullmatch(pattern).any() else damage[:0]

    return table


def of_tokens(table: Callable[[Results], pd.DataFrame]) -> Callable[[Results], pd.DataFrame]:
    """That table of DropTop(1) if it was measured and every token's loss was kept."""
    subject = fitting(re.escape(SUBJECT))
    return lambda r: table(r) if r.tokens and len(subject(r)) else pd.DataFrame()


def flips_per_token(results: Results) -> pd.DataFrame:
    """The robustness gaps that stand on one axis."""
    gap = results.gap()
    return gap[gap.per == "token"] if len(gap) else gap


SUBJECT = "DropTop(1)"
NOISE, TOP = r"GaussianNoise\([^,]+\)", r"DropTop\(\d+\)"

FIGURES: dict[str, Picture] = {
    "droptop_strength": (fitting(TOP), lambda t: plots.damage_curve(t, "DropTop")),
    "droptop_mass": (fitting(TOP), lambda t: plots.damage_curve(t, "DropTop", x="mass_moved")),
    "noise_strength": (fitting(NOISE), lambda t: plots.damage_curve(t, "GaussianNoise")),
    "noise_mass": (fitting(NOISE), lambda t: plots.damage_curve(t, "GaussianNoise", "mass_moved")),
    "noise_doses": (fitting(NOISE), lambda t: plots.dose_panels(t, "GaussianNoise")),
    "controls": (fitting(re.escape(SUBJECT)), plots.control_dots),
    "stages": (fitting(r"DropTop\(1\)(, stage \d+)?(, scores)?"), plots.stage_dots),
    "catalogue": (lambda r: r.damage(full=True), plots.catalogue_dots),
    "split": (lambda r: r.split(), plots.split_bars),
    "cascade": (lambda r: r.cascade(), plots.cascade_dots),
    "layers": (lambda r: r.additivity(), plots.layer_profile),
    "gap": (flips_per_token, plots.gap_curve),
    "tails": (of_tokens(lambda r: r.tail_curve([SUBJECT])), plots.tail_shares),
    "position": (of_tokens(lambda r: r.damage_by("position", [SUBJECT])), plots.group_curve),
    "frequency": (of_tokens(lambda r: r.damage_by("frequency", [SUBJECT])), plots.group_curve),
}


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
    """Draw every figure that the study has the conditions for: PNG and PDF in figures/ of `to`,
    by default of `out`."""

    def write(folder: Path) -> list[Path]:
        results, files = read(out), []
        drawn = FIGURES.items() if results.has_conditions else ()
        bar = tqdm(drawn, desc="drawing", unit="figure", disable=not progress)
        for name, (table_of, picture) in bar:
            table = table_of(results)
            if not table.empty:
                files += draw(partial(picture, table), folder / name)
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

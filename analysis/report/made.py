"""What lies in a folder and what it was made from, noted there, so that it is not made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots
from cartmoe.files import sync, temporary, write_atomically

Picture = Callable[[], Axes | Figure]


def recorded(note: Path, asked: dict[str, Any]) -> tuple[list[str], list[Path]]:
    """(which parts of what is `asked` differ from what was, the files that were made), by the note
    beside these. What cannot be read is nobody's note."""
    try:
        known = dict(json.loads(note.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        known = {}
    now = json.loads(json.dumps(asked))  # as it would be read: tuples are lists
    differing = [name for name, value in now.items() if known.get(name) != value]
    return differing, [note.parent / name for name in known.get("files") or []]


def record(note: Path, asked: dict[str, Any], files: Iterable[Path]) -> None:
    """Write the note; the folder is made if it is not there."""
    note.parent.mkdir(parents=True, exist_ok=True)
    names = [str(path.relative_to(note.parent)) for path in files]
    write_atomically(note, json.dumps(asked | {"files": names}, indent=1) + "\n")


def write_tables(
    tables: Mapping[str, pd.DataFrame], folder: Path, format: str = "csv"
) -> list[Path]:
    """Each as a file of its name, "csv" or "parquet", whole or not at all; their paths."""
    paths = {folder / f"{name}.{format}": table for name, table in tables.items()}
    for path, table in paths.items():
        with temporary(path) as new:
            (table.to_csv if format == "csv" else table.to_parquet)(new, index=False)
            sync(new)
            new.replace(path)
    return list(paths)


def draw(picture: Picture, path: Path) -> list[Path]:
    """The picture in the paper's style, saved as the path with each ending."""
    with plots.paper_style():
        drawing = picture()
        files = plots.save(drawing, path)
        plt.close(getattr(drawing, "figure", drawing))
    return files

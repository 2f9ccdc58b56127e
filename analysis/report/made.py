"""What lies in a folder and what it was made from, noted there, so that it is not made again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots
from cartmoe.files import sync, temporary
from cartmoe.folders import differing, fingerprint
from cartmoe.sealed import read_sealed, write_sealed

Picture = Callable[[], Axes | Figure]


class Note(NamedTuple):
    """What lies in a folder: what was `asked` for, and the fingerprints of the files made of it."""

    asked: dict[str, Any]
    files: dict[Path, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Note:
        """Raises `FileNotFoundError`, and `ValueError` naming a note that is not as it was
        written."""
        asked = read_sealed(path)
        files = asked.pop("files")
        place = path.parent
        return cls(asked, {Path(os.path.normpath(place / name)): files[name] for name in files})

    def other(self, asked: dict[str, Any]) -> list[str]:
        """Which parts of what is `asked` now differ."""
        now = json.loads(json.dumps(asked))  # as it would be read: tuples are lists
        return [name for name, value in now.items() if self.asked.get(name) != value]

    def is_whole(self) -> bool:
        """Whether all files are there and as they were written; warns of those that are others."""
        problems = {path: differing(path, known) for path, known in self.files.items()}
        changed = [f"{path} ({said})" for path, said in problems.items() if said and path.exists()]
        if changed:
            warnings.warn(f"{'; '.join(changed)}: made anew", stacklevel=3)
        return not any(problems.values())


def write_note(path: Path, asked: dict[str, Any], files: Iterable[Path]) -> None:
    """Write the note beside the files; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {os.path.relpath(file, path.parent): fingerprint(file) for file in files}
    write_sealed(path, asked | {"files": known})


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


def draw(picture: Picture, path: Path, text: str | None = None) -> list[Path]:
    """The picture in the paper's style, saved as the path with each ending, its text beside it."""
    with plots.paper_style():
        drawing = picture()
        files = plots.save(drawing, path, text)
        plt.close(getattr(drawing, "figure", drawing))
    return files

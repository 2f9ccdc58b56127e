"""Pictures as files, written whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots.style import COLUMN_WIDTH, PAGE_WIDTH, paper_style
from analysis.stats import check_choice

WIDTHS = {1: COLUMN_WIDTH, 2: PAGE_WIDTH}
# Text stays text in a PDF and in an SVG (paper.mplstyle): it can be searched and copied, and is
# smaller than letters drawn as paths. No dates: the same picture is the same bytes.
KINDS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 300},
    "pdf": {"metadata": {"CreationDate": None}},
    "svg": {"metadata": {"Date": None}},
}


def save(
    figure_or_axes: Figure | Axes,
    stem: str | Path,
    text: str | None = None,
    columns: int | None = None,
) -> list[Path]:
    """Write stem.png (300 dpi), stem.pdf and stem.svg (text kept as text); returns the paths.

    text      what is to stand beside them, such as `analysis.caption` gives, as stem.txt
    columns   1 or 2: as wide as so many columns of a paper, letters staying as they are; None: as
              wide as it was drawn

    Folders are made, files replaced only when they are complete; the figure stays open, as wide as
    it then is. Raises `ValueError` for another number of columns.
    """
    if columns is not None:
        check_choice("columns", columns, WIDTHS)
        figure_or_axes.get_figure(root=True).set_figwidth(WIDTHS[columns])
    stem = Path(stem)
    if stem.suffix.removeprefix(".") in KINDS:
        stem = stem.with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    contents = {kind: picture_bytes(figure_or_axes, kind, stem.name) for kind in KINDS}
    contents |= {} if text is None else {"txt": text.encode()}
    paths = []
    for kind, content in contents.items():
        path = stem.with_name(f"{stem.name}.{kind}")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        paths.append(path)
    return paths


def picture_bytes(figure_or_axes: Figure | Axes, kind: str, name: str) -> bytes:
    """The picture as a file of that kind ("png", "pdf", "svg"), whose ids follow from `name`."""
    figure = figure_or_axes.get_figure(root=True)
    file = io.BytesIO()
    with paper_style(), mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format=kind, **KINDS[kind])
    return file.getvalue()

"""What all pictures share: size, fonts, a colour and a marker for each family, scales, saving."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from analysis.stats import CHECKPOINT, check_choice, check_columns

COLUMN_WIDTH, PAGE_WIDTH = 3.3, 6.8  # inches, one column and both of a two-column paper

# Okabe and Ito's colours, which color-blind readers can tell apart, less their yellow: it is too
# pale for a line. Markers differ too, so a print in grey can be read.
FAMILY_STYLE = {
    "dense": ("#000000", "."),
    "smoe": ("#E69F00", "s"),
    "smoe_share": ("#56B4E9", "D"),
    "hash": ("#009E73", "v"),
    "fine_grained": ("#0072B2", "^"),
    "top_p": ("#CC79A7", "P"),
    "cartesian": ("#D55E00", "o"),
}
OTHER_STYLE = [("#595959", "X"), ("#8C6D31", "h"), ("#A6A6A6", "*"), ("#5E3C99", "p")]
FACES = [1.0, 0.0, 0.5, 0.25]  # how much of the color a marker's face has, beside each of
LINES = ["-", "--", ":", "-."]  # models of one family share its colour and marker

DELTA = "change of loss (nats per token)"


def paper_style() -> AbstractContextManager[None]:
    """Matplotlib settings for a paper's column, for the length of a with block.

    Those of paper.mplstyle. Only what is drawn or saved inside is affected.
    """
    # A notebook's backend makes itself interactive when the first figure loads it. Loaded within
    # the context it would be reset at the end, and never show another figure.
    plt.switch_backend(mpl.get_backend())
    return plt.style.context(Path(__file__).with_name("paper.mplstyle"))


class Sheet(Figure):
    """A figure that a notebook shows once: where it is what a cell's last line gives, or else when
    the cell ends, with all that are open then."""

    def _ipython_display_(self) -> None:
        from IPython import get_ipython  # there, if it calls
        from IPython.display import display

        formatters = get_ipython().display_formatter.formatters
        kinds = {kind: fn for kind, fn in formatters.items() if kind.startswith("image/")}
        shown = {kind: data for kind, fn in kinds.items() if (data := fn(self)) is not None}
        if shown:
            plt.close(self)  # or it would be shown again when the cell ends
            display(shown, raw=True)


@contextmanager
def sheet(width: float, height: float, layout: str = "constrained") -> Iterator[Figure]:
    """A new figure in paper_style, closed if drawing it fails; "compressed" suits square panels."""
    with paper_style():
        figure = plt.figure(figsize=(width, height), layout=layout, FigureClass=Sheet)
        try:
            yield figure
        except BaseException:
            plt.close(figure)
            raise


@contextmanager
def canvas(ax: Axes | None, height: float) -> Iterator[Axes]:
    """The given axes with the user's settings, or new ones of a column's width in paper_style."""
    if ax is not None:
        yield ax
    else:
        with sheet(COLUMN_WIDTH, height) as figure:
            yield figure.subplots()


def table_of(source: Any, name: str, columns: Iterable[str], *args: Any) -> pd.DataFrame:
    """The table of `stats` of this name that a plot was given, or what source.name(*args) gives.

    Raises `ValueError` for other things, missing columns, and a table without rows.
    """
    frame = source
    if not isinstance(frame, pd.DataFrame):
        if not callable(getattr(source, name, None)):
            raise ValueError(
                f"frame is a {type(source).__name__}; give the table of stats.{name} or an object "
                f"with a {name}() method"
            )
        method = getattr(source, name)
        everything = {"full": True} if "full" in inspect.signature(method).parameters else {}
        frame = method(*args, **everything)
    check_rows(name, frame, [*CHECKPOINT, *columns])
    return frame


def check_rows(name: str, frame: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raise `ValueError` for what is no table, lacks columns or has no rows."""
    check_columns(name, frame, columns)
    if frame.empty:
        raise ValueError(f"table {name} has no rows: nothing of it was measured")


def under(
    condition: str | None, source: Any, name: str, columns: Iterable[str], *args: Any
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Rows of one condition (a label; None: all) in `table_of`; the styles of all of its models.

    Raises `ValueError` like `table_of`, and with the choices for another condition.
    """
    frame = table_of(source, name, ["condition", *columns], *args)
    styles = model_styles(frame)
    if condition is not None:
        check_choice("condition", condition, frame.condition.unique())
        frame = frame[frame.condition == condition]
    return frame, styles


def model_styles(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """color, marker and linestyle of each model, in order; families keep theirs in every plot."""
    models = frame[["model", "family"]].drop_duplicates("model")
    unknown = [f for f in models.family.unique() if f not in FAMILY_STYLE]
    looks = FAMILY_STYLE | dict(zip(unknown, cycle(OTHER_STYLE), strict=False))
    lines = models.groupby("family", dropna=False).cumcount() % len(LINES)
    styles = {}
    for model, family, line in zip(models.model, models.family, lines, strict=True):
        color, marker = looks[family]
        styles[model] = {"color": color, "marker": marker, "linestyle": LINES[line]}
    return styles


def filled(style: dict[str, str]) -> float:
    """How much of the color a marker's face has where there are no lines: see `FACES`."""
    return FACES[LINES.index(style["linestyle"])]


def tint(color: str, share: float) -> str:
    """So much of a color, the rest white."""
    return to_hex(1 - share * (1 - np.array(to_rgb(color))))


def marker_look(style: dict[str, str]) -> dict[str, Any]:
    """A marker where there are no lines to tell models of one family apart by: solid, hollow, then
    two tints. A white edge parts it from others, and must leave something of it."""
    share = filled(style)
    face = tint(style["color"], share)
    edge = {"mec": "white", "mew": 0.3} if share == 1 else {"mec": style["color"], "mew": 0.8}
    return {"color": style["color"], "marker": style["marker"], "mfc": face, **edge}


def widen_scale(axis: Any, values: Iterable[float]) -> None:
    """Make an axis symlog if a linear one would press half of the values into a twentieth.

    Not log: a change of loss may be 0 or negative.
    """
    sizes = np.abs(np.asarray(list(values), dtype=float))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if len(sizes) < 2 or sizes.max() <= 20 * np.median(sizes):
        return
    threshold = 10.0 ** np.floor(np.log10(np.median(sizes)))
    getattr(axis.axes, f"set_{axis.axis_name}scale")("symlog", linthresh=threshold)
    axis.axes.autoscale(axis=axis.axis_name)  # else the margins stay those of the linear scale
    axis.set_major_formatter(lambda value, _: f"{value:g}")


# Text stays text in a PDF and in an SVG (paper.mplstyle): it can be searched and copied, and is
# smaller than letters drawn as paths. No dates: the same picture is the same bytes.
KINDS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 300},
    "pdf": {"metadata": {"CreationDate": None}},
    "svg": {"metadata": {"Date": None}},
}


def save(figure_or_axes: Figure | Axes, stem: str | Path, text: str | None = None) -> list[Path]:
    """Write stem.png (300 dpi), stem.pdf and stem.svg (text kept as text); returns the paths.

    text   what is to stand beside them, such as `analysis.caption` gives, as stem.txt

    Folders are made, files replaced only when they are complete; the figure stays open.
    """
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
    figure = getattr(figure_or_axes, "figure", figure_or_axes)
    file = io.BytesIO()
    with paper_style(), mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format=kind, **KINDS[kind])
    return file.getvalue()

"""What all pictures share: size, fonts, a color and a marker for each family."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
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

# Any two can be told apart by normal, protan, deutan and tritan eyes: by at least 0.15 in Oklab, as
# tests/analysis/plots/test_style.py simulates it. Markers differ, so a print in grey can be read.
FAMILY_STYLE = {
    "dense": ("#000000", "."),
    "smoe": ("#004488", "s"),
    "smoe_share": ("#56B4E9", "D"),
    "hash": ("#CCBB44", "v"),
    "fine_grained": ("#785EF0", "^"),
    "top_p": ("#800026", "P"),
    "cartesian": ("#D55E00", "o"),
}
# Of families that are not there; a family's name leads to one of them (see `family_styles`).
OTHER_STYLE = [
    (color, marker)
    for marker in ("X", "h", "*", "p", "d")
    for color in ("#009E73", "#CC79A7", "#717581", "#8C510A")
]
FACES = [1.0, 0.0, 0.5, 0.25]  # how much of the color a marker's face has, beside each of
LINES = ["-", "--", ":", "-."]  # models of one family share its colour and marker

DELTA = "change of loss (nats per token)"
UNFINISHED = "unfinished"  # what a table's `attrs` say of the results it was made from


def paper_style() -> AbstractContextManager[None]:
    """Matplotlib settings for a paper's column, for the length of a with block.

    Those of paper.mplstyle. Only what is drawn or saved inside is affected.
    """
    # A notebook's backend makes itself interactive when the first figure loads it. Loaded within
    # the context it would be reset at the end, and never show another figure.
    plt.switch_backend(mpl.get_backend())
    return plt.style.context(Path(__file__).with_name("paper.mplstyle"))


class Sheet(Figure):
    """A figure that a notebook shows once: where it, or axes of it, are what a cell's last line
    gives, or else when the cell ends, with all that are open then."""

    def _ipython_display_(self) -> None:
        from IPython import get_ipython  # there, if it calls
        from IPython.display import display

        formatters = get_ipython().display_formatter.formatters
        kinds = {kind: fn for kind, fn in formatters.items() if kind.startswith("image/")}
        shown = {kind: data for kind, fn in kinds.items() if (data := fn(self)) is not None}
        if shown:
            plt.close(self)  # or it would be shown again when the cell ends
            display(shown, raw=True)


class SheetAxes(Axes):
    """Axes of a `Sheet`, which a notebook shows in their place."""

    def _ipython_display_(self) -> None:
        self.get_figure(root=True)._ipython_display_()


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
            yield figure.subplots(subplot_kw={"axes_class": SheetAxes})


@contextmanager
def panels(
    ax: Any,
    size: tuple[float, float],
    rows: int,
    columns: int,
    layout: str = "constrained",
    **how: Any,
) -> Iterator[np.ndarray]:
    """The given axes, as many as rows x columns, or those of a new figure of a size in inches.

    ax    None, one axes or a sequence or array of them; how: options of `Figure.subplots`

    Raises `ValueError` for another number of axes.
    """
    if ax is not None:
        given = np.ravel(np.asarray(ax, dtype=object))
        if len(given) != rows * columns:
            raise ValueError(f"ax has {len(given)} axes; the picture has {rows * columns} panels")
        yield given
    else:
        with sheet(*size, layout=layout) as figure:
            options = {"squeeze": False, "subplot_kw": {"axes_class": SheetAxes}} | how
            yield figure.subplots(rows, columns, **options).ravel()


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
        done, planned = getattr(source, "finished", 0), getattr(source, "planned", 0)
        if done < planned:
            frame.attrs[UNFINISHED] = f"Unfinished: {done} of {planned} cells"
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
    looks = family_styles(models.family.unique())
    lines = models.groupby("family", dropna=False).cumcount() % len(LINES)
    styles = {}
    for model, family, line in zip(models.model, models.family, lines, strict=True):
        color, marker = looks[family]
        styles[model] = {"color": color, "marker": marker, "linestyle": LINES[line]}
    return styles


def family_styles(families: Iterable[Any]) -> dict[Any, tuple[str, str]]:
    """Color and marker of each. One that FAMILY_STYLE does not have, such as one of the
    transformers library, has that of `OTHER_STYLE` which its name leads to, in every plot but
    beside another one of the same color: then the next color. An entry of your own in FAMILY_STYLE
    comes first. Black is the color of letters, whatever the style."""
    looks = {f: (ink(1) if c == "#000000" else c, m) for f, (c, m) in FAMILY_STYLE.items()}
    taken: set[str] = set()
    for family in sorted({f for f in families if f not in looks}, key=str):
        first = zlib.crc32(str(family).encode())
        order = [OTHER_STYLE[(first + i) % len(OTHER_STYLE)] for i in range(len(OTHER_STYLE))]
        looks[family] = next((look for look in order if look[0] not in taken), order[0])
        taken.add(looks[family][0])
    return looks


def filled(style: dict[str, str]) -> float:
    """How much of the color a marker's face has where there are no lines: see `FACES`."""
    return FACES[LINES.index(style["linestyle"])]


def tint(color: str, share: float) -> str:
    """So much of a color, the rest that of the style's background."""
    return to_hex(share * np.array(to_rgb(color)) + (1 - share) * np.array(to_rgb(ground())))


def ground() -> str:
    """The color of the style's background."""
    return str(mpl.rcParams["axes.facecolor"])


def ink(share: float = 0.75) -> str:
    """So much of the color of the style's letters, the rest of its background: what stands beside
    families' colors can be seen in a dark style, too."""
    return tint(str(mpl.rcParams["text.color"]), share)


def marker_look(style: dict[str, str]) -> dict[str, Any]:
    """A marker where there are no lines to tell models of one family apart by: solid, hollow, then
    two tints. A white edge parts it from others, and must leave something of it."""
    share = filled(style)
    face = tint(style["color"], share)
    edge = {"mec": ground(), "mew": 0.3} if share == 1 else {"mec": style["color"], "mew": 0.8}
    return {"color": style["color"], "marker": style["marker"], "mfc": face, **edge}


def darker(color: str, share: float = 0.25) -> str:
    """So much of it the color of letters, which need more contrast than lines."""
    mixed = (1 - share) * np.array(to_rgb(color)) + share * np.array(to_rgb(ink(1)))
    return to_hex(mixed)

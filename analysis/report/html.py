"""Parts of a page: templates of this folder, tables, and pictures that share one document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis.plots import picture_bytes
from analysis.stats import bounds_of, column_texts

LONG = 16  # rows, of more a table is folded
POINTS = 72  # an inch
# CSS pixels of a picture's point, where there is room and at least: letters of 8 points are 16 and
# 10 pixels high. A picture that is too wide for that is scrolled.
SCALE, LEAST = 2.0, 1.25


def render(template: str, **values: Any) -> str:
    """The page of a template in this folder; what is put in is escaped, unless it is `Markup`.

    base.html has what every page has: language, policy (nothing is loaded from anywhere), style,
    skip link, and table of contents from `sections`, pairs (id, title).
    """
    loader = FileSystemLoader(Path(__file__).parent)
    how: dict[str, Any] = dict(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    pages = Environment(loader=loader, autoescape=True, **how)
    return pages.get_template(template).render(values)


class Column(NamedTuple):
    """Of a table: its title, and whether it has numbers, which are aligned."""

    title: str
    number: bool


class Cells(NamedTuple):
    """A table as texts; the first `heads` columns name the row."""

    name: str
    title: str
    columns: list[Column]
    rows: list[list[str]]
    heads: int = 1

    @property
    def folded(self) -> bool:
        """Whether it is long."""
        return len(self.rows) > LONG


def cells(
    name: str, title: str, table: pd.DataFrame, columns: Mapping[str, str] | None = None
) -> Cells:
    """A table of this package for `table` of parts.html, intervals in the cells of their values.

    columns   name -> title of those that are shown where the table has them; default: all, by
              their names
    """
    bounds = {bound for column in table for bound in bounds_of(table, column) or ()}
    own = {column: column.replace("_", " ") for column in table if column not in bounds}
    shown = {column: said for column, said in (columns or own).items() if column in table}
    described, texts = [], []
    for column, said in shown.items():
        number = pd.api.types.is_numeric_dtype(table[column])
        described.append(Column(said, number))
        own_texts = column_texts(table, column)
        texts.append([_typeset(text) for text in own_texts] if number else own_texts)
    return Cells(name, title, described, [list(row) for row in zip(*texts, strict=True)])


def _typeset(number: str) -> str:
    """With true minus signs, and commas between thousands."""
    text = re.sub(r"(?<![\de])-(?=\d)", "\N{MINUS SIGN}", number)
    return f"{int(text):,}" if text.isdecimal() else text


def inline_svg(figure: Figure, name: str, labelled_by: str) -> Markup:
    """The picture as an element of a page that has others: its ids begin with its name, its style
    stands in that of the page, and the element with the id `labelled_by` says what it shows."""
    text = picture_bytes(figure, "svg", name).decode()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg ") :],
                  flags=re.DOTALL)  # fmt: skip
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(?<= d=\")[^\"]*", _rounded, text)
    width, height = (SCALE * POINTS * size for size in figure.get_size_inches())
    size = f'viewBox="0 0 {width / SCALE:g} {height / SCALE:g}" width="{width:g}"'
    size += f' style="min-width: {width / SCALE * LEAST:g}px"'
    head = f'<svg {size} role="img" aria-labelledby="{labelled_by}">'
    return Markup(head + text[text.index(">") + 1 :])  # of matplotlib, which escapes


def _rounded(path: re.Match[str]) -> str:
    """A path to a hundredth of a point."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path[0])


def listed(texts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))

"""Tables for a paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real

import pandas as pd

from analysis.stats.bootstrap import whole
from analysis.stats.columns import check_choice
from analysis.stats.texts import FEW, FEW_NOTE, bounds_of, column_texts, value_text


def latex(
    table: pd.DataFrame,
    columns: Sequence[str] | Mapping[str, str] | None = None,
    *,
    digits: int = 3,
    caption: str | None = None,
    label: str | None = None,
) -> str:
    """A table of this package as LaTeX with booktabs, a column and its bounds in one cell.

    columns   which, in this order, or name -> title; default: all, a bound beside its value
    digits    decimals, more where a number would show none
    caption, label   make it a table that floats; a caption is text, not LaTeX

    Intervals of few documents have the mark that printed tables have; what it means stands in the
    caption, or without one in a comment. Raises `ValueError` for what is no table, has no rows, or
    for an unknown column.
    """
    if not isinstance(table, pd.DataFrame) or table.empty:
        raise ValueError(f"table is a {type(table).__name__}; give a table that has rows")
    digits = whole("digits", digits, 0)
    table = table.set_axis(table.columns.map(str), axis=1)
    if not table.columns.is_unique:
        raise ValueError(f"table has two columns of one name; it has {', '.join(table.columns)}")
    bounds = {name: found for name in table if (found := bounds_of(table, name))}
    beside = {bound for found in bounds.values() for bound in found}
    chosen = columns or [name for name in table if name not in beside]
    for name in chosen:
        check_choice("columns", name, table)
    if not isinstance(chosen, Mapping):
        chosen = {name: name.replace("_", " ") for name in chosen}
    cells = {
        name: [_number(text) for text in column_texts(table, name, digits)]
        if name in bounds
        else [_text(value, digits) for value in table[name]]
        for name in chosen
    }
    few = any(text.endswith(FEW) for name in cells if name in bounds for text in cells[name])
    caption = caption and _escaped(f"{caption} ({FEW_NOTE}.)" if few else caption)
    numbers = [n in bounds or pd.api.types.is_numeric_dtype(table[n]) for n in chosen]
    text = pd.DataFrame(cells).to_latex(
        index=False,
        header=[_escaped(title) for title in chosen.values()],
        column_format="".join("r" if number else "l" for number in numbers),
        caption=caption,
        label=label,
        position="t" if caption or label else None,
    )
    return f"% {FEW_NOTE}\n{text}" if few and not caption else text


def _text(value: object, digits: int) -> str:
    text = value_text(value, digits)
    if isinstance(value, Real) or text == "-":
        return _number(text)
    text = _escaped(text)
    return f"{{}}{text}" if text.startswith("[") else text  # else an option of what is before


def _number(text: str) -> str:
    """With true minus signs and powers of ten."""
    text = re.sub(r"e([+-])0*(\d+)", lambda m: rf"$\cdot10^{{{m[1].strip('+')}{m[2]}}}$", text)
    return re.sub(r"(?<![{\d])-(?=\d)", "$-$", text)


SPECIAL = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}"},
}


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(char, char) for char in text)

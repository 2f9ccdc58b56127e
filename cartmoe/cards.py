"""What an object shows of itself in a notebook: a line, facts, and the tables that a reader needs
first."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

MOST = 12  # rows of a table


def card(
    title: str, facts: Mapping[str, object] | None = None, tables: Mapping[str, Any] | None = None
) -> str:
    """HTML of a title, a line a fact, and pandas frames under their names.

    Of a longer table than `MOST` rows the first ones, and how many there are.
    """
    parts = [f"<p><b>{escape(title)}</b></p>"]
    if facts:
        rows = (
            f"<tr><th style='text-align:left'>{escape(name)}</th>"
            f"<td style='text-align:left'>{escape(str(value))}</td></tr>"
            for name, value in facts.items()
        )
        parts.append(f"<table><tbody>{''.join(rows)}</tbody></table>")
    for name, table in (tables or {}).items():
        more = f", the first {MOST} of {len(table):,} rows" if len(table) > MOST else ""
        parts.append(f"<p>{escape(name)}{more}</p>")
        parts.append(table.head(MOST).to_html(index=False, na_rep="", justify="left"))
    return f"<div>{''.join(parts)}</div>"

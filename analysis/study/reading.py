"""Tables of a file that people write, read to the end: mistakes are noted, not raised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from cartmoe.config import check_choice


class Mistakes:
    """Noted one after the other, so that all are reported at once."""

    def __init__(self):
        self.mistakes: list[str] = []

    def attempt(self, where: str, make, /, *args, **kwargs):
        """make(...), or None with its mistakes noted."""
        try:
            return make(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            # What a TypeError says names no parameter.
            given = f" ({kwargs})" if isinstance(error, TypeError) else ""
            lines = f"{error}{given}".splitlines()
            self.mistakes += [f"{where}: {line}" for line in lines]

    def finish(self, origin: str) -> None:
        """Raise `ValueError`, a line a mistake, each of them beginning with `origin`."""
        if self.mistakes:
            # One may be met once for each member of a grid.
            raise ValueError("\n".join(f"{origin}: {m}" for m in dict.fromkeys(self.mistakes)))


class TableReader(Mistakes):
    """Reads the tables of a file, and goes on after a mistake."""

    def known(self, where: str, table: Mapping, keys: Iterable[str]) -> dict[str, Any]:
        """Those of the table's keys that there are."""
        keys = sorted(keys)
        for key in (key for key in table if key not in keys):
            self.mistakes.append(f"{where}{key}: no such key; choose one of {', '.join(keys)}")
        return {key: value for key, value in table.items() if key in keys}

    def table(self, where: str, value: Any) -> Mapping:
        """The value if it is a table; else an empty one."""
        if isinstance(value, Mapping):
            return value
        self.mistakes.append(f"{where}: it is {value!r}; write a table, [{where}]")
        return {}

    def tables(self, name: str, study: Mapping) -> Iterable[tuple[str, Mapping]]:
        """(where, table) for each of an array of tables."""
        value = study.get(name, [])
        if isinstance(value, list) and all(isinstance(table, Mapping) for table in value):
            return [(f"{name}[{i}]", table) for i, table in enumerate(value)]
        self.mistakes.append(f"{name}: it is {value!r}; write tables, [[{name}]]")
        return []

    def items(self, where: str, value: Any) -> list[Any]:
        """The items of a list, or the value as the only one."""
        if value == []:
            self.mistakes.append(f"{where}: the list is empty")
        return value if isinstance(value, list) else [value]

    def choices(self, where: str, name: str, value: Any, choices: Iterable[Any]) -> list[Any]:
        """Those items that are choices."""
        items, choices = self.items(where, value), list(choices)
        for item in items:
            self.attempt(where, check_choice, name, item, choices)
        return [item for item in items if item in choices]

    def build(self, name: str, cls: type, study: Mapping):
        """The class with the fields of the table of that name; None with the mistakes noted."""
        table = self.table(name, study.get(name, {}))
        known = self.known(f"{name}.", table, (f.name for f in fields(cls)))
        return self.attempt(name, cls, **known)

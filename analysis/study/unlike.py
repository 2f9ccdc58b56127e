"""Why the cells that are kept are not those of a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.study.worker import PlannedCell

COMPARED = 32  # planned cells, for what is other about all of them


def why_others(planned: Sequence[PlannedCell], kept: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line where there are finished cells and none of them is planned: what is other about the
    one that is most like a planned one."""
    if not kept or not planned or any(cell.key in kept for cell in planned):
        return []

    def differing(cell: PlannedCell, of: Mapping[str, Any]) -> list[str]:
        return [name for name, value in cell.identity.items() if of.get(name) != value]

    pairs = [(cell, of) for cell in planned[:COMPARED] for of in kept.values()]
    cell, of = min(pairs, key=lambda pair: len(differing(*pair)))
    said = [f"{name} {_short(of.get(name))} then, {_short(cell.identity[name])} now"
            for name in differing(cell, of)]  # fmt: skip
    return [
        f"{len(kept)} cells are kept there, and none of them is of this plan: {'; '.join(said)}. "
        "They stay, and all are measured anew"
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."

"""Tables of the documentation that say what dicts, or results/, say: python docs/tables.py writes
them anew.

In README.md and docs/*.md a table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

import analysis as an
from analysis.perturb import about

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; a | in a cell is no border."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in r] for r in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def perturbations() -> str:
    """Name, strength, the first paragraph of its docstring."""
    rows = (
        (f"`{name}`", f"`{cls.strength_field}`" if cls.strength_field else "", about(cls))
        for name, cls in an.PERTURBATIONS.items()
    )
    return markdown(["perturbation", "strength", "what it does to each token"], rows)


def metrics() -> str:
    """Name, what a row is of, what it is, its null."""
    rows = []
    for name, metric in an.METRICS.items():
        what, _, null = metric.about.partition("; null")
        rows.append((f"`{name}`", metric.kind, metric.table, what, null.lstrip(": ")))
    return markdown(["metric", "of", "a row a", "what it is", "null"], rows)


PARTS = ("trained", "third")
CONDITIONS = {
    "DropTop(1)": "top-1 disabled",
    "DropTop(1), stage 0": "in stage 0",
    "DropTop(1), stage 1": "in stage 1",
    "DropChosen(1)": "any chosen one",
    "RandomRouting(1)": "random routing",
}


def trained() -> str:
    """The paper's Table 4 of the trained models: mean, lowest and highest training seed."""
    clean, damage = (
        pd.concat([pd.read_parquet(ROOT / "results" / part / f"{name}.parquet") for part in PARTS])
        for name in ("clean", "damage")
    )
    loss = over_seeds(clean, "model", "bits_per_byte", "{:.3f}")
    cost = over_seeds(damage, ["model", "label"], "delta_nats", "{:+.2f}")
    rows = (
        [f"`{model}`", bits, *(cost.get((model, label), "") for label in CONDITIONS)]
        for model, bits in loss.items()
    )
    return markdown(["model", "bits per byte", *CONDITIONS.values()], rows)


def over_seeds(rows: pd.DataFrame, by: Any, value: str, form: str) -> dict[Any, str]:
    """Of each group's seeds the mean, and from where to where they go."""
    groups = rows.groupby(by, sort=False)[value]
    plain = form.replace("+", "")
    return {
        key: f"{form.format(v.mean())} ({plain.format(v.min())} to {plain.format(v.max())})"
        for key, v in groups
    }


TABLES: dict[str, Callable[[], str]] = {
    "trained": trained,
    "perturbations": perturbations,
    "metrics": metrics,
}


def filled(text: str) -> str:
    """A page with its tables as they are today."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
